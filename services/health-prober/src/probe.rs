//! Active probes: one file per kind, and what they have in common.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use rollcall_core::subject::Subjects;
use rollcall_core::wire::Endpoint;
use rollcall_core::{AgentId, InstanceId};
use rollcall_nats::Bus;
use tokio::sync::Semaphore;

use crate::detector::Cause;
use rollcall_control::{Guard, Trust, is_ours};

mod a2a;
mod acp;
mod dial;
mod events;
mod exchange;
mod grpc;
mod http;
mod mcp;
mod nats;
mod resolve;
pub mod scheduler;
mod tcp;
mod tls;

pub use exchange::Warm;
pub use resolve::{Resolve, ResolveError, SystemResolver};
pub use tls::Roots;

use tls::Tls;

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It answered as its protocol says.
    Good,
    /// It is wrong, how, and in words.
    Bad(Cause, String),
    /// Our own fault, not its: no evidence.
    Void(String),
    /// There is nothing to probe, or it may not be probed; why.
    Skipped(String),
}

impl Found {
    fn bad(cause: Cause, words: impl Into<String>) -> Self {
        // Bounded: what an endpoint says of itself ends up in events.
        Self::Bad(cause, words.into().chars().take(WORDS_MAX).collect())
    }
}

/// The kinds that are probed (PROTOCOL.md 2).
pub const KINDS: [&str; 7] = ["http", "tcp", "nats", "acp", "a2a", "mcp", "grpc"];
/// The kind of agents that speak over their standard input and output: nobody else can ask them anything.
pub const STDIO_KIND: &str = "stdio";
/// A timeout that is noticed so much later than it was due is our own fault. As long as a stall of the shell's loop.
pub const LATE_MAX: Duration = Duration::from_millis(250);
/// What is said of such a timeout.
const TOO_SLOW: &str = "we were too slow ourselves";
/// Longest description of a failure, in characters.
const WORDS_MAX: usize = 200;

/// Sessions that are being ended at once beside the probes, which end theirs themselves.
const ENDINGS_MAX: usize = 64;

/// What is probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The agent.
    pub agent_id: AgentId,
    /// Its instance.
    pub instance_id: InstanceId,
    /// Where.
    pub endpoint: Endpoint,
    /// Who named it.
    pub trust: Trust,
}

/// What probes need.
#[derive(Clone)]
pub struct Prober {
    /// Where they may go.
    pub guard: Arc<Guard>,
    /// How names become addresses.
    pub resolver: Arc<dyn Resolve>,
    /// Checks certificates.
    tls: Tls,
    /// For `nats` probes.
    pub bus: Option<(Bus, Subjects)>,
    /// Time one probe may take.
    pub timeout: Duration,
    /// For sessions that a probe could not end itself.
    endings: Arc<Semaphore>,
}

impl Prober {
    /// Probes that resolve names as this machine does.
    #[must_use]
    pub fn new(guard: Guard, roots: Roots, bus: Option<(Bus, Subjects)>, timeout: Duration) -> Self {
        Self {
            guard: Arc::new(guard),
            resolver: Arc::new(SystemResolver::default()),
            tls: Tls::new(roots),
            bus,
            timeout,
            endings: Arc::new(Semaphore::new(ENDINGS_MAX)),
        }
    }

    /// Probes once, over a connection that is still warm if there is one. Never takes longer than its timeout.
    pub async fn probe(&self, target: &Target, warm: &mut Warm) -> (Found, Duration) {
        let started = Instant::now();
        let over = || Found::bad(Cause::Timeout, format!("no answer within {} ms", self.timeout.as_millis()));
        let found =
            within(self.timeout, self.dispatch(target, warm), over).await.unwrap_or_else(|found| found);
        if !matches!(found, Found::Good) {
            warm.clear();
        }
        (found, started.elapsed())
    }

    fn dispatch<'a>(&'a self, target: &'a Target, warm: &'a mut Warm) -> BoxFuture<'a, Found> {
        if let Some(why) = placeholder(&target.endpoint) {
            return Box::pin(std::future::ready(Found::Skipped(why)));
        }
        match target.endpoint.kind.as_str() {
            "http" => Box::pin(http::probe(self, target, warm)),
            "tcp" => Box::pin(tcp::probe(self, target)),
            "nats" => Box::pin(nats::probe(self, target)),
            "acp" => Box::pin(acp::probe(self, target, warm)),
            "a2a" => Box::pin(a2a::probe(self, target, warm)),
            "mcp" => Box::pin(mcp::probe(self, target, warm)),
            "grpc" => Box::pin(grpc::probe(self, target, warm)),
            other => {
                let kind: String = other.chars().take(40).collect();
                Box::pin(std::future::ready(Found::Skipped(format!("probe kind {kind:?} is not known"))))
            }
        }
    }
}

/// Why an endpoint is none: agents on stdio, and placeholders that name no host.
pub(crate) fn placeholder(endpoint: &Endpoint) -> Option<String> {
    let url = endpoint.url.trim();
    if endpoint.kind == STDIO_KIND || url.starts_with("stdio:") {
        return Some("speaks over stdio, there is nothing to probe".to_owned());
    }
    if endpoint.kind == "nats" {
        return None;
    }
    if url.is_empty() {
        return Some("its url is empty, there is nothing to probe".to_owned());
    }
    if url.split_once("://").is_some_and(|(_, rest)| rest.trim_matches('/').is_empty()) {
        return Some(format!("its url {:?} is a placeholder", url.chars().take(80).collect::<String>()));
    }
    None
}

/// Whether the URL of an endpoint of a known kind can be read, or is a placeholder.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn check_url(endpoint: &Endpoint) -> Result<(), String> {
    if placeholder(endpoint).is_some() {
        return Ok(());
    }
    let url = endpoint.url.as_str();
    let read = match endpoint.kind.as_str() {
        "nats" => return Ok(()),
        "tcp" => tcp::read(url).map(drop),
        "grpc" => dial::place(url, &grpc::SCHEMES).map(drop),
        _ => dial::place(url, &exchange::WEB).map(drop),
    };
    read.map_err(|found| match found {
        Found::Skipped(why) | Found::Void(why) | Found::Bad(_, why) => why,
        Found::Good => "can't be used".to_owned(),
    })
}

/// The key that concurrency per host is bounded by. On the bus every agent is one of its own: it is not a host that many
/// requests at once would be a burden to.
#[must_use]
fn host_of(target: &Target) -> String {
    let endpoint = &target.endpoint;
    if endpoint.kind == "nats" {
        return format!("nats:{}", target.agent_id);
    }
    let rest = endpoint.url.split_once("://").map_or(endpoint.url.as_str(), |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match host.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((v6, _)) => v6,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    host.to_ascii_lowercase()
}

/// Waits at most so long; else it is as `over` says, or our own fault: when our own timer was late, so was everything else
/// here, and it may have answered long ago.
async fn within<F: Future>(
    limit: Duration,
    future: F,
    over: impl FnOnce() -> Found,
) -> Result<F::Output, Found> {
    let started = Instant::now();
    tokio::time::timeout(limit, future).await.map_err(|_| {
        if started.elapsed() >= limit + LATE_MAX { Found::Void(TOO_SLOW.to_owned()) } else { over() }
    })
}

/// What an I/O error says about the other side.
fn blame(error: &std::io::Error, doing: &str) -> Found {
    use std::io::ErrorKind as Kind;
    let words = format!("{doing}: {error}");
    if is_ours(error) {
        return Found::Void(words);
    }
    match error.kind() {
        // A packet filter on the way and a router that knows no way to that host say no at once: whoever is told "timeout"
        // would look at the agent. Which of them it was is in the words.
        Kind::ConnectionRefused | Kind::HostUnreachable => Found::bad(Cause::Refused, words),
        Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::UnexpectedEof => {
            Found::bad(Cause::Reset, words)
        }
        // Timed out, and what has no name: no answer from there.
        _ => Found::bad(Cause::Timeout, words),
    }
}

/// An address that was checked.
#[derive(Debug, Clone, Copy)]
struct Checked(SocketAddr);

#[cfg(test)]
mod tests;
