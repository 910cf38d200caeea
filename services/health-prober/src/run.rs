//! Starting and ending.

use std::sync::Arc;
use std::time::Duration;

use rollcall_core::subject::Subjects;
use rollcall_core::time::Clock as _;
use rollcall_core::{Prefix, Timestamp};
use rollcall_nats::{Bus, EventLog, TailError, ensure_streams};
use rollcall_service::Context;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::effect::Reach;
use crate::probe::scheduler::{Bounds, Scheduler, raise_file_limit};
use crate::probe::{Prober, Roots};
use crate::shell::{Ears, INPUTS, Input, LoopError, Shell, follow};
use crate::state::LOSS_WINDOW_MS;
use crate::{agents_file, api, losses};
use rollcall_control::Guard;

/// Pause between two looks at a log that is not up yet.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// Tries between two log lines about it.
const SAY_AGAIN_TRIES: u32 = 10;
/// How long what is under way may take to finish at the end.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);
/// Open files that a process may have at the least, where the system does not tell.
const FILES_ASSUMED: u64 = 1024;

/// Runs a health-prober until the shutdown.
///
/// # Errors
/// Streams that are not as they must be, and whatever else no waiting can heal.
pub async fn run(context: Context) -> anyhow::Result<()> {
    let bounds = bounds();
    let bus = context.connect_bus().await?;
    let config = Config::from(context.settings.as_ref());
    let mut result = Ok(());
    while !context.shutdown.is_cancelled() {
        result = Box::pin(life(&context, &bus, &config, bounds)).await;
        match &result {
            Err(error)
                if matches!(
                    error.downcast_ref::<LoopError>(),
                    Some(LoopError::Tail(TailError::LogRegressed { .. }))
                ) =>
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
async fn life(context: &Context, bus: &Bus, config: &Config, bounds: Bounds) -> anyhow::Result<()> {
    context.readiness.set("replay", false);
    streams_exist(context, bus).await?;
    if context.shutdown.is_cancelled() {
        return Ok(());
    }
    let log = EventLog::new(bus);
    context.set_clock(&log).await;
    let reach = Reach {
        bus: bus.clone(),
        log,
        subjects: Subjects::new(Prefix::new(&context.settings.prefix)?),
        source: context.event_source(),
    };
    let (sender, inputs) = mpsc::channel(INPUTS);
    // Everything is subscribed before the log is read, so that nothing is missed in between.
    let ears = Ears {
        link: bus.link(),
        drops: bus.slow_consumer_drops(),
        health: context.loop_health(),
        beats: bus.subscribe(reach.subjects.all_heartbeats()).await?,
        log: follow(reach.log.tail(0, [reach.subjects.all_agent_events().as_str()])),
        inputs,
    };
    let told = bus.subscribe(reach.subjects.prober_goodbye()).await?;
    let goodbyes = tokio::spawn(api::follow_goodbyes(told, sender.clone()));
    let api = api::serve(bus, reach.clone(), sender.clone(), Arc::clone(&context.clock)).await?;
    let losing = tokio::spawn(follow_losses(reach.clone(), context.clock.now(), sender.clone()));
    let filing =
        config.agents_file.clone().map(|path| tokio::spawn(agents_file::follow(path, sender.clone())));
    let (scheduler, stop_probes) = probes(config, bounds, &reach, &sender);
    let shell = Shell::new(config, scheduler, reach, sender, Arc::clone(&context.clock));
    // While requests are drained the loop goes on turning, since it answers them.
    let drained = CancellationToken::new();
    let (shutdown, done) = (context.shutdown.clone(), drained.clone());
    let draining = tokio::spawn(async move {
        shutdown.cancelled().await;
        api.drain(FINISH_TIMEOUT).await;
        done.cancel();
    });
    let result = shell.run(ears, context, &drained, FINISH_TIMEOUT).await;
    draining.abort();
    stop_probes.cancel();
    losing.abort();
    goodbyes.abort();
    if let Some(filing) = filing {
        filing.abort();
    }
    result.map_err(anyhow::Error::from)
}

/// Follows what agents lose, and what they lost within the time that counts.
async fn follow_losses(reach: Reach, now: Timestamp, inputs: mpsc::Sender<Input>) {
    let since = Timestamp::from_millis(now.as_millis().saturating_sub_unsigned(LOSS_WINDOW_MS));
    if let Err(error) = losses::follow(reach.log, reach.subjects, since, inputs).await {
        tracing::error!(%error, "lost executions are not followed: nobody is quarantined or released for them");
    }
}

/// Starts the probes; they end with the token.
fn probes(
    config: &Config,
    bounds: Bounds,
    reach: &Reach,
    inputs: &mpsc::Sender<Input>,
) -> (Scheduler, CancellationToken) {
    let bus = Some((reach.bus.clone(), reach.subjects.clone()));
    let guard = Guard::new(config.allow_cidrs.clone());
    let prober = Prober::new(guard, Roots::of_this_machine(), bus, config.probe_timeout);
    let (scheduler, stop) = (Scheduler::new(config.probe_interval, bounds), CancellationToken::new());
    let inputs = inputs.clone();
    tokio::spawn(scheduler.clone().run(prober, stop.clone(), move |report| {
        let inputs = inputs.clone();
        async move {
            // The loop has ended: nobody wants to know.
            let _ = inputs.send(Input::Probed(report)).await;
        }
    }));
    (scheduler, stop)
}

/// What may be under way at once with the files that may be open here; says so if that is less than it could be.
fn bounds() -> Bounds {
    let files = raise_file_limit().unwrap_or_else(|error| {
        tracing::warn!(%error, "the limit of open files can't be raised");
        FILES_ASSUMED
    });
    let bounds = Bounds::within(files);
    let Bounds { total: probes, per_host: probes_per_host, warm: connections_kept } = bounds;
    if bounds == Bounds::FULL {
        tracing::info!(files, probes, probes_per_host, connections_kept, "limit of open files");
    } else {
        let wanted = Bounds::FILES;
        tracing::warn!(
            files,
            wanted,
            probes,
            probes_per_host,
            connections_kept,
            "the limit of open files is low: fewer agents are probed at once"
        );
    }
    bounds
}

/// Waits for the log, and makes sure that it is as it must be.
async fn streams_exist(context: &Context, bus: &Bus) -> anyhow::Result<()> {
    let mut tries = 0_u32;
    while !context.shutdown.is_cancelled() {
        match ensure_streams(bus).await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_transient() => {
                if tries.is_multiple_of(SAY_AGAIN_TRIES) {
                    tracing::warn!(%error, "waiting for the log");
                }
                tries += 1;
                tokio::time::sleep(TRY_AGAIN).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
