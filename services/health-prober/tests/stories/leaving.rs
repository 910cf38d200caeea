//! Goodbyes: with a reason of an operator's choice, and to instances that were taken for gone and live.

use rollcall_core::wire::{GoodbyeReason, InFlight};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_says_what_is_to_become_of_the_work_at_its_deadline() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    let keep = stage.keep_beating("a1", "i1");
    for (asked, told) in [
        (json!("abort"), InFlight::Abort),
        (json!("finish"), InFlight::Finish),
        (json!(null), InFlight::Return),
    ] {
        let question = json!({ "agent_id": "a1", "deadline_ms": 100, "in_flight": asked });
        let view = stage.api("drain", question).await;
        assert_eq!(view["draining"]["in_flight"], asked, "{view}");
        let goodbye = goodbyes.next().await;
        assert_eq!((goodbye.reason, goodbye.in_flight), (GoodbyeReason::Drain, told));
    }
    let nothing = [
        json!({ "agent_id": "a1", "in_flight": "abort" }),
        json!({ "agent_id": "a1", "in_flight": "abort", "deadline_ms": 1 }),
    ];
    for (verb, question) in [("drain", &nothing[0]), ("undrain", &nothing[1]), ("forget", &nothing[1])] {
        let answer = stage.api(verb, question.clone()).await;
        assert_eq!(answer["error"]["code"], "bad_request", "{verb}: {answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains("in_flight")), "{answer}");
    }
    drop(keep);
    prober.stop().await;
}
