use bytes::Bytes;
use rollcall_nats::streams::EVENT_MAX_BYTES;
use rollcall_nats::testing::NatsServer;
use rollcall_nats::{Append, AppendError, EventLog, StreamOptions, ensure_streams_with};

use crate::{event, fleet, put, soon};

#[tokio::test]
async fn an_append_on_old_knowledge_is_a_conflict_and_stores_nothing() {
    let (_server, _bus, log) = fleet().await;
    let first = put(&log, "t.event.execution.a", "e1", 0).await;
    let second = put(&log, "t.event.execution.a", "e2", first).await;
    assert!(second > first);
    let late = soon(log.append("t.event.execution.a", "e3", event("e3"), first)).await.unwrap();
    assert_eq!(late, Append::Conflict { winner_seq: Some(second) });
    let new = soon(log.append("t.event.execution.a", "e4", event("e4"), 0)).await.unwrap();
    assert_eq!(new, Append::Conflict { winner_seq: Some(first) });
    // Knowledge from the future is wrong as well.
    let future = soon(log.append("t.event.execution.a", "e5", event("e5"), 99)).await.unwrap();
    assert_eq!(future, Append::Conflict { winner_seq: None });
    assert_eq!(log.last_seq().await.unwrap(), second);
    let last = log.last("t.event.execution.a").await.unwrap().unwrap();
    assert_eq!((last.seq, last.bytes), (second, event("e2")));
    assert_eq!(log.last("t.event.execution.b").await.unwrap(), None);
}

#[tokio::test]
async fn the_same_append_again_is_the_same_entry() {
    let (_server, _bus, log) = fleet().await;
    let first = put(&log, "t.event.agent.a", "e1", 0).await;
    assert_eq!(put(&log, "t.event.agent.a", "e1", 0).await, first);
    let second = put(&log, "t.event.agent.a", "e2", first).await;
    assert_eq!(put(&log, "t.event.agent.a", "e2", first).await, second);
    // Also when somebody has gone on from it meanwhile: it still is the one that won its place.
    put(&log, "t.event.agent.a", "e3", second).await;
    assert_eq!(put(&log, "t.event.agent.a", "e2", first).await, second);
    assert_eq!(log.last_seq().await.unwrap(), 3);
}

#[tokio::test]
async fn an_id_used_on_another_subject_is_not_taken_for_stored() {
    let (_server, _bus, log) = fleet().await;
    put(&log, "t.event.agent.a", "same", 0).await;
    let swallowed = soon(log.append("t.event.agent.b", "same", event("same"), 0)).await.unwrap();
    assert_eq!(swallowed, Append::Conflict { winner_seq: None });
    assert_eq!(log.last("t.event.agent.b").await.unwrap(), None);
}

#[tokio::test]
async fn one_of_many_that_want_the_same_place_gets_it() {
    let (server, _bus, log) = fleet().await;
    let mut tasks = Vec::new();
    for n in 0..16 {
        let log = if n % 2 == 0 { log.clone() } else { EventLog::new(&server.bus("t").await) };
        tasks.push(tokio::spawn(async move {
            let id = format!("e{n}");
            log.append("t.event.execution.x", &id, event(&id), 0).await.unwrap()
        }));
    }
    let mut won = 0;
    for task in tasks {
        won += usize::from(matches!(soon(task).await.unwrap(), Append::Appended { .. }));
    }
    assert_eq!(won, 1);
    assert_eq!(log.last_seq().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_appends_at_once_all_land() {
    let (_server, _bus, log) = fleet().await;
    let tasks: Vec<_> = (0..256)
        .map(|n| {
            let log = log.clone();
            tokio::spawn(async move {
                let mut last = 0;
                for step in 0..4 {
                    last = put(&log, &format!("t.event.execution.x{n}"), &format!("e{n}-{step}"), last).await;
                }
            })
        })
        .collect();
    for task in tasks {
        soon(task).await.unwrap();
    }
    assert_eq!(log.last_seq().await.unwrap(), 1024);
}

#[tokio::test]
async fn an_append_during_a_restart_lands_once() {
    let (mut server, _bus, log) = fleet().await;
    put(&log, "t.event.execution.a", "e1", 0).await;
    server.kill().unwrap();
    let appending = tokio::spawn({
        let log = log.clone();
        async move { put(&log, "t.event.execution.a", "e2", 1).await }
    });
    tokio::task::yield_now().await;
    server.start_again().unwrap();
    assert_eq!(soon(appending).await.unwrap(), 2);
    assert_eq!(log.history("t.event.execution.a").await.unwrap().len(), 2);
}

#[tokio::test]
async fn full_and_too_large_have_errors_of_their_own() {
    let server = NatsServer::start().unwrap();
    let bus = server.bus("t").await;
    let options = StreamOptions { events_max_bytes: Some(2 * 1024 * 1024), ..StreamOptions::default() };
    ensure_streams_with(&bus, &options).await.unwrap();
    let log = EventLog::new(&bus);
    let big = Bytes::from(vec![b'x'; 600 * 1024]);
    let mut stored = 0;
    let error = loop {
        let id = format!("e{stored}");
        match soon(log.append(&format!("t.event.execution.{id}"), &id, big.clone(), 0)).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AppendError::Full(_)), "{error}");
    assert_eq!(log.last_seq().await.unwrap(), stored);
    // The old ones are all still there.
    assert!(log.last("t.event.execution.e0").await.unwrap().is_some());
    let giant = Bytes::from(vec![b'x'; EVENT_MAX_BYTES + 1]);
    let error = soon(log.append("t.event.execution.g", "g", giant, 0)).await.unwrap_err();
    assert_eq!(error, AppendError::TooLarge { bytes: EVENT_MAX_BYTES + 1 });
    // Just under the limit of the log, but over it with its headers.
    let brim = Bytes::from(vec![b'x'; EVENT_MAX_BYTES - 8]);
    let error = soon(log.append("t.event.execution.g", "g", brim, 0)).await.unwrap_err();
    assert_eq!(error, AppendError::TooLarge { bytes: EVENT_MAX_BYTES - 8 });
}

#[tokio::test]
async fn a_server_that_allows_more_than_the_log_changes_nothing() {
    let server = NatsServer::start_with(Some("max_payload: 4194304\n")).unwrap();
    let bus = server.bus("t").await;
    rollcall_nats::ensure_streams(&bus).await.unwrap();
    let log = EventLog::new(&bus);
    // Passes our own check and the connection's; the stream counts the headers as well and refuses.
    let brim = Bytes::from(vec![b'x'; EVENT_MAX_BYTES]);
    let error = soon(log.append("t.event.execution.a", "e1", brim, 0)).await.unwrap_err();
    assert_eq!(error, AppendError::TooLarge { bytes: EVENT_MAX_BYTES });
    assert_eq!(log.last_seq().await.unwrap(), 0);
}

#[tokio::test]
async fn an_event_of_nearly_a_mebibyte_is_read_back() {
    let (_server, _bus, log) = fleet().await;
    let big = Bytes::from(vec![b'x'; EVENT_MAX_BYTES - 1024]);
    soon(log.append("t.event.execution.a", "e1", big.clone(), 0)).await.unwrap();
    assert_eq!(log.last("t.event.execution.a").await.unwrap().unwrap().bytes, big);
    assert_eq!(log.history("t.event.execution.a").await.unwrap()[0].bytes, big);
}

#[tokio::test]
async fn histories_short_and_long_and_pages() {
    let (_server, _bus, log) = fleet().await;
    let mut last = 0;
    for n in 0..100 {
        last = put(&log, "t.event.agent.a", &format!("a{n}"), last).await;
        put(&log, &format!("t.event.execution.x{n}"), &format!("x{n}"), 0).await;
    }
    let history = soon(log.history("t.event.agent.a")).await.unwrap();
    assert_eq!(history.len(), 100);
    assert!(history.iter().enumerate().all(|(n, entry)| entry.bytes == event(&format!("a{n}"))));
    assert_eq!(soon(log.history("t.event.execution.x3")).await.unwrap().len(), 1);
    assert!(soon(log.history("t.event.execution.none")).await.unwrap().is_empty());
    assert_eq!(log.last_seq_of("t.event.agent.>").await.unwrap(), 199);

    let page = soon(log.read_range(0, 30, &["t.event.execution.>"])).await.unwrap();
    assert_eq!((page.entries.len(), page.next_after, page.more), (30, 60, true));
    let page = soon(log.read_range(page.next_after, 1000, &["t.event.execution.>"])).await.unwrap();
    assert_eq!((page.entries.len(), page.next_after, page.more), (70, 200, false));
    let page = soon(log.read_range(200, 10, &[])).await.unwrap();
    assert_eq!((page.entries.len(), page.next_after, page.more), (0, 200, false));
}

#[tokio::test]
async fn reports_and_payloads() {
    let (_server, bus, _log) = fleet().await;
    let reports = rollcall_nats::Reports::new(&bus);
    reports.publish("t.report.agent-7.x1", Bytes::from_static(b"{}")).await.unwrap();
    reports.publish("t.report.agent-7.x1", Bytes::from_static(b"{\"n\":2}")).await.unwrap();
    let last = reports.last("t.report.agent-7.x1").await.unwrap().unwrap();
    assert_eq!(&last.bytes[..], b"{\"n\":2}");
    assert!(reports.last("t.report.agent-7.x2").await.unwrap().is_none());

    let payloads = rollcall_nats::Payloads::new(&bus);
    let big = Bytes::from(vec![b'y'; 512 * 1024]);
    let seq = payloads.put("t.payload.x1.input.1", big.clone()).await.unwrap();
    assert_eq!(payloads.get(seq).await.unwrap(), Some(big));
    assert_eq!(payloads.get(seq + 1).await.unwrap(), None);
    let error = payloads.put("t.payload.x1.input.1", Bytes::from(vec![0; 512 * 1024 + 1])).await.unwrap_err();
    assert_eq!(error, rollcall_nats::StoreError::TooLarge { bytes: 512 * 1024 + 1 });
}
