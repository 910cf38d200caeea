//! Ending what somebody wants to end: ask its agent until it is certainly dead.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_control::Control;
use rollcall_core::{
    ExecutionId,
    execution::{Attempt, State},
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
        if !self.waits.begin_cancel(&id, attempt) {
            return;
        }
        let dispatcher = Arc::clone(self);
        self.spawn(async move {
            dispatcher.cancel_until_confirmed(&id, attempt).await;
            dispatcher.waits.end_cancel(&id, attempt);
        });
    }

    async fn cancel_until_confirmed(self: &Arc<Self>, id: &ExecutionId, attempt: u32) {
        let mut pause = PAUSE_MIN;
        while !self.cancel.is_cancelled() && !self.try_cancel(id, attempt).await {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.cancel.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// How long an agent has to answer that the work is dead.
    pub(crate) fn terminate_timeout(&self) -> Duration {
        Duration::from_millis(self.settings.terminate_grace_ms) + ANSWER_MARGIN
    }

    /// One question. `true`: nothing is left to ask.
    async fn try_cancel(self: &Arc<Self>, id: &ExecutionId, attempt: u32) -> bool {
        let Some(execution) = self.ledger.execution(id) else { return true };
        if execution.state != State::Cancelling || execution.attempt != attempt {
            return true;
        }
        let Some(held) = execution.current() else { return true };
        let confirmed_by = match self.terminate(id, held).await {
            Some(TerminateState::Terminated) => "terminated",
            // It may have finished a moment ago: what it reported counts first.
            Some(TerminateState::NotRunning) if self.report_waits(&execution, attempt).await => return false,
            Some(TerminateState::NotRunning) => "not_running",
            Some(TerminateState::StillRunning) | None => return false,
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

    /// Has the agent end an attempt: over HTTP where that is how it is driven, else over NATS. `None`: no answer.
    async fn terminate(&self, id: &ExecutionId, held: &Attempt) -> Option<TerminateState> {
        let timeout = self.terminate_timeout();
        let control = self.ledger.agent(&held.agent_id).and_then(|agent| Control::of(&agent));
        if let Some(control) = control {
            return match self.registries.terminate(&control, id, timeout).await {
                Ok(()) => Some(TerminateState::Terminated),
                Err(error) => {
                    tracing::info!(execution_id = %id, agent_id = %held.agent_id, %error, "not terminated yet");
                    None
                }
            };
        }
        let request = TerminateRequest {
            execution_id: id.clone(),
            attempt: held.number,
            reason: "cancelled".to_owned(),
            grace_ms: self.settings.terminate_grace_ms,
        };
        let body = serde_json::to_vec(&request).ok()?;
        let subject = self.subjects.agent_request(&held.agent_id, &held.instance_id, AgentVerb::Terminate);
        let reply = self.bus.request(subject, Bytes::from(body), timeout).await.ok()?;
        serde_json::from_slice::<TerminateReply>(&reply.payload).ok().map(|reply| reply.state)
    }

    /// Whether a report of this attempt lies on the bus that says more than that it was ended. When that can't be
    /// known, it does.
    async fn report_waits(&self, execution: &rollcall_core::execution::Execution, attempt: u32) -> bool {
        let Some(held) = execution.current() else { return false };
        match self.reports.last(&self.subjects.report(&held.agent_id, execution.id())).await {
            Ok(Some(entry)) => {
                Report::read(&held.agent_id, execution.id(), &entry.bytes).is_ok_and(|report| {
                    report.attempt == attempt
                        && !matches!(report.outcome, Outcome::Terminated | Outcome::Cancelled)
                })
            }
            Ok(None) => false,
            Err(_) => true,
        }
    }
}
