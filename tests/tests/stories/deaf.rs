//! What happens when a service can't trust its own ears.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use e2e::{Fleet, ScriptedAgent, fleet::SOON, lasts, until};
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Longer than an agent takes to be silent to the threshold (3.5 s) and to be lost; shorter than the server waits
/// before it cuts a connection that reads nothing (10 s).
const STANDSTILL: Duration = Duration::from_secs(6);

/// The services that listen to heartbeats, and what says whether they hear.
const LISTENERS: [(&str, &str); 2] =
    [("health-prober", "rollcall_prober_sees"), ("watchdog", "rollcall_watchdog_sees")];

/// A process that speaks for itself by heartbeats alone, and holds what it says it holds.
struct Quiet {
    instance: &'static str,
    holds: Arc<AtomicBool>,
    speaks: Arc<AtomicBool>,
    _stop: DropGuard,
}

impl Quiet {
    /// Two heartbeats a second of an instance of agent `a` that may hold execution `x`.
    fn start(fleet: &Fleet, instance: &'static str) -> Self {
        let stop = CancellationToken::new();
        let quiet = Self {
            instance,
            holds: Arc::default(),
            speaks: Arc::new(true.into()),
            _stop: stop.clone().drop_guard(),
        };
        let (bus, holds, speaks) = (fleet.bus.clone(), Arc::clone(&quiet.holds), Arc::clone(&quiet.speaks));
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(500));
            let mut seq = 0;
            loop {
                tokio::select! {
                    _ = tick.tick() => {}
                    () = stop.cancelled() => return,
                }
                if !speaks.load(Ordering::SeqCst) {
                    continue;
                }
                seq += 1;
                let held =
                    if holds.load(Ordering::SeqCst) { json!([{"id": "x", "attempt": 1}]) } else { json!([]) };
                let beat = json!({"instance_id": instance, "seq": seq, "state": "ready", "capacity": 1,
                    "interval_ms": 1000, "executions": held});
                // Not connected for a moment: the next one will do.
                let _ = bus.publish("rollcall.heartbeat.a", Bytes::from(beat.to_string())).await;
            }
        });
        quiet
    }
}

/// Long heartbeats that count for nothing (their numbers are old) and take their time to be read.
async fn flood(fleet: &Fleet, agent: &ScriptedAgent) {
    /// A second of reading, in a program built for debugging; well within what the server keeps for a connection.
    const LONG_HEARTBEATS: usize = 400;
    let held: Vec<Value> = (0..1000).map(|n| json!({"id": format!("{n:040}"), "attempt": 1})).collect();
    let beat = json!({"instance_id": agent.instance, "seq": 1, "state": "ready", "capacity": 1000,
        "interval_ms": 1000, "executions": held});
    let beat = Bytes::from(beat.to_string());
    for _ in 0..LONG_HEARTBEATS {
        let subject = format!("rollcall.heartbeat.{}", agent.id);
        fleet.bus.publish(subject, beat.clone()).await.expect("the bus takes heartbeats");
    }
    fleet.bus.flush().await.expect("the bus has them");
}

async fn row(fleet: &Fleet) -> Result<String, String> {
    let explained = fleet.api("explain", json!({"execution_id": "x"})).await.map_err(|e| format!("{e:?}"))?;
    Ok(explained["row"].as_str().unwrap_or_default().to_owned())
}

/// An old process finishes its work beside its replacement, and only its heartbeats say so. The watchdog alone stands
/// still; when it goes on, all that it has is its old word, and what it asks for is answered before it has read the
/// heartbeats that wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_watchdog_that_stood_still_takes_nobody_for_dead() {
    let fleet = Fleet::start().await;
    let old = Quiet::start(&fleet, "old");
    fleet.status("a", "connected", SOON).await;
    let taken = fleet.submit(json!({"execution_id": "x", "agent_id": "a", "delivery": "external"})).await;
    assert_eq!(taken["state"], "running", "{taken}");
    old.holds.store(true, Ordering::SeqCst);
    let new = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    let other = ScriptedAgent::start(&fleet.bus, "b", 1).await;
    fleet.status("b", "connected", SOON).await;
    until("the old instance to vouch for its work", SOON, || async {
        let row = row(&fleet).await?;
        if row == "superseded_vouched" { Ok(()) } else { Err(row) }
    })
    .await;

    old.speaks.store(false, Ordering::SeqCst);
    let voids = async || {
        fleet.metric("watchdog", "rollcall_evidence_void_total").await.map(Option::unwrap_or_default)
    };
    let before = voids().await.expect("it shows its metrics");
    fleet.services["watchdog"].freeze().await;
    let begun = std::time::Instant::now();
    flood(&fleet, &other).await;
    old.speaks.store(true, Ordering::SeqCst);
    assert!(begun.elapsed() < Duration::from_secs(2), "its silence is not long enough to mean anything");
    let recovered = || async {
        let found = fleet.events_of("execution.recovered").await;
        if found.is_empty() { Ok(()) } else { Err(found) }
    };
    lasts("nothing is recovered", STANDSTILL, recovered).await;
    fleet.services["watchdog"].thaw();
    lasts("nothing is recovered", STANDSTILL, recovered).await;

    assert!(voids().await.expect("it shows its metrics") > before, "that it did not see is counted");
    assert_eq!(row(&fleet).await.as_deref(), Ok("superseded_vouched"));
    assert_eq!(fleet.execution("x").await.expect("it is known")["instance_id"], old.instance);
    let released = json!({"execution_id": "x", "attempt": 1, "outcome": "completed"});
    fleet.api("release", released).await.expect("it is done");
    fleet.state("x", "completed", SOON).await;
    assert_eq!(new.held(), Vec::<String>::new());
    fleet.audit().await;
}

/// Every connection stays, and nothing passes: whoever counts silence finds out that it is his own, and counts anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_stands_still_is_noticed_and_condemns_nobody() {
    let fleet = Fleet::start().await;
    let sees = |value: f64| {
        let fleet = &fleet;
        until("both to see, or not", SOON, move || async move {
            let mut seen = Vec::new();
            for (service, metric) in LISTENERS {
                seen.push(fleet.metric(service, metric).await?);
            }
            if seen.iter().all(|seen| *seen == Some(value)) { Ok(()) } else { Err(format!("{seen:?}")) }
        })
    };
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    fleet.submit(json!({"execution_id": "x", "agent_id": "a"})).await;
    fleet.state("x", "running", SOON).await;
    sees(1.0).await;
    fleet.nats.freeze().expect("it takes signals");
    sees(0.0).await;
    fleet.nats.thaw().expect("it takes signals");
    sees(1.0).await;
    // The test's own link may have been given up as well, and is back now.
    fleet.status("a", "connected", SOON).await;
    // Longer than it took: whatever they would conclude, they have concluded.
    lasts("it runs, and nobody is suspected", STANDSTILL, || async {
        for kind in ["execution.recovered", "agent.disconnected", "agent.error"] {
            let found = fleet.events_of(kind).await;
            if !found.is_empty() {
                return Err(format!("{kind}: {found:?}"));
            }
        }
        let view = fleet.execution("x").await.map_err(|e| format!("{e:?}"))?;
        if view["state"] == "running" { Ok(()) } else { Err(view.to_string()) }
    })
    .await;
    agent.report("x", 1, "completed", json!({"result": 1})).await;
    fleet.state("x", "completed", SOON).await;
    fleet.audit().await;
}
