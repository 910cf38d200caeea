//! The latest of the executions that ended: enough to recognise a zombie and a false positive.

use std::collections::{HashMap, VecDeque};

use rollcall_core::{
    AgentId, ExecutionId, Timestamp,
    event::RecoveryReason,
    execution::{Attempt, Execution, State},
    wire::Outcome,
};

/// Ended executions that are remembered; the log knows the rest.
pub const ENDED_KEPT_MAX: usize = 65_536;

/// What is remembered.
#[derive(Debug, Clone)]
pub struct EndedNote {
    /// Sequence of its last event.
    pub seq: u64,
    /// How it ended.
    pub state: State,
    /// When.
    pub at: Timestamp,
    /// Its last attempt.
    pub attempt: u32,
    /// Who held that attempt.
    pub agent_id: Option<AgentId>,
    /// Why that attempt was recovered, if it was and its agent did not hand it back.
    pub recovered: Option<RecoveryReason>,
}

/// Why an attempt was recovered. What its agent handed back is no verdict.
pub(super) fn verdict_on(attempt: &Attempt) -> Option<RecoveryReason> {
    attempt.recovered.filter(|_| !attempt.reports.contains(&Outcome::Returned))
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ended {
    notes: HashMap<ExecutionId, EndedNote>,
    order: VecDeque<ExecutionId>,
}

impl Ended {
    /// Remembers one that ended.
    pub fn insert(&mut self, execution: &Execution) {
        let last = execution.attempts.last();
        let note = EndedNote {
            seq: execution.seq,
            state: execution.state,
            at: execution.state_since,
            attempt: execution.attempt,
            agent_id: last.map(|a| a.agent_id.clone()),
            recovered: last.and_then(verdict_on),
        };
        if self.notes.insert(execution.id().clone(), note).is_none() {
            self.order.push_back(execution.id().clone());
        }
        while self.order.len() > ENDED_KEPT_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.notes.remove(&oldest);
            }
        }
    }

    /// What is remembered of it.
    #[must_use]
    pub fn get(&self, id: &ExecutionId) -> Option<&EndedNote> {
        self.notes.get(id)
    }

    /// The same, to note a later event.
    pub fn get_mut(&mut self, id: &ExecutionId) -> Option<&mut EndedNote> {
        self.notes.get_mut(id)
    }

    /// It runs again.
    pub fn remove(&mut self, id: &ExecutionId) {
        if self.notes.remove(id).is_some() {
            self.order.retain(|kept| kept != id);
        }
    }
}
