//! The broadcast subjects.

use futures_util::StreamExt;
use rollcall_core::agent::Status;
use rollcall_nats::{Message, Subscriber};
use serde_json::json;

use crate::{
    harness::{Log, within},
    samples,
};

async fn next(subscriber: &mut Subscriber) -> Message {
    within("the next broadcast", subscriber.next()).await.unwrap()
}

async fn listen(log: &Log) -> (Subscriber, Subscriber, Subscriber) {
    let all = (
        log.bus.subscribe("rollcall.recovery.>").await.unwrap(),
        log.bus.subscribe("rollcall.health.>").await.unwrap(),
        log.bus.subscribe("rollcall.system.>").await.unwrap(),
    );
    log.bus.flush().await.unwrap();
    all
}

#[tokio::test]
async fn broadcasts_hold_the_bytes_of_the_log() {
    let mut log = Log::start().await;
    let (mut recovery, mut health, mut system) = listen(&log).await;
    let notifier = log.notifier().await;
    log.append(&samples::submitted("e1", Some("a1"))).await;
    for (event, subject) in [
        (samples::recovered("e1", "a1", 1), "rollcall.recovery.orphaned.a1"),
        (samples::status("a1", Status::Error, None), "rollcall.health.error.a1"),
        (samples::system("watchdog", json!({"silent": 3})), "rollcall.system.recovery_suspended"),
    ] {
        let seq = log.append(&event).await;
        let listener = match subject.split('.').nth(1) {
            Some("recovery") => &mut recovery,
            Some("health") => &mut health,
            _ => &mut system,
        };
        let message = next(listener).await;
        assert_eq!(message.subject.as_str(), subject);
        assert_eq!(message.payload, log.entries.last().unwrap().1);
        let headers = message.headers.unwrap();
        assert_eq!(headers.get("Content-Type").unwrap().as_str(), "application/cloudevents+json");
        assert_eq!(headers.get("Rollcall-Sequence").unwrap().as_str(), seq.to_string());
    }
    notifier.stop().await;
}

#[tokio::test]
async fn what_is_appended_while_no_notifier_runs_is_broadcast_by_the_next() {
    let mut log = Log::start().await;
    log.append(&samples::status("before", Status::Connected, None)).await;
    let (_recovery, mut health, _system) = listen(&log).await;
    let notifier = log.notifier().await;
    log.append(&samples::status("a1", Status::Connected, None)).await;
    let first = next(&mut health).await;
    assert_eq!(
        first.subject.as_str(),
        "rollcall.health.connected.a1",
        "a first notifier does not repeat the past"
    );
    notifier.stop().await;
    for n in 2..=40 {
        log.append(&samples::status(&format!("a{n}"), Status::Connected, None)).await;
    }
    let notifier = log.notifier().await;
    for n in 2..=40 {
        let message = next(&mut health).await;
        assert_eq!(message.subject.as_str(), format!("rollcall.health.connected.a{n}"));
    }
    notifier.stop().await;
}

#[tokio::test]
async fn two_notifiers_share_the_work() {
    let mut log = Log::start().await;
    let (_recovery, mut health, _system) = listen(&log).await;
    let notifiers = [log.notifier().await, log.notifier().await];
    let mut expected = std::collections::BTreeSet::new();
    for n in 1..=100 {
        let event = samples::status(&format!("a{n}"), Status::Connected, None);
        expected.insert(event.id.to_string());
        log.append(&event).await;
    }
    let mut seen = std::collections::BTreeSet::new();
    while seen != expected {
        let message = next(&mut health).await;
        let event: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
        assert!(
            seen.insert(event["id"].as_str().unwrap().to_owned()),
            "nothing failed, so nothing comes twice"
        );
    }
    for notifier in notifiers {
        notifier.stop().await;
    }
}

#[tokio::test]
async fn a_server_that_is_restarted_loses_no_broadcast_and_no_event() {
    let mut log = Log::start().await;
    let notifier = log.notifier().await;
    log.append(&samples::status("a0", Status::Connected, None)).await;
    let mut sse = notifier.sse("?after=0").await;
    assert_eq!(sse.seqs(1).await, [1]);
    let (_recovery, mut health, _system) = listen(&log).await;
    log.server.restart().unwrap();
    within("the bus is back", log.bus.connected()).await;
    let mut ids = std::collections::BTreeSet::new();
    for n in 1..=20 {
        let event = samples::status(&format!("a{n}"), Status::Connected, None);
        ids.insert(event.id.to_string());
        log.append(&event).await;
    }
    assert_eq!(sse.seqs(20).await, (2..=21).collect::<Vec<_>>());
    while !ids.is_empty() {
        let message = next(&mut health).await;
        let event: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
        ids.remove(event["id"].as_str().unwrap());
    }
    notifier.stop().await;
}
