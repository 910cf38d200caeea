//! The `healthcheck` subcommand: asks our own `/readyz`, so that an image needs no shell and no curl.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long the answer may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Most bytes of the answer that are read.
const ANSWER_MAX_BYTES: u64 = 64 * 1024;

/// Not ready, or nobody there.
#[derive(Debug, thiserror::Error)]
pub enum HealthcheckError {
    /// Answered, but not with 200: the answer's body.
    #[error("not ready: {0}")]
    NotReady(String),
    /// No answer.
    #[error("{address} does not answer")]
    Unreachable {
        /// Where it was asked for.
        address: SocketAddr,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

/// Asks the admin address for `/readyz`.
///
/// # Errors
/// See [`HealthcheckError`].
pub async fn ask(admin_addr: SocketAddr) -> Result<(), HealthcheckError> {
    let address = reachable(admin_addr);
    let answer = tokio::time::timeout(TIMEOUT, get_readyz(address))
        .await
        .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        .map_err(|source| HealthcheckError::Unreachable { address, source })?;
    let status = answer.split_ascii_whitespace().nth(1);
    if status == Some("200") {
        return Ok(());
    }
    let body = answer.split_once("\r\n\r\n").map_or(answer.as_str(), |(_, body)| body);
    Err(HealthcheckError::NotReady(body.trim().escape_debug().to_string()))
}

async fn get_readyz(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX_BYTES).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A listener on all addresses is asked on loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_means_loopback() {
        assert_eq!(reachable("0.0.0.0:9102".parse().unwrap()), "127.0.0.1:9102".parse().unwrap());
        assert_eq!(reachable("[::]:9102".parse().unwrap()), "[::1]:9102".parse().unwrap());
        assert_eq!(reachable("10.0.0.7:1".parse().unwrap()), "10.0.0.7:1".parse().unwrap());
    }
}
