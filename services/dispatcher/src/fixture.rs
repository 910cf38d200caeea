//! A dispatcher on a private NATS and Redis whose steps a test takes one by one: nothing audits or starts by itself.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use rollcall_capacity::{Capacity as _, Hold, RedisCapacity, testing::RedisServer};
use rollcall_core::{
    AgentId, Clock as _, ExecutionId, InstanceId, Pool,
    agent::Status,
    event::{AgentEvent, Event, EventBody, ExecutionEvent, Profile, StatusChanged, Submitted},
    execution::Execution,
    subject::{AgentVerb, PayloadKind, Subjects},
    time::SystemClock,
    wire::{Delivery, Endpoint, OnLoss},
};
use rollcall_nats::{Append, Bus, EventLog, TailError, ensure_streams, testing::NatsServer};
use rollcall_service::Settings;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    ledger::{ForeignChanges, Ledger},
    shell::{Dispatcher, Parts},
};

/// The task that folds the log.
pub(crate) type Following = JoinHandle<Result<(), TailError>>;

/// What a test takes steps with.
pub(crate) struct Fixture {
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) redis: RedisServer,
    _nats: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) clock: Arc<SystemClock>,
    /// What others changed and the dispatcher would carry out.
    pub(crate) foreign: ForeignChanges,
}

impl Fixture {
    /// A dispatcher that nobody has started.
    pub(crate) async fn new() -> Self {
        let (nats, redis) = (NatsServer::start().unwrap(), RedisServer::start());
        let bus = nats.bus("rollcall").await;
        ensure_streams(&bus).await.unwrap();
        let environment = [("ROLLCALL_NATS_URL", nats.url()), ("ROLLCALL_REDIS_URL", redis.url())];
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into()));
        let settings = Settings::load_from("dispatcher", environment).unwrap().settings;
        let subjects = Subjects::default();
        let clock = Arc::new(SystemClock::new());
        let (ledger, foreign) = Ledger::new(EventLog::new(&bus), subjects.clone(), "1", Arc::clone(&clock));
        let dispatcher = Dispatcher::new(Parts {
            ledger,
            capacity: RedisCapacity::connect(&redis.url(), "rollcall").await.unwrap(),
            bus: bus.clone(),
            subjects,
            settings: (&settings).into(),
            cancel: CancellationToken::new(),
        });
        Self { dispatcher, redis, _nats: nats, bus, clock, foreign }
    }

    /// It folds the log from here on.
    pub(crate) async fn follows(&self) -> Following {
        let replayed = CancellationToken::new();
        let following = tokio::spawn(Arc::clone(&self.dispatcher).follow(replayed.clone()));
        replayed.cancelled().await;
        following
    }

    /// It folds the log no further, as if the tail were slow.
    pub(crate) async fn falls_behind(&self, following: Following) {
        self.dispatcher.cancel.cancel();
        following.await.unwrap().unwrap();
    }

    /// The ledger of another dispatcher, which knows only what it reads when it decides.
    pub(crate) fn another(&self) -> Ledger {
        let subjects = self.dispatcher.subjects.clone();
        Ledger::new(EventLog::new(&self.bus), subjects, "2", Arc::clone(&self.clock)).0
    }

    /// An agent answers what it is asked, each time with the next of these, and then no more. How often it was asked.
    pub(crate) async fn answers(&self, agent: &str, verb: AgentVerb, answers: &[Value]) -> Arc<AtomicUsize> {
        let (agent, instance) = (AgentId::new(agent).unwrap(), InstanceId::new("i-1").unwrap());
        let subject = self.dispatcher.subjects.agent_request(&agent, &instance, verb);
        let mut asked = self.bus.subscribe(subject).await.unwrap();
        self.bus.flush().await.unwrap();
        let (bus, answers, times) = (self.bus.clone(), answers.to_vec(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&times);
        tokio::spawn(async move {
            for answer in answers {
                let Some(request) = asked.next().await else { return };
                counted.fetch_add(1, Ordering::SeqCst);
                bus.publish(request.reply.unwrap(), Bytes::from(answer.to_string())).await.unwrap();
            }
        });
        times
    }

    /// An agent is there, in this pool and with this room, by the log and its fold.
    pub(crate) async fn agent(&self, id: &str, pool: &str, capacity: u32) {
        let (agent_id, profile) = (AgentId::new(id).unwrap(), profile(id, "i-1", pool, capacity));
        let instance = profile.instance_id.clone();
        let change = StatusChanged {
            agent_id: agent_id.clone(),
            instance_id: Some(instance),
            previous: None,
            reason: "first_heartbeat".to_owned(),
            since: self.dispatcher.ledger.now(),
            evidence: Value::Null,
            by: None,
            code: None,
            message: None,
            deadline: None,
            undrained: false,
        };
        let subject = self.dispatcher.subjects.agent_event(&agent_id);
        self.append(&subject, id, AgentEvent::Registered(profile).into()).await;
        self.append(&subject, id, AgentEvent::status(Status::Connected, change).into()).await;
    }

    /// Its heartbeats say that it is driven over HTTP, there.
    pub(crate) async fn driven(&self, id: &str, pool: &str, url: &str) {
        let control = Some(Endpoint { kind: "http".to_owned(), url: url.to_owned() });
        let subject = self.dispatcher.subjects.agent_event(&AgentId::new(id).unwrap());
        let updated = AgentEvent::Updated(Profile { control, ..profile(id, "i-1", pool, 1) });
        self.append(&subject, id, updated.into()).await;
    }

    /// What has a slot of an agent, by Redis.
    pub(crate) async fn held(&self, pool: &str, agent: &str) -> Vec<Hold> {
        let view = self.dispatcher.capacity.inspect(pool, agent, usize::MAX).await.unwrap();
        view.held.into_iter().map(|slot| slot.hold).collect()
    }

    /// Work was submitted, by the log and its fold.
    pub(crate) async fn submitted(&self, id: &str, agent: Option<&str>, pool: &str, delivery: Delivery) {
        let execution_id = ExecutionId::new(id).unwrap();
        let input = self.dispatcher.store(&execution_id, PayloadKind::Input, 1, Bytes::from_static(b"null"));
        let request = Submitted {
            input: input.await.unwrap(),
            execution_id,
            attempt: 1,
            agent_id: agent.map(|agent| AgentId::new(agent).unwrap()),
            pool: Pool::new(pool).unwrap(),
            timeout_ms: None,
            priority: 5,
            queue_ttl_ms: 86_400_000,
            on_loss: OnLoss::Fail,
            max_attempts: 3,
            stall_timeout_ms: None,
            lost_after_ms: None,
            delivery,
            labels: Default::default(),
            request_sha256: "0".repeat(64),
        };
        self.happens(id, request.into()).await;
    }

    /// It has a slot of this agent, by the log and its fold.
    pub(crate) async fn granted(&self, id: &str, agent: &str) -> Execution {
        let (id, agent) = (ExecutionId::new(id).unwrap(), AgentId::new(agent).unwrap());
        let (ledger, instance) = (&self.dispatcher.ledger, InstanceId::new("i-1").unwrap());
        let granted = ledger.decide(&id, |e| e.dispatch(1, &agent, &instance, 60_000, ledger.now()));
        granted.await.unwrap().after
    }

    /// Something happened to an execution, by the log and its fold.
    pub(crate) async fn happens(&self, id: &str, event: ExecutionEvent) {
        let subject = self.dispatcher.subjects.execution_event(&ExecutionId::new(id).unwrap());
        self.append(&subject, id, event.into()).await;
    }

    /// An event is in the log.
    pub(crate) async fn append(&self, subject: &str, about: &str, body: EventBody) {
        let log = EventLog::new(&self.bus);
        let event = Event {
            id: uuid::Uuid::now_v7(),
            source: "/rollcall/test/1".to_owned(),
            subject: about.to_owned(),
            time: SystemClock::new().now(),
            body,
        };
        let expected = log.last_seq_of(subject).await.unwrap();
        let appended =
            log.append(subject, &event.id.to_string(), Bytes::from(event.encode()), expected).await.unwrap();
        assert!(matches!(appended, Append::Appended { .. }), "{appended:?}");
        // One that has fallen behind would wait for ever.
        if self.dispatcher.ledger.is_live() && !self.dispatcher.cancel.is_cancelled() {
            self.dispatcher.ledger.current().await.unwrap();
        }
    }

    /// Somebody else writes to the dispatcher's keys.
    pub(crate) async fn redis(&self, command: &str) {
        let url = self.redis.url();
        let mut socket = UnixStream::connect(url.trim_start_matches("redis+unix://")).await.unwrap();
        socket.write_all(format!("{command}\r\n").as_bytes()).await.unwrap();
        let mut answer = [0; 1];
        socket.read_exact(&mut answer).await.unwrap();
        assert_ne!(&answer, b"-", "{command}");
    }
}

/// How an instance describes itself, as briefly as it may.
pub(crate) fn profile(id: &str, instance: &str, pool: &str, capacity: u32) -> Profile {
    Profile {
        agent_id: AgentId::new(id).unwrap(),
        instance_id: InstanceId::new(instance).unwrap(),
        capacity,
        pool: Pool::new(pool).unwrap(),
        interval_ms: None,
        timeout_ms: None,
        version: None,
        labels: Default::default(),
        probe: None,
        control: None,
    }
}
