//! Building a pool's slots and queues in Redis from the log: when it is new, was wiped, or went back in time.

use std::{sync::Arc, time::Duration};

use rollcall_capacity::{Capacity, Error as CapacityError, PoolState};
use rollcall_core::{Pool, event::SystemEventKind};
use rollcall_nats::ReadError;

use crate::{decide, shell::Dispatcher};

/// How long somebody else's rebuild may take before it is taken for dead and begun anew. A million open
/// executions load in well under that.
const OTHERS_REBUILD_MAX: Duration = Duration::from_secs(15);
/// Pause between two looks at somebody else's rebuild.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Why a pool could not be rebuilt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RebuildError {
    /// Redis.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// The log.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Dispatcher {
    /// Makes a pool usable. One rebuild at a time in this process; one under way elsewhere is waited for.
    pub(crate) async fn rebuild(self: &Arc<Self>, pool: &Pool) -> Result<(), RebuildError> {
        let _one_at_a_time = self.rebuilding.lock().await;
        let meta = self.capacity.meta(pool.as_str()).await?;
        let others = match &meta {
            Some(meta) if meta.state == PoolState::Rebuilding => {
                let begun = decide::millis(self.ledger.now()).saturating_sub(meta.since_ms);
                Duration::from_millis(begun) < OTHERS_REBUILD_MAX
            }
            // Somebody was faster; whether what is there is what this process knew is checked by the next call.
            Some(_) => match self.capacity.waiting_with_free(pool.as_str()).await {
                Ok(_) => return Ok(()),
                Err(error) if error.wants_rebuild() => false,
                Err(error) => return Err(error.into()),
            },
            None => false,
        };
        if others && self.others_finish(pool).await? {
            return Ok(());
        }
        self.build(pool, if meta.is_some() { "redis went back in time" } else { "redis was empty" }).await
    }

    /// Builds a pool anew although it says that it is ready.
    pub(crate) async fn rebuild_anyway(
        self: &Arc<Self>,
        pool: &Pool,
        cause: &str,
    ) -> Result<(), RebuildError> {
        let _one_at_a_time = self.rebuilding.lock().await;
        self.build(pool, cause).await
    }

    /// Whoever calls this is the one that rebuilds in this process.
    pub(crate) async fn build(self: &Arc<Self>, pool: &Pool, cause: &str) -> Result<(), RebuildError> {
        let epoch = self.capacity.rebuild_begin(pool.as_str(), decide::millis(self.ledger.now())).await?;
        let members = self.call_in(pool).await?;
        // Everything whose effect the wipe took away is in the log by now: read it to its end.
        let log_seq = self.ledger.current().await?;
        let items = self.ledger.read(|projection| decide::load_of(pool, &members, projection));
        let work = items.iter().filter(|i| !matches!(i, rollcall_capacity::Load::Agent { .. })).count();
        self.capacity.rebuild_load(pool.as_str(), &epoch, &items).await?;
        let mut stamp = self.stamp();
        stamp.log_seq = stamp.log_seq.max(log_seq);
        self.capacity.rebuild_commit(pool.as_str(), &epoch, stamp).await?;
        let known_before = self.note_pool(pool);
        tracing::info!(%pool, cause, agents = items.len() - work, open = work, log_seq, "capacity built from the log");
        if known_before || work > 0 {
            metrics::counter!("rollcall_capacity_rebuilt_total").increment(1);
            let facts = serde_json::json!({"pool": pool, "cause": cause, "agents": items.len() - work,
                "executions": work, "log_seq": log_seq});
            self.ledger.system(SystemEventKind::CapacityRebuilt, facts).await;
        }
        self.spawn_fill(pool.clone());
        Ok(())
    }

    fn spawn_fill(self: &Arc<Self>, pool: Pool) {
        let dispatcher = Arc::clone(self);
        self.spawn(async move {
            dispatcher.fill(&pool).await;
        });
    }

    /// Waits for somebody else's rebuild. `false`: it takes too long.
    async fn others_finish(&self, pool: &Pool) -> Result<bool, CapacityError> {
        let deadline = tokio::time::Instant::now() + OTHERS_REBUILD_MAX;
        while tokio::time::Instant::now() < deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
            match self.capacity.meta(pool.as_str()).await? {
                Some(meta) if meta.state == PoolState::Ready => return Ok(true),
                Some(_) => {}
                None => return Ok(false),
            }
        }
        Ok(false)
    }

    /// Gives free slots to waiting work. Returns how many were given.
    pub(crate) async fn fill(self: &Arc<Self>, pool: &Pool) -> usize {
        let waiting =
            self.in_redis(pool, "waiting_with_free", || self.capacity.waiting_with_free(pool.as_str())).await;
        let mut promoted = 0;
        for agent in waiting.unwrap_or_default() {
            promoted += self.promote(pool, &agent).await;
        }
        promoted
    }
}
