use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_rustls::rustls::RootCertStore;

use super::*;

mod bus;
mod causes;
mod guarded;
mod mcp;
mod protocols;
mod server;
mod tls;

use server::Server;

/// Answers one name with one list of addresses after the other; the last one stays. Without any, no name resolves.
struct Scripted(Mutex<VecDeque<Vec<SocketAddr>>>);

impl Resolve for Scripted {
    fn resolve<'a>(&'a self, _: &'a str, _: u16) -> BoxFuture<'a, Result<Vec<SocketAddr>, ResolveError>> {
        let mut script = self.0.lock().unwrap();
        let answer = if script.len() > 1 { script.pop_front() } else { script.front().cloned() };
        let answer = answer.ok_or_else(|| ResolveError::Failed("no such name".to_owned()));
        Box::pin(std::future::ready(answer))
    }
}

/// A name server that never answers.
struct Silent;

impl Resolve for Silent {
    fn resolve<'a>(&'a self, _: &'a str, _: u16) -> BoxFuture<'a, Result<Vec<SocketAddr>, ResolveError>> {
        Box::pin(std::future::pending())
    }
}

/// Our own limit is reached.
struct Busy;

impl Resolve for Busy {
    fn resolve<'a>(&'a self, _: &'a str, _: u16) -> BoxFuture<'a, Result<Vec<SocketAddr>, ResolveError>> {
        Box::pin(std::future::ready(Err(ResolveError::Busy)))
    }
}

fn prober_allowing(ranges: &[&str]) -> Prober {
    let guard = Guard::new(ranges.iter().map(|range| range.parse().unwrap()).collect());
    Prober::new(guard, Roots::only(RootCertStore::empty()), None, Duration::from_secs(5))
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
    probe_target(prober, &target(kind, url)).await
}

/// Times that something is probed when this machine stands still for long enough to be noticed.
const TRIES: usize = 10;

/// Probes, and probes again where this machine stood still meanwhile: that says nothing about what is probed.
async fn probe_target(prober: &Prober, target: &Target) -> Found {
    let mut found = Found::Void(String::new());
    for _ in 0..TRIES {
        found = prober.probe(target, &mut Warm::default()).await.0;
        if !matches!(&found, Found::Void(why) if why == TOO_SLOW) {
            break;
        }
    }
    found
}

fn cause(found: &Found) -> Option<Cause> {
    match found {
        Found::Bad(cause, _) => Some(*cause),
        Found::Good | Found::Void(_) | Found::Skipped(_) => None,
    }
}

#[tokio::test]
async fn an_address_that_swallows_everything_is_a_timeout_and_hides_no_other() {
    let swallowing = server::swallowing().await;
    let well = Server::answering(|_| server::plain("200 OK", "")).await;
    let mut prober = prober();
    prober.timeout = Duration::from_millis(600);
    for (kind, scheme) in [("http", "http"), ("tcp", "tcp"), ("grpc", "grpc")] {
        let found = probe(&prober, kind, &format!("{scheme}://{}/", swallowing.address)).await;
        assert_eq!(cause(&found), Some(Cause::Timeout), "{kind}: {found:?}");
    }
    let here = SocketAddr::new("127.0.0.1".parse().unwrap(), well.port());
    let both = resolving(prober, &[&[swallowing.address, here]]);
    assert_eq!(probe(&both, "http", "http://both.test/").await, Found::Good);
}

#[tokio::test]
async fn what_does_not_resolve_is_dns_and_what_we_could_not_ask_for_is_void() {
    let mut prober = prober();
    prober.timeout = Duration::from_millis(300);
    let (unknown, without) = (resolving(prober.clone(), &[]), resolving(prober.clone(), &[&[]]));
    let (mut silent, mut busy) = (prober.clone(), prober);
    silent.resolver = Arc::new(Silent);
    busy.resolver = Arc::new(Busy);
    for (kind, url) in [
        ("http", "http://nowhere.test/"),
        ("tcp", "tcp://nowhere.test:80"),
        ("acp", "http://nowhere.test/"),
        ("a2a", "http://nowhere.test/"),
        ("mcp", "http://nowhere.test/"),
        ("grpc", "grpc://nowhere.test/"),
    ] {
        for (prober, says) in
            [(&unknown, "no such name"), (&without, "no address"), (&silent, "no answer within 200 ms")]
        {
            match probe(prober, kind, url).await {
                Found::Bad(Cause::Dns, words) => assert!(words.contains(says), "{kind}: {words}"),
                other => panic!("{kind}: {other:?}, not dns: {says}"),
            }
        }
        assert!(matches!(probe(&busy, kind, url).await, Found::Void(_)), "{kind}");
    }
}

/// Too few file handles, no network, or a filter of this machine (EPERM, EACCES): whatever the kind, that is no evidence.
#[tokio::test]
async fn our_own_limits_are_not_held_against_the_agent() {
    for code in [24, 23, 105, 101, 99, 1, 13] {
        let error = std::io::Error::from_raw_os_error(code);
        assert!(matches!(blame(&error, "connect"), Found::Void(_)), "{error}");
    }
    for (code, expected) in [(111, Cause::Refused), (104, Cause::Reset), (110, Cause::Timeout)] {
        assert_eq!(cause(&blame(&std::io::Error::from_raw_os_error(code), "connect")), Some(expected));
    }
    let mut prober = prober();
    prober.resolver = Arc::new(Handleless);
    let found = probe(&prober, "http", "http://agent.test/").await;
    assert!(matches!(found, Found::Void(_)), "{found:?}");
}

/// A packet filter on the way that forbids it and a router that knows no way (EHOSTUNREACH) answer at once: nobody has
/// waited in vain. Which it was is said in words.
#[test]
fn what_a_filter_or_a_router_on_the_way_turns_away_is_refused_and_says_by_what() {
    let error = std::io::Error::from_raw_os_error(113);
    match blame(&error, "connect to 10.0.0.7:80") {
        Found::Bad(Cause::Refused, words) => {
            assert_eq!(words, format!("connect to 10.0.0.7:80: {error}"));
            assert!(words.contains("(os error 113)"), "{words}");
        }
        other => panic!("{error}: {other:?}"),
    }
}

/// Has no file handle left to ask a name server.
struct Handleless;

impl Resolve for Handleless {
    fn resolve<'a>(&'a self, _: &'a str, _: u16) -> BoxFuture<'a, Result<Vec<SocketAddr>, ResolveError>> {
        Box::pin(std::future::ready(Err(ResolveError::Ours("too many open files".to_owned()))))
    }
}

#[tokio::test]
async fn an_address_without_a_way_there_does_not_speak_for_the_others() {
    let port = server::ClosedPort::new();
    let closed = SocketAddr::from(([127, 0, 0, 1], port.number()));
    // Nobody can connect to all at once: there is no network for it.
    let no_way = SocketAddr::from(([127, 255, 255, 255], 9));
    for addresses in [[closed, no_way], [no_way, closed]] {
        let found = probe(&resolving(prober(), &[&addresses]), "http", "http://agent.test/").await;
        assert_eq!(cause(&found), Some(Cause::Refused), "{found:?}");
    }
    let found = probe(&resolving(prober(), &[&[no_way]]), "http", "http://agent.test/").await;
    assert!(matches!(found, Found::Void(_)), "{found:?}");
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
        ("http", "http://user:hunter2@127.0.0.1/", "user or password"),
        ("grpc", "grpc://user:hunter2@not a host/", "can't be read"),
        ("tcp", "user:hunter2@127.0.0.1:1", "user or password"),
        ("http", "not a url", "can't be read"),
        ("carrier-pigeon", "http://127.0.0.1/", "not known"),
        ("tcp", "127.0.0.1", "names no port"),
        ("nats", "", "no bus"),
    ] {
        match probe(&prober(), kind, url).await {
            Found::Skipped(why) => {
                assert!(why.contains(says) && !why.contains("hunter2"), "{kind} {url:?}: {why}");
            }
            other => panic!("{kind} {url:?}: {other:?}"),
        }
    }
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

/// A firewall that has forgotten a connection, or a machine that was cut off: nothing comes back on it.
#[tokio::test]
async fn a_kept_connection_that_says_nothing_does_not_cost_a_probe() {
    let server = Server::answering_once_per_connection(|_| server::plain("200 OK", "fine")).await;
    let (mut prober, target, mut warm) = (prober(), target("http", &server.url("/")), Warm::default());
    prober.timeout = Duration::from_secs(8);
    for connections in 1..=2 {
        let (found, took) = prober.probe(&target, &mut warm).await;
        assert_eq!(found, Found::Good);
        assert!(took < prober.timeout / 2, "it is not slow: {took:?}");
        assert!(warm.is_kept());
        assert_eq!(server.connections(), connections);
    }
}

/// An answer over the kept connection counts also when it takes longer than the time after which a fresh one is tried.
#[tokio::test]
async fn a_kept_connection_that_is_slow_still_counts() {
    let server = Server::answering_first_connection(|_| server::plain("200 OK", "fine")).await;
    let (mut prober, target, mut warm) = (prober(), target("http", &server.url("/")), Warm::default());
    prober.timeout = Duration::from_secs(6);
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    server.hold();
    let probing = tokio::spawn(async move { prober.probe(&target, &mut warm).await.0 });
    server.until(|server| server.connections() == 2).await;
    server.release();
    assert_eq!(probing.await.unwrap(), Found::Good);
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
