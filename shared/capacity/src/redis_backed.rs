//! Slots and queues in Redis.

mod changes;
mod lane;
mod operation;
mod rebuild;
mod reply;
mod views;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_redis::{Pool, Runtime};
use redis::{AsyncConnectionConfig, RedisError, Value};

use self::lane::Lane;
pub use self::lane::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT, Timeouts};
use self::operation::{Arg, Operation};
pub(crate) use self::rebuild::checked_order;
use self::reply::Reply;
use crate::known::{Known, KnownPools};
use crate::{
    Admission, AgentSetting, AgentView, Ask, Capacity, Confirmation, Epoch, Error, Filled, Grant,
    GrantedSlot, Hold, Load, Meta, PoolView, Removed, Requeue, Requeued, Result, ScanCursor, ScanPage,
    Settled, Stamp, Unconfirmed, keys,
};

/// Multiplexed connections for the operations of every execution, used in turn: two carry more than one.
pub const HOT_CONNECTIONS: usize = 2;
/// Connections for looking, scanning and rebuilding, so that their long answers don't hold up the others.
const VIEW_CONNECTIONS: usize = 4;
/// Times a call follows a rebuild by somebody else before it gives up.
const FOLLOW_LIMIT: usize = 3;

/// [`Capacity`] in Redis. Clones share connections and what was seen of the pools.
#[derive(Clone)]
pub struct RedisCapacity(Arc<Inner>);

struct Inner {
    prefix: String,
    lanes: [Lane; HOT_CONNECTIONS],
    turn: AtomicUsize,
    views: Pool,
    known: KnownPools,
}

/// On which connection a script runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Hot,
    View,
}

impl RedisCapacity {
    /// A handle to the Redis at `url` (`redis://...`, `redis+unix:///path`). It connects when it is first used, so that a program
    /// starts without Redis; [`Capacity::ping`] tells whether it is there.
    ///
    /// # Errors
    /// [`Error::Url`] when the address can't be understood.
    pub async fn connect(url: &str, prefix: &str) -> Result<Self> {
        Self::connect_with(url, prefix, Timeouts::default()).await
    }

    /// The same, with timeouts of one's own.
    ///
    /// # Errors
    /// [`Error::Url`] when the address can't be understood.
    pub async fn connect_with(url: &str, prefix: &str, timeouts: Timeouts) -> Result<Self> {
        let bad = |error: RedisError| Error::Url(Box::new(error));
        let client = redis::Client::open(url).map_err(bad)?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(timeouts.connect))
            .set_response_timeout(Some(timeouts.response));
        let connections = deadpool_redis::Manager::new_with_config(url, config).map_err(bad)?;
        let views = Pool::builder(connections)
            .max_size(VIEW_CONNECTIONS)
            .wait_timeout(Some(timeouts.response))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| Error::Url(Box::new(error)))?;
        Ok(Self(Arc::new(Inner {
            prefix: prefix.to_owned(),
            lanes: [
                Lane::new(client.clone(), timeouts).map_err(bad)?,
                Lane::new(client, timeouts).map_err(bad)?,
            ],
            turn: AtomicUsize::new(0),
            views,
            known: KnownPools::default(),
        })))
    }

    /// The log shows that the pool has reflected it up to `log_seq`, whichever process told Redis: data that is behind that
    /// has gone back in time ([`Error::MovedBack`]).
    pub fn expect(&self, pool: &str, log_seq: u64) {
        self.0.known.expect(pool, log_seq);
    }

    /// Another log is read from here on: nothing is expected of any pool.
    pub fn expect_nothing(&self) {
        self.0.known.expect_nothing();
    }

    /// Whether it is the caller's turn to do something about a hold that one process at a time may do: nobody else's for so
    /// long from now. Not a lock: nobody gives it back, and a Redis that is lost forgets it.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: then it is nobody's turn.
    pub async fn take_turn(&self, pool: &str, hold: &Hold, lasts: Duration) -> Result<bool> {
        let key = keys::turn(&self.0.prefix, pool, &hold.member());
        let mut set = redis::cmd("SET");
        set.arg(key).arg(1).arg("NX").arg("PX").arg(u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX));
        Ok(self.command(&set).await? == Value::Okay)
    }

    fn lane(&self) -> &Lane {
        let turn = self.0.turn.fetch_add(1, Ordering::Relaxed);
        &self.0.lanes[turn % HOT_CONNECTIONS]
    }

    /// One command on a hot connection.
    async fn command(&self, command: &redis::Cmd) -> Result<Value> {
        let lane = self.lane();
        let (number, mut connection) = lane.get();
        let answer = command.query_async(&mut connection).await;
        answer.map_err(|error| {
            lane.failed(number, &error);
            unavailable(error)
        })
    }

    /// Runs a script once, as it is.
    async fn invoke(
        &self,
        path: Path,
        operation: &Operation,
        meta_key: &str,
        args: &[&[Arg<'_>]],
    ) -> Result<Reply> {
        let mut invocation = operation.script.prepare_invoke();
        invocation.key(meta_key);
        for arg in args.iter().copied().flatten() {
            invocation.arg(*arg);
        }
        let value: Value = match path {
            Path::Hot => {
                let lane = self.lane();
                let (number, mut connection) = lane.get();
                invocation.invoke_async(&mut connection).await.map_err(|error| {
                    lane.failed(number, &error);
                    unavailable(error)
                })?
            }
            Path::View => {
                let mut connection =
                    self.0.views.get().await.map_err(|error| Error::Unavailable(Box::new(error)))?;
                let answer = invocation.invoke_async(&mut connection).await;
                if answer.as_ref().is_err_and(RedisError::is_timeout) {
                    // Its answer may still come: nobody else should read it, and the peer may be gone.
                    drop(deadpool_redis::Connection::take(connection));
                }
                answer.map_err(unavailable)?
            }
        };
        Reply::new(operation.name, value)
    }

    /// Runs a guarded script: with the epoch and version that are known, and again if another process rebuilt.
    async fn run(
        &self,
        path: Path,
        operation: &Operation,
        pool: &str,
        stamp: Stamp,
        args: &[Arg<'_>],
    ) -> Result<(Epoch, Reply)> {
        let stamp = stamp.check()?;
        let meta_key = keys::meta(&self.0.prefix, pool);
        for _ in 0..FOLLOW_LIMIT {
            let known = self.known(pool).await?;
            let first = [
                Arg::Text(known.epoch.as_str()),
                Arg::Number(known.version),
                Arg::Number(stamp.now_ms),
                Arg::Number(stamp.log_seq),
            ];
            let last = [Arg::Number(crate::types::exact("log_seq", self.0.known.reflected(pool))?)];
            let mut reply = self.invoke(path, operation, &meta_key, &[&first, args, &last]).await?;
            match reply.int()? {
                1 => {
                    let version = reply.count()?;
                    self.0.known.note(pool, &known.epoch, version);
                    return Ok((known.epoch, reply));
                }
                0 => return Err(Error::NotReady { pool: pool.to_owned() }),
                -1 => self.0.known.meet(pool, &Epoch::read(&reply.text()?))?,
                -2 => return Err(Error::MovedBack { pool: pool.to_owned() }),
                other => return Err(reply.wrong(format!("status {other}"))),
            }
        }
        let epoch = self.known(pool).await?.epoch;
        Err(Error::Stale { pool: pool.to_owned(), epoch })
    }

    /// A script that only looks.
    async fn view(&self, operation: &Operation, pool: &str, args: &[Arg<'_>]) -> Result<(Epoch, Reply)> {
        self.run(Path::View, operation, pool, Stamp::new(0, 0), args).await
    }

    /// What is known of the pool; at first use, what is there.
    async fn known(&self, pool: &str) -> Result<Known> {
        if let Some(known) = self.0.known.get(pool) {
            return Ok(known);
        }
        match self.read_meta(pool).await? {
            Some(Meta { epoch, version, state: crate::PoolState::Ready, .. }) => {
                self.0.known.note(pool, &epoch, version);
                Ok(Known { epoch, version })
            }
            _ => Err(Error::NotReady { pool: pool.to_owned() }),
        }
    }
}

/// The connection's or the server's failure; what the script itself did wrong can't be told apart and does not matter.
fn unavailable(error: RedisError) -> Error {
    Error::Unavailable(Box::new(error))
}

impl Capacity for RedisCapacity {
    async fn admit_to_agent(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        ask: Ask,
        stamp: Stamp,
    ) -> Result<Admission> {
        self.do_admit_to_agent(pool, agent, hold, ask, stamp).await
    }

    async fn admit_to_pool(&self, pool: &str, hold: &Hold, ask: Ask, stamp: Stamp) -> Result<Admission> {
        self.do_admit_to_pool(pool, hold, ask, stamp).await
    }

    async fn confirm(&self, pool: &str, grant: &Grant, stamp: Stamp) -> Result<Confirmation> {
        self.do_confirm(pool, grant, stamp).await
    }

    async fn confirm_queued(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<bool> {
        self.do_confirm_queued(pool, hold, stamp).await
    }

    async fn settle(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<Settled> {
        self.do_settle(pool, hold, stamp).await
    }

    async fn reclaim(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<Settled> {
        self.do_reclaim(pool, hold, stamp).await
    }

    async fn requeue(&self, pool: &str, requeue: &Requeue, stamp: Stamp) -> Result<Requeued> {
        self.do_requeue(pool, requeue, stamp).await
    }

    async fn adopt(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        granted_at_ms: u64,
        stamp: Stamp,
    ) -> Result<bool> {
        self.do_adopt(pool, agent, hold, granted_at_ms, stamp).await
    }

    async fn relocate(
        &self,
        pool: &str,
        found: &GrantedSlot,
        agent: &str,
        since_ms: u64,
        stamp: Stamp,
    ) -> Result<bool> {
        self.do_relocate(pool, found, agent, since_ms, stamp).await
    }

    async fn set_agent(
        &self,
        pool: &str,
        agent: &str,
        setting: AgentSetting,
        stamp: Stamp,
    ) -> Result<Filled> {
        self.do_set_agent(pool, agent, setting, stamp).await
    }

    async fn reopen(&self, pool: &str, agent: &str, stamp: Stamp) -> Result<Filled> {
        self.do_reopen(pool, agent, stamp).await
    }

    async fn remove_agent(&self, pool: &str, agent: &str, setting_seq: u64, stamp: Stamp) -> Result<Removed> {
        self.do_remove_agent(pool, agent, setting_seq, stamp).await
    }

    async fn promote(&self, pool: &str, agent: &str, stamp: Stamp) -> Result<Filled> {
        self.do_promote(pool, agent, stamp).await
    }

    async fn inspect(&self, pool: &str, agent: &str, limit: usize) -> Result<AgentView> {
        self.do_inspect(pool, agent, limit).await
    }

    async fn inspect_pool(&self, pool: &str, limit: usize) -> Result<PoolView> {
        self.do_inspect_pool(pool, limit).await
    }

    async fn scan(&self, pool: &str, from: Option<ScanCursor>) -> Result<ScanPage> {
        self.do_scan(pool, from).await
    }

    async fn unconfirmed(&self, pool: &str, before_ms: u64, limit: usize) -> Result<Vec<Unconfirmed>> {
        self.do_unconfirmed(pool, before_ms, limit).await
    }

    async fn waiting_with_free(&self, pool: &str) -> Result<Vec<String>> {
        self.do_waiting_with_free(pool).await
    }

    async fn agents(&self, pool: &str) -> Result<Vec<String>> {
        self.do_agents(pool).await
    }

    async fn rebuild_begin(&self, pool: &str, now_ms: u64) -> Result<Epoch> {
        self.do_rebuild_begin(pool, now_ms).await
    }

    async fn rebuild_load(&self, pool: &str, epoch: &Epoch, items: &[Load]) -> Result<()> {
        self.do_rebuild_load(pool, epoch, items).await
    }

    async fn rebuild_commit(&self, pool: &str, epoch: &Epoch, stamp: Stamp) -> Result<()> {
        self.do_rebuild_commit(pool, epoch, stamp).await
    }

    async fn meta(&self, pool: &str) -> Result<Option<Meta>> {
        self.read_meta(pool).await
    }

    async fn pools(&self) -> Result<Vec<String>> {
        self.read_pools().await
    }

    async fn ping(&self) -> Result<()> {
        self.command(&redis::cmd("PING")).await.map(|_| ())
    }
}
