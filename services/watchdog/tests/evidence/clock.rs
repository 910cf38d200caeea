//! Our clock was wrong and is set: what was measured or planned by the wrong one holds nothing up.

use rollcall_core::{
    Timestamp,
    agent::Status,
    event::{Completed, RecoveryReason, SystemEvent, SystemEventKind, TerminateOutcome},
    wire::TerminateState,
};
use serde_json::json;
use watchdog::{
    decide::{Verdict, judge},
    facts::{Asked, Facts},
    matrix::{Row, SAMPLE_LIMITS, sample},
    sight::Void,
    zombie::retry_pause_ms,
};

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
    let taken = sim.world.take_zombies(1);
    assert_eq!(taken, [(agent(), instance("i-1"))]);
    // Its claims are not looked into twice at once, and again once that is done.
    sim.world.zombies_due.extend(taken.clone());
    assert_eq!(sim.world.take_zombies(1), []);
    sim.world.zombies_done(&taken[0]);
    assert_eq!(sim.world.take_zombies(0), [], "there is no place");
    assert_eq!(sim.world.take_zombies(1), taken);
    sim.world.zombies_done(&taken[0]);
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

#[test]
fn what_was_said_not_to_run_by_a_clock_ahead_waits_for_its_report_no_longer_than_else() {
    let mut sim = Sim::new(1_000, None);
    // Late by every clock, when it is looked at.
    sim.now = sim.now.plus_ms(2_000);
    sim.ending = Some(TerminateState::NotRunning);
    started_ahead(&mut sim);
    sim.advance(100);
    assert_eq!((sim.terminations, sim.world.troubles[&execution()].row), (1, Row::Withheld));
    set_right(&mut sim);
    sim.advance(LIMITS.dispatch_grace_ms - 100);
    assert!(sim.recovered.is_empty(), "{:?}", sim.recovered);
    assert!(sim.terminations > 1, "it is asked again meanwhile");
    sim.advance(200);
    assert_eq!(
        (sim.recovered[0].0, sim.recovered[0].1),
        (RecoveryReason::TimedOut, TerminateOutcome::NotRunning)
    );
}

#[test]
fn work_that_stood_still_by_a_clock_ahead_is_asked_to_end_again_in_time() {
    let mut sim = Sim::new(24 * HOUR, Some(10_000));
    sim.ending = Some(TerminateState::StillRunning);
    started_ahead(&mut sim);
    beat_for(&mut sim, 12_000);
    let asked = sim.terminations;
    assert!(asked > 0);
    set_right(&mut sim);
    beat_for(&mut sim, 12_000);
    assert!(sim.terminations > asked, "it has not moved");
}

#[test]
fn what_spoke_for_it_by_a_clock_ahead_does_not_move_the_safety_net() {
    // It answered, it was listed, or it was missing once.
    for spoke in [Truth::Lists, Truth::Mute, Truth::Empty] {
        let mut sim = Sim::new(24 * HOUR, None);
        sim.now = sim.now.plus_ms(LIMITS.dispatch_grace_ms);
        sim.truth = spoke;
        if spoke == Truth::Lists {
            sim.status("i-1", Status::Disconnected);
        }
        started_ahead(&mut sim);
        match spoke {
            Truth::Lists => sim.advance(LIMITS.lost_after_ms + 100),
            listed => sim.beat(listed == Truth::Mute, 7),
        }
        set_right(&mut sim);
        let since = sim.now;
        sim.truth = Truth::Mute;
        if spoke == Truth::Mute {
            sim.status("i-1", Status::Disconnected);
        }
        sim.world.log_suspended = true;
        while sim.recovered.is_empty() {
            sim.advance(900);
            if spoke == Truth::Empty {
                // Never two in a row.
                sim.beat(false, 7);
                sim.blind(Void::Gaps, 10);
            }
            assert!(sim.now.since_ms(since) < HOUR, "{spoke:?} puts it off");
        }
        assert_eq!(sim.recovered[0].0, RecoveryReason::Stale, "{spoke:?}");
    }
}

/// Our clock was ahead, so its end was asked for before its time; then it was put right, and the work is missing.
#[test]
fn what_was_asked_to_end_by_a_wrong_clock_has_not_stood_still() {
    let (mut facts, now) = sample(Row::Orphaned);
    facts.asked = Asked::Unconfirmed { next_at: now.plus_ms(1_000) };
    let reason = |facts: &Facts, now| match judge(facts, &SAMPLE_LIMITS, now).verdict {
        Verdict::Recover(finding) => finding.reason,
        verdict => panic!("{verdict:?}"),
    };
    assert_eq!(reason(&facts, now), RecoveryReason::Orphaned);
    (facts.stall_timeout_ms, facts.asked_for) = (Some(30_000), Some(RecoveryReason::TimedOut));
    assert_eq!(reason(&facts, now), RecoveryReason::Orphaned);
    facts.asked_for = Some(RecoveryReason::Stalled);
    assert_eq!(reason(&facts, now), RecoveryReason::Stalled);
    let late = facts.deadline;
    facts.channel.last_at = Some(late);
    assert_eq!(reason(&facts, late), RecoveryReason::TimedOut);
}
