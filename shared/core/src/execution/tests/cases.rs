//! Single rules of the contract, told one by one.

use serde_json::json;

use super::*;
use crate::event::TerminateOutcome;

/// An execution and the number of its last entry, moved by decisions only.
struct Story(Execution);

impl Story {
    fn new(on_loss: OnLoss, max_attempts: u32) -> Self {
        Self(Execution::submitted(request(on_loss, max_attempts, Delivery::Push), 1, START))
    }

    fn then(&mut self, event: Result<ExecutionEvent, Refusal>) -> &mut Self {
        let event = event.expect("decided");
        self.0.evolve(self.0.seq + 1, &event, START.plus_ms(self.0.seq)).expect("accepted");
        self
    }

    fn run_on(&mut self, n: u8) -> &mut Self {
        let attempt = self.0.attempt;
        self.then(self.0.dispatch(attempt, &agent(n), &instance(n), 500, START));
        self.then(self.0.start(attempt))
    }

    fn lose(&mut self) -> &mut Self {
        self.then(self.0.lose(loss(self.0.attempt, false)))
    }

    fn report(&mut self, attempt: u32, n: u8, outcome: Outcome) -> Option<ExecutionEvent> {
        let event = self.0.report(facts(attempt, n, outcome));
        if let Some(event) = &event {
            self.then(Ok(event.clone()));
        }
        event
    }
}

fn loss(attempt: u32, returned: bool) -> Loss {
    Loss {
        attempt,
        reason: RecoveryReason::AgentLost,
        terminate: TerminateOutcome::NotAttempted,
        detected_after_ms: 7,
        evidence: json!({"silent_ms": 60_000}),
        message: "agent-1 is silent".to_owned(),
        returned,
        checkpoint: returned.then(samples::payload),
    }
}

fn facts(attempt: u32, n: u8, outcome: Outcome) -> ReportFacts {
    ReportFacts {
        agent_id: agent(n),
        instance_id: instance(n),
        attempt,
        outcome,
        result: Some(samples::payload()),
        checkpoint: None,
        error: None,
    }
}

#[test]
fn finished_work_is_worth_more_than_a_verdict_until_a_later_attempt_is_dispatched() {
    for (on_loss, max_attempts, verdict) in [
        (OnLoss::Fail, 3, State::Failed),
        (OnLoss::Requeue, 3, State::Queued),
        (OnLoss::Requeue, 1, State::Quarantined),
    ] {
        let mut story = Story::new(on_loss, max_attempts);
        story.run_on(1).lose();
        assert_eq!(story.0.state, verdict);
        let event = story.report(1, 1, Outcome::Completed).expect("counts");
        assert!(matches!(event, ExecutionEvent::Completed(ref done) if done.late), "{event:?}");
        assert_eq!((story.0.state, story.0.attempt, story.0.late), (State::Completed, 1, true));
        assert_eq!(story.0.error, None);
    }
    let mut story = Story::new(OnLoss::Requeue, 3);
    story.run_on(1).lose().run_on(2);
    let event = story.report(1, 1, Outcome::Completed).expect("kept");
    assert!(matches!(event, ExecutionEvent::LateResult(_)), "{event:?}");
    assert_eq!((story.0.state, story.0.attempt), (State::Running, 2));
}

#[test]
fn the_next_attempt_that_waited_in_vain_does_not_throw_finished_work_away() {
    let mut story = Story::new(OnLoss::Requeue, 3);
    story.run_on(1).lose();
    let later = story.0.waiting_since.plus_ms(TTL_MS);
    story.then(story.0.expire(later));
    assert_eq!((story.0.state, story.0.attempt), (State::Expired, 2));
    story.report(1, 1, Outcome::Completed).expect("counts");
    assert_eq!((story.0.state, story.0.attempt), (State::Completed, 1));
}

#[test]
fn a_failure_that_the_agent_reported_is_final() {
    let mut story = Story::new(OnLoss::Requeue, 3);
    story.run_on(1);
    story.report(1, 1, Outcome::Failed).expect("counts");
    assert!(matches!(story.report(1, 1, Outcome::Completed), Some(ExecutionEvent::LateResult(_))));
    assert_eq!(story.0.state, State::Failed);
}

#[test]
fn a_cancelled_execution_takes_nothing_any_more() {
    let mut story = Story::new(OnLoss::Requeue, 3);
    story.run_on(1);
    story.then(story.0.cancel("enough", "operator"));
    assert_eq!(story.0.state, State::Cancelling);
    // A loss is as good as a confirmation, and never requeues.
    story.lose();
    assert_eq!((story.0.state, story.0.losses), (State::Cancelled, 0));
    assert!(matches!(story.report(1, 1, Outcome::Completed), Some(ExecutionEvent::LateResult(_))));
    assert_eq!(story.0.state, State::Cancelled);
    assert!(story.0.retry("operator").is_err() && story.0.cancel("again", "operator").is_err());
}

#[test]
fn work_that_was_quicker_than_its_cancellation_completed() {
    let mut story = Story::new(OnLoss::Fail, 3);
    story.run_on(1);
    story.then(story.0.cancel("enough", "operator"));
    story.report(1, 1, Outcome::Completed).expect("counts");
    assert_eq!((story.0.state, story.0.late), (State::Completed, false));
}

#[test]
fn every_other_end_of_work_that_was_to_be_cancelled_is_a_cancellation() {
    for outcome in [Outcome::Failed, Outcome::Cancelled, Outcome::Terminated, Outcome::Returned] {
        let mut story = Story::new(OnLoss::Requeue, 3);
        story.run_on(1);
        story.then(story.0.cancel("enough", "operator"));
        let event = story.report(1, 1, outcome).expect("counts");
        let ExecutionEvent::Cancelled(cancelled) = event else { panic!("{event:?}") };
        assert_eq!((cancelled.reason.as_str(), cancelled.outcome), ("enough", Some(outcome)));
        assert_eq!(story.report(1, 1, outcome), None, "the second is the first");
    }
}

#[test]
fn waiting_work_is_cancelled_at_once() {
    let mut story = Story::new(OnLoss::Fail, 3);
    story.then(story.0.queue(4, None));
    story.then(story.0.cancel("enough", "operator"));
    assert_eq!(story.0.state, State::Cancelled);
}

#[test]
fn quarantined_at_the_last_loss_that_counts_and_not_before() {
    let mut story = Story::new(OnLoss::Requeue, 2);
    for _ in 0..5 {
        story.run_on(1);
        story.then(story.0.lose(loss(story.0.attempt, true)));
        assert_eq!((story.0.state, story.0.losses), (State::Queued, 0), "handed back is not lost");
    }
    assert!(story.0.checkpoint.is_some() && story.0.at_head);
    story.run_on(1).lose();
    assert_eq!((story.0.state, story.0.losses), (State::Queued, 1));
    story.run_on(1).lose();
    assert_eq!((story.0.state, story.0.losses), (State::Quarantined, 2));
    story.then(story.0.retry("operator"));
    assert_eq!((story.0.state, story.0.losses, story.0.attempt), (State::Queued, 0, 8));
}

#[test]
fn a_refused_dispatch_waits_again_as_the_same_attempt() {
    let mut story = Story::new(OnLoss::Fail, 3);
    story.then(story.0.dispatch(1, &agent(1), &instance(1), 500, START));
    story.then(story.0.queue(1, Some("draining".to_owned())));
    assert_eq!((story.0.state, story.0.attempt, story.0.at_head), (State::Queued, 1, true));
    assert!(story.0.attempts.is_empty(), "it was never begun");
    assert!(matches!(story.0.standing(&agent(1), 1, Outcome::Completed), Standing::Refused(_)));
    story.run_on(2);
    assert!(matches!(story.0.standing(&agent(1), 1, Outcome::Completed), Standing::Refused(_)));
    assert_eq!(story.0.standing(&agent(2), 1, Outcome::Completed), Standing::Current);
}

#[test]
fn a_late_word_that_it_waits_does_not_undo_its_promotion() {
    let mut story = Story::new(OnLoss::Fail, 3);
    let late = story.0.queue(1, None).unwrap();
    story.then(story.0.dispatch(1, &agent(1), &instance(1), 500, START));
    assert!(story.0.queue(1, None).is_err(), "nobody refused it");
    let mut written = story.0.clone();
    assert!(written.evolve(written.seq + 1, &late, START).is_err(), "nor if somebody writes it all the same");
    assert_eq!(story.0.state, State::Dispatching);
}

#[test]
fn the_place_in_the_queue_does_not_hide_why_it_waits_again() {
    let mut story = Story::new(OnLoss::Requeue, 3);
    story.run_on(1).lose();
    story.then(story.0.queue(1, None));
    assert_eq!(story.0.view().reason.as_deref(), Some("agent_lost"));
}

#[test]
fn it_expires_at_its_time_to_live_and_not_before() {
    let story = Story::new(OnLoss::Fail, 3);
    assert!(story.0.expire(START.plus_ms(TTL_MS - 1)).is_err());
    assert!(story.0.expire(START.plus_ms(TTL_MS)).is_ok());
}

#[test]
fn its_time_begins_with_each_dispatch_however_long_it_waited() {
    let mut story = Story::new(OnLoss::Requeue, 3);
    let mut now = START;
    for attempt in 1..=2 {
        // Nearly all of its time to live in the queue, and much longer than the 500 ms that it may run.
        now = now.plus_ms(TTL_MS - 1);
        story.then(story.0.dispatch(attempt, &agent(1), &instance(1), 500, now));
        assert_eq!(story.0.current().unwrap().deadline, now.plus_ms(500), "attempt {attempt}");
        // What waits has no deadline at all, only its time to live.
        story.lose();
        assert!(story.0.holder().is_none() && story.0.view().deadline.is_none());
    }
}

#[test]
fn a_grant_is_the_start_of_external_work() {
    let mut execution = Execution::submitted(request(OnLoss::Fail, 3, Delivery::External), 1, START);
    let event = execution.dispatch(1, &agent(1), &instance(1), 500, START).unwrap();
    execution.evolve(2, &event, START).unwrap();
    assert_eq!(execution.state, State::Running);
    assert!(execution.queue(1, Some("draining".to_owned())).is_err(), "nobody could refuse it");
}

#[test]
fn an_end_that_nobody_asked_for_is_a_failure() {
    for outcome in [Outcome::Cancelled, Outcome::Terminated] {
        let mut story = Story::new(OnLoss::Requeue, 3);
        story.run_on(1);
        story.report(1, 1, outcome).expect("counts");
        assert_eq!(story.0.state, State::Failed);
        assert_eq!(story.0.error.as_ref().unwrap().code, outcome.as_str());
        assert_eq!(story.report(1, 1, outcome), None, "the second is the first");
    }
}

#[test]
fn attempts_are_remembered_within_a_bound() {
    let mut story = Story::new(OnLoss::Requeue, 1);
    for _ in 0..ATTEMPTS_KEPT_MAX + 4 {
        story.run_on(1);
        story.then(story.0.lose(loss(story.0.attempt, true)));
    }
    assert_eq!(story.0.attempts.len(), ATTEMPTS_KEPT_MAX);
    assert!(matches!(story.0.standing(&agent(1), 1, Outcome::Completed), Standing::Refused(_)));
}
