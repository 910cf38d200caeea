//! The settings this service uses, in the units it works in.

use std::time::Duration;

use rollcall_service::Settings;

use crate::{breaker::BreakerLimits, facts::Limits, state::Config};

/// A duration in whole milliseconds.
#[must_use]
pub fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<&Settings> for Config {
    fn from(settings: &Settings) -> Self {
        Self {
            limits: Limits {
                dispatch_grace_ms: ms(settings.dispatch_grace),
                lost_after_ms: ms(settings.lost_after),
                stale_after_ms: ms(settings.stale_after),
                terminate_grace_ms: ms(settings.terminate_grace),
                failure_threshold: settings.failure_threshold,
                interval_ms: ms(settings.heartbeat_interval),
            },
            breaker: BreakerLimits {
                fraction: settings.breaker_fraction,
                min_agents: settings.breaker_min_agents,
                window_ms: ms(settings.breaker_window),
            },
            recovery_rate: settings.recovery_rate,
        }
    }
}
