//! A connection that a test can make slow, deaf or cut: sits between a client and a server.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    task::JoinHandle,
};

/// Bytes that are passed on at once.
const CHUNK: usize = 64 * 1024;

/// What it does with what it hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Passes everything on.
    Open,
    /// Keeps connections and passes nothing on, as a network that drops packets.
    Stalled,
    /// Ends every connection, also new ones.
    Severed,
}

/// Where the server is.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// A TCP port of this host.
    Port(u16),
    /// A socket in the file system.
    Socket(PathBuf),
}

/// A running proxy; ends with its handle.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    flow: watch::Sender<Flow>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts one on a port of the kernel's choice. Every answer of the server comes later by one of `delays`, in turn;
    /// none for no delay.
    ///
    /// # Panics
    /// When there is no port.
    pub async fn start(upstream: Upstream, delays: &'static [Duration]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port on loopback");
        let address = listener.local_addr().expect("a bound listener");
        let (flow, seen) = watch::channel(Flow::Open);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *seen.borrow() == Flow::Severed {
                    continue;
                }
                let (upstream, seen) = (upstream.clone(), seen.clone());
                tokio::spawn(async move {
                    let mut cut = seen.clone();
                    let passing = async {
                        match upstream {
                            Upstream::Port(port) => {
                                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else {
                                    return;
                                };
                                let (read, write) = server.into_split();
                                between(client, read, write, seen, delays).await;
                            }
                            Upstream::Socket(path) => {
                                let Ok(server) = UnixStream::connect(path).await else { return };
                                let (read, write) = server.into_split();
                                between(client, read, write, seen, delays).await;
                            }
                        }
                    };
                    tokio::select! {
                        () = passing => {}
                        _ = cut.wait_for(|flow| *flow == Flow::Severed) => {}
                    }
                });
            }
        });
        Self { address, flow, task }
    }

    /// Where to connect instead.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it does from now on.
    pub fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.flow.send_replace(Flow::Severed);
        self.task.abort();
    }
}

/// Until one side has ended.
async fn between(
    client: TcpStream,
    from_server: impl AsyncRead + Unpin,
    to_server: impl AsyncWrite + Unpin,
    flow: watch::Receiver<Flow>,
    delays: &'static [Duration],
) {
    let (from_client, to_client) = client.into_split();
    tokio::select! {
        () = pass(from_client, to_server, flow.clone(), &[]) => {}
        () = pass(from_server, to_client, flow, delays) => {}
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut flow: watch::Receiver<Flow>,
    delays: &'static [Duration],
) {
    let mut chunk = vec![0; CHUNK];
    let mut turn = delays.iter().cycle();
    loop {
        let Ok(length @ 1..) = from.read(&mut chunk).await else { return };
        if let Some(delay) = turn.next() {
            // This is the fault itself: nobody waits here for something to happen.
            tokio::time::sleep_until(tokio::time::Instant::now() + *delay).await;
        }
        if flow.wait_for(|flow| *flow != Flow::Stalled).await.is_err() {
            return;
        }
        if to.write_all(&chunk[..length]).await.is_err() {
            return;
        }
    }
}
