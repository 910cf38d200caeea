//! Property tests over sequences of evidence: nothing good or void condemns, everything bad ends within its own bound.

use proptest::prelude::*;
use rollcall_core::{
    agent::Status,
    event::{CancelRequested, RecoveryReason, TerminateOutcome},
    execution::State,
    wire::{Outcome, TerminateState},
};
use watchdog::{facts::Waiting, sight::Void};

use crate::sim::{Begun, HOUR, LIMITS, Sim, Truth, agent, execution};

const INTERVAL_MS: u64 = LIMITS.interval_ms;
/// What a step of a sequence, and the pause after a failed look, may add.
const SLACK_MS: u64 = 1_500;
/// A heartbeat channel is silent after so long.
const SILENT_MS: u64 = INTERVAL_MS * 7 / 2;
const STALL_TIMEOUT_MS: u64 = 10_000;
pub const VOIDS: [Void; 8] = [
    Void::Started,
    Void::BusCut,
    Void::Dropped,
    Void::Stalled,
    Void::ClockJump,
    Void::TailLag,
    Void::CanaryLost,
    Void::Gaps,
];

/// Evidence that is good or void.
#[derive(Debug, Clone)]
enum Kind {
    /// A heartbeat that lists it, its progress risen, after at most an interval.
    Beat(u64),
    /// We are blind for so long; meanwhile the log may say anything about the agent's health.
    Blind(Void, u64, Option<Status>),
    /// Another process takes over after so long.
    Restart(u64),
    /// The log says that it is well.
    Well,
    /// A heartbeat is sent again.
    Replay,
    /// Somebody takes it for gone, and it beats on.
    TakenForGone(Option<&'static str>),
}

impl Kind {
    const fn lasts_ms(&self) -> u64 {
        match self {
            Self::Beat(ms) | Self::Blind(_, ms, _) | Self::Restart(ms) => *ms,
            Self::Well | Self::Replay | Self::TakenForGone(_) => 0,
        }
    }

    fn happen(&self, sim: &mut Sim, progress: u64) {
        match self {
            Self::Beat(after) => {
                sim.advance(*after);
                sim.beat(true, progress);
            }
            Self::Blind(void, ms, status) => {
                sim.world.void(*void);
                if let Some(status) = status {
                    sim.status("i-1", *status);
                }
                sim.advance(*ms);
                sim.see();
            }
            Self::Restart(ms) => sim.restart(*ms),
            Self::Well => sim.status("i-1", Status::Connected),
            Self::TakenForGone(by) => sim.gone(*by),
            Self::Replay => {
                if let Some(before) = sim.beat_seq.checked_sub(1) {
                    sim.beat_seq = before;
                    sim.beat(true, 0);
                }
            }
        }
    }
}

fn good_or_void() -> impl Strategy<Value = Kind> {
    let void = prop::sample::select(VOIDS.to_vec());
    let status = prop_oneof![Just(None), Just(Some(Status::Disconnected)), Just(Some(Status::Error))];
    prop_oneof![
        8 => (1u64..1_000).prop_map(Kind::Beat),
        2 => (void, 0u64..100_000, status).prop_map(|(v, ms, s)| Kind::Blind(v, ms, s)),
        1 => (0u64..100_000).prop_map(Kind::Restart),
        1 => Just(Kind::Well),
        1 => Just(Kind::Replay),
    ]
}

/// The same, of an agent that somebody may take for gone.
fn good_void_or_gone() -> impl Strategy<Value = Kind> {
    let by = prop_oneof![Just(None), Just(Some("operator"))];
    prop_oneof![9 => good_or_void(), 1 => by.prop_map(Kind::TakenForGone)]
}

/// Evidence that is bad from some moment on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bad {
    Dropped,
    NeverTaken,
    Dead,
    Mute,
    Restarted,
    Goodbye,
    Dismissed,
    Forgotten,
    Late,
    Stalled,
    Cancelled,
    Withheld,
}

const BAD: [Bad; 12] = [
    Bad::Dropped,
    Bad::NeverTaken,
    Bad::Dead,
    Bad::Mute,
    Bad::Restarted,
    Bad::Goodbye,
    Bad::Dismissed,
    Bad::Forgotten,
    Bad::Late,
    Bad::Stalled,
    Bad::Cancelled,
    Bad::Withheld,
];

impl Bad {
    /// How long it takes until it falls due, from the last time that our clocks began anew.
    const fn due_ms(self) -> u64 {
        match self {
            // Two lists beyond the grace.
            Self::Dropped | Self::NeverTaken | Self::Withheld => LIMITS.dispatch_grace_ms + 2 * INTERVAL_MS,
            Self::Dead | Self::Mute => {
                if LIMITS.lost_after_ms > SILENT_MS {
                    LIMITS.lost_after_ms
                } else {
                    SILENT_MS
                }
            }
            // Silence, or two answers without it beyond the grace.
            Self::Restarted | Self::Dismissed | Self::Forgotten => LIMITS.dispatch_grace_ms + 2 * INTERVAL_MS,
            Self::Late | Self::Goodbye | Self::Cancelled => 0,
            // And the next list.
            Self::Stalled => STALL_TIMEOUT_MS + 2 * INTERVAL_MS,
        }
    }

    /// Makes it so; what its instance beats from now on, if it does.
    fn begin(self, sim: &mut Sim, truth: Truth, ending: Option<TerminateState>) -> Option<bool> {
        // An agent that beats without it and says that it has it is believed; not so one that says nothing.
        let not_listing = if truth == Truth::Lists { Truth::Mute } else { truth };
        sim.ending = ending;
        match self {
            Self::Dropped | Self::NeverTaken => {
                sim.truth = not_listing;
                Some(false)
            }
            Self::Withheld => {
                sim.truth = not_listing;
                sim.waiting = Waiting::Withholds(Outcome::Completed);
                Some(false)
            }
            Self::Dead | Self::Mute => {
                sim.truth = if self == Self::Dead { Truth::Away } else { Truth::Mute };
                sim.status("i-1", Status::Disconnected);
                None
            }
            Self::Restarted => {
                sim.truth = not_listing;
                sim.supersede();
                None
            }
            Self::Goodbye => {
                sim.gone(Some("instance"));
                None
            }
            Self::Dismissed | Self::Forgotten => {
                sim.truth = not_listing;
                sim.gone(Some("operator").filter(|_| self == Self::Dismissed));
                None
            }
            Self::Late | Self::Stalled => {
                if ending == Some(TerminateState::NotRunning) {
                    sim.truth = Truth::Empty;
                }
                Some(true)
            }
            Self::Cancelled => {
                let cancel = CancelRequested {
                    execution_id: execution(),
                    attempt: 1,
                    agent_id: Some(agent()),
                    reason: String::new(),
                    by: String::new(),
                };
                sim.execution(cancel.into());
                Some(true)
            }
        }
    }

    /// As what it may be recovered; what was put off for as long as the safety net takes may be stale.
    const fn reasons(self, is_confirmed: bool) -> &'static [RecoveryReason] {
        use RecoveryReason as R;
        match self {
            Self::Dropped => &[R::Orphaned],
            Self::NeverTaken => &[R::DispatchLost],
            Self::Dead | Self::Mute => &[R::AgentLost, R::Stale],
            Self::Restarted => &[R::AgentRestarted],
            Self::Goodbye | Self::Dismissed | Self::Forgotten => &[R::AgentGone],
            Self::Late if is_confirmed => &[R::TimedOut],
            Self::Stalled if is_confirmed => &[R::Stalled],
            Self::Late | Self::Stalled | Self::Cancelled | Self::Withheld => &[R::Stale],
        }
    }
}

/// Our clocks begin anew: blind for so long, or another process.
#[derive(Debug, Clone, Copy)]
pub enum Anew {
    Blind(Void, u64),
    Restart(u64),
}

impl Anew {
    pub fn happen(self, sim: &mut Sim) {
        match self {
            Self::Blind(void, ms) => sim.blind(void, ms),
            Self::Restart(ms) => sim.restart(ms),
        }
    }
}

pub fn anew() -> impl Strategy<Value = Anew> {
    let void = prop::sample::select(VOIDS.to_vec());
    prop_oneof![
        3 => (void, 0u64..3_000).prop_map(|(void, ms)| Anew::Blind(void, ms)),
        1 => (0u64..3_000).prop_map(Anew::Restart),
    ]
}

fn begun() -> impl Strategy<Value = Begun> {
    prop::sample::select(vec![Begun::Dispatched, Begun::Started, Begun::Granted])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn good_and_void_evidence_never_yields_a_verdict(
        kinds in prop::collection::vec(good_void_or_gone(), 1..120),
        truth in prop_oneof![Just(Truth::Lists), Just(Truth::Away), Just(Truth::Mute)],
        begun in begun(),
    ) {
        let mut sim = Sim::begun(begun, HOUR * 24, Some(30_000));
        // Heartbeats alone have to speak for an agent that takes no requests.
        sim.truth = truth;
        for (progress, kind) in kinds.iter().enumerate() {
            kind.happen(&mut sim, progress as u64);
            prop_assert!(sim.is_untouched(), "{:?}", sim.recovered);
        }
        prop_assert!(sim.works < 5_000, "judged {} times", sim.works);
    }

    #[test]
    fn every_bad_sequence_ends_within_its_bound(
        bad in prop::sample::select(BAD.to_vec()),
        prefix in prop::collection::vec(good_or_void(), 1..30),
        truth in prop_oneof![Just(Truth::Lists), Just(Truth::Empty), Just(Truth::Away), Just(Truth::Mute)],
        ending in prop_oneof![
            Just(Some(TerminateState::Terminated)), Just(Some(TerminateState::NotRunning)), Just(None)
        ],
        anew in prop::collection::vec(anew(), 0..4),
    ) {
        let lasts: u64 = prefix.iter().map(Kind::lasts_ms).sum();
        let timeout_ms = if bad == Bad::Late { lasts + 1_000 } else { HOUR * 24 };
        let stall = Some(STALL_TIMEOUT_MS).filter(|_| bad == Bad::Stalled);
        let never_taken = bad == Bad::NeverTaken;
        let mut sim = Sim::begun(if never_taken { Begun::Dispatched } else { Begun::Started }, timeout_ms, stall);
        let last = prefix.len() as u64;
        if !never_taken {
            for (progress, kind) in prefix.iter().enumerate() {
                kind.happen(&mut sim, progress as u64);
            }
            sim.advance(900);
            sim.beat(true, last);
        }
        prop_assert!(sim.recovered.is_empty(), "{:?}", sim.recovered);
        let beats = bad.begin(&mut sim, truth, ending);
        let is_confirmed = ending.is_some();
        let nets = match bad {
            Bad::Late | Bad::Stalled => !is_confirmed,
            _ => matches!(bad, Bad::Cancelled | Bad::Withheld),
        };
        let bound = bad.due_ms() + if nets { LIMITS.stale_after_ms } else { 0 } + SLACK_MS;
        let mut began = sim.now;
        let mut anew = anew.into_iter();
        while sim.recovered.is_empty() && sim.now.since_ms(began) <= bound {
            sim.advance(900);
            if let Some(lists) = beats {
                sim.beat(lists, last);
            }
            match anew.next().filter(|_| sim.recovered.is_empty()) {
                Some(anew) => anew.happen(&mut sim),
                None => continue,
            }
            began = sim.now;
        }
        prop_assert_eq!(sim.recovered.len(), 1, "{:?} after {} ms", bad, sim.now.since_ms(began));
        let (reason, terminate, _) = sim.recovered[0];
        prop_assert!(bad.reasons(is_confirmed).contains(&reason), "{:?}: {:?}", bad, reason);
        if matches!(bad, Bad::Late | Bad::Stalled) && !is_confirmed {
            prop_assert_eq!(terminate, TerminateOutcome::Failed);
        }
        let state = sim.world.ended.get(&execution()).map(|note| note.state);
        let end = if bad == Bad::Cancelled { State::Cancelled } else { State::Failed };
        prop_assert_eq!(state, Some(end));
        prop_assert!(sim.works < 5_000, "judged {} times", sim.works);
    }
}
