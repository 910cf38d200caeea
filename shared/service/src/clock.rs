//! A service's clock on the time of the log's server: at the start, after everything that may have disturbed it, and
//! now and then.

use std::time::Duration;

use rollcall_core::time::SystemClock;
use rollcall_nats::{EventLog, Head};

use crate::Context;

/// Time between two comparisons with the server.
pub const CLOCK_INTERVAL: Duration = Duration::from_secs(5);
/// Pause before the server is asked again that did not answer.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// By how much the clock is to be moved after this, in milliseconds; says so. `first`: see
/// [`rollcall_core::time::Reading::correction_ms`].
pub fn correction_ms(head: &Head, first: bool) -> Option<i64> {
    let by_ms = head.reading?.correction_ms(first)?;
    metrics::counter!("rollcall_clock_corrections_total").increment(1);
    tracing::warn!(by_ms, "our clock is not the log's: its server's time is adopted");
    Some(by_ms)
}

impl Context {
    /// Sets the clock by the log's server, before anything is decided on it. Waits for an answer or the shutdown.
    pub async fn set_clock(&self, log: &EventLog) {
        while !self.shutdown.is_cancelled() {
            match log.head(&self.clock).await {
                Ok(head) => {
                    correct(&self.clock, &head, true);
                    return;
                }
                Err(error) => tracing::warn!(%error, "the log's time can't be asked for, trying again"),
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    /// Keeps the clock on the time of the log's server until the shutdown.
    pub async fn keep_clock(&self, log: EventLog) {
        let mut health = self.loop_health();
        let mut tick = tokio::time::interval(CLOCK_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = tick.tick() => {}
                // A stall or a jump: the machine may have slept.
                Ok(()) = health.changed() => {}
            }
            // One that does not answer is asked again with the next tick.
            if let Ok(head) = log.head(&self.clock).await {
                correct(&self.clock, &head, false);
            }
        }
    }
}

fn correct(clock: &SystemClock, head: &Head, first: bool) {
    if let Some(by_ms) = correction_ms(head, first) {
        clock.shift(by_ms);
    }
}
