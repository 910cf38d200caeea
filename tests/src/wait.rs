//! Waiting for a condition, with a deadline.

use std::{
    fmt::Debug,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A look that is later than this was not let run.
const LATE: Duration = Duration::from_millis(100);

/// How long this process did not get to run: what a busy machine takes away from a measurement is no fault of what is
/// measured.
pub struct Standstill {
    lost_ms: Arc<AtomicU64>,
    _stop: DropGuard,
}

impl Standstill {
    /// Watches from now on.
    #[must_use]
    pub fn watch() -> Self {
        let stop = CancellationToken::new();
        let watch = Self { lost_ms: Arc::default(), _stop: stop.clone().drop_guard() };
        let lost = Arc::clone(&watch.lost_ms);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(LOOK_EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut last = Instant::now();
            while !stop.is_cancelled() {
                ticks.tick().await;
                let gap = last.elapsed();
                last = Instant::now();
                if gap > LATE {
                    lost.fetch_add(u64::try_from(gap.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
                }
            }
        });
        watch
    }

    /// How much was lost so far.
    #[must_use]
    pub fn lost(&self) -> Duration {
        Duration::from_millis(self.lost_ms.load(Ordering::Relaxed))
    }
}

/// Looks until `look` finds something, and returns it.
///
/// # Panics
/// After `within`, naming what was waited for and what was last seen.
pub async fn until<T, S, F, Fut>(what: &str, within: Duration, mut look: F) -> T
where
    S: Debug,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, S>>,
{
    let begun = Instant::now();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        ticks.tick().await;
        match look().await {
            Ok(found) => return found,
            Err(seen) => {
                assert!(begun.elapsed() < within, "waited {within:?} for {what}; last seen: {seen:?}");
            }
        }
    }
}

/// Looks for `how_long` whether something stays as it is.
///
/// # Panics
/// At the first look that says otherwise, naming what should have lasted and what was seen.
pub async fn lasts<S, F, Fut>(what: &str, how_long: Duration, mut look: F)
where
    S: Debug,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), S>>,
{
    let begun = Instant::now();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    while begun.elapsed() < how_long {
        ticks.tick().await;
        if let Err(seen) = look().await {
            panic!("{what} for {how_long:?}, but after {:?}: {seen:?}", begun.elapsed());
        }
    }
}
