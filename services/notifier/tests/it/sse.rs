//! `/events`: live, resume, hand-over, filters, slow readers, shutdown.

use notifier::{feed::FeedLimits, shared::Limits};
use rollcall_core::agent::Status;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    harness::{Block, Log, within},
    samples,
};

fn small_ring(events: usize) -> Limits {
    Limits { feed: FeedLimits { events, bytes: usize::MAX }, ..Limits::default() }
}

#[tokio::test]
async fn live_events_come_with_the_bytes_of_the_log() {
    let mut log = Log::start().await;
    log.append(&samples::submitted("old", None)).await;
    let notifier = log.notifier().await;
    let mut sse = notifier.sse("").await;
    let event = samples::recovered("e1", "a1", 1);
    let seq = log.append(&event).await;
    let (id, kind, data) = sse.event().await;
    assert_eq!((id, kind.as_str()), (seq, "execution.recovered"), "from now on, not the old one");
    assert_eq!(data.as_bytes(), event.encode());
    notifier.stop().await;
}

#[tokio::test]
async fn last_event_id_wins_over_after_and_both_resume() {
    let mut log = Log::start().await;
    for n in 1..=5 {
        log.append(&samples::submitted(&format!("e{n}"), None)).await;
    }
    let notifier = log.notifier().await;
    assert_eq!(notifier.sse("?after=3").await.seqs(2).await, [4, 5]);
    assert_eq!(notifier.sse_after("?after=1", Some(4)).await.seqs(1).await, [5]);
    assert_eq!(notifier.sse_after("?after=0", None).await.seqs(5).await, [1, 2, 3, 4, 5]);
    notifier.stop().await;
}

/// Readers come and go while events are appended; the ring is so small that every resume goes
/// through the log, and is handed over to the ring and back again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_comes_and_goes_gets_every_event_once_and_in_order() {
    const EVENTS: usize = 1_200;
    let mut log = Log::start().await;
    log.append(&samples::submitted("e0", None)).await;
    let notifier = log.notifier_with(small_ring(2)).await;
    let writer = tokio::spawn(async move {
        for n in 1..EVENTS {
            log.append(&samples::submitted(&format!("e{n}"), None)).await;
        }
        log
    });
    let mut readers = Vec::new();
    for step in [7usize, 40, 333, EVENTS] {
        let url = notifier.url("/events?after=0");
        readers.push(tokio::spawn(async move {
            let mut got: Vec<(u64, String)> = Vec::new();
            while got.len() < EVENTS {
                let last = got.last().map_or(0, |(seq, _)| *seq);
                let mut sse = crate::harness::connect(&url, last).await;
                for _ in 0..step.min(EVENTS - got.len()) {
                    // A stream that ends because it was too slow is resumed like any other.
                    let Some((seq, _, data)) = sse.try_event().await else { break };
                    let before = got.last().map_or(0, |(seq, _)| *seq);
                    assert_eq!(seq, before + 1, "with {step} a time");
                    got.push((seq, data));
                }
            }
            got
        }));
    }
    let log = within("all appended", writer).await.unwrap();
    for reader in readers {
        let got = within("all read", reader).await.unwrap();
        let expected: Vec<_> =
            log.entries.iter().map(|(seq, b)| (*seq, String::from_utf8(b.to_vec()).unwrap())).collect();
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got, expected);
        }
    }
    notifier.stop().await;
}

#[tokio::test]
async fn filters_hold_for_old_and_for_new_events() {
    let mut log = Log::start().await;
    let life = |execution: &str, agent: &str| {
        vec![
            samples::submitted(execution, None),
            samples::dispatched(execution, agent, 1),
            samples::recovered(execution, agent, 1),
        ]
    };
    log.append_all(&[samples::registered("a1", "blue"), samples::status("a1", Status::Connected, None)])
        .await;
    log.append_all(&life("e1", "a1")).await;
    log.append(&samples::system("watchdog", json!({"agent_id": "a1"}))).await;
    // So small a memory that the first execution is forgotten and the first events have left the ring.
    let limits = Limits { ended_kept: 0, ..small_ring(3) };
    let notifier = log.notifier_with(limits).await;
    let queries = [
        ("?after=0&type=execution.recovered", vec![5, 10]),
        ("?after=0&type=rollcall.agent.*", vec![1, 2, 7]),
        ("?after=0&type=agent.connected,system.*", vec![2, 6]),
        ("?after=0&agent=a1", vec![1, 2, 4, 5, 6]),
        ("?after=0&execution=e2", vec![8, 9, 10]),
        ("?after=0&pool=blue", vec![1, 2]),
        ("?after=0&pool=default&type=execution.*", vec![3, 4, 5, 8, 9, 10]),
        ("?after=0&agent=&pool=&execution=&type=", vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ];
    let mut streams = Vec::new();
    for (query, expected) in queries {
        streams.push((query, expected, notifier.sse(query).await));
    }
    log.append(&samples::registered("a2", "red")).await;
    log.append_all(&life("e2", "a2")).await;
    for (query, expected, mut stream) in streams {
        assert_eq!(stream.seqs(expected.len()).await, expected, "{query}");
    }
    for (query, expected) in
        [("?after=0&pool=default", vec![3, 4, 5, 8, 9, 10]), ("?after=0&pool=red", vec![7])]
    {
        assert_eq!(notifier.sse(query).await.seqs(expected.len()).await, expected, "{query}, all of it old");
    }
    notifier.stop().await;
}

#[tokio::test]
async fn entries_that_are_no_events_are_skipped_and_nothing_else_is() {
    let mut log = Log::start().await;
    log.append(&samples::submitted("e1", None)).await;
    log.append_bytes("rollcall.event.execution.e1", "bad1", "{\"stream\":\"X\"}".into()).await;
    log.append_bytes("rollcall.event.agent.a1", "bad2", samples::submitted("a1", None).encode().into()).await;
    let misfit = log.append(&samples::retried("e1", 2)).await;
    let orphan = log.append(&samples::retried("never", 2)).await;
    let notifier = log.notifier_with(small_ring(1)).await;
    let mut sse = notifier.sse("?after=0").await;
    assert_eq!(sse.seqs(3).await, [1, misfit, orphan]);
    let next = log.append(&samples::dispatched("e1", "a1", 1)).await;
    assert_eq!(sse.seqs(1).await, [next]);
    assert_eq!(notifier.json("/api/executions/e1").await["state"], "dispatching");
    assert_eq!(notifier.get("/api/executions/never").await.status(), 404);
    notifier.stop().await;
}

#[tokio::test]
async fn a_place_beyond_the_log_is_refused() {
    let mut log = Log::start().await;
    let seq = log.append(&samples::submitted("e1", None)).await;
    let notifier = log.notifier().await;
    for path in ["/events", "/api/events"] {
        assert_eq!(notifier.get(&format!("{path}?after={seq}")).await.status(), 200, "{path}");
        let response = notifier.get(&format!("{path}?after={}", seq + 1)).await;
        assert_eq!(response.status(), 400, "{path}");
        assert!(response.text().await.unwrap().contains("the log ends at 1"), "{path}");
    }
    notifier.stop().await;
}

/// Somebody asks and never reads. He falls out of the ring; the others get everything meanwhile; when he reads at
/// last he is told where to resume, and the resume is complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_read_is_told_where_to_resume_and_delays_nobody() {
    let mut log = Log::start().await;
    let notifier = log.notifier_with(small_ring(32)).await;
    let mut idle = tokio::net::TcpStream::connect(notifier.addr).await.unwrap();
    idle.write_all(b"GET /events HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    let mut head = vec![0; 12];
    idle.read_exact(&mut head).await.unwrap();
    let mut reader = notifier.sse("?after=0").await;
    // Large events fill the socket's buffers soon.
    let padding = "x".repeat(64 * 1024);
    for n in 1..=200u64 {
        let seq = log.append(&samples::system("watchdog", json!({"padding": padding, "n": n}))).await;
        assert_eq!(reader.event().await.0, seq, "the one who reads is never behind");
    }
    let mut rest = Vec::new();
    within("the slow stream ends", idle.read_to_end_of_chunks(&mut rest)).await;
    let text = String::from_utf8_lossy(&rest);
    let resume: u64 =
        text.rsplit_once("too slow, resume after ").expect("told").1.lines().next().unwrap().parse().unwrap();
    assert!(resume < 200);
    let got: Vec<u64> =
        text.lines().filter_map(|l| l.strip_prefix("id: ")).map(|l| l.parse().unwrap()).collect();
    assert_eq!(*got.last().unwrap(), resume);
    let missing = usize::try_from(200 - resume).unwrap();
    let resumed = notifier.sse_after("", Some(resume)).await.seqs(missing).await;
    assert_eq!(resumed, (resume + 1..=200).collect::<Vec<_>>());
    notifier.stop().await;
}

trait ReadChunks {
    async fn read_to_end_of_chunks(&mut self, out: &mut Vec<u8>);
}

impl ReadChunks for tokio::net::TcpStream {
    /// Reads until the last chunk of the answer. (The connection itself stays open.)
    async fn read_to_end_of_chunks(&mut self, out: &mut Vec<u8>) {
        let mut block = vec![0; 256 * 1024];
        while !out.ends_with(b"\r\n0\r\n\r\n") {
            let read = self.read(&mut block).await.unwrap();
            assert_ne!(read, 0, "ended without an end");
            out.extend_from_slice(&block[..read]);
        }
    }
}

#[tokio::test]
async fn at_shutdown_subscribers_are_told_and_let_go() {
    let mut log = Log::start().await;
    let seq = log.append(&samples::submitted("e1", None)).await;
    let notifier = log.notifier().await;
    let mut sse = notifier.sse("").await;
    notifier.shut_down();
    match sse.block().await {
        Some(Block::Comment(text)) => {
            assert!(text.contains(&format!("shutting down, resume after {seq}")), "{text}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(sse.block().await, None);
    notifier.stop().await;
}

#[tokio::test]
async fn subscribers_are_bounded_and_a_place_becomes_free_again() {
    let log = Log::start().await;
    let notifier = log.notifier_with(Limits { subscribers: 1, ..Limits::default() }).await;
    let first = notifier.sse("").await;
    let refused = notifier.get("/events").await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<serde_json::Value>().await.unwrap()["error"]["code"], "unavailable");
    drop(first);
    within("the place is free", async {
        while notifier.get("/events").await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    notifier.stop().await;
}
