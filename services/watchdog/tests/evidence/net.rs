//! The safety net: it counts from when a recovery first fell due, however often our own clocks began anew since.

use rollcall_core::{
    agent::Status,
    event::{RecoveryReason, TerminateOutcome},
    wire::TerminateState,
};
use watchdog::{matrix::Row, sight::Void};

use crate::sim::{HOUR, LIMITS, Sim, Truth, execution};

/// Runs until it is recovered; every step is followed by a blindness.
fn run(sim: &mut Sim, step_ms: u64, lists: Option<bool>, for_ms: u64) {
    let until = sim.now.plus_ms(for_ms);
    while sim.recovered.is_empty() && sim.now < until {
        sim.advance(step_ms);
        if let Some(lists) = lists {
            sim.beat(lists, 7);
            sim.advance(10);
        }
        if sim.recovered.is_empty() {
            sim.blind(Void::Gaps, 10);
        }
    }
}

#[test]
fn a_silence_that_our_own_blindness_interrupts_again_and_again_ends_at_the_net() {
    let mut sim = Sim::new(HOUR, None);
    sim.beat(true, 0);
    sim.truth = Truth::Mute;
    sim.status("i-1", Status::Disconnected);
    let due = sim.now.plus_ms(LIMITS.lost_after_ms);
    // Long enough for silence to the threshold, never for lost_after.
    run(&mut sim, 3_700, None, LIMITS.stale_after_ms + 20_000);
    let (reason, _, at) = sim.recovered[0];
    assert_eq!(reason, RecoveryReason::Stale);
    let late = at.since_ms(due.plus_ms(LIMITS.stale_after_ms));
    assert!(at >= due.plus_ms(LIMITS.stale_after_ms) && late < 4_000, "{late} ms after the net");
}

#[test]
fn an_absence_that_never_was_two_lists_in_a_row_ends_at_the_net_and_a_list_begins_it_anew() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.advance(LIMITS.dispatch_grace_ms);
    run(&mut sim, 900, Some(false), LIMITS.stale_after_ms - 5_000);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.beat(true, 7);
    let since = sim.now;
    run(&mut sim, 900, Some(false), LIMITS.stale_after_ms + 20_000);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Stale);
    let after = sim.recovered[0].2.since_ms(since);
    assert!((LIMITS.stale_after_ms..LIMITS.stale_after_ms + 3_000).contains(&after), "{after}");
    // One that lists it when it is asked is believed, however long that lasts.
    let mut sim = Sim::new(HOUR, None);
    sim.advance(LIMITS.dispatch_grace_ms);
    run(&mut sim, 900, Some(false), LIMITS.stale_after_ms * 2);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
}

#[test]
fn progress_that_stands_still_over_our_blindness_is_ended_at_the_net_and_one_that_moves_is_not() {
    let mut sim = Sim::new(HOUR, Some(10_000));
    sim.beat(true, 7);
    sim.ending = Some(TerminateState::Terminated);
    run(&mut sim, 900, Some(true), LIMITS.stale_after_ms);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    run(&mut sim, 900, Some(true), 15_000);
    assert_eq!(
        (sim.recovered[0].0, sim.recovered[0].1),
        (RecoveryReason::Stalled, TerminateOutcome::Confirmed)
    );
    let mut sim = Sim::new(HOUR, Some(10_000));
    for progress in 0..30 {
        sim.advance(4_000);
        sim.blind(Void::Gaps, 10);
        sim.beat(true, progress);
    }
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
}

#[test]
fn an_end_that_is_never_confirmed_is_asked_for_again_with_growing_pauses() {
    const STEP_MS: u64 = 100;
    let mut sim = Sim::new(10_000, None);
    sim.ending = None;
    let mut asked_at = Vec::new();
    for step in 0..600 {
        sim.advance(STEP_MS);
        if step % 5 == 0 {
            sim.beat(true, 7);
        }
        if sim.terminations > asked_at.len() {
            asked_at.push(sim.now);
        }
    }
    assert_eq!(sim.terminations, asked_at.len());
    let pauses: Vec<u64> = asked_at.windows(2).map(|two| two[1].since_ms(two[0])).collect();
    assert!(pauses.len() >= 4, "{pauses:?}");
    for (pause, wanted) in pauses.iter().zip([1_000, 2_000, 4_000, 8_000, 16_000]) {
        assert!((wanted..=wanted + 2 * STEP_MS).contains(pause), "{pauses:?}");
    }
}

#[test]
fn what_was_asked_of_its_agent_is_not_forgotten_when_our_sight_begins_anew() {
    let mut sim = Sim::new(HOUR, Some(10_000));
    sim.ending = None;
    sim.beat(true, 7);
    sim.advance(11_000);
    sim.beat(true, 7);
    sim.advance(1_100);
    let asked = sim.terminations;
    assert!(asked > 0);
    sim.blind(Void::Gaps, 10);
    assert_eq!(sim.world.troubles[&execution()].row, Row::TerminateRefused);
    assert!(sim.world.troubles[&execution()].asked_times as usize == asked);
    sim.advance(900);
    sim.beat(true, 7);
    sim.advance(2_000);
    sim.beat(true, 7);
    assert!(sim.terminations > asked, "asked again at its time, not after another stall timeout");
    // It moves again: nothing is asked any more.
    let asked = sim.terminations;
    for progress in 8..30 {
        sim.beat(true, progress);
        sim.advance(900);
    }
    assert_eq!(sim.terminations, asked);
    assert!(!sim.world.troubles.contains_key(&execution()));
}
