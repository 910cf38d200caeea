//! Work that its agent accepts late: what was said before that is no word about it.

use rollcall_core::event::RecoveryReason;
use watchdog::{
    decide::{Look, Verdict},
    facts::{Edge, Promise, Waiting},
    state::Looks,
};

use crate::sim::{Begun, HOUR, LIMITS, Sim, Truth, execution};

/// Dispatched and not answered: missing on two lists beyond the grace, and our own message has yet to come back.
fn about_to_be_lost() -> Sim {
    let mut sim = Sim::begun(Begun::Dispatched, HOUR, None);
    sim.truth = Truth::Empty;
    sim.canary = false;
    sim.advance(LIMITS.dispatch_grace_ms + 500);
    sim.beat(false, 0);
    sim.advance(900);
    sim.beat(false, 0);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim
}

#[test]
fn lists_and_answers_from_before_it_was_accepted_are_no_evidence_against_it() {
    let mut sim = about_to_be_lost();
    let looks = Looks {
        canary: true,
        waiting: Waiting::Nothing,
        edge: Edge::ListsNot { times: 2 },
        of_started: false,
        promise: Promise::NotRunning,
    };
    let judged = |sim: &Sim| sim.world.judge(&execution(), &looks, sim.now).unwrap().0.verdict;
    assert!(matches!(judged(&sim), Verdict::Recover(_)), "{:?}", judged(&sim));
    // The dispatcher asked once more, and it accepted while it was looked at.
    sim.started();
    assert!(!judged(&sim).is_work(), "{:?}", judged(&sim));
    // One list without it may have been under way.
    sim.canary = true;
    sim.beat(false, 0);
    sim.advance(900);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.truth = Truth::Lists;
    for progress in 0..10 {
        sim.beat(true, progress);
        sim.advance(900);
    }
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
}

#[test]
fn an_answer_from_before_it_was_accepted_is_asked_for_again() {
    let mut sim = about_to_be_lost();
    sim.started();
    // Two lists after that, and an answer from before.
    sim.beat(false, 0);
    sim.advance(900);
    sim.beat(false, 0);
    let mut looks = Looks { canary: true, edge: Edge::ListsNot { times: 2 }, ..Looks::default() };
    let judged = |looks: &Looks| sim.world.judge(&execution(), looks, sim.now).unwrap().0.verdict;
    assert_eq!(judged(&looks), Verdict::Look(Look::Instance));
    (looks.of_started, looks.waiting) = (true, Waiting::Nothing);
    assert!(matches!(judged(&looks), Verdict::Recover(_)));
}

#[test]
fn what_it_accepted_and_does_not_list_is_orphaned_all_the_same() {
    let mut sim = about_to_be_lost();
    sim.started();
    sim.canary = true;
    sim.beat(false, 0);
    sim.advance(900);
    sim.beat(false, 0);
    sim.advance(100);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Orphaned);
}
