//! What of our own looks like trouble of others.

use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

/// File handles that a resolver may hold at once.
const RESOLVER_HANDLES: usize = 4;

/// Our own limits, our own network and our own packet filter say nothing about the other side. EPERM and EACCES are said
/// by this machine only (a firewall's rule for what goes out, seccomp, SELinux, a route that prohibits); what a filter on the
/// way says is EHOSTUNREACH, and not ours.
#[must_use]
pub fn is_ours(error: &io::Error) -> bool {
    // EMFILE, ENFILE, ENOBUFS have no kind of their own.
    const OURS: [i32; 3] = [24, 23, 105];
    error.raw_os_error().is_some_and(|code| OURS.contains(&code))
        || matches!(
            error.kind(),
            ErrorKind::NetworkUnreachable
                | ErrorKind::NetworkDown
                | ErrorKind::AddrNotAvailable
                | ErrorKind::PermissionDenied
                | ErrorKind::OutOfMemory
        )
}

/// All addresses of a name, by the machine's own resolver. That says of every name that there is none when it can't
/// open a file: then the error is that one.
///
/// # Errors
/// There is no such name, or [`is_ours`].
pub async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    match tokio::net::lookup_host((host, port)).await {
        Ok(found) => Ok(found.collect()),
        Err(error) => Err(without_handles().unwrap_or(error)),
    }
}

fn without_handles() -> Option<io::Error> {
    let opened: io::Result<Vec<UdpSocket>> =
        (0..RESOLVER_HANDLES).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    opened.err().filter(is_ours)
}
