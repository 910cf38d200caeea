//! Instants as milliseconds since 1970 UTC, and the clock that services read them from.

use std::{
    fmt,
    sync::Mutex,
    time::{Duration, Instant},
};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An instant: milliseconds since 1970-01-01T00:00:00Z. On the wire RFC 3339 UTC with milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The instant `millis` milliseconds after 1970.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// This instant moved by `millis` into the future, at most to the end of time.
    #[must_use]
    pub const fn plus_ms(self, millis: u64) -> Self {
        let millis = if millis > i64::MAX as u64 { i64::MAX } else { millis as i64 };
        Self(self.0.saturating_add(millis))
    }

    /// Milliseconds from `earlier` to this instant; 0 where the clocks disagree about the order.
    #[must_use]
    pub const fn since_ms(self, earlier: Self) -> u64 {
        let millis = self.0.saturating_sub(earlier.0);
        if millis < 0 { 0 } else { millis as u64 }
    }

    /// Reads RFC 3339 text.
    pub fn parse(text: &str) -> Result<Self, chrono::ParseError> {
        DateTime::parse_from_rfc3339(text).map(|t| Self(t.timestamp_millis()))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DateTime::<Utc>::from_timestamp_millis(self.0) {
            Some(time) => f.write_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true)),
            // Outside the years that RFC 3339 can write.
            None => write!(f, "{}ms", self.0),
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Where a service reads the time from. Decision cores never read it: they are told `now`.
pub trait Clock: Send + Sync {
    /// The present instant.
    fn now(&self) -> Timestamp;
}

/// Clocks that differ by less than this are taken to agree.
pub const CLOCK_DOUBT_MS: u64 = 500;

/// The machine's clock, moving with the monotonic one: a step of the wall clock (NTP, an operator, a
/// suspended machine) does not move it until [`SystemClock::shift`] does.
pub struct SystemClock {
    anchor: Mutex<(Timestamp, Instant)>,
    wall: Box<dyn Fn() -> Timestamp + Send + Sync>,
}

impl SystemClock {
    /// A clock anchored at the present wall time.
    #[must_use]
    pub fn new() -> Self {
        Self::with_wall(|| Timestamp(Utc::now().timestamp_millis()))
    }

    /// A clock anchored at the present time of another wall clock than the machine's, for tests that set it.
    #[must_use]
    pub fn with_wall(wall: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { anchor: Mutex::new((wall(), Instant::now())), wall: Box::new(wall) }
    }

    fn anchor(&self) -> std::sync::MutexGuard<'_, (Timestamp, Instant)> {
        // The anchor is two plain values: a panic while it was held can't have left it half written.
        self.anchor.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How far the wall clock has run away from this clock, in milliseconds (positive: wall is ahead).
    #[must_use]
    pub fn drift_ms(&self) -> i64 {
        (self.wall)().0 - self.now().0
    }

    /// Moves this clock, in milliseconds. Callers treat what they measured across it as void.
    pub fn shift(&self, by_ms: i64) {
        let mut anchor = self.anchor();
        anchor.0 = Timestamp(anchor.0.0.saturating_add(by_ms));
    }
}

impl fmt::Debug for SystemClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SystemClock").field(&self.now()).finish()
    }
}

/// What three clocks said at one moment: ours, the machine's wall clock, and the one of the log's server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Ours, when the server was asked.
    pub asked_at: Timestamp,
    /// Ours, when its answer was there.
    pub answered_at: Timestamp,
    /// How far the wall clock was ahead of ours then.
    pub wall_ahead_ms: i64,
    /// What the server said, at some moment in between.
    pub server: Timestamp,
}

impl Reading {
    /// By how much our clock is to be moved, in milliseconds. `None`: it is right as far as anybody can say.
    ///
    /// The server's time is the fleet's: every service goes by it, so that they agree on deadlines whatever their hosts
    /// say. Only while the wall clock still agrees with ours, which went on evenly since the last reading, it is two
    /// against one, and the server's clock was set. At the `first` reading ours has only just been set by the wall
    /// clock and proves nothing beside it.
    #[must_use]
    pub fn correction_ms(&self, first: bool) -> Option<i64> {
        let (asked, answered, server) = (self.asked_at.0, self.answered_at.0, self.server.0);
        // The answer's way counts for nobody.
        let off_ms = server.saturating_sub(server.clamp(asked, answered.max(asked)));
        if off_ms.unsigned_abs() < CLOCK_DOUBT_MS
            || (!first && self.wall_ahead_ms.unsigned_abs() < CLOCK_DOUBT_MS)
        {
            return None;
        }
        Some(off_ms)
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let (at, instant) = *self.anchor();
        at.plus_ms(u64::try_from(instant.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// A clock that stands still until it is moved: for tests and simulations.
#[derive(Debug, Default)]
pub struct ManualClock(std::sync::atomic::AtomicI64);

impl ManualClock {
    /// A clock standing at `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self(std::sync::atomic::AtomicI64::new(now.0))
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        let millis = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.0.fetch_add(millis, std::sync::atomic::Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.load(std::sync::atomic::Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_with_milliseconds_and_read_back() {
        let time = Timestamp::from_millis(1_795_000_000_007);
        assert_eq!(time.to_string(), "2026-11-18T11:06:40.007Z");
        assert_eq!(Timestamp::parse(&time.to_string()).unwrap(), time);
        assert_eq!(Timestamp::parse("2026-11-18T12:06:40.007+01:00").unwrap(), time);
    }

    #[test]
    fn two_clocks_of_three_are_right_and_at_the_start_the_servers() {
        const HOUR: i64 = 3_600_000;
        let reading = |wall_ahead_ms, server| Reading {
            asked_at: Timestamp::from_millis(10_000),
            answered_at: Timestamp::from_millis(13_000),
            wall_ahead_ms,
            server: Timestamp::from_millis(server),
        };
        for (what, wall_ahead_ms, server, running, first) in [
            ("all agree", 0, 11_000, None, None),
            ("an answer that took its time", 0, 13_400, None, None),
            ("the wall clock was set", HOUR, 11_000, None, None),
            ("the machine slept", HOUR, 13_000 + HOUR, Some(HOUR), Some(HOUR)),
            ("the server was set, or we began wrong", 0, 10_000 - HOUR, None, Some(-HOUR)),
            ("nobody agrees", HOUR, 10_000 - HOUR, Some(-HOUR), Some(-HOUR)),
        ] {
            let reading = reading(wall_ahead_ms, server);
            assert_eq!(reading.correction_ms(false), running, "{what}");
            assert_eq!(reading.correction_ms(true), first, "{what}");
        }
    }

    #[test]
    fn a_clock_goes_on_evenly_when_the_wall_is_set_and_is_moved_by_whoever_knows() {
        let wall = std::sync::Arc::new(std::sync::atomic::AtomicI64::new(1_000));
        let hands = std::sync::Arc::clone(&wall);
        let clock = SystemClock::with_wall(move || {
            Timestamp::from_millis(hands.load(std::sync::atomic::Ordering::SeqCst))
        });
        wall.store(3_601_000, std::sync::atomic::Ordering::SeqCst);
        assert!(clock.now().as_millis() < 3_600_000, "{:?}", clock.now());
        assert!(clock.drift_ms() > 0);
        clock.shift(3_600_000);
        assert!(clock.now().as_millis() >= 3_601_000, "{:?}", clock.now());
    }

    #[test]
    fn durations_are_never_negative() {
        let early = Timestamp::from_millis(5);
        let late = Timestamp::from_millis(9);
        assert_eq!(late.since_ms(early), 4);
        assert_eq!(early.since_ms(late), 0);
        assert_eq!(late.plus_ms(u64::MAX).as_millis(), i64::MAX);
    }
}
