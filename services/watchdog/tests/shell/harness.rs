//! A private nats-server, events appended as the prober and the dispatcher would, and fake agents on plain NATS.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Prefix, Timestamp,
    agent::Status,
    event::{
        AgentEvent, CancelRequested, Completed, Dispatched, Event, EventBody, ExecutionEvent, Failed,
        PayloadRef, Profile, Recovered, Started, StatusChanged, Submitted, Superseded, SystemEventKind,
    },
    subject::{AgentVerb, Subjects},
    wire::{Delivery, ErrorBody, OnLoss},
};
use rollcall_nats::{Append, Bus, EventLog, Reports, ensure_streams, testing::NatsServer};
use rollcall_service::{Context, Settings};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long a condition may take; far above what it needs, so that only a failure ends here.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap())
}

pub fn agent_id(text: &str) -> AgentId {
    AgentId::new(text).unwrap()
}

pub fn instance_id(text: &str) -> InstanceId {
    InstanceId::new(text).unwrap()
}

pub fn execution_id(text: &str) -> ExecutionId {
    ExecutionId::new(text).unwrap()
}

async fn report(reports: &Reports, subject: String, outcome: &str) {
    let report = json!({"instance_id": "i-1", "attempt": 1, "outcome": outcome});
    reports.publish(&subject, report.to_string().into()).await.unwrap();
}

pub struct Fleet {
    pub server: NatsServer,
    pub bus: Bus,
    pub log: EventLog,
    pub reports: Reports,
    pub subjects: Subjects,
    settings: BTreeMap<&'static str, String>,
}

/// A running watchdog.
pub struct Dog {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Dog {
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
    }
}

impl Fleet {
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// On a server with these lines of configuration.
    pub async fn start_with(config: Option<&str>) -> Self {
        let server = NatsServer::start_with(config).unwrap();
        let bus = server.bus("rollcall").await;
        ensure_streams(&bus).await.unwrap();
        let settings = BTreeMap::from([
            ("ROLLCALL_NATS_URL", server.url()),
            ("ROLLCALL_HEARTBEAT_INTERVAL_MS", "1000".to_owned()),
            ("ROLLCALL_FAILURE_THRESHOLD", "1".to_owned()),
            ("ROLLCALL_DISPATCH_GRACE_MS", "1000".to_owned()),
            ("ROLLCALL_LOST_AFTER_MS", "1000".to_owned()),
            ("ROLLCALL_TERMINATE_GRACE_MS", "200".to_owned()),
            ("ROLLCALL_CYCLE_INTERVAL_MS", "1000".to_owned()),
        ]);
        Self {
            log: EventLog::new(&bus),
            reports: Reports::new(&bus),
            subjects: Subjects::new(Prefix::default()),
            server,
            bus,
            settings,
        }
    }

    pub fn set(&mut self, name: &'static str, value: &str) {
        self.settings.insert(name, value.to_owned());
    }

    /// What a watchdog gets.
    pub fn context(&self) -> Context {
        let environment =
            self.settings.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let settings = Settings::load_from("watchdog", environment).unwrap().settings;
        Context::for_tests(watchdog::PROGRAM, settings)
    }

    /// Starts a watchdog and waits until it is ready and sees.
    pub async fn watchdog(&self) -> Dog {
        self.watchdog_in(self.context()).await
    }

    /// The same, of this process.
    pub async fn watchdog_in(&self, context: Context) -> Dog {
        let (stop, readiness) = (context.shutdown.clone(), context.readiness.clone());
        let task = tokio::spawn(watchdog::run(context));
        tokio::time::timeout(PATIENCE, readiness.ready()).await.unwrap();
        let dog = Dog { stop, task };
        self.until("the watchdog sees", async || {
            self.api("watchdog.status", json!({})).await["sees"].as_bool() == Some(true)
        })
        .await;
        dog
    }

    pub async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !condition().await {
            assert!(tokio::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn api(&self, verb: &str, request: Value) -> Value {
        let payload = Bytes::from(request.to_string());
        match self.bus.request(self.subjects.api(verb), payload, Duration::from_secs(5)).await {
            Ok(message) => serde_json::from_slice(&message.payload).unwrap(),
            Err(error) => json!({"error": {"code": "none", "message": error.to_string()}}),
        }
    }

    pub async fn append(&self, subject: String, about: &str, body: EventBody) -> u64 {
        loop {
            let last = self.log.last_seq_of(&subject).await.unwrap();
            let id = uuid::Uuid::now_v7();
            let event = Event {
                id,
                source: "/rollcall/test/1".to_owned(),
                subject: about.to_owned(),
                time: now(),
                body: body.clone(),
            };
            let appended =
                self.log.append(&subject, &id.to_string(), event.encode().into(), last).await.unwrap();
            if let Append::Appended { seq } = appended {
                return seq;
            }
        }
    }

    pub async fn agent_event(&self, agent: &str, event: AgentEvent) -> u64 {
        self.append(self.subjects.agent_event(&agent_id(agent)), agent, event.into()).await
    }

    pub async fn execution_event(&self, event: ExecutionEvent) -> u64 {
        let id = event.execution_id().clone();
        self.append(self.subjects.execution_event(&id), id.as_str(), event.into()).await
    }

    /// What the prober appends at the first heartbeat of an instance.
    pub async fn register(&self, agent: &str, instance: &str) {
        self.register_with(agent, instance, None).await;
    }

    pub async fn register_with(
        &self,
        agent: &str,
        instance: &str,
        control: Option<rollcall_core::wire::Endpoint>,
    ) {
        let profile = Profile {
            agent_id: agent_id(agent),
            instance_id: instance_id(instance),
            capacity: 8,
            pool: rollcall_core::Pool::default(),
            interval_ms: Some(1000),
            timeout_ms: None,
            version: None,
            labels: BTreeMap::new(),
            probe: None,
            control,
        };
        self.agent_event(agent, AgentEvent::Registered(profile)).await;
        self.status(agent, instance, Status::Connected, "first_heartbeat").await;
    }

    pub async fn status(&self, agent: &str, instance: &str, status: Status, reason: &str) {
        let change = StatusChanged {
            agent_id: agent_id(agent),
            instance_id: Some(instance_id(instance)),
            previous: None,
            reason: reason.to_owned(),
            since: now(),
            evidence: Value::Null,
            by: match reason {
                "sigterm" => Some("instance".to_owned()),
                "removed from the agents file" | "operator" => Some("operator".to_owned()),
                _ => None,
            },
            code: None,
            message: None,
            deadline: None,
            undrained: false,
        };
        self.agent_event(agent, AgentEvent::status(status, change)).await;
    }

    /// An instance answers the next request for this, and no more after that.
    pub async fn answers_once(
        &self,
        agent: &str,
        instance: &str,
        verb: AgentVerb,
        reply: Value,
    ) -> JoinHandle<()> {
        let subject = self.subjects.agent_request(&agent_id(agent), &instance_id(instance), verb);
        let mut requests = self.bus.subscribe(subject).await.unwrap();
        self.bus.flush().await.unwrap();
        let bus = self.bus.clone();
        tokio::spawn(async move {
            let request = requests.next().await.unwrap();
            bus.reply(&request, Bytes::from(reply.to_string())).await;
        })
    }

    /// Of the requests for this every other one gets lost, the first too. How many were answered.
    pub async fn answers_every_other(
        &self,
        agent: &str,
        instance: &str,
        verb: AgentVerb,
        reply: Value,
    ) -> Arc<AtomicU64> {
        let subject = self.subjects.agent_request(&agent_id(agent), &instance_id(instance), verb);
        let mut requests = self.bus.subscribe(subject).await.unwrap();
        self.bus.flush().await.unwrap();
        let (bus, answered) = (self.bus.clone(), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&answered);
        tokio::spawn(async move {
            while requests.next().await.is_some() {
                let Some(request) = requests.next().await else { return };
                bus.reply(&request, Bytes::from(reply.to_string())).await;
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        answered
    }

    pub async fn superseded(&self, agent: &str, old: &str, new: &str) {
        self.agent_event(
            agent,
            AgentEvent::Superseded(Superseded {
                agent_id: agent_id(agent),
                instance_id: instance_id(old),
                by_instance_id: instance_id(new),
            }),
        )
        .await;
    }

    /// What the dispatcher appends until an execution is dispatched.
    pub async fn dispatch(&self, id: &str, agent: &str, instance: &str, job: Job) {
        let execution = execution_id(id);
        let request = Submitted {
            execution_id: execution.clone(),
            attempt: 1,
            agent_id: Some(agent_id(agent)),
            pool: rollcall_core::Pool::default(),
            input: PayloadRef { bytes: 4, sha256: "0".repeat(64), seq: 1, attempt: 1 },
            timeout_ms: Some(job.timeout_ms),
            priority: 5,
            queue_ttl_ms: 86_400_000,
            on_loss: job.on_loss,
            max_attempts: 3,
            stall_timeout_ms: job.stall_timeout_ms,
            lost_after_ms: None,
            delivery: job.delivery,
            labels: BTreeMap::new(),
            request_sha256: "0".repeat(64),
        };
        self.execution_event(request.into()).await;
        self.execution_event(
            Dispatched {
                execution_id: execution,
                attempt: 1,
                agent_id: agent_id(agent),
                instance_id: instance_id(instance),
                deadline: now().plus_ms(job.timeout_ms),
                timeout_ms: job.timeout_ms,
            }
            .into(),
        )
        .await;
    }

    /// And until it runs.
    pub async fn run(&self, id: &str, agent: &str, instance: &str, job: Job) {
        self.dispatch(id, agent, instance, job).await;
        self.execution_event(
            Started {
                execution_id: execution_id(id),
                attempt: 1,
                agent_id: agent_id(agent),
                instance_id: instance_id(instance),
            }
            .into(),
        )
        .await;
    }

    pub async fn fail(&self, id: &str, agent: &str, instance: &str) {
        self.execution_event(
            Failed {
                execution_id: execution_id(id),
                attempt: 1,
                agent_id: Some(agent_id(agent)),
                instance_id: Some(instance_id(instance)),
                error: ErrorBody { code: "test".to_owned(), message: "it failed".to_owned() },
                outcome: None,
            }
            .into(),
        )
        .await;
    }

    pub async fn complete(&self, id: &str, agent: &str, instance: &str) {
        self.execution_event(
            Completed {
                execution_id: execution_id(id),
                attempt: 1,
                agent_id: Some(agent_id(agent)),
                instance_id: Some(instance_id(instance)),
                result: None,
                late: false,
            }
            .into(),
        )
        .await;
    }

    pub async fn cancel(&self, id: &str) {
        self.execution_event(
            CancelRequested {
                execution_id: execution_id(id),
                attempt: 1,
                agent_id: None,
                reason: "test".to_owned(),
                by: "test".to_owned(),
            }
            .into(),
        )
        .await;
    }

    /// Every `execution.recovered` so far.
    pub async fn recoveries(&self) -> Vec<Recovered> {
        let mut found = Vec::new();
        let mut after = 0;
        loop {
            let page = self.log.read_range(after, 500, &[]).await.unwrap();
            for entry in &page.entries {
                if let Ok(Event { body: EventBody::Execution(ExecutionEvent::Recovered(event)), .. }) =
                    Event::decode(&entry.bytes)
                {
                    found.push(event);
                }
            }
            after = page.next_after;
            if !page.more {
                return found;
            }
        }
    }

    /// Waits for the recovery of this execution.
    pub async fn recovery(&self, id: &str) -> Recovered {
        let found = Mutex::new(None);
        self.until(&format!("{id} is recovered"), async || {
            let event = self.recoveries().await.into_iter().find(|r| r.execution_id.as_str() == id);
            let there = event.is_some();
            *found.lock().unwrap() = event;
            there
        })
        .await;
        found.into_inner().unwrap().unwrap()
    }

    pub async fn system_events(&self) -> Vec<SystemEventKind> {
        let subject = self.subjects.system_event(watchdog::SERVICE);
        let entries = self.log.history(&subject).await.unwrap();
        entries
            .iter()
            .filter_map(|entry| match Event::decode(&entry.bytes).ok()?.body {
                EventBody::System(event) => Some(event.kind),
                _ => None,
            })
            .collect()
    }

    /// What the last event about the watchdog itself says.
    pub async fn last_system_event(&self) -> Value {
        let last = self.log.last(&self.subjects.system_event(watchdog::SERVICE)).await.unwrap().unwrap();
        serde_json::from_slice::<Value>(&last.bytes).unwrap()["data"].clone()
    }

    pub async fn report(&self, agent: &str, id: &str, outcome: &str) {
        report(&self.reports, self.subjects.report(&agent_id(agent), &execution_id(id)), outcome).await;
    }

    /// The row `explain` names for an execution.
    pub async fn row(&self, id: &str) -> String {
        self.api("explain", json!({"execution_id": id})).await["row"].as_str().unwrap_or("?").to_owned()
    }
}

/// How a piece of work is submitted.
#[derive(Clone, Copy)]
pub struct Job {
    pub timeout_ms: u64,
    pub stall_timeout_ms: Option<u64>,
    pub on_loss: OnLoss,
    pub delivery: Delivery,
}

pub const LONG: Job =
    Job { timeout_ms: 600_000, stall_timeout_ms: None, on_loss: OnLoss::Fail, delivery: Delivery::Push };

/// How a fake agent answers a terminate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// It ends the work and says so.
    Obeys,
    /// The same, and the work was faster: it has reported that it is done.
    Finishes,
    /// It says that it goes on.
    Refuses,
    /// It says nothing.
    Ignores,
}

#[derive(Debug)]
struct Inside {
    listed: Mutex<Vec<(String, u32, Option<u64>)>>,
    manner: Mutex<Manner>,
    beats: AtomicBool,
    seq: AtomicU64,
    asked: Mutex<Vec<Value>>,
    /// What has just finished and is to be reported before anything is answered.
    finished: Mutex<Option<String>>,
}

/// A fake agent: one instance that beats and answers.
pub struct FakeAgent {
    inside: Arc<Inside>,
    tasks: Vec<JoinHandle<()>>,
}

/// Time between two heartbeats of a fake agent: well inside the interval it names.
const BEAT: Duration = Duration::from_millis(200);

impl FakeAgent {
    /// One that beats and answers requests.
    pub async fn start(fleet: &Fleet, id: &str, instance: &str) -> Self {
        Self::start_from(fleet, id, instance, 0).await
    }

    /// The same, its heartbeats counting on from `seq`.
    pub async fn start_from(fleet: &Fleet, id: &str, instance: &str, seq: u64) -> Self {
        let mut agent = Self::start_without_requests(fleet, id, instance);
        agent.inside.seq.fetch_add(seq, Ordering::SeqCst);
        let subject = fleet.subjects.agent_requests(&agent_id(id), &instance_id(instance));
        let mut requests = fleet.bus.subscribe(subject).await.unwrap();
        fleet.bus.flush().await.unwrap();
        let (bus, inside, instance) = (fleet.bus.clone(), Arc::clone(&agent.inside), instance.to_owned());
        let (id, reports, subjects) = (agent_id(id), fleet.reports.clone(), fleet.subjects.clone());
        agent.tasks.push(tokio::spawn(async move {
            while let Some(message) = requests.next().await {
                if let Some(reply) = inside.answer(&message.subject, &message.payload, &instance) {
                    let finished = inside.finished.lock().unwrap().take();
                    if let Some(done) = finished {
                        report(&reports, subjects.report(&id, &execution_id(&done)), "completed").await;
                    }
                    bus.reply(&message, Bytes::from(reply.to_string())).await;
                }
            }
        }));
        agent
    }

    /// One that only beats: the smallest possible agent.
    pub fn start_without_requests(fleet: &Fleet, id: &str, instance: &str) -> Self {
        let inside = Arc::new(Inside {
            listed: Mutex::default(),
            manner: Mutex::new(Manner::Obeys),
            beats: AtomicBool::new(true),
            seq: AtomicU64::new(0),
            asked: Mutex::default(),
            finished: Mutex::default(),
        });
        let (bus, subject) = (fleet.bus.clone(), fleet.subjects.heartbeat(&agent_id(id)));
        let (shared, name) = (Arc::clone(&inside), instance.to_owned());
        let beating = tokio::spawn(async move {
            let mut tick = tokio::time::interval(BEAT);
            loop {
                tick.tick().await;
                if shared.beats.load(Ordering::SeqCst) {
                    let beat = shared.heartbeat(&name, "ready");
                    let _ = bus.publish(subject.clone(), Bytes::from(beat.to_string())).await;
                }
            }
        });
        Self { inside, tasks: vec![beating] }
    }

    pub fn list(&self, ids: &[&str]) {
        *self.inside.listed.lock().unwrap() = ids.iter().map(|id| ((*id).to_owned(), 1, None)).collect();
    }

    pub fn list_more(&self, id: &str) {
        self.inside.listed.lock().unwrap().push((id.to_owned(), 1, None));
    }

    pub fn list_with_progress(&self, id: &str, progress: u64) {
        *self.inside.listed.lock().unwrap() = vec![(id.to_owned(), 1, Some(progress))];
    }

    pub fn manner(&self, manner: Manner) {
        *self.inside.manner.lock().unwrap() = manner;
    }

    /// Heartbeats on or off; requests are answered all the same.
    pub fn beat(&self, on: bool) {
        self.inside.beats.store(on, Ordering::SeqCst);
    }

    /// Requests to end something, as they came.
    pub fn terminations(&self) -> Vec<Value> {
        self.inside.asked.lock().unwrap().clone()
    }

    /// The process is away: no heartbeats, and the server says that nobody listens.
    pub async fn kill(mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Inside {
    fn executions(&self) -> Vec<Value> {
        let listed = self.listed.lock().unwrap();
        listed
            .iter()
            .map(|(id, attempt, progress)| json!({"id": id, "attempt": attempt, "progress": progress}))
            .collect()
    }

    fn heartbeat(&self, instance: &str, state: &str) -> Value {
        json!({
            "instance_id": instance,
            "seq": self.seq.fetch_add(1, Ordering::SeqCst) + 1,
            "state": state,
            "capacity": 8,
            "interval_ms": 1000,
            "executions": self.executions(),
        })
    }

    fn answer(&self, subject: &str, payload: &[u8], instance: &str) -> Option<Value> {
        match subject.rsplit('.').next().unwrap() {
            "executions" => Some(json!({
                "instance_id": instance,
                "seq": self.seq.load(Ordering::SeqCst),
                "executions": self.executions(),
            })),
            "ping" => Some(json!({"instance_id": instance, "state": "ready"})),
            "terminate" => {
                let request: Value = serde_json::from_slice(payload).unwrap();
                let id = request["execution_id"].as_str().unwrap().to_owned();
                self.asked.lock().unwrap().push(request);
                let manner = *self.manner.lock().unwrap();
                if manner == Manner::Finishes {
                    *self.finished.lock().unwrap() = Some(id.clone());
                }
                match manner {
                    Manner::Ignores => None,
                    Manner::Refuses => Some(json!({"state": "still_running"})),
                    Manner::Obeys | Manner::Finishes => {
                        let mut listed = self.listed.lock().unwrap();
                        let before = listed.len();
                        listed.retain(|(listed, _, _)| *listed != id);
                        let state = if listed.len() < before { "terminated" } else { "not_running" };
                        Some(json!({"state": state}))
                    }
                }
            }
            _ => None,
        }
    }
}
