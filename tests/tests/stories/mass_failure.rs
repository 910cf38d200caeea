//! Many agents silent at once: a failure of something else, until it is known to be theirs.

use std::time::Duration;

use e2e::{
    Fleet, ScriptedAgent,
    fleet::{Options, SOON},
    lasts,
    proxy::{Flow, Proxy, Upstream},
    until,
};
use rollcall_core::Timestamp;
use rollcall_nats::{Bus, BusOptions};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

fn id(reply: &Value) -> String {
    reply["execution_id"].as_str().expect("an execution id").to_owned()
}

fn time_of(event: &Value) -> i64 {
    Timestamp::parse(event["time"].as_str().expect("a time")).expect("RFC 3339").as_millis()
}

/// So many agents, each with so much running work.
async fn busy_agents(
    fleet: &Fleet,
    bus: &Bus,
    agents: usize,
    work: u32,
) -> Vec<(ScriptedAgent, Vec<String>)> {
    let mut all = Vec::new();
    for n in 0..agents {
        let name = format!("a{n}");
        let agent = ScriptedAgent::start(bus, &name, work).await;
        fleet.status(&name, "connected", SOON).await;
        let mut held = Vec::new();
        for _ in 0..work {
            held.push(id(&fleet.submit(json!({"agent_id": name})).await));
        }
        for execution in &held {
            fleet.state(execution, "running", SOON).await;
        }
        all.push((agent, held));
    }
    all
}

async fn system_event(fleet: &Fleet, kind: &str) -> Value {
    until(&format!("system.{kind}"), SOON, || async {
        fleet.events_of(&format!("system.{kind}")).await.first().cloned().ok_or("nothing yet")
    })
    .await
}

/// How long silence takes to be lost, and the breaker's window: by default they are the same, too.
const WINDOW: Duration = Duration::from_secs(4);

async fn cut_from_all_agents(how: Flow) {
    let window_ms = WINDOW.as_millis();
    let options = Options::default()
        .env("ROLLCALL_BREAKER_WINDOW_MS", window_ms)
        .env("ROLLCALL_LOST_AFTER_MS", window_ms);
    let fleet = Fleet::start_with(options).await;
    let proxy = Proxy::start(Upstream::Port(fleet.nats.port()), &[]).await;
    let options = BusOptions {
        url: format!("nats://{}", proxy.address()),
        prefix: "rollcall".to_owned(),
        connection_name: "the agents".to_owned(),
        ..BusOptions::default()
    };
    let far = Bus::connect(options, CancellationToken::new()).await.expect("a connection through the proxy");
    let agents = busy_agents(&fleet, &far, 4, 1).await;
    proxy.set(how);
    for (agent, _) in &agents {
        fleet.status(&agent.id, "error", SOON).await;
    }
    system_event(&fleet, "recovery_suspended").await;
    // Until the window has moved on several times, and lost_after has passed as often.
    lasts("nothing is recovered", 4 * WINDOW, || async {
        let found = fleet.events_of("execution.recovered").await;
        if found.is_empty() { Ok(()) } else { Err(found) }
    })
    .await;
    assert_eq!(fleet.events_of("system.recovery_resumed").await, Vec::<Value>::new());
    let explained = fleet.api("explain", json!({"execution_id": agents[0].1[0]})).await;
    let waits = explained.expect("the watchdog explains what it knows");
    assert_eq!(waits["row"], "suspended", "{waits}");
    let status = fleet.api("watchdog.status", json!({})).await.expect("the watchdog says how it is");
    assert_eq!(status["breaker"]["nobody_is_heard"], true, "{status}");
    proxy.set(Flow::Open);
    for (agent, _) in &agents {
        fleet.status(&agent.id, "connected", SOON).await;
    }
    system_event(&fleet, "recovery_resumed").await;
    for (agent, held) in &agents {
        for execution in held {
            agent.report(execution, 1, "completed", json!({"result": "of old"})).await;
            fleet.state(execution, "completed", SOON).await;
        }
    }
    for (kind, times) in
        [("execution.recovered", 0), ("system.recovery_suspended", 1), ("system.recovery_resumed", 1)]
    {
        let found = fleet.events_of(kind).await;
        assert_eq!(found.len(), times, "{kind}: {found:?}");
    }
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_drops_everything_condemns_nobody() {
    cut_from_all_agents(Flow::Stalled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_all_agents_cut_condemn_nobody() {
    cut_from_all_agents(Flow::Severed).await;
}

/// Recoveries a second, and at once, of the next story.
const RATE: usize = 2;
/// How long its agents may be silent.
const LOST_AFTER_MS: i64 = 4_000;

#[tokio::test(flavor = "multi_thread")]
async fn half_the_fleet_killed_at_once() {
    let options = Options::default()
        .env("ROLLCALL_BREAKER_WINDOW_MS", 15_000)
        .env("ROLLCALL_RECOVERY_RATE", RATE)
        .env("ROLLCALL_LOST_AFTER_MS", LOST_AFTER_MS);
    let fleet = Fleet::start_with(options).await;
    let mut agents = busy_agents(&fleet, &fleet.bus, 8, 3).await;
    let dead = agents.split_off(4);
    let lost: Vec<String> = dead.iter().flat_map(|(_, held)| held.clone()).collect();
    drop(dead);
    let suspended = system_event(&fleet, "recovery_suspended").await;
    assert_eq!(
        (&suspended["data"]["silent"], &suspended["data"]["of"]),
        (&json!(4), &json!(8)),
        "{suspended}"
    );
    // A dry run says what stands there, and what it would do, and does nothing.
    let report = until("a dry run to see all that is suspended", SOON, || async {
        match fleet.api("watchdog.run", json!({"dry_run": true})).await {
            Ok(report) if report["rows"]["suspended"] == lost.len() => Ok(report),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!((&report["dry_run"], &report["categories"]["deferred"]), (&json!(true), &json!(lost.len())));
    let named = report["executions"].as_array().unwrap();
    assert!(lost.iter().all(|l| named.iter().any(|n| n["execution_id"] == l.as_str())), "{report}");
    let status = fleet.api("watchdog.status", json!({})).await.unwrap();
    assert_eq!(status["breaker"]["suspended"], true, "{status}");
    assert_eq!((&status["breaker"]["silent"], &status["breaker"]["of"]), (&json!(4), &json!(8)), "{status}");
    assert_eq!(status["breaker"]["nobody_is_heard"], false, "{status}");
    assert_eq!(status["rate_limit"]["per_second"], RATE, "{status}");
    assert_eq!(fleet.metric("watchdog", "rollcall_recovery_suspended").await, Ok(Some(1.0)));
    assert_eq!(fleet.events_of("execution.recovered").await, Vec::<Value>::new());
    // The window moves on: they are dead, not cut off.
    let resumed = system_event(&fleet, "recovery_resumed").await;
    until("the line of the rate limit to be seen", SOON, || async {
        let backlog = fleet.metric("watchdog", "rollcall_recovery_backlog_seconds").await?;
        if backlog.is_some_and(|seconds| seconds > 0.0) { Ok(()) } else { Err(format!("{backlog:?}")) }
    })
    .await;
    let mut times = Vec::new();
    for execution in &lost {
        let event = fleet.event(execution, "execution.recovered", SOON).await;
        assert_eq!(event["data"]["reason"], "agent_lost", "{event}");
        times.push(time_of(&event));
    }
    times.sort_unstable();
    // Every clock started again with it: what was silent all the time is lost only now.
    let since_resumed = times[0] - time_of(&resumed);
    assert!(since_resumed >= LOST_AFTER_MS - 500, "{since_resumed} ms after it was resumed");
    for (n, start) in times.iter().enumerate() {
        let inside = times[n..].iter().take_while(|t| **t < start + 1000).count();
        // A burst of one second's worth, the rate itself, and one for an append that took a moment longer.
        assert!(inside <= 2 * RATE + 1, "{inside} within a second: {times:?}");
    }
    for (_, held) in &agents {
        for execution in held {
            assert_eq!(fleet.execution(execution).await.unwrap()["state"], "running");
        }
    }
    for (kind, count) in [
        ("execution.recovered", lost.len()),
        ("system.recovery_suspended", 1),
        ("system.recovery_resumed", 1),
    ] {
        let found = fleet.events_of(kind).await;
        assert_eq!(found.len(), count, "{kind}: {found:?}");
    }
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_drained_and_gone_on_purpose_never_suspend_recovery() {
    let fleet = Fleet::start().await;
    let agents = busy_agents(&fleet, &fleet.bus, 6, 1).await;
    for (agent, _) in &agents[..5] {
        fleet.api("drain", json!({"agent_id": agent.id, "reason": "night"})).await.unwrap();
    }
    // Four of them go, as they were asked to.
    for (agent, held) in &agents[..4] {
        agent.report(&held[0], 1, "completed", json!({"result": 1})).await;
        fleet.state(&held[0], "completed", SOON).await;
        agent.says("gone");
        assert_eq!(agent.beat().await["status"], "gone");
        agent.vanish().await;
    }
    // One of the two that are left dies with work in its hands: that is no mass failure.
    let (dead, held) = &agents[4];
    dead.vanish().await;
    let event = fleet.event(&held[0], "execution.recovered", SOON).await;
    assert_eq!(event["data"]["reason"], "agent_lost", "{event}");
    assert_eq!(fleet.execution(&agents[5].1[0]).await.unwrap()["state"], "running");
    assert_eq!(fleet.events_of("system.recovery_suspended").await, Vec::<Value>::new());
    fleet.audit().await;
}
