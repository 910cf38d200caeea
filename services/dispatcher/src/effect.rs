//! Carrying out in Redis and on agents what the log says. Everything here may run twice.

use std::{sync::Arc, time::Duration};

use rollcall_capacity::{AgentSetting, Capacity, Error as CapacityError, Grant, Hold, Requeue, Stamp};
use rollcall_core::{
    AgentId, ExecutionId, Pool,
    agent::Agent,
    execution::{Attempt, Execution, State},
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
    /// None: whatever place it has, it keeps.
    None,
    /// One of the agent that refused it, which is offered nothing for now.
    Refused(Refused),
    /// The one that it was granted at this moment, milliseconds since 1970.
    Granted(u64),
}

/// A dispatch, or a slot, that an agent did not take.
pub(crate) struct Refused {
    /// The agent.
    pub(crate) agent: String,
    /// When its slot was granted at the latest, milliseconds since 1970. What was granted later is for another dispatch: Redis
    /// may have been filled by the log since, and the same attempt dispatched to the same agent again.
    pub(crate) by_ms: u64,
}

impl Refused {
    /// By what the log says that went before: the event that put it back, and the dispatch that was refused, whose dispatcher's
    /// clock may be ahead of the one that wrote the event.
    pub(crate) fn of(agent: String, after: &Execution, held: Option<&Attempt>) -> Self {
        let last = held.map_or(after.state_since, |held| held.dispatched_at.max(after.state_since));
        Self { agent, by_ms: decide::millis(last) }
    }
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
                    let held = change.before.as_ref().and_then(Execution::holder);
                    let leaves = hold_back.map_or(Leaves::None, |agent| {
                        Leaves::Refused(Refused::of(agent, &change.after, held))
                    });
                    self.requeue(&change.after, old, new, leaves).await;
                    if let Some(agent) = watched.and_then(|a| AgentId::new(&a).ok()) {
                        self.spawn_reopen(agent);
                    }
                }
            }
        }
    }

    /// Gives back whatever an attempt has.
    pub(crate) async fn settle(self: &Arc<Self>, pool: &Pool, hold: &Hold) {
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
        old: Hold,
        new: Hold,
        leaves: Leaves,
    ) -> Option<bool> {
        let pool = self.ledger.read(|p| p.pool_of(execution));
        let (hold_back, granted_at_ms, granted_by_ms) = match leaves {
            Leaves::None => (None, None, None),
            Leaves::Refused(Refused { agent, by_ms }) => (Some(agent), None, Some(by_ms)),
            Leaves::Granted(at_ms) => (None, Some(at_ms), None),
        };
        let requeue = Requeue {
            old,
            new,
            queue: decide::queue_of(execution),
            priority: decide::priority_of(execution),
            hold_back,
            granted_at_ms,
            granted_by_ms,
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
        self.requeue(&execution, hold.clone(), hold, Leaves::None).await
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

#[cfg(test)]
mod tests {
    use rollcall_capacity::Ask;
    use rollcall_core::wire::Delivery;

    use super::*;
    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_refusal_that_redis_hears_late_leaves_the_next_dispatch_its_slot() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        fixture.submitted("x", Some("a"), "p", Delivery::Push).await;
        fixture.granted("x", "a").await;
        let id = ExecutionId::new("x").unwrap();
        let refused = dispatcher.ledger.decide(&id, |e| e.queue(1, Some("busy".to_owned()))).await.unwrap();
        // Meanwhile Redis was lost, filled by the log, and what waits there got its slot.
        let later = Stamp::new(decide::millis(refused.after.state_since) + 1, refused.after.seq);
        let (hold, ask) =
            (Hold::new("x", 1), Ask { priority: Default::default(), queue_depth: 1, external: false });
        dispatcher.capacity.admit_to_agent("p", "a", &hold, ask, later).await.unwrap();
        dispatcher.carry_out(&refused).await;
        assert_eq!(fixture.held("p", "a").await, [hold]);
    }
}
