use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use rollcall_nats::{Bus, Delivery, Reports, WorkConsumer, WorkOptions};
use tokio_util::sync::CancellationToken;

use crate::{fleet, reconnected, soon};

async fn report(bus: &Bus, n: usize) {
    Reports::new(bus).publish(&format!("t.report.a.x{n}"), Bytes::from(n.to_string())).await.unwrap();
}

fn consumer(bus: &Bus) -> WorkConsumer {
    Reports::new(bus).work("dispatcher", WorkOptions::default())
}

async fn next(work: &mut WorkConsumer) -> Delivery {
    soon(work.next()).await.unwrap()
}

async fn left(bus: &Bus) -> u64 {
    let info =
        bus.request("$JS.API.STREAM.INFO.T_REPORTS", Bytes::new(), Duration::from_secs(5)).await.unwrap();
    let info: serde_json::Value = serde_json::from_slice(&info.payload).unwrap();
    info["state"]["messages"].as_u64().unwrap()
}

#[tokio::test]
async fn dropped_work_comes_again_and_acknowledged_work_is_gone() {
    let (_server, bus, _log) = fleet().await;
    report(&bus, 1).await;
    let mut work = consumer(&bus);
    let first = next(&mut work).await;
    assert_eq!((first.delivered(), &first.payload()[..]), (1, &b"1"[..]));
    assert_eq!(first.subject().as_str(), "t.report.a.x1");
    // Long before its ack wait of 30 s is over: `soon` is shorter than that plus anything.
    let started = std::time::Instant::now();
    drop(first);
    let again = next(&mut work).await;
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(again.delivered(), 2);
    again.nak(Duration::ZERO).await.unwrap();
    let third = next(&mut work).await;
    assert_eq!(third.delivered(), 3);
    third.double_ack().await.unwrap();
    assert_eq!(left(&bus).await, 0);
}

#[tokio::test]
async fn terminated_work_does_not_come_again() {
    let (_server, bus, _log) = fleet().await;
    report(&bus, 1).await;
    let mut work = consumer(&bus);
    next(&mut work).await.term().await.unwrap();
    report(&bus, 2).await;
    let second = next(&mut work).await;
    assert_eq!(&second.payload()[..], b"2");
    second.double_ack().await.unwrap();
    assert_eq!(left(&bus).await, 0);
}

#[tokio::test]
async fn each_piece_goes_to_one_of_several() {
    let (server, bus, _log) = fleet().await;
    let mut takers = Vec::new();
    let (sender, mut taken) = tokio::sync::mpsc::channel(1000);
    for _ in 0..3 {
        let mut work = consumer(&server.bus("t").await);
        let sender = sender.clone();
        takers.push(tokio::spawn(async move {
            loop {
                let delivery = next(&mut work).await;
                let payload = delivery.payload().clone();
                delivery.double_ack().await.unwrap();
                sender.send(payload).await.unwrap();
            }
        }));
    }
    for n in 0..100 {
        report(&bus, n).await;
    }
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..100 {
        assert!(seen.insert(soon(taken.recv()).await.unwrap()), "delivered twice");
    }
    takers.iter().for_each(tokio::task::JoinHandle::abort);
    assert_eq!(left(&bus).await, 0);
}

#[tokio::test]
async fn stopping_gives_back_what_was_fetched_ahead() {
    let (_server, bus, _log) = fleet().await;
    for n in 0..20 {
        report(&bus, n).await;
    }
    let mut first = consumer(&bus);
    next(&mut first).await.double_ack().await.unwrap();
    let started = std::time::Instant::now();
    first.stop().await;
    let mut second = consumer(&bus);
    for _ in 0..19 {
        next(&mut second).await.double_ack().await.unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(10), "waited for the ack wait: {:?}", started.elapsed());
    assert_eq!(left(&bus).await, 0);
}

/// A request for work can't be taken back: what is sent for it after its owner is gone would wait for its ack wait.
#[tokio::test]
async fn a_request_for_work_stands_for_seconds_only() {
    let (server, bus, _log) = fleet().await;
    let watcher = server.bus("t").await;
    let mut asked = watcher.subscribe("$JS.API.CONSUMER.MSG.NEXT.T_REPORTS.dispatcher").await.unwrap();
    watcher.flush().await.unwrap();
    let mut work = consumer(&bus);
    let waiting = tokio::spawn(async move { drop(work.next().await) });
    let request = soon(asked.next()).await.unwrap();
    let request: serde_json::Value = serde_json::from_slice(&request.payload).unwrap();
    let stands = Duration::from_nanos(request["expires"].as_u64().unwrap());
    assert!(stands > Duration::ZERO && stands <= Duration::from_secs(5), "{request}");
    waiting.abort();
}

/// The client's own drain may come back while acknowledgements are still in its buffers. Here the process "ends" when ours
/// has come back: its runtime is gone, and with it whatever was not sent.
#[tokio::test]
async fn what_was_acknowledged_before_a_drain_is_acknowledged_when_it_returns() {
    const PIECES: usize = 500;
    let (server, bus, _log) = fleet().await;
    for n in 0..PIECES {
        report(&bus, n).await;
    }
    let url = server.url();
    let process = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let life = process.spawn(async move {
        let bus = Bus::connect(crate::bus::options(&url), CancellationToken::new()).await.unwrap();
        let options = WorkOptions { prefetch: PIECES, ..WorkOptions::default() };
        let mut work = Reports::new(&bus).work("dispatcher", options);
        let mut taken = Vec::new();
        for _ in 0..PIECES {
            taken.push(next(&mut work).await);
        }
        work.stop().await;
        for delivery in taken {
            delivery.ack().await.unwrap();
        }
        bus.drain(Duration::from_secs(5)).await
    });
    assert!(soon(life).await.unwrap(), "it says that all has arrived");
    process.shutdown_background();
    soon(async {
        while left(&bus).await > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn it_goes_on_after_a_restart_of_the_server() {
    let (mut server, bus, _log) = fleet().await;
    let mut work = consumer(&bus);
    report(&bus, 1).await;
    next(&mut work).await.double_ack().await.unwrap();
    server.restart().unwrap();
    let working = tokio::spawn(async move { next(&mut work).await.double_ack().await.unwrap() });
    reconnected(&bus, 2).await;
    report(&bus, 2).await;
    soon(working).await.unwrap();
    assert_eq!(left(&bus).await, 0);
}

#[tokio::test]
async fn other_timing_is_adopted_and_the_position_kept() {
    let (_server, bus, log) = fleet().await;
    let options = || WorkOptions { filters: vec!["t.event.>".to_owned()], ..WorkOptions::default() };
    crate::put(&log, "t.event.agent.a", "a1", 0).await;
    crate::put(&log, "t.event.agent.b", "b1", 0).await;
    let mut work = WorkConsumer::new(&bus, "T_EVENTS", "notifier", options());
    next(&mut work).await.double_ack().await.unwrap();
    work.stop().await;
    let changed = WorkOptions { ack_wait: Duration::from_secs(7), max_ack_pending: 5, ..options() };
    let mut work = WorkConsumer::new(&bus, "T_EVENTS", "notifier", changed);
    let second = next(&mut work).await;
    assert_eq!(second.seq(), 2);
    second.double_ack().await.unwrap();
    let info =
        bus.request("$JS.API.CONSUMER.INFO.T_EVENTS.notifier", Bytes::new(), Duration::from_secs(5)).await;
    let info: serde_json::Value = serde_json::from_slice(&info.unwrap().payload).unwrap();
    assert_eq!(info["config"]["max_ack_pending"], serde_json::json!(5));
}
