//! Whether this process is ready, and whether its loops still turn.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Named conditions that must all hold before the service is ready. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Readiness {
    conditions: watch::Sender<BTreeMap<&'static str, bool>>,
}

impl Readiness {
    /// All of `conditions` missing. With none it is ready at once.
    pub fn new(conditions: &[&'static str]) -> Self {
        let map = conditions.iter().map(|name| (*name, false)).collect();
        Self { conditions: watch::Sender::new(map) }
    }

    /// Says whether a condition holds. A name not heard before is added.
    pub fn set(&self, name: &'static str, holds: bool) {
        let changed = self.conditions.send_if_modified(|map| map.insert(name, holds) != Some(holds));
        if changed {
            tracing::info!(condition = name, holds, ready = self.is_ready(), "readiness changed");
        }
    }

    /// Every condition holds.
    pub fn is_ready(&self) -> bool {
        self.conditions.borrow().values().all(|holds| *holds)
    }

    /// The conditions that do not hold, in alphabetical order.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.conditions.borrow().iter().filter(|(_, holds)| !**holds).map(|(name, _)| *name).collect()
    }

    /// Waits until every condition holds.
    pub async fn ready(&self) {
        let mut conditions = self.conditions.subscribe();
        // The sender lives as long as `self`.
        let _ = conditions.wait_for(|map| map.values().all(|holds| *holds)).await;
    }
}

/// The loops of this process that must keep turning. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Loops {
    started: Instant,
    beats: Arc<Mutex<Vec<LoopBeat>>>,
}

/// One loop's sign of life.
#[derive(Debug, Clone)]
pub struct LoopBeat {
    name: &'static str,
    limit: Duration,
    started: Instant,
    /// Milliseconds from `started` to the last beat.
    beaten_ms: Arc<AtomicU64>,
}

impl LoopBeat {
    /// The loop has come round again.
    pub fn beat(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.beaten_ms.store(millis, Ordering::Relaxed);
    }

    fn is_wedged_at(&self, now: Instant) -> bool {
        let beaten = self.started + Duration::from_millis(self.beaten_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(beaten) > self.limit
    }
}

impl Default for Loops {
    fn default() -> Self {
        Self { started: Instant::now(), beats: Arc::default() }
    }
}

impl Loops {
    /// Registers a loop that must [`LoopBeat::beat`] at least once per `limit`, from now on.
    pub fn register(&self, name: &'static str, limit: Duration) -> LoopBeat {
        let beat = LoopBeat { name, limit, started: self.started, beaten_ms: Arc::default() };
        beat.beat();
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).push(beat.clone());
        beat
    }

    /// Names of the loops that have been silent for longer than they may.
    pub fn wedged(&self) -> Vec<&'static str> {
        self.wedged_at(Instant::now())
    }

    fn wedged_at(&self, now: Instant) -> Vec<&'static str> {
        let beats = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
        beats.iter().filter(|beat| beat.is_wedged_at(now)).map(|beat| beat.name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_every_condition_holds() {
        let readiness = Readiness::new(&["replay", "nats"]);
        assert_eq!(readiness.waiting_for(), ["nats", "replay"]);
        readiness.set("nats", true);
        assert!(!readiness.is_ready());
        readiness.set("replay", true);
        readiness.ready().await;
        readiness.set("nats", false);
        assert_eq!(readiness.waiting_for(), ["nats"]);
    }

    #[test]
    fn a_loop_that_stops_is_named() {
        let loops = Loops::default();
        let beat = loops.register("shell", Duration::from_secs(5));
        loops.register("other", Duration::from_secs(60));
        let start = beat.started;
        assert!(loops.wedged_at(start + Duration::from_secs(4)).is_empty());
        assert_eq!(loops.wedged_at(start + Duration::from_secs(9)), ["shell"]);
        beat.beaten_ms.store(8000, Ordering::Relaxed);
        assert!(loops.wedged_at(start + Duration::from_secs(9)).is_empty());
        assert_eq!(loops.wedged_at(start + Duration::from_secs(70)), ["shell", "other"]);
        beat.beat();
        assert!(loops.wedged().is_empty());
    }
}
