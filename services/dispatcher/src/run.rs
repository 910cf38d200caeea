//! Starting, in the order that keeps promises: servers, log, reconcile, and only then work.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use rollcall_capacity::{Capacity, RedisCapacity};
use rollcall_core::{Prefix, subject::Subjects};
use rollcall_nats::{Bus, EventLog, TailError, ensure_streams};
use rollcall_service::Context;
use tokio_util::sync::CancellationToken;

use crate::{
    ledger::Ledger,
    shell::{Dispatcher, Parts},
};

/// Pause between two tries of something that a server which is not up yet keeps from succeeding.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// Time between two log lines about such a server.
const SAY_AGAIN_TRIES: u32 = 10;
/// How often Redis is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// A loop that does not turn for so long is wedged. One append goes on trying for 15 s, and it may have to be
/// followed by effects in Redis.
const LOOP_LIMIT: Duration = Duration::from_secs(60);
/// How long what is under way may take to finish at the end.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs a dispatcher until the shutdown.
///
/// # Errors
/// Streams that are not as they must be, and whatever else no waiting can heal.
pub async fn run(context: Context) -> anyhow::Result<()> {
    let bus = context.connect_bus().await?;
    let capacity = RedisCapacity::connect(context.settings.redis_url.reveal(), &context.settings.prefix)
        .await
        .context("ROLLCALL_REDIS_URL can't be used")?;
    let mut result = Ok(());
    while !context.shutdown.is_cancelled() {
        result = Box::pin(life(&context, &bus, &capacity)).await;
        match &result {
            Err(error)
                if error
                    .downcast_ref::<TailError>()
                    .is_some_and(|e| matches!(e, TailError::LogRegressed { .. })) =>
            {
                tracing::error!("the log went back in time, starting anew from what it holds: {error:#}");
                metrics::counter!("rollcall_log_regressed_total").increment(1);
            }
            _ => break,
        }
    }
    bus.drain(FINISH_TIMEOUT).await;
    result
}

/// One fold of the log, from its beginning to the shutdown or to the end of that log.
async fn life(context: &Context, bus: &Bus, capacity: &RedisCapacity) -> anyhow::Result<()> {
    let readiness = &context.readiness;
    for condition in ["streams", "redis", "replay", "reconcile"] {
        readiness.set(condition, false);
    }
    streams_exist(context, bus).await?;
    readiness.set("streams", true);
    let subjects = Subjects::new(Prefix::new(&context.settings.prefix)?);
    let log = EventLog::new(bus);
    // Deadlines are written on this clock, and judged by others.
    context.set_clock(&log).await;
    let clock = Arc::clone(&context.clock);
    let instance = context.instance_id.to_string();
    let (ledger, foreign) = Ledger::new(log.clone(), subjects.clone(), &instance, clock);
    capacity.expect_nothing();
    let cancel = context.shutdown.child_token();
    let dispatcher = Dispatcher::new(Parts {
        ledger,
        capacity: capacity.clone(),
        bus: bus.clone(),
        subjects,
        settings: context.settings.as_ref().into(),
        cancel: cancel.clone(),
    });
    let api = dispatcher.serve().await?;
    dispatcher.spawn(Arc::clone(&dispatcher).carry_out_foreign(foreign));
    let replayed = CancellationToken::new();
    let mut following = tokio::spawn(Arc::clone(&dispatcher).follow(replayed.clone()));
    let working = async {
        replayed.cancelled().await;
        readiness.set("replay", true);
        start(context, &dispatcher).await;
        let reports = tokio::spawn(Arc::clone(&dispatcher).take_reports());
        let expiry = context.register_loop("expiry", LOOP_LIMIT);
        tokio::join!(
            Arc::clone(&dispatcher).expire_queued(expiry),
            Arc::clone(&dispatcher).audit_at_intervals(),
            watch_redis(context, capacity, &cancel),
        );
        // Takes no more reports once it has ended; those under way are settled by `finish`. (A panic ends the process.)
        let _ = reports.await;
    };
    let result = tokio::select! {
        ended = &mut following => match ended {
            Ok(ended) => ended.map_err(anyhow::Error::from),
            Err(panicked) => Err(panicked.into()),
        },
        () = working => Ok(()),
        () = context.keep_clock(log) => Ok(()),
    };
    cancel.cancel();
    api.drain(FINISH_TIMEOUT).await;
    if tokio::time::timeout(FINISH_TIMEOUT, dispatcher.finish()).await.is_err() {
        tracing::warn!("ended with work under way; the next start takes it up");
    }
    result
}

/// Reconciles as soon as Redis allows, then says ready.
async fn start(context: &Context, dispatcher: &Arc<Dispatcher>) {
    let mut tries = 0_u32;
    while !context.shutdown.is_cancelled() {
        match dispatcher.reconcile().await {
            Ok(()) => {
                context.readiness.set("redis", true);
                context.readiness.set("reconcile", true);
                return;
            }
            Err(error) => {
                if tries.is_multiple_of(SAY_AGAIN_TRIES) {
                    tracing::warn!("waiting to reconcile with the log: {:#}", anyhow::Error::from(error));
                }
                tries += 1;
                tokio::time::sleep(TRY_AGAIN).await;
            }
        }
    }
}

async fn streams_exist(context: &Context, bus: &Bus) -> anyhow::Result<()> {
    let mut tries = 0_u32;
    loop {
        match ensure_streams(bus).await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_transient() && !context.shutdown.is_cancelled() => {
                if tries.is_multiple_of(SAY_AGAIN_TRIES) {
                    tracing::warn!("waiting for jetstream: {:#}", anyhow::Error::from(error));
                }
                tries += 1;
                tokio::time::sleep(TRY_AGAIN).await;
            }
            Err(error) => return Err(error).context("the streams can't be used"),
        }
    }
}

async fn watch_redis(context: &Context, capacity: &RedisCapacity, cancel: &CancellationToken) {
    let mut ticks = tokio::time::interval(PING_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = ticks.tick() => context.readiness.set("redis", capacity.ping().await.is_ok()),
            () = cancel.cancelled() => return,
        }
    }
}
