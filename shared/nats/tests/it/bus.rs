use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use rollcall_nats::testing::NatsServer;
use rollcall_nats::{Bus, BusOptions, ConnectError, PublishError, ReplyOutcome, RequestError};
use tokio_util::sync::CancellationToken;

use crate::{DEADLINE, fleet, soon};

pub(crate) fn options(url: &str) -> BusOptions {
    BusOptions { url: url.to_owned(), prefix: "t".to_owned(), ..BusOptions::default() }
}

#[tokio::test]
async fn it_waits_for_a_server_that_is_not_up_yet() {
    let mut server = NatsServer::start().unwrap();
    server.stop().unwrap();
    let url = server.url();
    let connecting = tokio::spawn(async move { Bus::connect(options(&url), CancellationToken::new()).await });
    tokio::task::yield_now().await;
    server.start_again().unwrap();
    let bus = soon(connecting).await.unwrap().unwrap();
    assert_eq!(bus.link().borrow().epoch, 1);
    assert!(bus.is_connected());
}

#[tokio::test]
async fn waiting_ends_when_cancelled() {
    let mut server = NatsServer::start().unwrap();
    server.stop().unwrap();
    let cancel = CancellationToken::new();
    let connecting = tokio::spawn(Bus::connect(options(&server.url()), cancel.clone()));
    tokio::task::yield_now().await;
    cancel.cancel();
    assert!(matches!(soon(connecting).await.unwrap(), Err(ConnectError::Cancelled)));
}

#[tokio::test]
async fn bad_credentials_are_waited_out() {
    let server = NatsServer::start_with(Some("authorization { user: u, password: right }")).unwrap();
    let with = |password: &str| BusOptions {
        user: Some("u".to_owned()),
        password: Some(password.to_owned()),
        ..options(&server.url())
    };
    let cancel = CancellationToken::new();
    let refused = tokio::spawn(Bus::connect(with("wrong"), cancel.clone()));
    soon(Bus::connect(with("right"), CancellationToken::new())).await.unwrap();
    assert!(!refused.is_finished());
    cancel.cancel();
    assert!(matches!(soon(refused).await.unwrap(), Err(ConnectError::Cancelled)));
}

#[tokio::test]
async fn a_server_that_is_too_old_is_refused_by_its_version() {
    // What an old server says first; enough of one for the handshake.
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let old = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let info = r#"INFO {"server_id":"X","server_name":"old","version":"2.9.10","headers":true,"max_payload":1048576,"proto":1}"#;
        write.write_all(format!("{info}\r\n").as_bytes()).await.unwrap();
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if line.starts_with("PING") {
                write.write_all(b"PONG\r\n").await.unwrap();
            }
        }
    });
    let error = soon(Bus::connect(options(&url), CancellationToken::new())).await.unwrap_err();
    assert!(error.to_string().contains("2.9.10"), "{error}");
    assert!(matches!(error, ConnectError::Unsupported(_)));
    old.abort();
}

#[tokio::test]
async fn what_no_waiting_can_heal_is_an_error_at_once() {
    let try_with = |options: BusOptions| soon(Bus::connect(options, CancellationToken::new()));
    let bad = BusOptions { prefix: "a.b".to_owned(), ..options("nats://127.0.0.1:1") };
    assert!(matches!(try_with(bad).await, Err(ConnectError::Prefix(_))));
    assert!(matches!(try_with(options("http://x")).await, Err(ConnectError::Url { .. })));
    let bad = BusOptions { inbox_prefix: Some("rollcall.event".to_owned()), ..options("nats://127.0.0.1:1") };
    assert!(matches!(try_with(bad).await, Err(ConnectError::InboxPrefix(_))));
    let bad = BusOptions { creds: Some("/nonexistent".into()), ..options("nats://127.0.0.1:1") };
    assert!(matches!(try_with(bad).await, Err(ConnectError::Credentials { .. })));
}

#[tokio::test]
async fn nobody_there_is_known_at_once_and_silence_only_in_time() {
    let (_server, bus, _log) = fleet().await;
    let started = Instant::now();
    let nobody = bus.request("t.agent.a.i.ping", Bytes::new(), DEADLINE).await.unwrap_err();
    assert_eq!(nobody, RequestError::NoResponders);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    let _silent = bus.subscribe("t.agent.a.i.ping").await.unwrap();
    let silence = bus.request("t.agent.a.i.ping", Bytes::new(), Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(silence, RequestError::Timeout);
}

#[tokio::test]
async fn a_cut_is_seen_and_no_request_waits_for_its_timeout() {
    let (mut server, bus, _log) = fleet().await;
    let mut link = bus.link();
    let _silent = bus.subscribe("t.quiet").await.unwrap();
    bus.flush().await.unwrap();
    let asking = tokio::spawn({
        let bus = bus.clone();
        async move { bus.request("t.quiet", Bytes::new(), Duration::from_secs(600)).await }
    });
    tokio::task::yield_now().await;
    server.kill().unwrap();
    assert_eq!(soon(asking).await.unwrap().unwrap_err(), RequestError::Disconnected);
    soon(link.wait_for(|link| !link.connected)).await.unwrap();
    assert_eq!(bus.publish("t.x", Bytes::new()).await, Err(PublishError::Disconnected));
    assert_eq!(
        bus.request("t.x", Bytes::new(), Duration::from_secs(600)).await.unwrap_err(),
        RequestError::Disconnected
    );
    server.start_again().unwrap();
    let again = *soon(link.wait_for(|link| link.connected)).await.unwrap();
    assert_eq!(again.epoch, 2);
    soon(bus.flush()).await.unwrap();
}

#[tokio::test]
async fn subjects_that_would_reach_elsewhere_are_refused() {
    let (_server, bus, _log) = fleet().await;
    for bad in ["", "t.*", "t.>", "t.a b", "t.a\r\nPUB x 0"] {
        let error = bus.publish(bad, Bytes::new()).await.unwrap_err();
        assert!(matches!(error, PublishError::InvalidSubject(_)), "{bad:?}");
    }
    let giant = Bytes::from(vec![0; bus.max_payload() + 1]);
    assert_eq!(bus.publish("t.x", giant).await, Err(PublishError::TooLarge));
}

#[tokio::test]
async fn only_inboxes_are_answered() {
    let (server, bus, log) = fleet().await;
    let mut asked = bus.subscribe("t.ask").await.unwrap();
    bus.flush().await.unwrap();
    // A plain connection, as an attacker has one: a reply subject inside the log.
    let attacker = raw_publish(&server, "t.ask", Some("t.event.agent.victim")).await;
    let message = soon(asked.next()).await.unwrap();
    assert_eq!(bus.reply(&message, Bytes::from_static(b"{}")).await, ReplyOutcome::Refused);
    raw_publish(&server, "t.ask", None).await;
    let message = soon(asked.next()).await.unwrap();
    assert_eq!(bus.reply(&message, Bytes::new()).await, ReplyOutcome::NotAsked);
    bus.flush().await.unwrap();
    assert_eq!(log.last("t.event.agent.victim").await.unwrap(), None);
    drop(attacker);
    let asking = tokio::spawn({
        let bus = bus.clone();
        async move { bus.request("t.ask", Bytes::new(), DEADLINE).await }
    });
    let message = soon(asked.next()).await.unwrap();
    assert_eq!(bus.reply(&message, Bytes::from_static(b"hi")).await, ReplyOutcome::Sent);
    assert_eq!(&soon(asking).await.unwrap().unwrap().payload[..], b"hi");
}

/// Publishes with any reply subject, past all of our own checks.
pub(crate) async fn raw_publish(
    server: &NatsServer,
    subject: &str,
    reply: Option<&str>,
) -> tokio::net::TcpStream {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
    let reply = reply.unwrap_or("");
    let line = format!("CONNECT {{\"verbose\":false}}\r\nPUB {subject} {reply} 2\r\n{{}}\r\nPING\r\n");
    stream.write_all(line.as_bytes()).await.unwrap();
    let mut heard = String::new();
    soon(async {
        while !heard.contains("PONG") {
            let mut buffer = [0; 4096];
            let read = stream.read(&mut buffer).await.unwrap();
            heard.push_str(&String::from_utf8_lossy(&buffer[..read]));
            assert!(read > 0 && !heard.contains("-ERR"), "{heard}");
        }
    })
    .await;
    stream
}

#[tokio::test]
async fn dropped_messages_of_a_slow_reader_are_counted() {
    let server = NatsServer::start().unwrap();
    let slow = BusOptions { subscription_capacity: Some(8), ..options(&server.url()) };
    let bus = Bus::connect(slow, CancellationToken::new()).await.unwrap();
    let mut drops = bus.slow_consumer_drops();
    let _unread = bus.subscribe("t.flood").await.unwrap();
    for _ in 0..100 {
        bus.publish("t.flood", Bytes::new()).await.unwrap();
    }
    soon(drops.wait_for(|count| *count > 0)).await.unwrap();
}

#[tokio::test]
async fn draining_delivers_what_was_published_and_closes() {
    let (server, bus, _log) = fleet().await;
    let other = server.bus("t").await;
    let mut heard = other.subscribe("t.last").await.unwrap();
    other.flush().await.unwrap();
    for _ in 0..100 {
        bus.publish("t.last", Bytes::new()).await.unwrap();
    }
    assert!(soon(bus.drain(Duration::from_secs(5))).await);
    for _ in 0..100 {
        soon(heard.next()).await.unwrap();
    }
    assert!(bus.request("t.last", Bytes::new(), Duration::from_millis(100)).await.is_err());
}
