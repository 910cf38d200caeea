//! From a host to a connection: resolve, check, connect to the very address that was checked.

use std::io;
use std::net::{IpAddr, SocketAddr};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use url::{Host, Url};

use super::tls::Inside;
use super::{Checked, Found, Prober, blame};
use crate::detector::Cause;
use rollcall_control::Trust;

/// Addresses of one name that are tried before it is given up.
const ADDRESSES_MAX: usize = 4;
/// Names resolved at once: each takes a thread of the runtime's pool for as long as the name server makes it wait.
const RESOLUTIONS_MAX: usize = 64;

/// How names become addresses.
pub trait Resolve: Send + Sync {
    /// All addresses of a name.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>>;
}

/// The machine's own resolver.
#[derive(Debug)]
pub struct SystemResolver {
    permits: Semaphore,
}

impl Default for SystemResolver {
    fn default() -> Self {
        Self { permits: Semaphore::new(RESOLUTIONS_MAX) }
    }
}

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        Box::pin(async move {
            let _permit = self.permits.acquire().await.map_err(io::Error::other)?;
            Ok(tokio::net::lookup_host((host, port)).await?.collect())
        })
    }
}

/// A byte stream, encrypted or not.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where a URL leads.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) host: String,
    pub(super) literal: Option<IpAddr>,
    pub(super) port: u16,
    pub(super) secure: bool,
}

/// Reads a URL with one of these schemes: (name, default port, TLS).
pub(super) fn place(url: &str, schemes: &[(&str, u16, bool)]) -> Result<(Url, Place), Found> {
    let skip = |why: &str| {
        let shown: String = url.chars().take(100).collect();
        Found::Skipped(format!("its url {shown:?} {why}"))
    };
    let parsed = Url::parse(url).map_err(|error| skip(&format!("can't be read: {error}")))?;
    let scheme = schemes.iter().find(|(name, ..)| *name == parsed.scheme());
    let Some((_, default_port, secure)) = scheme else {
        return Err(skip("has a scheme that does not fit its probe's kind"));
    };
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(skip("carries a user or password"));
    }
    let (host, literal) = match parsed.host() {
        Some(Host::Domain(name)) if !name.is_empty() => {
            // Schemes that are not of the web don't read addresses: do it here, so that they are checked at once.
            (name.to_owned(), name.parse().ok())
        }
        Some(Host::Ipv4(v4)) => (v4.to_string(), Some(IpAddr::V4(v4))),
        Some(Host::Ipv6(v6)) => (v6.to_string(), Some(IpAddr::V6(v6))),
        _ => return Err(skip("names no host")),
    };
    let port = parsed.port().unwrap_or(*default_port);
    if port == 0 {
        return Err(skip("names no port"));
    }
    Ok((parsed, Place { host, literal, port, secure: *secure }))
}

impl Prober {
    /// The addresses of a place that may be connected to.
    async fn addresses(&self, place: &Place, trust: Trust) -> Result<Vec<Checked>, Found> {
        let refused = |error: &dyn std::fmt::Display| Found::Skipped(format!("refused: {error}"));
        if let Some(literal) = place.literal {
            self.guard.check(literal, trust).map_err(|error| refused(&error))?;
            return Ok(vec![Checked(SocketAddr::new(literal, place.port))]);
        }
        let found =
            self.resolver.resolve(&place.host, place.port).await.map_err(|error| {
                Found::bad(Cause::Dns, format!("{} does not resolve: {error}", place.host))
            })?;
        let (mut allowed, mut why) = (Vec::new(), None);
        for address in found {
            match self.guard.check(address.ip(), trust) {
                Ok(()) if allowed.len() < ADDRESSES_MAX => allowed.push(Checked(address)),
                Ok(()) => {}
                Err(error) => why = Some(error),
            }
        }
        match (allowed.is_empty(), why) {
            (false, _) => Ok(allowed),
            (true, Some(error)) => Err(refused(&error)),
            (true, None) => Err(Found::bad(Cause::Dns, format!("{} has no address", place.host))),
        }
    }

    /// Connects to the first address that takes us.
    pub(super) async fn connect(&self, place: &Place, trust: Trust) -> Result<TcpStream, Found> {
        let mut failed = None;
        for Checked(address) in self.addresses(place, trust).await? {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // Small exchanges: waiting to fill a packet would only add to the latency that is measured.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(error) => failed = Some(blame(&error, &format!("connect to {address}"))),
            }
        }
        Err(failed.unwrap_or_else(|| Found::bad(Cause::Dns, format!("{} has no address", place.host))))
    }

    /// Connects, encrypted if the place says so.
    pub(super) async fn dial(
        &self,
        place: &Place,
        trust: Trust,
        inside: Inside,
    ) -> Result<Box<dyn Stream>, Found> {
        let stream = self.connect(place, trust).await?;
        if !place.secure {
            return Ok(Box::new(stream));
        }
        Ok(Box::new(self.tls.connect(place, stream, inside).await?))
    }
}
