//! The watchdog and its clock, and its knowledge of the log: what it judges on must not be old.

use std::sync::Arc;

use rollcall_core::{
    Timestamp,
    event::{Failed, RecoveryReason, Retried},
    time::{Clock, SystemClock},
    wire::ErrorBody,
};
use rollcall_nats::canary::{CANARY_INTERVAL, CANARY_TIMEOUT};
use serde_json::json;
use watchdog::recover;

use crate::{
    harness::{FakeAgent, Fleet, LONG, PATIENCE, agent_id, execution_id, instance_id},
    sentry::Post,
    short,
};

const HOUR_MS: i64 = 3_600_000;

fn wall() -> Timestamp {
    SystemClock::new().now()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watchdog_that_is_started_on_a_wrong_clock_ends_nothing_before_its_time() {
    for ahead_ms in [HOUR_MS, -HOUR_MS] {
        let fleet = Fleet::start().await;
        let agent = FakeAgent::start(&fleet, "a", "i-1").await;
        fleet.register("a", "i-1").await;
        agent.list(&["x", "y"]);
        fleet.run("x", "a", "i-1", LONG).await;
        let mut context = fleet.context();
        let wrong = move || Timestamp::from_millis(wall().as_millis() + ahead_ms);
        context.clock = Arc::new(SystemClock::with_wall(wrong));
        let dog = fleet.watchdog_in(context).await;
        fleet.run("y", "a", "i-1", short(2_000)).await;
        let recovered = fleet.recovery("y").await;
        assert_eq!(recovered.reason, RecoveryReason::TimedOut);
        assert!(recovered.detected_after_ms < 60_000, "{recovered:?}");
        let ended: Vec<_> =
            agent.terminations().iter().map(|request| request["execution_id"].clone()).collect();
        assert_eq!(ended, ["y"], "{ahead_ms}");
        dog.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_machine_slept_the_clock_is_the_logs_again() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    agent.list(&["x", "y"]);
    let context = fleet.context();
    let clock = Arc::clone(&context.clock);
    let dog = fleet.watchdog_in(context).await;
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.run("y", "a", "i-1", short(3_000)).await;
    // While it slept the wall clock went on, and ours did not.
    clock.shift(-HOUR_MS);
    assert_eq!(fleet.recovery("y").await.reason, RecoveryReason::TimedOut);
    let status = fleet.api("watchdog.status", json!({})).await;
    assert_eq!(status["sight"]["last_trouble"], "clock_jump", "{status}");
    assert_eq!(agent.terminations().len(), 1);
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_not_read_in_time_makes_evidence_void_until_it_is() {
    let post = Post::start().await;
    let before = post.sees_since(Timestamp::default()).await;
    let begun = tokio::time::Instant::now();
    post.fleet.register("a", "i-1").await;
    let last = post.fleet.log.last_seq().await.unwrap();
    let trouble = || post.shared.with(|world, _| (world.sight.since(), world.sight.trouble().as_str()));
    post.fleet.until("it is blind", async || trouble() == (None, "log_behind")).await;
    assert!(begun.elapsed() < CANARY_INTERVAL + 2 * CANARY_TIMEOUT, "{:?}", begun.elapsed());
    post.seen.send_replace(last);
    post.sees_since(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ended_is_not_asked_to_end_by_a_watchdog_that_is_behind() {
    let post = Post::start().await;
    let fleet = &post.fleet;
    let agent = FakeAgent::start(fleet, "a", "i-1").await;
    agent.list(&["x"]);
    fleet.register("a", "i-1").await;
    fleet.run("x", "a", "i-1", short(1)).await;
    let known = fleet.log.read_range(0, 100, &[]).await.unwrap();
    fleet.complete("x", "a", "i-1").await;
    post.shared.with(|world, now| {
        for entry in &known.entries {
            world.apply(&post.shared.subjects, &entry.subject, entry.seq, &entry.bytes, now).unwrap();
        }
    });
    let context = fleet.context();
    let alive = context.register_loop("scheduler", PATIENCE);
    tokio::spawn(recover::schedule(Arc::clone(&post.shared), alive, context.shutdown.clone()));
    let id = execution_id("x");
    fleet
        .until("it is known to have ended", async || {
            post.shared.with(|world, _| !world.executions.contains_key(&id))
        })
        .await;
    context.shutdown.cancel();
    assert_eq!(agent.terminations(), Vec::<serde_json::Value>::new());
}

/// The watchdog may read single messages of the log, or may not: it is not answered then.
fn users(dog: &str) -> String {
    format!(
        "no_auth_user: test\nauthorization {{ users: [ {{user: dog, password: dog{dog}}}, \
         {{user: test, password: test}} ] }}"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_that_can_not_be_read_now_ends_nothing_and_is_read_later() {
    let denied = users(r#", permissions: {publish: {deny: ["$JS.API.STREAM.MSG.GET.>"]}}"#);
    let mut fleet = Fleet::start_with(Some(&denied)).await;
    fleet.set("ROLLCALL_NATS_USER", "dog");
    fleet.set("ROLLCALL_NATS_PASSWORD", "dog");
    fleet.register("a", "i-1").await;
    fleet.run("x", "a", "i-1", LONG).await;
    let failed = Failed {
        execution_id: execution_id("x"),
        attempt: 1,
        agent_id: Some(agent_id("a")),
        instance_id: Some(instance_id("i-1")),
        outcome: None,
        error: ErrorBody { code: "test".to_owned(), message: String::new() },
    };
    fleet.execution_event(failed.into()).await;
    let retried = Retried { execution_id: execution_id("x"), attempt: 2, by: "test".to_owned() };
    fleet.execution_event(retried.into()).await;
    let dog = fleet.watchdog().await;
    assert_eq!(fleet.api("watchdog.status", json!({})).await["open"], 0);
    fleet.server.configure(Some(&users("")));
    fleet.server.restart().unwrap();
    fleet
        .until("its history is read", async || fleet.api("watchdog.status", json!({})).await["open"] == 1)
        .await;
    dog.stop().await;
}
