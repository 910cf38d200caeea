//! Agents that are driven over HTTP: their registries in place of their heartbeats' lists.

use rollcall_core::{
    AgentId, ExecutionId,
    agent::Status,
    event::{Dispatched, Failed, Recovered, RecoveryAction, RecoveryReason, TerminateOutcome},
    wire::ErrorBody,
};
use serde_json::json;
use watchdog::sight::Void;

use crate::sim::{Begun, CYCLE_MS, HOUR, LIMITS, Sim, Truth, agent, execution, instance};

const INTERVAL_MS: u64 = LIMITS.interval_ms;

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

/// Silent to the threshold after so many milliseconds at this interval.
const fn silent_ms(interval_ms: u64) -> u64 {
    interval_ms * LIMITS.failure_threshold as u64 + interval_ms / 2
}

/// Dead from now on, right after its registry's last answer; when its work was lost.
fn dies(sim: &mut Sim) -> u64 {
    sim.registry(&["x"]);
    let died = sim.now;
    sim.truth = Truth::Mute;
    sim.status(sim.instance, Status::Disconnected);
    sim.advance(10 * CYCLE_MS);
    assert_eq!(sim.recovered.len(), 1);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
    sim.recovered[0].2.since_ms(died)
}

#[test]
fn who_beats_is_silent_by_its_own_interval_whatever_its_registry_answered_last() {
    let mut sim = Sim::driven(Begun::Started, HOUR, None);
    for progress in 0..10 {
        sim.advance(900);
        sim.beat(true, progress);
    }
    let after = dies(&mut sim);
    assert_eq!(after, LIMITS.lost_after_ms.max(silent_ms(LIMITS.interval_ms)));
    // Nor is it another's word when this watchdog has not heard it yet: it registered by a heartbeat.
    let mut sim = Sim::driven(Begun::Started, HOUR, None);
    sim.restart(100);
    let after = dies(&mut sim);
    assert_eq!(after, LIMITS.lost_after_ms.max(silent_ms(LIMITS.interval_ms)));
}

/// Its registry answered, over HTTP. That it listens on NATS nobody knows by that.
#[test]
fn no_responders_is_no_word_about_who_only_its_registry_answered_for() {
    for (answered, shortest_ms) in [(false, silent_ms(LIMITS.interval_ms)), (true, 0)] {
        let mut sim = Sim::driven(Begun::Started, HOUR, None);
        for progress in 0..4 {
            sim.advance(900);
            sim.beat(true, progress);
            sim.registry(&["x"]);
        }
        if answered {
            sim.world.agents.get_mut(&agent()).unwrap().claims_mut("i-1").unwrap().pinged = true;
        }
        sim.truth = Truth::Nobody;
        let last = sim.now;
        sim.supersede();
        sim.advance(10 * CYCLE_MS);
        assert_eq!(sim.recovered.len(), 1);
        let after = sim.recovered[0].2.since_ms(last);
        assert!(after >= shortest_ms, "after {after} ms");
        assert_eq!(after < silent_ms(LIMITS.interval_ms), answered, "after {after} ms");
    }
}

#[test]
fn who_never_beats_is_silent_by_the_cycles_that_ask_its_registry() {
    let mut sim = Sim::of_file(Begun::Granted, HOUR, None);
    assert_eq!(dies(&mut sim), silent_ms(CYCLE_MS));
}

#[test]
fn a_registry_is_not_asked_more_often_because_its_agent_beats_more_often() {
    let mut sim = Sim::driven(Begun::Started, HOUR, None);
    sim.beat(true, 0);
    sim.registry(&["x"]);
    sim.status("i-1", Status::Disconnected);
    sim.advance(LIMITS.dispatch_grace_ms);
    let works = sim.works;
    sim.advance(10 * CYCLE_MS);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    assert!((5..=11).contains(&(sim.works - works)), "asked {} times in ten cycles", sim.works - works);
    // And answers within half a cycle are one word.
    sim.truth = Truth::Empty;
    let from = sim.now;
    sim.advance(4 * CYCLE_MS);
    assert_eq!(sim.recovered.len(), 1);
    assert!(sim.recovered[0].2.since_ms(from) >= CYCLE_MS / 2);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Orphaned);
}

const STALL_TIMEOUT_MS: u64 = 10_000;

/// Heartbeats that name this progress at every step, or none, and its registry's answers beside them.
fn passes(sim: &mut Sim, ms: u64, progress: impl Fn(u64) -> Option<u64>) {
    for step in 0..ms / INTERVAL_MS {
        sim.advance(INTERVAL_MS);
        if let Some(progress) = progress(step) {
            sim.beat(true, progress);
        }
        if step % (CYCLE_MS / INTERVAL_MS) == 0 {
            sim.registry(&["x"]);
        }
    }
}

#[test]
fn progress_that_heartbeats_name_beside_a_registry_counts_for_the_stall_clock() {
    let mut sim = Sim::driven(Begun::Started, HOUR, Some(STALL_TIMEOUT_MS));
    passes(&mut sim, 5 * STALL_TIMEOUT_MS, Some);
    assert!(sim.is_untouched(), "it moves: {:?}", sim.recovered);
    passes(&mut sim, STALL_TIMEOUT_MS - INTERVAL_MS, |_| Some(1_000));
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    passes(&mut sim, 3 * INTERVAL_MS, |_| Some(1_000));
    assert_eq!(sim.recovered.len(), 1);
    let (reason, terminate, _) = sim.recovered[0];
    assert_eq!((reason, terminate), (RecoveryReason::Stalled, TerminateOutcome::Confirmed));
}

#[test]
fn a_registry_alone_never_says_that_progress_stands_still() {
    // No heartbeat names any.
    let mut sim = Sim::driven(Begun::Started, HOUR, Some(STALL_TIMEOUT_MS));
    passes(&mut sim, 3 * STALL_TIMEOUT_MS, |_| None);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    // They did, and do no more: its time is bounded by its deadline.
    passes(&mut sim, STALL_TIMEOUT_MS / 2, Some);
    passes(&mut sim, 3 * STALL_TIMEOUT_MS, |_| None);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    // What was named before our sight began does not count either.
    passes(&mut sim, 2 * INTERVAL_MS, |step| Some(1_000 + step));
    sim.blind(Void::Dropped, 500);
    passes(&mut sim, 3 * STALL_TIMEOUT_MS, |_| None);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
}

#[test]
fn who_gives_up_its_registry_is_judged_by_its_lists_like_everybody() {
    let mut sim = Sim::driven(Begun::Started, HOUR, Some(STALL_TIMEOUT_MS));
    passes(&mut sim, LIMITS.dispatch_grace_ms + CYCLE_MS, Some);
    sim.drive(None);
    for _ in 0..=STALL_TIMEOUT_MS / INTERVAL_MS {
        sim.advance(INTERVAL_MS);
        sim.beat(true, 5);
    }
    assert_eq!(sim.recovered.first().map(|lost| lost.0), Some(RecoveryReason::Stalled));

    let mut sim = Sim::driven(Begun::Started, HOUR, None);
    passes(&mut sim, LIMITS.dispatch_grace_ms + CYCLE_MS, Some);
    sim.drive(None);
    sim.truth = Truth::Empty;
    for _ in 0..2 {
        sim.advance(INTERVAL_MS);
        sim.beat(false, 0);
    }
    assert_eq!(
        sim.recovered.first().map(|lost| lost.0),
        Some(RecoveryReason::Orphaned),
        "two lists without it"
    );
}

#[test]
fn what_was_asked_to_end_is_asked_again_after_a_blindness_once_a_heartbeat_says_that_it_stands_still() {
    let mut sim = Sim::driven(Begun::Started, HOUR, Some(STALL_TIMEOUT_MS));
    sim.ending = None;
    passes(&mut sim, STALL_TIMEOUT_MS + 4 * INTERVAL_MS, |_| Some(7));
    assert!(sim.terminations > 0 && sim.recovered.is_empty());
    sim.blind(Void::Dropped, 500);
    let asked = sim.terminations;
    passes(&mut sim, 2 * STALL_TIMEOUT_MS, |_| None);
    assert_eq!(sim.terminations, asked, "nobody has said that it still does");
    passes(&mut sim, 2 * CYCLE_MS, |_| Some(7));
    assert!(sim.terminations > asked);
}
