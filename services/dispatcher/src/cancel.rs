//! Ending what somebody wants to end: ask its agent until it is certainly dead.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_control::{Control, RegistryError};
use rollcall_core::{
    ExecutionId,
    execution::{Attempt, Execution, State},
    subject::AgentVerb,
    wire::{ExecutionsReply, Outcome, OwnedClaim, Report, TerminateReply, TerminateRequest, TerminateState},
};

use crate::{ledger::DecideError, reports::ASKED_FOR_GRACE_MS, shell::Dispatcher};

/// What an agent may take beyond the grace it is given, before the question is asked again.
const ANSWER_MARGIN: Duration = Duration::from_secs(2);
/// What it may take to say what it holds.
const LIST_TIMEOUT: Duration = Duration::from_secs(1);
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
            Some(TerminateState::NotRunning) if self.is_to_report(&execution, held).await => return false,
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
            let error = match self.registries.terminate(&control, id, timeout).await {
                Ok(()) => return Some(TerminateState::Terminated),
                Err(error) => error,
            };
            tracing::info!(execution_id = %id, agent_id = %held.agent_id, %error, "not terminated yet");
            // We may not call it there. Perhaps it listens on NATS as well; whatever else it says there, what it runs its
            // registry knows.
            if matches!(error, RegistryError::Refused { .. }) {
                let here = self.terminate_over_nats(id, held).await;
                return here.filter(|state| *state == TerminateState::Terminated);
            }
            return None;
        }
        self.terminate_over_nats(id, held).await
    }

    async fn terminate_over_nats(&self, id: &ExecutionId, held: &Attempt) -> Option<TerminateState> {
        let timeout = self.terminate_timeout();
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

    /// Whether its instance, which does not run it, still lists it: it has finished, and its report is under way. That is
    /// waited for as long as for any other word that somebody else may have.
    async fn is_to_report(&self, execution: &Execution, held: &Attempt) -> bool {
        let asked = execution.cancel.as_ref().map_or(execution.state_since, |cancel| cancel.at);
        if self.ledger.now().since_ms(asked) >= ASKED_FOR_GRACE_MS {
            return false;
        }
        let subject = self.subjects.agent_request(&held.agent_id, &held.instance_id, AgentVerb::Executions);
        let Ok(answer) = self.bus.request(subject, Bytes::from_static(b"{}"), LIST_TIMEOUT).await else {
            return false;
        };
        serde_json::from_slice::<ExecutionsReply>(&answer.payload).is_ok_and(|reply| {
            let lists = |claim: &OwnedClaim| claim.id == *execution.id() && claim.attempt == held.number;
            reply.instance_id == held.instance_id && reply.executions.iter().any(lists)
        })
    }

    /// Whether a report of this attempt lies on the bus that says more than that it was ended. When that can't be
    /// known, it does.
    async fn report_waits(&self, execution: &Execution, attempt: u32) -> bool {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use rollcall_capacity::{Capacity as _, Hold};
    use rollcall_core::wire::Delivery;
    use serde_json::{Value, json};

    use super::*;
    use crate::fixture::{Fixture, Following};

    fn x() -> ExecutionId {
        ExecutionId::new("x").unwrap()
    }

    fn state(fixture: &Fixture) -> State {
        fixture.dispatcher.ledger.execution(&x()).unwrap().state
    }

    fn says(state: &str) -> Value {
        json!({"state": state})
    }

    /// `x` runs on `a`, and somebody cancelled it.
    async fn cancelling() -> (Fixture, Following) {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        let following = fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        fixture.submitted("x", Some("a"), "p", Delivery::Push).await;
        fixture.granted("x", "a").await;
        dispatcher.capacity.adopt("p", "a", &Hold::new("x", 1), 1, dispatcher.stamp()).await.unwrap();
        dispatcher.ledger.decide(&x(), |e| e.start(1)).await.unwrap();
        dispatcher.ledger.decide(&x(), |e| e.cancel("", "api")).await.unwrap();
        assert_eq!(state(&fixture), State::Cancelling);
        (fixture, following)
    }

    async fn holds(fixture: &Fixture) -> u64 {
        fixture.dispatcher.capacity.inspect("p", "a", 0).await.unwrap().held_count
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn it_is_cancelled_when_its_agent_says_that_it_is_dead_and_not_before() {
        let (fixture, _) = cancelling().await;
        let dispatcher = &fixture.dispatcher;
        assert!(!dispatcher.try_cancel(&x(), 1).await, "nobody answers");
        let answers = [says("still_running"), json!("nonsense"), says("terminated")];
        let asked = fixture.answers("a", AgentVerb::Terminate, &answers).await;
        for _ in 0..2 {
            assert!(!dispatcher.try_cancel(&x(), 1).await);
            assert_eq!((state(&fixture), holds(&fixture).await), (State::Cancelling, 1));
        }
        assert!(dispatcher.try_cancel(&x(), 1).await);
        assert_eq!((state(&fixture), holds(&fixture).await), (State::Cancelled, 0));
        // Nothing is left to ask.
        assert!(dispatcher.try_cancel(&x(), 1).await);
        assert_eq!(asked.load(Ordering::SeqCst), 3);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_does_not_run_and_has_reported_is_not_cancelled_before_its_report_is_read() {
        let (fixture, _) = cancelling().await;
        let dispatcher = &fixture.dispatcher;
        fixture.answers("a", AgentVerb::Terminate, &vec![says("not_running"); 3]).await;
        let subject = dispatcher.subjects.report(&rollcall_core::AgentId::new("a").unwrap(), &x());
        let report = |attempt: u32, outcome: &str| {
            json!({"execution_id": "x", "attempt": attempt, "agent_id": "a", "instance_id": "i-1",
                "outcome": outcome, "result": 1})
        };
        let reports = async |report: Value| {
            dispatcher.reports.publish(&subject, report.to_string().into()).await.unwrap();
        };
        reports(report(1, "completed")).await;
        assert!(!dispatcher.try_cancel(&x(), 1).await, "what it reported counts first");
        assert_eq!(state(&fixture), State::Cancelling);
        // What another attempt did is nothing about this one, nor is that it was ended.
        reports(report(2, "completed")).await;
        let execution = dispatcher.ledger.execution(&x()).unwrap();
        assert!(!dispatcher.report_waits(&execution, 1).await);
        reports(json!({"execution_id": "x", "attempt": 1, "agent_id": "a", "instance_id": "i-1",
            "outcome": "terminated"}))
        .await;
        assert!(dispatcher.try_cancel(&x(), 1).await);
        assert_eq!(state(&fixture), State::Cancelled);
    }

    /// Its work is done, and its report has yet to get on the bus.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_has_finished_and_is_still_listed_is_not_cancelled_before_it_could_report() {
        let (fixture, _) = cancelling().await;
        let dispatcher = &fixture.dispatcher;
        fixture.answers("a", AgentVerb::Terminate, &vec![says("not_running"); 64]).await;
        let holds = |id: &str, attempt: u32| json!({"instance_id": "i-1", "seq": 1, "executions": [{"id": id, "attempt": attempt}]});
        let asked = fixture.answers("a", AgentVerb::Executions, &vec![holds("x", 1); 64]).await;
        assert!(!dispatcher.try_cancel(&x(), 1).await);
        assert_eq!((state(&fixture), asked.load(Ordering::SeqCst)), (State::Cancelling, 1));
        // One that never reports holds nothing up for ever.
        let wished_at = dispatcher.ledger.execution(&x()).unwrap().cancel.unwrap().at;
        while !dispatcher.try_cancel(&x(), 1).await {
            tokio::time::sleep(PAUSE_MIN).await;
        }
        assert_eq!(state(&fixture), State::Cancelled);
        assert!(dispatcher.ledger.now().since_ms(wished_at) >= ASKED_FOR_GRACE_MS);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn another_attempt_on_its_list_is_no_word_about_this_one() {
        let (fixture, _) = cancelling().await;
        fixture.answers("a", AgentVerb::Terminate, &[says("not_running")]).await;
        let list = json!([{"id": "x", "attempt": 2}, {"id": "y", "attempt": 1}]);
        let holds = json!({"instance_id": "i-1", "seq": 1, "executions": list});
        fixture.answers("a", AgentVerb::Executions, &[holds]).await;
        assert!(fixture.dispatcher.try_cancel(&x(), 1).await);
        assert_eq!(state(&fixture), State::Cancelled);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_does_not_run_is_not_cancelled_while_its_reports_can_not_be_read() {
        let (fixture, _) = cancelling().await;
        fixture.answers("a", AgentVerb::Terminate, &[says("not_running")]).await;
        let delete = "$JS.API.STREAM.DELETE.ROLLCALL_REPORTS";
        fixture.bus.request(delete, Bytes::new(), ANSWER_MARGIN).await.unwrap();
        assert!(!fixture.dispatcher.try_cancel(&x(), 1).await);
        assert_eq!(state(&fixture), State::Cancelling);
    }

    /// Its registry is in a private network that nobody has allowed.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whose_registry_may_not_be_called_is_asked_over_nats_and_believed_when_it_is_dead() {
        let (fixture, _) = cancelling().await;
        let dispatcher = &fixture.dispatcher;
        fixture.driven("a", "p", "http://127.0.0.1:1").await;
        let asked =
            fixture.answers("a", AgentVerb::Terminate, &[says("not_running"), says("terminated")]).await;
        assert!(!dispatcher.try_cancel(&x(), 1).await, "its registry would know");
        assert_eq!((state(&fixture), asked.load(Ordering::SeqCst)), (State::Cancelling, 1));
        assert!(dispatcher.try_cancel(&x(), 1).await);
        assert_eq!(state(&fixture), State::Cancelled);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_not_this_attempts_end_is_not_asked_for() {
        let (fixture, _) = cancelling().await;
        let asked = fixture.answers("a", AgentVerb::Terminate, &[says("terminated")]).await;
        assert!(fixture.dispatcher.try_cancel(&x(), 2).await);
        let unheard_of = ExecutionId::new("y").unwrap();
        assert!(fixture.dispatcher.try_cancel(&unheard_of, 1).await);
        fixture.submitted("y", Some("a"), "p", Delivery::Push).await;
        assert!(fixture.dispatcher.try_cancel(&unheard_of, 1).await, "nobody cancelled it");
        assert_eq!(asked.load(Ordering::SeqCst), 0);
        assert_eq!(state(&fixture), State::Cancelling);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_another_dispatcher_has_ended_is_asked_for_no_more() {
        let (fixture, following) = cancelling().await;
        fixture.falls_behind(following).await;
        let another = fixture.another();
        another.decide(&x(), |e| e.confirm_cancel(1, "terminated", None, None)).await.unwrap();
        fixture.answers("a", AgentVerb::Terminate, &[says("terminated")]).await;
        assert!(fixture.dispatcher.try_cancel(&x(), 1).await);
    }
}
