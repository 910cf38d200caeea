//! Holes in the numbers of heartbeats as they are heard, in virtual time: those of many agents at once are our own loss.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use health_prober::config::Policy;
use health_prober::hear::{Heard, hear};
use health_prober::state::Fleet;
use rollcall_core::Timestamp;
use rollcall_core::gaps::{STEADY_STEPS, WINDOW_MS};
use serde_json::json;

const INTERVAL_MS: u64 = 1000;

struct Sim {
    fleet: Fleet,
    policy: Policy,
    now: Timestamp,
    seqs: BTreeMap<(usize, usize), u64>,
}

impl Sim {
    /// So many agents, heard for more than a window.
    fn steady(agents: usize) -> Self {
        let mut sim = Self {
            fleet: Fleet::default(),
            policy: Policy {
                interval_ms: INTERVAL_MS,
                failure_threshold: 3,
                success_threshold: 2,
                forget_after_ms: 86_400_000,
                activity_timeout_ms: None,
            },
            now: Timestamp::from_millis(1_000_000),
            seqs: BTreeMap::new(),
        };
        sim.fleet.restart_clocks(sim.now);
        for _ in 0..=WINDOW_MS / INTERVAL_MS {
            sim.round(agents, 1);
        }
        assert!(!sim.fleet.gaps.take_suspicion());
        sim
    }

    fn beat(&mut self, agent: usize, instance: usize, step: u64) -> Heard {
        let seq = self.seqs.entry((agent, instance)).or_default();
        *seq += step;
        let beat = json!({
            "instance_id": format!("i{instance}"), "seq": *seq, "state": "ready", "capacity": 1, "executions": [],
        });
        let body = beat.to_string();
        hear(&mut self.fleet, &format!("a{agent}"), body.as_bytes(), &self.policy, self.now).unwrap().1
    }

    fn round(&mut self, agents: usize, step: u64) {
        self.now = self.now.plus_ms(INTERVAL_MS);
        (0..agents).for_each(|agent| drop(self.beat(agent, 0, step)));
    }
}

#[test]
fn holes_of_many_agents_at_once_are_suspicious_and_counted() {
    let mut sim = Sim::steady(20);
    sim.now = sim.now.plus_ms(INTERVAL_MS);
    for agent in 0..20 {
        sim.beat(agent, 0, if agent < 3 { 2 } else { 1 });
    }
    assert!(sim.fleet.gaps.take_suspicion());
    assert_eq!(sim.fleet.holes, 3);
}

#[test]
fn what_was_sent_while_we_were_deaf_is_no_hole() {
    // From before we were deaf to after it.
    let mut sim = Sim::steady(20);
    sim.now = sim.now.plus_ms(INTERVAL_MS);
    sim.fleet.restart_clocks(sim.now);
    sim.round(20, 30);
    assert_eq!((sim.fleet.gaps.take_suspicion(), sim.fleet.holes), (false, 0));
    // From one moment to another while we are.
    let mut sim = Sim::steady(20);
    sim.fleet.deaf = true;
    sim.round(20, 30);
    assert_eq!((sim.fleet.gaps.take_suspicion(), sim.fleet.holes), (false, 0));
}

#[test]
fn one_agent_is_counted_once_whatever_instances_it_goes_through() {
    let mut sim = Sim::steady(20);
    for instance in 1..50 {
        for _ in 0..2 * STEADY_STEPS {
            assert_ne!(sim.beat(0, instance, 1), Heard::Replay);
        }
        sim.beat(0, instance, 7);
        assert!(!sim.fleet.gaps.take_suspicion(), "after {instance} instances");
    }
    assert_eq!(sim.fleet.holes, 49);
}
