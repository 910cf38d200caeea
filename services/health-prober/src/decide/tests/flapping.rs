//! When an agent is found to flap, how long that lasts, and how much it damps.

use proptest::prelude::*;
use rollcall_core::event::AgentEvent;

use super::*;
use crate::state::{FALL, FLAP_FALLS, FLAP_WINDOW_MS, HALF_LIFE_MS, MOST};

/// From the last fall on, whatever there was before: four half-lives, and the straight line's share.
const SETTLED_WITHIN_MS: u64 = 4 * HALF_LIFE_MS + HALF_LIFE_MS / 100;

/// An agent by its events alone, and what the contract says of it.
struct Story {
    lab: Lab,
    instance: u32,
    /// Of this instance.
    falls: Vec<Timestamp>,
    clock_set_at: Timestamp,
}

impl Story {
    fn new() -> Self {
        let mut story =
            Self { lab: Lab::new(), instance: 0, falls: Vec::new(), clock_set_at: Timestamp::default() };
        story.register();
        story
    }

    fn register(&mut self) {
        self.instance += 1;
        self.falls.clear();
        let profile = serde_json::from_value(json!({ "agent_id": AGENT, "capacity": 1, "pool": "default",
            "instance_id": format!("i{}", self.instance) }));
        self.lab.append(AgentEvent::Registered(profile.unwrap()));
        self.rise();
    }

    fn event(&mut self, kind: Status, previous: Status) {
        let change = json!({ "agent_id": AGENT, "instance_id": format!("i{}", self.instance), "since": self.lab.now,
            "previous": previous, "reason": "test", "evidence": {} });
        self.lab.append(AgentEvent::status(kind, serde_json::from_value(change).unwrap()));
    }

    fn rise(&mut self) {
        self.event(Status::Connected, Status::Disconnected);
    }

    fn fall(&mut self) {
        self.event(Status::Disconnected, Status::Connected);
        self.falls.push(self.lab.now);
        self.rise();
    }

    fn wait(&mut self, ms: u64) {
        self.lab.now = self.lab.now.plus_ms(ms);
    }

    fn set_clock(&mut self, by_ms: u64) {
        let (now, set_at) = (self.lab.now, self.clock_set_at);
        self.falls.retain(|at| now.since_ms((*at).max(set_at)) < FLAP_WINDOW_MS);
        self.lab.set_clock(by_ms);
        self.clock_set_at = self.lab.now;
    }

    /// The contract's rule.
    fn flaps(&self) -> bool {
        let age = |at: &Timestamp| self.lab.now.since_ms((*at).max(self.clock_set_at));
        self.falls.iter().filter(|at| age(at) < FLAP_WINDOW_MS).count() >= FLAP_FALLS
    }

    /// What is marked now; once at the most.
    fn marked(&mut self) -> Option<&'static str> {
        let event = marks(self.lab.known(), self.lab.now)?;
        let kind = event.short_type();
        self.lab.append(event);
        assert_eq!(marks(self.lab.known(), self.lab.now), None, "after {kind} at {}", self.lab.now);
        Some(kind)
    }

    fn is_marked(&self) -> bool {
        self.lab.known().agent.flapping
    }
}

#[derive(Debug, Clone)]
enum Step {
    Fall,
    Wait(u64),
    Restarted,
    ClockSet(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Fall),
        8 => (0u64..120_000).prop_map(Step::Wait),
        2 => (0u64..700_000).prop_map(Step::Wait),
        1 => Just(Step::Restarted),
        1 => (0u64..10_000_000).prop_map(Step::ClockSet),
    ];
    prop::collection::vec(step, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn it_is_marked_by_the_contracts_rule_and_settles_within_a_bound(steps in steps()) {
        let mut story = Story::new();
        for step in &steps {
            match step {
                Step::Fall => story.fall(),
                Step::Wait(ms) => story.wait(*ms),
                Step::Restarted => story.register(),
                Step::ClockSet(ms) => {
                    story.set_clock(*ms);
                }
            }
            let before = story.is_marked();
            match story.marked() {
                None => {}
                Some("agent.flapping") => prop_assert!(!before && story.flaps()),
                Some("agent.settled") => prop_assert!(before && !story.flaps()),
                Some(other) => prop_assert!(false, "{other}"),
            }
            prop_assert!(story.is_marked() || !story.flaps(), "4 falls in 5 minutes, and no mark");
            let last = story.falls.last().copied().unwrap_or_default().max(story.clock_set_at);
            let bound = last.plus_ms(SETTLED_WITHIN_MS);
            prop_assert!(!story.is_marked() || story.lab.now < bound, "{} ms later", story.lab.now.since_ms(last));
            if story.is_marked() {
                // Its timer goes off when it is settled, and not a moment before that.
                let due = story.lab.known().steady_due().unwrap();
                prop_assert!(due > story.lab.now && due <= bound);
                prop_assert!(!story.lab.known().is_steady(Timestamp::from_millis(due.as_millis() - 1)));
                prop_assert!(story.lab.known().is_steady(due));
            }
        }
    }

    #[test]
    fn every_replica_comes_to_the_same_from_the_log(steps in steps()) {
        let mut story = Story::new();
        for step in steps {
            match step {
                Step::Fall => story.fall(),
                Step::Wait(ms) | Step::ClockSet(ms) => story.wait(ms),
                Step::Restarted => story.register(),
            }
            story.marked();
        }
        let (weight, due) = (story.lab.known().penalty(story.lab.now), story.lab.known().steady_due());
        story.lab.restart();
        prop_assert_eq!(story.lab.known().penalty(story.lab.now), weight);
        prop_assert_eq!(story.lab.known().steady_due(), due);
    }
}

/// Falls once a minute, so often; marked afterwards.
fn fallen(times: u32) -> Story {
    let mut story = Story::new();
    for _ in 0..times {
        story.wait(60_000);
        story.fall();
        story.marked();
    }
    assert!(story.is_marked());
    story
}

#[test]
fn who_flaps_for_an_hour_is_damped_longer_and_more_than_who_did_once() {
    let (mut once, mut long) = (fallen(4), fallen(60));
    assert!(long.lab.known().penalty(long.lab.now) > once.lab.known().penalty(once.lab.now));
    let until_settled = |story: &mut Story| {
        let from = story.lab.now;
        story.lab.now = story.lab.known().steady_due().unwrap();
        assert_eq!(story.marked(), Some("agent.settled"));
        story.lab.now.since_ms(from)
    };
    let (short_ms, long_ms) = (until_settled(&mut once), until_settled(&mut long));
    assert!(short_ms + 60_000 < long_ms, "{short_ms} ms, {long_ms} ms");
    assert_eq!(once.lab.known().damping(once.lab.now), 1, "settled is settled");
}

#[test]
fn the_more_its_falls_weigh_the_more_successes_it_takes() {
    let mut story = Story::new();
    assert_eq!(story.lab.known().damping(story.lab.now), 1);
    let mut taken = Vec::new();
    for _ in 0..20 {
        story.fall();
        story.marked();
        taken.push(story.lab.known().damping(story.lab.now));
    }
    assert_eq!(taken[..9], [1, 1, 1, 3, 3, 3, 3, 4, 4]);
    assert_eq!((taken[14], taken[15], taken[19]), (5, 6, 6), "and no more than that");
    assert_eq!(story.lab.known().penalty(story.lab.now), MOST);
    let mut before = 6;
    while story.is_marked() {
        story.wait(10_000);
        story.marked();
        let now = story.lab.known().damping(story.lab.now);
        assert!(now <= before, "it grew by itself from {before} to {now}");
        before = now;
    }
    assert!(story.lab.known().penalty(story.lab.now) < FALL);
}

#[test]
fn four_falls_that_are_all_just_within_the_window_do_not_settle_it() {
    let mut story = Story::new();
    (0..4).for_each(|_| story.fall());
    assert_eq!(story.marked(), Some("agent.flapping"));
    story.wait(FLAP_WINDOW_MS - 1);
    assert_eq!(story.marked(), None);
    story.wait(1);
    // As much as a fresh one still, and the next millisecond less.
    assert_eq!(story.lab.known().penalty(story.lab.now), FALL);
    story.wait(HALF_LIFE_MS / 100);
    assert_eq!(story.marked(), Some("agent.settled"));
}

#[test]
fn falls_weigh_what_they_did_when_the_clock_is_set() {
    let mut story = Story::new();
    (0..3).for_each(|_| story.fall());
    story.set_clock(10_000_000);
    story.fall();
    assert_eq!(story.lab.known().penalty(story.lab.now), 4 * FALL);
    assert_eq!(story.marked(), Some("agent.flapping"));
}

#[test]
fn falls_of_long_ago_stay_so_when_the_clock_is_set() {
    let mut story = Story::new();
    for _ in 0..8 {
        story.fall();
        story.wait(FLAP_WINDOW_MS / 3);
    }
    story.wait(FLAP_WINDOW_MS);
    story.set_clock(2_000);
    assert_eq!(story.lab.known().falls(story.lab.now), 0);
    assert!(story.lab.known().penalty(story.lab.now) < FALL, "forgiven is forgiven");
    assert_eq!(story.marked(), None);
}
