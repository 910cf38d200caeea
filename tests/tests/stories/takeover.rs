//! A dispatcher that dies for good while another one lives: what it had begun is taken up.

use std::time::Duration;

use bytes::Bytes;
use e2e::{
    Fleet, OnDispatch, OnTerminate, ScriptedAgent,
    fleet::{Options, SOON, kinds},
    until,
};
use serde_json::{Value, json};

use super::crashes::redis;

/// Absence proves nothing within a story: the watchdog does not end it before the dispatcher does.
const LONG_MS: u64 = 600_000;

fn options() -> Options {
    Options::default().env("ROLLCALL_DISPATCH_GRACE_MS", LONG_MS).env("ROLLCALL_LOST_AFTER_MS", LONG_MS)
}

/// Kills the dispatcher that wrote an event, for good.
fn kill_author(fleet: &mut Fleet, event: &Value) {
    let source = event["source"].as_str().expect("a source");
    let instance = source.rsplit('/').next().expect("an instance").to_owned();
    let wrote = |(name, process): (&String, &e2e::process::Process)| {
        (name.starts_with("dispatcher") && process.output().contains(&instance)).then(|| name.clone())
    };
    let name = fleet.services.iter().find_map(wrote).expect("one of the dispatchers wrote it");
    fleet.service(&name).kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_whose_dispatcher_died_is_carried_out() {
    let mut fleet = Fleet::start_with(options().replicas("dispatcher", 2)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = fleet.submit(json!({"agent_id": "a"})).await["execution_id"].as_str().unwrap().to_owned();
    fleet.state(&work, "running", SOON).await;
    agent.on_terminate(OnTerminate::Silent);
    fleet
        .api("cancel", json!({"execution_id": work, "reason": "enough"}))
        .await
        .expect("it can be cancelled");
    let wish = fleet.event(&work, "execution.cancel_requested", SOON).await;
    kill_author(&mut fleet, &wish);
    agent.on_terminate(OnTerminate::Confirm);
    fleet.state(&work, "cancelled", SOON).await;
    let ended = fleet.event(&work, "execution.cancelled", SOON).await;
    assert_ne!(ended["source"], wish["source"]);
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatch_whose_dispatcher_died_is_settled() {
    let mut fleet = Fleet::start_with(options().replicas("dispatcher", 2)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::TakeSilently);
    agent.beats(false);
    // Its submitter gets no answer from who dies.
    let body = json!({"execution_id": "taken", "agent_id": "a"});
    fleet.bus.publish(fleet.subjects.api("submit"), Bytes::from(body.to_string())).await.expect("published");
    agent.given("taken").await;
    let dispatched = fleet.event("taken", "execution.dispatched", SOON).await;
    kill_author(&mut fleet, &dispatched);
    agent.beats(true);
    fleet.state("taken", "running", SOON).await;
    assert_eq!(agent.dispatched(), [("taken".to_owned(), 1)], "its heartbeats said so");
    fleet.audit().await;
}

/// A failover to a replica that had not got everything: the dispatcher that had written it is gone, and the other one has
/// only the log to know by.
#[tokio::test(flavor = "multi_thread")]
async fn redis_that_went_back_in_time_is_noticed_by_who_had_not_written_it() {
    let mut fleet =
        Fleet::start_with(options().replicas("dispatcher", 2).env("ROLLCALL_AUDIT_INTERVAL_MS", LONG_MS))
            .await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let done = fleet.submit(json!({"agent_id": "a"})).await["execution_id"].as_str().unwrap().to_owned();
    agent.given(&done).await;
    agent.report(&done, 1, "completed", json!({"result": 1})).await;
    fleet.state(&done, "completed", SOON).await;
    fleet.holds_nothing("a").await;
    let copied = |from: &str, to: &str| {
        format!(
            "EVAL \"for _, k in ipairs(redis.call('KEYS', '{to}rollcall:*')) do redis.call('DEL', k) end \
             for _, k in ipairs(redis.call('KEYS', '{from}rollcall:*')) do \
             redis.call('COPY', k, '{to}' .. string.sub(k, {} + 1)) end return 1\" 0",
            from.len()
        )
    };
    redis(&fleet.redis, &copied("", "kept:")).await;
    let runs = fleet.submit(json!({"agent_id": "a"})).await["execution_id"].as_str().unwrap().to_owned();
    fleet.state(&runs, "running", SOON).await;
    let dispatched = fleet.event(&runs, "execution.dispatched", SOON).await;
    kill_author(&mut fleet, &dispatched);
    redis(&fleet.redis, &copied("kept:", "")).await;
    let next = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(next["state"], "queued", "its slot is taken: {next}");
    assert!(!fleet.events_of("system.capacity_rebuilt").await.is_empty());
    fleet.audit().await;
}

/// The agent took it and has not found its way back to the bus when it is asked again: that nobody answers is no refusal.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_when_it_is_asked_again_is_no_refusal() {
    let mut fleet = Fleet::start_with(options()).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::TakeSilently);
    agent.beats(false);
    let body = json!({"execution_id": "taken", "pool": "default"});
    fleet.bus.publish(fleet.subjects.api("submit"), Bytes::from(body.to_string())).await.expect("published");
    agent.given("taken").await;
    fleet.service("dispatcher").kill();
    agent.vanish().await;
    let other = ScriptedAgent::start(&fleet.bus, "b", 1).await;
    fleet.status("b", "connected", SOON).await;
    fleet.service("dispatcher").start_again();
    fleet.ready().await;
    // It beats again, first without what it took (the heartbeat was on its way), and nobody listens yet.
    let beat = |seq: u64, executions: Value| {
        let beat = json!({"instance_id": agent.instance, "seq": seq, "state": "ready", "capacity": 1,
            "executions": executions, "interval_ms": 1000});
        fleet.bus.publish("rollcall.heartbeat.a".to_owned(), Bytes::from(beat.to_string()))
    };
    let mut seq = 1000;
    until("the dispatcher to have asked again", SOON, || {
        seq += 1;
        let unlisted = beat(seq, json!([]));
        let fleet = &fleet;
        async move {
            unlisted.await.map_err(|e| e.to_string())?;
            let output = fleet.services["dispatcher"].output();
            if output.contains("asked again, and nobody is there") { Ok(()) } else { Err(output) }
        }
    })
    .await;
    beat(seq + 1000, json!([{"id": "taken", "attempt": 1}])).await.expect("published");
    let view = fleet.state("taken", "running", Duration::from_secs(10)).await;
    assert_eq!(view["agent_id"], "a", "{view}");
    assert!(other.dispatched().is_empty(), "{:?}", other.dispatched());
    let history = kinds(&fleet.history("taken").await);
    assert_eq!(history.iter().filter(|kind| *kind == "execution.dispatched").count(), 1, "{history:?}");
}
