//! The running service: connects, reads the log, listens, and keeps its tasks going until it is told to end.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use rollcall_core::Prefix;
use rollcall_nats::{EnsureStreamsError, EventLog, ensure_streams};
use rollcall_service::Context;
use tokio::sync::watch;

use crate::{cycle, ears, follow, recover, sentry, shared::Shared, verbs};

/// A loop that shows no life for this long is wedged.
const LOOP_LIMIT: Duration = Duration::from_secs(30);
/// Pause before streams that could not be checked are checked again.
const STREAMS_RETRY: Duration = Duration::from_millis(500);
/// What requests under way get at the end.
const API_DRAIN: Duration = Duration::from_secs(2);
/// What the connection gets at the end.
const BUS_DRAIN: Duration = Duration::from_secs(1);

/// Runs the watchdog until `context.shutdown`.
///
/// # Errors
/// What no waiting can heal: streams with other settings, a log that was replaced.
pub async fn run(context: Context) -> anyhow::Result<()> {
    let bus = context.connect_bus().await?;
    prepare_streams(&context, &bus).await?;
    context.readiness.set("streams", true);
    let prefix = Prefix::new(&context.settings.prefix).context("prefix")?;
    // No deadline is judged on a clock that is not the log's.
    context.set_clock(&EventLog::new(&bus)).await;
    let shared = Shared::new(&bus, &context, prefix);
    let stop = context.shutdown.clone();
    // Before the log is read: what is heard meanwhile is at least not missed by much.
    let heartbeats = bus.subscribe(shared.subjects.all_heartbeats()).await?;
    let (seen, seen_by_sentry) = watch::channel(0);
    let ears = {
        let (shared, alive, stop) =
            (Arc::clone(&shared), context.register_loop("heartbeats", LOOP_LIMIT), stop.clone());
        tokio::spawn(async move { ears::listen(&shared, heartbeats, alive, stop).await })
    };
    let sentry = tokio::spawn(sentry::watch_self(
        Arc::clone(&shared),
        seen_by_sentry,
        context.loop_health(),
        stop.clone(),
    ));
    let breaker = tokio::spawn(sentry::watch_breaker(Arc::clone(&shared), stop.clone()));
    let scheduler = tokio::spawn(recover::schedule(
        Arc::clone(&shared),
        context.register_loop("scheduler", LOOP_LIMIT),
        stop.clone(),
    ));
    let cycles = tokio::spawn(cycle::run_cycles(Arc::clone(&shared), stop.clone()));
    let readiness = tokio::spawn(announce(Arc::clone(&shared), context.clone()));
    let api = verbs::serve(&shared).await?;
    let alive = context.register_loop("log", LOOP_LIMIT);
    let followed = follow::follow(&shared, &seen, alive, stop.clone()).await;
    // The log can't be followed any more, or the process is told to end: everything else ends as well.
    stop.cancel();
    api.drain(API_DRAIN).await;
    for task in [ears, sentry, breaker, scheduler, cycles, readiness] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the watchdog ended badly");
        }
    }
    bus.drain(BUS_DRAIN).await;
    followed
}

async fn prepare_streams(context: &Context, bus: &rollcall_nats::Bus) -> anyhow::Result<()> {
    loop {
        match ensure_streams(bus).await {
            Ok(()) => return Ok(()),
            Err(EnsureStreamsError::Unavailable { stream, reason }) => {
                tracing::warn!(stream, reason, "streams can't be checked now, trying again");
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = context.shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(STREAMS_RETRY) => {}
        }
    }
}

/// Keeps the readiness condition `replay` in line with the log being read.
async fn announce(shared: Arc<Shared>, context: Context) {
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        if shared.with(|world, _| world.sight.caught_up()) {
            context.readiness.set("replay", true);
            return;
        }
    }
}
