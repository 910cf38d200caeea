//! Reports that are refused: said once a minute for each agent, whoever sends how many. And reports whose effect can't be
//! written.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use rollcall_core::{AgentId, ExecutionId, event::ExecutionEvent};
use rollcall_nats::WorkOptions;
use serde_json::{Value, json};
use tracing::{Event, Metadata, Subscriber, field, span};

use crate::harness::{Fleet, PATIENCE};

/// The warnings of this process, and of nothing else.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    /// So many say this.
    fn count(&self, words: &[&str]) -> usize {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }
}

struct Line(String);

impl field::Visit for Line {
    fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_agent_is_refused_is_logged_and_told_once_a_minute() {
    let warnings = Warnings::default();
    tracing::subscriber::set_global_default(warnings.clone()).unwrap();
    let fleet = Fleet::start().await;
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let subject = |agent: &str, execution: &str| {
        fleet.subjects.report(&AgentId::new(agent).unwrap(), &ExecutionId::new(execution).unwrap())
    };
    for execution in ["x", "y", "z"] {
        for agent in ["nonsense", "noise"] {
            fleet.reports.publish(&subject(agent, execution), "{}".into()).await.unwrap();
        }
    }
    for execution in ["x", "y", "z"] {
        for agent in ["nonsense", "noise"] {
            let subject = subject(agent, execution);
            let taken = async || fleet.reports.last(&subject).await.unwrap().is_none();
            fleet.until("it is taken out of the stream", taken).await;
        }
    }
    // All of them were judged before they left the stream.
    dispatcher.stop().await;
    let told = fleet.log.history(&fleet.subjects.system_event("dispatcher")).await.unwrap();
    let told: Vec<Value> = told.iter().map(|entry| serde_json::from_slice(&entry.bytes).unwrap()).collect();
    for agent in ["nonsense", "noise"] {
        let about = |event: &&Value| {
            event["type"] == "rollcall.system.report_refused"
                && event["data"]["subject"].as_str().is_some_and(|subject| subject.contains(agent))
        };
        assert_eq!(told.iter().filter(about).count(), 1, "{told:?}");
        assert_eq!(warnings.count(&["report refused", agent]), 1, "{agent}");
    }
}

/// Lets the log take so many events more, or as many as it likes (`None`).
async fn room(fleet: &Fleet, events: Option<u64>) {
    let call = async |what: &str, body: Value| {
        let subject = format!("$JS.API.STREAM.{what}.ROLLCALL_EVENTS");
        let answer = fleet.bus.request(subject, body.to_string().into(), PATIENCE).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert!(answer.get("error").is_none(), "{answer}");
        answer
    };
    let info = call("INFO", json!({})).await;
    let mut config = info["config"].clone();
    let held = info["state"]["messages"].as_u64().unwrap();
    config["max_msgs"] = events.map_or(json!(-1), |more| json!(held + more));
    call("UPDATE", config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_whose_effect_the_log_refuses_stays_until_it_is_in_the_log() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, "i-1").await;
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let request = json!({"execution_id": "x", "agent_id": "a", "input": {}, "delivery": "external"});
    assert_eq!(fleet.api("submit", &request).await["state"], "running");
    room(&fleet, Some(0)).await;
    let subject = fleet.subjects.report(&id, &ExecutionId::new("x").unwrap());
    let report = json!({"execution_id": "x", "attempt": 1, "agent_id": "a", "instance_id": "i-1",
        "outcome": "completed", "result": 1});
    fleet.reports.publish(&subject, report.to_string().into()).await.unwrap();
    // It was tried, and what came of it could not be written.
    fleet.until("it was delivered again", async || deliveries(&fleet).await >= 2).await;
    assert!(fleet.reports.last(&subject).await.unwrap().is_some(), "nothing of it is in the log");
    room(&fleet, None).await;
    fleet
        .until("it counts", async || {
            matches!(fleet.history("x").await.last(), Some(ExecutionEvent::Completed(_)))
        })
        .await;
    fleet.until("it is taken out", async || fleet.reports.last(&subject).await.unwrap().is_none()).await;
    dispatcher.stop().await;
}

/// Whoever took it died: it had the time of before to settle it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_that_a_dead_dispatcher_had_taken_does_not_wait_long() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, "i-1").await;
    let first = fleet.dispatcher_in(fleet.context()).await;
    let request = json!({"execution_id": "x", "agent_id": "a", "input": {}, "delivery": "external"});
    assert_eq!(fleet.api("submit", &request).await["state"], "running");
    first.stop().await;
    let subject = fleet.subjects.report(&id, &ExecutionId::new("x").unwrap());
    let report = json!({"execution_id": "x", "attempt": 1, "agent_id": "a", "instance_id": "i-1",
        "outcome": "completed", "result": 1});
    fleet.reports.publish(&subject, report.to_string().into()).await.unwrap();
    let mut dead = fleet.reports.work("dispatcher", WorkOptions::default());
    let taken = dead.next().await.unwrap();
    // Dropped, it would be handed back.
    std::mem::forget((taken, dead));
    let began = Instant::now();
    let second = fleet.dispatcher_in(fleet.context()).await;
    fleet
        .until("it counts", async || {
            matches!(fleet.history("x").await.last(), Some(ExecutionEvent::Completed(_)))
        })
        .await;
    assert!(began.elapsed() < WorkOptions::default().ack_wait / 2, "after {:?}", began.elapsed());
    second.stop().await;
}

/// How often something was delivered out of the reports.
async fn deliveries(fleet: &Fleet) -> u64 {
    let ask = async |subject: &str| -> Value {
        let answer = fleet.bus.request(subject.to_owned(), "{}".into(), PATIENCE).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    };
    let names = ask("$JS.API.CONSUMER.NAMES.ROLLCALL_REPORTS").await;
    let name = names["consumers"][0].as_str().expect("the dispatchers' consumer").to_owned();
    let info = ask(&format!("$JS.API.CONSUMER.INFO.ROLLCALL_REPORTS.{name}")).await;
    info["delivered"]["consumer_seq"].as_u64().unwrap()
}
