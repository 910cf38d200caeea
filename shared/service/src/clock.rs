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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::StreamExt as _;
    use rollcall_core::{Clock as _, Timestamp, time::CLOCK_DOUBT_MS};
    use rollcall_nats::{Bus, Subscriber, ensure_streams, testing::NatsServer};
    use tokio::{
        sync::watch,
        time::{Instant, timeout},
    };

    use super::*;
    use crate::{Program, Settings, lag::LoopHealth};

    const HOUR_MS: i64 = 3_600_000;
    /// How long anything may take here; far above what it needs.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// Stalls in a row. Between as many ticks lies more than twice the time that the test allows.
    const STALLS: u32 = 5;

    fn context(server: &NatsServer) -> Context {
        let environment = [("ROLLCALL_NATS_URL".into(), server.url().into())];
        let settings = Settings::load_from("probe", environment).unwrap().settings;
        Context::for_tests(Program { name: "probe", about: "", version: "0", conditions: &[] }, settings)
    }

    /// What the log's server is asked.
    async fn questions(bus: &Bus) -> Subscriber {
        let asked = bus.subscribe("$JS.API.STREAM.INFO.>".to_owned()).await.unwrap();
        bus.flush().await.unwrap();
        asked
    }

    async fn is_asked(questions: &mut Subscriber) {
        timeout(PATIENCE, questions.next()).await.expect("the server is asked").unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_clock_is_looked_at_as_soon_as_a_stall_is_over_and_not_at_the_next_tick() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        ensure_streams(&bus).await.unwrap();
        let mut questions = questions(&bus).await;
        let mut context = context(&server);
        let (stall, health) = watch::channel(LoopHealth::default());
        context.loop_health = health;
        let (clock, shutdown) = (Arc::clone(&context.clock), context.shutdown.clone());
        let log = EventLog::new(&bus);
        let keeping = tokio::spawn(async move { context.keep_clock(log).await });
        is_asked(&mut questions).await;
        let begun = Instant::now();
        for _ in 0..STALLS {
            clock.shift(-HOUR_MS);
            stall.send_modify(|health| health.stalls += 1);
            is_asked(&mut questions).await;
        }
        assert!(begun.elapsed() < CLOCK_INTERVAL * (STALLS - 1) / 2, "{:?}", begun.elapsed());
        shutdown.cancel();
        timeout(PATIENCE, keeping).await.expect("it ends with the shutdown").unwrap();
        assert!(clock.drift_ms().unsigned_abs() < CLOCK_DOUBT_MS, "{}", clock.drift_ms());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_begins_before_the_logs_time_is_known_but_the_shutdown() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        let mut questions = questions(&bus).await;
        let mut context = context(&server);
        let wall = || SystemClock::new().now();
        let wrong = move || Timestamp::from_millis(wall().as_millis() + HOUR_MS);
        context.clock = Arc::new(SystemClock::with_wall(wrong));
        // There is no log yet.
        let log = EventLog::new(&bus);
        let setting = context.set_clock(&log);
        let comes = async {
            for _ in 0..2 {
                is_asked(&mut questions).await;
            }
            ensure_streams(&bus).await.unwrap();
        };
        timeout(PATIENCE, async { tokio::join!(setting, comes) }).await.expect("it is asked again");
        let off_ms = context.clock.now().as_millis() - wall().as_millis();
        assert!(off_ms.unsigned_abs() < CLOCK_DOUBT_MS, "{off_ms}");
        // And none to come, which nobody waits for who is to end.
        bus.request("$JS.API.STREAM.DELETE.ROLLCALL_EVENTS", "".into(), PATIENCE).await.unwrap();
        context.shutdown.cancel();
        timeout(PATIENCE, context.set_clock(&log)).await.expect("it ends with the shutdown");
    }
}
