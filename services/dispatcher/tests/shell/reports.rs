//! Reports that are refused: said once a minute for each agent, whoever sends how many.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use rollcall_core::{AgentId, ExecutionId};
use serde_json::Value;
use tracing::{Event, Metadata, Subscriber, field, span};

use crate::harness::Fleet;

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
