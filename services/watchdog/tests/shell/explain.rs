//! What `explain` says of an execution.

use rollcall_core::{event::Expired, wire::OnLoss};
use serde_json::{Value, json};

use crate::{
    harness::{FakeAgent, Fleet, Job, LONG, Manner, execution_id},
    short,
};

async fn explain(fleet: &Fleet, id: &str) -> Value {
    fleet.api("explain", json!({"execution_id": id})).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_answers_for_everything_the_log_knows() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list_with_progress("x", 3);
    fleet.run("x", "a", "i-1", LONG).await;
    let at_once = fleet.api("explain", json!({"execution_id": "x"})).await;
    assert_eq!(at_once["state"], "running", "{at_once}");
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    let explained = fleet.api("explain", json!({"execution_id": "x"})).await;
    assert_eq!(explained["evidence"]["list"]["state"], "listed", "{explained}");
    assert_eq!((&explained["progress"], &explained["recoveries"]), (&json!(3.0), &json!([])));
    assert!(explained["decision"].as_str().unwrap().starts_with("leave it"));
    assert!(explained["look_again_at"].is_string() && explained["trouble"].is_null(), "{explained}");
    assert_eq!(fleet.api("explain", json!({"execution_id": "nobody"})).await["error"]["code"], "not_found");
    assert_eq!(fleet.api("explain", json!({"execution_id": "a.b"})).await["error"]["code"], "invalid_id");
    assert_eq!(fleet.api("explain", json!({})).await["error"]["code"], "bad_request");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_about_a_later_attempt_is_told_what_became_of_the_earlier_one_and_on_what_evidence() {
    let fleet = Fleet::start().await;
    let _agent = FakeAgent::start_without_requests(&fleet, "a", "i-1");
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.dispatch("x", "a", "i-1", Job { on_loss: OnLoss::Requeue, ..LONG }).await;
    let recovered = fleet.recovery("x").await;
    let waits = explain(&fleet, "x").await;
    assert_eq!((&waits["row"], &waits["attempt"]), (&json!("queued"), &json!(2)), "{waits}");
    assert!(waits["evidence"]["waiting_since"].is_string(), "{waits}");
    let told = &waits["recoveries"][0];
    assert_eq!((&told["attempt"], &told["reason"]), (&json!(1), &json!("dispatch_lost")), "{waits}");
    assert_eq!((&told["evidence"], &told["message"]), (&recovered.evidence, &json!(recovered.message)));

    let expired = Expired {
        execution_id: execution_id("x"),
        attempt: 2,
        agent_id: None,
        waited_ms: 86_400_000,
        queue_ttl_ms: 86_400_000,
    };
    fleet.execution_event(expired.into()).await;
    fleet.until("it has expired", async || explain(&fleet, "x").await["state"] == "expired").await;
    let ended = explain(&fleet, "x").await;
    assert_eq!(ended["row"], "queue_expired", "{ended}");
    assert_eq!(ended["recoveries"], waits["recoveries"], "{ended}");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_being_done_about_an_execution_is_told_and_what_came_of_it() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    agent.manner(Manner::Refuses);
    fleet.run("x", "a", "i-1", short(500)).await;
    fleet
        .until("its end was refused", async || {
            explain(&fleet, "x").await["trouble"]["terminate_asked"].as_u64().is_some_and(|times| times > 0)
        })
        .await;
    let trouble = explain(&fleet, "x").await["trouble"].clone();
    assert!(trouble["since"].is_string() && trouble["row"].is_string(), "{trouble}");
    agent.manner(Manner::Obeys);
    let recovered = fleet.recovery("x").await;
    fleet.until("it has ended", async || fleet.row("x").await == "ended").await;
    let evidence = explain(&fleet, "x").await["evidence"].clone();
    let error = json!({"code": "timed_out", "message": recovered.message});
    assert_eq!((&evidence["error"], &evidence["recovered"]), (&error, &json!("timed_out")), "{evidence}");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lists_what_another_agent_runs_is_named() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    let other = FakeAgent::start(&fleet, "b", "i-2").await;
    fleet.register("a", "i-1").await;
    fleet.register("b", "i-2").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    other.manner(Manner::Refuses);
    other.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    let claimed_by = async || explain(&fleet, "x").await["evidence"]["claimed_by"].clone();
    fleet.until("its claim is shown", async || claimed_by().await.is_array()).await;
    let claim = claimed_by().await[0].clone();
    assert_eq!((&claim["agent_id"], &claim["instance_id"]), (&json!("b"), &json!("i-2")), "{claim}");
    dog.stop().await;
}
