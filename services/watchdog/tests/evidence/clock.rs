//! Our clock was wrong and is set: what was measured or planned by the wrong one holds nothing up.

use rollcall_core::{
    Timestamp,
    agent::Status,
    event::{Completed, RecoveryReason, SystemEvent, SystemEventKind, TerminateOutcome},
};
use serde_json::json;
use watchdog::{matrix::Row, zombie::retry_pause_ms};

use crate::sim::{HOUR, LIMITS, Sim, Truth, agent, execution, instance};

/// Starts a watchdog on a clock that is an hour ahead.
fn started_ahead(sim: &mut Sim) {
    sim.restart(HOUR);
}

/// Sets its clock right.
fn set_right(sim: &mut Sim) {
    sim.now = Timestamp::from_millis(sim.now.as_millis() - HOUR.cast_signed());
    sim.world.rebase(sim.now);
    sim.see();
}

/// Heartbeats that list it without progress, for so long.
fn beat_for(sim: &mut Sim, ms: u64) {
    for _ in 0..ms / 1_000 {
        sim.advance(1_000);
        sim.beat(true, 7);
    }
}

#[test]
fn a_suspension_that_ended_by_a_clock_ahead_puts_off_no_silence() {
    let mut sim = Sim::new(24 * HOUR, None);
    started_ahead(&mut sim);
    for kind in [SystemEventKind::RecoverySuspended, SystemEventKind::RecoveryResumed] {
        let subject = sim.subjects.system_event(watchdog::SERVICE);
        sim.append(&subject, watchdog::SERVICE, SystemEvent { kind, data: json!({}) }.into());
    }
    set_right(&mut sim);
    sim.truth = Truth::Mute;
    sim.status("i-1", Status::Disconnected);
    sim.advance(LIMITS.lost_after_ms - 100);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
}

#[test]
fn an_empty_answer_to_a_clock_ahead_is_counted_anew() {
    let mut sim = Sim::new(24 * HOUR, None);
    sim.truth = Truth::Empty;
    sim.status("i-1", Status::Disconnected);
    started_ahead(&mut sim);
    sim.advance(LIMITS.lost_after_ms + 100);
    assert_eq!(sim.world.troubles[&execution()].row, Row::UnlistedOnce);
    set_right(&mut sim);
    sim.advance(LIMITS.lost_after_ms + 100);
    assert!(sim.is_untouched(), "the one from before is none of the two: {:?}", sim.recovered);
    sim.advance(1_000);
    assert_eq!(
        (sim.recovered[0].0, sim.recovered[0].1),
        (RecoveryReason::Orphaned, TerminateOutcome::NotRunning)
    );
}

#[test]
fn a_zombie_that_a_clock_ahead_asked_to_end_is_asked_again_in_time() {
    let mut sim = Sim::new(24 * HOUR, None);
    let completed = Completed {
        execution_id: execution(),
        attempt: 1,
        agent_id: Some(agent()),
        instance_id: Some(instance("i-1")),
        result: None,
        late: false,
    };
    sim.execution(completed.into());
    started_ahead(&mut sim);
    beat_for(&mut sim, 2_000);
    assert_eq!(std::mem::take(&mut sim.world.zombies_due).len(), 1);
    // As whoever asks notes it.
    let next_ask_at = sim.now.plus_ms(retry_pause_ms(0));
    let claims = sim.world.agents.get_mut(&agent()).unwrap().claims_mut("i-1").unwrap();
    claims.extras_mut()[0].next_ask_at = Some(next_ask_at);
    beat_for(&mut sim, 2_000);
    assert!(sim.world.zombies_due.is_empty(), "not before its time");
    set_right(&mut sim);
    beat_for(&mut sim, 2_000);
    assert_eq!(sim.world.zombies_due.len(), 1);
}
