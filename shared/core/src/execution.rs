//! The execution as the log tells it. `evolve` folds events and `decide` (its own file) says which event
//! may follow; nothing else changes an execution.

mod decide;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use decide::{Loss, Refusal, ReportFacts, Standing};

use crate::{
    event::{Dispatched, ExecutionEvent, PayloadRef, Recovered, RecoveryAction, RecoveryReason, Submitted},
    ids::{AgentId, ExecutionId, InstanceId},
    time::Timestamp,
    wire::{Delivery, ErrorBody, ExecutionView, OnLoss, Outcome},
};

/// Attempts of an execution that are remembered; older ones can no longer report (their reports are
/// refused). Returned attempts don't count towards `max_attempts`, so there is no other bound.
const ATTEMPTS_KEPT_MAX: usize = 16;

/// Attempts count from here.
const FIRST_ATTEMPT: u32 = 1;

/// An execution's state (PROTOCOL.md 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Waits for a slot.
    Queued,
    /// Holds a slot; its agent has not answered yet.
    Dispatching,
    /// Its agent holds it.
    Running,
    /// Is to end; its agent has not confirmed yet.
    Cancelling,
    /// Ended well.
    Completed,
    /// Ended badly.
    Failed,
    /// Ended because somebody wanted it to.
    Cancelled,
    /// Waited too long.
    Expired,
    /// Was lost too often.
    Quarantined,
}

impl State {
    /// All states, in the contract's order.
    pub const ALL: [Self; 9] = [
        Self::Queued,
        Self::Dispatching,
        Self::Running,
        Self::Cancelling,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
        Self::Quarantined,
    ];

    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Dispatching => "dispatching",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Quarantined => "quarantined",
        }
    }

    /// Whether it has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Expired | Self::Quarantined)
    }

    /// Whether its present attempt holds a slot.
    #[must_use]
    pub const fn holds_slot(self) -> bool {
        matches!(self, Self::Dispatching | Self::Running | Self::Cancelling)
    }
}

/// One attempt that was dispatched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Which, from 1.
    pub number: u32,
    /// Whose slot it got.
    pub agent_id: AgentId,
    /// The instance that was asked.
    pub instance_id: InstanceId,
    /// When.
    pub dispatched_at: Timestamp,
    /// When the agent accepted.
    pub started_at: Option<Timestamp>,
    /// When its time is up.
    pub deadline: Timestamp,
    /// The time it was given.
    pub timeout_ms: u64,
    /// What was reported of it and counted or kept.
    pub reports: Vec<Outcome>,
    /// Why it was recovered, if it was.
    pub recovered: Option<RecoveryReason>,
}

/// The wish to end an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancellation {
    /// Why.
    pub reason: String,
    /// Who.
    pub by: String,
    /// When.
    pub at: Timestamp,
}

/// One execution, folded from its events.
#[derive(Debug, Clone, PartialEq)]
pub struct Execution {
    /// What was submitted.
    pub request: Submitted,
    /// Sequence in the log of its last event.
    pub seq: u64,
    /// Sequence of its `submitted` event: the order of submission.
    pub submitted_seq: u64,
    /// When it was submitted.
    pub submitted_at: Timestamp,
    /// Its state.
    pub state: State,
    /// When it came into this state.
    pub state_since: Timestamp,
    /// The attempt that counts.
    pub attempt: u32,
    /// When the present attempt began to wait.
    pub waiting_since: Timestamp,
    /// Sequence of the event that made it wait last: submitted, put back, requeued, retried. A launch that began before
    /// it is void.
    pub queued_seq: u64,
    /// It was put back at the head of its queue.
    pub at_head: bool,
    /// The attempts that were dispatched, oldest first.
    pub attempts: Vec<Attempt>,
    /// Losses that count towards `max_attempts`.
    pub losses: u32,
    /// The wish to end it.
    pub cancel: Option<Cancellation>,
    /// What it produced.
    pub result: Option<PayloadRef>,
    /// Where the last returned attempt had got to.
    pub checkpoint: Option<PayloadRef>,
    /// What went wrong.
    pub error: Option<ErrorBody>,
    /// It completed after a recovery.
    pub late: bool,
    /// Why it is where it is, in a word.
    pub reason: Option<String>,
}

/// An event that cannot follow what is in the log already. It is skipped; its sequence counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} does not fit an execution that is {state} in attempt {attempt}")]
pub struct Misfit {
    /// The event's type.
    pub event: &'static str,
    /// The state it met.
    pub state: &'static str,
    /// The attempt that counts.
    pub attempt: u32,
}

impl Execution {
    /// The execution after its first event.
    #[must_use]
    pub fn submitted(request: Submitted, seq: u64, time: Timestamp) -> Self {
        Self {
            seq,
            submitted_seq: seq,
            submitted_at: time,
            state: State::Queued,
            state_since: time,
            // Whatever the event says: counting from 1 keeps an author of nonsense from the end of the numbers.
            attempt: FIRST_ATTEMPT,
            waiting_since: time,
            queued_seq: seq,
            at_head: false,
            attempts: Vec::new(),
            losses: 0,
            cancel: None,
            result: None,
            checkpoint: None,
            error: None,
            late: false,
            reason: None,
            request,
        }
    }

    /// Folds a whole history. Entries that do not fit are skipped, as everywhere.
    pub fn fold<'a>(events: impl IntoIterator<Item = (u64, &'a ExecutionEvent, Timestamp)>) -> Option<Self> {
        let mut folded: Option<Self> = None;
        for (seq, event, time) in events {
            match (&mut folded, event) {
                (None, ExecutionEvent::Submitted(request)) => {
                    folded = Some(Self::submitted(request.clone(), seq, time));
                }
                (None, _) => {}
                (Some(execution), event) => {
                    // A misfit changes nothing but the sequence.
                    let _ = execution.evolve(seq, event, time);
                }
            }
        }
        folded
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &ExecutionId {
        &self.request.execution_id
    }

    /// The present attempt, if it was dispatched.
    #[must_use]
    pub fn current(&self) -> Option<&Attempt> {
        self.attempts.last().filter(|a| a.number == self.attempt)
    }

    /// The present attempt, if it holds a slot.
    #[must_use]
    pub fn holder(&self) -> Option<&Attempt> {
        self.current().filter(|_| self.state.holds_slot())
    }

    /// Whether the dispatcher does not ask the agent itself.
    #[must_use]
    pub fn is_external(&self) -> bool {
        self.request.delivery == Delivery::External
    }

    fn attempt_mut(&mut self, number: u32) -> Option<&mut Attempt> {
        self.attempts.iter_mut().rev().find(|a| a.number == number)
    }

    /// The attempt with this number, if it was dispatched and is still remembered.
    #[must_use]
    pub fn attempt_numbered(&self, number: u32) -> Option<&Attempt> {
        self.attempts.iter().rev().find(|a| a.number == number)
    }

    fn enter(&mut self, state: State, time: Timestamp, reason: Option<String>) {
        self.state = state;
        self.state_since = time;
        self.reason = reason;
    }

    /// Folds one event in. `seq` is its sequence in the log; one that is not above the last is a repetition.
    pub fn evolve(&mut self, seq: u64, event: &ExecutionEvent, time: Timestamp) -> Result<(), Misfit> {
        if seq <= self.seq {
            return Ok(());
        }
        self.seq = seq;
        let misfit = Misfit { event: event.short_type(), state: self.state.as_str(), attempt: self.attempt };
        if !self.accepts(event) {
            return Err(misfit);
        }
        match event {
            ExecutionEvent::Submitted(_) => return Err(misfit),
            ExecutionEvent::Queued(queued) => {
                if queued.reason.is_some() {
                    self.at_head = true;
                    self.queued_seq = seq;
                }
                // The dispatch came back: the attempt was never begun.
                if self.state == State::Dispatching {
                    self.attempts.pop();
                }
                // Its place in the queue does not say why it waits again; what put it there does.
                let reason = queued.reason.clone().or_else(|| self.reason.take());
                self.enter(State::Queued, time, reason);
            }
            ExecutionEvent::Dispatched(dispatched) => self.dispatched(dispatched, time),
            ExecutionEvent::Started(_) => {
                if let Some(attempt) = self.attempts.last_mut() {
                    attempt.started_at = Some(time);
                }
                if self.state == State::Dispatching {
                    self.enter(State::Running, time, None);
                }
            }
            ExecutionEvent::CancelRequested(wish) => {
                self.cancel =
                    Some(Cancellation { reason: wish.reason.clone(), by: wish.by.clone(), at: time });
                self.enter(State::Cancelling, time, Some(wish.reason.clone()));
            }
            ExecutionEvent::Completed(done) => {
                self.note_report(done.attempt, Outcome::Completed);
                self.result = done.result.clone();
                self.error = None;
                self.late = done.late;
                self.attempt = done.attempt;
                self.enter(State::Completed, time, None);
            }
            ExecutionEvent::Failed(failed) => {
                self.note_report(failed.attempt, failed.outcome.unwrap_or(Outcome::Failed));
                self.error = Some(failed.error.clone());
                self.enter(State::Failed, time, Some(failed.error.code.clone()));
            }
            ExecutionEvent::Cancelled(cancelled) => {
                if let Some(outcome) = cancelled.outcome {
                    self.note_report(cancelled.attempt, outcome);
                }
                self.enter(State::Cancelled, time, Some(cancelled.reason.clone()));
            }
            ExecutionEvent::Expired(_) => self.enter(State::Expired, time, Some("queue_ttl".to_owned())),
            ExecutionEvent::Recovered(recovered) => self.recovered(recovered, time),
            ExecutionEvent::Retried(retried) => {
                self.wait_again(retried.attempt, time, "retried");
                self.losses = 0;
                self.error = None;
                self.cancel = None;
            }
            ExecutionEvent::LateResult(late) => self.note_report(late.attempt, late.outcome),
        }
        Ok(())
    }

    /// Whether an event may follow at all: the last line of defence of finality and of the attempt fence,
    /// whoever wrote the event.
    fn accepts(&self, event: &ExecutionEvent) -> bool {
        let current = event.attempt() == self.attempt;
        match event {
            ExecutionEvent::Submitted(_) => false,
            // A report that still counts is no late one: kept as such it would mute the real one.
            ExecutionEvent::LateResult(late) => {
                let still_counts = (current && self.state.holds_slot())
                    || (late.outcome == Outcome::Completed && self.takes_late_completion(late.attempt));
                !still_counts
            }
            ExecutionEvent::Retried(retried) => {
                matches!(self.state, State::Failed | State::Expired | State::Quarantined)
                    && retried.attempt == self.attempt + 1
            }
            ExecutionEvent::Completed(done) if done.late => self.takes_late_completion(done.attempt),
            ExecutionEvent::Queued(queued) => {
                let came_back = self.state == State::Dispatching && queued.reason.is_some();
                current && (self.state == State::Queued || came_back)
            }
            ExecutionEvent::Dispatched(_) | ExecutionEvent::Expired(_) => {
                current && self.state == State::Queued
            }
            ExecutionEvent::Started(_) => {
                current && matches!(self.state, State::Dispatching | State::Running | State::Cancelling)
            }
            ExecutionEvent::CancelRequested(_) => {
                current && matches!(self.state, State::Dispatching | State::Running | State::Cancelling)
            }
            ExecutionEvent::Completed(_) => current && self.state.holds_slot(),
            // What was to be cancelled ends cancelled, or completed when it was quicker.
            ExecutionEvent::Failed(_) => current && matches!(self.state, State::Dispatching | State::Running),
            ExecutionEvent::Cancelled(_) => current && !self.state.is_terminal(),
            ExecutionEvent::Recovered(recovered) => {
                current
                    && matches!(self.state, State::Dispatching | State::Running)
                    && recovered.next_attempt.is_none_or(|n| n == self.attempt + 1)
            }
        }
    }

    fn dispatched(&mut self, dispatched: &Dispatched, time: Timestamp) {
        if self.attempts.len() == ATTEMPTS_KEPT_MAX {
            self.attempts.remove(0);
        }
        self.attempts.push(Attempt {
            number: dispatched.attempt,
            agent_id: dispatched.agent_id.clone(),
            instance_id: dispatched.instance_id.clone(),
            dispatched_at: time,
            started_at: None,
            deadline: dispatched.deadline,
            timeout_ms: dispatched.timeout_ms,
            reports: Vec::new(),
            recovered: None,
        });
        // The grant is all that an external orchestrator waits for: there is nobody to accept.
        let state = if self.is_external() { State::Running } else { State::Dispatching };
        self.enter(state, time, None);
    }

    fn recovered(&mut self, recovered: &Recovered, time: Timestamp) {
        if let Some(attempt) = self.attempt_mut(recovered.attempt) {
            attempt.recovered = Some(recovered.reason);
            if recovered.returned {
                attempt.reports.push(Outcome::Returned);
            }
        }
        if !recovered.returned {
            self.losses += 1;
        }
        if recovered.checkpoint.is_some() {
            self.checkpoint = recovered.checkpoint.clone();
        }
        let reason = recovered.reason.as_str();
        let error = ErrorBody { code: reason.to_owned(), message: recovered.message.clone() };
        match (recovered.action, recovered.next_attempt) {
            (RecoveryAction::Requeued, Some(next)) => self.wait_again(next, time, reason),
            (RecoveryAction::Quarantined, _) => {
                self.error = Some(error);
                self.enter(State::Quarantined, time, Some(reason.to_owned()));
            }
            (RecoveryAction::Failed | RecoveryAction::Requeued, _) => {
                self.error = Some(error);
                self.enter(State::Failed, time, Some(reason.to_owned()));
            }
        }
    }

    fn wait_again(&mut self, attempt: u32, time: Timestamp, reason: &str) {
        self.attempt = attempt;
        self.waiting_since = time;
        self.queued_seq = self.seq;
        self.at_head = true;
        self.enter(State::Queued, time, Some(reason.to_owned()));
    }

    fn note_report(&mut self, attempt: u32, outcome: Outcome) {
        if let Some(attempt) = self.attempt_mut(attempt)
            && !attempt.reports.contains(&outcome)
        {
            attempt.reports.push(outcome);
        }
    }

    /// Whether a completion of `attempt` still counts although the attempt was recovered: it was the last to
    /// be dispatched (one that an agent refused was never begun), and nobody cancelled. An attempt that waited
    /// after it and expired is a verdict like any other: finished work is worth more.
    #[must_use]
    pub fn takes_late_completion(&self, attempt: u32) -> bool {
        matches!(self.state, State::Queued | State::Failed | State::Expired | State::Quarantined)
            && self.attempts.last().is_some_and(|a| a.number == attempt && a.recovered.is_some())
    }

    /// The execution as the API shows it, without the bytes of its result.
    #[must_use]
    pub fn view(&self) -> ExecutionView {
        let held = self.current();
        ExecutionView {
            execution_id: self.id().clone(),
            state: self.state,
            attempt: self.attempt,
            agent_id: held.map(|a| a.agent_id.clone()).or_else(|| self.request.agent_id.clone()),
            instance_id: held.map(|a| a.instance_id.clone()),
            pool: self.request.pool.clone(),
            priority: self.request.priority,
            on_loss: self.request.on_loss,
            losses: self.losses,
            submitted_at: self.submitted_at,
            dispatched_at: held.map(|a| a.dispatched_at),
            deadline: held.map(|a| a.deadline),
            ended_at: self.state.is_terminal().then_some(self.state_since),
            position: None,
            reason: self.reason.clone(),
            error: self.error.clone(),
            result: None,
            result_ref: self.result.clone(),
            late: self.late,
            labels: self.request.labels.clone(),
            seq: self.seq,
        }
    }

    /// When it has waited too long, while it waits.
    #[must_use]
    pub fn expires_at(&self) -> Option<Timestamp> {
        (self.state == State::Queued).then(|| self.waiting_since.plus_ms(self.request.queue_ttl_ms))
    }

    /// Whether another loss would send it back to a queue.
    #[must_use]
    pub fn would_requeue(&self, returned: bool) -> bool {
        self.request.on_loss == OnLoss::Requeue && (returned || self.losses + 1 < self.request.max_attempts)
    }
}
