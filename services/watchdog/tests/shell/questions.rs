//! What an instance is asked before a verdict, and what its answers and its silence are worth.

use std::sync::atomic::Ordering;

use rollcall_core::{
    agent::Status,
    event::{RecoveryAction, RecoveryReason, TerminateOutcome},
    subject::AgentVerb,
    wire::{Delivery, OnLoss},
};
use serde_json::json;

use crate::{
    harness::{FakeAgent, Fleet, Job, LONG, now},
    short,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_was_never_taken_is_dispatch_lost_beyond_the_grace() {
    let fleet = Fleet::start().await;
    let _agent = FakeAgent::start_without_requests(&fleet, "a", "i-1");
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    let dispatched = now();
    fleet.dispatch("x", "a", "i-1", Job { on_loss: OnLoss::Requeue, ..LONG }).await;
    let recovered = fleet.recovery("x").await;
    assert!(now().since_ms(dispatched) >= 1_000, "inside the grace absence is no evidence");
    assert_eq!(recovered.reason, RecoveryReason::DispatchLost);
    assert_eq!((recovered.action, recovered.next_attempt), (RecoveryAction::Requeued, Some(2)));
    assert_eq!(recovered.terminate, TerminateOutcome::NotAttempted);
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_takes_requests_promises_not_to_begin_what_it_never_took() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.dispatch("x", "a", "i-1", LONG).await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::DispatchLost);
    assert_eq!(recovered.terminate, TerminateOutcome::NotRunning);
    assert_eq!(recovered.evidence["terminate"], "not running");
    let asked = agent.terminations();
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0]["reason"].as_str(), asked[0]["attempt"].as_u64()), (Some("dispatch_lost"), Some(1)));
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_promises_not_to_begin_what_a_late_orchestrator_brings() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.dispatch("x", "a", "i-1", Job { delivery: Delivery::External, ..LONG }).await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::Orphaned);
    assert_eq!(recovered.terminate, TerminateOutcome::NotRunning);
    let asked = agent.terminations();
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0]["reason"].as_str(), asked[0]["attempt"].as_u64()), (Some("orphaned"), Some(1)));
    dog.stop().await;
}

/// PROTOCOL.md 3: only if it answered on that subject before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_responders_is_no_word_about_who_never_answered_there() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_FAILURE_THRESHOLD", "3");
    // It knows how to end work, and not how to say what it holds.
    let agent = FakeAgent::start_without_requests(&fleet, "a", "i-1");
    let ended = fleet.answers_once("a", "i-1", AgentVerb::Terminate, json!({"state": "still_running"})).await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(1_500)).await;
    ended.await.unwrap();
    fleet.until("it was asked", async || fleet.row("x").await == "terminate_refused").await;
    let _new = FakeAgent::start(&fleet, "a", "i-2").await;
    fleet.superseded("a", "i-1", "i-2").await;
    fleet.register("a", "i-2").await;
    agent.beat(false);
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::AgentRestarted);
    // Three intervals and a half, not one and a half.
    let silent_ms = recovered.evidence["heartbeats"]["last_age_ms"].as_u64().unwrap();
    assert!(silent_ms >= 3_500, "{recovered:?}");
    dog.stop().await;
}

/// Its heartbeats are silent, and what it is asked gets lost half of the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_question_that_gets_lost_is_no_silence() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start_without_requests(&fleet, "a", "i-1");
    let holds = json!({"instance_id": "i-1", "seq": 1, "executions": [{"id": "x", "attempt": 1}]});
    let answered = fleet.answers_every_other("a", "i-1", AgentVerb::Executions, holds).await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    agent.beat(false);
    fleet.status("a", "i-1", Status::Disconnected, "missed_heartbeats").await;
    // The first is its greeting.
    fleet.until("it was asked again and again", async || answered.load(Ordering::SeqCst) > 3).await;
    assert!(fleet.recoveries().await.is_empty());
    dog.stop().await;
}
