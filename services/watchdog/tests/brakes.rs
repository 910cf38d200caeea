//! The brakes on recoveries for silence in virtual time: one or two watchdogs over one log, each with its own clock.

#![allow(missing_docs)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Pool, Timestamp,
    agent::Status,
    event::{
        AgentEvent, Completed, Dispatched, Event, EventBody, ExecutionEvent, PayloadRef, Profile,
        RecoveryReason, StatusChanged, Submitted, SystemEvent, SystemEventKind,
    },
    subject::Subjects,
    wire::{Delivery, OnLoss},
};
use serde_json::json;
use watchdog::{
    breaker::BreakerLimits,
    decide::{Look, Verdict},
    effect,
    facts::{Edge, Limits, Waiting},
    sight::Void,
    state::{Config, Looks, World},
};

/// As by default: silence is lost after the window of the breaker.
const LIMITS: Limits = Limits {
    dispatch_grace_ms: 5_000,
    lost_after_ms: 60_000,
    stale_after_ms: 7_200_000,
    terminate_grace_ms: 500,
    failure_threshold: 3,
    interval_ms: 1_000,
};
const BREAKER: BreakerLimits = BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 60_000 };
const RATE: u32 = 10;
/// Time between two looks at everything.
const STEP_MS: u64 = 500;
const HOUR_MS: i64 = 3_600_000;
const START: Timestamp = Timestamp::from_millis(10 * HOUR_MS);

/// A watchdog: its world, how far its clock is ahead, and how far it has read.
struct Dog {
    world: World,
    ahead_ms: i64,
    read: usize,
}

/// A fleet whose agents are silent or heard by the log, and answer nobody.
struct Fleet {
    now: Timestamp,
    subjects: Subjects,
    log: Vec<(String, Vec<u8>)>,
    dogs: Vec<Dog>,
    /// When something was recovered for silence, by the true clock.
    recovered: Vec<i64>,
    /// Why.
    reasons: Vec<RecoveryReason>,
    /// What was asked to end.
    terminations: Vec<ExecutionId>,
}

fn agent_id(n: usize) -> AgentId {
    AgentId::new(&format!("a{n}")).unwrap()
}

fn instance() -> InstanceId {
    InstanceId::new("i").unwrap()
}

fn ahead(now: Timestamp, ms: i64) -> Timestamp {
    Timestamp::from_millis(now.as_millis() + ms)
}

impl Fleet {
    /// So many agents, heard for long, each with so much work, and a watchdog for each of these clocks.
    fn new(agents: usize, work: usize, clocks: &[i64]) -> Self {
        let config = Config { limits: LIMITS, breaker: BREAKER, recovery_rate: RATE };
        let dogs = clocks.iter().map(|ms| Dog { world: World::new(config), ahead_ms: *ms, read: 0 });
        let mut fleet = Self {
            now: START,
            subjects: Subjects::default(),
            log: Vec::new(),
            dogs: dogs.collect(),
            recovered: Vec::new(),
            reasons: Vec::new(),
            terminations: Vec::new(),
        };
        for n in 0..agents {
            fleet.agent(n, AgentEvent::Registered(profile(n)));
            fleet.status(n, Status::Connected);
            for m in 0..work {
                fleet.run_for(n, m, 10 * HOUR_MS.unsigned_abs());
            }
        }
        fleet.now = fleet.now.plus_ms(2 * BREAKER.window_ms);
        for dog in &mut fleet.dogs {
            dog.world.sight.set_connected(true);
        }
        fleet.fold();
        for dog in &mut fleet.dogs {
            let now = ahead(fleet.now, dog.ahead_ms);
            dog.world.sight.set_caught_up(true);
            dog.world.settle_all(now);
            see(&mut dog.world, now);
        }
        fleet
    }

    fn append(&mut self, subject: String, about: &str, body: EventBody, time: Timestamp) {
        let event =
            Event { id: uuid::Uuid::nil(), source: "test".to_owned(), subject: about.to_owned(), time, body };
        self.log.push((subject, event.encode()));
    }

    fn agent(&mut self, n: usize, event: AgentEvent) {
        let id = agent_id(n);
        self.append(self.subjects.agent_event(&id), id.as_str(), event.into(), self.now);
    }

    fn status(&mut self, n: usize, status: Status) {
        self.status_by(n, status, None);
    }

    fn status_by(&mut self, n: usize, status: Status, by: Option<&str>) {
        let change = StatusChanged {
            agent_id: agent_id(n),
            instance_id: Some(instance()),
            previous: None,
            reason: "test".to_owned(),
            since: self.now,
            evidence: json!(null),
            by: by.map(str::to_owned),
            code: None,
            message: None,
            deadline: None,
            undrained: false,
        };
        self.agent(n, AgentEvent::status(status, change));
    }

    fn run_for(&mut self, n: usize, m: usize, timeout_ms: u64) {
        let id = ExecutionId::new(&format!("x{n}-{m}")).unwrap();
        let deadline = self.now.plus_ms(timeout_ms);
        let events: [ExecutionEvent; 2] = [
            Submitted {
                execution_id: id.clone(),
                attempt: 1,
                agent_id: Some(agent_id(n)),
                pool: Pool::default(),
                input: PayloadRef { bytes: 1, sha256: String::new(), seq: 1, attempt: 1 },
                timeout_ms: None,
                priority: 5,
                queue_ttl_ms: 1_000_000,
                on_loss: OnLoss::Fail,
                max_attempts: 3,
                stall_timeout_ms: None,
                lost_after_ms: None,
                delivery: Delivery::External,
                labels: BTreeMap::new(),
                request_sha256: String::new(),
            }
            .into(),
            Dispatched {
                execution_id: id.clone(),
                attempt: 1,
                agent_id: agent_id(n),
                instance_id: instance(),
                deadline,
                timeout_ms,
            }
            .into(),
        ];
        for event in events {
            self.append(self.subjects.execution_event(&id), id.as_str(), event.into(), self.now);
        }
    }

    fn completes(&mut self, n: usize) {
        let execution_id = ExecutionId::new(&format!("x{n}-0")).unwrap();
        let (subject, about) = (self.subjects.execution_event(&execution_id), execution_id.to_string());
        let event = ExecutionEvent::Completed(Completed {
            execution_id,
            attempt: 1,
            agent_id: Some(agent_id(n)),
            instance_id: Some(instance()),
            result: None,
            late: false,
        });
        self.append(subject, &about, event.into(), self.now);
    }

    /// Everybody reads the log.
    fn fold(&mut self) {
        for dog in &mut self.dogs {
            let now = ahead(self.now, dog.ahead_ms);
            for (n, (subject, bytes)) in self.log.iter().enumerate().skip(dog.read) {
                let seq = u64::try_from(n).unwrap() + 1;
                dog.world.apply(&self.subjects, subject, seq, bytes, now).unwrap();
            }
            dog.read = self.log.len();
            dog.world.after_batch(now);
        }
    }

    /// So much time, with everything that the watchdogs do in it.
    fn pass(&mut self, ms: u64) {
        let until = self.now.plus_ms(ms);
        while self.now < until {
            self.now = self.now.plus_ms(STEP_MS.min(until.since_ms(self.now)));
            self.fold();
            for n in 0..self.dogs.len() {
                self.speak(n);
                self.work(n);
            }
        }
    }

    /// One look at the breaker, as the sentry's.
    fn speak(&mut self, n: usize) {
        let dog = &mut self.dogs[n];
        let now = ahead(self.now, dog.ahead_ms);
        dog.world.check_breaker(now);
        let (tripped, logged) = (dog.world.is_tripped(), dog.world.log_suspended);
        if tripped == logged || dog.world.sight.since().is_none() {
            return;
        }
        let kind =
            if tripped { SystemEventKind::RecoverySuspended } else { SystemEventKind::RecoveryResumed };
        let body = SystemEvent { kind, data: json!({}) };
        self.append(self.subjects.system_event("watchdog"), "watchdog", body.into(), now);
        self.fold();
    }

    /// All that is due, as the scheduler would work on it. Nobody answers.
    fn work(&mut self, n: usize) {
        let now = ahead(self.now, self.dogs[n].ahead_ms);
        let mut due: Vec<_> = std::iter::from_fn(|| self.dogs[n].world.take_due(now)).collect();
        // The second goes through them from the other end.
        if n % 2 == 1 {
            due.reverse();
        }
        for (id, attempt) in due {
            let mut looks = Looks {
                canary: true,
                waiting: Waiting::Nothing,
                edge: Edge::NoAnswer,
                of_started: true,
                ..Looks::default()
            };
            let mut last = None;
            for _ in 0..10 {
                let world = &mut self.dogs[n].world;
                let Some((judgement, facts)) = world.judge(&id, &looks, now) else { break };
                last = Some((judgement, facts.clone()));
                match judgement.verdict {
                    Verdict::Look(Look::Turn) => world.take_turn(&id, now),
                    Verdict::Look(_) => looks = Looks { canary: true, ..looks },
                    Verdict::Terminate(reason) => {
                        world.note_asked(&id, reason, None, now);
                        self.terminations.push(id.clone());
                    }
                    Verdict::Recover(finding) => {
                        let execution = world.executions.get(&id).unwrap();
                        let loss = effect::loss(
                            execution,
                            execution.holder().unwrap(),
                            &finding,
                            &facts,
                            effect::evidence(&facts, &LIMITS, None, now),
                            now,
                        );
                        let event = execution.lose(loss).unwrap();
                        self.recovered.push(self.now.as_millis());
                        self.reasons.push(finding.reason);
                        self.append(self.subjects.execution_event(&id), id.as_str(), event.into(), now);
                        self.fold();
                        last = None;
                        break;
                    }
                    Verdict::Leave | Verdict::WaitUntil(_) | Verdict::Postpone(_) => break,
                }
            }
            self.dogs[n].world.landed((&id, attempt), last, None, now);
        }
    }

    fn blind(&mut self, trouble: Void, ms: u64) {
        for dog in &mut self.dogs {
            dog.world.void(trouble);
        }
        self.pass(ms);
        for dog in &mut self.dogs {
            see(&mut dog.world, ahead(self.now, dog.ahead_ms));
        }
    }

    fn system_events(&self) -> Vec<SystemEventKind> {
        let subject = self.subjects.system_event("watchdog");
        let events = self.log.iter().filter(|(at, _)| *at == subject);
        events
            .map(|(_, bytes)| match Event::decode(bytes).unwrap().body {
                EventBody::System(event) => event.kind,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    /// No second saw more than the rate and its burst.
    fn keeps_to_the_rate(&self) {
        for (n, start) in self.recovered.iter().enumerate() {
            let inside = self.recovered[n..].iter().take_while(|at| **at < start + 1_000).count();
            assert!(inside <= 2 * RATE as usize + 1, "{inside} within a second: {:?}", self.recovered);
        }
    }
}

fn see(world: &mut World, now: Timestamp) {
    let epoch = world.sight.epoch();
    assert!(world.proven(epoch, now));
}

fn profile(n: usize) -> Profile {
    Profile {
        agent_id: agent_id(n),
        instance_id: instance(),
        capacity: 100,
        pool: Pool::default(),
        interval_ms: Some(1_000),
        timeout_ms: None,
        version: None,
        labels: BTreeMap::new(),
        probe: None,
        control: None,
    }
}

const ONCE_EACH: [SystemEventKind; 2] =
    [SystemEventKind::RecoverySuspended, SystemEventKind::RecoveryResumed];

/// For maintenance, say: what runs goes on, and its agents are cut off.
#[test]
fn a_fleet_that_an_operator_drains_is_protected_as_long_as_it_works() {
    for heard in [0, 2] {
        let mut fleet = Fleet::new(10, 1, &[0]);
        (heard..10).for_each(|n| fleet.status_by(n, Status::Draining, Some("operator")));
        fleet.pass(1_000);
        (heard..10).for_each(|n| fleet.status(n, Status::Disconnected));
        fleet.pass(BREAKER.window_ms - 1_000);
        assert!(fleet.dogs[0].world.is_suspended(), "{heard} are heard");
        assert!(fleet.recovered.is_empty(), "{heard} are heard: {:?}", fleet.reasons);
        (heard..10).for_each(|n| fleet.status(n, Status::Draining));
        fleet.pass(2 * BREAKER.window_ms);
        assert!(fleet.recovered.is_empty() && !fleet.dogs[0].world.is_suspended(), "{heard} are heard");
    }
}

/// Nobody waits for machines that were drained, have nothing left to do, and are switched off.
#[test]
fn drained_agents_without_work_suspend_nothing() {
    let mut fleet = Fleet::new(10, 1, &[0]);
    (1..10).for_each(|n| fleet.status_by(n, Status::Draining, Some("operator")));
    fleet.pass(1_000);
    (1..10).for_each(|n| fleet.completes(n));
    fleet.pass(1_000);
    (0..10).for_each(|n| fleet.status(n, Status::Disconnected));
    fleet.pass(LIMITS.lost_after_ms + 5_000);
    assert_eq!(fleet.reasons, [RecoveryReason::AgentLost]);
}

/// They had finished, and what they reported was read after they fell silent.
#[test]
fn drained_agents_whose_work_ends_while_they_are_silent_suspend_nothing_any_more() {
    let mut fleet = Fleet::new(10, 1, &[0]);
    (2..10).for_each(|n| fleet.status_by(n, Status::Draining, Some("operator")));
    (2..10).for_each(|n| fleet.status(n, Status::Disconnected));
    fleet.pass(1_000);
    assert!(fleet.dogs[0].world.is_suspended());
    (2..10).for_each(|n| fleet.completes(n));
    fleet.pass(1_000);
    assert!(!fleet.dogs[0].world.is_suspended());
}

#[test]
fn a_fleet_that_is_silent_altogether_is_condemned_by_nobody_however_long_it_lasts() {
    let mut fleet = Fleet::new(5, 1, &[0]);
    (0..5).for_each(|n| fleet.status(n, Status::Disconnected));
    fleet.pass(20 * BREAKER.window_ms);
    assert_eq!(fleet.system_events(), ONCE_EACH[..1]);
    assert!(fleet.recovered.is_empty(), "{:?}", fleet.recovered);
    // A watchdog that starts meanwhile goes by what the log says.
    let config = fleet.dogs[0].world.config;
    fleet.dogs[0] = Dog { world: World::new(config), ahead_ms: 0, read: 0 };
    fleet.dogs[0].world.sight.set_connected(true);
    fleet.fold();
    fleet.dogs[0].world.sight.set_caught_up(true);
    fleet.dogs[0].world.check_breaker(fleet.now);
    fleet.dogs[0].world.settle_all(fleet.now);
    see(&mut fleet.dogs[0].world, fleet.now);
    fleet.pass(5 * BREAKER.window_ms);
    assert_eq!(fleet.system_events(), ONCE_EACH[..1]);
    // The first is back, and the others soon after it.
    fleet.status(0, Status::Connected);
    fleet.pass(LIMITS.lost_after_ms / 2);
    assert_eq!(fleet.system_events(), ONCE_EACH);
    (1..4).for_each(|n| fleet.status(n, Status::Connected));
    fleet.pass(LIMITS.lost_after_ms / 2 - 1_000);
    assert!(fleet.recovered.is_empty(), "every clock started again");
    fleet.pass(2_000);
    assert_eq!(fleet.recovered.len(), 1, "of the one that stays away");
}

#[test]
fn one_suspension_is_one_event_each_way_however_the_clocks_of_the_watchdogs_differ() {
    for clocks in [[0, 2_000], [2_000, 0], [0, -45_000], [45_000, 0]] {
        let mut fleet = Fleet::new(8, 1, &clocks);
        for n in 0..4 {
            fleet.status(n, Status::Disconnected);
            fleet.pass(1_000);
        }
        fleet.pass(3 * BREAKER.window_ms);
        assert_eq!(fleet.system_events(), ONCE_EACH, "{clocks:?}");
        assert_eq!(fleet.recovered.len(), 4, "{clocks:?}");
    }
}

#[test]
fn turns_that_passed_while_nothing_could_be_recovered_let_nobody_through() {
    let pauses: [fn(&mut Fleet); 3] = [
        |fleet| fleet.blind(Void::BusCut, 60_000),
        // Something else goes wrong, and three agents are enough for that.
        |fleet| {
            (1..4).for_each(|n| fleet.status(n, Status::Disconnected));
            fleet.pass(1_000);
            assert_eq!(fleet.system_events(), ONCE_EACH[..1]);
            (1..4).for_each(|n| fleet.status(n, Status::Connected));
            fleet.pass(1_000);
            assert_eq!(fleet.system_events(), ONCE_EACH);
        },
        // The log takes nothing for a while.
        |fleet| {
            let now = fleet.now;
            let world = &mut fleet.dogs[0].world;
            let waiting: Vec<ExecutionId> = world.executions.keys().cloned().collect();
            while let Some((id, attempt)) = world.take_due(now.plus_ms(59_000)) {
                world.landed((&id, attempt), None, Some(now.plus_ms(60_000)), now);
            }
            assert!(waiting.iter().all(|id| world.due.of(id) >= Some(now.plus_ms(60_000))));
            fleet.now = now.plus_ms(60_000);
        },
    ];
    for (which, pause) in pauses.into_iter().enumerate() {
        let mut fleet = Fleet::new(5, 100, &[0]);
        fleet.status(0, Status::Disconnected);
        fleet.pass(LIMITS.lost_after_ms + STEP_MS);
        let before = fleet.recovered.len();
        assert!((1..=30).contains(&before), "{which}: {before}");
        pause(&mut fleet);
        fleet.pass(LIMITS.lost_after_ms + 60_000);
        fleet.keeps_to_the_rate();
        assert_eq!(fleet.recovered.len(), 100, "{which}");
    }
}

#[test]
fn watchdogs_that_go_through_their_lines_in_different_orders_keep_to_one_rate() {
    for dogs in [2, 3] {
        let mut fleet = Fleet::new(5, 100, &vec![0; dogs]);
        fleet.status(0, Status::Disconnected);
        fleet.pass(LIMITS.lost_after_ms + 60_000);
        fleet.keeps_to_the_rate();
        assert_eq!(fleet.recovered.len(), 100, "{dogs}");
        let took_ms = fleet.recovered[99] - fleet.recovered[0];
        // A burst of one second's worth, and the rest at the rate; nobody's places are lost for long.
        assert!((8_500..=12_000).contains(&took_ms), "{dogs}: {took_ms} ms");
    }
}

/// More than one burst of work, of one agent, and as many watchdogs.
fn all_are_recovered_at_the_rate(mut fleet: Fleet, after_ms: u64, reason: RecoveryReason) {
    fleet.pass(after_ms);
    assert!(fleet.recovered.is_empty(), "{} of {reason:?}", fleet.recovered.len());
    fleet.pass(60_000);
    assert_eq!(fleet.recovered.len(), 100, "{reason:?}");
    assert!(fleet.reasons.iter().all(|found| *found == reason), "{:?}", fleet.reasons);
    fleet.keeps_to_the_rate();
}

#[test]
fn every_recovery_for_silence_gets_its_turn_and_keeps_it() {
    for dogs in [1, 2] {
        let clocks = vec![0; dogs];
        let mut fleet = Fleet::new(5, 100, &clocks);
        fleet.status(0, Status::Disconnected);
        all_are_recovered_at_the_rate(fleet, LIMITS.lost_after_ms - 1_000, RecoveryReason::AgentLost);
        // Nobody at all is heard, up to the safety net.
        let mut fleet = Fleet::new(1, 100, &clocks);
        (0..1).for_each(|n| fleet.status(n, Status::Disconnected));
        for n in 1..5 {
            fleet.agent(n, AgentEvent::Registered(profile(n)));
            fleet.status(n, Status::Disconnected);
        }
        fleet.pass(2_000);
        assert_eq!(fleet.system_events(), ONCE_EACH[..1]);
        let net = LIMITS.stale_after_ms + LIMITS.lost_after_ms;
        all_are_recovered_at_the_rate(fleet, net - 10_000, RecoveryReason::Stale);
        // Bad for so long that the prober forgot it.
        let mut fleet = Fleet::new(5, 100, &clocks);
        fleet.status(0, Status::Gone);
        all_are_recovered_at_the_rate(fleet, 0, RecoveryReason::AgentGone);
    }
}

#[test]
fn a_clock_that_was_an_hour_ahead_stalls_nothing_once_it_is_right() {
    let mut fleet = Fleet::new(5, 100, &[HOUR_MS]);
    fleet.status(0, Status::Disconnected);
    fleet.run_for(1, 100, HOUR_MS.unsigned_abs() + 1_000);
    fleet.pass(LIMITS.lost_after_ms + 2 * STEP_MS);
    let before = fleet.recovered.len();
    assert!((1..50).contains(&before), "{before}");
    let asked = fleet.terminations.len();
    assert!(asked >= 1);
    assert!(fleet.dogs[0].world.rate_backlog_ms(fleet.now) > 0);
    fleet.dogs[0].ahead_ms = 0;
    let now = fleet.now;
    fleet.dogs[0].world.rebase(now);
    see(&mut fleet.dogs[0].world, now);
    assert_eq!(fleet.dogs[0].world.rate_backlog_ms(now), 0);
    fleet.pass(LIMITS.lost_after_ms + 30_000);
    fleet.keeps_to_the_rate();
    assert_eq!(fleet.recovered.len(), 100);
    assert_eq!(fleet.terminations.len(), asked, "by the right clock it is in time");
    fleet.pass(HOUR_MS.unsigned_abs());
    assert!(fleet.terminations.len() > asked, "and now it is not");
}

#[test]
fn an_end_that_was_to_be_asked_for_by_a_clock_ahead_is_asked_for_again_in_time() {
    let mut fleet = Fleet::new(1, 0, &[HOUR_MS]);
    // Late by every clock.
    fleet.run_for(0, 0, 0);
    fleet.pass(STEP_MS);
    let asked = fleet.terminations.len();
    assert_eq!(asked, 1);
    fleet.dogs[0].ahead_ms = 0;
    let now = fleet.now;
    fleet.dogs[0].world.rebase(now);
    fleet.pass(STEP_MS);
    assert_eq!(fleet.terminations.len(), asked + 1);
}
