//! The settings that the dispatcher uses, in the units it counts in.

use std::time::Duration;

use rollcall_service::{Cidr, settings::Settings};

/// See PROTOCOL.md 8 for the variables.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Places in one queue.
    pub queue_depth: u32,
    /// How long work may wait, unless it says otherwise, in milliseconds.
    pub queue_ttl_ms: u64,
    /// How long work may run when neither it nor its agent says, in milliseconds.
    pub default_timeout_ms: u64,
    /// Time between asking work to end and killing it, in milliseconds.
    pub terminate_grace_ms: u64,
    /// How long after a dispatch the watchdog does not call it lost.
    pub(crate) dispatch_grace: Duration,
    /// Private ranges that the control endpoints of agents may be in.
    pub(crate) allow_cidrs: Vec<Cidr>,
    /// Time between two audits.
    pub audit_interval: Duration,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<&Settings> for Config {
    fn from(settings: &Settings) -> Self {
        Self {
            queue_depth: u32::try_from(settings.queue_depth).unwrap_or(u32::MAX),
            queue_ttl_ms: millis(settings.queue_ttl),
            default_timeout_ms: millis(settings.default_timeout),
            terminate_grace_ms: millis(settings.terminate_grace),
            dispatch_grace: settings.dispatch_grace,
            allow_cidrs: settings.allow_cidrs.clone(),
            audit_interval: settings.audit_interval,
        }
    }
}
