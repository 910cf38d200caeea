//! Loading a pool from the log.

use super::operation::{self, Arg, Operation};
use super::{Path, RedisCapacity, Reply};
use crate::types::exact;
use crate::{Epoch, Error, Load, MAX_ORDER, Queue, REBUILD_BATCH, Result, Stamp, keys};

/// Tries to find an epoch that sorts after the one that is there, while others begin at the same time.
const BEGIN_LIMIT: usize = 5;

impl RedisCapacity {
    pub(super) async fn do_rebuild_begin(&self, pool: &str, now_ms: u64) -> Result<Epoch> {
        let now_ms = exact("now_ms", now_ms)?;
        let mut list = redis::cmd("SADD");
        self.command(list.arg(keys::pools(&self.0.prefix)).arg(pool)).await?;
        let epoch = self.begin(pool, now_ms).await?;
        loop {
            let args = [Arg::Number(REBUILD_BATCH as u64)];
            let mut reply = self.step(&operation::REBUILD_WIPE, pool, &epoch, &args).await?;
            if reply.count()? == 0 {
                tracing::info!(pool, %epoch, "rebuilding capacity");
                return Ok(epoch);
            }
        }
    }

    async fn begin(&self, pool: &str, now_ms: u64) -> Result<Epoch> {
        let mut last = self.0.known.get(pool).map(|known| known.epoch);
        for _ in 0..BEGIN_LIMIT {
            let epoch = Epoch::after(last.as_ref(), now_ms);
            let args = [Arg::Text(epoch.as_str()), Arg::Number(now_ms)];
            let meta_key = keys::meta(&self.0.prefix, pool);
            let mut reply = self.invoke(Path::View, &operation::REBUILD_BEGIN, &meta_key, &[&args]).await?;
            match reply.int()? {
                1 => return Ok(epoch),
                -1 => last = Some(Epoch::read(&reply.text()?)),
                other => return Err(reply.wrong(format!("status {other}"))),
            }
        }
        match last {
            Some(epoch) => Err(Error::Stale { pool: pool.to_owned(), epoch }),
            None => Err(Error::NotReady { pool: pool.to_owned() }),
        }
    }

    pub(super) async fn do_rebuild_load(&self, pool: &str, epoch: &Epoch, items: &[Load]) -> Result<()> {
        for batch in items.chunks(REBUILD_BATCH) {
            // Members have to live as long as the arguments that borrow them.
            let members: Vec<String> = batch.iter().map(member).collect();
            let mut args = Vec::with_capacity(batch.len() * 6);
            for (item, member) in batch.iter().zip(&members) {
                args.extend(load_args(item, member)?);
            }
            self.step(&operation::REBUILD_LOAD, pool, epoch, &args).await?;
        }
        Ok(())
    }

    pub(super) async fn do_rebuild_commit(&self, pool: &str, epoch: &Epoch, stamp: Stamp) -> Result<()> {
        let stamp = stamp.check()?;
        let args = [Arg::Number(stamp.log_seq), Arg::Number(stamp.now_ms)];
        let mut reply = self.step(&operation::REBUILD_COMMIT, pool, epoch, &args).await?;
        let version = reply.count()?;
        self.0.known.note(pool, epoch, version);
        tracing::info!(pool, %epoch, log_seq = stamp.log_seq, "capacity is rebuilt");
        Ok(())
    }

    /// One step of a rebuild; the rest of its answer.
    async fn step(
        &self,
        operation: &Operation,
        pool: &str,
        epoch: &Epoch,
        args: &[Arg<'_>],
    ) -> Result<Reply> {
        let meta_key = keys::meta(&self.0.prefix, pool);
        let first = [Arg::Text(epoch.as_str())];
        let mut reply = self.invoke(Path::View, operation, &meta_key, &[&first, args]).await?;
        match reply.int()? {
            1 => Ok(reply),
            0 => Err(Error::NotReady { pool: pool.to_owned() }),
            -1 => Err(Error::Stale { pool: pool.to_owned(), epoch: Epoch::read(&reply.text()?) }),
            other => Err(reply.wrong(format!("status {other}"))),
        }
    }
}

fn member(item: &Load) -> String {
    match item {
        Load::Agent { .. } => String::new(),
        Load::Slot { hold, .. } | Load::Queued { hold, .. } => hold.member(),
    }
}

fn load_args<'a>(item: &'a Load, member: &'a str) -> Result<[Arg<'a>; 6]> {
    let none = Arg::Text("");
    Ok(match item {
        Load::Agent { agent, setting } => [
            Arg::Text("a"),
            Arg::Text(agent),
            Arg::Number(setting.capacity.into()),
            Arg::Number(setting.open.into()),
            Arg::Number(exact("setting_seq", setting.setting_seq)?),
            Arg::Number(setting.external_only.into()),
        ],
        Load::Slot { agent, granted_at_ms, .. } => [
            Arg::Text("s"),
            Arg::Text(agent),
            Arg::Text(member),
            Arg::Number(exact("granted_at_ms", *granted_at_ms)?),
            none,
            none,
        ],
        Load::Queued { queue, priority, order, .. } => {
            checked_order(*order)?;
            let agent = match queue {
                Queue::Agent(agent) => agent.as_str(),
                Queue::Pool | Queue::External => "",
            };
            [
                Arg::Text("q"),
                Arg::Text(agent),
                Arg::Text(member),
                Arg::Number(priority.get().into()),
                Arg::Order(*order),
                Arg::Number((*queue == Queue::External).into()),
            ]
        }
    })
}

/// Refuses an order that would reach into the next priority.
pub(crate) fn checked_order(order: i64) -> Result<i64> {
    if order.unsigned_abs() > MAX_ORDER.unsigned_abs() {
        return Err(Error::OutOfRange { what: "order", value: order.unsigned_abs() });
    }
    Ok(order)
}
