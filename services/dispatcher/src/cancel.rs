//! Ending what somebody wants to end: ask its agent until it is certainly dead.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_core::{
    ExecutionId,
    execution::State,
    subject::AgentVerb,
    wire::{Outcome, Report, TerminateReply, TerminateRequest, TerminateState},
};

use crate::{ledger::DecideError, shell::Dispatcher};

/// What an agent may take beyond the grace it is given, before the question is asked again.
const ANSWER_MARGIN: Duration = Duration::from_secs(2);
/// First pause between two questions; it doubles up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause between two questions.
const PAUSE_MAX: Duration = Duration::from_secs(10);

impl Dispatcher {
    /// Asks the agent to end a cancelled attempt until that is confirmed, or somebody else ended it.
    pub(crate) fn spawn_cancel(self: &Arc<Self>, id: ExecutionId, attempt: u32) {
        let dispatcher = Arc::clone(self);
        self.spawn(async move {
            let mut pause = PAUSE_MIN;
            while !dispatcher.cancel.is_cancelled() {
                if dispatcher.try_cancel(&id, attempt).await {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = dispatcher.cancel.cancelled() => return,
                }
                pause = (pause * 2).min(PAUSE_MAX);
            }
        });
    }

    /// One question. `true`: nothing is left to ask.
    async fn try_cancel(self: &Arc<Self>, id: &ExecutionId, attempt: u32) -> bool {
        let Some(execution) = self.ledger.execution(id) else { return true };
        if execution.state != State::Cancelling || execution.attempt != attempt {
            return true;
        }
        let Some(held) = execution.current() else { return true };
        let request = TerminateRequest {
            execution_id: id.clone(),
            attempt,
            reason: "cancelled".to_owned(),
            grace_ms: self.settings.terminate_grace_ms,
        };
        let Ok(body) = serde_json::to_vec(&request) else { return true };
        let subject = self.subjects.agent_request(&held.agent_id, &held.instance_id, AgentVerb::Terminate);
        let timeout = Duration::from_millis(self.settings.terminate_grace_ms) + ANSWER_MARGIN;
        let Ok(reply) = self.bus.request(subject, Bytes::from(body), timeout).await else { return false };
        let confirmed_by = match serde_json::from_slice::<TerminateReply>(&reply.payload).map(|r| r.state) {
            Ok(TerminateState::Terminated) => "terminated",
            // It may have finished a moment ago: what it reported counts first.
            Ok(TerminateState::NotRunning) if self.report_waits(&execution, attempt).await => return false,
            Ok(TerminateState::NotRunning) => "not_running",
            Ok(TerminateState::StillRunning) | Err(_) => return false,
        };
        match self.ledger.decide(id, |e| e.confirm_cancel(attempt, confirmed_by, None, None)).await {
            Ok(change) => {
                Box::pin(self.carry_out(&change)).await;
                true
            }
            Err(DecideError::Refused(_) | DecideError::NotFound(_)) => true,
            Err(error) => {
                tracing::warn!(execution_id = %id, %error, "could not write down a confirmed cancellation");
                false
            }
        }
    }

    /// Whether a report of this attempt lies on the bus that says more than that it was ended. When that can't be
    /// known, it does.
    async fn report_waits(&self, execution: &rollcall_core::execution::Execution, attempt: u32) -> bool {
        let Some(held) = execution.current() else { return false };
        match self.reports.last(&self.subjects.report(&held.agent_id, execution.id())).await {
            Ok(Some(entry)) => Report::read(&entry.bytes).is_ok_and(|report| {
                report.attempt == attempt
                    && !matches!(report.outcome, Outcome::Terminated | Outcome::Cancelled)
            }),
            Ok(None) => false,
            Err(_) => true,
        }
    }
}
