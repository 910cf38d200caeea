//! Two brakes on recoveries for silence: the mass-failure breaker and the rate limit. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};

use rollcall_core::{
    AgentId, Timestamp,
    agent::{Agent, Status},
};

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
    /// The fleet as it is (those, and all that are not silent) or as it was when the window began (without those that came
    /// since, and with those that left since), whichever is larger: a fleet that is replaced is not twice as large, and
    /// one that is young is not empty.
    pub of: usize,
}

/// How an agent that is not there any more left the fleet.
#[derive(Debug)]
struct Left {
    /// When it was heard last: its goodbye, or the beginning of the silence that it was given up for.
    at: Timestamp,
    /// When the instance that left had come.
    came_at: Timestamp,
}

/// Which agents are silent since when, fed from the log. Agents that an operator drains and that hold nothing are in no
/// number: they may be switched off on purpose. Whose work goes on is not.
#[derive(Debug, Default)]
pub struct Breaker {
    since: HashMap<AgentId, Timestamp>,
    order: BTreeSet<(Timestamp, AgentId)>,
    connected: HashSet<AgentId>,
    /// When the instances that are there came.
    came: HashMap<AgentId, Timestamp>,
    came_order: BTreeSet<(Timestamp, AgentId)>,
    left: HashMap<AgentId, Left>,
    left_order: BTreeSet<(Timestamp, AgentId)>,
    /// When the first agent of this fleet was heard of.
    first_at: Option<Timestamp>,
    /// Somebody fell silent since recovery was resumed last.
    fell: bool,
}

impl Breaker {
    /// An agent as the log has it now, after an event of that time, and whether it `holds` executions.
    pub fn agent(&mut self, agent: &Agent, holds: bool, time: Timestamp) {
        let id = &agent.id;
        self.first_at.get_or_insert(time);
        let was_silent_since = self.since.remove(id);
        if let Some(old) = was_silent_since {
            self.order.remove(&(old, id.clone()));
        }
        let was_heard = self.connected.remove(id);
        if let Some(came_at) = self.came.remove(id) {
            self.came_order.remove(&(came_at, id.clone()));
        }
        let left = self.left.remove(id);
        if let Some(left) = &left {
            self.left_order.remove(&(left.at, id.clone()));
        }
        if agent.operator_drain.is_some() && !holds {
            return;
        }
        match (agent.status, agent.silent_since) {
            // Never heard of is nothing.
            (None, _) => {}
            // Gone is a decision of the agent or of time, not a failure.
            (Some(Status::Gone), _) => {
                let counted = was_heard || was_silent_since.is_some();
                let news = || Left {
                    at: was_silent_since.unwrap_or(time),
                    came_at: agent.registered_at.unwrap_or(time),
                };
                if let Some(left) = left.or_else(|| counted.then(news)) {
                    self.left_order.insert((left.at, id.clone()));
                    self.left.insert(id.clone(), left);
                }
            }
            (Some(status), Some(since)) if status.is_silent() => {
                self.is_there(agent, time);
                self.fell |= was_silent_since != Some(since);
                self.since.insert(id.clone(), since);
                self.order.insert((since, id.clone()));
            }
            (Some(_), _) => {
                self.is_there(agent, time);
                self.connected.insert(id.clone());
            }
        }
    }

    fn is_there(&mut self, agent: &Agent, time: Timestamp) {
        let came_at = agent.registered_at.unwrap_or(time);
        self.came.insert(agent.id.clone(), came_at);
        self.came_order.insert((came_at, agent.id.clone()));
    }

    /// Recovery was resumed: who is silent now does not suspend it again alone.
    pub const fn resumed(&mut self) {
        self.fell = false;
    }

    /// The count now.
    #[must_use]
    pub fn count(&self, limits: &BreakerLimits, now: Timestamp) -> Count {
        let window = i64::try_from(limits.window_ms).unwrap_or(i64::MAX);
        let start = Timestamp::from_millis(now.as_millis().saturating_sub(window));
        // From the newest back: agents that are silent or away for longer cost nothing.
        let silent = self.order.iter().rev().take_while(|(since, _)| *since >= start).count();
        // One that came and went inside the window was not there when it began, or a fleet of agents that live for
        // seconds would always be large. As long as the whole fleet is younger, all of them count.
        let is_young = self.first_at.is_none_or(|first| first > start);
        let left = self.left_order.iter().rev().take_while(|(at, _)| *at >= start);
        let there = |id: &AgentId| is_young || self.left.get(id).is_some_and(|left| left.came_at <= start);
        let left = left.filter(|(_, id)| there(id)).count();
        // Whoever fell silent before the window came before it as well.
        let new = self.came_order.iter().rev().take_while(|(at, _)| *at > start).count();
        let replaced = if is_young { left } else { left.saturating_sub(new) };
        Count { silent, of: silent + self.connected.len() + replaced }
    }

    /// Whether so many at once are a failure of something else.
    #[must_use]
    pub fn is_tripped(count: Count, limits: &BreakerLimits) -> bool {
        // Counts of agents are far below 2^52.
        #[allow(clippy::cast_precision_loss)]
        let share = count.silent as f64 / count.of.max(1) as f64;
        count.silent >= limits.min_agents.max(1) && share >= limits.fraction
    }

    /// Whether recovery is to be suspended now, or to stay so if it is.
    ///
    /// It takes somebody who fell silent since it was resumed last: of several watchdogs whose clocks differ a little
    /// one closes the breaker first, and the others don't open it again for the same silences. And it stays suspended
    /// while nobody at all is heard, however long ago they fell silent: nothing tells then that they are dead.
    #[must_use]
    pub fn holds(&self, suspended: bool, limits: &BreakerLimits, now: Timestamp) -> bool {
        let tripped = (suspended || self.fell) && Self::is_tripped(self.count(limits, now), limits);
        tripped || (suspended && self.nobody_is_heard())
    }

    /// Whether all agents that count are silent.
    #[must_use]
    pub fn nobody_is_heard(&self) -> bool {
        self.connected.is_empty() && !self.since.is_empty()
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
    use proptest::prelude::*;
    use rollcall_core::agent::Drain;

    use super::*;

    const LIMITS: BreakerLimits = BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 60_000 };

    fn t(ms: i64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    /// When the fleets of these tests began: long before any window.
    const LONG_AGO: i64 = -HOUR;
    const HOUR: i64 = 3_600_000;

    fn agent(n: usize, status: Status) -> Agent {
        let mut agent = Agent::unknown(AgentId::new(&format!("a{n}")).unwrap());
        agent.status = Some(status);
        agent.registered_at = Some(t(LONG_AGO));
        agent
    }

    fn silent(n: usize, since: i64) -> Agent {
        Agent { silent_since: Some(t(since)), ..agent(n, Status::Disconnected) }
    }

    fn drained(agent: Agent) -> Agent {
        let drain = Drain { reason: "night".to_owned(), since: t(0), deadline: None };
        Agent { operator_drain: Some(drain), ..agent }
    }

    /// So many agents that are heard, for long.
    fn fleet(agents: usize) -> Breaker {
        let mut breaker = Breaker::default();
        for n in 0..agents {
            breaker.agent(&agent(n, Status::Connected), false, t(LONG_AGO));
        }
        breaker
    }

    fn trips(breaker: &Breaker, now: i64) -> bool {
        breaker.holds(false, &LIMITS, t(now))
    }

    fn stays(breaker: &Breaker, now: i64) -> bool {
        breaker.holds(true, &LIMITS, t(now))
    }

    #[test]
    fn half_of_the_fleet_at_once_trips_it_and_time_or_their_return_closes_it() {
        let mut breaker = fleet(6);
        for n in 0..2 {
            breaker.agent(&silent(n, 1_000), false, t(1_000));
            assert!(!trips(&breaker, 1_000));
        }
        breaker.agent(&silent(2, 2_000), false, t(2_000));
        assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 3, of: 6 });
        assert!(trips(&breaker, 2_000));
        assert!(stays(&breaker, 61_000));
        assert!(!stays(&breaker, 61_001), "the window moved on");
        breaker.agent(&agent(0, Status::Connected), false, t(3_000));
        assert!(!stays(&breaker, 3_000), "one came back");
    }

    #[test]
    fn while_nobody_at_all_is_heard_it_stays_open_and_the_first_word_brings_the_rule_back() {
        let mut breaker = fleet(4);
        for n in 0..4 {
            breaker.agent(&silent(n, 1_000), false, t(1_000));
        }
        assert!(trips(&breaker, 1_000));
        for now in [61_001, 600_000, HOUR] {
            assert!(stays(&breaker, now), "{now}");
            assert!(!trips(&breaker, now), "what fell silent before the window opens nothing");
        }
        assert!(breaker.nobody_is_heard());
        // Another instance, or another agent.
        breaker.agent(&agent(9, Status::Connected), false, t(HOUR));
        assert!(!stays(&breaker, HOUR));
        breaker.agent(&silent(9, 2 * HOUR), false, t(2 * HOUR));
        assert!(stays(&breaker, 2 * HOUR));
        // Nobody is left to be heard: an operator gave them up.
        for n in [0, 1, 2, 3, 9] {
            breaker.agent(&agent(n, Status::Gone), false, t(3 * HOUR));
        }
        assert!(!stays(&breaker, 3 * HOUR));
    }

    #[test]
    fn who_left_inside_the_window_was_connected_at_its_start() {
        let mut breaker = fleet(7);
        for n in 0..4 {
            breaker.agent(&agent(n, Status::Gone), false, t(1_000));
        }
        for n in 4..7 {
            breaker.agent(&silent(n, 2_000), false, t(2_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 3, of: 7 });
        assert!(!trips(&breaker, 2_000));
        // Given up after its silence: it left when that began.
        breaker.agent(&agent(4, Status::Gone), false, t(50_000));
        assert_eq!(breaker.count(&LIMITS, t(50_000)), Count { silent: 2, of: 7 });
        assert_eq!(breaker.count(&LIMITS, t(61_001)), Count { silent: 2, of: 3 });
        assert_eq!(breaker.count(&LIMITS, t(62_001)), Count { silent: 0, of: 0 });
        breaker.agent(&agent(0, Status::Connected), false, t(50_000));
        assert_eq!(
            breaker.count(&LIMITS, t(50_000)),
            Count { silent: 2, of: 7 },
            "it is back, and one still"
        );
    }

    #[test]
    fn who_only_came_and_went_inside_the_window_was_not_unless_the_fleet_is_that_young() {
        for (first_at, of) in [(LONG_AGO, 4), (0, 24)] {
            let mut breaker = Breaker::default();
            let oldest = Agent { registered_at: Some(t(first_at)), ..agent(0, Status::Connected) };
            breaker.agent(&oldest, false, t(first_at));
            for n in 1..21 {
                let passes = |status| Agent { registered_at: Some(t(500)), ..agent(n, status) };
                breaker.agent(&passes(Status::Connected), false, t(500));
                breaker.agent(&passes(Status::Gone), false, t(1_000));
            }
            for n in 0..3 {
                breaker.agent(&silent(100 + n, 2_000), false, t(2_000));
            }
            breaker.agent(&silent(0, 2_000), false, t(2_000));
            assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 4, of }, "{first_at}");
        }
    }

    #[test]
    fn a_fleet_that_was_replaced_inside_the_window_is_not_twice_as_large() {
        let mut breaker = fleet(6);
        for n in 0..6 {
            breaker.agent(&agent(n, Status::Gone), false, t(1_000));
            let new = Agent { registered_at: Some(t(2_000)), ..agent(100 + n, Status::Connected) };
            breaker.agent(&new, false, t(2_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 0, of: 6 });
        for n in 0..3 {
            let new = Agent { registered_at: Some(t(2_000)), ..silent(100 + n, 3_000) };
            breaker.agent(&new, false, t(3_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(3_000)), Count { silent: 3, of: 6 });
        assert!(trips(&breaker, 3_000));
        // A start of the same agents as new instances leaves nobody behind.
        let mut restarted = fleet(6);
        for n in 0..6 {
            restarted.agent(
                &Agent { registered_at: Some(t(2_000)), ..agent(n, Status::Connected) },
                false,
                t(2_000),
            );
        }
        assert_eq!(restarted.count(&LIMITS, t(2_000)), Count { silent: 0, of: 6 });
    }

    #[test]
    fn who_is_drained_by_an_operator_is_in_neither_number() {
        let mut breaker = fleet(6);
        for n in 0..5 {
            breaker.agent(&drained(agent(n, Status::Draining)), false, t(500));
        }
        assert_eq!(breaker.count(&LIMITS, t(500)), Count { silent: 0, of: 1 });
        for n in 0..5 {
            breaker.agent(&drained(silent(n, 1_000)), false, t(1_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(1_000)), Count { silent: 0, of: 1 });
        assert!(!trips(&breaker, 1_000));
        // Drained or not is asked now: those that are not any more, and are silent, fell like the others.
        for n in 0..3 {
            breaker.agent(&silent(n, 1_000), false, t(2_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 3, of: 4 });
        assert!(trips(&breaker, 2_000));
    }

    #[test]
    fn who_is_drained_and_has_work_left_counts_until_it_has_not() {
        let mut breaker = fleet(1);
        for n in 1..5 {
            breaker.agent(&drained(agent(n, Status::Draining)), true, t(500));
        }
        assert_eq!(breaker.count(&LIMITS, t(500)), Count { silent: 0, of: 5 });
        for n in 1..5 {
            breaker.agent(&drained(silent(n, 1_000)), true, t(1_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(1_000)), Count { silent: 4, of: 5 });
        assert!(trips(&breaker, 1_000));
        for n in 1..3 {
            breaker.agent(&drained(silent(n, 1_000)), false, t(2_000));
        }
        assert_eq!(breaker.count(&LIMITS, t(2_000)), Count { silent: 2, of: 3 });
        assert!(!trips(&breaker, 2_000));
    }

    #[test]
    fn what_somebody_resumed_is_suspended_again_only_for_a_new_silence() {
        let mut breaker = fleet(8);
        for n in 0..4 {
            breaker.agent(&silent(n, 1_000), false, t(1_000));
        }
        assert!(trips(&breaker, 30_000));
        breaker.resumed();
        assert!(!trips(&breaker, 30_000), "another clock said that the window has passed");
        for n in 0..4 {
            let error = Agent { status: Some(Status::Error), ..silent(n, 1_000) };
            breaker.agent(&error, false, t(30_000));
        }
        assert!(!trips(&breaker, 30_000), "the same silences");
        breaker.agent(&silent(4, 31_000), false, t(31_000));
        assert!(trips(&breaker, 31_000));
    }

    #[test]
    fn small_fleets_and_farewells_never_trip_it() {
        let mut breaker = Breaker::default();
        for n in 0..2 {
            breaker.agent(&silent(n, 5), false, t(5));
        }
        assert!(!trips(&breaker, 6), "two of two, three are needed");
        for n in 0..9 {
            breaker.agent(&agent(n, Status::Gone), false, t(6));
        }
        assert_eq!(breaker.count(&LIMITS, t(6)).silent, 0);
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
