//! Goodbyes: with a reason of an operator's choice, and to instances that were taken for gone and live.

use rollcall_core::wire::GoodbyeReason;
use serde_json::json;

use crate::stage::{Stage, beat};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_goodbye_names_the_reasons_of_the_contract_and_other_words_are_its_own() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    for (reason, heard) in [
        (json!("restart"), GoodbyeReason::Restart),
        (json!("drain"), GoodbyeReason::Drain),
        (json!("activity_timeout"), GoodbyeReason::ActivityTimeout),
        (json!("superseded"), GoodbyeReason::Superseded),
        (json!("operator"), GoodbyeReason::Operator),
        (json!("unknown"), GoodbyeReason::Operator),
        (json!("please restart"), GoodbyeReason::Operator),
        (json!(null), GoodbyeReason::Operator),
    ] {
        let answer = stage.api("goodbye", json!({ "agent_id": "a1", "reason": reason })).await;
        assert_eq!(answer["answered"], true, "{answer}");
        assert_eq!(goodbyes.next().await.reason, heard, "{reason}");
    }
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_was_forgotten_and_lives_is_told_to_start_again() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    let forgotten = stage.api("forget", json!({ "agent_id": "a1" })).await;
    assert_eq!(forgotten["status"], "gone", "{forgotten}");
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    let reply = stage.beat("a1", beat("i1", 2)).await;
    assert_eq!(
        (reply["status"].as_str(), reply["goodbye"]["reason"].as_str()),
        (Some("gone"), Some("restart"))
    );
    assert_eq!(goodbyes.next().await.reason, GoodbyeReason::Restart, "by request, too");
    prober.stop().await;
    // The log says so: whoever hears it next tells it, too.
    let prober = stage.prober().await;
    stage.publish_beat("a1", beat("i1", 3)).await;
    assert_eq!(goodbyes.next().await.reason, GoodbyeReason::Restart);
    let reply = stage.beat("a1", beat("i2", 1)).await;
    assert_eq!(
        (reply["status"].as_str(), reply.get("goodbye")),
        (Some("connected"), None),
        "as a new instance"
    );
    let reply = stage.beat("a1", beat("i1", 4)).await;
    assert_eq!(reply["goodbye"]["reason"], "superseded", "{reply}");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_was_silent_for_too_long_and_comes_back_is_told_to_start_again() {
    let stage = Stage::open().await;
    let prober = stage.prober_with(&[("ROLLCALL_FORGET_AFTER_MS", "10000")]).await;
    stage.beat("a1", beat("i1", 1)).await;
    stage.until("a1", "agent.gone").await;
    let reply = stage.beat("a1", beat("i1", 2)).await;
    assert_eq!(reply["goodbye"]["reason"], "restart", "{reply}");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_said_goodbye_itself_is_told_nothing() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    let mut last = beat("i1", 2);
    last["state"] = json!("gone");
    for reply in [stage.beat("a1", last.clone()).await, stage.beat("a1", last).await] {
        assert_eq!((reply["status"].as_str(), reply.get("goodbye")), (Some("gone"), None));
    }
    prober.stop().await;
    let prober = stage.prober().await;
    let reply = stage.beat("a1", beat("i1", 3)).await;
    assert_eq!((reply["status"].as_str(), reply.get("goodbye")), (Some("gone"), None));
    prober.stop().await;
}
