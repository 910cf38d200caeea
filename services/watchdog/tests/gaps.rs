//! Holes in the numbers of heartbeats, in virtual time: those of many agents at once are our own loss.

#![allow(missing_docs)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use rollcall_core::{
    AgentId, InstanceId, Pool, Timestamp,
    event::{AgentEvent, Event, Profile},
    gaps::{AGENTS_MIN, PAUSE_MS, STEADY_STEPS, WINDOW_MS},
    subject::Subjects,
    wire::{Endpoint, Heartbeat},
};
use serde_json::json;
use watchdog::{
    breaker::BreakerLimits,
    facts::Limits,
    sight::Void,
    state::{Config, World},
};

const INTERVAL_MS: u64 = 1_000;

struct Sim {
    world: World,
    now: Timestamp,
    log_seq: u64,
    seqs: BTreeMap<(usize, usize), u64>,
}

impl Sim {
    /// So many agents, heard for more than a window by a watchdog that sees.
    fn steady(agents: usize) -> Self {
        let limits = Limits {
            dispatch_grace_ms: 5_000,
            lost_after_ms: 4_000,
            stale_after_ms: 60_000,
            terminate_grace_ms: 500,
            failure_threshold: 3,
            interval_ms: INTERVAL_MS,
        };
        let breaker = BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 30_000 };
        let mut sim = Self {
            world: World::new(Config { limits, breaker, recovery_rate: 100 }),
            now: Timestamp::from_millis(1_000_000),
            log_seq: 0,
            seqs: BTreeMap::new(),
        };
        (0..agents).for_each(|agent| sim.register(agent, None));
        sim.world.sight.set_connected(true);
        sim.world.sight.set_caught_up(true);
        sim.see();
        for _ in 0..=WINDOW_MS / INTERVAL_MS {
            sim.round(agents, 1);
        }
        assert!(sim.sees());
        sim
    }

    fn register(&mut self, agent: usize, control: Option<Endpoint>) {
        let profile = Profile {
            agent_id: id(agent),
            instance_id: InstanceId::new("i-0").unwrap(),
            capacity: 1,
            pool: Pool::default(),
            interval_ms: Some(INTERVAL_MS),
            timeout_ms: None,
            version: None,
            labels: BTreeMap::new(),
            probe: None,
            control,
        };
        self.log_seq += 1;
        let event = Event {
            id: uuid::Uuid::nil(),
            source: "test".to_owned(),
            subject: id(agent).to_string(),
            time: self.now,
            body: AgentEvent::Registered(profile).into(),
        };
        let subjects = Subjects::default();
        let subject = subjects.agent_event(&id(agent));
        self.world.apply(&subjects, &subject, self.log_seq, &event.encode(), self.now).unwrap();
    }

    /// One heartbeat of an instance, its number so much higher than that of the one before.
    fn beat(&mut self, agent: usize, instance: usize, step: u64) {
        let seq = self.seqs.entry((agent, instance)).or_default();
        *seq += step;
        let beat = json!({
            "instance_id": format!("i-{instance}"), "seq": *seq, "state": "ready", "capacity": 1,
            "interval_ms": INTERVAL_MS, "executions": [],
        })
        .to_string();
        self.world.beat(
            id(agent).as_str(),
            &Heartbeat::read(id(agent).as_str(), beat.as_bytes()).unwrap(),
            self.now,
        );
    }

    fn round(&mut self, agents: usize, step: u64) {
        self.now = self.now.plus_ms(INTERVAL_MS);
        (0..agents).for_each(|agent| self.beat(agent, 0, step));
    }

    fn see(&mut self) {
        let epoch = self.world.sight.epoch();
        assert!(self.world.proven(epoch, self.now));
    }

    fn sees(&self) -> bool {
        self.world.sight.since().is_some()
    }
}

fn id(agent: usize) -> AgentId {
    AgentId::new(&format!("a{agent}")).unwrap()
}

#[test]
fn holes_of_many_agents_at_once_blind_and_the_sentry_is_told() {
    let mut sim = Sim::steady(20);
    sim.world.blinded = false;
    sim.now = sim.now.plus_ms(INTERVAL_MS);
    for agent in 0..20 {
        sim.beat(agent, 0, if agent < AGENTS_MIN as usize { 2 } else { 1 });
    }
    assert_eq!((sim.sees(), sim.world.sight.trouble()), (false, Void::Gaps));
    assert!(sim.world.blinded);
}

#[test]
fn what_was_sent_while_we_were_blind_is_no_hole() {
    for registry in [false, true] {
        let mut sim = Sim::steady(20);
        for agent in 0..20 {
            let control = Endpoint { kind: "http".to_owned(), url: "http://127.0.0.1:1".to_owned() };
            sim.register(agent, registry.then_some(control));
        }
        sim.world.void(Void::BusCut);
        // Nothing is heard of any of them for a while, then of half of them before we see again.
        (0..10).for_each(|agent| sim.beat(agent, 0, 30));
        assert_eq!(sim.world.sight.trouble(), Void::BusCut);
        sim.see();
        if registry {
            for agent in 0..20 {
                sim.world.registry(
                    &id(agent),
                    &rollcall_control::RegistryList::default(),
                    INTERVAL_MS,
                    sim.now,
                );
            }
        }
        sim.round(20, 30);
        assert!(sim.sees(), "with a registry: {registry}");
    }
}

#[test]
fn agents_that_all_restart_count_from_wherever_they_like() {
    let mut sim = Sim::steady(20);
    (0..20).for_each(|agent| sim.beat(agent, 1, 1_000));
    assert!(sim.sees());
}

#[test]
fn a_clock_that_is_set_back_does_not_put_it_off() {
    let mut sim = Sim::steady(20);
    sim.round(20, 2);
    assert_eq!(sim.world.sight.trouble(), Void::Gaps);
    sim.now = Timestamp::from_millis(0);
    sim.world.void(Void::ClockJump);
    sim.see();
    for _ in 0..=PAUSE_MS / INTERVAL_MS {
        sim.round(20, 1);
    }
    assert!(sim.sees());
    sim.round(20, 2);
    assert_eq!((sim.sees(), sim.world.sight.trouble()), (false, Void::Gaps));
}

#[test]
fn one_agent_never_blinds_us_whatever_instances_it_goes_through() {
    let mut sim = Sim::steady(20);
    for turn in 0..200 {
        let instance = turn % 12;
        for _ in 0..2 * STEADY_STEPS {
            sim.beat(0, instance, 1);
        }
        sim.beat(0, instance, 7);
        assert!(sim.sees(), "after {turn} turns");
    }
}
