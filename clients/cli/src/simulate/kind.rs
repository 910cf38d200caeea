//! The faults that can be played, and what each must lead to.

use std::{fmt, str::FromStr};

use rollcall_core::event::RecoveryReason;

/// What is wrong with an execution or with the agent that gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Nothing.
    Normal,
    /// The work never ends; told to, it dies.
    Hung,
    /// The work is alive and its progress stands still.
    Stalling,
    /// The agent forgets the work without a word.
    Orphaning,
    /// The work never ends, and for a while does not die when told to.
    RefusingTerminate,
    /// The report comes twice.
    DoubleReporting,
    /// The work was terminated and a completion of it arrives all the same.
    LateReporting,
    /// The agent falls silent, answers nothing, and wakes up again much later.
    Silent,
    /// The agent's process is gone; a new one comes much later.
    Crashing,
    /// The agent's process is gone and a new one is there at once.
    Restarting,
    /// The agent shuts down in order and hands its work back; a new one comes.
    Returning,
    /// The agent's heartbeats pause, again and again, for less time than a loss takes.
    Flapping,
    /// The agent's heartbeats and answers are late, within what is allowed.
    Slow,
    /// The agent's clock is wrong.
    ClockSkewed,
}

/// Where a kind plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// In one execution, on any steady agent.
    Execution,
    /// In an agent of that kind: everything it holds is struck.
    Agent,
}

impl Kind {
    /// All kinds.
    pub(crate) const ALL: [Self; 14] = [
        Self::Normal,
        Self::Hung,
        Self::Stalling,
        Self::Orphaning,
        Self::RefusingTerminate,
        Self::DoubleReporting,
        Self::LateReporting,
        Self::Silent,
        Self::Crashing,
        Self::Restarting,
        Self::Returning,
        Self::Flapping,
        Self::Slow,
        Self::ClockSkewed,
    ];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Hung => "hung",
            Self::Stalling => "stalling",
            Self::Orphaning => "orphaning",
            Self::RefusingTerminate => "refusing-terminate",
            Self::DoubleReporting => "double-reporting",
            Self::LateReporting => "late-reporting",
            Self::Silent => "silent",
            Self::Crashing => "crashing",
            Self::Restarting => "restarting",
            Self::Returning => "returning",
            Self::Flapping => "flapping",
            Self::Slow => "slow",
            Self::ClockSkewed => "clock-skewed",
        }
    }

    pub(crate) const fn stage(self) -> Stage {
        match self {
            Self::Normal
            | Self::Hung
            | Self::Stalling
            | Self::Orphaning
            | Self::RefusingTerminate
            | Self::DoubleReporting
            | Self::LateReporting => Stage::Execution,
            Self::Silent
            | Self::Crashing
            | Self::Restarting
            | Self::Returning
            | Self::Flapping
            | Self::Slow
            | Self::ClockSkewed => Stage::Agent,
        }
    }

    /// The recovery that it must lead to; `None`: there must be none.
    pub(crate) const fn expected(self) -> Option<RecoveryReason> {
        match self {
            Self::Hung | Self::RefusingTerminate | Self::LateReporting => Some(RecoveryReason::TimedOut),
            Self::Stalling => Some(RecoveryReason::Stalled),
            Self::Orphaning => Some(RecoveryReason::Orphaned),
            Self::Silent | Self::Crashing => Some(RecoveryReason::AgentLost),
            Self::Restarting => Some(RecoveryReason::AgentRestarted),
            Self::Returning => Some(RecoveryReason::AgentGone),
            Self::Normal | Self::DoubleReporting | Self::Flapping | Self::Slow | Self::ClockSkewed => None,
        }
    }

    /// Whether its recovery counts towards the quarantine of its agent (PROTOCOL.md 5: losses other than timeouts).
    pub(crate) const fn is_held_against_agent(self) -> bool {
        matches!(self, Self::Stalling | Self::Orphaning | Self::Silent | Self::Crashing | Self::Restarting)
    }

    /// Share of the submissions, when nothing else is said. What is left is normal.
    pub(crate) const fn default_share(self) -> f64 {
        match self {
            Self::Normal => 0.0,
            Self::Hung | Self::Orphaning | Self::LateReporting | Self::Restarting => 0.02,
            Self::Stalling
            | Self::RefusingTerminate
            | Self::Silent
            | Self::Crashing
            | Self::Returning
            | Self::Flapping => 0.01,
            Self::DoubleReporting => 0.03,
            Self::Slow | Self::ClockSkewed => 0.05,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// `--rate KIND=SHARE`
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    pub(crate) kind: Kind,
    pub(crate) share: f64,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, share) = text.split_once('=').ok_or("a rate is KIND=SHARE")?;
        let kind = Kind::ALL.into_iter().skip(1).find(|kind| kind.as_str() == name).ok_or_else(|| {
            let names: Vec<_> = Kind::ALL.iter().skip(1).map(|kind| kind.as_str()).collect();
            format!("no such fault {name:?}: {}", names.join(", "))
        })?;
        let share =
            share.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or("a share is 0 to 1")?;
        Ok(Self { kind, share })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_by_name() {
        assert_eq!("hung=0.5".parse(), Ok(Rate { kind: Kind::Hung, share: 0.5 }));
        for bad in ["hung", "hung=2", "hung=-1", "hung=x", "normal=1", "bored=0.1"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn by_default_most_work_is_normal() {
        let faulty: f64 = Kind::ALL.iter().map(|kind| kind.default_share()).sum();
        assert!(faulty < 0.5, "{faulty}");
    }
}
