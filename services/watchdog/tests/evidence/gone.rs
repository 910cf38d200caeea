//! Agents that are gone by the log: on their own word at once, on anybody else's only once they are known to be away.

use rollcall_core::{
    Timestamp,
    agent::Parting,
    event::{RecoveryReason, TerminateOutcome},
};
use watchdog::{
    decide::{Look, Verdict, judge},
    facts::{Facts, Standing},
    matrix::{Row, SAMPLE_LIMITS, sample},
};

use crate::sim::{HOUR, LIMITS, Sim, Truth, execution};

const INTERVAL_MS: u64 = LIMITS.interval_ms;

fn row(sim: &Sim) -> Row {
    sim.world.troubles[&execution()].row
}

/// Beats that list it, for ten intervals.
fn beats_on(sim: &mut Sim, from: u64) {
    for progress in from..from + 10 {
        sim.beat(true, progress);
        sim.advance(INTERVAL_MS * 9 / 10);
    }
}

#[test]
fn its_own_goodbye_counts_at_once_also_for_a_watchdog_that_did_not_hear_it() {
    for restarts in [false, true] {
        let mut sim = Sim::new(HOUR, None);
        beats_on(&mut sim, 0);
        sim.canary = false;
        sim.world.log_suspended = true;
        sim.gone(Some("instance"));
        if restarts {
            sim.restart(0);
        } else {
            sim.advance(1);
        }
        let (reason, terminate, at) = sim.recovered[0];
        assert_eq!((reason, terminate), (RecoveryReason::AgentGone, TerminateOutcome::NotAttempted));
        assert!(sim.now.since_ms(at) <= 1, "restarts: {restarts}");
    }
}

#[test]
fn one_that_lives_is_left_its_work_whoever_takes_it_for_gone_and_whoever_looks() {
    for by in [None, Some("operator")] {
        // It lists its work when it is asked; or takes no requests, and its heartbeats have to speak for it.
        for truth in [Truth::Lists, Truth::Away, Truth::Mute] {
            let mut sim = Sim::new(HOUR * 24, None);
            beats_on(&mut sim, 0);
            sim.truth = truth;
            sim.gone(by);
            beats_on(&mut sim, 10);
            assert_eq!(row(&sim), Row::GoneVouched, "{by:?} {truth:?}");
            // Another watchdog has heard nothing of it yet.
            sim.restart(HOUR / 2);
            beats_on(&mut sim, 20);
            assert!(sim.is_untouched(), "{by:?} {truth:?}: {:?}", sim.recovered);
        }
        // It answers, and its heartbeats do not come through.
        let mut sim = Sim::new(HOUR * 24, None);
        sim.beat(true, 0);
        sim.gone(by);
        sim.advance(LIMITS.stale_after_ms * 2);
        assert!(sim.is_untouched(), "{by:?}: {:?}", sim.recovered);
        assert_eq!(row(&sim), Row::GoneVouched);
    }
}

#[test]
fn an_operator_is_believed_once_it_is_quiet_and_a_silence_once_it_is_silent() {
    for (by, after_ms) in [(Some("operator"), INTERVAL_MS * 3 / 2), (None, INTERVAL_MS * 7 / 2)] {
        let mut sim = Sim::new(HOUR, None);
        sim.beat(true, 0);
        let heard = sim.now;
        sim.truth = Truth::Mute;
        sim.gone(by);
        // Nobody vouches for it any more, as after a start of ours.
        sim.restart(0);
        sim.advance(after_ms - 100);
        assert!(sim.is_untouched(), "{by:?} after {} ms", sim.now.since_ms(heard));
        assert_eq!(row(&sim), Row::GoneUnsure);
        // And only if we see.
        sim.canary = false;
        sim.advance(2_000);
        assert!(sim.is_untouched(), "{by:?}: {:?}", sim.recovered);
        sim.canary = true;
        sim.advance(1_000);
        assert_eq!(sim.recovered[0].0, RecoveryReason::AgentGone, "{by:?}");
    }
}

#[test]
fn while_the_breaker_is_open_an_operator_is_believed_and_a_silence_is_not() {
    for by in [None, Some("operator")] {
        let mut sim = Sim::new(HOUR, None);
        sim.truth = Truth::Away;
        sim.mass_failure();
        sim.gone(by);
        sim.advance(INTERVAL_MS * 10);
        let expected = usize::from(by.is_some());
        assert_eq!(sim.recovered.len(), expected, "{by:?}: {:?}", sim.recovered);
    }
}

#[test]
fn what_it_does_not_hold_is_lost_after_two_answers_beyond_the_grace() {
    for by in [None, Some("operator")] {
        let mut sim = Sim::new(HOUR, None);
        sim.truth = Truth::Empty;
        sim.gone(by);
        sim.advance(LIMITS.dispatch_grace_ms - 100);
        assert!(sim.is_untouched(), "{by:?}: {:?}", sim.recovered);
        sim.advance(2 * INTERVAL_MS);
        let (reason, terminate, _) = sim.recovered[0];
        assert_eq!((reason, terminate), (RecoveryReason::AgentGone, TerminateOutcome::NotRunning));
    }
}

#[test]
fn a_silence_that_ended_as_forgotten_takes_its_turn_like_any_other() {
    let (mut facts, now) = sample(Row::AgentLost);
    facts.turn_at = None;
    for (by, verdict) in [
        (Parting::Forgotten, Verdict::Look(Look::Turn)),
        (Parting::Dismissed, judge_gone(&facts, Parting::Goodbye, now)),
    ] {
        assert_eq!(judge_gone(&facts, by, now), verdict, "{by:?}");
    }
}

fn judge_gone(facts: &Facts, by: Parting, now: Timestamp) -> Verdict {
    let facts = Facts { standing: Standing::Gone { since: now, by }, ..facts.clone() };
    judge(&facts, &SAMPLE_LIMITS, now).verdict
}
