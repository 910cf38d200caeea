//! Was this process itself awake? Stalls of the event loop and jumps of the wall clock, which make evidence void.

use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// How often the loop is looked at.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);
/// A sample that comes this much later than it should is a stall.
pub const STALL_THRESHOLD: Duration = Duration::from_millis(200);
/// A wall clock that moved this much more or less than the monotonic one has jumped.
pub const JUMP_THRESHOLD: Duration = Duration::from_millis(500);

/// A time in which nothing ran here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// When it was over.
    pub at: Instant,
    /// How long it lasted.
    pub lasted: Duration,
}

/// A jump of the wall clock (set, or the machine slept).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jump {
    /// When it was noticed.
    pub at: Instant,
    /// By how much, in milliseconds; negative: backwards.
    pub by_ms: i64,
}

/// What has been seen so far. A change of `stalls` or `jumps` says that evidence from before is void.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoopHealth {
    /// Number of stalls so far.
    pub stalls: u64,
    /// The last one.
    pub last_stall: Option<Stall>,
    /// The longest one.
    pub worst_stall: Duration,
    /// Number of jumps so far.
    pub jumps: u64,
    /// The last one.
    pub last_jump: Option<Jump>,
}

/// Watches until `stop`; subscribers are woken only by stalls and jumps.
pub fn watch_loop(stop: CancellationToken) -> watch::Receiver<LoopHealth> {
    let (sender, receiver) = watch::channel(LoopHealth::default());
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(SAMPLE_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sampler = Sampler::new(Instant::now(), SystemTime::now());
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            if let Some(seen) = sampler.sample(Instant::now(), SystemTime::now()) {
                report(&seen);
                sender.send_modify(|health| health.apply(seen));
            }
        }
    });
    receiver
}

fn report(seen: &Seen) {
    if let Some(stall) = seen.stall {
        metrics::counter!("rollcall_loop_stalls_total").increment(1);
        tracing::warn!(stalled_ms = stall.lasted.as_millis() as u64, "the event loop stalled");
    }
    if let Some(jump) = seen.jump {
        metrics::counter!("rollcall_clock_jumps_total").increment(1);
        tracing::warn!(by_ms = jump.by_ms, "the wall clock jumped");
    }
}

impl LoopHealth {
    fn apply(&mut self, seen: Seen) {
        if let Some(stall) = seen.stall {
            self.stalls += 1;
            self.last_stall = Some(stall);
            self.worst_stall = self.worst_stall.max(stall.lasted);
        }
        if let Some(jump) = seen.jump {
            self.jumps += 1;
            self.last_jump = Some(jump);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    stall: Option<Stall>,
    jump: Option<Jump>,
}

struct Sampler {
    instant: Instant,
    wall: SystemTime,
}

impl Sampler {
    fn new(instant: Instant, wall: SystemTime) -> Self {
        Self { instant, wall }
    }

    fn sample(&mut self, instant: Instant, wall: SystemTime) -> Option<Seen> {
        let passed = instant.saturating_duration_since(self.instant);
        let late = passed.saturating_sub(SAMPLE_INTERVAL);
        let stall = (late >= STALL_THRESHOLD).then_some(Stall { at: instant, lasted: late });
        let by_ms = signed_ms(wall, self.wall) - i64::try_from(passed.as_millis()).unwrap_or(i64::MAX);
        let jumped = u128::from(by_ms.unsigned_abs()) >= JUMP_THRESHOLD.as_millis();
        let jump = jumped.then_some(Jump { at: instant, by_ms });
        (self.instant, self.wall) = (instant, wall);
        (stall.is_some() || jump.is_some()).then_some(Seen { stall, jump })
    }
}

fn signed_ms(now: SystemTime, before: SystemTime) -> i64 {
    let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    match now.duration_since(before) {
        Ok(forward) => millis(forward),
        Err(back) => -millis(back.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_in_both_directions_and_stalls_are_told_apart() {
        let (at, wall) = (Instant::now(), SystemTime::now());
        let ms = Duration::from_millis;
        let mut sampler = Sampler::new(at, wall);
        assert_eq!(sampler.sample(at + ms(60), wall + ms(60)), None);
        // Both clocks late together: a stall.
        let seen = sampler.sample(at + ms(1110), wall + ms(1110)).unwrap();
        assert_eq!((seen.stall.unwrap().lasted, seen.jump), (ms(1000), None));
        // Only the wall clock: a jump.
        let seen = sampler.sample(at + ms(1160), wall + ms(1160) - ms(3000)).unwrap();
        assert_eq!((seen.stall, seen.jump.unwrap().by_ms), (None, -3000));
        let seen = sampler.sample(at + ms(1210), wall + ms(1210) + ms(2000)).unwrap();
        assert_eq!(seen.jump.unwrap().by_ms, 5000);
        // The new time is the base for what follows.
        assert_eq!(sampler.sample(at + ms(1260), wall + ms(1260) + ms(2000)), None);
    }

    #[tokio::test]
    async fn a_blocked_loop_is_noticed() {
        let stop = CancellationToken::new();
        let mut health = watch_loop(stop.clone());
        tokio::time::sleep(SAMPLE_INTERVAL * 2).await;
        // Blocking the only thread is the stall under test.
        std::thread::sleep(STALL_THRESHOLD + SAMPLE_INTERVAL * 4);
        let seen =
            tokio::time::timeout(Duration::from_secs(10), health.wait_for(|health| health.stalls > 0)).await;
        assert!(seen.unwrap().unwrap().worst_stall >= STALL_THRESHOLD);
        stop.cancel();
    }
}
