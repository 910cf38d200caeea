//! Ten thousand endpoints of which a thousand hang, over real connections, with the settings that nobody changed.
//!
//! It measures times, so it is a test binary of its own, with nothing else in it: cargo runs one after the other.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use health_prober::detector::Cause;
use health_prober::probe::scheduler::{Bounds, Report, Scheduler, raise_file_limit};
use health_prober::probe::{Found, LATE_MAX, Prober, Roots, Target};
use rollcall_control::{Guard, Trust};
use rollcall_core::wire::Endpoint;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const INTERVAL: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(3);
const ENDPOINTS: u32 = 10_000;
const HANGING: u32 = 1000;
/// So many of them are on one host, and half of those hang: far more than it has places.
const CROWD: u32 = 800;
const HOSTS: u32 = 100;

/// Requests that a host has and did not answer. Never more than are in flight: one is counted when it has arrived, and
/// counted out before its answer is sent, or when the prober reports that there was none.
#[derive(Default)]
struct Load {
    now: AtomicI64,
    most: AtomicI64,
}

impl Load {
    fn add(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
    }

    fn sub(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }

    fn most(&self) -> usize {
        usize::try_from(self.most.load(Ordering::SeqCst)).unwrap()
    }
}

/// Answers on every loopback address; what asks for `/hang` is never answered.
#[derive(Clone)]
struct Hosts {
    port: u16,
    all: Arc<Load>,
    each: Arc<HashMap<IpAddr, Load>>,
}

fn host(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 1, u8::try_from(number).unwrap()))
}

impl Hosts {
    /// On a thread of their own: how busy the prober is must not make them slow.
    fn start() -> Self {
        let each: HashMap<IpAddr, Load> = (0..HOSTS).map(|n| (host(n), Load::default())).collect();
        let (all, each) = (Arc::<Load>::default(), Arc::new(each));
        let (sender, port) = std::sync::mpsc::channel();
        let (loads, of_all) = (Arc::clone(&each), Arc::clone(&all));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(async {
                let socket = TcpSocket::new_v4().unwrap();
                socket.bind("0.0.0.0:0".parse().unwrap()).unwrap();
                // A short queue drops connections where this thread gets no turn for a moment.
                let listener = socket.listen(4096).unwrap();
                sender.send(listener.local_addr().unwrap().port()).unwrap();
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, Arc::clone(&of_all), Arc::clone(&loads)));
                }
            });
        });
        Self { port: port.recv().unwrap(), all, each }
    }

    fn url(&self, scheme: &str, number: u32, path: &str) -> String {
        format!("{scheme}://{}:{}{path}", host(number), self.port)
    }

    /// The prober has given up on a request to this host.
    fn given_up(&self, number: u32) {
        self.all.sub();
        self.each[&host(number)].sub();
    }
}

async fn serve(mut stream: TcpStream, all: Arc<Load>, each: Arc<HashMap<IpAddr, Load>>) {
    let Ok(Some(load)) = stream.local_addr().map(|at| each.get(&at.ip())) else { return };
    let mut buffer = [0; 1024];
    // A request of a probe fits one segment; a TCP probe sends nothing.
    while let Ok(read) = stream.read(&mut buffer).await
        && read > 0
    {
        all.add();
        load.add();
        if buffer.starts_with(b"GET /hang") {
            // Until the prober closes it.
            let _ = stream.read(&mut buffer).await;
            return;
        }
        load.sub();
        all.sub();
        if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine").await.is_err() {
            return;
        }
    }
}

/// What is watched.
struct Watched {
    target: Target,
    host: u32,
    hangs: bool,
}

impl Watched {
    fn new(hosts: &Hosts, index: u32) -> Self {
        // Those on the crowded host come first and every second of them hangs; so does every fifteenth of the others.
        let (host, hangs) = match index {
            0..CROWD => (0, index.is_multiple_of(2)),
            _ => (
                1 + index % (HOSTS - 1),
                index.is_multiple_of(15) && index < CROWD + 15 * (HANGING - CROWD / 2),
            ),
        };
        let (kind, url) = match index % 10 {
            _ if hangs => ("http", hosts.url("http", host, &format!("/hang/{index}"))),
            9 => ("tcp", hosts.url("tcp", host, "")),
            _ => ("http", hosts.url("http", host, &format!("/agent/{index}"))),
        };
        let target = Target {
            agent_id: "a".parse().unwrap(),
            instance_id: "i".parse().unwrap(),
            endpoint: Endpoint { kind: kind.to_owned(), url },
            trust: Trust::Agent,
        };
        Self { target, host, hangs }
    }

    /// Whether this says anything: what a machine that stalls finds is void, and held against nobody.
    fn check(&self, found: &Found, took: Duration) -> bool {
        let target = &self.target;
        match found {
            Found::Void(_) if took >= TIMEOUT + LATE_MAX => return false,
            Found::Bad(Cause::Timeout, _) if self.hangs => {
                assert!(took >= TIMEOUT, "{target:?} took {took:?}")
            }
            found => assert!(!self.hangs && *found == Found::Good, "{target:?}: {found:?}"),
        }
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_endpoints_of_which_a_thousand_hang_are_swept_within_one_interval() {
    // Both ends of every connection are open here.
    let bounds = Bounds::within(raise_file_limit().unwrap() / 2);
    let hosts = Hosts::start();
    let guard = Guard::new(vec!["127.0.0.0/8".parse().unwrap()]);
    let prober = Prober::new(guard, Roots::of_this_machine(), None, TIMEOUT);
    let all: Arc<Vec<_>> = Arc::new((0..ENDPOINTS).map(|index| Watched::new(&hosts, index)).collect());
    assert_eq!(all.iter().filter(|watched| watched.hangs).count(), 1000);
    let scheduler = Scheduler::new(INTERVAL, bounds);
    let started = Instant::now();
    for (index, watched) in (0..).zip(all.iter()) {
        scheduler.watch(index, watched.target.clone());
    }
    let (sender, mut reports) = mpsc::channel(64);
    let stop = CancellationToken::new();
    let (these, load) = (Arc::clone(&all), hosts.clone());
    let running = tokio::spawn(scheduler.run(prober, stop.clone(), move |report: Report| {
        let watched = &these[report.index as usize];
        if watched.hangs {
            load.given_up(watched.host);
        }
        let sender = sender.clone();
        async move {
            let _ = sender.send(report).await;
        }
    }));
    let (mut swept, mut void, mut latencies) = (HashMap::new(), 0, Vec::new());
    while swept.len() < all.len() {
        let left = INTERVAL.saturating_sub(started.elapsed());
        let report = tokio::time::timeout(left, reports.recv()).await;
        let Ok(report) = report else { panic!("only {} were swept within one interval", swept.len()) };
        let Report { index, found, took, .. } = report.unwrap();
        let watched = &all[index as usize];
        void += u32::from(!watched.check(&found, took));
        if !watched.hangs {
            latencies.push(took);
        }
        let after = *swept.entry(index).or_insert_with(|| started.elapsed());
        // All begin within two thirds of the interval, and where no place is wanting nobody waits for one that hangs.
        let planned = INTERVAL * 2 / 3 + Duration::from_secs(1) + TIMEOUT;
        assert!(
            watched.hangs || watched.host == 0 || after < planned,
            "{:?} after {after:?}",
            watched.target
        );
    }
    stop.cancel();
    running.await.unwrap();
    assert!(void < ENDPOINTS / 10, "{void} times this machine was too slow to tell");
    latencies.sort();
    let slow = latencies[latencies.len() * 9 / 10];
    assert!(slow < TIMEOUT / 2, "every tenth that is well took {slow:?}, from where on it is called slow");
    assert!(hosts.all.most() <= bounds.total, "{} in flight at once", hosts.all.most());
    let busiest = hosts.each.values().map(Load::most).max().unwrap();
    assert!(busiest <= bounds.per_host, "{busiest} in flight at once to one host");
    assert!(busiest > bounds.per_host / 2, "the crowded host had {busiest} at once: not crowded");
}
