//! The dispatcher and its clock, on a private NATS and Redis: what it writes is judged by others.

#![allow(missing_docs)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, ffi::OsString, sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_capacity::testing::RedisServer;
use rollcall_core::{
    AgentId, Clock as _, ExecutionId, InstanceId, Pool, Timestamp,
    agent::Status,
    event::{AgentEvent, Event, EventBody, ExecutionEvent, Profile, StatusChanged},
    subject::Subjects,
    time::SystemClock,
};
use rollcall_nats::{Bus, EventLog, ensure_streams, testing::NatsServer};
use rollcall_service::{Context, Settings};
use serde_json::{Value, json};

/// How long a condition may take; far above what it needs, so that only a failure ends here.
const PATIENCE: Duration = Duration::from_secs(30);
const HOUR_MS: i64 = 3_600_000;
const TIMEOUT_MS: u64 = 900_000;
/// What a busy machine may add to a comparison of clocks.
const SLACK_MS: u64 = 60_000;

fn wall() -> Timestamp {
    SystemClock::new().now()
}

struct Fleet {
    bus: Bus,
    log: EventLog,
    subjects: Subjects,
}

impl Fleet {
    /// What the prober writes of an agent with room.
    async fn agent(&self, id: &AgentId) {
        let instance_id = InstanceId::new("i-1").unwrap();
        let profile = Profile {
            agent_id: id.clone(),
            instance_id: instance_id.clone(),
            capacity: 8,
            pool: Pool::default(),
            interval_ms: None,
            timeout_ms: None,
            version: None,
            labels: BTreeMap::new(),
            probe: None,
            control: None,
        };
        let change = StatusChanged {
            agent_id: id.clone(),
            instance_id: Some(instance_id),
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
        let subject = self.subjects.agent_event(id);
        for body in [AgentEvent::Registered(profile), AgentEvent::status(Status::Connected, change)] {
            let event = Event {
                id: uuid::Uuid::now_v7(),
                source: "/rollcall/test/1".to_owned(),
                subject: id.to_string(),
                time: wall(),
                body: body.into(),
            };
            let expected = self.log.last_seq_of(&subject).await.unwrap();
            let bytes = Bytes::from(event.encode());
            self.log.append(&subject, &event.id.to_string(), bytes, expected).await.unwrap();
        }
    }

    /// Submits work that is granted at once, and returns by when it has to be done.
    async fn deadline_of(&self, execution: &str) -> Timestamp {
        let request = json!({"execution_id": execution, "agent_id": "a", "input": {}, "delivery": "external",
            "timeout_ms": TIMEOUT_MS});
        let payload = Bytes::from(request.to_string());
        let answer = self.bus.request(self.subjects.api("submit"), payload, PATIENCE).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(answer["state"], "running", "{answer}");
        let subject = self.subjects.execution_event(&ExecutionId::new(execution).unwrap());
        let events = self.log.history(&subject).await.unwrap();
        let dispatched = events.iter().find_map(|entry| match Event::decode(&entry.bytes).unwrap().body {
            EventBody::Execution(ExecutionEvent::Dispatched(event)) => Some(event),
            _ => None,
        });
        dispatched.expect("it was dispatched").deadline
    }
}

fn is_right(deadline: Timestamp) -> bool {
    let right = wall().plus_ms(TIMEOUT_MS);
    right.since_ms(deadline).max(deadline.since_ms(right)) < SLACK_MS
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_are_written_on_the_logs_clock_whatever_the_host_says() {
    let (nats, redis) = (NatsServer::start().unwrap(), RedisServer::start());
    let bus = nats.bus("rollcall").await;
    ensure_streams(&bus).await.unwrap();
    let fleet = Fleet { log: EventLog::new(&bus), bus, subjects: Subjects::default() };
    fleet.agent(&AgentId::new("a").unwrap()).await;
    let environment = [("ROLLCALL_NATS_URL", nats.url()), ("ROLLCALL_REDIS_URL", redis.url())];
    let environment = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let settings = Settings::load_from("dispatcher", environment).unwrap().settings;
    let mut context = Context::for_tests(dispatcher::PROGRAM, settings);
    let wrong = || Timestamp::from_millis(wall().as_millis() + HOUR_MS);
    let clock = Arc::new(SystemClock::with_wall(wrong));
    context.clock = Arc::clone(&clock);
    let (stop, readiness) = (context.shutdown.clone(), context.readiness.clone());
    let running = tokio::spawn(dispatcher::run(context));
    tokio::time::timeout(PATIENCE, readiness.ready()).await.expect("the dispatcher is ready");

    // It was started on a clock that is wrong.
    let deadline = fleet.deadline_of("x").await;
    assert!(is_right(deadline), "{deadline}");
    // The machine slept for an hour: our clock did as well.
    clock.shift(-HOUR_MS);
    let end = tokio::time::Instant::now() + PATIENCE;
    while wall().since_ms(clock.now()) >= SLACK_MS {
        assert!(tokio::time::Instant::now() < end, "its clock is {}", clock.now());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let deadline = fleet.deadline_of("y").await;
    assert!(is_right(deadline), "{deadline}");

    stop.cancel();
    tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
}
