//! The settings that the health-prober uses, in the units it counts in.

use std::path::PathBuf;
use std::time::Duration;

use rollcall_service::{Cidr, Settings};

/// See PROTOCOL.md 8 for the variables.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the detector decides by.
    pub policy: Policy,
    /// Time between two probes of an endpoint that answers.
    pub probe_interval: Duration,
    /// Time one probe may take.
    pub probe_timeout: Duration,
    /// Private ranges that agent-supplied URLs may point to.
    pub allow_cidrs: Vec<Cidr>,
    /// Agents that never beat.
    pub agents_file: Option<PathBuf>,
}

/// What the detector decides by. Times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Interval of an agent that names none.
    pub interval_ms: u64,
    /// Failures in a row that make `error`.
    pub failure_threshold: u32,
    /// Successes in a row after something bad.
    pub success_threshold: u32,
    /// Silent for this long: gone.
    pub forget_after_ms: u64,
    /// An instance whose work stands still for this long is told goodbye; `None`: never.
    pub activity_timeout_ms: Option<u64>,
}

impl Policy {
    /// Successes in a row that end something bad, for an agent that takes so many times the ordinary ones.
    #[must_use]
    pub fn successes(&self, damping: u32) -> u32 {
        self.success_threshold.saturating_mul(damping)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<&Settings> for Config {
    fn from(settings: &Settings) -> Self {
        Self {
            policy: Policy {
                interval_ms: millis(settings.heartbeat_interval),
                failure_threshold: settings.failure_threshold,
                success_threshold: settings.success_threshold,
                forget_after_ms: millis(settings.forget_after),
                activity_timeout_ms: settings.activity_timeout.map(millis),
            },
            probe_interval: settings.probe_interval,
            probe_timeout: settings.probe_timeout,
            allow_cidrs: settings.allow_cidrs.clone(),
            agents_file: settings.agents_file.clone(),
        }
    }
}
