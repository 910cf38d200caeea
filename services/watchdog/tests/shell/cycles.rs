//! Cycles over many agents: side by side, each by itself, and what is said of them.

use std::{cell::RefCell, time::Duration};

use rollcall_core::event::{RecoveryReason, SystemEventKind, TerminateOutcome};
use serde_json::json;
use watchdog::edge::TERMINATE_SLACK;

use crate::{
    control,
    harness::{FakeAgent, Fleet, LONG, Manner},
    http::HttpAgent,
    short,
};

/// Registries of the first test, and how long each takes: one after the other they would take six seconds. What one
/// takes is well within the time that it has.
const REGISTRIES: usize = 31;
const EACH_HAS_MS: u64 = 1_500;
const EACH_TAKES: Duration = Duration::from_millis(200);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_registries_are_asked_side_by_side_and_one_that_hangs_delays_no_other() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8");
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", "600000");
    fleet.set("ROLLCALL_PROBE_TIMEOUT_MS", &EACH_HAS_MS.to_string());
    let mut registries = Vec::new();
    for n in 0..REGISTRIES {
        let registry = HttpAgent::start().await;
        registry.slow(if n == 0 { Duration::from_secs(3600) } else { EACH_TAKES });
        fleet.register_with(&format!("h{n}"), &format!("i{n}"), control(&registry.url)).await;
        registries.push(registry);
    }
    let dog = fleet.watchdog().await;
    let calls = || registries[1..].iter().map(HttpAgent::calls).collect::<Vec<_>>();
    let (before, report) = (RefCell::new(Vec::new()), RefCell::new(json!({})));
    // The cycle of its start may still run.
    fleet
        .until("a cycle of its own", async || {
            before.replace(calls());
            let answer = fleet.api("watchdog.run", json!({})).await;
            let own = answer["error"]["code"] != "conflict";
            report.replace(answer);
            own
        })
        .await;
    let (before, report) = (before.into_inner(), report.into_inner());
    assert_eq!(report["registries"], json!({"asked": REGISTRIES, "unreachable": 1}), "{report}");
    // The slowest decides: the one that hangs, whose time is up.
    let took = report["took_ms"].as_u64().unwrap();
    assert!((EACH_HAS_MS..6_000).contains(&took), "{took} ms");
    assert!(calls().iter().zip(before).all(|(now, before)| *now == before + 1), "once each");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_stops_answering_is_skipped_and_proves_nothing() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8");
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", "300");
    let registry = HttpAgent::start().await;
    fleet.register_with("h", "i-1", control(&registry.url)).await;
    registry.runs(&["x"]);
    fleet.run("x", "h", "i-1", LONG).await;
    let dog = fleet.watchdog().await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    registry.breaks();
    let before = registry.calls();
    fleet
        .until("many cycles ask in vain", async || {
            let status = fleet.api("watchdog.status", json!({})).await;
            registry.calls() >= before + 10 && status["last_cycle"]["registries"]["unreachable"] == 1
        })
        .await;
    assert!(fleet.recoveries().await.is_empty());
    assert_eq!(fleet.row("x").await, "healthy", "its last word stands");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_ended_holds_up_nobody_else() {
    let fleet = Fleet::start().await;
    let stubborn = FakeAgent::start(&fleet, "stubborn", "i-1").await;
    stubborn.manner(Manner::Ignores);
    let obedient = FakeAgent::start(&fleet, "obedient", "i-2").await;
    fleet.register("stubborn", "i-1").await;
    fleet.register("obedient", "i-2").await;
    let dog = fleet.watchdog().await;
    let stuck: Vec<String> = (0..20).map(|n| format!("stuck{n}")).collect();
    for id in &stuck {
        fleet.run(id, "stubborn", "i-1", short(1_000)).await;
        stubborn.list_more(id);
    }
    obedient.list(&["late"]);
    fleet.run("late", "obedient", "i-2", short(1_500)).await;
    let late = fleet.recovery("late").await;
    assert_eq!((late.reason, late.terminate), (RecoveryReason::TimedOut, TerminateOutcome::Confirmed));
    // Each of the others is waited for longer than this.
    let hold_up = u64::try_from(TERMINATE_SLACK.as_millis()).unwrap();
    assert!(late.detected_after_ms < hold_up, "noticed {} ms after its deadline", late.detected_after_ms);
    assert!(!stubborn.terminations().is_empty());
    assert_eq!(fleet.recoveries().await.len(), 1, "the others are kept until they are confirmed dead");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_that_fails_is_said_once_with_its_errors() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    agent.manner(Manner::Refuses);
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(500)).await;
    // The pauses between the questions grow beyond a cycle: cycles without a try say neither.
    fleet.until("it was asked four times", async || agent.terminations().len() >= 4).await;
    fleet.until("a cycle has seen it", async || totals(&fleet).await["failed"].as_u64() >= Some(4)).await;
    fleet.api("watchdog.run", json!({})).await;
    assert_eq!(fleet.system_events().await, [SystemEventKind::RecoveryFailing]);
    let said = fleet.last_system_event().await;
    assert!(said["failed"].as_u64() >= Some(1) && said["recovered"] == 0, "{said}");
    assert_eq!(said["errors"], json!(["still running"]), "{said}");
    assert_eq!(totals(&fleet).await["recovered"], 0);
    agent.manner(Manner::Obeys);
    fleet.recovery("x").await;
    fleet.until("it is counted", async || totals(&fleet).await["recovered"] == 1).await;
    dog.stop().await;
}

async fn totals(fleet: &Fleet) -> serde_json::Value {
    fleet.api("watchdog.status", json!({})).await["totals"].clone()
}
