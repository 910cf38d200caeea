//! The same properties for agents that are driven over HTTP: what their registries answer, and what our calls of them
//! do not, condemns nobody while it is good or void, and ends within its own bound once it is bad.

use proptest::prelude::*;
use rollcall_core::{
    agent::Status,
    event::{RecoveryReason, TerminateOutcome},
    execution::State,
    wire::TerminateState,
};
use watchdog::sight::Void;

use crate::{
    properties::{VOIDS, anew},
    sim::{Begun, CYCLE_MS, HOUR, LIMITS, Sim, Truth, execution},
};

const INTERVAL_MS: u64 = LIMITS.interval_ms;
const STEP_MS: u64 = 900;
/// What a step of a sequence, and the pause after a failed look, may add.
const SLACK_MS: u64 = 1_500;
const STALL_TIMEOUT_MS: u64 = 10_000;

/// Who it is: one whose heartbeats name `control`, or one that an operator described in a file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Who {
    Beats,
    OfFile,
}

impl Who {
    fn begin(self, begun: Begun, timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Sim {
        match self {
            Self::Beats => Sim::driven(begun, timeout_ms, stall_timeout_ms),
            Self::OfFile => Sim::of_file(begun, timeout_ms, stall_timeout_ms),
        }
    }

    /// Silent to the threshold after so long without a word.
    const fn silent_ms(self) -> u64 {
        let interval = if matches!(self, Self::Beats) { INTERVAL_MS } else { CYCLE_MS };
        interval * LIMITS.failure_threshold as u64 + interval / 2
    }
}

fn who() -> impl Strategy<Value = Who> {
    prop_oneof![Just(Who::Beats), Just(Who::OfFile)]
}

fn begun() -> impl Strategy<Value = Begun> {
    prop::sample::select(vec![Begun::Dispatched, Begun::Started, Begun::Granted])
}

/// Evidence that is good or void.
#[derive(Debug, Clone)]
enum Kind {
    /// Its registry lists it, after so long.
    Lists(u64),
    /// It knows of it: accepted and not begun, or finished a moment ago.
    Knows(u64),
    /// It leaves it out in answers that are one word, and lists it again.
    Once(u64),
    /// It can't be called for so long: our guard refuses its URL, or our own network is away.
    Uncalled(u64),
    /// A heartbeat; what it lists does not count, its progress does.
    Beat(u64, bool),
    /// We are blind for so long; meanwhile the log may say anything about its health, and its registry anything at all.
    Blind(Void, u64, Option<Status>, Option<bool>),
    /// Another process takes over after so long.
    Restart(u64),
    /// The log says that it is well, or not.
    Status(Status),
}

impl Kind {
    const fn lasts_ms(&self) -> u64 {
        match self {
            Self::Once(ms) | Self::Blind(_, ms, _, Some(false)) => *ms + CYCLE_MS / 2,
            Self::Lists(ms)
            | Self::Knows(ms)
            | Self::Uncalled(ms)
            | Self::Beat(ms, _)
            | Self::Blind(_, ms, ..)
            | Self::Restart(ms) => *ms,
            Self::Status(_) => 0,
        }
    }

    fn happen(&self, sim: &mut Sim, who: Who, progress: u64) {
        match self {
            Self::Lists(after) => {
                sim.advance(*after);
                sim.registry(&["x"]);
            }
            Self::Knows(after) => {
                sim.advance(*after);
                sim.registry_of(&[], &["x"]);
            }
            Self::Once(after) => {
                sim.advance(*after);
                sim.registry(&[]);
                sim.advance(CYCLE_MS / 2 - 1);
                sim.registry(&[]);
                sim.advance(1);
                sim.registry(&["x"]);
            }
            Self::Uncalled(ms) => {
                let truth = std::mem::replace(&mut sim.truth, Truth::Void);
                sim.advance(*ms);
                sim.truth = truth;
            }
            Self::Beat(after, lists) => {
                sim.advance(*after);
                if who == Who::Beats {
                    sim.beat(*lists, progress);
                }
            }
            Self::Blind(void, ms, status, answer) => {
                sim.world.void(*void);
                if let Some(status) = status {
                    sim.status(sim.instance, *status);
                }
                for _ in 0..2 {
                    sim.advance(*ms / 2);
                    match answer {
                        Some(true) => sim.registry(&["x"]),
                        Some(false) => sim.registry(&[]),
                        None => {}
                    }
                }
                sim.see();
                // What it answered meanwhile counts for nothing: this is the first one without it.
                if *answer == Some(false) {
                    sim.registry(&[]);
                    sim.advance(CYCLE_MS / 2);
                    sim.registry(&["x"]);
                }
            }
            Self::Restart(ms) => sim.restart(*ms),
            Self::Status(status) => sim.status(sim.instance, *status),
        }
    }
}

fn good_or_void(health: &[Status]) -> impl Strategy<Value = Kind> + use<> {
    let health = || prop::sample::select(health.to_vec());
    let void = prop::sample::select(VOIDS.to_vec());
    let blind = (void, 0u64..100_000, prop::option::of(health()), prop::option::of(any::<bool>()));
    prop_oneof![
        6 => (1..=CYCLE_MS).prop_map(Kind::Lists),
        2 => (1..=CYCLE_MS).prop_map(Kind::Knows),
        2 => (1..=CYCLE_MS).prop_map(Kind::Once),
        2 => (0u64..100_000).prop_map(Kind::Uncalled),
        4 => (1..=INTERVAL_MS, any::<bool>()).prop_map(|(ms, lists)| Kind::Beat(ms, lists)),
        2 => blind.prop_map(|(void, ms, status, answer)| Kind::Blind(void, ms, status, answer)),
        1 => (0u64..100_000).prop_map(Kind::Restart),
        2 => health().prop_map(Kind::Status),
    ]
}

/// A sequence, and what comes of asking its registry between two cycles. One that does not answer then proves nothing, as
/// long as nothing else says that its agent is away.
fn good_or_void_sequence() -> impl Strategy<Value = (Truth, Vec<Kind>)> {
    let sequence = |health: &[Status]| prop::collection::vec(good_or_void(health), 1..120);
    let asked = prop_oneof![Just(Truth::Lists), Just(Truth::Void)];
    prop_oneof![(asked, sequence(&ANY_HEALTH)), (Just(Truth::Mute), sequence(&[Status::Connected])),]
}

const HEALTH: [Status; 3] = [Status::Connected, Status::Disconnected, Status::Error];
/// The log may give it up as well, as long as it did not say goodbye itself.
const ANY_HEALTH: [Status; 4] = [Status::Connected, Status::Disconnected, Status::Error, Status::Gone];

/// Evidence that is bad from some moment on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bad {
    /// Its registry answers without it.
    Dropped,
    /// Neither heartbeats nor its registry are there any more.
    Dead,
    /// The log gave it up, and its registry answers without it.
    GoneDropped,
    /// The log gave it up, and nothing of it answers.
    GoneDead,
    /// It started anew, and its registry does not know of it.
    Restarted,
    /// Its time is up.
    Late,
    /// Its heartbeats say that nothing moves.
    Stalled,
}

const BAD: [Bad; 7] =
    [Bad::Dropped, Bad::Dead, Bad::GoneDropped, Bad::GoneDead, Bad::Restarted, Bad::Late, Bad::Stalled];

impl Bad {
    /// How long it takes until it falls due, from the last time that our clocks began anew.
    fn due_ms(self, who: Who) -> u64 {
        match self {
            // Two answers beyond the grace.
            Self::Dropped | Self::Restarted => LIMITS.dispatch_grace_ms + 2 * CYCLE_MS,
            Self::Dead => LIMITS.lost_after_ms.max(who.silent_ms()),
            // What it listed a moment ago vouches until it is silent; answers without it end that at once.
            Self::GoneDropped => LIMITS.dispatch_grace_ms + 3 * CYCLE_MS,
            Self::GoneDead => who.silent_ms(),
            Self::Late => 0,
            // Its progress counts from when its registry has listed it; and the next heartbeat.
            Self::Stalled => STALL_TIMEOUT_MS + CYCLE_MS + 2 * INTERVAL_MS,
        }
    }

    fn begin(self, sim: &mut Sim, direct: Truth) {
        match self {
            Self::Dropped => sim.truth = direct,
            Self::Dead => {
                sim.truth = Truth::Mute;
                sim.status(sim.instance, Status::Disconnected);
            }
            Self::GoneDropped => {
                sim.truth = Truth::Empty;
                sim.status(sim.instance, Status::Gone);
            }
            Self::GoneDead => {
                sim.truth = Truth::Mute;
                sim.status(sim.instance, Status::Gone);
            }
            Self::Restarted => {
                sim.truth = direct;
                sim.supersede();
            }
            Self::Late | Self::Stalled => sim.truth = Truth::Lists,
        }
    }

    /// What its registry answers when a cycle calls it. `None`: nothing comes back.
    const fn answer(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Dropped | Self::GoneDropped | Self::Restarted => Some(&[]),
            Self::Dead | Self::GoneDead => None,
            Self::Late | Self::Stalled => Some(&["x"]),
        }
    }

    const fn beats(self) -> bool {
        matches!(self, Self::Dropped | Self::Late | Self::Stalled)
    }

    const fn ends_by_request(self) -> bool {
        matches!(self, Self::Late | Self::Stalled)
    }

    fn reasons(self, begun: Begun, is_confirmed: bool) -> &'static [RecoveryReason] {
        use RecoveryReason as R;
        match self {
            Self::Dropped if begun == Begun::Dispatched => &[R::DispatchLost],
            Self::Dropped => &[R::Orphaned],
            Self::Dead => &[R::AgentLost],
            Self::GoneDropped | Self::GoneDead => &[R::AgentGone],
            Self::Restarted => &[R::AgentRestarted],
            Self::Late if is_confirmed => &[R::TimedOut],
            Self::Stalled if is_confirmed => &[R::Stalled],
            Self::Late | Self::Stalled => &[R::Stale],
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn good_and_void_answers_of_a_registry_never_yield_a_verdict(
        who in who(),
        (truth, kinds) in good_or_void_sequence(),
        begun in begun(),
    ) {
        let mut sim = who.begin(begun, HOUR * 24, Some(30_000));
        sim.truth = truth;
        for (progress, kind) in kinds.iter().enumerate() {
            kind.happen(&mut sim, who, progress as u64);
            prop_assert!(sim.is_untouched(), "{:?} after {:?}", sim.recovered, kind);
        }
        prop_assert_eq!(sim.world.counters.heard_again, 0);
        prop_assert!(sim.world.zombies_due.is_empty());
        prop_assert!(sim.works < 10_000, "judged {} times", sim.works);
    }

    #[test]
    fn every_bad_sequence_of_a_registry_ends_within_its_bound(
        bad in prop::sample::select(BAD.to_vec()),
        who in who(),
        begun in begun(),
        prefix in prop::collection::vec(good_or_void(&HEALTH), 1..30),
        direct in prop_oneof![Just(Truth::Empty), Just(Truth::Mute)],
        is_confirmed in any::<bool>(),
        anew in prop::collection::vec(anew(), 0..4),
    ) {
        // Who never beats names no progress.
        prop_assume!(bad != Bad::Stalled || who == Who::Beats);
        let lasts: u64 = prefix.iter().map(Kind::lasts_ms).sum();
        let timeout_ms = if bad == Bad::Late { lasts + STEP_MS } else { HOUR * 24 };
        let stall = Some(STALL_TIMEOUT_MS).filter(|_| bad == Bad::Stalled);
        let mut sim = who.begin(begun, timeout_ms, stall);
        sim.ending = is_confirmed.then_some(TerminateState::Terminated);
        let last = prefix.len() as u64;
        for (progress, kind) in prefix.iter().enumerate() {
            kind.happen(&mut sim, who, progress as u64);
        }
        sim.status(sim.instance, Status::Connected);
        sim.advance(STEP_MS);
        if who == Who::Beats {
            sim.beat(true, last);
        }
        if bad != Bad::Late {
            sim.registry(&["x"]);
        }
        prop_assert!(sim.recovered.is_empty() || bad == Bad::Late, "{:?}", sim.recovered);
        bad.begin(&mut sim, direct);
        let net = if bad.ends_by_request() && !is_confirmed { LIMITS.stale_after_ms } else { 0 };
        let bound = bad.due_ms(who) + net + SLACK_MS;
        let (mut began, mut called) = (sim.now, sim.now);
        let mut anew = anew.into_iter();
        while sim.recovered.is_empty() && sim.now.since_ms(began) <= bound {
            sim.advance(STEP_MS);
            if who == Who::Beats && bad.beats() {
                sim.beat(true, last);
            }
            if let Some(running) = bad.answer().filter(|_| sim.now.since_ms(called) + STEP_MS > CYCLE_MS) {
                called = sim.now;
                sim.registry(running);
            }
            match anew.next().filter(|_| sim.recovered.is_empty()) {
                Some(anew) => anew.happen(&mut sim),
                None => continue,
            }
            began = sim.now;
        }
        prop_assert_eq!(sim.recovered.len(), 1, "{:?} after {} ms", bad, sim.now.since_ms(began));
        let (reason, terminate, _) = sim.recovered[0];
        prop_assert!(bad.reasons(begun, is_confirmed).contains(&reason), "{:?}: {:?}", bad, reason);
        if bad.ends_by_request() {
            let ending = if is_confirmed { TerminateOutcome::Confirmed } else { TerminateOutcome::Failed };
            prop_assert_eq!(terminate, ending);
        }
        prop_assert_eq!(sim.world.ended.get(&execution()).map(|note| note.state), Some(State::Failed));
        prop_assert!(sim.works < 10_000, "judged {} times", sim.works);
    }
}
