//! Carrying out in Redis and on agents what the log says. Everything here may run twice.

use std::{sync::Arc, time::Duration};

use rollcall_capacity::{AgentSetting, Capacity, Error as CapacityError, Grant, Requeue, Stamp};
use rollcall_core::{
    AgentId, ExecutionId, Pool,
    agent::Agent,
    execution::{Execution, State},
};

use crate::{
    decide::{self, Effect},
    shell::Dispatcher,
    state::Change,
};

/// Tries of one effect before it is left to the audit. Redis coming back is noticed by the audit too.
const EFFECT_TRIES_MAX: u32 = 4;
/// Pause before the second try; it doubles.
const EFFECT_PAUSE: Duration = Duration::from_millis(100);

/// Which slot an attempt leaves when it waits again as the same one.
pub(crate) enum Leaves {
    /// One of the agent that refused it, which is offered nothing for now; without an agent, none.
    Refused(Option<String>),
    /// The one that it was granted at this moment, milliseconds since 1970.
    Granted(u64),
}

impl Dispatcher {
    /// The stamp of something done now.
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::new(decide::millis(self.ledger.now()), self.ledger.position())
    }

    /// Carries out everything that a change means.
    pub(crate) async fn carry_out(self: &Arc<Self>, change: &Change) {
        for effect in decide::effects(change) {
            let now = self.ledger.execution(change.after.id());
            match decide::still_due(effect, now.as_ref()) {
                Effect::Terminate => self.spawn_cancel(change.after.id().clone(), change.after.attempt),
                Effect::Settle(hold) => {
                    for pool in self.pools_of(change) {
                        self.settle(&pool, &hold).await;
                    }
                }
                Effect::Requeue { old, new, hold_back } => {
                    // It waits in the pool that it was submitted to; its agent may have moved to another one with its slots.
                    let waits_in = self.ledger.read(|p| p.pool_of(&change.after));
                    for pool in self.pools_of(change).iter().filter(|pool| **pool != waits_in) {
                        self.settle(pool, &old).await;
                    }
                    let watched = hold_back.clone();
                    self.requeue(&change.after, old, new, Leaves::Refused(hold_back)).await;
                    if let Some(agent) = watched.and_then(|a| AgentId::new(&a).ok()) {
                        self.spawn_reopen(agent);
                    }
                }
            }
        }
    }

    async fn settle(self: &Arc<Self>, pool: &Pool, hold: &rollcall_capacity::Hold) {
        let settled =
            self.in_redis(pool, "settle", || self.capacity.settle(pool.as_str(), hold, self.stamp())).await;
        if let Some(settled) = settled {
            self.spawn_launches(pool, settled.promoted);
        }
    }

    /// The pools that can hold something of an execution: its holder's, and the one it waits in.
    fn pools_of(&self, change: &Change) -> Vec<Pool> {
        self.ledger.read(|projection| {
            let mut pools = vec![projection.pool_of(&change.after)];
            if let Some(before) = &change.before {
                let pool = projection.pool_of(before);
                if !pools.contains(&pool) {
                    pools.push(pool);
                }
            }
            pools
        })
    }

    /// Has an execution wait at the head of its queue. Whether it was put there now; `None`: it is left to the audit.
    pub(crate) async fn requeue(
        self: &Arc<Self>,
        execution: &Execution,
        old: rollcall_capacity::Hold,
        new: rollcall_capacity::Hold,
        leaves: Leaves,
    ) -> Option<bool> {
        let pool = self.ledger.read(|p| p.pool_of(execution));
        let (hold_back, granted_at_ms) = match leaves {
            Leaves::Refused(agent) => (agent, None),
            Leaves::Granted(at_ms) => (None, Some(at_ms)),
        };
        let requeue = Requeue {
            old,
            new,
            queue: decide::queue_of(execution),
            priority: decide::priority_of(execution),
            hold_back,
            granted_at_ms,
        };
        let done = self
            .in_redis(&pool, "requeue", || self.capacity.requeue(pool.as_str(), &requeue, self.stamp()))
            .await;
        let requeued = done?;
        // The log says that it waits: its place needs no other confirmation.
        if let Err(error) = self.capacity.confirm_queued(pool.as_str(), &requeue.new, self.stamp()).await {
            tracing::debug!(%error, hold = %requeue.new, "left to the audit");
        }
        self.spawn_launches(&pool, requeued.promoted);
        Some(requeued.queued)
    }

    /// Tells Redis what the log says of an agent, and moves it when it changed pools.
    pub(crate) async fn apply_agent(self: &Arc<Self>, id: &AgentId) {
        let turn = self.turn_of(id);
        let _one_at_a_time = turn.lock().await;
        let before = self.applied(id);
        let left = |agent: &Agent| {
            let (old_pool, _) = before.as_ref()?;
            (*old_pool != agent.pool()).then(|| old_pool.clone())
        };
        let Some(mut agent) = self.ledger.agent(id) else { return };
        if left(&agent).is_some() {
            // By the time it is its turn it may have gone on, or back.
            if let Err(error) = self.ledger.current().await {
                tracing::warn!(agent_id = %id, %error, "its move is left to the audit");
                self.ask_for_audit();
                return;
            }
            let Some(now) = self.ledger.agent(id) else { return };
            agent = now;
        }
        if let Some(old_pool) = left(&agent)
            && !self.move_agent(&agent, &old_pool).await
        {
            return;
        }
        let (pool, setting) = (agent.pool(), decide::setting(&agent));
        self.note_applied(id, &pool, setting);
        let same = |known: AgentSetting| AgentSetting { setting_seq: known.setting_seq, ..setting } == known;
        if before.is_some_and(|(old_pool, known)| old_pool == pool && known.is_some_and(same)) {
            return;
        }
        self.tell_of(&agent).await;
    }

    /// Tells Redis what is known of an agent; what Redis knows better stays.
    pub(crate) async fn tell_of(self: &Arc<Self>, agent: &Agent) {
        let (pool, id, setting) = (agent.pool(), agent.id.as_str(), decide::setting(agent));
        let filled = self
            .in_redis(&pool, "set_agent", || {
                self.capacity.set_agent(pool.as_str(), id, setting, self.stamp())
            })
            .await;
        if let Some(filled) = filled {
            let more = filled.more;
            self.spawn_launches(&pool, filled.promoted);
            if more {
                self.promote(&pool, id).await;
            }
        }
    }

    /// Fills an agent's free slots until nothing is left to fill.
    pub(crate) async fn promote(self: &Arc<Self>, pool: &Pool, agent: &str) -> usize {
        let mut promoted = 0;
        loop {
            let filled = self
                .in_redis(pool, "promote", || self.capacity.promote(pool.as_str(), agent, self.stamp()))
                .await;
            let Some(filled) = filled else { return promoted };
            promoted += filled.promoted.len();
            let more = filled.more && !filled.promoted.is_empty();
            self.spawn_launches(pool, filled.promoted);
            if !more {
                return promoted;
            }
        }
    }

    /// Gives an execution that waits by the log its place in Redis, if it has none. Whether it was put there now; `None`:
    /// it is left to the audit.
    pub(crate) async fn place_waiting(self: &Arc<Self>, id: &str) -> Option<bool> {
        let known = ExecutionId::new(id).ok().and_then(|id| self.ledger.execution(&id));
        let Some(execution) = known.filter(|e| e.state == State::Queued) else { return Some(false) };
        let hold = decide::hold(&execution, execution.attempt);
        self.requeue(&execution, hold.clone(), hold, Leaves::Refused(None)).await
    }

    /// Runs an operation in Redis, rebuilding the pool when that is what it takes. `None`: it did not happen; the
    /// audit will see to it.
    pub(crate) async fn in_redis<T, F, Fut>(
        self: &Arc<Self>,
        pool: &Pool,
        what: &'static str,
        operation: F,
    ) -> Option<T>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, CapacityError>>,
    {
        let mut pause = EFFECT_PAUSE;
        for tries in 1..=EFFECT_TRIES_MAX {
            let error = match operation().await {
                Ok(done) => return Some(done),
                Err(error) => error,
            };
            if error.wants_rebuild() {
                if let Err(error) = self.rebuild(pool).await {
                    tracing::warn!(%pool, %error, "could not rebuild the pool");
                }
            } else if tries < EFFECT_TRIES_MAX {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            if tries == EFFECT_TRIES_MAX {
                tracing::warn!(%pool, what, %error, "left to the audit");
                metrics::counter!("rollcall_effects_deferred_total").increment(1);
                self.ask_for_audit();
            }
        }
        None
    }

    /// Dispatches what got a slot, in the order in which it got it.
    pub(crate) fn spawn_launches(self: &Arc<Self>, pool: &Pool, grants: Vec<Grant>) {
        if grants.is_empty() {
            return;
        }
        let dispatcher = Arc::clone(self);
        let pool = pool.clone();
        self.spawn(async move {
            for grant in grants {
                let Some(ask) = dispatcher.claim(&pool, &grant).await else { continue };
                // An agent that does not answer holds up nobody else.
                let asking = Arc::clone(&dispatcher);
                dispatcher.spawn(async move { asking.ask(ask).await });
            }
        });
    }
}
