//! Slots by the word of the log: noted, claimed and given back.

use std::rc::Rc;

use dispatcher::decide;
use rollcall_capacity::{Capacity, Confirmation, Epoch, Grant, Hold};
use rollcall_core::{
    AgentId, ExecutionId,
    execution::{Execution, State},
};

use super::Dispatcher;
use crate::{exec::at_once, stage::POOL};

impl Dispatcher {
    /// Notes the slot that the log gives to an attempt, whatever room there is.
    pub(super) async fn adopt(self: &Rc<Self>, agent: &str, hold: &Hold, since_ms: u64) {
        let noted = self.in_capacity(|c| at_once(c.adopt(POOL, agent, hold, since_ms, self.stamp()))).await;
        if noted == Some(true) {
            self.is_still_held(hold).await;
        }
    }

    /// The slot that the log gives to a dispatch, if it has it or there is room for it.
    pub(super) async fn claim_by_log(self: &Rc<Self>, hold: Hold, agent: &AgentId) -> Option<Confirmation> {
        let grant = Grant { hold, agent: agent.as_str().to_owned(), epoch: Epoch::before_all() };
        let confirmed = self.in_capacity(|c| at_once(c.confirm(POOL, &grant, self.stamp()))).await;
        let is_new = confirmed == Some(Confirmation::Confirmed { reclaimed: true });
        if is_new && !self.is_still_held(&grant.hold).await { None } else { confirmed }
    }

    /// Whether the attempt still has its slot by the log; it ended perhaps while that was noted, and then the slot goes back.
    async fn is_still_held(self: &Rc<Self>, hold: &Hold) -> bool {
        let Ok(id) = ExecutionId::new(&hold.execution_id) else { return false };
        let Ok(execution) = self.fresh(&id).await else {
            self.audit_wanted.set(true);
            return false;
        };
        self.give_back_unless_held(hold, execution.as_ref()).await;
        decide::holds(execution.as_ref(), hold)
    }

    pub(super) async fn give_back_unless_held(self: &Rc<Self>, hold: &Hold, execution: Option<&Execution>) {
        let waits = execution.is_some_and(|e| e.state == State::Queued && e.attempt == hold.attempt);
        if !waits && !decide::holds(execution, hold) {
            self.settle(hold).await;
        }
    }
}
