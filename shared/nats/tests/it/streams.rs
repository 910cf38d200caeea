use bytes::Bytes;
use rollcall_nats::testing::NatsServer;
use rollcall_nats::{Bus, EnsureStreamsError, ensure_streams};
use serde_json::{Value, json};

use crate::{DEADLINE, fleet, soon};

async fn js(bus: &Bus, subject: &str, body: Value) -> Value {
    let answer =
        bus.request(format!("$JS.API.{subject}"), Bytes::from(body.to_string()), DEADLINE).await.unwrap();
    serde_json::from_slice(&answer.payload).unwrap()
}

#[tokio::test]
async fn they_are_what_the_protocol_says_and_making_them_again_changes_nothing() {
    let (_server, bus, _log) = fleet().await;
    let before = js(&bus, "STREAM.INFO.T_EVENTS", json!({})).await;
    ensure_streams(&bus).await.unwrap();
    let after = js(&bus, "STREAM.INFO.T_EVENTS", json!({})).await;
    assert_eq!(before["config"], after["config"]);
    assert_eq!(before["created"], after["created"]);
    let events = &after["config"];
    assert_eq!(events["subjects"], json!(["t.event.>"]));
    assert_eq!((&events["discard"], &events["storage"]), (&json!("new"), &json!("file")));
    assert_eq!((&events["deny_delete"], &events["deny_purge"]), (&json!(true), &json!(true)));
    let reports = js(&bus, "STREAM.INFO.T_REPORTS", json!({})).await;
    assert_eq!(reports["config"]["retention"], json!("workqueue"));
    assert_eq!(reports["config"]["subjects"], json!(["t.report.*.*"]));
    let payloads = js(&bus, "STREAM.INFO.T_PAYLOADS", json!({})).await;
    assert_eq!(payloads["config"]["subjects"], json!(["t.payload.*.*.*"]));
}

#[tokio::test]
async fn several_may_create_them_at_once() {
    let server = NatsServer::start().unwrap();
    let mut creators = Vec::new();
    for _ in 0..8 {
        let bus = server.bus("fleet-a").await;
        creators.push(tokio::spawn(async move { ensure_streams(&bus).await }));
    }
    for creator in creators {
        soon(creator).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_stream_with_other_settings_is_an_error_that_names_each_of_them_and_is_left_alone() {
    let server = NatsServer::start().unwrap();
    let bus = server.bus("t").await;
    let odd = json!({
        "name": "T_EVENTS", "subjects": ["t.event.>", "t.more"], "retention": "limits", "storage": "memory",
        "discard": "new", "max_age": 3_600_000_000_000_u64, "max_msg_size": 1_048_576, "deny_delete": true,
        "num_replicas": 1, "max_bytes": 1_000_000,
    });
    js(&bus, "STREAM.CREATE.T_EVENTS", odd).await;
    let before = js(&bus, "STREAM.INFO.T_EVENTS", json!({})).await;
    let error = ensure_streams(&bus).await.unwrap_err();
    let EnsureStreamsError::Drifted { stream, fields } = &error else { panic!("{error}") };
    assert_eq!(stream, "T_EVENTS");
    let names: Vec<_> = fields.iter().map(|drift| drift.field).collect();
    // max_bytes is the operator's business.
    assert_eq!(names, ["subjects", "storage", "max_age", "deny_purge"]);
    let text = error.to_string();
    assert!(text.contains(r#"storage: wanted "file", found "memory""#), "{text}");
    assert!(text.contains("deny_purge: wanted true, found false"), "{text}");
    assert_eq!(js(&bus, "STREAM.INFO.T_EVENTS", json!({})).await["config"], before["config"]);
}

#[tokio::test]
async fn a_server_without_jetstream_is_named() {
    let server =
        NatsServer::start_with(Some("accounts { A { users: [{user: a, password: a}] } }\nno_auth_user: a\n"))
            .unwrap();
    let bus = server.bus("t").await;
    let error = ensure_streams(&bus).await.unwrap_err();
    assert!(matches!(error, EnsureStreamsError::NoJetStream(_)), "{error}");
}
