//! What is asked of whom, and how answers are understood.

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
async fn grpc_health_is_asked_and_understood() {
    for (status, serving, wanted) in [
        ("0", Some(1), None),
        ("0", Some(2), Some(Cause::Status)),
        ("0", None, Some(Cause::Protocol)),
        ("16", None, Some(Cause::Auth)),
        ("12", None, Some(Cause::Protocol)),
        ("7", None, Some(Cause::Auth)),
        ("5", None, Some(Cause::Protocol)),
        ("14", None, Some(Cause::Status)),
        ("0", Some(0), Some(Cause::Status)),
        ("0", Some(3), Some(Cause::Status)),
    ] {
        let port = server::grpc(status, serving).await;
        let found = probe(&prober(), "grpc", &format!("grpc://127.0.0.1:{port}/my.Service")).await;
        assert_eq!(cause(&found), wanted, "grpc-status {status}, serving {serving:?}: {found:?}");
        assert_eq!(found == Found::Good, wanted.is_none(), "{found:?}");
    }
    for (status, wanted) in [
        ("0", Cause::Protocol),
        ("7", Cause::Auth),
        ("16", Cause::Auth),
        ("12", Cause::Protocol),
        ("14", Cause::Status),
    ] {
        let port = server::grpc_without_message(status).await;
        let found = probe(&prober(), "grpc", &format!("grpc://127.0.0.1:{port}/")).await;
        assert_eq!(cause(&found), Some(wanted), "grpc-status {status} in the headers: {found:?}");
    }
    let web = Server::answering(|_| server::plain("200 OK", "")).await;
    let found = probe(&prober(), "grpc", &web.url("/")).await;
    assert!(matches!(cause(&found), Some(Cause::Protocol | Cause::Reset)), "{found:?}");
}
