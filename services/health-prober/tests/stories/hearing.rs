//! The prober and its own ears.

use std::time::Duration;

use rollcall_core::Timestamp;
use rollcall_core::gaps::{STEADY_STEPS, WINDOW_MS};
use rollcall_nats::canary::CANARY_INTERVAL;
use serde_json::{Value, json};

use crate::stage::{Stage, beat};

/// Longer than any threshold.
const FREEZE: Duration = Duration::from_secs(5);
/// Longer than a canary may take, and not so long that the client takes the link for lost (4 s).
const NAP: Duration = Duration::from_secs(3);
/// How long before a canary is due a nap begins. On a busy machine one may begin too late, and the next is tried.
const AHEAD: Duration = Duration::from_millis(500);
/// Naps until a canary was lost in one, or the test has failed.
const NAPS_MAX: usize = 8;

/// What a bus that stands still is noticed by: a canary, and in the end the client gives the link up.
const STANDS_STILL: [&str; 2] = ["canary_lost", "bus_cut"];

/// Waits until the prober hears again after one of these troubles.
async fn hears_after(stage: &Stage, troubles: &[&str]) -> Value {
    let is_one = |trouble: &Value| troubles.iter().any(|name| trouble == name);
    stage.until_agents(|answer| answer["sees"] == true && is_one(&answer["sight"]["last_trouble"])).await
}

fn time(value: &Value) -> Timestamp {
    Timestamp::parse(value.as_str().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_that_stands_still_condemns_nobody() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    let keep = stage.keep_beating("beating", "i1");
    stage.until("beating", "agent.connected").await;
    stage.beat("quiet", beat("i1", 1)).await;
    hears_after(&stage, &["started"]).await;
    stage.server.freeze().unwrap();
    // What is under test is that this time counts for nothing.
    tokio::time::sleep(FREEZE).await;
    stage.server.thaw().unwrap();
    let answer = hears_after(&stage, &STANDS_STILL).await;
    let since = time(&answer["sight"]["since"]);
    assert_eq!(stage.types("beating").await, ["agent.registered", "agent.connected"]);
    // Nothing came of the other in all that time, and nothing comes now: its clock began when we heard again.
    let fell = stage.until("quiet", "agent.disconnected").await;
    let after = time(&fell["time"]).since_ms(since);
    assert!(after >= 1500, "{after} ms after we heard again, at 1.5 intervals");
    drop(keep);
    stage.until("beating", "agent.error").await;
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_that_stands_still_is_noticed_without_any_agent() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    hears_after(&stage, &["started"]).await;
    for naps in 1.. {
        // The last canary came back a moment ago.
        tokio::time::sleep(CANARY_INTERVAL - AHEAD).await;
        stage.server.freeze().unwrap();
        // The fault itself.
        tokio::time::sleep(NAP).await;
        stage.server.thaw().unwrap();
        let answer = stage.until_agents(|answer| answer["sees"] == true).await;
        if answer["sight"]["last_trouble"] == "canary_lost" {
            break;
        }
        assert!(naps < NAPS_MAX, "not noticed: {answer}");
    }
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holes_in_the_heartbeats_of_many_agents_start_every_clock_again() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    let names = ["a1", "a2", "a3", "a4"];
    hears_after(&stage, &["started"]).await;
    let begun = std::time::Instant::now();
    let mut seq = 0;
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    while seq <= u64::from(STEADY_STEPS) || begun.elapsed() < Duration::from_millis(WINDOW_MS + 1000) {
        tick.tick().await;
        seq += 1;
        for name in names {
            stage.publish_beat(name, beat("i1", seq)).await;
        }
    }
    for name in names {
        stage.publish_beat(name, beat("i1", seq + 2)).await;
    }
    let answer = hears_after(&stage, &["heartbeat_gaps"]).await;
    assert_eq!(answer["agents"].as_array().map(Vec::len), Some(names.len()), "{answer}");
    assert_eq!(answer["sight"]["log_read"], json!(true));
    for name in names {
        assert_eq!(stage.types(name).await, ["agent.registered", "agent.connected"]);
    }
    prober.stop().await;
}
