//! The watchdog on a private nats-server, with fake agents on plain NATS and events as the other services append them.

#![allow(missing_docs, unreachable_pub)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

mod clock;
mod cycles;
mod explain;
mod harness;
mod http;
mod questions;
mod registries;
mod sentry;
mod system;

use std::{cell::RefCell, collections::BTreeMap};

use harness::{FakeAgent, Fleet, Job, LONG, Manner, now};
use rollcall_core::{
    agent::Status,
    event::{RecoveryAction, RecoveryReason, SystemEventKind, TerminateOutcome},
    wire::OnLoss,
};
use serde_json::json;

/// A deadline has a timer of its own. Whatever looks around now and then finds it later than this.
const TIMER_MS: u64 = 900;

pub(crate) fn short(timeout_ms: u64) -> Job {
    Job { timeout_ms, ..LONG }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_a_live_agent_dropped_is_orphaned() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.run("kept", "a", "i-1", LONG).await;
    fleet.run("dropped", "a", "i-1", LONG).await;
    agent.list(&["kept", "dropped"]);
    fleet.until("both are listed", async || fleet.row("dropped").await == "healthy").await;
    agent.list(&["kept"]);
    let recovered = fleet.recovery("dropped").await;
    assert_eq!(recovered.reason, RecoveryReason::Orphaned);
    assert_eq!(recovered.action, RecoveryAction::Failed);
    assert_eq!(recovered.terminate, TerminateOutcome::NotRunning);
    assert!(recovered.detected_after_ms < 5_000, "{recovered:?}");
    assert_eq!(recovered.evidence["asked_directly"], "does not list it");
    assert_eq!(fleet.row("kept").await, "healthy");
    assert_eq!(fleet.row("dropped").await, "ended");
    dog.stop().await;
    assert_eq!(fleet.recoveries().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_work_is_terminated_confirmed_and_recovered_in_time() {
    let mut fleet = Fleet::start().await;
    // No cycle comes by that could notice it.
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", "3600000");
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(1_500)).await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::TimedOut);
    assert_eq!(recovered.terminate, TerminateOutcome::Confirmed);
    assert!(
        recovered.detected_after_ms < TIMER_MS,
        "noticed {} ms after its deadline",
        recovered.detected_after_ms
    );
    let asked = agent.terminations();
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0]["reason"].as_str(), asked[0]["attempt"].as_u64()), (Some("timed_out"), Some(1)));
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_finishes_while_it_is_asked_to_end_is_not_recovered() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    agent.manner(Manner::Finishes);
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(1_000)).await;
    fleet.until("its report withholds the verdict", async || fleet.row("x").await == "withheld").await;
    fleet.complete("x", "a", "i-1").await;
    dog.stop().await;
    assert_eq!(agent.terminations().len(), 1);
    assert!(fleet.recoveries().await.is_empty(), "its end was confirmed, and it was done before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_end_keeps_the_slot_until_it_is_confirmed() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    agent.manner(Manner::Refuses);
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(1_000)).await;
    fleet.until("it is asked again", async || agent.terminations().len() >= 2).await;
    assert!(fleet.recoveries().await.is_empty(), "not confirmed: the slot is kept");
    fleet.until("it says so", async || fleet.row("x").await == "terminate_refused").await;
    agent.manner(Manner::Obeys);
    let recovered = fleet.recovery("x").await;
    assert_eq!(
        (recovered.reason, recovered.terminate),
        (RecoveryReason::TimedOut, TerminateOutcome::Confirmed)
    );
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_is_never_confirmed_is_stale_at_the_safety_net() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_STALE_AFTER_MS", "4000");
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    agent.manner(Manner::Ignores);
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(1_000)).await;
    let recovered = fleet.recovery("x").await;
    assert_eq!((recovered.reason, recovered.terminate), (RecoveryReason::Stale, TerminateOutcome::Failed));
    assert!(recovered.detected_after_ms >= 4_000, "{}", recovered.detected_after_ms);
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_stands_still_is_ended() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list_with_progress("x", 17);
    fleet.run("x", "a", "i-1", Job { stall_timeout_ms: Some(2_000), ..LONG }).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    agent.list_with_progress("x", 18);
    let recovered = fleet.recovery("x").await;
    assert_eq!(
        (recovered.reason, recovered.terminate),
        (RecoveryReason::Stalled, TerminateOutcome::Confirmed)
    );
    assert_eq!(agent.terminations()[0]["reason"], "stalled");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_work_of_a_silent_agent_is_lost_after_lost_after() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    agent.kill().await;
    fleet.status("a", "i-1", Status::Disconnected, "missed_heartbeats").await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(
        (recovered.reason, recovered.terminate),
        (RecoveryReason::AgentLost, TerminateOutcome::NotAttempted)
    );
    assert!(recovered.detected_after_ms < 5_000, "{recovered:?}");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_beats_or_answers_is_not_lost_whatever_the_log_says() {
    let fleet = Fleet::start().await;
    let beating = FakeAgent::start(&fleet, "beating", "i-1").await;
    let answering = FakeAgent::start(&fleet, "answering", "i-2").await;
    fleet.register("beating", "i-1").await;
    fleet.register("answering", "i-2").await;
    let dog = fleet.watchdog().await;
    beating.list(&["x"]);
    answering.list(&["y"]);
    fleet.run("x", "beating", "i-1", LONG).await;
    fleet.run("y", "answering", "i-2", LONG).await;
    fleet
        .until("both are listed", async || {
            fleet.row("x").await == "healthy" && fleet.row("y").await == "healthy"
        })
        .await;
    answering.beat(false);
    fleet.status("beating", "i-1", Status::Disconnected, "missed_heartbeats").await;
    fleet.status("answering", "i-2", Status::Error, "missed_heartbeats").await;
    // Long enough for several judgements of the silent one.
    let before = now();
    fleet.until("time passes", async || now().since_ms(before) > 6_000).await;
    assert!(fleet.recoveries().await.is_empty());
    assert_eq!(fleet.row("x").await, "agent_silent");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_work_of_a_restarted_agent_is_recovered_once_the_old_instance_is_away() {
    let fleet = Fleet::start().await;
    let old = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    old.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    let _new = FakeAgent::start(&fleet, "a", "i-2").await;
    fleet.superseded("a", "i-1", "i-2").await;
    fleet.register("a", "i-2").await;
    fleet.until("the old one vouches", async || fleet.row("x").await == "superseded_vouched").await;
    let before = now();
    fleet.until("time passes", async || now().since_ms(before) > 3_000).await;
    assert!(fleet.recoveries().await.is_empty(), "the old instance lists it: it is not lost");
    old.kill().await;
    let killed = now();
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::AgentRestarted);
    assert_eq!(recovered.evidence["asked_directly"], "no responders");
    println!("known to be away after {} ms", now().since_ms(killed));
    assert_eq!(recovered.instance_id.as_str(), "i-1");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_work_of_an_agent_that_said_goodbye_is_recovered_at_once() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.run("x", "a", "i-1", LONG).await;
    agent.kill().await;
    let before = now();
    fleet.status("a", "i-1", Status::Gone, "sigterm").await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(
        (recovered.reason, recovered.terminate),
        (RecoveryReason::AgentGone, TerminateOutcome::NotAttempted)
    );
    assert!(now().since_ms(before) < 3_000);
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_that_waits_withholds_the_verdict_up_to_the_safety_net() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_STALE_AFTER_MS", "8000");
    let _agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.report("a", "x", "completed").await;
    fleet.report("a", "y", "completed").await;
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.run("y", "a", "i-1", LONG).await;
    fleet
        .until("it is withheld", async || {
            let status = fleet.api("watchdog.status", json!({})).await;
            status["last_cycle"]["rows"]["orphaned"].as_u64() == Some(2)
                || status["last_cycle"]["rows"]["withheld"].as_u64() == Some(2)
        })
        .await;
    assert!(fleet.recoveries().await.is_empty());
    fleet.complete("y", "a", "i-1").await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::Stale);
    assert!(recovered.detected_after_ms >= 8_000);
    dog.stop().await;
    assert_eq!(fleet.recoveries().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_watchdogs_recover_everything_once() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let (one, two) = (fleet.watchdog().await, fleet.watchdog().await);
    let ids: Vec<String> = (0..30).map(|n| format!("x{n}")).collect();
    for id in &ids {
        fleet.run(id, "a", "i-1", LONG).await;
    }
    fleet.until("all are recovered", async || fleet.recoveries().await.len() >= ids.len()).await;
    // Only what the log took of it counts as recovered by either. Who answers is told by since when it sees.
    let mut counts = BTreeMap::new();
    let told = RefCell::new(&mut counts);
    fleet
        .until("both have told what they did", async || {
            let status = fleet.api("watchdog.status", json!({})).await;
            let recovered = status["totals"]["recovered"].as_u64().unwrap();
            told.borrow_mut().insert(status["sight"]["since"].to_string(), recovered);
            told.borrow().len() == 2 && told.borrow().values().sum::<u64>() >= ids.len() as u64
        })
        .await;
    assert_eq!(counts.values().sum::<u64>(), ids.len() as u64, "{counts:?}");
    one.stop().await;
    two.stop().await;
    let mut recovered: Vec<String> =
        fleet.recoveries().await.iter().map(|r| r.execution_id.to_string()).collect();
    recovered.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(recovered, expected, "each exactly once");
    drop(agent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watchdog_that_was_down_for_long_recovers_nothing_of_a_healthy_fleet() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    let quiet = FakeAgent::start(&fleet, "b", "i-2").await;
    fleet.register("a", "i-1").await;
    fleet.register("b", "i-2").await;
    agent.list(&["x"]);
    quiet.list(&["y"]);
    fleet.run("x", "a", "i-1", Job { stall_timeout_ms: Some(1_500), ..LONG }).await;
    fleet.run("y", "b", "i-2", LONG).await;
    // The prober was down as well: the log still says that both fell silent long ago.
    fleet.status("a", "i-1", Status::Disconnected, "missed_heartbeats").await;
    fleet.status("b", "i-2", Status::Disconnected, "missed_heartbeats").await;
    let down = now();
    fleet.until("longer than every timeout", async || now().since_ms(down) > 3_000).await;
    let dog = fleet.watchdog().await;
    let up = now();
    fleet.until("longer than every timeout", async || now().since_ms(up) > 6_000).await;
    assert!(fleet.recoveries().await.is_empty());
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zombie_is_terminated_and_foreign_work_is_left_alone() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x", "not-ours"]);
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    assert!(agent.terminations().is_empty());
    fleet.complete("x", "a", "i-1").await;
    fleet.until("it is asked to end", async || !agent.terminations().is_empty()).await;
    let asked = agent.terminations();
    assert_eq!((asked[0]["execution_id"].as_str(), asked[0]["reason"].as_str()), (Some("x"), Some("zombie")));
    // Whoever asks about what has ended is told who works on it all the same.
    agent.manner(Manner::Refuses);
    agent.list(&["x", "not-ours"]);
    let claimed = async || {
        let said = fleet.api("explain", json!({"execution_id": "x"})).await;
        assert_eq!(said["row"], "ended", "{said}");
        said["evidence"]["claimed_by"].clone()
    };
    fleet
        .until("its claim is shown", async || claimed().await.as_array().is_some_and(|by| by.len() == 1))
        .await;
    let claim = claimed().await[0].clone();
    assert_eq!((&claim["agent_id"], &claim["instance_id"]), (&json!("a"), &json!("i-1")), "{claim}");
    assert_eq!(claim["attempt"], 1, "{claim}");
    dog.stop().await;
    assert!(agent.terminations().iter().all(|request| request["execution_id"] == "x"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_the_fleet_silent_at_once_suspends_until_the_window_has_passed() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_BREAKER_WINDOW_MS", "6000");
    let mut agents = Vec::new();
    for n in 0..6 {
        let (id, instance) = (format!("a{n}"), format!("i{n}"));
        let agent = FakeAgent::start(&fleet, &id, &instance).await;
        fleet.register(&id, &instance).await;
        agent.list(&[&format!("x{n}")]);
        fleet.run(&format!("x{n}"), &id, &instance, LONG).await;
        agents.push(agent);
    }
    let dog = fleet.watchdog().await;
    let fell = now();
    for n in 0..3 {
        agents.remove(0).kill().await;
        fleet.status(&format!("a{n}"), &format!("i{n}"), Status::Disconnected, "missed_heartbeats").await;
    }
    fleet
        .until("it is suspended", async || {
            fleet.system_events().await == [SystemEventKind::RecoverySuspended]
        })
        .await;
    let status = fleet.api("watchdog.status", json!({})).await;
    assert_eq!(status["breaker"]["suspended"], true);
    assert_eq!((status["breaker"]["silent"].as_u64(), status["breaker"]["of"].as_u64()), (Some(3), Some(6)));
    // Positive proof still counts: the agent said goodbye.
    fleet.status("a3", "i3", Status::Gone, "sigterm").await;
    agents.remove(0).kill().await;
    assert_eq!(fleet.recovery("x3").await.reason, RecoveryReason::AgentGone);
    assert_eq!(fleet.recoveries().await.len(), 1, "silence condemns nobody now");
    for n in 0..3 {
        assert_eq!(fleet.recovery(&format!("x{n}")).await.reason, RecoveryReason::AgentLost);
    }
    assert!(now().since_ms(fell) >= 6_000);
    assert_eq!(
        fleet.system_events().await,
        [SystemEventKind::RecoverySuspended, SystemEventKind::RecoveryResumed]
    );
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_bus_condemns_nobody() {
    let mut fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    fleet.status("a", "i-1", Status::Disconnected, "missed_heartbeats").await;
    fleet.server.stop().unwrap();
    let cut = now();
    fleet.until("longer than every timeout", async || now().since_ms(cut) > 4_000).await;
    fleet.server.start_again().unwrap();
    fleet
        .until("it sees again", async || {
            fleet.api("watchdog.status", json!({})).await["sight"]["last_trouble"] == "bus_cut"
                && fleet.api("watchdog.status", json!({})).await["sees"] == true
        })
        .await;
    let back = now();
    fleet.until("time passes", async || now().since_ms(back) > 4_000).await;
    assert!(fleet.recoveries().await.is_empty());
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_says_what_it_would_do_and_does_nothing() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    agent.manner(Manner::Refuses);
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", short(500)).await;
    fleet.until("it is asked once", async || !agent.terminations().is_empty()).await;
    // The only thing left for its cycles to say; it says it once.
    fleet
        .until("it says so", async || fleet.system_events().await == [SystemEventKind::RecoveryFailing])
        .await;
    let before = fleet.log.last_seq().await.unwrap();
    let report = fleet.api("watchdog.run", json!({"dry_run": true})).await;
    assert_eq!(report["dry_run"], true);
    assert_eq!(report["executions"][0]["execution_id"], "x", "{report}");
    assert!(report["executions"][0]["decision"].is_string());
    assert_eq!(fleet.log.last_seq().await.unwrap(), before);
    let report = fleet.api("watchdog.run", json!({})).await;
    assert_eq!((report["open"].as_u64(), report["agents"].as_u64()), (Some(1), Some(1)), "{report}");
    let bad = fleet.api("watchdog.run", json!({"dry_run": 7})).await;
    assert_eq!(bad["error"]["code"], "bad_request");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_heartbeats_and_entries_change_nothing() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    for bad in ["", "[]", r#"{"instance_id":"i.1","seq":1}"#, "\u{0}"] {
        let subject = fleet.subjects.heartbeat(&harness::agent_id("a"));
        fleet.bus.publish(subject, bad.to_owned().into()).await.unwrap();
    }
    let subject = fleet.subjects.execution_event(&harness::execution_id("x"));
    let last = fleet.log.last_seq_of(&subject).await.unwrap();
    fleet.log.append(&subject, "junk", "{}".into(), last).await.unwrap();
    fleet
        .until("both are counted", async || {
            let totals = &fleet.api("watchdog.status", json!({})).await["totals"];
            totals["heartbeats_ignored"].as_u64() >= Some(4) && totals["invalid_entries"].as_u64() == Some(1)
        })
        .await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    // The skipped entry counts for the next append.
    agent.list(&[]);
    assert_eq!(fleet.recovery("x").await.reason, RecoveryReason::Orphaned);
    assert_eq!(fleet.api("watchdog.status", json!({})).await["totals"]["conflicts"], 0);
    dog.stop().await;
}

pub(crate) fn control(url: &str) -> Option<rollcall_core::wire::Endpoint> {
    Some(rollcall_core::wire::Endpoint { kind: "http".to_owned(), url: url.to_owned() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_with_a_registry_is_judged_by_it_and_ended_through_it() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8");
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", "300");
    let registry = http::HttpAgent::start().await;
    fleet.register_with("h", "i-1", control(&registry.url)).await;
    registry.runs(&["kept", "dropped", "late"]);
    for id in ["kept", "dropped"] {
        fleet.run(id, "h", "i-1", LONG).await;
    }
    let dog = fleet.watchdog().await;
    fleet.run("late", "h", "i-1", short(2_000)).await;
    let late = fleet.recovery("late").await;
    assert_eq!((late.reason, late.terminate), (RecoveryReason::TimedOut, TerminateOutcome::Confirmed));
    assert_eq!(registry.terminated(), ["late"]);
    fleet.until("it is listed", async || fleet.row("kept").await == "healthy").await;
    registry.runs(&["kept"]);
    let dropped = fleet.recovery("dropped").await;
    assert_eq!((dropped.reason, dropped.terminate), (RecoveryReason::Orphaned, TerminateOutcome::NotRunning));
    // What it runs without being given is a zombie there as well.
    registry.runs(&["kept", "late"]);
    fleet.until("the zombie is ended", async || registry.terminated() == ["late", "late"]).await;
    assert_eq!(fleet.row("kept").await, "healthy");
    // Two cycles at once are refused.
    registry.slow(std::time::Duration::from_millis(700));
    fleet
        .until("a second cycle is refused", async || {
            let (one, two) =
                tokio::join!(fleet.api("watchdog.run", json!({})), fleet.api("watchdog.run", json!({})));
            [one, two].iter().any(|report| report["error"]["code"] == "conflict")
        })
        .await;
    dog.stop().await;
    assert_eq!(fleet.recoveries().await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cycle_calls_every_registry_once_and_a_dry_run_none() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8");
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", "600000");
    let registry = http::HttpAgent::start().await;
    fleet.register_with("h", "i-1", control(&registry.url)).await;
    let dog = fleet.watchdog().await;
    let report = fleet.api("watchdog.run", json!({})).await;
    assert_eq!(report["registries"]["asked"], 1, "{report}");
    let before = registry.calls();
    fleet.api("watchdog.run", json!({"dry_run": true})).await;
    assert_eq!(registry.calls(), before);
    fleet.api("watchdog.run", json!({})).await;
    assert_eq!(registry.calls(), before + 1);
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_may_not_be_called_proves_nothing() {
    let fleet = Fleet::start().await;
    let registry = http::HttpAgent::start().await;
    registry.runs(&[]);
    fleet.register_with("h", "i-1", control(&registry.url)).await;
    fleet.run("x", "h", "i-1", LONG).await;
    let dog = fleet.watchdog().await;
    fleet
        .until("cycles pass", async || {
            let status = fleet.api("watchdog.status", json!({})).await;
            status["last_cycle"]["cycle"].as_u64() >= Some(4)
                && status["last_cycle"]["registries"]["unreachable"].as_u64() == Some(1)
        })
        .await;
    assert!(fleet.recoveries().await.is_empty());
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_lost_recoveries_keep_to_the_rate() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_RECOVERY_RATE", "5");
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let ids: Vec<String> = (0..30).map(|n| format!("x{n}")).collect();
    agent.list(&ids.iter().map(String::as_str).collect::<Vec<_>>());
    for id in &ids {
        fleet.run(id, "a", "i-1", LONG).await;
    }
    let dog = fleet.watchdog().await;
    agent.kill().await;
    fleet.status("a", "i-1", Status::Disconnected, "missed_heartbeats").await;
    fleet.until("the first are recovered", async || !fleet.recoveries().await.is_empty()).await;
    fleet
        .until("some wait for their turn", async || {
            let report = fleet.api("watchdog.run", json!({"dry_run": true})).await;
            report["rows"]["rate_limited"].as_u64() >= Some(3)
        })
        .await;
    fleet.until("all are recovered", async || fleet.recoveries().await.len() == ids.len()).await;
    let mut after: Vec<u64> = fleet.recoveries().await.iter().map(|r| r.detected_after_ms).collect();
    after.sort_unstable();
    // A burst of five, then five a second: the last of thirty is five seconds behind the first.
    assert!(after[29] - after[0] >= 4_600, "{after:?}");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_was_to_be_cancelled_ends_cancelled_whatever_was_lost() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    fleet.run("x", "a", "i-1", Job { on_loss: OnLoss::Requeue, ..LONG }).await;
    fleet.cancel("x").await;
    agent.kill().await;
    fleet.status("a", "i-1", Status::Gone, "sigterm").await;
    fleet
        .until("it is cancelled", async || {
            fleet.api("explain", json!({"execution_id": "x"})).await["state"] == "cancelled"
        })
        .await;
    assert!(fleet.recoveries().await.is_empty());
    let totals = fleet.api("watchdog.status", json!({})).await["totals"].clone();
    assert_eq!((&totals["recovered"], &totals["failed"]), (&json!(0), &json!(0)), "that is no recovery");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_heard_of_after_its_recovery_is_counted() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "a", "i-1", LONG).await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    agent.kill().await;
    fleet.status("a", "i-1", Status::Error, "missed_heartbeats").await;
    assert_eq!(fleet.recovery("x").await.reason, RecoveryReason::AgentLost);
    let back = FakeAgent::start_from(&fleet, "a", "i-1", 1_000_000).await;
    back.list(&["x"]);
    fleet
        .until("it is counted", async || {
            let status = fleet.api("watchdog.status", json!({})).await;
            status["totals"]["recovered_then_heard"].as_u64() == Some(1)
        })
        .await;
    fleet
        .until("and ended as a zombie", async || back.terminations().iter().any(|r| r["reason"] == "zombie"))
        .await;
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_deadlines_at_once_are_noticed_in_time() {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", "3600000");
    let agent = FakeAgent::start(&fleet, "a", "i-1").await;
    fleet.register("a", "i-1").await;
    let dog = fleet.watchdog().await;
    let ids: Vec<String> = (0..100).map(|n| format!("x{n}")).collect();
    for id in &ids {
        fleet.run(id, "a", "i-1", short(2_000)).await;
        agent.list_more(id);
    }
    fleet.until("all are recovered", async || fleet.recoveries().await.len() == ids.len()).await;
    let mut after: Vec<u64> = fleet.recoveries().await.iter().map(|r| r.detected_after_ms).collect();
    after.sort_unstable();
    println!("noticed after ms: p50 {} p90 {} max {}", after[50], after[90], after[99]);
    assert!(after[99] < TIMER_MS, "{after:?}");
    assert!(fleet.recoveries().await.iter().all(|r| r.reason == RecoveryReason::TimedOut));
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_losses_are_worked_on_together() {
    let fleet = Fleet::start().await;
    fleet.register("a", "i-1").await;
    let ids: Vec<String> = (0..1_000).map(|n| format!("x{n}")).collect();
    for id in &ids {
        fleet.run(id, "a", "i-1", LONG).await;
    }
    let dog = fleet.watchdog().await;
    fleet.status("a", "i-1", Status::Gone, "sigterm").await;
    fleet.until("all are recovered", async || fleet.recoveries().await.len() == ids.len()).await;
    let worst = fleet.recoveries().await.iter().map(|r| r.detected_after_ms).max().unwrap();
    println!("the last of 1000 after {worst} ms");
    assert!(worst < 5_000, "{worst}");
    dog.stop().await;
}
