//! MCP: servers of every age are found alive, and are left without a session.

use serde_json::{Value, json};

use super::*;

/// Answers as JSON, or in a stream between other messages.
fn reply(id: Value, outcome: Value, streamed: bool) -> Vec<u8> {
    let mut reply = json!({ "jsonrpc": "2.0", "id": id });
    for (name, value) in outcome.as_object().unwrap() {
        reply[name] = value.clone();
    }
    if !streamed {
        return server::json(&reply.to_string());
    }
    let others = [
        json!({ "jsonrpc": "2.0", "method": "notifications/message", "params": { "level": "info" } }),
        json!({ "jsonrpc": "2.0", "method": "roots/list", "id": id }),
        json!({ "jsonrpc": "2.0", "id": "another", "result": { "x": 1 } }),
    ];
    let all: Vec<String> = others.iter().chain([&reply]).map(Value::to_string).collect();
    server::events(&all)
}

/// As [`reply`], and opens a session.
fn opening(answer: &[u8]) -> Vec<u8> {
    let answer = String::from_utf8_lossy(answer);
    answer.replacen("\r\n", "\r\nMcp-Session-Id: s-1\r\n", 1).into_bytes()
}

fn id_of(request: &str) -> Value {
    let body = request.split_once("\r\n\r\n").unwrap().1;
    serde_json::from_str::<Value>(body).unwrap()["id"].clone()
}

fn no_such_method(request: &str) -> Vec<u8> {
    reply(id_of(request), json!({ "error": { "code": -32601, "message": "no such method" } }), false)
}

/// How an old server answers `ping`, and whether in streams.
#[derive(Clone, Copy)]
struct Old {
    ping: fn(&str, bool) -> Vec<u8>,
    streamed: bool,
}

fn well(request: &str, streamed: bool) -> Vec<u8> {
    reply(id_of(request), json!({ "result": {} }), streamed)
}

/// A server that opens a session and wants it to be closed.
async fn old_server(Old { ping, streamed }: Old) -> Server {
    Server::answering(move |request| {
        if request.starts_with("DELETE ") {
            assert!(request.contains("mcp-session-id: s-1"), "{request}");
            return server::plain("200 OK", "");
        }
        if request.contains("server/discover") {
            return no_such_method(request);
        }
        if request.contains("\"initialize\"") {
            let result = json!({ "result": { "protocolVersion": "2025-03-26" } });
            return opening(&reply(id_of(request), result, streamed));
        }
        assert!(request.contains("mcp-session-id: s-1"), "{request}");
        assert!(request.contains("mcp-protocol-version: 2025-03-26"), "{request}");
        if request.contains("notifications/initialized") {
            return server::plain("202 Accepted", "");
        }
        assert!(request.contains("\"ping\""), "{request}");
        ping(request, streamed)
    })
    .await
}

fn count(server: &Server, what: &str) -> usize {
    server.requests().iter().filter(|request| request.contains(what)).count()
}

#[tokio::test]
async fn new_servers_discover() {
    for streamed in [false, true] {
        let server = Server::answering(move |request| {
            assert!(request.contains("server/discover"), "{request}");
            reply(id_of(request), json!({ "result": { "supportedVersions": ["2026-07-28"] } }), streamed)
        })
        .await;
        assert_eq!(probe(&prober(), "mcp", &server.url("/mcp")).await, Found::Good, "streamed {streamed}");
        let asked = &server.requests()[0];
        assert!(asked.contains("mcp-protocol-version: 2026-07-28"), "{asked}");
        assert!(asked.contains("mcp-method: server/discover"), "{asked}");
    }
}

#[tokio::test]
async fn old_servers_initialize_ping_and_are_left_without_a_session() {
    for streamed in [false, true] {
        let server = old_server(Old { ping: well, streamed }).await;
        let (prober, target, mut warm) = (prober(), target("mcp", &server.url("/mcp")), Warm::default());
        assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
        assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
        assert_eq!(
            (count(&server, "\"initialize\""), count(&server, "DELETE ")),
            (2, 2),
            "every session is closed"
        );
        assert_eq!(count(&server, "server/discover"), 1, "what it speaks is remembered");
    }
}

/// It answers `initialize`, and its ping fails or hangs: the session is ended all the same.
#[tokio::test]
async fn no_session_is_left_behind_whatever_becomes_of_the_ping() {
    let fails = old_server(Old { ping: |_, _| server::plain("500 Oops", ""), streamed: false }).await;
    let found = probe(&prober(), "mcp", &fails.url("/mcp")).await;
    assert_eq!(cause(&found), Some(Cause::Status), "{found:?}");
    fails.until(|server| count(server, "DELETE ") == 1).await;
    let hangs = old_server(Old { ping: |_, _| Vec::new(), streamed: false }).await;
    let mut brief = prober();
    brief.timeout = Duration::from_millis(500);
    let (found, took) = brief.probe(&target("mcp", &hangs.url("/mcp")), &mut Warm::default()).await;
    assert!(!matches!(found, Found::Good | Found::Skipped(_)), "{found:?}");
    assert!(took >= brief.timeout, "{took:?}");
    hangs.until(|server| count(server, "\"initialize\"") == count(server, "DELETE ")).await;
    assert_eq!(count(&hangs, "DELETE "), 1);
    // The same when the probe itself is given up, as at a shutdown or when the agent went.
    let given_up = old_server(Old { ping: |_, _| Vec::new(), streamed: false }).await;
    let (prober, target) = (prober(), target("mcp", &given_up.url("/mcp")));
    let probing = tokio::spawn(async move { prober.probe(&target, &mut Warm::default()).await });
    given_up.until(|server| count(server, "\"ping\"") == 1).await;
    probing.abort();
    given_up.until(|server| count(server, "DELETE ") == 1).await;
}

#[tokio::test]
async fn a_session_that_comes_with_a_refusal_is_ended_too() {
    let server = Server::answering(|request| {
        if request.starts_with("DELETE ") {
            return server::plain("405 Method Not Allowed", "");
        }
        if request.contains("server/discover") {
            return opening(&server::plain("400 Bad Request", ""));
        }
        assert!(!request.contains("mcp-session-id"), "{request}");
        match request.contains("\"initialize\"") {
            true => reply(id_of(request), json!({ "result": { "protocolVersion": "2025-06-18" } }), false),
            false if request.contains("\"ping\"") => well(request, false),
            false => server::plain("202 Accepted", ""),
        }
    })
    .await;
    assert_eq!(probe(&prober(), "mcp", &server.url("/mcp")).await, Found::Good);
    assert_eq!(count(&server, "DELETE "), 1);
    assert!(server.requests()[1].starts_with("DELETE "), "{:?}", server.requests());
}

/// Who speaks only versions that we don't name is there.
#[tokio::test]
async fn servers_of_other_versions_are_alive() {
    type Answer = fn(&str) -> Vec<u8>;
    let refusing: [(&str, Answer); 4] = [
        ("a later version, in answer to discover", |request| {
            let data = json!({ "supported": ["2027-01-01"], "requested": "2026-07-28" });
            let error = json!({ "error": { "code": -32022, "message": "no", "data": data } });
            let answer = String::from_utf8(reply(id_of(request), error, false)).unwrap();
            answer.replacen("200 OK", "400 Bad Request", 1).into_bytes()
        }),
        ("an earlier version, in answer to initialize", |request| {
            match request.contains("server/discover") {
                true => no_such_method(request),
                false => {
                    reply(id_of(request), json!({ "result": { "protocolVersion": "2023-01-01" } }), false)
                }
            }
        }),
        ("an error with its versions", |request| match request.contains("server/discover") {
            true => no_such_method(request),
            false => {
                let data = json!({ "supported": ["2023-01-01"], "requested": "2025-06-18" });
                let error = json!({ "code": -32602, "message": "Not supported", "data": data });
                reply(id_of(request), json!({ "error": error }), false)
            }
        }),
        ("an error in words, of nobody's request", |request| match request.contains("server/discover") {
            true => server::plain("404 Not Found", ""),
            false => {
                let error = json!({ "code": -32000, "message": "Bad Request: Unsupported protocol version" });
                let body = json!({ "jsonrpc": "2.0", "id": null, "error": error }).to_string();
                server::plain("400 Bad Request", &body)
            }
        }),
    ];
    for (what, answer) in refusing {
        let server = Server::answering(move |request| {
            assert!(!request.contains("\"ping\""), "{what}: it is asked what it may not know");
            answer(request)
        })
        .await;
        assert_eq!(probe(&prober(), "mcp", &server.url("/mcp")).await, Found::Good, "{what}");
    }
    // Anything else that is wrong with `initialize` stays wrong.
    let wrong = Server::answering(|request| match request.contains("server/discover") {
        true => no_such_method(request),
        false => reply(id_of(request), json!({ "error": { "code": -32603, "message": "database" } }), false),
    })
    .await;
    assert_eq!(cause(&probe(&prober(), "mcp", &wrong.url("/mcp")).await), Some(Cause::Protocol));
}

#[tokio::test]
async fn a_stream_without_an_answer_to_us_is_none() {
    let other = json!({ "jsonrpc": "2.0", "id": "another", "result": {} }).to_string();
    let body = format!("data:\n\ndata: {other}\n\n");
    let ends = Server::answering(move |_| {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length:";
        format!("{head} {}\r\n\r\n{body}", body.len()).into_bytes()
    })
    .await;
    assert_eq!(cause(&probe(&prober(), "mcp", &ends.url("/mcp")).await), Some(Cause::Protocol));
    // One that stays open has the time of the probe, and one that goes on and on is cut.
    let mut brief = prober();
    brief.timeout = Duration::from_millis(300);
    let open = Server::answering(|_| server::events(&[])).await;
    assert_eq!(cause(&probe(&brief, "mcp", &open.url("/mcp")).await), Some(Cause::Timeout));
    let endless = Server::answering(|_| server::events(&vec!["{\"method\":\"x\"}".to_owned(); 10_000])).await;
    assert_eq!(cause(&probe(&prober(), "mcp", &endless.url("/mcp")).await), Some(Cause::Protocol));
}

/// A kept connection that may have broken after the question arrived: asked again, it would open a second session.
#[tokio::test]
async fn initialize_is_not_asked_over_a_kept_connection() {
    let server = Server::answering_once_per_connection(|request| match request.contains("\"initialize\"") {
        true => reply(id_of(request), json!({ "result": { "protocolVersion": "2023-01-01" } }), false),
        false => no_such_method(request),
    })
    .await;
    assert_eq!(probe(&prober(), "mcp", &server.url("/mcp")).await, Found::Good);
    assert_eq!((count(&server, "\"initialize\""), server.connections()), (1, 2));
}
