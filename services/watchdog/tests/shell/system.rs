//! What watchdogs write about recovery itself: on the state that they decided it on, or not at all. And the cycles that it
//! comes from.

use std::{collections::BTreeSet, sync::Arc};

use futures_util::StreamExt;
use rollcall_core::{
    Prefix,
    agent::Status,
    event::{SystemEvent, SystemEventKind},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use watchdog::{cycle, sentry, shared::Shared};

use crate::harness::{Fleet, PATIENCE};

/// A watchdog that sees, and reads the log only when it is told to.
async fn watchdog(fleet: &Fleet) -> Arc<Shared> {
    let shared = Shared::new(&fleet.bus, &fleet.context(), Prefix::default());
    read(fleet, &shared).await;
    shared.with(|world, now| {
        world.sight.set_connected(true);
        world.sight.set_caught_up(true);
        let epoch = world.sight.epoch();
        assert!(world.proven(epoch, now));
    });
    shared
}

async fn read(fleet: &Fleet, shared: &Shared) {
    let page = fleet.log.read_range(0, 500, &[]).await.unwrap();
    shared.with(|world, now| {
        for entry in &page.entries {
            world.apply(&shared.subjects, &entry.subject, entry.seq, &entry.bytes, now).unwrap();
        }
    });
}

/// Another watchdog says something.
async fn another_says(fleet: &Fleet, kind: SystemEventKind) {
    let subject = fleet.subjects.system_event(watchdog::SERVICE);
    fleet.append(subject, watchdog::SERVICE, SystemEvent { kind, data: json!({}) }.into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_watchdogs_that_suspend_recovery_one_writes_it_down() {
    let fleet = Fleet::start().await;
    for n in 0..3 {
        let (agent, instance) = (format!("a{n}"), format!("i{n}"));
        fleet.register(&agent, &instance).await;
        fleet.status(&agent, &instance, Status::Disconnected, "missed_heartbeats").await;
    }
    // Also what the log refuses comes by here.
    let mut tries = fleet.bus.subscribe(fleet.subjects.system_event(watchdog::SERVICE)).await.unwrap();
    fleet.bus.flush().await.unwrap();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    for _ in 0..2 {
        tokio::spawn(sentry::watch_breaker(watchdog(&fleet).await, stop.clone()));
    }
    let mut sources = Vec::new();
    // The second to speak hears nothing of the first, and tries again: then its first word was refused.
    while sources.len() < 3 {
        let message = tokio::time::timeout(PATIENCE, tries.next()).await;
        let message = message.expect("whoever was refused tries again").unwrap();
        sources.push(serde_json::from_slice::<Value>(&message.payload).unwrap()["source"].to_string());
    }
    assert_eq!(sources.iter().collect::<BTreeSet<_>>().len(), 2, "{sources:?}");
    assert_eq!(fleet.system_events().await, [SystemEventKind::RecoverySuspended]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_before_another_spoke_is_not_written() {
    let fleet = Fleet::start().await;
    let shared = watchdog(&fleet).await;
    let decided_on = shared.with(|world, _| world.system_seq);
    another_says(&fleet, SystemEventKind::RecoverySuspended).await;
    shared.say(SystemEventKind::RecoveryResumed, json!({}), decided_on).await;
    assert_eq!(fleet.system_events().await, [SystemEventKind::RecoverySuspended]);
    read(&fleet, &shared).await;
    let decided_on = shared.with(|world, _| world.system_seq);
    shared.say(SystemEventKind::RecoveryResumed, json!({}), decided_on).await;
    assert_eq!(
        fleet.system_events().await,
        [SystemEventKind::RecoverySuspended, SystemEventKind::RecoveryResumed]
    );
    assert!(!shared.with(|world, _| world.log_suspended), "what it writes it knows at once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn that_recovery_fails_is_said_by_the_next_cycle_if_another_spoke_first() {
    let fleet = Fleet::start().await;
    let shared = watchdog(&fleet).await;
    let fails = async || {
        shared.with(|world, _| world.counters.failed += 1);
        cycle::run_cycle(&shared, false).await.unwrap();
    };
    another_says(&fleet, SystemEventKind::RecoverySuspended).await;
    fails().await;
    assert_eq!(fleet.system_events().await, [SystemEventKind::RecoverySuspended]);
    read(&fleet, &shared).await;
    for _ in 0..3 {
        fails().await;
    }
    assert_eq!(
        fleet.system_events().await,
        [SystemEventKind::RecoverySuspended, SystemEventKind::RecoveryFailing]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dry_run_sees_is_still_news_to_the_next_cycle() {
    let fleet = Fleet::start().await;
    let shared = watchdog(&fleet).await;
    let cycle = async |dry_run| cycle::run_cycle(&shared, dry_run).await.unwrap();
    let last = || shared.ledger.last().map(|report| report.cycle);
    let before = cycle(false).await;
    shared.with(|world, _| world.counters.recovered += 3);
    assert_eq!(cycle(true).await.since_last.recovered, 3);
    assert_eq!(last(), Some(before.cycle), "it is nobody's last cycle");
    let next = cycle(false).await;
    assert_eq!((next.since_last.recovered, last()), (3, Some(next.cycle)));
    assert_eq!(cycle(false).await.since_last.recovered, 0);
}
