//! Agents that are driven over HTTP: their registries in place of their heartbeats' lists.

use rollcall_core::{
    AgentId, ExecutionId,
    event::{Dispatched, Failed, Recovered, RecoveryAction, RecoveryReason, TerminateOutcome},
    wire::ErrorBody,
};
use serde_json::json;

use crate::sim::{Begun, CYCLE_MS, HOUR, Sim, agent, execution, instance};

fn recovered(action: RecoveryAction, returned: bool) -> Recovered {
    Recovered {
        execution_id: execution(),
        attempt: 1,
        agent_id: agent(),
        instance_id: instance("i-1"),
        reason: RecoveryReason::Orphaned,
        action,
        next_attempt: (action == RecoveryAction::Requeued).then_some(2),
        terminate: TerminateOutcome::NotRunning,
        detected_after_ms: 0,
        evidence: json!({}),
        message: String::new(),
        returned,
        checkpoint: None,
    }
}

/// Driven over HTTP, and recovered.
fn lost(action: RecoveryAction, returned: bool) -> Sim {
    let mut sim = Sim::driven(Begun::Started, HOUR, None);
    sim.registry(&["x"]);
    sim.execution(recovered(action, returned).into());
    sim
}

/// The next attempt, and who gets it.
fn second(sim: &Sim, agent: &str, name: &str) -> Dispatched {
    Dispatched {
        execution_id: execution(),
        attempt: 2,
        agent_id: AgentId::new(agent).unwrap(),
        instance_id: instance(name),
        deadline: sim.now.plus_ms(HOUR),
        timeout_ms: HOUR,
    }
}

fn goes_on(sim: &mut Sim, answers: usize) {
    for _ in 0..answers {
        sim.advance(CYCLE_MS);
        sim.registry(&["x"]);
    }
}

fn is_a_zombie(sim: &Sim) -> bool {
    sim.world.zombies_due.contains(&(agent(), instance("i-1")))
}

#[test]
fn a_registry_that_names_it_in_two_answers_after_its_recovery_shows_one_false_positive() {
    for action in [RecoveryAction::Failed, RecoveryAction::Requeued] {
        let mut sim = lost(action, false);
        goes_on(&mut sim, 1);
        assert_eq!(sim.world.counters.heard_again, 0, "{action:?}: it may have been under way");
        goes_on(&mut sim, 1);
        assert_eq!(sim.world.counters.heard_again, 1, "{action:?}");
        assert!(is_a_zombie(&sim), "{action:?}");
        // Not another one when it stops, and goes on again.
        sim.registry(&[]);
        goes_on(&mut sim, 5);
        assert_eq!(sim.world.counters.heard_again, 1, "{action:?}: the same attempt");
    }
}

#[test]
fn a_registry_that_goes_on_with_what_another_agent_has_by_now_shows_a_false_positive_too() {
    let mut sim = lost(RecoveryAction::Requeued, false);
    sim.execution(second(&sim, "b", "i-9").into());
    goes_on(&mut sim, 3);
    assert_eq!(sim.world.counters.heard_again, 1);
    assert!(is_a_zombie(&sim), "the attempt that it goes on with is not its own any more");
}

#[test]
fn what_was_handed_back_or_never_its_own_is_a_zombie_and_no_false_positive() {
    let mut sim = lost(RecoveryAction::Failed, true);
    goes_on(&mut sim, 5);
    assert_eq!(sim.world.counters.heard_again, 0, "it was handed back");
    assert!(is_a_zombie(&sim));

    // It came back to the same agent: that attempt is its own, and was not recovered.
    let mut sim = lost(RecoveryAction::Requeued, false);
    sim.execution(second(&sim, "a", "i-1").into());
    goes_on(&mut sim, 5);
    assert!(!is_a_zombie(&sim));
    let error = ErrorBody { code: "test".to_owned(), message: String::new() };
    let (agent_id, instance_id) = (Some(agent()), Some(instance("i-1")));
    let failed =
        Failed { execution_id: execution(), attempt: 2, agent_id, instance_id, error, outcome: None };
    sim.execution(failed.into());
    goes_on(&mut sim, 5);
    assert_eq!(sim.world.counters.heard_again, 0, "it ended by its report");
    assert!(is_a_zombie(&sim));

    let mut sim = Sim::driven(Begun::Started, HOUR, None);
    for _ in 0..5 {
        sim.advance(CYCLE_MS);
        sim.registry(&["x", "never-ours"]);
    }
    assert_eq!(sim.world.counters.heard_again, 0);
    let known = sim.world.agents.get(&agent()).and_then(|entry| entry.claims_of("i-1"));
    assert_eq!(known.map(|claims| claims.extras().len()), Some(1), "{known:?}");
    assert_eq!(known.map(|claims| claims.extras()[0].id.clone()), ExecutionId::new("never-ours").ok());
}
