//! Which event may follow: pure decisions over an execution. The append that carries one fails if anything
//! happened to the execution since, so a decision never overwrites another.

use super::{Execution, State};
use crate::{
    event::{
        CancelRequested, Cancelled, Completed, Dispatched, ExecutionEvent, Expired, Failed, LateResult,
        PayloadRef, Queued, Recovered, RecoveryAction, RecoveryReason, Retried, Started, TerminateOutcome,
    },
    ids::{AgentId, InstanceId},
    time::Timestamp,
    wire::{ErrorBody, OnLoss, Outcome},
};

/// Why a command changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has ended already.
    #[error("the execution is {0} already")]
    Ended(&'static str),
    /// It is not in a state for that.
    #[error("the execution is {0}")]
    State(&'static str),
    /// Another attempt counts.
    #[error("attempt {given} does not count, {current} does")]
    Attempt {
        /// The attempt named.
        given: u32,
        /// The attempt that counts.
        current: u32,
    },
}

/// Where a report stands before it is applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Seen before: the second report of the same attempt and outcome is the first.
    Duplicate,
    /// From an agent that does not hold the execution, or of an attempt that never was: an alarm.
    Refused(String),
    /// Of the attempt that counts.
    Current,
    /// A completion that still counts although the attempt was recovered.
    LateCompletion,
    /// Of an attempt that no longer counts; the text says why.
    NoLongerCounts(String),
}

/// A report as the decision needs it, its payloads stored already.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportFacts {
    /// Who reported, by the subject.
    pub agent_id: AgentId,
    /// The instance it names.
    pub instance_id: InstanceId,
    /// The attempt.
    pub attempt: u32,
    /// The outcome.
    pub outcome: Outcome,
    /// The stored result.
    pub result: Option<PayloadRef>,
    /// The stored checkpoint.
    pub checkpoint: Option<PayloadRef>,
    /// The error.
    pub error: Option<ErrorBody>,
}

/// A loss that somebody established.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    /// The attempt that was lost.
    pub attempt: u32,
    /// Why.
    pub reason: RecoveryReason,
    /// How its death was made certain.
    pub terminate: TerminateOutcome,
    /// From the moment it became true.
    pub detected_after_ms: u64,
    /// What was seen.
    pub evidence: serde_json::Value,
    /// One sentence.
    pub message: String,
    /// The agent handed it back.
    pub returned: bool,
    /// Where it had got to.
    pub checkpoint: Option<PayloadRef>,
}

impl Execution {
    fn expect_attempt(&self, given: u32) -> Result<(), Refusal> {
        if given == self.attempt { Ok(()) } else { Err(Refusal::Attempt { given, current: self.attempt }) }
    }

    const fn refuse(&self) -> Refusal {
        if self.state.is_terminal() {
            Refusal::Ended(self.state.as_str())
        } else {
            Refusal::State(self.state.as_str())
        }
    }

    /// It got no slot and waits, or its dispatch came back (`reason`). Without a reason nothing that was dispatched is
    /// taken back: a submitter who learns late that its work was to wait must not undo its promotion.
    pub fn queue(&self, position: u64, reason: Option<String>) -> Result<ExecutionEvent, Refusal> {
        let may = self.state == State::Queued || (self.state == State::Dispatching && reason.is_some());
        if !may {
            return Err(self.refuse());
        }
        Ok(Queued {
            execution_id: self.id().clone(),
            attempt: self.attempt,
            agent_id: self.request.agent_id.clone(),
            position,
            reason,
        }
        .into())
    }

    /// It holds a slot of `agent_id`. Its time starts now.
    pub fn dispatch(
        &self,
        attempt: u32,
        agent_id: &AgentId,
        instance_id: &InstanceId,
        timeout_ms: u64,
        now: Timestamp,
    ) -> Result<ExecutionEvent, Refusal> {
        self.expect_attempt(attempt)?;
        if self.state != State::Queued {
            return Err(self.refuse());
        }
        Ok(Dispatched {
            execution_id: self.id().clone(),
            attempt,
            agent_id: agent_id.clone(),
            instance_id: instance_id.clone(),
            deadline: now.plus_ms(timeout_ms),
            timeout_ms,
        }
        .into())
    }

    /// Its agent accepted it.
    pub fn start(&self, attempt: u32) -> Result<ExecutionEvent, Refusal> {
        self.expect_attempt(attempt)?;
        match self.holder() {
            Some(held) if held.started_at.is_none() => Ok(Started {
                execution_id: self.id().clone(),
                attempt,
                agent_id: held.agent_id.clone(),
                instance_id: held.instance_id.clone(),
            }
            .into()),
            _ => Err(self.refuse()),
        }
    }

    /// Somebody wants it to end. Waiting work ends at once; work that an agent may hold ends when that is
    /// confirmed.
    pub fn cancel(&self, reason: &str, by: &str) -> Result<ExecutionEvent, Refusal> {
        match self.state {
            State::Queued => Ok(Cancelled {
                execution_id: self.id().clone(),
                attempt: self.attempt,
                agent_id: self.request.agent_id.clone(),
                instance_id: None,
                reason: reason.to_owned(),
                confirmed_by: "queued".to_owned(),
                evidence: None,
                outcome: None,
            }
            .into()),
            State::Dispatching | State::Running => Ok(CancelRequested {
                execution_id: self.id().clone(),
                attempt: self.attempt,
                agent_id: self.current().map(|a| a.agent_id.clone()),
                reason: reason.to_owned(),
                by: by.to_owned(),
            }
            .into()),
            State::Cancelling => Err(Refusal::State(self.state.as_str())),
            _ => Err(self.refuse()),
        }
    }

    /// The work that was to be cancelled is dead, by `confirmed_by` (`outcome`: the report that said so).
    pub fn confirm_cancel(
        &self,
        attempt: u32,
        confirmed_by: &str,
        evidence: Option<serde_json::Value>,
        outcome: Option<Outcome>,
    ) -> Result<ExecutionEvent, Refusal> {
        self.expect_attempt(attempt)?;
        if self.state != State::Cancelling {
            return Err(self.refuse());
        }
        let held = self.current();
        Ok(Cancelled {
            execution_id: self.id().clone(),
            attempt,
            agent_id: held.map(|a| a.agent_id.clone()),
            instance_id: held.map(|a| a.instance_id.clone()),
            reason: self.cancel.as_ref().map_or_else(String::new, |c| c.reason.clone()),
            confirmed_by: confirmed_by.to_owned(),
            evidence,
            outcome,
        }
        .into())
    }

    /// It waited too long.
    pub fn expire(&self, now: Timestamp) -> Result<ExecutionEvent, Refusal> {
        match self.expires_at() {
            Some(at) if at <= now => Ok(Expired {
                execution_id: self.id().clone(),
                attempt: self.attempt,
                agent_id: self.request.agent_id.clone(),
                waited_ms: now.since_ms(self.waiting_since),
                queue_ttl_ms: self.request.queue_ttl_ms,
            }
            .into()),
            Some(_) => Err(Refusal::State("queued and within its time to live")),
            None => Err(self.refuse()),
        }
    }

    /// An operator wants an ended one to run again.
    pub fn retry(&self, by: &str) -> Result<ExecutionEvent, Refusal> {
        if !matches!(self.state, State::Failed | State::Expired | State::Quarantined) {
            return Err(self.refuse());
        }
        Ok(Retried { execution_id: self.id().clone(), attempt: self.attempt + 1, by: by.to_owned() }.into())
    }

    /// An attempt was lost. What follows is the submitter's `on_loss`; a cancelled one ends cancelled.
    pub fn lose(&self, loss: Loss) -> Result<ExecutionEvent, Refusal> {
        self.expect_attempt(loss.attempt)?;
        let Some(held) = self.holder() else { return Err(self.refuse()) };
        if self.state == State::Cancelling {
            return self.confirm_cancel(
                loss.attempt,
                loss.reason.as_str(),
                Some(loss.evidence),
                loss.returned.then_some(Outcome::Returned),
            );
        }
        let action = match self.request.on_loss {
            OnLoss::Fail => RecoveryAction::Failed,
            OnLoss::Requeue if self.would_requeue(loss.returned) => RecoveryAction::Requeued,
            OnLoss::Requeue => RecoveryAction::Quarantined,
        };
        Ok(Recovered {
            execution_id: self.id().clone(),
            attempt: loss.attempt,
            agent_id: held.agent_id.clone(),
            instance_id: held.instance_id.clone(),
            reason: loss.reason,
            action,
            next_attempt: (action == RecoveryAction::Requeued).then_some(loss.attempt + 1),
            terminate: loss.terminate,
            detected_after_ms: loss.detected_after_ms,
            evidence: loss.evidence,
            message: loss.message,
            returned: loss.returned,
            checkpoint: loss.checkpoint,
        }
        .into())
    }

    /// Where a report of `agent` stands.
    #[must_use]
    pub fn standing(&self, agent: &AgentId, attempt: u32, outcome: Outcome) -> Standing {
        let Some(held) = self.attempt_numbered(attempt) else {
            return Standing::Refused(format!("attempt {attempt} was never dispatched"));
        };
        if held.agent_id != *agent {
            return Standing::Refused(format!("attempt {attempt} is held by {}", held.agent_id));
        }
        if held.reports.contains(&outcome) {
            return Standing::Duplicate;
        }
        if attempt == self.attempt && self.state.holds_slot() {
            return Standing::Current;
        }
        if outcome == Outcome::Completed && self.takes_late_completion(attempt) {
            return Standing::LateCompletion;
        }
        Standing::NoLongerCounts(if attempt == self.attempt {
            format!("the execution is {} already", self.state.as_str())
        } else {
            format!("attempt {} counts now", self.attempt)
        })
    }

    /// What a report makes of the execution. `None`: nothing (a repetition, or refused). A `terminated` or
    /// `cancelled` that nobody asked for is a failure; callers let whoever asked speak first.
    #[must_use]
    pub fn report(&self, facts: ReportFacts) -> Option<ExecutionEvent> {
        match self.standing(&facts.agent_id, facts.attempt, facts.outcome) {
            Standing::Duplicate | Standing::Refused(_) => None,
            Standing::LateCompletion => Some(self.completed(facts, true)),
            Standing::NoLongerCounts(because) => Some(
                LateResult {
                    execution_id: self.id().clone(),
                    attempt: facts.attempt,
                    agent_id: facts.agent_id,
                    instance_id: facts.instance_id,
                    outcome: facts.outcome,
                    result: facts.result,
                    error: facts.error,
                    because,
                }
                .into(),
            ),
            Standing::Current => self.current_report(facts),
        }
    }

    fn completed(&self, facts: ReportFacts, late: bool) -> ExecutionEvent {
        Completed {
            execution_id: self.id().clone(),
            attempt: facts.attempt,
            agent_id: Some(facts.agent_id),
            instance_id: Some(facts.instance_id),
            result: facts.result,
            late,
        }
        .into()
    }

    fn current_report(&self, facts: ReportFacts) -> Option<ExecutionEvent> {
        match facts.outcome {
            Outcome::Completed => Some(self.completed(facts, false)),
            // Dead by its own word: what was to be cancelled is.
            _ if self.state == State::Cancelling => {
                self.confirm_cancel(facts.attempt, "reported", None, Some(facts.outcome)).ok()
            }
            Outcome::Failed | Outcome::Cancelled | Outcome::Terminated => {
                let error = facts.error.unwrap_or_else(|| ErrorBody {
                    code: facts.outcome.as_str().to_owned(),
                    message: format!("the agent reported {} without an error", facts.outcome.as_str()),
                });
                Some(
                    Failed {
                        execution_id: self.id().clone(),
                        attempt: facts.attempt,
                        agent_id: Some(facts.agent_id),
                        instance_id: Some(facts.instance_id),
                        error,
                        outcome: (facts.outcome != Outcome::Failed).then_some(facts.outcome),
                    }
                    .into(),
                )
            }
            Outcome::Returned => self
                .lose(Loss {
                    attempt: facts.attempt,
                    reason: RecoveryReason::AgentGone,
                    terminate: TerminateOutcome::NotRunning,
                    detected_after_ms: 0,
                    evidence: serde_json::json!({"report": "returned"}),
                    message: format!("agent {} handed the execution back unfinished", facts.agent_id),
                    returned: true,
                    checkpoint: facts.checkpoint,
                })
                .ok(),
        }
    }
}
