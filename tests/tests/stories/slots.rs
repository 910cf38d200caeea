//! What crashes leave in Redis, as if somebody had made them happen at the worst moment: found, said, and put right.

use std::time::{Duration, Instant};

use e2e::{
    Fleet, OnDispatch, ScriptedAgent,
    fleet::{Options, SOON},
};
use serde_json::{Value, json};

use super::crashes::{redis, repairs, told};

/// Nobody audits by himself within a story.
const NEVER_MS: u64 = 3_600_000;
/// How long work may wait beside a free slot: it is looked at once a second.
const SEEN_WITHIN: Duration = Duration::from_secs(5);

fn id(reply: &Value) -> String {
    reply["execution_id"].as_str().expect("an execution id").to_owned()
}

/// A crash between an end and the return of its slot: the hold of an attempt that has ended is still on agent `a`.
async fn leak(fleet: &Fleet, execution: &str) {
    let script = format!(
        "redis.call('HSET', 'rollcall:{{default}}:where', '{execution}:1', 'sa') \
         redis.call('ZREM', 'rollcall:{{default}}:free', 'a') \
         return redis.call('ZADD', 'rollcall:{{default}}:slots:a', 1, '{execution}:1')"
    );
    redis(&fleet.redis, &format!("EVAL \"{script}\" 0")).await;
}

/// And one between a start and the note of its slot: agent `a` runs it, and Redis has never heard of it.
async fn forget(fleet: &Fleet, execution: &str) {
    let script = format!(
        "redis.call('HDEL', 'rollcall:{{default}}:where', '{execution}:1') \
         redis.call('ZADD', 'rollcall:{{default}}:free', 0, 'a') \
         return redis.call('ZREM', 'rollcall:{{default}}:slots:a', '{execution}:1')"
    );
    redis(&fleet.redis, &format!("EVAL \"{script}\" 0")).await;
}

/// Work that has run on agent `a` and ended, and whose slot came back: what is done to Redis now stays done.
async fn ended(fleet: &Fleet, agent: &ScriptedAgent) -> String {
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    agent.given(&work).await;
    agent.report(&work, 1, "completed", json!({"result": 1})).await;
    fleet.state(&work, "completed", SOON).await;
    fleet.holds_nothing("a").await;
    work
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_put_right_before_anything_is_admitted() {
    let mut fleet = Fleet::start_with(Options::default().env("ROLLCALL_AUDIT_INTERVAL_MS", NEVER_MS)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    let (one, two) = (ended(&fleet, &agent).await, ended(&fleet, &agent).await);
    let runs = id(&fleet.submit(json!({"agent_id": "a"})).await);
    fleet.state(&runs, "running", SOON).await;
    fleet.service("dispatcher").kill();
    leak(&fleet, &one).await;
    leak(&fleet, &two).await;
    forget(&fleet, &runs).await;
    fleet.service("dispatcher").start_again();
    // Two leaks would leave no room for the first of them, the forgotten hold would leave room for the second.
    let first = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(first["state"], "running", "{first}");
    let second = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(second["state"], "queued", "{second}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_waits_beside_a_free_slot_is_let_in_at_once_and_that_is_said() {
    let fleet = Fleet::start_with(Options::default().env("ROLLCALL_AUDIT_INTERVAL_MS", NEVER_MS)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let done = ended(&fleet, &agent).await;
    leak(&fleet, &done).await;
    let waits = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(waits["state"], "queued", "{waits}");
    // Now the slot is free, and nothing happens that would promote anybody.
    let before = repairs(&fleet, "idle").await;
    forget(&fleet, &done).await;
    let freed = Instant::now();
    agent.given(&id(&waits)).await;
    assert!(freed.elapsed() < SEEN_WITHIN, "after {:?}", freed.elapsed());
    told(&fleet, "idle", before).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_instance_is_offered_what_the_old_one_refused() {
    let fleet = Fleet::start().await;
    let old = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    old.on_dispatch(OnDispatch::Refuse("at_capacity".into()));
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    fleet.state(&work, "queued", SOON).await;
    // No heartbeat of the old one will ever say that it may be asked again.
    old.vanish().await;
    let new = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    new.given(&work).await;
    fleet.state(&work, "running", SOON).await;
    fleet.audit().await;
}
