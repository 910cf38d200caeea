//! The state of the connection, as a watch that services can wait on.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Event, ServerError};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::version;

/// Events can be lost when the library's event queue is full, so the state is also looked at this often.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Time between two log lines of the same kind of trouble.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// The connection as of now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Connected to a server.
    pub connected: bool,
    /// Number of connects so far: 1 after the first. A change means that core messages may have been missed.
    pub epoch: u64,
    /// When `connected` or `epoch` last changed.
    pub changed_at: Instant,
}

/// What the event callback writes: it must never block the library's event task.
#[derive(Debug)]
pub(crate) struct Signals {
    changed: Notify,
    slow: watch::Sender<u64>,
    closed: CancellationToken,
    server_errors: LogLimit,
    connect_errors: LogLimit,
}

/// One log line per [`LOG_INTERVAL`]; a refused publisher or an absent server would fill the log.
#[derive(Debug, Default)]
struct LogLimit(Mutex<Option<Instant>>);

impl LogLimit {
    fn may_log(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|at| at.elapsed() >= LOG_INTERVAL);
        if may {
            *last = Some(Instant::now());
        }
        may
    }
}

impl Signals {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            changed: Notify::new(),
            slow: watch::Sender::new(0),
            closed: CancellationToken::new(),
            server_errors: LogLimit::default(),
            connect_errors: LogLimit::default(),
        })
    }

    pub(crate) fn slow_consumer_drops(&self) -> watch::Receiver<u64> {
        self.slow.subscribe()
    }

    /// Cancelled when the connection was closed for good.
    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    pub(crate) fn on_event(&self, event: &Event) {
        match event {
            Event::Connected | Event::Disconnected | Event::Draining => {}
            Event::Closed => self.closed.cancel(),
            Event::SlowConsumer(_) | Event::ServerError(ServerError::SlowConsumer(_)) => {
                self.slow.send_modify(|count| *count += 1);
                metrics::counter!("rollcall_bus_slow_consumer_drops_total").increment(1);
            }
            Event::ServerError(error) => {
                metrics::counter!("rollcall_bus_server_errors_total").increment(1);
                if self.server_errors.may_log() {
                    tracing::warn!(%error, "nats reports an error");
                }
            }
            Event::ClientError(error) => {
                if self.connect_errors.may_log() {
                    tracing::warn!(%error, "waiting for nats");
                }
            }
            Event::LameDuckMode => tracing::info!("nats server is going away, it will be reconnected"),
        }
        self.changed.notify_one();
    }
}

/// Follows the client's state until the guard is dropped.
pub(crate) fn watch_link(
    client: Client,
    signals: Arc<Signals>,
    on_unsupported: CancellationToken,
) -> (watch::Receiver<Link>, DropGuard) {
    let (sender, receiver) = watch::channel(read(&client, None));
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stopped.cancelled() => return,
                () = signals.changed.notified() => {}
                _ = poll.tick() => {}
            }
            let previous = *sender.borrow();
            let now = read(&client, Some(previous));
            if now != previous {
                log_change(previous, now);
                sender.send_replace(now);
            }
            // The server's info is replaced a moment after the connect is counted, so it is looked at in every pass.
            if let Err(error) = version::check(&client.server_info().version) {
                tracing::error!(%error, "reconnected to a server that can't be used, stopping");
                on_unsupported.cancel();
                return;
            }
        }
    });
    (receiver, stop.drop_guard())
}

fn read(client: &Client, previous: Option<Link>) -> Link {
    let connected = client.connection_state() == State::Connected;
    let epoch = client.statistics().connects.load(Ordering::Relaxed);
    match previous {
        Some(link) if link.connected == connected && link.epoch == epoch => link,
        _ => Link { connected, epoch, changed_at: Instant::now() },
    }
}

fn log_change(before: Link, now: Link) {
    let gauge = metrics::gauge!("rollcall_bus_connected");
    gauge.set(if now.connected { 1.0 } else { 0.0 });
    if now.connected {
        metrics::counter!("rollcall_bus_reconnects_total").increment(now.epoch - before.epoch);
        tracing::info!(
            epoch = now.epoch,
            away_ms = before.changed_at.elapsed().as_millis() as u64,
            "nats connected again"
        );
    } else {
        tracing::warn!(epoch = now.epoch, "nats connection lost, reconnecting");
    }
}
