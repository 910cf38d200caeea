//! Two brakes on recoveries for silence: the mass-failure breaker and the rate limit. Pure.

use std::collections::{BTreeSet, HashMap};

use rollcall_core::{AgentId, Timestamp, agent::Status};

/// Settings of the breaker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BreakerLimits {
    /// Share of the agents, above 0 and up to 1.
    pub fraction: f64,
    /// Fewer than this never trip it.
    pub min_agents: usize,
    /// Time in which they fell silent, in milliseconds.
    pub window_ms: u64,
}

/// How many agents are silent, of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Fell silent inside the window and still are.
    pub silent: usize,
    /// Those, and all that are not silent now: the ones that were connected when the window began (an agent that
    /// registered inside the window counts as well, or a young fleet would have no breaker).
    pub of: usize,
}

/// Which agents are silent since when, fed from the log.
#[derive(Debug, Default)]
pub struct Breaker {
    since: HashMap<AgentId, Timestamp>,
    order: BTreeSet<(Timestamp, AgentId)>,
    connected: HashMap<AgentId, ()>,
}

impl Breaker {
    /// An agent's status by the log. `silent_since` with a silent status.
    pub fn agent(&mut self, id: &AgentId, status: Option<Status>, silent_since: Option<Timestamp>) {
        if let Some(old) = self.since.remove(id) {
            self.order.remove(&(old, id.clone()));
        }
        self.connected.remove(id);
        match (status, silent_since) {
            // Gone is a decision of the agent or of time, not a failure. Never heard of is nothing.
            (None | Some(Status::Gone), _) => {}
            (Some(status), Some(since)) if status.is_silent() => {
                self.since.insert(id.clone(), since);
                self.order.insert((since, id.clone()));
            }
            (Some(_), _) => {
                self.connected.insert(id.clone(), ());
            }
        }
    }

    /// The count now.
    #[must_use]
    pub fn count(&self, limits: &BreakerLimits, now: Timestamp) -> Count {
        let window = i64::try_from(limits.window_ms).unwrap_or(i64::MAX);
        let start = Timestamp::from_millis(now.as_millis().saturating_sub(window));
        // From the newest back: agents that are silent for longer cost nothing.
        let silent = self.order.iter().rev().take_while(|(since, _)| *since >= start).count();
        Count { silent, of: silent + self.connected.len() }
    }

    /// Whether so many at once are a failure of something else.
    #[must_use]
    pub fn is_tripped(count: Count, limits: &BreakerLimits) -> bool {
        // Counts of agents are far below 2^52.
        #[allow(clippy::cast_precision_loss)]
        let share = count.silent as f64 / count.of.max(1) as f64;
        count.silent >= limits.min_agents.max(1) && share >= limits.fraction
    }

    /// When the present fall leaves the window: the earliest instant at which the breaker may close by itself.
    #[must_use]
    pub fn next_change(&self, limits: &BreakerLimits, now: Timestamp) -> Option<Timestamp> {
        let leaves = |since: &Timestamp| since.plus_ms(limits.window_ms.saturating_add(1));
        self.order.iter().map(|(since, _)| leaves(since)).find(|at| *at > now)
    }
}

/// Places in line for agent-lost recoveries: so many a second, with a burst of one second's worth.
#[derive(Debug)]
pub struct RateLimit {
    interval_us: i64,
    burst_us: i64,
    /// When a line without burst would be free again, in microseconds since 1970.
    free_at_us: i64,
}

impl RateLimit {
    /// `per_second` at least 1.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        let rate = i64::from(per_second.max(1));
        Self { interval_us: (1_000_000 / rate).max(1), burst_us: 1_000_000, free_at_us: i64::MIN }
    }

    /// Takes the next place; returns when it is its turn (now, or later).
    pub fn reserve(&mut self, now: Timestamp) -> Timestamp {
        let now_us = now.as_millis().saturating_mul(1000);
        let free_at = self.free_at_us.max(now_us);
        self.free_at_us = free_at.saturating_add(self.interval_us);
        let turn_us = self.free_at_us.saturating_sub(self.burst_us);
        // Rounded up: never earlier than the line allows.
        now.max(Timestamp::from_millis(turn_us.saturating_add(999).div_euclid(1000)))
    }

    /// How long a newcomer would wait now, in milliseconds.
    #[must_use]
    pub fn backlog_ms(&self, now: Timestamp) -> u64 {
        let ahead = self.free_at_us.saturating_add(self.interval_us).saturating_sub(self.burst_us);
        u64::try_from(ahead.div_euclid(1000).saturating_sub(now.as_millis())).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: BreakerLimits = BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 60_000 };

    fn id(n: usize) -> AgentId {
        AgentId::new(&format!("a{n}")).unwrap()
    }

    fn t(ms: i64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn half_of_the_fleet_at_once_trips_it_and_time_or_their_return_closes_it() {
        let mut breaker = Breaker::default();
        for n in 0..6 {
            breaker.agent(&id(n), Some(Status::Connected), None);
        }
        let tripped = |b: &Breaker, now| Breaker::is_tripped(b.count(&LIMITS, now), &LIMITS);
        for n in 0..2 {
            breaker.agent(&id(n), Some(Status::Disconnected), Some(t(1_000)));
            assert!(!tripped(&breaker, t(1_000)));
        }
        breaker.agent(&id(2), Some(Status::Error), Some(t(2_000)));
        assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 3, of: 6 });
        assert!(tripped(&breaker, t(2_000)));
        assert_eq!(breaker.next_change(&LIMITS, t(2_000)), Some(t(61_001)));
        assert!(tripped(&breaker, t(61_000)));
        assert!(!tripped(&breaker, t(61_001)), "the window moved on");
        breaker.agent(&id(0), Some(Status::Connected), None);
        assert!(!tripped(&breaker, t(3_000)), "one came back");
    }

    #[test]
    fn small_fleets_and_farewells_never_trip_it() {
        let mut breaker = Breaker::default();
        for n in 0..2 {
            breaker.agent(&id(n), Some(Status::Disconnected), Some(t(5)));
        }
        assert!(!Breaker::is_tripped(breaker.count(&LIMITS, t(6)), &LIMITS), "two of two, three are needed");
        for n in 0..9 {
            breaker.agent(&id(n), Some(Status::Gone), None);
        }
        assert_eq!(breaker.count(&LIMITS, t(6)), Count::default());
    }

    proptest! {
        #[test]
        fn no_second_sees_more_than_rate_and_burst(rate in 1u32..50, steps in prop::collection::vec(0i64..200, 1..300)) {
            let mut limit = RateLimit::new(rate);
            let mut now = 1_000_000;
            let mut turns = Vec::new();
            for step in steps {
                now += step;
                let turn = limit.reserve(t(now));
                prop_assert!(turn >= t(now));
                turns.push(turn.as_millis());
            }
            turns.sort_unstable();
            for (n, start) in turns.iter().enumerate() {
                let inside = turns[n..].iter().take_while(|turn| **turn < start + 1000).count();
                prop_assert!(inside <= 2 * rate as usize + 1, "{inside} in one second at {rate}/s");
            }
        }
    }
}
