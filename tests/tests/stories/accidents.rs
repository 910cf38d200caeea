//! What happens when the servers stall, fill up, come late or are slow, and when a service stands still.

use std::time::Duration;

use bytes::Bytes;
use e2e::{
    Fleet, OnDispatch, ScriptedAgent,
    fleet::{Options, SOON},
    lasts,
    load::{LOAD, Load, submissions},
    until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// Longer than every silence threshold of the scaled settings: 3.5 intervals of two seconds, `lost_after`, the grace.
const FREEZE: Duration = Duration::from_secs(10);

fn signal_redis(fleet: &Fleet, signal: Signal) {
    let pid = fleet.redis.pid().expect("redis runs");
    kill(Pid::from_raw(i32::try_from(pid).expect("a process id")), signal).expect("redis takes signals");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_frozen_under_load() {
    let mut load = Load::start(Options::default()).await;
    load.submit(LOAD / 3).await;
    signal_redis(&load.fleet, Signal::SIGSTOP);
    let fleet = &load.fleet;
    let (during, ()) = tokio::join!(submissions(fleet, LOAD / 3), async {
        until("the dispatcher to say that it waits for redis", SOON, || async {
            let waits = fleet.waits_for("dispatcher").await?;
            if waits == ["redis"] { Ok(()) } else { Err(format!("{waits:?}")) }
        })
        .await;
        // Callers are told so, and told within the time they wait for.
        let refused = until("a submission to be answered", SOON, || async {
            fleet
                .api("submit", json!({"agent_id": "b"}))
                .await
                .map_or_else(Ok, |reply| Err(reply.to_string()))
        })
        .await;
        assert!(matches!(refused.code.as_str(), "unavailable" | "not_ready"), "{refused:?}");
        lasts("nothing is recovered", FREEZE, || async {
            let found = fleet.events_of("execution.recovered").await;
            if found.is_empty() { Ok(()) } else { Err(found) }
        })
        .await;
        signal_redis(fleet, Signal::SIGCONT);
    });
    load.submitted.extend(during);
    load.submit(LOAD / 3).await;
    load.ends_well().await;
    load.condemned_nobody().await;
    load.fleet.ready().await;
}

async fn frozen_under_load(service: &str) {
    let mut load = Load::start(Options::default()).await;
    load.submit(LOAD / 3).await;
    // Work that finishes while the service stands still, and work that goes on: its agent says so all the time.
    let slow = ScriptedAgent::start_with(&load.fleet.bus, "c", 2, json!({"interval_ms": 2000})).await;
    load.fleet.status("c", "connected", SOON).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let reply = load.fleet.submit(json!({"agent_id": "c"})).await;
        held.push(reply["execution_id"].as_str().expect("an id").to_owned());
    }
    for execution in &held {
        load.fleet.state(execution, "running", SOON).await;
    }
    load.fleet.service(service).freeze().await;
    let fleet = &load.fleet;
    let frozen = &fleet.services[service];
    let (during, ()) = tokio::join!(submissions(fleet, LOAD / 3), async {
        slow.report(&held[0], 1, "completed", json!({"result": 1})).await;
        lasts("nothing is recovered", FREEZE, || async {
            let found = fleet.events_of("execution.recovered").await;
            if found.is_empty() { Ok(()) } else { Err(found) }
        })
        .await;
        frozen.thaw();
    });
    load.submitted.extend(during);
    load.submit(LOAD / 3).await;
    load.fleet.state(&held[0], "completed", SOON).await;
    assert_eq!(load.fleet.execution(&held[1]).await.expect("it is known")["state"], "running");
    slow.report(&held[1], 1, "completed", json!({"result": 1})).await;
    load.submitted.extend(held);
    load.ends_well().await;
    load.condemned_nobody().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dispatcher_frozen_under_load() {
    frozen_under_load("dispatcher").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_frozen_under_load() {
    frozen_under_load("watchdog").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_health_prober_frozen_under_load() {
    frozen_under_load("health-prober").await;
}

/// Work that runs for long while everybody who watches it stands still: nobody is condemned for our own absence.
#[tokio::test(flavor = "multi_thread")]
async fn all_watchers_frozen_over_running_work() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start_with(&fleet.bus, "a", 4, json!({"interval_ms": 2000})).await;
    fleet.status("a", "connected", SOON).await;
    let mut all = Vec::new();
    for _ in 0..4 {
        all.push(fleet.submit(json!({"agent_id": "a"})).await["execution_id"].as_str().unwrap().to_owned());
    }
    for execution in &all {
        fleet.state(execution, "running", SOON).await;
    }
    for watcher in ["health-prober", "watchdog"] {
        fleet.services[watcher].freeze().await;
    }
    let held = || async { if agent.held().len() == 4 { Ok(()) } else { Err(agent.held()) } };
    lasts("it holds its work", FREEZE, held).await;
    for watcher in ["watchdog", "health-prober"] {
        fleet.services[watcher].thaw();
    }
    // Longer than it took to be silent: whatever they would conclude, they have concluded.
    lasts("it runs", FREEZE, || async {
        for execution in &all {
            let view = fleet.execution(execution).await.map_err(|e| format!("{e:?}"))?;
            if view["state"] != "running" {
                return Err(view.to_string());
            }
        }
        Ok(())
    })
    .await;
    for kind in ["execution.recovered", "agent.disconnected", "agent.error"] {
        assert_eq!(fleet.events_of(kind).await, Vec::<Value>::new(), "{kind}");
    }
    for execution in &all {
        agent.report(execution, 1, "completed", json!({"result": 1})).await;
        fleet.state(execution, "completed", SOON).await;
    }
    fleet.audit().await;
}

/// Room for the streams of the story: a few inputs, and not all of them.
const SMALL_DISK: &str = "jetstream { max_file_store: 2MB, max_memory_store: 64MB }\n";
/// Enough for everything.
const LARGE_DISK: &str = "jetstream { max_file_store: 256MB, max_memory_store: 64MB }\n";
/// Bytes of the inputs: the first fill the disk, the last leave no room for an event of any kind.
const INPUTS: [usize; 4] = [200_000, 20_000, 2_000, 1];
/// More of each than the small disk holds.
const OF_EACH: usize = 2000;

/// Submits inputs until none fits; what was taken, and what was refused.
async fn fill(fleet: &Fleet) -> (Vec<String>, Vec<(String, usize)>) {
    let (mut taken, mut refused) = (Vec::new(), Vec::new());
    for bytes in INPUTS {
        let full = refused.len();
        for n in 0..OF_EACH {
            let id = format!("of-{bytes}-{n}");
            let body = json!({"execution_id": id, "agent_id": "a", "input": "x".repeat(bytes)});
            match fleet.api("submit", body).await {
                Ok(_) => taken.push(id),
                Err(error) => {
                    assert_eq!(error.code, "unavailable", "{error:?}");
                    let why = error.message.contains("full") || error.message.contains("resources");
                    assert!(why, "{error:?}");
                    refused.push((id, bytes));
                    break;
                }
            }
        }
        assert!(refused.len() > full, "the disk is full at some point");
    }
    (taken, refused)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_loses_nothing() {
    let options = Options { nats_config: Some(SMALL_DISK.to_owned()), ..Options::default() };
    let mut fleet = Fleet::start_with(options.env("ROLLCALL_QUEUE_DEPTH", 10_000)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 5).await;
    fleet.status("a", "connected", SOON).await;
    let (mut taken, refused) = fill(&fleet).await;
    assert!(taken.len() >= 5, "{taken:?} before {refused:?}");
    // A refused submission leaves no event. What was taken is known, and held.
    for (id, _) in &refused {
        assert_eq!(fleet.execution(id).await.unwrap_err().code, "not_found");
    }
    for id in &taken[..5] {
        fleet.state(id, "running", SOON).await;
    }
    // A report that the full stream does not take is not taken: its agent lists it on.
    let body = json!({"instance_id": agent.instance, "attempt": 1, "outcome": "completed",
        "result": "x".repeat(INPUTS[0])});
    let subject = format!("rollcall.report.a.{}", taken[0]);
    let reports = rollcall_nats::Reports::new(&fleet.bus);
    let report = reports.publish(&subject, Bytes::from(body.to_string())).await;
    assert!(report.is_err(), "{report:?}");
    // Somebody makes room.
    fleet.nats.configure(Some(LARGE_DISK));
    fleet.nats.restart().expect("it restarts");
    fleet.ready().await;
    for (id, bytes) in refused {
        fleet.submit(json!({"execution_id": id, "agent_id": "a", "input": "x".repeat(bytes)})).await;
        taken.push(id);
    }
    agent.on_dispatch(OnDispatch::Complete);
    for id in &taken {
        agent.given(id).await;
        if agent.held().contains(id) {
            agent.report(id, 1, "completed", json!({"result": 1})).await;
        }
    }
    for id in &taken {
        let view = fleet.state(id, "completed", SOON).await;
        assert_eq!(view["attempt"], 1);
    }
    assert_eq!(fleet.events_of("execution.recovered").await, Vec::<Value>::new());
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_wait_for_servers_that_come_late() {
    let options = Options { servers_down: true, ..Options::default() };
    let mut fleet = Fleet::start_with(options).await;
    let names: Vec<String> = fleet.services.keys().cloned().collect();
    for name in &names {
        until(&format!("{name} to say what it waits for"), SOON, || async {
            let waits = fleet.waits_for(name).await?;
            let output = fleet.services[name].output();
            if waits.contains(&"nats".to_owned()) && output.contains("waiting for nats") {
                Ok(())
            } else {
                Err(format!("{waits:?}\n{output}"))
            }
        })
        .await;
    }
    fleet.nats.start_again().expect("it starts");
    // Redis is still away: whoever needs it says so, to people and to callers.
    until("the dispatcher to wait for redis", SOON, || async {
        let waits = fleet.waits_for("dispatcher").await?;
        let output = fleet.services["dispatcher"].output();
        let nats = waits.iter().any(|w| w == "nats" || w == "streams");
        let redis = waits.iter().any(|w| w == "redis");
        if redis && !nats && output.contains("waiting to reconcile") {
            Ok(())
        } else {
            Err(format!("{waits:?}"))
        }
    })
    .await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let refused = fleet.api("submit", json!({"agent_id": "a"})).await.unwrap_err();
    assert_eq!((refused.code.as_str(), refused.headers), ("not_ready", true), "{refused:?}");
    fleet.redis.restart();
    fleet.ready().await;
    let taken = fleet.api("submit", json!({"agent_id": "a"})).await.unwrap();
    let id = taken["execution_id"].as_str().unwrap();
    agent.given(id).await;
    agent.report(id, 1, "completed", json!({"result": 1})).await;
    fleet.state(id, "completed", SOON).await;
    fleet.audit().await;
}

/// What a Redis in another data centre, on a busy day, adds to every answer.
const SLOW: &[Duration] =
    &[Duration::from_millis(50), Duration::from_millis(150), Duration::from_millis(100)];

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_redis_makes_things_slow_and_nothing_wrong() {
    let mut load = Load::start(Options { redis_delays: SLOW, ..Options::default() }).await;
    load.submit(LOAD / 2).await;
    load.ends_well().await;
    load.condemned_nobody().await;
}
