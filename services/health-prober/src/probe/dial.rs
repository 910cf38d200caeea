//! From a host to a connection: resolve, check, connect to the very address that was checked.

use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use url::{Host, Url};

use super::resolve::ResolveError;
use super::tls::Inside;
use super::{Checked, Found, Prober, blame, within};
use crate::detector::Cause;
use rollcall_control::Trust;
use rollcall_core::wire::shown_url;

/// Addresses of one name that are tried before it is given up.
const ADDRESSES_MAX: usize = 4;
/// Share of a probe's timeout within which a name must be resolved: the rest is for whoever has the name.
const RESOLVE_SHARE: (u32, u32) = (2, 3);

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
        let shown = shown_url(url, 100);
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
        let found = self.resolve(place).await?;
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

    async fn resolve(&self, place: &Place) -> Result<Vec<SocketAddr>, Found> {
        let host = &place.host;
        let patience = self.timeout * RESOLVE_SHARE.0 / RESOLVE_SHARE.1;
        let over = || {
            let patience = patience.as_millis();
            Found::bad(Cause::Dns, format!("{host} does not resolve: no answer within {patience} ms"))
        };
        match within(patience, self.resolver.resolve(host, place.port), over).await? {
            Ok(found) => Ok(found),
            Err(ResolveError::Failed(error)) => {
                Err(Found::bad(Cause::Dns, format!("{host} does not resolve: {error}")))
            }
            Err(error @ (ResolveError::Busy | ResolveError::Ours(_))) => {
                Err(Found::Void(format!("{host}: {error}")))
            }
        }
    }

    /// Connects to the first address that takes us. Each of several gets its share of the time, so that one that swallows
    /// everything does not keep us from the others.
    pub(super) async fn connect(&self, place: &Place, trust: Trust) -> Result<TcpStream, Found> {
        let addresses = self.addresses(place, trust).await?;
        let share = self.timeout / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
        let mut failed = None;
        for Checked(address) in addresses {
            let over = || Found::bad(Cause::Timeout, format!("connect to {address}: no answer"));
            let found = match within(share, TcpStream::connect(address), over).await {
                Ok(Ok(stream)) => {
                    // Small exchanges: waiting to fill a packet would only add to the latency that is measured.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(error)) => blame(&error, &format!("connect to {address}")),
                Err(found) => found,
            };
            // That we have no way to one of its addresses does not speak for the others.
            if !(matches!(failed, Some(Found::Bad(..))) && matches!(found, Found::Void(_))) {
                failed = Some(found);
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
