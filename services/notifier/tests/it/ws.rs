//! `/ws`: frames, subprotocol, origins, slow readers, shutdown.

use futures_util::{SinkExt, StreamExt};
use notifier::{feed::FeedLimits, shared::Limits};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error, Message, client::IntoClientRequest, http::HeaderValue, protocol::CloseFrame},
};

use crate::{
    harness::{Log, Notifier, within},
    samples,
};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

struct Asked {
    protocol: Option<&'static str>,
    origin: Option<String>,
}

async fn open(notifier: &Notifier, query: &str, asked: Asked) -> (Socket, Option<HeaderValue>) {
    let mut request = format!("ws://{}/ws{query}", notifier.addr).into_client_request().unwrap();
    if let Some(protocol) = asked.protocol {
        request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static(protocol));
    }
    if let Some(origin) = asked.origin {
        request.headers_mut().insert("origin", origin.parse().unwrap());
    }
    let (socket, response) = within("WebSocket opens", connect_async(request)).await.unwrap();
    (socket, response.headers().get("sec-websocket-protocol").cloned())
}

async fn plain(notifier: &Notifier, query: &str) -> Socket {
    open(notifier, query, Asked { protocol: Some("rollcall.v1.json"), origin: None }).await.0
}

/// The next text, or the close. Pings don't extend the deadline.
async fn next(socket: &mut Socket) -> Result<String, CloseFrame> {
    within("the next message", async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => return Ok(text.as_str().to_owned()),
                Some(Ok(Message::Close(Some(frame)))) => return Err(frame),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("{other:?}"),
            }
        }
    })
    .await
}

#[tokio::test]
async fn frames_hold_the_bytes_of_the_log() {
    let mut log = Log::start().await;
    log.append(&samples::submitted("e1", None)).await;
    let notifier = log.notifier().await;
    let asked = Asked { protocol: Some("other, rollcall.v1.json"), origin: None };
    let (mut socket, protocol) = open(&notifier, "?after=0&type=execution.*", asked).await;
    assert_eq!(protocol.unwrap(), "rollcall.v1.json");
    log.append(&samples::registered("a1", "p")).await;
    log.append(&samples::dispatched("e1", "a1", 1)).await;
    for (seq, bytes) in [&log.entries[0], &log.entries[2]] {
        let text = next(&mut socket).await.unwrap();
        assert_eq!(text, format!("{{\"seq\":{seq},\"event\":{}}}", std::str::from_utf8(bytes).unwrap()));
    }
    socket.send(Message::Ping("x".into())).await.unwrap();
    let pong = within("pong", socket.next()).await;
    assert!(matches!(pong, Some(Ok(Message::Pong(payload))) if payload == "x"));
    notifier.stop().await;
}

#[tokio::test]
async fn who_is_not_allowed_is_closed_with_1008() {
    let log = Log::start().await;
    let notifier = log.notifier().await;
    let own = format!("http://{}", notifier.addr);
    for (protocol, origin, allowed) in [
        (Some("graphql-ws"), None, false),
        (Some("rollcall.v1.json"), Some("http://evil.example".to_owned()), false),
        (None, Some("null".to_owned()), false),
        (None, None, true),
        (Some("rollcall.v1.json"), Some(own), true),
    ] {
        let shown = format!("{protocol:?} {origin:?}");
        let (mut socket, _) = open(&notifier, "", Asked { protocol, origin }).await;
        if allowed {
            socket.close(None).await.unwrap();
        } else {
            let frame = next(&mut socket).await.expect_err(&shown);
            assert_eq!(u16::from(frame.code), 1008, "{shown}");
        }
    }
    notifier.stop().await;
}

#[tokio::test]
async fn bad_parameters_and_plain_requests_get_an_http_error() {
    let log = Log::start().await;
    let notifier = log.notifier().await;
    let Err(Error::Http(response)) = connect_async(format!("ws://{}/ws?after=x", notifier.addr)).await else {
        panic!("it was let in");
    };
    assert_eq!(response.status(), 400);
    let body = String::from_utf8(response.body().clone().unwrap()).unwrap();
    assert!(body.contains("\"bad_request\"") && body.contains("after"), "{body}");
    let plain = notifier.get("/ws").await;
    assert_eq!(plain.status(), 400);
    assert_eq!(plain.json::<serde_json::Value>().await.unwrap()["error"]["code"], "bad_request");
    notifier.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_closed_with_1013_and_resumes_without_loss() {
    let mut log = Log::start().await;
    let feed = FeedLimits { events: 32, bytes: usize::MAX };
    let notifier = log.notifier_with(Limits { feed, ..Limits::default() }).await;
    let mut idle = plain(&notifier, "").await;
    let mut reader = plain(&notifier, "?after=0").await;
    let padding = "x".repeat(64 * 1024);
    for n in 1..=200u64 {
        let seq = log.append(&samples::system("watchdog", json!({"padding": padding, "n": n}))).await;
        assert!(next(&mut reader).await.unwrap().starts_with(&format!("{{\"seq\":{seq},")));
    }
    let mut last = 0;
    let frame = loop {
        match next(&mut idle).await {
            Ok(text) => {
                last += 1;
                assert!(text.starts_with(&format!("{{\"seq\":{last},")));
            }
            Err(frame) => break frame,
        }
    };
    assert_eq!(u16::from(frame.code), 1013);
    assert_eq!(frame.reason.as_str(), format!("too slow, resume after {last}"));
    let mut resumed = plain(&notifier, &format!("?after={last}")).await;
    for seq in last + 1..=200 {
        assert!(next(&mut resumed).await.unwrap().starts_with(&format!("{{\"seq\":{seq},")));
    }
    notifier.stop().await;
}

#[tokio::test]
async fn at_shutdown_sockets_are_closed_with_1001() {
    let mut log = Log::start().await;
    let notifier = log.notifier().await;
    let mut socket = plain(&notifier, "").await;
    let seq = log.append(&samples::submitted("e1", None)).await;
    next(&mut socket).await.unwrap();
    notifier.shut_down();
    let frame = next(&mut socket).await.unwrap_err();
    assert_eq!(u16::from(frame.code), 1001);
    assert!(frame.reason.as_str().ends_with(&format!("resume after {seq}")), "{}", frame.reason);
    notifier.stop().await;
}
