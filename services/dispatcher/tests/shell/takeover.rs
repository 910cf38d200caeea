//! What other dispatchers began and have not finished.

use bytes::Bytes;
use rollcall_core::{AgentId, ExecutionId, Timestamp, event::Event};
use serde_json::json;

use crate::harness::Fleet;

/// An agent's time to answer a dispatch and then some, less what two clocks may differ by.
const UNTOUCHED_MS: u64 = 4_500;

/// When this happened to an execution, if it did.
async fn when(fleet: &Fleet, execution: &str, kind: &str) -> Option<Timestamp> {
    let subject = fleet.subjects.execution_event(&ExecutionId::new(execution).unwrap());
    let entries = fleet.log.history(&subject).await.unwrap();
    let events = entries.iter().map(|entry| Event::decode(&entry.bytes).unwrap());
    events.filter(|event| event.body.short_type() == kind).map(|event| event.time).next()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_living_replica_asks_at_that_moment_is_left_to_it_by_one_that_starts() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, "i-1").await;
    fleet.dispatched("x", &id, "i-1").await;
    // How long work is given to end is nothing to a dispatch: the test's patience is shorter.
    let context = fleet.context_with(&[("ROLLCALL_TERMINATE_GRACE_MS", "3600000")]);
    let dispatcher = fleet.dispatcher_in(context).await;
    let beat = json!({"instance_id": "i-1", "state": "ready", "capacity": 8, "interval_ms": 1000, "seq": 1,
        "executions": [{"id": "x", "attempt": 1}]});
    fleet
        .until("it is taken up", async || {
            let beat = Bytes::from(beat.to_string());
            fleet.bus.publish(fleet.subjects.heartbeat(&id), beat).await.unwrap();
            when(&fleet, "x", "execution.started").await.is_some()
        })
        .await;
    let dispatched = when(&fleet, "x", "execution.dispatched").await.unwrap();
    let started = when(&fleet, "x", "execution.started").await.unwrap();
    assert!(started.since_ms(dispatched) >= UNTOUCHED_MS, "{dispatched} {started}");
    dispatcher.stop().await;
}
