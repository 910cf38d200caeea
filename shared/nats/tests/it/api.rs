use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use rollcall_nats::{ApiError, ApiHandle, ApiOptions, ApiServer, Bus, RequestError};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::bus::raw_publish;
use crate::{DEADLINE, fleet, soon};

/// Times that requests meet a drain, and how many are under way each time.
const DRAINS: usize = 60;
const ASKERS: usize = 8;

struct Desk {
    runs: Arc<AtomicUsize>,
    /// Requests of `slow` that arrived; each waits for a permit of `release`.
    waiting: Arc<Semaphore>,
    release: Arc<Semaphore>,
    handle: ApiHandle,
}

async fn desk(bus: &Bus) -> Desk {
    let runs = Arc::new(AtomicUsize::new(0));
    let release = Arc::new(Semaphore::new(0));
    let options = ApiOptions {
        max_in_flight: 2,
        max_request_bytes: 100,
        ..ApiOptions::new("rollcall-dispatcher", "0.1.0")
    };
    let waiting = Arc::new(Semaphore::new(0));
    let (count, arrived, wait) = (Arc::clone(&runs), Arc::clone(&waiting), Arc::clone(&release));
    let handle = ApiServer::new(bus, options)
        .verb("submit", move |request| {
            count.fetch_add(1, Ordering::SeqCst);
            async move { Ok(request.payload) }
        })
        .verb("full", |_| async {
            Err(ApiError::new("queue_full", "queue of agent-7 is full").retry_after_ms(5000))
        })
        .verb("watchdog.run", |_| async { panic!("handler bug") })
        .verb("slow", move |_| {
            arrived.add_permits(1);
            let wait = Arc::clone(&wait);
            async move {
                wait.acquire().await.unwrap().forget();
                Ok(Bytes::from_static(b"late"))
            }
        })
        .verb("giant", |_| async { Ok(Bytes::from(vec![b' '; 2 * 1024 * 1024])) })
        .start()
        .await
        .unwrap();
    bus.flush().await.unwrap();
    Desk { runs, waiting, release, handle }
}

async fn ask(bus: &Bus, verb: &str, body: &str) -> (Option<u16>, String) {
    let answer =
        soon(bus.request(format!("t.api.{verb}"), Bytes::from(body.to_owned()), DEADLINE)).await.unwrap();
    let code = answer
        .headers
        .and_then(|headers| headers.get("Nats-Service-Error-Code").map(|code| code.to_string()));
    (code.map(|code| code.parse().unwrap()), String::from_utf8(answer.payload.to_vec()).unwrap())
}

#[tokio::test]
async fn answers_and_errors_are_the_protocols() {
    let (server, bus, _log) = fleet().await;
    let _desk = desk(&bus).await;
    let client = server.bus("t").await;
    assert_eq!(ask(&client, "submit", "{}").await, (None, "{}".to_owned()));
    let full =
        r#"{"error":{"code":"queue_full","message":"queue of agent-7 is full","retry_after_ms":5000}}"#;
    assert_eq!(ask(&client, "full", "{}").await, (Some(429), full.to_owned()));
    let answer = client.request("t.api.full", Bytes::new(), DEADLINE).await.unwrap();
    let text = answer.headers.unwrap().get("Nats-Service-Error").unwrap().to_string();
    assert_eq!(text, "queue_full: queue of agent-7 is full");
    let (code, body) = ask(&client, "submit", &"x".repeat(101)).await;
    assert_eq!(code, Some(413), "{body}");
    assert_eq!(ask(&client, "giant", "").await.0, Some(413));
    let nobody = client.request("t.api.none", Bytes::new(), DEADLINE).await.unwrap_err();
    assert_eq!(nobody, RequestError::NoResponders);
}

#[tokio::test]
async fn a_handler_that_panics_takes_nobody_with_it() {
    let (_server, bus, _log) = fleet().await;
    let _desk = desk(&bus).await;
    let (code, body) = ask(&bus, "watchdog.run", "").await;
    assert_eq!(code, Some(503));
    assert!(body.contains(r#""code":"unavailable""#) && !body.contains("bug"), "{body}");
    assert_eq!(ask(&bus, "submit", "1").await, (None, "1".to_owned()));
}

#[tokio::test]
async fn too_many_at_once_are_told_to_come_back() {
    let (_server, bus, _log) = fleet().await;
    let desk = desk(&bus).await;
    let slow: Vec<_> = (0..2)
        .map(|_| {
            let bus = bus.clone();
            tokio::spawn(async move { ask(&bus, "slow", "").await })
        })
        .collect();
    soon(desk.waiting.acquire_many(2)).await.unwrap().forget();
    let (code, body) = ask(&bus, "submit", "1").await;
    assert_eq!(code, Some(503));
    assert!(body.contains(r#""code":"unavailable""#) && body.contains("retry_after_ms"), "{body}");
    desk.release.add_permits(2);
    for task in slow {
        assert_eq!(soon(task).await.unwrap().1, "late");
    }
}

#[tokio::test]
async fn nobody_can_make_a_service_write_into_the_log() {
    let (server, bus, log) = fleet().await;
    let desk = desk(&bus).await;
    for subject in ["t.api.submit", "t.api.full", "$SRV.PING", "$SRV.INFO", "$SRV.STATS.rollcall-dispatcher"]
    {
        raw_publish(&server, subject, Some("t.event.agent.victim")).await;
    }
    // An ordinary request afterwards proves that those before it were seen.
    ask(&bus, "submit", "1").await;
    let info = bus.request("$SRV.INFO", Bytes::new(), DEADLINE).await;
    info.unwrap();
    bus.flush().await.unwrap();
    assert_eq!(log.last("t.event.>").await.unwrap(), None);
    assert_eq!(desk.runs.load(Ordering::SeqCst), 1, "the verb ran for a reply subject that is no inbox");
}

#[tokio::test]
async fn services_are_found_as_nats_micro_does_it() {
    let (_server, bus, _log) = fleet().await;
    let _desk = desk(&bus).await;
    ask(&bus, "full", "").await;
    let get = async |subject: String| -> Value {
        let answer = soon(bus.request(subject, Bytes::new(), DEADLINE)).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    };
    let ping = get("$SRV.PING".to_owned()).await;
    assert_eq!(ping["type"], json!("io.nats.micro.v1.ping_response"));
    assert_eq!((&ping["name"], &ping["version"]), (&json!("rollcall-dispatcher"), &json!("0.1.0")));
    let info = get("$SRV.INFO.rollcall-dispatcher".to_owned()).await;
    assert_eq!(info["id"], ping["id"]);
    let endpoints = info["endpoints"].as_array().unwrap();
    assert!(endpoints.iter().any(|endpoint| endpoint["name"] == json!("watchdog-run")
        && endpoint["subject"] == json!("t.api.watchdog.run")
        && endpoint["queue_group"] == json!("q")));
    let stats = get(format!("$SRV.STATS.rollcall-dispatcher.{}", ping["id"].as_str().unwrap())).await;
    let full = stats["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .find(|endpoint| endpoint["name"] == json!("full"))
        .unwrap();
    assert_eq!((&full["num_requests"], &full["num_errors"]), (&json!(1), &json!(1)));
    assert_eq!(full["last_error"], json!("429:queue_full: queue of agent-7 is full"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_meets_the_drain_is_answered_or_told_that_nobody_listens() {
    let (server, bus, _log) = fleet().await;
    let client = server.bus("t").await;
    // What else the connection is used for must not end a subscription before the server has.
    let busy = bus.clone();
    let busy = tokio::spawn(async move {
        while busy.publish("t.else".to_owned(), Bytes::new()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    let mut answered = 0;
    for _ in 0..DRAINS {
        let desk = desk(&bus).await;
        // They come one after the other all the time, so that some are on their way when it begins.
        let asking = (0..ASKERS).map(|_| async {
            for count in 0.. {
                match client.request("t.api.submit", Bytes::from_static(b"1"), DEADLINE).await {
                    Ok(_) => {}
                    Err(RequestError::NoResponders) => return count,
                    Err(error) => panic!("{error}"),
                }
            }
            0
        });
        let drain = async {
            let runs = Arc::clone(&desk.runs);
            while runs.load(Ordering::SeqCst) < ASKERS {
                tokio::task::yield_now().await;
            }
            assert!(desk.handle.drain(DEADLINE).await);
        };
        let (counts, ()) = soon(async { tokio::join!(futures_util::future::join_all(asking), drain) }).await;
        answered += counts.iter().sum::<usize>();
    }
    busy.abort();
    assert!(answered >= DRAINS * ASKERS);
}

#[tokio::test]
async fn draining_answers_what_was_taken_and_takes_no_more() {
    let (server, bus, _log) = fleet().await;
    let client = server.bus("t").await;
    let desk = desk(&bus).await;
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.unwrap();
    client.flush().await.unwrap();
    raw_publish(&server, "t.api.slow", Some(&inbox)).await;
    soon(desk.waiting.acquire()).await.unwrap().forget();
    let draining = tokio::spawn(desk.handle.drain(Duration::from_secs(20)));
    soon(async {
        loop {
            match client.request("t.api.submit", Bytes::from_static(b"1"), DEADLINE).await {
                Err(RequestError::NoResponders) => return,
                other => drop(other.unwrap()),
            }
        }
    })
    .await;
    assert!(!draining.is_finished());
    desk.release.add_permits(1);
    assert_eq!(&soon(answers.next()).await.unwrap().payload[..], b"late");
    assert!(soon(draining).await.unwrap());
}
