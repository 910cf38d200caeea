//! The shutdown, decided: what starts it, what cuts it short, and what the process exits with. Pure, apart from the latch,
//! which is an atomic because triggers come from several tasks at once.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rollcall_core::wire::{Goodbye, GoodbyeReason, InFlight};

/// Exit status after a clean drain (PROTOCOL.md 2).
pub const EXIT_CLEAN: u8 = 0;
/// Exit status when the drain was not clean: work would not die, or a report was never acknowledged.
pub const EXIT_UNCLEAN: u8 = 1;
/// Exit status that asks the supervisor for a new start: `EX_TEMPFAIL` (PROTOCOL.md 2).
pub const EXIT_RESTART: u8 = 75;
/// Added to the number of the signal that ended the process at once (the shell's convention).
pub const EXIT_SIGNAL_BASE: u8 = 128;

/// A signal that ends the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM
    Term,
    /// SIGINT
    Int,
}

impl Signal {
    const fn number(self) -> u8 {
        match self {
            Self::Int => 2,
            Self::Term => 15,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Term => "sigterm",
            Self::Int => "sigint",
        }
    }
}

/// What wants the agent to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trigger {
    /// The system.
    Signal(Signal),
    /// The fleet.
    Goodbye(Goodbye),
    /// The program itself, and why in a word.
    Program(String),
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason())
    }
}

impl Trigger {
    /// The `reason` of the heartbeats from now on: `sigterm`, `superseded`, ...
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Signal(signal) => signal.as_str().to_owned(),
            Self::Goodbye(goodbye) => reason_name(goodbye.reason).to_owned(),
            Self::Program(reason) => reason.clone(),
        }
    }
}

const fn reason_name(reason: GoodbyeReason) -> &'static str {
    match reason {
        GoodbyeReason::Superseded => "superseded",
        GoodbyeReason::ActivityTimeout => "activity_timeout",
        GoodbyeReason::Operator => "operator",
        GoodbyeReason::Drain => "drain",
        GoodbyeReason::Restart => "restart",
        GoodbyeReason::Unknown => "unknown",
    }
}

/// How far the shutdown has to go. Rises only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not shutting down.
    Serve,
    /// Let running work finish until the deadline.
    Drain,
    /// Cancel what is left and hand it back.
    Return,
    /// The same without any grace.
    Abort,
    /// Exit at once.
    Exit,
}

/// The shutdown as far as it was decided.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How far it has to go.
    pub phase: Phase,
    /// What began it.
    pub woken_by: Option<Trigger>,
    /// Until when running work may finish; set when it begins.
    pub drain_until: Option<Instant>,
    signals: u32,
    last_signal: Option<Signal>,
    /// A goodbye said that no new start is wanted.
    stay_down: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            phase: Phase::Serve,
            woken_by: None,
            drain_until: None,
            signals: 0,
            last_signal: None,
            stay_down: false,
        }
    }
}

impl Plan {
    /// Takes one more trigger into account. `drain` is the agent's own drain deadline.
    ///
    /// The first trigger begins the drain. Only signals are counted: the second cuts the drain short, the third exits
    /// at once. Deadlines only come nearer; a goodbye that wants the work returned or aborted cuts a drain short too.
    pub fn apply(&mut self, trigger: &Trigger, now: Instant, drain: Duration) {
        let (phase, until) = match trigger {
            Trigger::Signal(signal) => {
                self.signals += 1;
                self.last_signal = Some(*signal);
                let phase = match self.signals {
                    1 => Phase::Drain,
                    2 => Phase::Return,
                    _ => Phase::Exit,
                };
                (phase, now + drain)
            }
            Trigger::Goodbye(goodbye) => {
                self.stay_down |= stays_down(goodbye.reason);
                let phase = match goodbye.in_flight {
                    InFlight::Finish => Phase::Drain,
                    InFlight::Return => Phase::Return,
                    InFlight::Abort => Phase::Abort,
                };
                // A deadline beyond what a clock can count to is the agent's own.
                let until =
                    now.checked_add(Duration::from_millis(goodbye.deadline_ms)).unwrap_or(now + drain);
                (phase, until)
            }
            Trigger::Program(_) => (Phase::Drain, now + drain),
        };
        self.phase = self.phase.max(phase);
        self.drain_until = Some(self.drain_until.map_or(until, |before| before.min(until)));
        if self.woken_by.is_none() {
            self.woken_by = Some(trigger.clone());
        }
    }

    /// What the process exits with. `clean`: nothing is left behind, every report is acknowledged.
    #[must_use]
    pub fn exit(&self, clean: bool) -> Exit {
        let woken_by = self.woken_by.as_ref().map_or_else(String::new, Trigger::reason);
        let wants_restart = matches!(
            &self.woken_by,
            Some(Trigger::Goodbye(Goodbye {
                reason: GoodbyeReason::ActivityTimeout | GoodbyeReason::Restart,
                ..
            }))
        );
        let status = match self.last_signal {
            Some(signal) if self.phase == Phase::Exit => EXIT_SIGNAL_BASE + signal.number(),
            _ if self.stay_down => EXIT_CLEAN,
            _ if wants_restart => EXIT_RESTART,
            _ if clean => EXIT_CLEAN,
            _ => EXIT_UNCLEAN,
        };
        Exit { status, stay_down: self.stay_down, clean, woken_by }
    }
}

const fn stays_down(reason: GoodbyeReason) -> bool {
    matches!(reason, GoodbyeReason::Superseded | GoodbyeReason::Operator)
}

/// How the agent ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// What the process should exit with: [`EXIT_CLEAN`], [`EXIT_UNCLEAN`], [`EXIT_RESTART`] or 128 plus a signal.
    pub status: u8,
    /// It must not be started again (superseded, or an operator's goodbye); the status is 0 then.
    pub stay_down: bool,
    /// Nothing was left behind and every report was acknowledged.
    pub clean: bool,
    /// What began the shutdown.
    pub woken_by: String,
}

/// Opens once, for one caller, however many try at the same moment.
#[derive(Debug, Default)]
pub struct Latch(AtomicBool);

impl Latch {
    /// True for the first caller only.
    pub fn first(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    const DRAIN: Duration = Duration::from_secs(30);

    fn goodbye(reason: GoodbyeReason, in_flight: InFlight) -> Trigger {
        Trigger::Goodbye(Goodbye { reason, deadline_ms: 5_000, in_flight })
    }

    fn after(triggers: &[Trigger]) -> Plan {
        let now = Instant::now();
        let mut plan = Plan::default();
        for trigger in triggers {
            plan.apply(trigger, now, DRAIN);
        }
        plan
    }

    const TERM: Trigger = Trigger::Signal(Signal::Term);
    const INT: Trigger = Trigger::Signal(Signal::Int);

    #[test]
    fn first_second_third_signal() {
        assert_eq!(after(&[]).phase, Phase::Serve);
        assert_eq!(after(&[TERM]).phase, Phase::Drain);
        assert_eq!(after(&[TERM, INT]).phase, Phase::Return);
        assert_eq!(after(&[TERM, INT, TERM]).phase, Phase::Exit);
        assert_eq!(after(&[TERM, INT, TERM]).exit(false).status, 143);
        assert_eq!(after(&[TERM, TERM, INT]).exit(false).status, 130);
    }

    #[test]
    fn what_woke_it_is_the_first_trigger() {
        let plan = after(&[goodbye(GoodbyeReason::Drain, InFlight::Finish), TERM]);
        assert_eq!(plan.exit(true).woken_by, "drain");
        assert_eq!(plan.phase, Phase::Drain, "the first signal after a goodbye does not cut it short");
        assert_eq!(after(&[TERM, INT]).exit(true).woken_by, "sigterm");
    }

    #[test]
    fn deadlines_only_come_nearer() {
        let now = Instant::now();
        let mut plan = Plan::default();
        plan.apply(&TERM, now, DRAIN);
        assert_eq!(plan.drain_until, Some(now + DRAIN));
        plan.apply(&goodbye(GoodbyeReason::Restart, InFlight::Finish), now, DRAIN);
        assert_eq!(plan.drain_until, Some(now + Duration::from_secs(5)));
        plan.apply(&Trigger::Program("later".into()), now, DRAIN);
        assert_eq!(plan.drain_until, Some(now + Duration::from_secs(5)));
        let endless =
            Goodbye { reason: GoodbyeReason::Drain, deadline_ms: u64::MAX, in_flight: InFlight::Finish };
        plan.apply(&Trigger::Goodbye(endless), now, DRAIN);
        assert_eq!(plan.drain_until, Some(now + Duration::from_secs(5)));
    }

    #[test]
    fn a_stronger_goodbye_cuts_the_drain_short_and_a_weaker_one_does_not_lengthen_it() {
        let abort = goodbye(GoodbyeReason::Operator, InFlight::Abort);
        let finish = goodbye(GoodbyeReason::Operator, InFlight::Finish);
        assert_eq!(after(&[TERM, abort.clone()]).phase, Phase::Abort);
        assert_eq!(after(&[abort, finish]).phase, Phase::Abort);
        assert_eq!(after(&[goodbye(GoodbyeReason::Drain, InFlight::Return)]).phase, Phase::Return);
    }

    #[test]
    fn exit_statuses_of_the_contract() {
        let cases = [
            (TERM, true, 0, false),
            (TERM, false, 1, false),
            (goodbye(GoodbyeReason::Drain, InFlight::Finish), true, 0, false),
            (goodbye(GoodbyeReason::Unknown, InFlight::Finish), true, 0, false),
            (goodbye(GoodbyeReason::ActivityTimeout, InFlight::Finish), true, 75, false),
            (goodbye(GoodbyeReason::Restart, InFlight::Finish), true, 75, false),
            (goodbye(GoodbyeReason::Restart, InFlight::Finish), false, 75, false),
            (goodbye(GoodbyeReason::Superseded, InFlight::Return), true, 0, true),
            (goodbye(GoodbyeReason::Superseded, InFlight::Return), false, 0, true),
            (goodbye(GoodbyeReason::Operator, InFlight::Finish), true, 0, true),
        ];
        for (trigger, clean, status, stay_down) in cases {
            let exit = after(std::slice::from_ref(&trigger)).exit(clean);
            assert_eq!((exit.status, exit.stay_down), (status, stay_down), "{trigger:?} clean: {clean}");
        }
        let plan = after(&[
            goodbye(GoodbyeReason::Restart, InFlight::Finish),
            goodbye(GoodbyeReason::Superseded, InFlight::Return),
        ]);
        assert_eq!(
            (plan.exit(true).status, plan.exit(true).stay_down),
            (0, true),
            "a newer instance is there already"
        );
    }

    #[test]
    fn the_latch_opens_for_one_of_many() {
        const ROUNDS: usize = 50_000;
        const THREADS: usize = 2;
        let latches: Vec<Latch> = (0..ROUNDS).map(|_| Latch::default()).collect();
        let arrived = AtomicUsize::new(0);
        let run = || {
            let mut opened = 0;
            for (round, latch) in latches.iter().enumerate() {
                // All at each latch at the same moment.
                arrived.fetch_add(1, Ordering::SeqCst);
                let mut spins = 0u32;
                while arrived.load(Ordering::SeqCst) < THREADS * (round + 1) {
                    spins += 1;
                    // Close together on two processors, and not for ever where there is one.
                    if spins < 2_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
                }
                opened += usize::from(latch.first());
            }
            opened
        };
        let opened: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(opened, ROUNDS);
    }
}
