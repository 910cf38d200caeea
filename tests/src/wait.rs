//! Waiting for a condition, with a deadline.

use std::{
    fmt::Debug,
    future::Future,
    time::{Duration, Instant},
};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
