//! Following the log into the world.

use std::{collections::HashSet, time::SystemTime};

use anyhow::Context as _;
use rollcall_core::{
    Clock as _, ExecutionId, Timestamp, event::Event, event::EventBody, execution::Execution,
};
use rollcall_nats::{Entry, ReadError};
use rollcall_service::LoopBeat;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{shared::Shared, sight::Void, state::World};

/// Entries that are folded under one lock.
const BATCH_MAX: usize = 500;
/// A fresh entry's server time is trusted to say which of two clocks is right only if they differ by more than this.
const CLOCK_DOUBT_MS: i64 = 500;

/// Follows the log until shutdown. `seen` gets the sequence folded last.
///
/// # Errors
/// The log can't be followed: it was replaced, or the server refuses.
pub async fn follow(
    shared: &Shared,
    seen: &watch::Sender<u64>,
    alive: LoopBeat,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let all = shared.subjects.all_events();
    let mut tail = shared.log.tail(0, [all.as_str()]);
    let mut current = false;
    let mut tick = tokio::time::interval(std::time::Duration::from_secs(1));
    loop {
        let batch = {
            // One wait over all ticks: opening the tail anew after a long outage takes longer than a tick.
            let mut next = std::pin::pin!(tail.next_batch(BATCH_MAX));
            loop {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    batch = &mut next => break batch.context("following the log")?,
                    _ = tick.tick() => alive.beat(),
                }
            }
        };
        alive.beat();
        fold(shared, &batch.entries);
        if let Some(last) = batch.entries.last() {
            seen.send_replace(last.seq);
            if current {
                check_clock(shared, last);
            }
        }
        if batch.caught_up && !current {
            current = true;
            read_histories(shared).await?;
            shared.with(|world, now| {
                world.sight.set_caught_up(true);
                world.check_breaker(now);
                world.settle_all(now);
                world.woken = true;
            });
            tracing::info!(seq = tail.position(), "log read to its end");
        }
        if current {
            read_histories(shared).await?;
        }
    }
}

fn fold(shared: &Shared, entries: &[Entry]) {
    shared.with(|world, now| {
        for entry in entries {
            if let Err(error) = world.apply(&shared.subjects, &entry.subject, entry.seq, &entry.bytes, now) {
                metrics::counter!("rollcall_invalid_entries_total").increment(1);
                tracing::warn!(seq = entry.seq, subject = %entry.subject.escape_debug(), %error,
                    "entry of the log is no valid event for its subject, skipped");
            }
        }
        world.after_batch(now);
    });
}

/// Executions whose beginning is not in memory (ended, and started again by an operator).
async fn read_histories(shared: &Shared) -> Result<(), ReadError> {
    let due: HashSet<ExecutionId> =
        shared.with(|world, _| std::mem::take(&mut world.histories_due)).into_iter().collect();
    for id in due {
        if let Some(execution) = history(shared, &id).await?
            && !execution.state.is_terminal()
        {
            shared.with(|world, now| world.adopt(execution, now));
        }
    }
    Ok(())
}

/// An execution folded from all that is in the log about it, read from its leader.
///
/// # Errors
/// See [`ReadError`].
pub async fn history(shared: &Shared, id: &ExecutionId) -> Result<Option<Execution>, ReadError> {
    let subject = shared.subjects.execution_event(id);
    let entries = shared.log.history(&subject).await?;
    let last = entries.last().map(|entry| entry.seq);
    let events: Vec<(u64, Event)> = entries
        .iter()
        .filter_map(|entry| Event::decode(&entry.bytes).ok().map(|event| (entry.seq, event)))
        .filter(|(_, event)| event.subject == id.as_str())
        .collect();
    let folded = Execution::fold(events.iter().filter_map(|(seq, event)| match &event.body {
        EventBody::Execution(body) if body.execution_id() == id => Some((*seq, body, event.time)),
        _ => None,
    }));
    Ok(folded.map(|mut execution| {
        // Entries that were skipped count for the next append.
        execution.seq = execution.seq.max(last.unwrap_or_default());
        execution
    }))
}

/// Brings the world up to what is in the log about this execution now, read from the leader. `None`: the log has
/// never heard of it.
///
/// # Errors
/// See [`ReadError`].
pub async fn refresh(shared: &Shared, id: &ExecutionId) -> Result<Option<u64>, ReadError> {
    let Some(last) = shared.log.last(&shared.subjects.execution_event(id)).await? else { return Ok(None) };
    let known = shared.with(|world, _| known_seq(world, id));
    if known.is_none_or(|known| known < last.seq)
        && let Some(execution) = history(shared, id).await?
    {
        shared.with(|world, now| world.adopt(execution, now));
    }
    Ok(Some(last.seq))
}

fn known_seq(world: &World, id: &ExecutionId) -> Option<u64> {
    world.executions.get(id).map(|e| e.seq).or_else(|| world.ended.get(id).map(|n| n.seq))
}

/// After a jump of the wall clock nobody knows which is right, the clock that went on evenly or the one that jumped.
/// The server's time on a fresh entry decides.
fn check_clock(shared: &Shared, entry: &Entry) {
    let drift = shared.clock.drift_ms();
    if drift.abs() < CLOCK_DOUBT_MS {
        return;
    }
    let server = entry.time.timestamp_millis();
    let wall = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX));
    let even: Timestamp = shared.clock.now();
    if (wall - server).abs() < (even.as_millis() - server).abs() {
        tracing::warn!(drift_ms = drift, "the wall clock moved and the server agrees with it: adopted");
        shared.clock.resync();
        shared.with(|world, _| world.void(Void::ClockJump));
    }
}
