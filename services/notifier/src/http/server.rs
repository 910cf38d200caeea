//! The listener: bounded connections, bounded header time, an orderly end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::stall::{StallGuard, WRITE_STALL_MAX};
use crate::shared::{SUBSCRIBERS_MAX, Shared};

/// Connections at once; more wait in the listener's backlog. Leaves room for requests beside all subscribers.
pub const CONNECTIONS_MAX: usize = SUBSCRIBERS_MAX + 1_000;
/// Connections the kernel keeps waiting.
const BACKLOG: u32 = 4_096;
/// Bytes the kernel buffers for one peer that does not read (it doubles this): a slow subscriber is noticed soon.
const SEND_BUFFER: u32 = 128 * 1024;
/// Time a peer has for its request's head, and for the next one on the same connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes hyper buffers per connection, either way. Bounds the size of a request's head.
const HTTP_BUFFER_MAX: usize = 64 * 1024;
/// Pause after the system refused to accept (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes the address.
pub fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    // Inherited by what is accepted.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Serves the site until shutdown. Connections are tracked in [`Shared::tasks`].
pub async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    accept(&listener, super::router(&shared), &shared.shutdown, &shared.tasks).await;
}

/// Serves the page, and 503 for everything else, until `stop`: there is no log yet.
pub async fn serve_waiting(listener: &TcpListener, stop: &CancellationToken) {
    accept(listener, super::waiting_router(), stop, &TaskTracker::new()).await;
}

async fn accept(listener: &TcpListener, router: Router, stop: &CancellationToken, tasks: &TaskTracker) {
    let service = TowerToHyperService::new(router);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (stop, service) = (stop.clone(), service.clone());
        tasks.spawn(async move {
            connection(&stop, stream, service).await;
            drop(permit);
        });
    }
}

async fn connection(stop: &CancellationToken, stream: TcpStream, service: TowerToHyperService<Router>) {
    // Events are small and wanted now.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "connection without nodelay");
    }
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        hyper::service::Service::call(&service, request.map(Body::new))
    });
    let io = TokioIo::new(StallGuard::new(stream, WRITE_STALL_MAX));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HTTP_BUFFER_MAX)
        .serve_connection(io, service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
