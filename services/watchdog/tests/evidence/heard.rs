//! What is heard of after its recovery was recovered wrongly; and what `explain` says while that is still open.

use rollcall_core::{
    agent::Status,
    event::{Completed, Recovered, RecoveryAction, RecoveryReason, TerminateOutcome},
    wire::Outcome,
};
use serde_json::{Value, json};
use watchdog::{effect, facts::Waiting, sight::Void};

use crate::sim::{HOUR, LIMITS, Sim, Truth, agent, execution, instance};

/// Recovered for this reason, whatever led there.
fn recovered_as(reason: RecoveryReason, returned: bool) -> Sim {
    let mut sim = Sim::new(HOUR, None);
    let recovered = Recovered {
        execution_id: execution(),
        attempt: 1,
        agent_id: agent(),
        instance_id: instance("i-1"),
        reason,
        action: RecoveryAction::Failed,
        next_attempt: None,
        terminate: TerminateOutcome::Confirmed,
        detected_after_ms: 0,
        evidence: json!({}),
        message: String::new(),
        returned,
        checkpoint: None,
    };
    sim.execution(recovered.into());
    sim
}

fn completed_late() -> Completed {
    Completed {
        execution_id: execution(),
        attempt: 1,
        agent_id: Some(agent()),
        instance_id: Some(instance("i-1")),
        result: None,
        late: true,
    }
}

fn beats(sim: &mut Sim, times: usize) {
    for _ in 0..times {
        sim.advance(900);
        sim.beat(true, 1);
    }
}

#[test]
fn every_recovery_that_is_listed_in_two_heartbeats_counts_once_as_a_false_positive() {
    for reason in RecoveryReason::ALL {
        let mut sim = recovered_as(reason, false);
        beats(&mut sim, 1);
        assert_eq!(sim.world.counters.heard_again, 0, "{reason:?}: it may have been under way");
        beats(&mut sim, 5);
        assert_eq!(sim.world.counters.heard_again, 1, "{reason:?}");
        sim.blind(Void::Gaps, 100);
        beats(&mut sim, 5);
        sim.execution(completed_late().into());
        assert_eq!(sim.world.counters.heard_again, 1, "{reason:?}: the same attempt");
    }
}

#[test]
fn a_completion_after_the_recovery_counts_and_history_and_what_was_handed_back_do_not() {
    let mut sim = recovered_as(RecoveryReason::Orphaned, false);
    sim.execution(completed_late().into());
    assert_eq!(sim.world.counters.heard_again, 1);
    sim.world.sight.set_caught_up(false);
    sim.restart(100);
    assert_eq!(sim.world.counters.heard_again, 0, "counted from the start of the process");
    let mut sim = recovered_as(RecoveryReason::AgentGone, true);
    beats(&mut sim, 5);
    assert_eq!(sim.world.counters.heard_again, 0, "it was handed back");
}

fn explained(sim: &Sim) -> (&'static str, Value) {
    let (judgement, facts) = sim.world.standing_judgement(&execution(), sim.now).unwrap();
    (judgement.row.key(), effect::evidence(&facts, &LIMITS, None, sim.now))
}

#[test]
fn explain_shows_the_evidence_that_the_standing_decision_was_made_on() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Empty;
    sim.waiting = Waiting::Withholds(Outcome::Completed);
    sim.advance(LIMITS.dispatch_grace_ms);
    sim.beat(false, 0);
    sim.advance(900);
    sim.beat(false, 0);
    let (row, evidence) = explained(&sim);
    assert_eq!(row, "withheld");
    assert_eq!(evidence["report_waiting"], "completed", "{evidence}");
    assert_eq!(evidence["asked_directly"], "does not list it", "{evidence}");
    assert_eq!(evidence["canary"], true, "{evidence}");

    let mut sim = Sim::new(HOUR, None);
    sim.beat(true, 0);
    sim.status("i-1", Status::Disconnected);
    sim.advance(LIMITS.lost_after_ms + 100);
    let (row, evidence) = explained(&sim);
    assert_eq!(row, "silent_answers");
    assert_eq!(evidence["asked_directly"], "lists it", "{evidence}");
}
