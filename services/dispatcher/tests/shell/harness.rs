//! A private NATS and Redis, the dispatcher in this process, and events as the prober appends them.

use std::{collections::BTreeMap, ffi::OsString, time::Duration};

use bytes::Bytes;
use rollcall_capacity::testing::RedisServer;
use rollcall_core::{
    AgentId, Clock as _, ExecutionId, InstanceId, Pool, Timestamp,
    agent::Status,
    event::{
        AgentEvent, Dispatched, Event, EventBody, ExecutionEvent, PayloadRef, Profile, StatusChanged,
        Submitted,
    },
    subject::Subjects,
    time::SystemClock,
    wire::{Delivery, OnLoss},
};
use rollcall_nats::{Append, Bus, EventLog, Reports, ensure_streams, testing::NatsServer};
use rollcall_service::{Context, Settings};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// How long a condition may take; far above what it needs, so that only a failure ends here.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Nobody audits by himself within a test.
const NEVER_MS: &str = "3600000";

pub fn wall() -> Timestamp {
    SystemClock::new().now()
}

pub struct Fleet {
    nats: NatsServer,
    pub redis: RedisServer,
    pub bus: Bus,
    pub log: EventLog,
    pub reports: Reports,
    pub subjects: Subjects,
}

/// A running dispatcher.
pub struct Dispatcher {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Dispatcher {
    /// Waits for nothing; [`Self::stop`] does.
    pub fn tell_to_stop(&self) {
        self.stop.cancel();
    }

    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
    }
}

impl Fleet {
    pub async fn start() -> Self {
        let (nats, redis) = (NatsServer::start().unwrap(), RedisServer::start());
        let bus = nats.bus("rollcall").await;
        ensure_streams(&bus).await.unwrap();
        Self {
            log: EventLog::new(&bus),
            reports: Reports::new(&bus),
            bus,
            subjects: Subjects::default(),
            nats,
            redis,
        }
    }

    /// What a dispatcher gets.
    pub fn context(&self) -> Context {
        self.context_with(&[])
    }

    /// The same, with these settings as well.
    pub fn context_with(&self, more: &[(&str, &str)]) -> Context {
        let mut environment = vec![
            ("ROLLCALL_NATS_URL", self.nats.url()),
            ("ROLLCALL_REDIS_URL", self.redis.url()),
            ("ROLLCALL_AUDIT_INTERVAL_MS", NEVER_MS.to_owned()),
        ];
        environment.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let environment =
            environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let settings = Settings::load_from("dispatcher", environment).unwrap().settings;
        Context::for_tests(dispatcher::PROGRAM, settings)
    }

    /// Starts a dispatcher and waits until it is ready.
    pub async fn dispatcher_in(&self, context: Context) -> Dispatcher {
        let (stop, readiness) = (context.shutdown.clone(), context.readiness.clone());
        let task = tokio::spawn(dispatcher::run(context));
        tokio::time::timeout(PATIENCE, readiness.ready()).await.expect("the dispatcher is ready");
        Dispatcher { stop, task }
    }

    pub async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let end = tokio::time::Instant::now() + PATIENCE;
        while !condition().await {
            assert!(tokio::time::Instant::now() < end, "not within {PATIENCE:?}: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// An instance of an agent with room registers.
    pub async fn registers(&self, id: &AgentId, instance: &str) {
        self.registers_in(&Pool::default(), 8, id, instance).await;
    }

    /// The same, in this pool and with this room.
    pub async fn registers_in(&self, pool: &Pool, capacity: u32, id: &AgentId, instance: &str) {
        let profile = Profile {
            agent_id: id.clone(),
            instance_id: InstanceId::new(instance).unwrap(),
            capacity,
            pool: pool.clone(),
            interval_ms: None,
            timeout_ms: None,
            version: None,
            labels: BTreeMap::new(),
            probe: None,
            control: None,
        };
        self.append(self.subjects.agent_event(id), id.as_str(), AgentEvent::Registered(profile).into()).await;
    }

    /// What the prober writes of an agent with room.
    pub async fn agent(&self, id: &AgentId, instance: &str) {
        self.registers(id, instance).await;
        self.connected(id, instance).await;
    }

    pub async fn connected(&self, id: &AgentId, instance: &str) {
        let change = StatusChanged {
            agent_id: id.clone(),
            instance_id: Some(InstanceId::new(instance).unwrap()),
            previous: None,
            reason: "first_heartbeat".to_owned(),
            since: wall(),
            evidence: Value::Null,
            by: None,
            code: None,
            message: None,
            deadline: None,
            undrained: false,
        };
        let connected = AgentEvent::status(Status::Connected, change);
        self.append(self.subjects.agent_event(id), id.as_str(), connected.into()).await;
    }

    /// What another dispatcher writes of external work that it takes in for this agent.
    pub async fn submitted(&self, execution: &str, agent: &AgentId) {
        self.submitted_as(execution, agent, Delivery::External).await;
    }

    /// What another dispatcher writes of work that it gives to this agent.
    pub async fn dispatched(&self, execution: &str, agent: &AgentId, instance: &str) {
        self.submitted_as(execution, agent, Delivery::Push).await;
        let id = ExecutionId::new(execution).unwrap();
        let dispatched = Dispatched {
            execution_id: id.clone(),
            attempt: 1,
            agent_id: agent.clone(),
            instance_id: InstanceId::new(instance).unwrap(),
            deadline: wall().plus_ms(3_600_000),
            timeout_ms: 3_600_000,
        };
        let event = ExecutionEvent::from(dispatched);
        self.append(self.subjects.execution_event(&id), execution, event.into()).await;
    }

    async fn submitted_as(&self, execution: &str, agent: &AgentId, delivery: Delivery) {
        let id = ExecutionId::new(execution).unwrap();
        let request = Submitted {
            execution_id: id.clone(),
            attempt: 1,
            agent_id: Some(agent.clone()),
            pool: Pool::default(),
            input: PayloadRef { bytes: 4, sha256: "0".repeat(64), seq: 1, attempt: 1 },
            timeout_ms: None,
            priority: 5,
            queue_ttl_ms: 86_400_000,
            on_loss: OnLoss::Fail,
            max_attempts: 3,
            stall_timeout_ms: None,
            lost_after_ms: None,
            delivery,
            labels: BTreeMap::new(),
            request_sha256: "0".repeat(64),
        };
        let event = ExecutionEvent::from(request);
        self.append(self.subjects.execution_event(&id), execution, event.into()).await;
    }

    /// Tells Redis something about its clients.
    pub async fn redis_client(&self, what: &str) {
        let url = self.redis.url();
        let mut socket = UnixStream::connect(url.trim_start_matches("redis+unix://")).await.unwrap();
        socket.write_all(format!("CLIENT {what}\r\n").as_bytes()).await.unwrap();
        let mut answer = [0; 5];
        socket.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"+OK\r\n");
    }

    async fn append(&self, subject: String, about: &str, body: EventBody) {
        let event = Event {
            id: uuid::Uuid::now_v7(),
            source: "/rollcall/test/1".to_owned(),
            subject: about.to_owned(),
            time: wall(),
            body,
        };
        let expected = self.log.last_seq_of(&subject).await.unwrap();
        let bytes = Bytes::from(event.encode());
        let appended = self.log.append(&subject, &event.id.to_string(), bytes, expected).await.unwrap();
        assert!(matches!(appended, Append::Appended { .. }), "{appended:?}");
    }

    pub async fn api(&self, verb: &str, request: &Value) -> Value {
        let payload = Bytes::from(request.to_string());
        let answer = self.bus.request(self.subjects.api(verb), payload, PATIENCE).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }

    /// Everything that happened to an execution.
    pub async fn history(&self, id: &str) -> Vec<ExecutionEvent> {
        let subject = self.subjects.execution_event(&ExecutionId::new(id).unwrap());
        let entries = self.log.history(&subject).await.unwrap();
        let events = entries.iter().filter_map(|entry| match Event::decode(&entry.bytes).unwrap().body {
            EventBody::Execution(event) => Some(event),
            _ => None,
        });
        events.collect()
    }
}
