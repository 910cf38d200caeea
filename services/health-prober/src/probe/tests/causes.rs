//! What is wrong is told apart, by every kind of probe.

use super::*;

#[tokio::test]
async fn http_statuses_are_told_apart() {
    for (status, wanted) in [
        ("200 OK", None),
        ("204 No Content", None),
        ("401 Unauthorized", Some(Cause::Auth)),
        ("403 Forbidden", Some(Cause::Auth)),
        ("404 Not Found", Some(Cause::Status)),
        ("500 Internal Server Error", Some(Cause::Status)),
    ] {
        let server = Server::answering(move |_| server::plain(status, "")).await;
        let found = probe(&prober(), "http", &server.url("/health?x=1")).await;
        assert_eq!(cause(&found), wanted, "{status}: {found:?}");
        assert_eq!(found == Found::Good, wanted.is_none(), "{status}: {found:?}");
        assert!(server.requests()[0].starts_with("GET /health?x=1 HTTP/1.1"));
    }
}

/// A kind of probe and the schemes of its URLs, plain and over TLS.
const KINDS: [(&str, &str, &str); 5] = [
    ("http", "http", "https"),
    ("acp", "http", "https"),
    ("a2a", "http", "https"),
    ("mcp", "http", "https"),
    ("grpc", "grpc", "grpcs"),
];

#[tokio::test]
async fn causes_are_told_apart_by_every_kind() {
    let mut brief = prober();
    brief.timeout = Duration::from_millis(300);
    let (closed, closing, hanging) =
        (server::ClosedPort::new(), Server::closing().await, Server::hanging().await);
    let plain = Server::answering(|_| server::plain("400 Bad Request", "")).await;
    for (kind, scheme, secure) in KINDS {
        let at = |scheme: &str, port: u16| format!("{scheme}://127.0.0.1:{port}/");
        for (prober, url, wanted) in [
            (&prober(), at(scheme, closed.number()), Cause::Refused),
            (&prober(), at(secure, closed.number()), Cause::Refused),
            (&prober(), at(scheme, closing.port()), Cause::Reset),
            (&prober(), at(secure, closing.port()), Cause::Reset),
            (&brief, at(scheme, hanging.port()), Cause::Timeout),
            (&brief, at(secure, hanging.port()), Cause::Timeout),
            (&prober(), at(secure, plain.port()), Cause::Tls),
        ] {
            let found = probe(prober, kind, &url).await;
            assert_eq!(cause(&found), Some(wanted), "{kind} {url}: {found:?}");
        }
    }
    let url = format!("tcp://127.0.0.1:{}", closed.number());
    assert_eq!(cause(&probe(&prober(), "tcp", &url).await), Some(Cause::Refused));
}

#[tokio::test]
async fn statuses_are_told_apart_by_every_kind() {
    for (status, wanted) in [
        ("401 Unauthorized", Cause::Auth),
        ("403 Forbidden", Cause::Auth),
        ("307 Temporary Redirect", Cause::Status),
        ("404 Not Found", Cause::Status),
        ("429 Too Many Requests", Cause::Status),
        ("500 Internal Server Error", Cause::Status),
        ("503 Service Unavailable", Cause::Status),
    ] {
        let server = Server::answering(move |_| server::plain(status, "")).await;
        for kind in ["http", "acp", "a2a", "mcp"] {
            let found = probe(&prober(), kind, &server.url("/")).await;
            assert_eq!(cause(&found), Some(wanted), "{kind} {status}: {found:?}");
        }
    }
    // Something before a gRPC server that speaks HTTP/2 and answers itself.
    for (status, wanted) in [
        (401, Cause::Auth),
        (403, Cause::Auth),
        (404, Cause::Protocol),
        (429, Cause::Status),
        (500, Cause::Protocol),
        (502, Cause::Status),
        (503, Cause::Status),
        (504, Cause::Status),
    ] {
        let port = server::http2(status).await;
        let found = probe(&prober(), "grpc", &format!("grpc://127.0.0.1:{port}/")).await;
        assert_eq!(cause(&found), Some(wanted), "{status}: {found:?}");
    }
}

#[tokio::test]
async fn who_speaks_something_else_is_protocol_or_tls() {
    let prober = prober();
    let other = Server::answering(|_| b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()).await;
    assert_eq!(cause(&probe(&prober, "http", &other.url("/")).await), Some(Cause::Protocol));

    let plain = Server::answering(|_| server::plain("400 Bad Request", "")).await;
    let secure = plain.url("/").replace("http:", "https:");
    assert_eq!(cause(&probe(&prober, "http", &secure).await), Some(Cause::Tls));
}
