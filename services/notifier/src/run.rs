//! Putting the parts together.

use anyhow::Context as _;
use rollcall_core::{Prefix, subject::Subjects};
use rollcall_nats::{Bus, EventLog, ensure_streams};
use rollcall_service::{Context, Program};
use std::{sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    broadcast, follow, http,
    shared::{Limits, Shared},
};

/// Condition: the log was read to its end.
const CAUGHT_UP: &str = "log";
/// A loop that shows no life for this long is wedged.
const LOOP_LIMIT: Duration = Duration::from_secs(60);
/// How long subscribers and requests get to end.
const CONNECTIONS_DRAIN: Duration = Duration::from_secs(4);
/// How long the bus gets to send what was published.
const BUS_DRAIN: Duration = Duration::from_secs(1);
/// Tries to reach the log at the start, and the time between two.
const LOG_TRIES_MAX: u32 = 1200;
const LOG_PAUSE: Duration = Duration::from_millis(500);
/// Of these tries, one in so many is logged.
const LOG_TRIES_PER_LINE: u32 = 10;

/// What this program is.
pub const PROGRAM: Program = Program {
    name: "notifier",
    about: "Tells everybody: broadcast, SSE, WebSocket, HTTP API and dashboard",
    version: env!("CARGO_PKG_VERSION"),
    conditions: &[CAUGHT_UP],
};

/// Runs until shutdown.
pub async fn run(context: Context) -> anyhow::Result<()> {
    run_with(context, Limits::default(), |_| {}).await
}

/// As [`run`], with other bounds, saying where it listens.
pub async fn run_with(
    context: Context,
    limits: Limits,
    on_listen: impl FnOnce(std::net::SocketAddr) + Send,
) -> anyhow::Result<()> {
    let addr = context.settings.http_addr;
    // Before anything else, so that a taken port is said at once.
    let listener = http::bind(addr).with_context(|| format!("can't listen on ROLLCALL_HTTP_ADDR {addr}"))?;
    let addr = listener.local_addr()?;
    tracing::info!(address = %addr, "dashboard and event streams");
    on_listen(addr);
    let waiting = context.shutdown.child_token();
    let reached = tokio::select! {
        reached = reach_log(&context, limits) => reached,
        () = http::serve_waiting(&listener, &waiting) => return Ok(()),
    };
    waiting.cancel();
    let Some((bus, shared, start_after)) = reached? else { return Ok(()) };
    let served = Box::pin(serve(&context, &shared, listener, start_after)).await;
    shared.shutdown.cancel();
    shared.tasks.close();
    if tokio::time::timeout(CONNECTIONS_DRAIN, shared.tasks.wait()).await.is_err() {
        tracing::warn!(connections = shared.tasks.len(), "connections did not end in time");
    }
    drain(&bus).await;
    served
}

/// The bus, everything that hangs on it, and where the log ends; `None` when the shutdown came first.
async fn reach_log(context: &Context, limits: Limits) -> anyhow::Result<Option<(Bus, Arc<Shared>, u64)>> {
    let bus = context.connect_bus().await?;
    if !ensure_streams_exist(context, &bus).await? {
        return Ok(None);
    }
    let subjects = Subjects::new(Prefix::new(&context.settings.prefix)?);
    let shared = Shared::new(subjects, EventLog::new(&bus), limits, context.shutdown.clone());
    Ok(last_seq(&shared).await?.map(|start_after| (bus, shared, start_after)))
}

async fn serve(
    context: &Context,
    shared: &Arc<Shared>,
    listener: TcpListener,
    start_after: u64,
) -> anyhow::Result<()> {
    let readiness = context.readiness.clone();
    let follow_beat = context.register_loop("follow", LOOP_LIMIT);
    let broadcast_beat = context.register_loop("broadcast", LOOP_LIMIT);
    let follow = follow::follow(shared, &follow_beat, || readiness.set(CAUGHT_UP, true));
    let broadcast = tokio::spawn(broadcast::run(shared.clone(), start_after, broadcast_beat));
    let http = tokio::spawn(http::serve(shared.clone(), listener));
    tokio::pin!(follow);
    tokio::pin!(broadcast);
    // Each of them ends by itself only with the shutdown or with an error that a restart has to heal.
    let mut result = tokio::select! {
        followed = &mut follow => followed.context("the log can't be followed"),
        sent = &mut broadcast => sent?.context("the broadcast can't go on"),
    };
    shared.shutdown.cancel();
    if !broadcast.is_finished() {
        result = result.and(broadcast.await?.context("the broadcast can't go on"));
    }
    http.await?;
    result
}

/// False when the shutdown came first.
async fn ensure_streams_exist(context: &Context, bus: &Bus) -> anyhow::Result<bool> {
    let mut tries = 0;
    loop {
        match ensure_streams(bus).await {
            Ok(()) => return Ok(true),
            Err(error) if !error.is_transient() || tries >= LOG_TRIES_MAX => return Err(error.into()),
            Err(error) if !wait(&mut tries, &error, &context.shutdown).await => return Ok(false),
            Err(_) => {}
        }
    }
}

/// Where the log ends now; `None` when the shutdown came first.
async fn last_seq(shared: &Shared) -> anyhow::Result<Option<u64>> {
    let mut tries = 0;
    loop {
        match shared.log.last_seq().await {
            Ok(seq) => return Ok(Some(seq)),
            Err(error) if tries >= LOG_TRIES_MAX => return Err(error.into()),
            Err(error) if !wait(&mut tries, &error, &shared.shutdown).await => return Ok(None),
            Err(_) => {}
        }
    }
}

/// A pause between two tries. False when the shutdown came.
async fn wait(tries: &mut u32, error: &(dyn std::fmt::Display + Sync), shutdown: &CancellationToken) -> bool {
    if tries.is_multiple_of(LOG_TRIES_PER_LINE) {
        tracing::warn!(%error, "waiting for the log");
    }
    *tries += 1;
    tokio::select! {
        () = shutdown.cancelled() => false,
        () = tokio::time::sleep(LOG_PAUSE) => true,
    }
}

async fn drain(bus: &Bus) {
    if !bus.drain(BUS_DRAIN).await {
        tracing::debug!("the bus was not flushed at the end");
    }
}
