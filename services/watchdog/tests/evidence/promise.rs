//! A dispatch that was never answered may still be under way when it is called lost.

use rollcall_core::{
    agent::Status,
    event::{RecoveryReason, TerminateOutcome},
    wire::{Outcome, TerminateState},
};
use watchdog::{
    decide::{Look, Verdict, judge},
    facts::{Promise, Waiting},
    matrix::{Row, SAMPLE_LIMITS, sample},
};

use crate::sim::{Begun, HOUR, LIMITS, Sim, Truth};

/// Dispatched, never answered, and missing on two lists beyond the grace.
fn never_taken(promise: Option<TerminateState>) -> Sim {
    let mut sim = Sim::begun(Begun::Dispatched, HOUR, None);
    sim.truth = Truth::Empty;
    sim.promise = promise;
    sim.advance(LIMITS.dispatch_grace_ms + 500);
    sim.beat(false, 0);
    sim.advance(900);
    sim.beat(false, 0);
    sim
}

#[test]
fn what_was_never_taken_is_lost_once_its_instance_was_asked_not_to_begin_it() {
    for (promise, terminate) in [
        (Some(TerminateState::NotRunning), TerminateOutcome::NotRunning),
        // The dispatch had just arrived.
        (Some(TerminateState::Terminated), TerminateOutcome::Confirmed),
        // One that knows of no such request must not put it off.
        (None, TerminateOutcome::Failed),
    ] {
        let sim = never_taken(promise);
        assert_eq!(sim.recovered.len(), 1, "{promise:?}");
        let (reason, ended, _) = sim.recovered[0];
        assert_eq!((reason, ended), (RecoveryReason::DispatchLost, terminate), "{promise:?}");
        assert_eq!((sim.promises, sim.terminations), (1, 0), "{promise:?}");
    }
}

#[test]
fn what_it_begins_at_that_very_moment_is_left_to_it() {
    let mut sim = never_taken(Some(TerminateState::StillRunning));
    sim.truth = Truth::Lists;
    for progress in 0..10 {
        sim.beat(true, progress);
        sim.advance(900);
    }
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    assert_eq!(sim.promises, 1);
}

#[test]
fn one_that_is_silent_and_answers_without_it_is_asked_as_well() {
    let mut sim = Sim::begun(Begun::Dispatched, HOUR, None);
    sim.truth = Truth::Empty;
    sim.advance(100);
    sim.status("i-1", Status::Disconnected);
    sim.advance(LIMITS.dispatch_grace_ms + LIMITS.lost_after_ms + 10_000);
    let (reason, ended, _) = sim.recovered[0];
    assert_eq!((reason, ended), (RecoveryReason::DispatchLost, TerminateOutcome::NotRunning));
    assert_eq!(sim.promises, 1);
}

#[test]
fn an_orchestrator_that_is_late_begins_nothing_after_the_verdict() {
    let mut sim = Sim::begun(Begun::Granted, HOUR, None);
    sim.truth = Truth::Empty;
    sim.advance(LIMITS.dispatch_grace_ms + 500);
    sim.beat(false, 0);
    sim.advance(900);
    sim.beat(false, 0);
    let (reason, ended, _) = sim.recovered[0];
    assert_eq!((reason, ended), (RecoveryReason::Orphaned, TerminateOutcome::NotRunning));
    assert_eq!((sim.promises, sim.terminations), (1, 0));
}

#[test]
fn only_what_may_still_begin_there_is_asked_for() {
    let (mut facts, now) = sample(Row::DispatchLost);
    facts.promise = Promise::Unasked;
    assert_eq!(
        judge(&facts, &SAMPLE_LIMITS, now).verdict,
        Verdict::Look(Look::Promise(RecoveryReason::DispatchLost))
    );
    let concluded = |facts| match judge(&facts, &SAMPLE_LIMITS, now).verdict {
        Verdict::Recover(finding) => finding.terminate,
        verdict => panic!("{verdict:?}"),
    };
    let mut accepted = facts.clone();
    (accepted.started, accepted.accepted) = (true, true);
    assert_eq!(concluded(accepted), TerminateOutcome::NotRunning, "it began, and is away");
    let mut external = facts.clone();
    external.started = true;
    let promise = Look::Promise(RecoveryReason::Orphaned);
    assert_eq!(
        judge(&external, &SAMPLE_LIMITS, now).verdict,
        Verdict::Look(promise),
        "its orchestrator may be late"
    );
    let mut driven = facts.clone();
    driven.channel.driven = true;
    assert_eq!(concluded(driven), TerminateOutcome::NotRunning, "a registry knows no attempts");
    // What was reported does not begin any more: the report is looked for first, and withholds the verdict.
    let mut reported = facts;
    reported.waiting = Waiting::Unasked;
    assert_eq!(judge(&reported, &SAMPLE_LIMITS, now).verdict, Verdict::Look(Look::Report));
    reported.waiting = Waiting::Withholds(Outcome::Completed);
    assert_eq!(judge(&reported, &SAMPLE_LIMITS, now).row, Row::Withheld);
}

#[test]
fn its_word_that_it_is_dead_is_for_whoever_asked() {
    let (mut facts, now) = sample(Row::DispatchLost);
    facts.waiting = Waiting::Confirms(Outcome::Terminated);
    facts.promise = Promise::Ended;
    let judgement = judge(&facts, &SAMPLE_LIMITS, now);
    assert!(matches!(judgement.verdict, Verdict::Recover(_)), "{judgement:?}");
    // Nobody asked: it ended it on its own, and that is a failure for the dispatcher to write down.
    facts.promise = Promise::Unasked;
    assert_eq!(judge(&facts, &SAMPLE_LIMITS, now).row, Row::Withheld);
}
