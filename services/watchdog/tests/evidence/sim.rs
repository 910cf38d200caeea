//! One agent with one execution, as a watchdog sees them, in virtual time.

use std::collections::BTreeMap;

use rollcall_control::RegistryList;
use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Pool, Timestamp,
    agent::Status,
    event::{
        AgentEvent, Dispatched, Event, EventBody, ExecutionEvent, PayloadRef, Profile, RecoveryReason,
        Started, StatusChanged, Submitted, Superseded, TerminateOutcome,
    },
    subject::Subjects,
    wire::{Delivery, Endpoint, Heartbeat, OnLoss, TerminateState},
};
use serde_json::json;
use watchdog::{
    breaker::BreakerLimits,
    decide::{Look, Verdict},
    effect,
    facts::{Edge, Limits, Promise, Waiting},
    sight::Void,
    state::{Config, Looks, World},
};

pub const LIMITS: Limits = Limits {
    dispatch_grace_ms: 5_000,
    lost_after_ms: 4_000,
    stale_after_ms: 60_000,
    terminate_grace_ms: 500,
    failure_threshold: 3,
    interval_ms: 1_000,
};

const CONFIG: Config = Config {
    limits: LIMITS,
    breaker: BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 30_000 },
    recovery_rate: 100,
};

pub const HOUR: u64 = 3_600_000;

/// A registry is called this often.
pub const CYCLE_MS: u64 = 3_000;

/// What an instance would answer if it were asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// It lists the execution.
    Lists,
    /// It answers without it.
    Empty,
    /// The server knows of nobody there.
    Away,
    /// Our guard refuses the URL of its registry, and the server knows of nobody who could be pinged instead.
    Nobody,
    /// Nothing comes back.
    Mute,
    /// It can't be asked: our guard refuses its URL, or it is our own network.
    Void,
}

/// How far the execution got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// Its agent was asked to take it.
    Dispatched,
    /// And accepted.
    Started,
    /// Nobody was asked: it is delivered externally.
    Granted,
}

pub struct Sim {
    pub world: World,
    pub subjects: Subjects,
    pub now: Timestamp,
    pub seq: u64,
    pub beat_seq: u64,
    pub truth: Truth,
    /// What becomes of a request to end it.
    pub ending: Option<TerminateState>,
    /// What it says of the end of work that it never took.
    pub promise: Option<TerminateState>,
    /// How often it was asked for that.
    pub promises: usize,
    pub waiting: Waiting,
    /// Our own message comes back through the bus.
    pub canary: bool,
    pub recovered: Vec<(RecoveryReason, TerminateOutcome, Timestamp)>,
    pub terminations: usize,
    /// Work that was done by the judgements, to see that nothing spins.
    pub works: usize,
    /// Where its agent is driven over HTTP, if it is.
    pub control: Option<Endpoint>,
    /// The instance that is given work, and beats.
    pub instance: &'static str,
    /// How long its agent may be away, where the work says so itself.
    pub lost_after_ms: Option<u64>,
    log: Vec<(String, Vec<u8>)>,
}

pub fn t(ms: i64) -> Timestamp {
    Timestamp::from_millis(1_000_000 + ms)
}

pub fn agent() -> AgentId {
    AgentId::new("a").unwrap()
}

pub fn instance(name: &str) -> InstanceId {
    InstanceId::new(name).unwrap()
}

pub fn execution() -> ExecutionId {
    ExecutionId::new("x").unwrap()
}

impl Sim {
    /// One agent with one running execution, seen by a watchdog that just opened its eyes.
    pub fn new(timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Self {
        Self::begun(Begun::Started, timeout_ms, stall_timeout_ms)
    }

    pub fn begun(begun: Begun, timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Self {
        Self::empty().with_work(begun, timeout_ms, stall_timeout_ms)
    }

    /// The same, of an agent that is driven over HTTP.
    pub fn driven(begun: Begun, timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Self {
        let mut sim = Self::empty();
        sim.control = Some(Endpoint { kind: "http".to_owned(), url: "http://h.test".to_owned() });
        sim.with_work(begun, timeout_ms, stall_timeout_ms)
    }

    /// The same, of one that an operator described in a file: it never beats.
    pub fn of_file(begun: Begun, timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Self {
        let mut sim = Self::empty();
        sim.control = Some(Endpoint { kind: "http".to_owned(), url: "http://h.test".to_owned() });
        sim.instance = "file-1";
        sim.with_work(begun, timeout_ms, stall_timeout_ms)
    }

    /// Work that says itself how long its agent may be away.
    pub fn of_own_lost_after(lost_after_ms: u64) -> Self {
        Self { lost_after_ms: Some(lost_after_ms), ..Self::empty() }.with_work(Begun::Started, HOUR, None)
    }

    fn with_work(self, begun: Begun, timeout_ms: u64, stall_timeout_ms: Option<u64>) -> Self {
        let mut sim = self;
        sim.register(sim.instance, 1_000);
        sim.submit("x", begun, stall_timeout_ms);
        sim.dispatch("x", timeout_ms);
        if begun == Begun::Started {
            sim.started();
        }
        sim.open_eyes();
        sim
    }

    pub fn empty() -> Self {
        Self {
            world: World::new(CONFIG),
            subjects: Subjects::default(),
            now: t(0),
            seq: 0,
            beat_seq: 0,
            truth: Truth::Lists,
            ending: Some(TerminateState::Terminated),
            promise: Some(TerminateState::NotRunning),
            promises: 0,
            waiting: Waiting::Nothing,
            canary: true,
            recovered: Vec::new(),
            terminations: 0,
            works: 0,
            control: None,
            instance: "i-1",
            lost_after_ms: None,
            log: Vec::new(),
        }
    }

    pub fn submit(&mut self, id: &str, begun: Begun, stall_timeout_ms: Option<u64>) {
        let submitted = Submitted {
            execution_id: ExecutionId::new(id).unwrap(),
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
            lost_after_ms: self.lost_after_ms,
            delivery: if begun == Begun::Granted { Delivery::External } else { Delivery::Push },
            labels: BTreeMap::new(),
            request_sha256: String::new(),
        };
        self.execution_event(id, submitted.into());
    }

    pub fn dispatch(&mut self, id: &str, timeout_ms: u64) {
        let dispatched = Dispatched {
            execution_id: ExecutionId::new(id).unwrap(),
            attempt: 1,
            agent_id: agent(),
            instance_id: instance(self.instance),
            deadline: self.now.plus_ms(timeout_ms),
            timeout_ms,
        };
        self.execution_event(id, dispatched.into());
    }

    pub fn started(&mut self) {
        let (execution_id, agent_id, instance_id) = (execution(), agent(), instance(self.instance));
        self.execution(Started { execution_id, attempt: 1, agent_id, instance_id }.into());
    }

    fn open_eyes(&mut self) {
        self.world.sight.set_connected(true);
        self.world.sight.set_caught_up(true);
        self.world.check_breaker(self.now);
        self.world.settle_all(self.now);
        self.see();
    }

    /// Another watchdog process takes over: it knows what the log holds, and nothing else.
    pub fn restart(&mut self, down_ms: u64) {
        self.now = self.now.plus_ms(down_ms);
        self.world = World::new(CONFIG);
        for (at, (subject, bytes)) in self.log.iter().enumerate() {
            self.world.apply(&self.subjects, subject, at as u64 + 1, bytes, self.now).unwrap();
        }
        self.open_eyes();
    }

    pub fn append(&mut self, subject: &str, about: &str, body: EventBody) {
        self.seq += 1;
        let event = Event {
            id: uuid::Uuid::nil(),
            source: "test".to_owned(),
            subject: about.to_owned(),
            time: self.now,
            body,
        };
        self.log.push((subject.to_owned(), event.encode()));
        self.world.apply(&self.subjects, subject, self.seq, &event.encode(), self.now).unwrap();
        self.world.after_batch(self.now);
    }

    pub fn execution_event(&mut self, id: &str, event: ExecutionEvent) {
        self.append(&self.subjects.execution_event(&ExecutionId::new(id).unwrap()), id, event.into());
    }

    pub fn execution(&mut self, event: ExecutionEvent) {
        self.execution_event("x", event);
    }

    fn agent_event(&mut self, id: &str, event: AgentEvent) {
        self.append(&self.subjects.agent_event(&AgentId::new(id).unwrap()), id, event.into());
    }

    pub fn register(&mut self, name: &str, interval_ms: u64) {
        let profile = self.profile(name, interval_ms);
        self.agent_event("a", AgentEvent::Registered(profile));
        self.status(name, Status::Connected);
    }

    /// Its heartbeats name another way to drive it than before.
    pub fn drive(&mut self, control: Option<Endpoint>) {
        self.control = control;
        let profile = self.profile(self.instance, 1_000);
        self.agent_event("a", AgentEvent::Updated(profile));
    }

    fn profile(&self, name: &str, interval_ms: u64) -> Profile {
        Profile {
            agent_id: agent(),
            instance_id: instance(name),
            capacity: 1,
            pool: Pool::default(),
            interval_ms: Some(interval_ms),
            timeout_ms: None,
            version: None,
            labels: BTreeMap::new(),
            probe: None,
            control: self.control.clone(),
        }
    }

    pub fn status(&mut self, name: &str, status: Status) {
        self.status_of("a", Some(name), status);
    }

    pub fn status_of(&mut self, id: &str, name: Option<&str>, status: Status) {
        self.status_by(id, name, status, None);
    }

    /// Its instance is gone, on somebody's word.
    pub fn gone(&mut self, by: Option<&str>) {
        self.status_by("a", Some("i-1"), Status::Gone, by);
    }

    fn status_by(&mut self, id: &str, name: Option<&str>, status: Status, by: Option<&str>) {
        let change = StatusChanged {
            agent_id: AgentId::new(id).unwrap(),
            instance_id: name.map(instance),
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
        self.agent_event(id, AgentEvent::status(status, change));
    }

    /// So many others fall silent at once that the breaker opens.
    pub fn mass_failure(&mut self) {
        for n in 0..4 {
            self.status_of(&format!("b{n}"), None, Status::Disconnected);
        }
        // Two are heard: that is what makes the others' silence their own in the end.
        for n in 4..6 {
            self.status_of(&format!("b{n}"), None, Status::Connected);
        }
        assert!(self.world.is_suspended());
    }

    pub fn supersede(&mut self) {
        let next = if self.instance == "i-1" { "i-2" } else { "file-2" };
        self.agent_event(
            "a",
            AgentEvent::Superseded(Superseded {
                agent_id: agent(),
                instance_id: instance(self.instance),
                by_instance_id: instance(next),
            }),
        );
        self.register(next, 1_000);
    }

    pub fn beat(&mut self, lists: bool, progress: u64) {
        self.beat_seq += 1;
        let executions =
            if lists { vec![json!({"id": "x", "attempt": 1, "progress": progress})] } else { vec![] };
        let beat = json!({
            "instance_id": self.instance, "seq": self.beat_seq, "state": "ready", "capacity": 1,
            "interval_ms": 1000, "executions": executions,
        })
        .to_string();
        self.world.beat("a", &Heartbeat::read("a", beat.as_bytes()).unwrap(), self.now);
        self.work();
    }

    /// Its registry answers a cycle's call.
    pub fn registry(&mut self, running: &[&str]) {
        self.registry_of(running, &[]);
    }

    /// The same, with what it knows of besides.
    pub fn registry_of(&mut self, running: &[&str], known: &[&str]) {
        self.registry_answers(running, known);
        self.work();
    }

    fn registry_answers(&mut self, running: &[&str], known: &[&str]) {
        let ids = |ids: &[&str]| ids.iter().map(|&id| ExecutionId::new(id).unwrap()).collect();
        let list = RegistryList { running: ids(running), known: ids(known) };
        self.world.registry(&agent(), &list, CYCLE_MS, self.now);
    }

    /// It is asked between two cycles: what it answers is a list as well.
    fn registry_is_asked(&mut self) {
        match self.truth {
            Truth::Lists if self.control.is_some() => self.registry_answers(&["x"], &[]),
            Truth::Empty if self.control.is_some() => self.registry_answers(&[], &[]),
            _ => {}
        }
    }

    pub fn see(&mut self) {
        let epoch = self.world.sight.epoch();
        self.world.proven(epoch, self.now);
        self.work();
    }

    /// We are blind for so long.
    pub fn blind(&mut self, void: Void, ms: u64) {
        self.world.void(void);
        self.advance(ms);
        self.see();
    }

    /// Moves time on, waking whenever something is due.
    pub fn advance(&mut self, ms: u64) {
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
    pub fn work(&mut self) {
        while let Some((id, attempt)) = self.world.take_due(self.now) {
            self.works += 1;
            let mut looks = Looks::default();
            let (mut last, mut retry_at) = (None, None);
            for _ in 0..10 {
                let Some((judgement, facts)) = self.world.judge(&id, &looks, self.now) else { break };
                last = Some((judgement, facts.clone()));
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
                        looks.of_started = facts.started;
                        self.registry_is_asked();
                        looks.edge = match self.truth {
                            // Over HTTP nobody says that nobody is there.
                            Truth::Away if self.control.is_some() => Edge::NoAnswer,
                            Truth::Lists => {
                                self.world.note_full_answer(&id, self.now);
                                Edge::Lists
                            }
                            Truth::Empty => {
                                let word_ms = facts.channel.word_ms();
                                Edge::ListsNot { times: self.world.note_empty_answer(&id, word_ms, self.now) }
                            }
                            Truth::Away | Truth::Nobody => Edge::NoResponders,
                            Truth::Mute => Edge::NoAnswer,
                            Truth::Void => Edge::Void,
                        };
                    }
                    Verdict::Look(Look::Promise(_)) => {
                        self.promises += 1;
                        looks.promise = match self.promise {
                            Some(TerminateState::Terminated) => Promise::Ended,
                            Some(TerminateState::NotRunning) => Promise::NotRunning,
                            Some(TerminateState::StillRunning) => {
                                self.world.note_full_answer(&id, self.now);
                                looks.edge = Edge::Lists;
                                Promise::Unasked
                            }
                            None => Promise::NoAnswer,
                        };
                        looks.waiting = Waiting::Unasked;
                    }
                    Verdict::Terminate(reason) => {
                        self.terminations += 1;
                        self.world.note_asked(&id, reason, self.ending, self.now);
                        looks.waiting = Waiting::Unasked;
                    }
                    Verdict::Recover(finding) => {
                        let execution = self.world.executions.get(&id).unwrap();
                        let held = execution.holder().unwrap();
                        let loss = effect::loss(execution, held, &finding, &facts, json!({}), self.now);
                        let event = execution.lose(loss).unwrap();
                        self.recovered.push((finding.reason, finding.terminate, self.now));
                        self.execution_event(id.as_str(), event);
                        last = None;
                        break;
                    }
                }
            }
            self.world.landed((&id, attempt), last, retry_at, self.now);
        }
    }

    pub fn is_untouched(&self) -> bool {
        self.recovered.is_empty() && self.terminations == 0
    }
}
