//! The same in memory: what the Redis one is compared with, and what others can test against without a server.

mod pool;

use std::collections::{BTreeMap, btree_map::Entry};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::pool::Pool;
use crate::known::{Known, KnownPools};
use crate::redis_backed::checked_order;
use crate::types::exact;
use crate::{
    Admission, AgentSetting, AgentView, Ask, Capacity, Confirmation, Epoch, Error, Filled, Grant,
    GrantedSlot, Hold, Load, Meta, PoolState, PoolView, Queue, Removed, Requeue, Requeued, Result,
    ScanCursor, ScanPage, Settled, Stamp, Unconfirmed,
};

/// [`Capacity`] in memory, for tests. Starts empty, so not ready, like an empty Redis. [`Self::handle`] makes another
/// handle to the same data, as another process would have.
#[derive(Debug, Default)]
pub struct ModelCapacity {
    pools: Arc<Mutex<BTreeMap<String, Pool>>>,
    /// Until when it is somebody's turn, in ms.
    turns: Arc<Mutex<BTreeMap<(String, Hold), u64>>>,
    known: KnownPools,
}

/// A copy of all data, to go back to: a failover to stale data.
#[derive(Debug, Clone)]
pub struct ModelSnapshot(BTreeMap<String, Pool>);

impl ModelCapacity {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another handle to the same data, which has seen nothing yet.
    pub fn handle(&self) -> Self {
        Self { pools: Arc::clone(&self.pools), turns: Arc::clone(&self.turns), known: KnownPools::default() }
    }

    /// Loses everything, as FLUSHALL does.
    pub fn flush(&self) {
        self.lock().clear();
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The data of now.
    pub fn snapshot(&self) -> ModelSnapshot {
        ModelSnapshot(self.lock().clone())
    }

    /// Goes back to the data of then.
    pub fn restore(&self, snapshot: ModelSnapshot) {
        *self.lock() = snapshot.0;
    }

    /// The log shows that the pool has reflected it up to `log_seq`: see [`RedisCapacity::expect`](crate::RedisCapacity::expect).
    pub fn expect(&self, pool: &str, log_seq: u64) {
        self.known.expect(pool, log_seq);
    }

    /// Whether it is the caller's turn, by the server's clock: see [`RedisCapacity::take_turn`](crate::RedisCapacity::take_turn).
    pub fn take_turn(&self, pool: &str, hold: &Hold, lasts_ms: u64, now_ms: u64) -> bool {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, until| *until > now_ms);
        match turns.entry((pool.to_owned(), hold.clone())) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(now_ms + lasts_ms);
                true
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Pool>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with a pool that is ready and the one meant.
    fn with<T>(&self, pool: &str, stamp: Stamp, act: impl FnOnce(&mut Pool) -> (T, bool)) -> Result<T> {
        let stamp = stamp.check()?;
        let mut pools = self.lock();
        let there = match pools.get_mut(pool) {
            Some(there) if there.state == PoolState::Ready => there,
            _ => return Err(Error::NotReady { pool: pool.to_owned() }),
        };
        match self.known.get(pool) {
            Some(Known { epoch, version }) if epoch == there.epoch => {
                if there.version < version {
                    return Err(Error::MovedBack { pool: pool.to_owned() });
                }
            }
            _ => self.known.meet(pool, &there.epoch)?,
        }
        if there.meta().log_seq < self.known.reflected(pool) {
            return Err(Error::MovedBack { pool: pool.to_owned() });
        }
        let (answer, changed) = act(there);
        there.finish(changed, stamp);
        self.known.note(pool, &there.epoch, there.version);
        Ok(answer)
    }

    fn view<T>(&self, pool: &str, look: impl FnOnce(&Pool) -> T) -> Result<T> {
        self.with(pool, Stamp::new(0, 0), |pool| (look(pool), false))
    }

    /// Does something with a pool that this rebuild still owns.
    fn rebuild<T>(&self, pool: &str, epoch: &Epoch, act: impl FnOnce(&mut Pool) -> T) -> Result<T> {
        let mut pools = self.lock();
        let there = pools.get_mut(pool).ok_or_else(|| Error::NotReady { pool: pool.to_owned() })?;
        if there.epoch != *epoch {
            return Err(Error::Stale { pool: pool.to_owned(), epoch: there.epoch.clone() });
        }
        Ok(act(there))
    }
}

impl Capacity for ModelCapacity {
    async fn admit_to_agent(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        ask: Ask,
        stamp: Stamp,
    ) -> Result<Admission> {
        let queue = Queue::Agent(agent.to_owned());
        self.with(pool, stamp, |pool| pool.admit(queue, hold, ask, stamp.now_ms))
    }

    async fn admit_to_pool(&self, pool: &str, hold: &Hold, ask: Ask, stamp: Stamp) -> Result<Admission> {
        let queue = if ask.external { Queue::External } else { Queue::Pool };
        self.with(pool, stamp, |pool| pool.admit(queue, hold, ask, stamp.now_ms))
    }

    async fn confirm(&self, pool: &str, grant: &Grant, stamp: Stamp) -> Result<Confirmation> {
        self.with(pool, stamp, |pool| pool.confirm(grant, stamp.now_ms))
    }

    async fn confirm_queued(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<bool> {
        self.with(pool, stamp, |pool| pool.confirm_queued(hold))
    }

    async fn settle(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<Settled> {
        self.with(pool, stamp, |pool| pool.settle(hold, stamp.now_ms))
    }

    async fn reclaim(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<Settled> {
        self.with(pool, stamp, |pool| pool.reclaim(hold, stamp.now_ms))
    }

    async fn requeue(&self, pool: &str, requeue: &Requeue, stamp: Stamp) -> Result<Requeued> {
        requeue.granted_at_ms.map(|at| exact("granted_at_ms", at)).transpose()?;
        requeue.granted_by_ms.map(|at| exact("granted_by_ms", at)).transpose()?;
        self.with(pool, stamp, |pool| pool.requeue(requeue, stamp.now_ms))
    }

    async fn adopt(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        granted_at_ms: u64,
        stamp: Stamp,
    ) -> Result<bool> {
        let granted_at_ms = exact("granted_at_ms", granted_at_ms)?;
        self.with(pool, stamp, |pool| pool.adopt(agent, hold, granted_at_ms))
    }

    async fn relocate(
        &self,
        pool: &str,
        found: &GrantedSlot,
        agent: &str,
        since_ms: u64,
        stamp: Stamp,
    ) -> Result<bool> {
        exact("granted_at_ms", found.granted_at_ms)?;
        let since_ms = exact("since_ms", since_ms)?;
        self.with(pool, stamp, |pool| pool.relocate(found, agent, since_ms))
    }

    async fn set_agent(
        &self,
        pool: &str,
        agent: &str,
        setting: AgentSetting,
        stamp: Stamp,
    ) -> Result<Filled> {
        exact("setting_seq", setting.setting_seq)?;
        self.with(pool, stamp, |pool| pool.set_agent(agent, setting, stamp.now_ms))
    }

    async fn reopen(&self, pool: &str, agent: &str, stamp: Stamp) -> Result<Filled> {
        self.with(pool, stamp, |pool| pool.reopen(agent, stamp.now_ms))
    }

    async fn remove_agent(&self, pool: &str, agent: &str, setting_seq: u64, stamp: Stamp) -> Result<Removed> {
        let setting_seq = exact("setting_seq", setting_seq)?;
        self.with(pool, stamp, |pool| pool.remove_agent(agent, setting_seq))
    }

    async fn promote(&self, pool: &str, agent: &str, stamp: Stamp) -> Result<Filled> {
        self.with(pool, stamp, |pool| pool.promote(agent, stamp.now_ms))
    }

    async fn inspect(&self, pool: &str, agent: &str, limit: usize) -> Result<AgentView> {
        self.view(pool, |pool| pool.inspect(agent, limit))
    }

    async fn inspect_pool(&self, pool: &str, limit: usize) -> Result<PoolView> {
        self.view(pool, |pool| pool.inspect_pool(limit))
    }

    async fn scan(&self, pool: &str, from: Option<ScanCursor>) -> Result<ScanPage> {
        self.view(pool, |pool| pool.scan(from.unwrap_or_default()))
    }

    async fn unconfirmed(&self, pool: &str, before_ms: u64, limit: usize) -> Result<Vec<Unconfirmed>> {
        let before_ms = exact("before_ms", before_ms)?;
        self.view(pool, |pool| pool.unconfirmed(before_ms, limit))
    }

    async fn waiting_with_free(&self, pool: &str) -> Result<Vec<String>> {
        self.view(pool, Pool::waiting_with_free)
    }

    async fn agents(&self, pool: &str) -> Result<Vec<String>> {
        self.view(pool, Pool::agents)
    }

    async fn rebuild_begin(&self, pool: &str, now_ms: u64) -> Result<Epoch> {
        let now_ms = exact("now_ms", now_ms)?;
        let mut pools = self.lock();
        let there = pools.get(pool).map(|there| there.epoch.clone());
        let known = self.known.get(pool).map(|known| known.epoch);
        let epoch = Epoch::after(there.max(known).as_ref(), now_ms);
        pools.insert(pool.to_owned(), Pool::rebuilding(epoch.clone(), now_ms));
        Ok(epoch)
    }

    async fn rebuild_load(&self, pool: &str, epoch: &Epoch, items: &[Load]) -> Result<()> {
        for item in items {
            match item {
                Load::Queued { order, .. } => {
                    checked_order(*order)?;
                }
                Load::Slot { granted_at_ms, .. } => {
                    exact("granted_at_ms", *granted_at_ms)?;
                }
                Load::Agent { setting, .. } => {
                    exact("setting_seq", setting.setting_seq)?;
                }
            }
        }
        if items.is_empty() {
            return Ok(());
        }
        let loaded = self.rebuild(pool, epoch, |pool| {
            let open = pool.state == PoolState::Rebuilding;
            if open {
                items.iter().for_each(|item| pool.load(item));
            }
            open
        })?;
        if loaded { Ok(()) } else { Err(Error::Stale { pool: pool.to_owned(), epoch: epoch.clone() }) }
    }

    async fn rebuild_commit(&self, pool: &str, epoch: &Epoch, stamp: Stamp) -> Result<()> {
        let stamp = stamp.check()?;
        let version = self.rebuild(pool, epoch, |pool| {
            pool.commit(stamp);
            pool.version
        })?;
        self.known.note(pool, epoch, version);
        Ok(())
    }

    async fn meta(&self, pool: &str) -> Result<Option<Meta>> {
        Ok(self.lock().get(pool).map(Pool::meta))
    }

    async fn pools(&self) -> Result<Vec<String>> {
        Ok(self.lock().keys().cloned().collect())
    }

    async fn ping(&self) -> Result<()> {
        Ok(())
    }
}
