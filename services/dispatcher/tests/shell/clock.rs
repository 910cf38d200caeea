//! The dispatcher and its clock: the deadlines that it writes are judged by others.

use std::sync::Arc;

use rollcall_core::{AgentId, Clock as _, Timestamp, event::ExecutionEvent, time::SystemClock};
use serde_json::json;

use crate::harness::{Fleet, wall};

const HOUR_MS: i64 = 3_600_000;
const TIMEOUT_MS: u64 = 900_000;
/// What a busy machine may add to a comparison of clocks.
const SLACK_MS: u64 = 60_000;

/// Submits work that is granted at once, and returns by when it has to be done.
async fn deadline_of(fleet: &Fleet, execution: &str) -> Timestamp {
    let request = json!({"execution_id": execution, "agent_id": "a", "input": {}, "delivery": "external",
        "timeout_ms": TIMEOUT_MS});
    let answer = fleet.api("submit", &request).await;
    assert_eq!(answer["state"], "running", "{answer}");
    let dispatched = fleet.history(execution).await.into_iter().find_map(|event| match event {
        ExecutionEvent::Dispatched(event) => Some(event),
        _ => None,
    });
    dispatched.expect("it was dispatched").deadline
}

fn is_right(deadline: Timestamp) -> bool {
    let right = wall().plus_ms(TIMEOUT_MS);
    right.since_ms(deadline).max(deadline.since_ms(right)) < SLACK_MS
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_are_written_on_the_logs_clock_whatever_the_host_says() {
    let fleet = Fleet::start().await;
    fleet.agent(&AgentId::new("a").unwrap(), "i-1").await;
    let mut context = fleet.context();
    let wrong = || Timestamp::from_millis(wall().as_millis() + HOUR_MS);
    let clock = Arc::new(SystemClock::with_wall(wrong));
    context.clock = Arc::clone(&clock);
    let dispatcher = fleet.dispatcher_in(context).await;

    // It was started on a clock that is wrong.
    let deadline = deadline_of(&fleet, "x").await;
    assert!(is_right(deadline), "{deadline}");
    // The machine slept for an hour: our clock did as well.
    clock.shift(-HOUR_MS);
    fleet.until("its clock is right", async || wall().since_ms(clock.now()) < SLACK_MS).await;
    let deadline = deadline_of(&fleet, "y").await;
    assert!(is_right(deadline), "{deadline}");
    dispatcher.stop().await;
}
