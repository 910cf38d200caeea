//! Agents that are driven over HTTP: what their registries prove, and what they do not.

use rollcall_control::RegistryList;
use rollcall_core::{
    Prefix,
    agent::Status,
    event::{Dispatched, RecoveryReason, Retried, TerminateOutcome},
};
use serde_json::json;
use tokio_util::task::TaskTracker;
use watchdog::{edge::LOOK_TIMEOUT, sentry, shared::Shared};

use crate::{
    control,
    harness::{FakeAgent, Fleet, LONG, agent_id, execution_id, instance_id, now},
    http::HttpAgent,
    short,
};

/// Cycles that show that something does not happen: two would be enough to make it happen.
const CYCLES: usize = 8;
const NO_CYCLE_MS: &str = "600000";

async fn fleet(cycle_ms: &str) -> (Fleet, HttpAgent) {
    let mut fleet = Fleet::start().await;
    fleet.set("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8");
    fleet.set("ROLLCALL_CYCLE_INTERVAL_MS", cycle_ms);
    let registry = HttpAgent::start().await;
    fleet.register_with("h", "i-1", control(&registry.url)).await;
    (fleet, registry)
}

async fn cycles_pass(fleet: &Fleet, registry: &HttpAgent) {
    let before = registry.calls();
    fleet.until("cycles pass", async || registry.calls() >= before + CYCLES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_just_finished_there_or_not_begun_is_not_running_there() {
    let (fleet, registry) = fleet("300").await;
    registry.runs(&["x", "y"]);
    fleet.run("x", "h", "i-1", LONG).await;
    fleet.run("y", "h", "i-1", LONG).await;
    let dog = fleet.watchdog().await;
    fleet.until("they are listed", async || fleet.row("x").await == "healthy").await;
    // x completes as it should. y has finished too, and nobody has said so yet: it has not gone missing.
    registry.runs(&[]);
    registry.knows(&["y"], &["x", "y"]);
    fleet.complete("x", "h", "i-1").await;
    cycles_pass(&fleet, &registry).await;
    assert_eq!(registry.terminated(), Vec::<String>::new(), "nothing runs that should not");
    assert_eq!(fleet.row("y").await, "healthy");
    assert!(fleet.recoveries().await.is_empty());
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zombie_that_was_started_anew_on_its_agent_is_none() {
    let (fleet, registry) = fleet(NO_CYCLE_MS).await;
    registry.runs(&["x"]);
    let context = fleet.context();
    let shared = Shared::new(&fleet.bus, &context, Prefix::default());
    fleet.run("x", "h", "i-1", LONG).await;
    fleet.fail("x", "h", "i-1").await;
    let log = fleet.log.read_range(0, 500, &[]).await.unwrap();
    for entry in &log.entries {
        shared
            .with(|world, now| world.apply(&shared.subjects, &entry.subject, entry.seq, &entry.bytes, now))
            .unwrap();
    }
    let list = RegistryList { running: vec![execution_id("x")], known: Vec::new() };
    for _ in 0..3 {
        shared.with(|world, now| world.registry(&agent_id("h"), &list, 0, now));
    }
    assert!(shared.with(|world, _| !world.zombies_due.is_empty()), "it ended, and it runs");
    // Before it is asked to end, an operator has it run again, and it gets its slot on the same agent.
    fleet
        .execution_event(
            Retried { execution_id: execution_id("x"), attempt: 2, by: "test".to_owned() }.into(),
        )
        .await;
    fleet
        .execution_event(
            Dispatched {
                execution_id: execution_id("x"),
                attempt: 2,
                agent_id: agent_id("h"),
                instance_id: instance_id("i-1"),
                deadline: now().plus_ms(60_000),
                timeout_ms: 60_000,
            }
            .into(),
        )
        .await;
    let tasks = TaskTracker::new();
    sentry::errands(&shared, &tasks).await;
    tasks.close();
    tasks.wait().await;
    assert_eq!(registry.terminated(), Vec::<String>::new(), "by its id that would be the new attempt's end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_gone_by_the_log_is_asked_once_for_all_its_work() {
    let (fleet, registry) = fleet(NO_CYCLE_MS).await;
    let dog = fleet.watchdog().await;
    fleet.api("watchdog.run", json!({})).await;
    // Granted after the last cycle: no list names it yet.
    let ids = ["v", "w", "x", "y", "z"];
    registry.runs(&ids);
    for id in ids {
        fleet.run(id, "h", "i-1", LONG).await;
    }
    fleet.until("the grace of the last is over", async || fleet.row("z").await == "unheard").await;
    let before = registry.calls();
    fleet.status("h", "i-1", Status::Gone, "removed from the agents file").await;
    for id in ids {
        fleet
            .until("it is known to run there", async || {
                let row = fleet.row(id).await;
                assert_ne!(row, "ended", "{id} was recovered while its agent lists it");
                row == "gone_vouched"
            })
            .await;
    }
    assert_eq!(registry.calls(), before + 1);
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_of_an_agent_that_is_gone_is_lost_once_its_registry_drops_it() {
    let (fleet, registry) = fleet("300").await;
    registry.runs(&["x"]);
    fleet.run("x", "h", "i-1", LONG).await;
    let dog = fleet.watchdog().await;
    fleet.status("h", "i-1", Status::Gone, "removed from the agents file").await;
    cycles_pass(&fleet, &registry).await;
    assert_eq!(fleet.row("x").await, "gone_vouched");
    registry.runs(&[]);
    let lost = fleet.recovery("x").await;
    assert_eq!((lost.reason, lost.terminate), (RecoveryReason::AgentGone, TerminateOutcome::NotRunning));
    // It holds nothing any more: its registry is nobody's concern, and no reason for an alarm.
    registry.breaks();
    fleet
        .until("it is left alone", async || {
            let status = fleet.api("watchdog.status", json!({})).await;
            status["last_cycle"]["registries"] == json!({"asked": 0, "unreachable": 0})
        })
        .await;
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_gone_and_answers_nothing_is_away_once_it_is_silent() {
    let (fleet, registry) = fleet("1000").await;
    registry.runs(&["x"]);
    fleet.run("x", "h", "i-1", LONG).await;
    let dog = fleet.watchdog().await;
    fleet.until("it is listed", async || fleet.row("x").await == "healthy").await;
    registry.breaks();
    fleet.status("h", "i-1", Status::Gone, "removed from the agents file").await;
    let lost = fleet.recovery("x").await;
    assert_eq!((lost.reason, lost.terminate), (RecoveryReason::AgentGone, TerminateOutcome::NotAttempted));
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_its_registry_names_again_after_its_recovery_is_counted_once() {
    let (fleet, registry) = fleet("300").await;
    let dog = fleet.watchdog().await;
    fleet.run("x", "h", "i-1", LONG).await;
    assert_eq!(fleet.recovery("x").await.reason, RecoveryReason::Orphaned);
    registry.runs(&["x"]);
    let heard =
        async || fleet.api("watchdog.status", json!({})).await["totals"]["recovered_then_heard"].clone();
    fleet.until("it is counted", async || heard().await == 1).await;
    fleet.until("and ended as a zombie", async || registry.terminated() == ["x"]).await;
    // It goes on as if nothing had been said.
    registry.runs(&["x"]);
    cycles_pass(&fleet, &registry).await;
    assert_eq!(heard().await, 1, "the same attempt");
    dog.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_has_the_time_of_a_probe_and_not_of_a_request_over_nats() {
    let (mut fleet, registry) = fleet("300").await;
    fleet.set("ROLLCALL_PROBE_TIMEOUT_MS", "20000");
    registry.slow(LOOK_TIMEOUT + LOOK_TIMEOUT / 4);
    registry.runs(&["kept"]);
    fleet.run("kept", "h", "i-1", LONG).await;
    fleet.run("dropped", "h", "i-1", LONG).await;
    let dog = fleet.watchdog().await;
    let dropped = fleet.recovery("dropped").await;
    assert_eq!((dropped.reason, dropped.terminate), (RecoveryReason::Orphaned, TerminateOutcome::NotRunning));
    assert_eq!(fleet.row("kept").await, "healthy");
    dog.stop().await;
}

/// It is in a private network that nobody has allowed, and its agent takes requests over NATS as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_registry_may_not_be_called_is_ended_over_nats_when_its_time_is_up() {
    let fleet = Fleet::start().await;
    let agent = FakeAgent::start(&fleet, "h", "i-1").await;
    fleet.register_with("h", "i-1", control("http://127.0.0.1:1")).await;
    let dog = fleet.watchdog().await;
    agent.list(&["x"]);
    fleet.run("x", "h", "i-1", short(1_500)).await;
    let recovered = fleet.recovery("x").await;
    assert_eq!(recovered.reason, RecoveryReason::TimedOut);
    assert_eq!(recovered.terminate, TerminateOutcome::Confirmed);
    assert_eq!(agent.terminations().len(), 1);
    dog.stop().await;
}
