use std::time::{Duration, Instant};

use bytes::Bytes;
use rollcall_nats::{Tail, TailError, TailItem};
use serde_json::{Value, json};

use crate::{DEADLINE, fleet, put, reconnected, soon};

/// Reads until `count` entries have come; returns their sequences.
async fn take(tail: &mut Tail, count: usize) -> Vec<u64> {
    let mut seqs = Vec::new();
    while seqs.len() < count {
        if let TailItem::Entry(entry) = soon(tail.next()).await.unwrap() {
            seqs.push(entry.seq);
        }
    }
    seqs
}

#[tokio::test]
async fn says_when_it_has_caught_up_and_goes_on() {
    let (_server, _bus, log) = fleet().await;
    let mut empty = log.tail(0, []);
    assert_eq!(soon(empty.next()).await.unwrap(), TailItem::CaughtUp { seq: 0 });
    assert!(empty.is_caught_up());

    for n in 0..5 {
        put(&log, &format!("t.event.execution.x{n}"), &format!("e{n}"), 0).await;
    }
    let mut tail = log.tail(2, []);
    assert_eq!(take(&mut tail, 3).await, [3, 4, 5]);
    assert_eq!(soon(tail.next()).await.unwrap(), TailItem::CaughtUp { seq: 5 });
    assert_eq!(tail.position(), 5);
    put(&log, "t.event.agent.a", "a1", 0).await;
    assert_eq!(take(&mut tail, 1).await, [6]);
    assert_eq!(take(&mut empty, 6).await, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn only_what_was_asked_for() {
    let (_server, _bus, log) = fleet().await;
    for n in 0..10 {
        put(&log, &format!("t.event.execution.x{n}"), &format!("e{n}"), 0).await;
        put(&log, &format!("t.event.agent.a{n}"), &format!("a{n}"), 0).await;
    }
    let mut tail = log.tail(0, ["t.event.agent.>"]);
    let mut seqs = Vec::new();
    loop {
        let batch = soon(tail.next_batch(3)).await.unwrap();
        assert!(batch.entries.len() <= 3);
        assert!(batch.entries.iter().all(|entry| entry.subject.starts_with("t.event.agent.a")));
        seqs.extend(batch.entries.iter().map(|entry| entry.seq));
        if batch.caught_up {
            break;
        }
    }
    assert_eq!(seqs, (1..=10).map(|n| n * 2).collect::<Vec<_>>());
    assert_eq!(log.last_seq_of("t.event.agent.>").await.unwrap(), tail.position());
}

#[tokio::test]
async fn an_entry_arrives_within_milliseconds() {
    let (_server, _bus, log) = fleet().await;
    let mut tail = log.tail(0, []);
    soon(tail.next()).await.unwrap();
    let mut took = Vec::new();
    for n in 0..50 {
        let started = Instant::now();
        put(&log, &format!("t.event.execution.x{n}"), &format!("e{n}"), 0).await;
        take(&mut tail, 1).await;
        took.push(started.elapsed());
    }
    took.sort();
    assert!(took[25] < Duration::from_millis(20), "median from append to delivery: {:?}", took[25]);
}

/// Appends all the while; the server is restarted under it. Everything comes, once, in order.
async fn no_loss_no_duplicate(kill: bool) {
    let (mut server, _bus, log) = fleet().await;
    let mut tail = log.tail(0, []);
    let writer = tokio::spawn({
        let log = log.clone();
        async move {
            for n in 0..300 {
                put(&log, &format!("t.event.execution.x{n}"), &format!("e{n}"), 0).await;
            }
        }
    });
    let mut seqs = take(&mut tail, 50).await;
    if kill { server.kill() } else { server.stop() }.unwrap();
    server.start_again().unwrap();
    seqs.extend(take(&mut tail, 250).await);
    soon(writer).await.unwrap();
    assert_eq!(seqs, (1..=300).collect::<Vec<u64>>());
    assert!(tail.is_caught_up());
}

#[tokio::test]
async fn a_restart_of_the_server_loses_and_doubles_nothing() {
    no_loss_no_duplicate(false).await;
}

#[tokio::test]
async fn a_killed_server_loses_and_doubles_nothing() {
    no_loss_no_duplicate(true).await;
}

#[tokio::test]
async fn it_resumes_at_once_after_a_reconnect() {
    let (mut server, bus, log) = fleet().await;
    let mut tail = log.tail(0, []);
    soon(tail.next()).await.unwrap();
    server.restart().unwrap();
    let reading = tokio::spawn(async move { take(&mut tail, 1).await });
    reconnected(&bus, 2).await;
    put(&log, "t.event.agent.a", "a1", 0).await;
    let started = Instant::now();
    assert_eq!(soon(reading).await.unwrap(), [1]);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_consumer_that_somebody_deleted_is_replaced() {
    let (_server, bus, log) = fleet().await;
    let mut tail = log.tail(0, []);
    put(&log, "t.event.agent.a", "a1", 0).await;
    take(&mut tail, 1).await;
    let names = bus.request("$JS.API.CONSUMER.NAMES.T_EVENTS", Bytes::new(), DEADLINE).await.unwrap();
    let names: Value = serde_json::from_slice(&names.payload).unwrap();
    assert_eq!(names["total"], json!(1));
    let subject = format!("$JS.API.CONSUMER.DELETE.T_EVENTS.{}", names["consumers"][0].as_str().unwrap());
    bus.request(subject, Bytes::new(), DEADLINE).await.unwrap();
    put(&log, "t.event.agent.a", "a2", 1).await;
    assert_eq!(take(&mut tail, 1).await, [2]);
}

#[tokio::test]
async fn a_dropped_tail_leaves_no_consumer_behind() {
    let (_server, bus, log) = fleet().await;
    let mut tail = log.tail(0, []);
    soon(tail.next()).await.unwrap();
    drop(tail);
    soon(async {
        loop {
            let names = bus.request("$JS.API.CONSUMER.NAMES.T_EVENTS", Bytes::new(), DEADLINE).await.unwrap();
            let names: Value = serde_json::from_slice(&names.payload).unwrap();
            if names["total"] == json!(0) {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_log_that_went_back_is_an_error() {
    let (mut server, bus, log) = fleet().await;
    for n in 0..3 {
        put(&log, &format!("t.event.execution.x{n}"), &format!("e{n}"), 0).await;
    }
    let mut tail = log.tail(0, []);
    take(&mut tail, 3).await;
    // Another tail that starts from a snapshot of the same knowledge.
    let mut from_snapshot = log.tail(3, []);
    server.restart_empty().unwrap();
    reconnected(&bus, 2).await;
    rollcall_nats::ensure_streams(&bus).await.unwrap();
    put(&log, "t.event.execution.y", "y", 0).await;
    let regressed = loop {
        match soon(tail.next()).await {
            Ok(TailItem::CaughtUp { .. }) => {}
            Ok(TailItem::Entry(entry)) => panic!("{entry:?}"),
            Err(error) => break error,
        }
    };
    assert!(matches!(regressed, TailError::LogRegressed { seen: 3, found: 0 | 1 }), "{regressed}");
    let error = soon(from_snapshot.next()).await.unwrap_err();
    assert_eq!(error, TailError::LogRegressed { seen: 3, found: 1 });
}

#[tokio::test]
async fn a_replaced_log_that_has_grown_past_us_again_is_an_error() {
    let (mut server, bus, log) = fleet().await;
    put(&log, "t.event.execution.x", "e", 0).await;
    let mut tail = log.tail(0, []);
    take(&mut tail, 1).await;
    assert!(matches!(soon(tail.next()).await.unwrap(), TailItem::CaughtUp { .. }));
    server.restart_empty().unwrap();
    reconnected(&bus, 2).await;
    rollcall_nats::ensure_streams(&bus).await.unwrap();
    for n in 0..5 {
        put(&log, &format!("t.event.execution.y{n}"), &format!("y{n}"), 0).await;
    }
    let error = soon(tail.next()).await.unwrap_err();
    assert_eq!(error, TailError::LogRegressed { seen: 1, found: 5 });
}

#[tokio::test]
async fn a_stream_that_is_not_there_is_an_error() {
    let server = rollcall_nats::testing::NatsServer::start().unwrap();
    let bus = server.bus("none").await;
    let mut tail = rollcall_nats::EventLog::new(&bus).tail(0, []);
    assert_eq!(soon(tail.next()).await.unwrap_err(), TailError::NoStream("NONE_EVENTS".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_batches_of_thousands_come_in_order() {
    let (_server, _bus, log) = fleet().await;
    let writers: Vec<_> = (0..256)
        .map(|w| {
            let log = log.clone();
            tokio::spawn(async move {
                for n in 0..20 {
                    put(&log, &format!("t.event.execution.x{w}-{n}"), &format!("e{w}-{n}"), 0).await;
                }
            })
        })
        .collect();
    let mut tail = log.tail(0, []);
    let seqs = take(&mut tail, 256 * 20).await;
    assert_eq!(seqs, (1..=256 * 20).collect::<Vec<u64>>());
    for writer in writers {
        soon(writer).await.unwrap();
    }
}

/// A reader with a tick of its own gives up each wait; an outage must not make every later wait longer than its tick.
#[tokio::test]
async fn giving_up_a_wait_again_and_again_does_not_keep_it_from_coming_back() {
    const TICK: Duration = Duration::from_millis(100);
    let (mut server, bus, log) = fleet().await;
    put(&log, "t.event.agent.a", "a1", 0).await;
    let mut tail = log.tail(0, []);
    assert_eq!(take(&mut tail, 1).await, [1]);
    let epoch = bus.link().borrow().epoch;
    server.stop().unwrap();
    // Long enough for the pauses between two tries to grow to their longest.
    for _ in 0..40 {
        let _ = tokio::time::timeout(TICK, tail.next_batch(10)).await;
    }
    server.start_again().unwrap();
    reconnected(&bus, epoch + 1).await;
    put(&log, "t.event.agent.b", "b1", 0).await;
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < DEADLINE, "it never came back");
        if let Ok(batch) = tokio::time::timeout(TICK, tail.next_batch(10)).await
            && batch.unwrap().entries.iter().any(|entry| entry.seq == 2)
        {
            return;
        }
    }
}
