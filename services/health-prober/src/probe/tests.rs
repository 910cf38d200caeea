use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::*;
use rollcall_control::Guard;

mod server;
mod sweep;

use server::Server;

/// Answers one name with one list of addresses after the other; the last one stays.
struct Scripted(Mutex<VecDeque<Vec<SocketAddr>>>);

impl Resolve for Scripted {
    fn resolve<'a>(&'a self, host: &'a str, _: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        let mut script = self.0.lock().unwrap();
        let answer = if script.len() > 1 { script.pop_front() } else { script.front().cloned() };
        let answer = answer.ok_or_else(|| io::Error::other(format!("no such name {host}")));
        Box::pin(std::future::ready(answer))
    }
}

fn prober_allowing(ranges: &[&str]) -> Prober {
    let guard = Guard::new(ranges.iter().map(|range| range.parse().unwrap()).collect());
    Prober::new(guard, None, Duration::from_secs(5))
}

/// May probe this machine.
fn prober() -> Prober {
    prober_allowing(&["127.0.0.0/8", "::1/128"])
}

fn resolving(mut prober: Prober, script: &[&[SocketAddr]]) -> Prober {
    prober.resolver = Arc::new(Scripted(Mutex::new(script.iter().map(|one| one.to_vec()).collect())));
    prober
}

fn target(kind: &str, url: &str) -> Target {
    Target {
        agent_id: "a".parse().unwrap(),
        instance_id: "i".parse().unwrap(),
        endpoint: Endpoint { kind: kind.to_owned(), url: url.to_owned() },
        trust: Trust::Agent,
    }
}

async fn probe(prober: &Prober, kind: &str, url: &str) -> Found {
    prober.probe(&target(kind, url), &mut Warm::default()).await.0
}

fn cause(found: &Found) -> Option<Cause> {
    match found {
        Found::Bad(cause, _) => Some(*cause),
        Found::Good | Found::Void(_) | Found::Skipped(_) => None,
    }
}

#[track_caller]
fn assert_refused(found: &Found, what: &str) {
    assert!(matches!(found, Found::Skipped(why) if why.starts_with("refused: ")), "{what}: {found:?}");
}

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

#[tokio::test]
async fn causes_are_told_apart() {
    let mut prober = prober();
    prober.timeout = Duration::from_millis(300);
    let refused = format!("http://127.0.0.1:{}/", server::closed_port().await);
    assert_eq!(cause(&probe(&prober, "http", &refused).await), Some(Cause::Refused));
    assert_eq!(cause(&probe(&prober, "tcp", &refused.replace("http", "tcp")).await), Some(Cause::Refused));

    let closing = Server::closing().await;
    assert_eq!(cause(&probe(&prober, "http", &closing.url("/")).await), Some(Cause::Reset));

    let hanging = Server::hanging().await;
    let started = Instant::now();
    assert_eq!(cause(&probe(&prober, "http", &hanging.url("/")).await), Some(Cause::Timeout));
    assert!(started.elapsed() < Duration::from_secs(3));

    let other = Server::answering(|_| b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()).await;
    assert_eq!(cause(&probe(&prober, "http", &other.url("/")).await), Some(Cause::Protocol));

    let plain = Server::answering(|_| server::plain("400 Bad Request", "")).await;
    let secure = plain.url("/").replace("http:", "https:");
    assert_eq!(cause(&probe(&prober, "http", &secure).await), Some(Cause::Tls));

    let nowhere = resolving(prober, &[]);
    assert_eq!(cause(&probe(&nowhere, "http", "http://nowhere.test/").await), Some(Cause::Dns));
}

#[tokio::test]
async fn what_is_no_endpoint_is_not_probed_and_says_so() {
    for (kind, url, says) in [
        ("stdio", "", "stdio"),
        ("mcp", "stdio:/usr/bin/thing", "stdio"),
        ("acp", "acp://", "placeholder"),
        ("http", "", "empty"),
        ("http", "http://", "placeholder"),
        ("http", "ftp://h/", "scheme"),
        ("http", "http://user:pass@127.0.0.1/", "user or password"),
        ("http", "not a url", "can't be read"),
        ("carrier-pigeon", "http://127.0.0.1/", "not known"),
        ("tcp", "127.0.0.1", "names no port"),
        ("nats", "", "no bus"),
    ] {
        match probe(&prober(), kind, url).await {
            Found::Skipped(why) => assert!(why.contains(says), "{kind} {url:?}: {why}"),
            other => panic!("{kind} {url:?}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn literal_addresses_are_checked_in_every_spelling() {
    let server = Server::answering(|_| server::plain("200 OK", "")).await;
    let port = server.port();
    let strict = prober_allowing(&[]);
    for host in [
        "127.0.0.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "0.0.0.0",
    ] {
        assert_refused(&probe(&strict, "http", &format!("http://{host}:{port}/")).await, host);
    }
    // Other schemes don't read addresses: what the resolver makes of such a name is checked instead.
    for host in ["127.0.0.1", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "localhost"] {
        for (kind, url) in
            [("tcp", format!("tcp://{host}:{port}")), ("grpc", format!("grpc://{host}:{port}"))]
        {
            let found = probe(&strict, kind, &url).await;
            assert!(
                matches!(found, Found::Skipped(_)) || cause(&found) == Some(Cause::Dns),
                "{url}: {found:?}"
            );
        }
    }
    assert_eq!(server.connections(), 0, "nobody was connected to");
    // Allowed ranges are for plain addresses of theirs only.
    assert_eq!(probe(&prober(), "http", &format!("http://127.0.0.1:{port}/")).await, Found::Good);
    assert_refused(&probe(&prober(), "http", &format!("http://[::ffff:127.0.0.1]:{port}/")).await, "mapped");
}

#[tokio::test]
async fn names_are_checked_by_what_they_resolve_to() {
    let server = Server::answering(|_| server::plain("200 OK", "")).await;
    let at = |address: &str| SocketAddr::new(address.parse().unwrap(), server.port());
    for address in ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
    {
        let prober = resolving(prober_allowing(&[]), &[&[at(address)]]);
        assert_refused(&probe(&prober, "http", "http://inside.test/").await, address);
    }
    assert_eq!(server.connections(), 0);
    // One good address among bad ones: only the good one is connected to.
    let mixed = [at("169.254.169.254"), at("::ffff:127.0.0.1"), at("127.0.0.1")];
    let prober = resolving(prober(), &[&mixed]);
    assert_eq!(probe(&prober, "http", "http://mixed.test/").await, Found::Good);
}

#[tokio::test]
async fn a_name_that_is_rebound_is_checked_again_at_every_connect() {
    let inside = Server::answering(|_| server::plain("200 OK", "")).await;
    let outside = Server::answering(|_| server::closing_after("200 OK")).await;
    // 127.0.0.1 plays the public address here, ::1 the private one.
    let script: [&[SocketAddr]; 2] = [
        &[SocketAddr::new("127.0.0.1".parse().unwrap(), outside.port())],
        &[SocketAddr::new("127.0.0.2".parse().unwrap(), inside.port())],
    ];
    let prober = resolving(prober_allowing(&["127.0.0.1/32"]), &script);
    let mut warm = Warm::default();
    let target = target("http", "http://rebinding.test/");
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    assert_refused(&prober.probe(&target, &mut warm).await.0, "rebound");
    assert_eq!(inside.connections(), 0);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let inside = Server::answering(|_| server::plain("200 OK", "")).await;
    let location = inside.url("/secret");
    let outside = Server::answering(move |_| {
        format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n").into_bytes()
    })
    .await;
    for kind in ["http", "acp", "a2a", "mcp"] {
        let found = probe(&prober(), kind, &outside.url("/")).await;
        assert_eq!(cause(&found), Some(Cause::Status), "{kind}: {found:?}");
    }
    assert_eq!(inside.connections(), 0);
}

#[tokio::test]
async fn operators_may_mean_private_addresses() {
    let server = Server::answering(|_| server::plain("200 OK", "")).await;
    let strict = prober_allowing(&[]);
    let mut target = target("http", &server.url("/"));
    target.trust = Trust::Operator;
    assert_eq!(strict.probe(&target, &mut Warm::default()).await.0, Found::Good);
    target.endpoint.url = "http://169.254.169.254/latest/meta-data/".to_owned();
    assert_refused(&strict.probe(&target, &mut Warm::default()).await.0, "metadata");
}

#[tokio::test]
async fn a_warm_connection_is_used_again_and_a_closed_one_replaced() {
    let closes = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&closes);
    let server = Server::answering(move |_| match seen.fetch_add(1, Ordering::SeqCst) {
        2 => server::closing_after("200 OK"),
        _ => server::plain("200 OK", "fine"),
    })
    .await;
    let (prober, target, mut warm) = (prober(), target("http", &server.url("/")), Warm::default());
    for _ in 0..3 {
        assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    }
    assert_eq!(server.connections(), 1, "kept");
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    assert_eq!(server.connections(), 2, "closed by the server, opened again");
}

#[tokio::test]
async fn an_endless_answer_is_cut() {
    let server = Server::answering(|_| {
        let mut answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n".to_vec();
        answer.resize(1_000_000, b'x');
        answer
    })
    .await;
    assert_eq!(probe(&prober(), "http", &server.url("/")).await, Found::Good);
    assert_eq!(cause(&probe(&prober(), "a2a", &server.url("/")).await), Some(Cause::Protocol));
}

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

#[tokio::test]
async fn a_timeout_that_is_noticed_late_is_our_own_fault() {
    let hanging = Server::hanging().await;
    let mut prober = prober();
    prober.timeout = Duration::from_millis(100);
    let target = target("http", &hanging.url("/"));
    let probing = tokio::spawn(async move { prober.probe(&target, &mut Warm::default()).await.0 });
    while hanging.connections() == 0 {
        tokio::task::yield_now().await;
    }
    // This test has one thread: while it sleeps nothing turns, as on a machine that stalls.
    std::thread::sleep(Duration::from_millis(100) + LATE_MAX);
    let found = probing.await.unwrap();
    assert!(matches!(found, Found::Void(_)), "{found:?}");
}
