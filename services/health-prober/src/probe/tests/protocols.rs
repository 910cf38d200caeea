//! What is asked of whom, and how answers are understood.

use serde_json::json;

use super::*;

#[tokio::test]
async fn acp_and_a2a_ask_where_their_protocols_say() {
    let acp = Server::answering(|_| server::plain("200 OK", "{}")).await;
    assert_eq!(probe(&prober(), "acp", &acp.url("/base/")).await, Found::Good);
    assert!(acp.requests()[0].starts_with("GET /base/ping "));

    let new = Server::answering(|request| match request.contains("agent-card.json") {
        true => server::plain("200 OK", r#"{"name":"x","version":"1"}"#),
        false => server::plain("404 Not Found", ""),
    })
    .await;
    assert_eq!(probe(&prober(), "a2a", &new.url("/rpc")).await, Found::Good);
    let old = Server::answering(|request| match request.contains("/.well-known/agent.json") {
        true => server::plain("200 OK", r#"{"name":"x"}"#),
        false => server::plain("404 Not Found", ""),
    })
    .await;
    let (prober, target, mut warm) = (prober(), target("a2a", &old.url("/")), Warm::default());
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    assert_eq!(old.requests().len(), 3, "which path it has is remembered");
    let other = Server::answering(|_| server::plain("200 OK", "<html>")).await;
    assert_eq!(
        cause(&prober.probe(&self::target("a2a", &other.url("/")), &mut Warm::default()).await.0),
        Some(Cause::Protocol)
    );
}

#[tokio::test]
async fn mcp_new_servers_discover() {
    for stream in [false, true] {
        let server = Server::answering(move |request| {
            let body =
                json!({ "jsonrpc": "2.0", "id": "probe", "result": { "supportedVersions": ["2026-07-28"] } });
            assert!(request.contains("server/discover"), "{request}");
            match stream {
                true => server::events(&body.to_string()),
                false => server::json(&body.to_string()),
            }
        })
        .await;
        assert_eq!(probe(&prober(), "mcp", &server.url("/mcp")).await, Found::Good);
        let asked = &server.requests()[0];
        assert!(asked.contains("mcp-protocol-version: 2026-07-28"), "{asked}");
        assert!(asked.contains("mcp-method: server/discover"), "{asked}");
    }
}

#[tokio::test]
async fn mcp_old_servers_initialize_ping_and_are_left_without_a_session() {
    let server = Server::answering(|request| {
        let reply = |body: serde_json::Value| server::json(&body.to_string());
        if request.starts_with("DELETE ") {
            return server::plain("200 OK", "");
        }
        if request.contains("server/discover") {
            let error = json!({ "code": -32601, "message": "no such method" });
            return reply(json!({ "jsonrpc": "2.0", "id": "probe", "error": error }));
        }
        if request.contains("\"initialize\"") {
            let body = json!({ "jsonrpc": "2.0", "id": 1, "result": { "protocolVersion": "2025-06-18" } }).to_string();
            return format!(
                "HTTP/1.1 200 OK\r\nMcp-Session-Id: s-1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .into_bytes();
        }
        assert!(request.contains("mcp-session-id: s-1"), "{request}");
        if request.contains("notifications/initialized") {
            return server::plain("202 Accepted", "");
        }
        assert!(request.contains("\"ping\""), "{request}");
        reply(json!({ "jsonrpc": "2.0", "id": 2, "result": {} }))
    })
    .await;
    let (prober, target, mut warm) = (prober(), target("mcp", &server.url("/mcp")), Warm::default());
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    let count = |what: &str| server.requests().iter().filter(|request| request.contains(what)).count();
    assert_eq!((count("\"initialize\""), count("DELETE ")), (2, 2), "every session is closed");
    assert_eq!(count("server/discover"), 1, "what it speaks is remembered");
}

#[tokio::test]
async fn grpc_health_is_asked_and_understood() {
    for (status, serving, wanted) in [
        ("0", Some(1), None),
        ("0", Some(2), Some(Cause::Status)),
        ("0", None, Some(Cause::Protocol)),
        ("16", None, Some(Cause::Auth)),
        ("12", None, Some(Cause::Protocol)),
        ("14", None, Some(Cause::Status)),
    ] {
        let port = server::grpc(status, serving).await;
        let found = probe(&prober(), "grpc", &format!("grpc://127.0.0.1:{port}/my.Service")).await;
        assert_eq!(cause(&found), wanted, "grpc-status {status}, serving {serving:?}: {found:?}");
        assert_eq!(found == Found::Good, wanted.is_none(), "{found:?}");
    }
    let web = Server::answering(|_| server::plain("200 OK", "")).await;
    let found = probe(&prober(), "grpc", &web.url("/")).await;
    assert!(matches!(cause(&found), Some(Cause::Protocol | Cause::Reset)), "{found:?}");
}
