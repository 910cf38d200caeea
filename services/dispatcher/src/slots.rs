//! Slots by the word of the log: noted, claimed and given back.

use std::sync::Arc;

use rollcall_capacity::{Capacity, Confirmation, Epoch, Grant, Hold};
use rollcall_core::{
    AgentId, ExecutionId, Pool,
    execution::{Attempt, Execution, State},
};

use crate::{decide, shell::Dispatcher};

impl Dispatcher {
    /// The slot that the log gives to external work and that is gone: noted before anybody else gets it, in the pool where its
    /// agent is now. If Redis does not answer, the audit is asked to look.
    pub(crate) async fn give_by_log(self: &Arc<Self>, hold: &Hold, held: &Attempt) {
        match self.ledger.agent(&held.agent_id).map(|agent| agent.pool()) {
            Some(pool) => {
                _ = self.adopt(&pool, hold, &held.agent_id, decide::millis(held.dispatched_at)).await
            }
            None => self.ask_for_audit(),
        }
    }

    /// Notes the slot that the log gives to an attempt, whatever room there is. Whether that had to be done, and is right.
    pub(crate) async fn adopt(
        self: &Arc<Self>,
        pool: &Pool,
        hold: &Hold,
        agent: &AgentId,
        since_ms: u64,
    ) -> bool {
        let adopt = || self.capacity.adopt(pool.as_str(), agent.as_str(), hold, since_ms, self.stamp());
        self.in_redis(pool, "adopt", adopt).await == Some(true) && self.is_still_held(pool, hold).await
    }

    /// Whether the attempt still has its slot, now that Redis was told so by what the log had said before. If it ended meanwhile,
    /// whoever wrote that has given back what was not noted yet, so the slot goes back here.
    async fn is_still_held(self: &Arc<Self>, pool: &Pool, hold: &Hold) -> bool {
        let Ok(id) = ExecutionId::new(&hold.execution_id) else { return false };
        match self.ledger.fresh_execution(&id).await {
            Ok(execution) => {
                self.give_back_unless_held(pool, hold, execution.as_ref()).await;
                decide::holds(execution.as_ref(), hold)
            }
            Err(error) => {
                tracing::debug!(execution_id = %id, %error, "left to the audit");
                self.ask_for_audit();
                false
            }
        }
    }

    /// The slot that the log gives to a dispatch whose agent has not answered, if it has it or there is room for it. `None`: nobody
    /// knows, or it has ended and needs none.
    pub(crate) async fn claim_by_log(
        self: &Arc<Self>,
        pool: &Pool,
        hold: Hold,
        agent: &AgentId,
    ) -> Option<Confirmation> {
        let grant = Grant { hold, agent: agent.as_str().to_owned(), epoch: Epoch::before_all() };
        let confirmed = self
            .in_redis(pool, "confirm", || self.capacity.confirm(pool.as_str(), &grant, self.stamp()))
            .await;
        let is_new = confirmed == Some(Confirmation::Confirmed { reclaimed: true });
        if is_new && !self.is_still_held(pool, &grant.hold).await { None } else { confirmed }
    }

    /// Releases a slot that the log gives to nobody; keeps one that the attempt has by the log, on whatever agent: a
    /// release is of the hold, and would take the slot that it has meanwhile got elsewhere.
    pub(crate) async fn give_back_unless_held(
        self: &Arc<Self>,
        pool: &Pool,
        hold: &Hold,
        execution: Option<&Execution>,
    ) {
        let waits = execution.is_some_and(|e| e.state == State::Queued && e.attempt == hold.attempt);
        if !waits && !decide::holds(execution, hold) {
            self.settle(pool, hold).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use rollcall_core::wire::Delivery;

    use super::*;
    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_ended_while_its_slot_was_noted_by_the_log_keeps_none() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        let (pool, agent, hold) = (Pool::new("p").unwrap(), AgentId::new("a").unwrap(), Hold::new("x", 1));
        fixture.submitted("x", Some("a"), "p", Delivery::Push).await;
        fixture.granted("x", "a").await;
        // As long as it holds, the log's word is enough for a slot, and where there is room for a claim too.
        assert!(dispatcher.adopt(&pool, &hold, &agent, 1).await);
        assert_eq!(fixture.held("p", "a").await, std::slice::from_ref(&hold));
        dispatcher.settle(&pool, &hold).await;
        let claimed = dispatcher.claim_by_log(&pool, hold.clone(), &agent).await;
        assert_eq!(claimed, Some(Confirmation::Confirmed { reclaimed: true }));
        dispatcher.settle(&pool, &hold).await;

        // It ends after whoever looks has read that it holds; its end finds nothing to give back.
        let id = ExecutionId::new("x").unwrap();
        dispatcher.ledger.decide(&id, |e| e.cancel("not needed", "api")).await.unwrap();
        let ended = |e: &Execution| e.confirm_cancel(1, "agent", None, None);
        dispatcher.ledger.decide(&id, ended).await.unwrap();
        assert!(!dispatcher.adopt(&pool, &hold, &agent, 1).await);
        assert_eq!(fixture.held("p", "a").await, []);
        assert_eq!(dispatcher.claim_by_log(&pool, hold.clone(), &agent).await, None);
        assert_eq!(fixture.held("p", "a").await, []);
    }
}
