use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn at(ms: u64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000).plus_ms(ms)
}

/// Interval of the agents here.
const INTERVAL_MS: u64 = 1_000;

/// A fleet that beats, and the ears it is heard with.
#[derive(Default)]
struct Sim {
    gaps: Gaps,
    agents: BTreeMap<usize, (Steps, u64, Option<u64>)>,
    now: u64,
    suspicions: usize,
    holes: usize,
}

impl Sim {
    /// So many agents that were heard long enough to be trusted.
    fn steady(agents: usize) -> Self {
        let mut sim = Self::default();
        for _ in 0..2 * u64::from(STEADY_STEPS) {
            sim.round(agents, |_| 1);
        }
        assert_eq!((sim.suspicions, sim.holes), (0, 0));
        sim
    }

    /// One heartbeat of each: `steps(agent)` further than its last one that was heard, 0: it is not heard.
    fn round(&mut self, agents: usize, steps: impl Fn(usize) -> u64) {
        self.now += INTERVAL_MS;
        for agent in 0..agents {
            self.beat(agent, steps(agent));
        }
    }

    fn beat(&mut self, agent: usize, step: u64) {
        if step == 0 {
            return;
        }
        let (steps, seq, before) = self.agents.entry(agent).or_default();
        *seq = seq.saturating_add(step);
        self.holes += usize::from(self.gaps.hear(steps, *before, *seq, at(self.now)));
        *before = Some(*seq);
        if self.gaps.take_suspicion() {
            self.suspicions += 1;
            self.void();
        }
    }

    /// Evidence is void: nothing that was heard before is a step away from what is heard next.
    fn void(&mut self) {
        self.gaps.restart(at(self.now));
        for (_, _, before) in self.agents.values_mut() {
            *before = None;
        }
    }
}

#[test]
fn what_is_remembered_of_an_agent_is_three_bytes() {
    assert_eq!(size_of::<Steps>(), 3);
}

#[test]
fn heartbeats_of_many_that_are_missing_at_once_are_our_own_loss_and_known_once() {
    let mut sim = Sim::steady(50);
    sim.round(50, |agent| if agent % 10 == 0 { 2 } else { 1 });
    assert_eq!(sim.suspicions, 1);
    // Those behind them in the buffer come after our ears were opened anew.
    for _ in 0..60 {
        sim.round(50, |_| 1);
    }
    assert_eq!(sim.suspicions, 1);
}

#[test]
fn one_in_ten_and_at_least_three_are_many() {
    for (agents, holed, many) in [(20, 2, false), (30, 3, true), (31, 3, false), (4, 2, false), (4, 3, true)]
    {
        let mut sim = Sim::steady(agents);
        sim.round(agents, |agent| if agent < holed { 3 } else { 1 });
        assert_eq!(sim.suspicions, usize::from(many), "{holed} of {agents}");
        assert_eq!(sim.holes, holed);
    }
}

#[test]
fn the_first_heard_in_a_window_are_not_all_there_are() {
    let mut sim = Sim::steady(200);
    sim.now += WINDOW_MS;
    for agent in 0..5 {
        sim.beat(agent, 2);
    }
    assert_eq!(sim.suspicions, 0, "five of two hundred");
}

#[test]
fn before_the_first_window_has_passed_nothing_is_many() {
    let mut sim = Sim::default();
    for _ in 0..=STEADY_STEPS {
        sim.now += 1;
        for agent in 0..5 {
            sim.beat(agent, 1);
        }
    }
    (0..5).for_each(|agent| sim.beat(agent, 2));
    assert_eq!((sim.suspicions, sim.holes), (0, 5));
}

#[test]
fn holes_that_never_come_together_are_never_many() {
    let mut sim = Sim::steady(20);
    for round in 0..400 {
        // A hole every other round, of one agent after the other.
        sim.round(20, |agent| if round % 10 == 0 && agent == (round / 10) % 20 { 2 } else { 1 });
    }
    assert_eq!((sim.suspicions, sim.holes), (0, 40));
}

#[test]
fn who_skips_by_habit_proves_nothing() {
    let mut sim = Sim::default();
    for round in 0..100 {
        sim.round(30, |agent| if (round + agent) % usize::from(STEADY_STEPS) == 0 { 5 } else { 1 });
    }
    assert_eq!((sim.suspicions, sim.holes), (0, 0));
}

#[test]
fn what_was_sent_while_we_could_not_hear_is_no_hole() {
    let mut sim = Sim::steady(30);
    sim.void();
    sim.round(30, |_| 40);
    assert_eq!((sim.suspicions, sim.holes), (0, 0));
    // Nor is it a hole before they have shown again that they don't skip.
    sim.round(30, |_| 1);
    sim.round(30, |_| 2);
    assert_eq!((sim.suspicions, sim.holes), (0, 0));
}

#[test]
fn those_who_make_holes_on_purpose_are_believed_once_in_a_while() {
    let mut sim = Sim::steady(9);
    let begun = sim.now;
    for round in 0..2_000 {
        // Three of nine, as fast as they can earn it again.
        sim.round(9, |agent| if agent < 3 && round % 10 == 9 { 2 } else { 1 });
    }
    let pauses = (sim.now - begun) / PAUSE_MS;
    assert!(sim.suspicions >= 2 && sim.suspicions as u64 <= pauses + 1, "{} in {pauses}", sim.suspicions);
}

#[test]
fn a_clock_that_was_set_back_does_not_silence_it_for_long() {
    let mut sim = Sim::steady(9);
    sim.round(9, |_| 2);
    assert_eq!(sim.suspicions, 1);
    sim.now = 0;
    sim.void();
    while sim.now < PAUSE_MS + INTERVAL_MS {
        sim.round(9, |_| 1);
    }
    sim.round(9, |_| 2);
    assert_eq!(sim.suspicions, 2);
}

/// What one agent may do between two rounds of the others.
#[derive(Debug, Clone, Copy)]
enum Trick {
    Steps(u8),
    Skips(u64),
    Restarts,
    Waits(u64),
}

fn trick() -> impl Strategy<Value = Trick> {
    prop_oneof![
        (1..20u8).prop_map(Trick::Steps),
        prop_oneof![2..10u64, Just(u64::MAX / 2)].prop_map(Trick::Skips),
        Just(Trick::Restarts),
        (1..2 * WINDOW_MS).prop_map(Trick::Waits),
    ]
}

proptest! {
    #[test]
    fn no_two_agents_can_raise_suspicion_whatever_they_do(
        others in 0..20usize,
        tricks in prop::collection::vec((0..2usize, trick()), 1..300),
    ) {
        let mut sim = Sim::steady(others + 2);
        for (who, trick) in tricks {
            let agent = others + who;
            match trick {
                Trick::Steps(times) => (0..times).for_each(|_| sim.beat(agent, 1)),
                Trick::Skips(by) => sim.beat(agent, by),
                Trick::Restarts => {
                    let (_, seq, before) = sim.agents.get_mut(&agent).unwrap();
                    (*seq, *before) = (0, None);
                }
                Trick::Waits(ms) => {
                    sim.now += ms;
                    sim.round(others, |_| 1);
                }
            }
            prop_assert_eq!(sim.suspicions, 0);
        }
    }

    #[test]
    fn what_a_full_buffer_drops_is_noticed_when_it_is_a_tenth_of_the_fleet(
        agents in 30..200usize,
        from in 0..1_000usize,
        rounds in 1..4u64,
        share in 15..100usize,
    ) {
        // Heartbeats come in the same order in every round; the buffer drops a stretch of them, for some rounds.
        let mut sim = Sim::steady(agents);
        let (first, length) = (from % agents, agents * share / 100);
        let lost = |agent: usize| (agent + agents - first) % agents < length;
        for _ in 0..rounds {
            sim.round(agents, |agent| u64::from(!lost(agent)));
        }
        sim.round(agents, |agent| if lost(agent) { rounds + 1 } else { 1 });
        prop_assert_eq!(sim.suspicions, 1);
        for _ in 0..100 {
            sim.round(agents, |_| 1);
        }
        prop_assert_eq!(sim.suspicions, 1, "one loss is known once");
    }
}
