//! The prober and its clock: the log's server knows the time.

use std::sync::Arc;

use rollcall_core::Timestamp;
use rollcall_core::time::{Clock, SystemClock};
use serde_json::Value;

use crate::stage::{Stage, beat};

const HOUR_MS: i64 = 3_600_000;
/// What a busy machine may add to a comparison of clocks.
const SLACK_MS: i64 = 60_000;

fn off_ms(time: &Value) -> i64 {
    let time = Timestamp::parse(time.as_str().unwrap()).unwrap();
    time.as_millis() - SystemClock::new().now().as_millis()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_hosts_clock_says_statuses_are_written_on_the_logs() {
    let stage = Stage::open().await;
    let wrong = || Timestamp::from_millis(SystemClock::new().now().as_millis() + HOUR_MS);
    let prober = stage.prober_on(SystemClock::with_wall(wrong), &[]).await;
    let reply = stage.beat("a1", beat("i1", 1)).await;
    assert!(off_ms(&reply["server_time"]).abs() < SLACK_MS, "{reply}");
    let fell = stage.until("a1", "agent.disconnected").await;
    assert!(off_ms(&fell["time"]).abs() < SLACK_MS, "{fell}");
    assert!(off_ms(&fell["data"]["since"]).abs() < SLACK_MS, "{fell}");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_machine_slept_the_clock_is_the_logs_again_and_nobody_is_condemned() {
    let stage = Stage::open().await;
    let clock = Arc::new(SystemClock::new());
    let prober = stage.prober_on(Arc::clone(&clock), &[]).await;
    let keep = stage.keep_beating("a1", "i1");
    stage.until("a1", "agent.connected").await;
    // While it slept the wall clock went on, and ours did not.
    clock.shift(-HOUR_MS);
    stage
        .until_agents(|answer| answer["sees"] == true && answer["sight"]["last_trouble"] == "clock_jump")
        .await;
    assert!(clock.drift_ms().abs() < SLACK_MS, "{}", clock.drift_ms());
    assert_eq!(stage.types("a1").await, ["agent.registered", "agent.connected"]);
    drop(keep);
    let fell = stage.until("a1", "agent.disconnected").await;
    assert!(off_ms(&fell["data"]["since"]).abs() < SLACK_MS, "{fell}");
    prober.stop().await;
}
