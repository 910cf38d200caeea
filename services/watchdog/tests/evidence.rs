//! The world and its judgements in virtual time: events as the log has them, heartbeats, and an oracle that answers
//! what the judgements ask for. Property tests over sequences of evidence.

#![allow(missing_docs)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Pool, Timestamp,
    agent::Status,
    event::{
        AgentEvent, CancelRequested, Dispatched, Event, EventBody, ExecutionEvent, PayloadRef, Profile,
        RecoveryReason, Started, StatusChanged, Submitted, Superseded, TerminateOutcome,
    },
    execution::State,
    subject::Subjects,
    wire::{Delivery, Heartbeat, OnLoss, Outcome, TerminateState},
};
use serde_json::json;
use watchdog::{
    breaker::BreakerLimits,
    decide::{Finding, Look, Verdict, judge},
    effect,
    facts::{Asked, Edge, Facts, Limits, Listing, Waiting},
    matrix::{Row, SAMPLE_LIMITS, healthy_sample, sample},
    sight::Void,
    state::{Config, Looks, World},
};

const LIMITS: Limits = Limits {
    dispatch_grace_ms: 5_000,
    lost_after_ms: 4_000,
    stale_after_ms: 60_000,
    terminate_grace_ms: 500,
    failure_threshold: 3,
    interval_ms: 1_000,
};

/// What an instance would answer if it were asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    /// It lists the execution.
    Lists,
    /// It answers without it.
    Empty,
    /// The server knows of nobody there.
    Away,
    /// Nothing comes back.
    Mute,
}

struct Sim {
    world: World,
    subjects: Subjects,
    now: Timestamp,
    seq: u64,
    beat_seq: u64,
    truth: Truth,
    /// What becomes of a request to end it.
    ending: Option<TerminateState>,
    waiting: Waiting,
    /// Our own message comes back through the bus.
    canary: bool,
    recovered: Vec<(RecoveryReason, TerminateOutcome, Timestamp)>,
    terminations: usize,
    /// Work that was done by the judgements, to see that nothing spins.
    works: usize,
}

fn t(ms: i64) -> Timestamp {
    Timestamp::from_millis(1_000_000 + ms)
}

fn agent() -> AgentId {
    AgentId::new("a").unwrap()
}

fn instance(name: &str) -> InstanceId {
    InstanceId::new(name).unwrap()
}

fn execution() -> ExecutionId {
    ExecutionId::new("x").unwrap()
}

impl Sim {
    /// One agent with one running execution, seen by a watchdog that just opened its eyes.
    fn new(timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Self {
        let config = Config {
            limits: LIMITS,
            breaker: BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 30_000 },
            recovery_rate: 100,
        };
        let mut sim = Self {
            world: World::new(config),
            subjects: Subjects::default(),
            now: t(0),
            seq: 0,
            beat_seq: 0,
            truth: Truth::Lists,
            ending: Some(TerminateState::Terminated),
            waiting: Waiting::Nothing,
            canary: true,
            recovered: Vec::new(),
            terminations: 0,
            works: 0,
        };
        sim.register("i-1");
        sim.execution(
            Submitted {
                execution_id: execution(),
                attempt: 1,
                agent_id: Some(agent()),
                pool: Pool::default(),
                input: PayloadRef { bytes: 1, sha256: String::new(), seq: 1, attempt: 1 },
                timeout_ms: None,
                priority: 5,
                queue_ttl_ms: 1_000_000,
                on_loss: OnLoss::Fail,
                max_attempts: 3,
                stall_timeout_ms,
                lost_after_ms: None,
                delivery: Delivery::Push,
                labels: BTreeMap::new(),
                request_sha256: String::new(),
            }
            .into(),
        );
        let deadline = sim.now.plus_ms(timeout_ms);
        sim.execution(
            Dispatched {
                execution_id: execution(),
                attempt: 1,
                agent_id: agent(),
                instance_id: instance("i-1"),
                deadline,
                timeout_ms,
            }
            .into(),
        );
        sim.execution(
            Started {
                execution_id: execution(),
                attempt: 1,
                agent_id: agent(),
                instance_id: instance("i-1"),
            }
            .into(),
        );
        sim.world.sight.set_connected(true);
        sim.world.sight.set_caught_up(true);
        sim.world.settle_all(sim.now);
        sim.see();
        sim
    }

    fn append(&mut self, subject: &str, about: &str, body: EventBody) {
        self.seq += 1;
        let event = Event {
            id: uuid::Uuid::nil(),
            source: "test".to_owned(),
            subject: about.to_owned(),
            time: self.now,
            body,
        };
        self.world.apply(&self.subjects, subject, self.seq, &event.encode(), self.now).unwrap();
        self.world.after_batch(self.now);
    }

    fn execution(&mut self, event: ExecutionEvent) {
        self.append(&self.subjects.execution_event(&execution()), "x", event.into());
    }

    fn agent(&mut self, event: AgentEvent) {
        self.append(&self.subjects.agent_event(&agent()), "a", event.into());
    }

    fn register(&mut self, name: &str) {
        self.agent(AgentEvent::Registered(Profile {
            agent_id: agent(),
            instance_id: instance(name),
            capacity: 1,
            pool: Pool::default(),
            interval_ms: Some(1_000),
            timeout_ms: None,
            version: None,
            labels: BTreeMap::new(),
            probe: None,
            control: None,
        }));
        self.status(name, Status::Connected);
    }

    fn status(&mut self, name: &str, status: Status) {
        let change = StatusChanged {
            agent_id: agent(),
            instance_id: Some(instance(name)),
            previous: None,
            reason: "test".to_owned(),
            since: self.now,
            evidence: json!(null),
            by: None,
            code: None,
            message: None,
            deadline: None,
            undrained: false,
        };
        self.agent(AgentEvent::status(status, change));
    }

    fn supersede(&mut self) {
        self.agent(AgentEvent::Superseded(Superseded {
            agent_id: agent(),
            instance_id: instance("i-1"),
            by_instance_id: instance("i-2"),
        }));
        self.register("i-2");
    }

    fn beat(&mut self, lists: bool, progress: u64) {
        self.beat_seq += 1;
        let executions =
            if lists { vec![json!({"id": "x", "attempt": 1, "progress": progress})] } else { vec![] };
        let beat = json!({
            "instance_id": "i-1", "seq": self.beat_seq, "state": "ready", "capacity": 1,
            "interval_ms": 1000, "executions": executions,
        })
        .to_string();
        self.world.beat("a", &Heartbeat::read("a", beat.as_bytes()).unwrap(), self.now);
        self.work();
    }

    fn see(&mut self) {
        let epoch = self.world.sight.epoch();
        self.world.proven(epoch, self.now);
        self.work();
    }

    /// Moves time on, waking whenever something is due.
    fn advance(&mut self, ms: u64) {
        let until = self.now.plus_ms(ms);
        while let Some(next) = self.world.due.next().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.work();
            assert!(self.works < 100_000, "the judgements spin");
        }
        self.now = until;
        self.work();
    }

    /// What the shell does, with the oracle for a world outside.
    fn work(&mut self) {
        while let Some((id, attempt)) = self.world.take_due(self.now) {
            self.works += 1;
            let mut looks = Looks::default();
            let (mut last, mut retry_at) = (None, None);
            for _ in 0..10 {
                let Some((judgement, facts)) = self.world.judge(&id, &looks, self.now) else { break };
                last = Some(judgement);
                match judgement.verdict {
                    Verdict::Leave | Verdict::WaitUntil(_) | Verdict::Postpone(_) => break,
                    Verdict::Look(Look::Canary) if !self.canary => {
                        (last, retry_at) = (None, Some(self.now.plus_ms(500)));
                        break;
                    }
                    Verdict::Look(Look::Canary) => looks.canary = true,
                    Verdict::Look(Look::Report) => looks.waiting = self.waiting,
                    Verdict::Look(Look::Turn) => self.world.take_turn(&id, self.now),
                    Verdict::Look(Look::Instance) => {
                        looks.edge = match self.truth {
                            Truth::Lists => {
                                self.world.note_full_answer(&id);
                                Edge::Lists
                            }
                            Truth::Empty => {
                                Edge::ListsNot { times: self.world.note_empty_answer(&id, 1_000, self.now) }
                            }
                            Truth::Away => Edge::NoResponders,
                            Truth::Mute => Edge::NoAnswer,
                        };
                    }
                    Verdict::Terminate(_) => {
                        self.terminations += 1;
                        self.world.note_asked(&id, self.ending, self.now);
                        looks.waiting = Waiting::Unasked;
                    }
                    Verdict::Recover(finding) => {
                        let execution = self.world.executions.get(&id).unwrap();
                        let held = execution.holder().unwrap();
                        let loss = effect::loss(execution, held, &finding, &facts, json!({}), self.now);
                        let event = execution.lose(loss).unwrap();
                        self.recovered.push((finding.reason, finding.terminate, self.now));
                        self.execution(event);
                        last = None;
                        break;
                    }
                }
            }
            self.world.landed((&id, attempt), last, retry_at, self.now);
        }
    }

    fn is_untouched(&self) -> bool {
        self.recovered.is_empty() && self.terminations == 0
    }
}

const HOUR: u64 = 3_600_000;

/// Evidence that is good or void.
#[derive(Debug, Clone)]
enum Kind {
    /// A heartbeat that lists it, its progress risen, after at most an interval.
    Beat(u64),
    /// We are blind for so long; meanwhile the log may say anything about the agent's health.
    Blind(Void, u64, Option<Status>),
    /// The log says that it is well.
    Well,
    /// A heartbeat is sent again.
    Replay,
}

fn good_or_void() -> impl Strategy<Value = Kind> {
    let void = prop_oneof![
        Just(Void::BusCut),
        Just(Void::Dropped),
        Just(Void::Stalled),
        Just(Void::ClockJump),
        Just(Void::CanaryLost),
    ];
    let status = prop_oneof![Just(None), Just(Some(Status::Disconnected)), Just(Some(Status::Error))];
    prop_oneof![
        8 => (1u64..1_000).prop_map(Kind::Beat),
        2 => (void, 0u64..100_000, status).prop_map(|(v, ms, s)| Kind::Blind(v, ms, s)),
        1 => Just(Kind::Well),
        1 => Just(Kind::Replay),
    ]
}

/// Evidence that is bad from some moment on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bad {
    Dropped,
    Dead,
    Mute,
    Restarted,
    Gone,
    Late,
    Stalled,
    Cancelled,
    Withheld,
}

fn bad() -> impl Strategy<Value = Bad> {
    prop_oneof![
        Just(Bad::Dropped),
        Just(Bad::Dead),
        Just(Bad::Mute),
        Just(Bad::Restarted),
        Just(Bad::Gone),
        Just(Bad::Late),
        Just(Bad::Stalled),
        Just(Bad::Cancelled),
        Just(Bad::Withheld),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn good_and_void_evidence_never_yields_a_verdict(
        kinds in prop::collection::vec(good_or_void(), 1..120),
        truth in prop_oneof![Just(Truth::Lists), Just(Truth::Away), Just(Truth::Mute)],
    ) {
        let mut sim = Sim::new(HOUR * 24, Some(30_000));
        // Heartbeats alone have to speak for an agent that takes no requests.
        sim.truth = truth;
        let mut progress = 0;
        for kind in kinds {
            match kind {
                Kind::Beat(after) => {
                    sim.advance(after);
                    progress += 1;
                    sim.beat(true, progress);
                }
                Kind::Blind(void, ms, status) => {
                    sim.world.void(void);
                    if let Some(status) = status {
                        sim.status("i-1", status);
                    }
                    sim.advance(ms);
                    sim.see();
                }
                Kind::Well => sim.status("i-1", Status::Connected),
                Kind::Replay => {
                    sim.beat_seq = sim.beat_seq.saturating_sub(1);
                    sim.beat(true, 0);
                    sim.beat_seq += 1;
                }
            }
            prop_assert!(sim.is_untouched(), "{:?}", sim.recovered);
        }
        prop_assert!(sim.works < 5_000, "judged {} times", sim.works);
    }

    #[test]
    fn every_bad_sequence_ends_within_its_bound(
        bad in bad(),
        truth in prop_oneof![Just(Truth::Lists), Just(Truth::Empty), Just(Truth::Away), Just(Truth::Mute)],
        ending in prop_oneof![
            Just(Some(TerminateState::Terminated)), Just(Some(TerminateState::NotRunning)), Just(None)
        ],
        blinds in prop::collection::vec(0u64..3_000, 0..4),
    ) {
        let mut sim = Sim::new(if bad == Bad::Late { 8_000 } else { HOUR * 24 }, Some(10_000).filter(|_| bad == Bad::Stalled));
        for n in 0..6 {
            sim.advance(900);
            sim.beat(true, n);
        }
        sim.ending = ending;
        let beats = match bad {
            // An agent that beats without it and says that it has it is believed; not so one that says nothing.
            Bad::Dropped | Bad::Withheld => {
                sim.truth = if truth == Truth::Lists { Truth::Mute } else { truth };
                if bad == Bad::Withheld {
                    sim.waiting = Waiting::Withholds(Outcome::Completed);
                }
                Some(false)
            }
            Bad::Dead | Bad::Mute => {
                sim.truth = if bad == Bad::Dead { Truth::Away } else { Truth::Mute };
                sim.advance(1_500);
                sim.status("i-1", Status::Disconnected);
                None
            }
            Bad::Restarted => {
                sim.truth = if truth == Truth::Lists { Truth::Mute } else { truth };
                sim.supersede();
                None
            }
            Bad::Gone => {
                sim.status("i-1", Status::Gone);
                None
            }
            Bad::Late | Bad::Stalled => {
                if ending == Some(TerminateState::NotRunning) {
                    sim.truth = Truth::Empty;
                }
                Some(true)
            }
            Bad::Cancelled => {
                sim.execution(CancelRequested {
                    execution_id: execution(), attempt: 1, agent_id: Some(agent()), reason: String::new(), by: String::new(),
                }.into());
                Some(true)
            }
        };
        let began = sim.now;
        let mut blinds = blinds.into_iter();
        // Every bound of the test's limits together, and the safety net.
        let bound = LIMITS.stale_after_ms + 40_000;
        while sim.recovered.is_empty() && sim.now.since_ms(began) <= bound {
            sim.advance(900);
            if let Some(lists) = beats {
                sim.beat(lists, 5);
            }
            if let Some(ms) = blinds.next() {
                sim.world.void(Void::Stalled);
                sim.advance(ms);
                sim.see();
            }
        }
        prop_assert_eq!(sim.recovered.len(), 1, "{:?} after {} ms", bad, sim.now.since_ms(began));
        let (reason, terminate, _) = sim.recovered[0];
        let expected: &[RecoveryReason] = match bad {
            Bad::Dropped => &[RecoveryReason::Orphaned],
            Bad::Dead | Bad::Mute => &[RecoveryReason::AgentLost],
            Bad::Restarted => &[RecoveryReason::AgentRestarted],
            Bad::Gone => &[RecoveryReason::AgentGone],
            Bad::Late if ending.is_some() => &[RecoveryReason::TimedOut],
            Bad::Stalled if ending.is_some() => &[RecoveryReason::Stalled],
            Bad::Late | Bad::Stalled | Bad::Cancelled | Bad::Withheld => &[RecoveryReason::Stale],
        };
        prop_assert!(expected.contains(&reason), "{:?}: {:?}", bad, reason);
        if matches!(bad, Bad::Late | Bad::Stalled) && ending.is_none() {
            prop_assert_eq!(terminate, TerminateOutcome::Failed);
        }
        let state = sim.world.ended.get(&execution()).map(|note| note.state);
        let end = if bad == Bad::Cancelled { State::Cancelled } else { State::Failed };
        prop_assert_eq!(state, Some(end));
        prop_assert!(sim.works < 2_000, "judged {} times", sim.works);
    }
}

#[test]
fn the_first_list_after_the_grace_is_not_enough_and_the_second_is() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Empty;
    // Inside the grace nothing counts, however often.
    for _ in 0..4 {
        sim.advance(1_000);
        sim.beat(false, 0);
    }
    sim.advance(1_000);
    sim.beat(false, 0);
    assert!(sim.is_untouched());
    sim.advance(1_000);
    sim.beat(false, 0);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Orphaned);
    assert_eq!(sim.recovered[0].1, TerminateOutcome::NotRunning);
}

#[test]
fn lists_before_and_after_a_blindness_are_not_in_a_row() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.advance(6_000);
    sim.beat(false, 0);
    sim.world.void(Void::Dropped);
    sim.see();
    sim.advance(500);
    sim.beat(false, 0);
    assert!(sim.is_untouched());
    sim.advance(500);
    sim.beat(false, 0);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Orphaned);
}

#[test]
fn a_superseded_instance_is_not_silent_while_we_are_blind() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.beat(true, 0);
    sim.advance(6_000);
    sim.world.void(Void::BusCut);
    sim.supersede();
    sim.advance(50_000);
    assert!(sim.is_untouched());
    sim.see();
    sim.advance(3_400);
    assert!(sim.is_untouched());
    sim.advance(1_200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted);
}

#[test]
fn standing_still_needs_a_list_from_after_the_stall_timeout() {
    let mut sim = Sim::new(HOUR, Some(2_000));
    sim.beat(true, 7);
    sim.advance(1_500);
    sim.beat(true, 7);
    sim.advance(900);
    assert!(sim.is_untouched(), "the last list is older than the stall timeout");
    sim.beat(true, 8);
    sim.advance(1_000);
    sim.beat(true, 8);
    assert!(sim.is_untouched(), "it moved");
    sim.advance(1_100);
    sim.beat(true, 8);
    sim.advance(1_000);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Stalled);
    assert_eq!(sim.terminations, 1);
}

#[test]
fn an_agent_without_progress_never_stands_still() {
    let mut sim = Sim::new(HOUR, Some(2_000));
    for _ in 0..20 {
        sim.advance(900);
        sim.beat_seq += 1;
        let beat = format!(
            r#"{{"instance_id":"i-1","seq":{},"state":"busy","capacity":1,"executions":[{{"id":"x","attempt":1}}]}}"#,
            sim.beat_seq
        );
        sim.world.beat("a", &Heartbeat::read("a", beat.as_bytes()).unwrap(), sim.now);
        sim.work();
    }
    assert!(sim.is_untouched());
}

#[test]
fn an_idle_healthy_execution_is_judged_once_however_long_it_runs() {
    let mut sim = Sim::new(HOUR, None);
    let works = sim.works;
    for n in 0..1_000 {
        sim.advance(1_000);
        sim.beat(true, n);
    }
    assert_eq!((sim.works, sim.terminations), (works, 0));
    assert_eq!(sim.world.due.next(), Some(t(0).plus_ms(HOUR)), "only its deadline is planned");
}

#[test]
fn a_deadline_inside_the_grace_still_counts() {
    let mut sim = Sim::new(2_000, None);
    sim.ending = Some(TerminateState::NotRunning);
    sim.truth = Truth::Empty;
    sim.advance(2_000);
    assert_eq!(sim.recovered, [(RecoveryReason::TimedOut, TerminateOutcome::NotRunning, t(2_000))]);
}

#[test]
fn a_terminated_report_that_waits_is_the_confirmation() {
    let mut sim = Sim::new(2_000, None);
    sim.waiting = Waiting::Confirms(Outcome::Terminated);
    sim.advance(2_000);
    assert_eq!(sim.terminations, 0);
    assert_eq!(sim.recovered, [(RecoveryReason::TimedOut, TerminateOutcome::Confirmed, t(2_000))]);
}

#[test]
fn an_end_whose_answer_was_lost_is_known_by_the_report_or_by_the_list() {
    for report in [true, false] {
        let mut sim = Sim::new(6_000, None);
        sim.ending = None;
        sim.truth = Truth::Empty;
        for n in 0..7 {
            sim.advance(900);
            sim.beat(true, n);
        }
        assert_eq!(sim.terminations, 1);
        if report {
            sim.waiting = Waiting::Confirms(Outcome::Terminated);
            sim.advance(1_000);
        } else {
            sim.beat(false, 0);
            sim.beat(false, 0);
        }
        let expected = if report { TerminateOutcome::Confirmed } else { TerminateOutcome::NotRunning };
        assert_eq!((sim.recovered[0].0, sim.recovered[0].1), (RecoveryReason::TimedOut, expected));
    }
}

#[test]
fn what_is_not_running_and_still_listed_is_held_until_its_report_is_acknowledged_or_the_net() {
    for (truth, acknowledged) in [(Truth::Lists, true), (Truth::Mute, true), (Truth::Lists, false)] {
        let mut sim = Sim::new(6_000, None);
        sim.ending = Some(TerminateState::NotRunning);
        sim.truth = truth;
        for n in 0..20 {
            sim.advance(900);
            sim.beat(true, n);
        }
        assert!(sim.recovered.is_empty(), "{truth:?}: {:?}", sim.recovered);
        assert!(sim.terminations > 1, "it is asked again: another agent may not have begun it yet");
        assert_eq!(sim.world.troubles[&execution()].row, Row::Withheld);
        if acknowledged {
            // Its report is applied elsewhere; whatever became of it, the agent has let go.
            sim.truth = if truth == Truth::Lists { Truth::Empty } else { truth };
            sim.beat(false, 0);
            sim.advance(1_000);
            assert_eq!(
                (sim.recovered[0].0, sim.recovered[0].1),
                (RecoveryReason::TimedOut, TerminateOutcome::NotRunning)
            );
        } else {
            while sim.recovered.is_empty() && sim.now < t(80_000) {
                sim.advance(900);
                sim.beat(true, 99);
            }
            let stale = t(6_000).plus_ms(LIMITS.stale_after_ms);
            assert_eq!(
                (sim.recovered[0].0, sim.recovered[0].1),
                (RecoveryReason::Stale, TerminateOutcome::NotRunning)
            );
            assert!(sim.recovered[0].2.since_ms(stale) < 1_000, "{:?}", sim.recovered);
        }
    }
}

#[test]
fn a_finished_report_that_waits_at_the_deadline_spares_it_the_terminate() {
    let mut sim = Sim::new(2_000, None);
    sim.waiting = Waiting::Withholds(Outcome::Completed);
    sim.advance(10_000);
    assert!(sim.is_untouched());
}

#[test]
fn a_silent_agent_is_not_lost_while_we_still_hear_it_and_lost_when_we_do_not() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.status("i-1", Status::Error);
    for n in 0..20 {
        sim.advance(900);
        sim.beat(true, n);
    }
    assert!(sim.is_untouched());
    let last = sim.now;
    sim.advance(3_400);
    assert!(sim.is_untouched(), "silent, but not to the threshold");
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
    assert_eq!(sim.recovered[0].2.since_ms(last), 3_500, "failure k falls at (k + 0.5) intervals");
}

#[test]
fn no_responders_needs_an_instance_that_used_to_answer_and_an_overdue_heartbeat() {
    for (answered, expected_after) in [(true, 1_500), (false, 3_500)] {
        let mut sim = Sim::new(HOUR, None);
        for n in 0..7 {
            sim.advance(900);
            sim.beat(true, n);
        }
        sim.truth = Truth::Away;
        let claims = sim.world.agents.get_mut(&agent()).unwrap().claims_mut("i-1").unwrap();
        claims.answered = answered;
        let last = sim.now;
        sim.supersede();
        sim.advance(10_000);
        assert_eq!(sim.recovered.len(), 1);
        assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted);
        assert_eq!(sim.recovered[0].2.since_ms(last), expected_after, "answered before: {answered}");
    }
}

#[test]
fn a_dispatch_that_found_nobody_is_left_to_the_dispatcher_for_a_moment() {
    let mut sim = Sim::new(HOUR, None);
    // Taken back and dispatched again, not started.
    sim.world.executions.get_mut(&execution()).unwrap().attempts[0].started_at = None;
    sim.status("i-1", Status::Gone);
    sim.advance(2_900);
    assert!(sim.is_untouched());
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentGone);
}

#[test]
fn a_mass_of_silences_condemns_nobody_until_the_net_and_time_reopens_the_way() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Away;
    for n in 0..4 {
        let other = AgentId::new(&format!("b{n}")).unwrap();
        let change = |status: Status, since| {
            StatusChanged {
                agent_id: other.clone(),
                instance_id: None,
                previous: None,
                reason: String::new(),
                since,
                evidence: json!(null),
                by: None,
                code: None,
                message: None,
                deadline: None,
                undrained: false,
            }
            .into_event(status)
        };
        let subject = sim.subjects.agent_event(&other);
        let event = change(Status::Disconnected, sim.now);
        sim.append(&subject, other.as_str(), event.into());
    }
    sim.status("i-1", Status::Disconnected);
    assert!(sim.world.is_suspended());
    sim.advance(25_000);
    assert!(sim.is_untouched());
    sim.advance(6_000);
    sim.world.check_breaker(sim.now);
    assert!(!sim.world.is_suspended());
    sim.advance(LIMITS.lost_after_ms - 100);
    assert!(sim.is_untouched(), "every clock starts again after a suspension");
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
}

#[test]
fn neither_silence_nor_absence_is_a_verdict_before_our_own_message_came_back() {
    for (truth, reason) in
        [(Truth::Away, RecoveryReason::AgentLost), (Truth::Empty, RecoveryReason::Orphaned)]
    {
        let mut sim = Sim::new(HOUR, None);
        sim.advance(900);
        sim.beat(true, 0);
        sim.truth = truth;
        sim.canary = false;
        if reason == RecoveryReason::AgentLost {
            sim.status("i-1", Status::Disconnected);
        }
        for _ in 0..30 {
            sim.advance(900);
            if reason == RecoveryReason::Orphaned {
                sim.beat(false, 0);
            }
        }
        assert!(sim.is_untouched(), "{:?}", sim.recovered);
        sim.canary = true;
        sim.advance(500);
        assert_eq!(sim.recovered[0].0, reason);
    }
}

#[test]
fn an_instance_that_we_could_not_ask_has_not_answered_no() {
    for row in [Row::AgentLost, Row::Orphaned, Row::DispatchLost, Row::AgentRestarted] {
        let (mut facts, now) = sample(row);
        assert!(matches!(judge(&facts, &SAMPLE_LIMITS, now).verdict, Verdict::Recover(_)), "{row:?}");
        facts.edge = Edge::Void;
        let judgement = judge(&facts, &SAMPLE_LIMITS, now);
        assert_eq!(judgement.row, Row::Blind, "{row:?}");
        assert!(matches!(judgement.verdict, Verdict::Postpone(_)), "{row:?}: {judgement:?}");
    }
}

#[test]
fn its_agent_is_asked_before_the_safety_net_takes_it() {
    // We were away for longer than the net: it is due by both.
    let (mut facts, _) = healthy_sample();
    facts.waiting = Waiting::Nothing;
    let now = facts.deadline.plus_ms(SAMPLE_LIMITS.stale_after_ms + 1);
    let verdict = |asked| {
        let facts = Facts { asked, ..facts.clone() };
        judge(&facts, &SAMPLE_LIMITS, now).verdict
    };
    assert_eq!(verdict(Asked::No), Verdict::Terminate(RecoveryReason::TimedOut));
    let Verdict::Recover(ended) = verdict(Asked::Confirmed) else { panic!("it is dead") };
    assert_eq!((ended.reason, ended.terminate), (RecoveryReason::TimedOut, TerminateOutcome::Confirmed));
    let Verdict::Recover(stale) = verdict(Asked::Unconfirmed { next_at: now }) else { panic!("it is stale") };
    assert_eq!((stale.reason, stale.terminate), (RecoveryReason::Stale, TerminateOutcome::Failed));
}

#[test]
fn what_is_not_known_is_null_in_the_evidence() {
    let (mut facts, now) = healthy_sample();
    facts.channel.last_at = None;
    facts.sight_since = None;
    facts.listing = Listing::Listed { at: now, rose_at: None };
    let evidence = effect::evidence(&facts, &SAMPLE_LIMITS, None, now);
    for unknown in [
        "/heartbeats/last_age_ms",
        "/heartbeats/silent_at",
        "/list/progress_rose_ms_ago",
        "/sight_since",
        "/agent",
    ] {
        assert_eq!(evidence.pointer(unknown), Some(&json!(null)), "{unknown}: {evidence}");
    }
    assert_eq!(evidence["list"]["list_age_ms"], 0);
}

#[test]
fn every_recovery_says_in_a_sentence_what_happened_and_where() {
    let sim = Sim::new(HOUR, Some(2_000));
    let execution = &sim.world.executions[&execution()];
    let (facts, _) = healthy_sample();
    let mut told = BTreeSet::new();
    for reason in RecoveryReason::ALL {
        let finding = Finding { reason, terminate: TerminateOutcome::Confirmed, true_at: sim.now };
        let held = execution.holder().unwrap();
        let loss = effect::loss(execution, held, &finding, &facts, json!({}), sim.now.plus_ms(7));
        let words: Vec<&str> = loss.message.split([' ', ',']).collect();
        assert!(words.windows(2).any(|pair| pair == ["agent", "a"]) && words.len() > 6, "{}", loss.message);
        assert_eq!((loss.reason, loss.detected_after_ms), (reason, 7));
        told.insert(loss.message);
    }
    assert_eq!(told.len(), RecoveryReason::ALL.len(), "each another one");
}

/// Names the event after its status.
trait IntoEvent {
    fn into_event(self, status: Status) -> AgentEvent;
}

impl IntoEvent for StatusChanged {
    fn into_event(self, status: Status) -> AgentEvent {
        AgentEvent::status(status, self)
    }
}

#[test]
fn an_entry_that_is_no_event_changes_nothing_but_the_sequence() {
    let mut sim = Sim::new(HOUR, None);
    let before = sim.world.executions[&execution()].clone();
    let subject = sim.subjects.execution_event(&execution());
    assert!(sim.world.apply(&sim.subjects, &subject, sim.seq + 1, b"{}", sim.now).is_err());
    let after = &sim.world.executions[&execution()];
    assert_eq!((after.seq, after.state), (sim.seq + 1, before.state), "the next append has to name it");
    assert_eq!(sim.world.counters.invalid, 1);
}
