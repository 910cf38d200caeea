use rollcall_core::event::{Completed, Dispatched, Failed, Recovered, TerminateOutcome};
use rollcall_core::wire::ErrorBody;

use super::*;

const T0: Timestamp = Timestamp::from_millis(1_000_000);

fn id(text: &str) -> ExecutionId {
    ExecutionId::new(text).unwrap()
}

fn key(attempt: u32) -> Key {
    Key::new(id("x"), attempt)
}

fn agent() -> AgentId {
    AgentId::new("a").unwrap()
}

fn instance() -> InstanceId {
    InstanceId::new("i").unwrap()
}

fn recovered(attempt: u32, reason: RecoveryReason, action: RecoveryAction) -> ExecutionEvent {
    Recovered {
        execution_id: id("x"),
        attempt,
        agent_id: agent(),
        instance_id: instance(),
        reason,
        action,
        next_attempt: None,
        terminate: TerminateOutcome::NotAttempted,
        detected_after_ms: 7,
        evidence: serde_json::Value::Null,
        message: String::new(),
        returned: false,
        checkpoint: None,
    }
    .into()
}

fn completed(attempt: u32, late: bool) -> ExecutionEvent {
    Completed { execution_id: id("x"), attempt, agent_id: None, instance_id: None, result: None, late }.into()
}

fn accepted(kind: Kind) -> Truth {
    let mut truth = Truth::default();
    truth.submitted(id("x"), kind, 5, None);
    truth.accepted(&key(1), &agent());
    truth
}

fn count(truth: &Truth, deviation: Deviation) -> u64 {
    truth.counts.get(&deviation).copied().unwrap_or(0)
}

#[test]
fn a_fault_that_is_noticed_once_is_as_it_should_be() {
    let mut truth = accepted(Kind::Hung);
    truth.struck(&key(1), Kind::Hung, T0);
    assert!(!truth.is_noticed(&agent()));
    assert_eq!(truth.open(), (1, 1));
    truth.told(&recovered(1, RecoveryReason::TimedOut, RecoveryAction::Failed), T0.plus_ms(50));
    assert!(truth.is_noticed(&agent()));
    truth.told(&completed(1, true), T0.plus_ms(60));
    truth.close();
    assert!(truth.is_as_it_should_be(), "{:?}", truth.words);
    let tally = &truth.tallies[&Kind::Hung];
    assert_eq!(
        (tally.injected, tally.recovered, &*tally.noticed_ms, &*tally.detected_ms),
        (1, 1, &[50][..], &[7][..])
    );
    assert_eq!(truth.late_completions, 1);
}

#[test]
fn each_deviation_is_found() {
    let mut truth = accepted(Kind::Normal);
    truth.told(&recovered(1, RecoveryReason::Orphaned, RecoveryAction::Failed), T0);
    assert_eq!(count(&truth, Deviation::WronglyRecovered), 1);
    truth.told(&recovered(1, RecoveryReason::Stale, RecoveryAction::Failed), T0);
    assert_eq!(count(&truth, Deviation::Doubled), 1);

    let mut truth = accepted(Kind::Silent);
    truth.struck(&key(1), Kind::Silent, T0);
    truth.told(&recovered(1, RecoveryReason::Orphaned, RecoveryAction::Failed), T0);
    assert_eq!(count(&truth, Deviation::WrongReason), 1);

    let mut truth = accepted(Kind::Hung);
    truth.struck(&key(1), Kind::Hung, T0.plus_ms(5_000));
    truth.told(&recovered(1, RecoveryReason::TimedOut, RecoveryAction::Failed), T0);
    assert_eq!(count(&truth, Deviation::WronglyRecovered), 1, "before its time");

    let mut truth = accepted(Kind::Hung);
    truth.struck(&key(1), Kind::Hung, T0);
    truth.close();
    assert_eq!((count(&truth, Deviation::Missed), count(&truth, Deviation::Stuck)), (1, 1));

    let mut truth = accepted(Kind::DoubleReporting);
    truth.told(&completed(1, false), T0);
    truth.told(&completed(1, false), T0);
    assert_eq!(count(&truth, Deviation::Doubled), 1);

    let mut truth = accepted(Kind::Normal);
    let error = ErrorBody { code: "terminated".into(), message: String::new() };
    let failed =
        Failed { execution_id: id("x"), attempt: 1, agent_id: None, instance_id: None, error, outcome: None };
    truth.told(&failed.into(), T0);
    assert_eq!(count(&truth, Deviation::WrongEnd), 1);

    let mut truth = accepted(Kind::Normal);
    truth.accepted(&key(2), &agent());
    assert_eq!(count(&truth, Deviation::Doubled), 1, "two attempts alive");
    let mut truth = accepted(Kind::Normal);
    truth.dead(&key(1));
    truth.accepted(&key(2), &agent());
    assert!(truth.is_as_it_should_be());
}

#[test]
fn what_was_lost_on_its_way_to_a_fallen_instance_is_nobodys_fault() {
    let mut truth = Truth::default();
    truth.submitted(id("x"), Kind::Crashing, 5, None);
    let dispatched = Dispatched {
        execution_id: id("x"),
        attempt: 1,
        agent_id: agent(),
        instance_id: instance(),
        deadline: T0,
        timeout_ms: 5,
    };
    truth.told(&dispatched.clone().into(), T0);
    let lost = recovered(1, RecoveryReason::AgentLost, RecoveryAction::Failed);
    truth.instance_struck(instance());
    truth.told(&lost, T0);
    truth.close();
    assert!(truth.is_as_it_should_be(), "{:?}", truth.words);
    assert_eq!(truth.lost_in_dispatch, 1);

    // Once it was accepted its agent knows better: nothing befell it.
    let mut truth = accepted(Kind::Normal);
    truth.told(&dispatched.into(), T0);
    truth.instance_struck(instance());
    truth.told(&lost, T0);
    assert_eq!(count(&truth, Deviation::WronglyRecovered), 1);
}

#[test]
fn a_completion_before_the_verdict_settles_the_fault() {
    let mut truth = accepted(Kind::LateReporting);
    truth.struck(&key(1), Kind::LateReporting, T0);
    truth.told(&completed(1, false), T0);
    truth.close();
    assert!(truth.is_as_it_should_be(), "{:?}", truth.words);
    assert_eq!(truth.tallies[&Kind::LateReporting].injected, 0);
}

#[test]
fn a_requeued_one_goes_on() {
    let mut truth = accepted(Kind::Crashing);
    truth.struck(&key(1), Kind::Crashing, T0);
    truth.dead(&key(1));
    truth.told(&recovered(1, RecoveryReason::AgentLost, RecoveryAction::Requeued), T0);
    assert_eq!(truth.open(), (1, 0));
    truth.accepted(&key(2), &agent());
    truth.told(&completed(2, false), T0);
    assert_eq!(truth.open(), (0, 0));
    truth.withdrawn(&id("unknown"));
    truth.close();
    assert!(truth.is_as_it_should_be(), "{:?}", truth.words);
}
