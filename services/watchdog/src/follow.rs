//! Following the log into the world.

use std::{collections::HashSet, time::Duration};

use anyhow::Context as _;
use rollcall_core::{
    ExecutionId, Timestamp,
    event::{Event, EventBody, ExecutionEvent},
    execution::Execution,
};
use rollcall_nats::{Entry, ReadError};
use rollcall_service::LoopBeat;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{shared::Shared, state::World};

/// Entries that are folded under one lock.
const BATCH_MAX: usize = 500;
/// Pause before histories that could not be read are tried again.
const HISTORY_RETRY: Duration = Duration::from_secs(1);

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
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut retry_at: Option<Instant> = None;
    loop {
        let batch = {
            // One wait over all ticks: opening the tail anew after a long outage takes longer than a tick.
            let mut next = std::pin::pin!(tail.next_batch(BATCH_MAX));
            loop {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    batch = &mut next => break Some(batch.context("following the log")?),
                    () = reached(retry_at) => break None,
                    _ = tick.tick() => alive.beat(),
                }
            }
        };
        alive.beat();
        let batch = batch.unwrap_or_default();
        fold(shared, &batch.entries);
        if let Some(last) = batch.entries.last() {
            seen.send_replace(last.seq);
        }
        if batch.caught_up && !current {
            current = true;
            retry_at = read_histories(shared, &alive).await;
            shared.with(|world, now| {
                world.sight.set_caught_up(true);
                world.check_breaker(now);
                world.settle_all(now);
                world.woken = true;
            });
            tracing::info!(seq = tail.position(), "log read to its end");
        }
        if current && retry_at.is_none_or(|at| at <= Instant::now()) {
            retry_at = read_histories(shared, &alive).await;
        }
    }
}

async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
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

/// Executions whose beginning is not in memory (ended, and started again by an operator). Returns when to try again
/// those that could not be read now.
async fn read_histories(shared: &Shared, alive: &LoopBeat) -> Option<Instant> {
    let due: HashSet<ExecutionId> =
        shared.with(|world, _| std::mem::take(&mut world.histories_due)).into_iter().collect();
    let mut unread = Vec::new();
    let mut due = due.into_iter();
    while let Some(id) = due.next() {
        alive.beat();
        match History::read(shared, &id).await.map(|history| history.fold()) {
            Ok(Some(execution)) if !execution.state.is_terminal() => {
                shared.with(|world, now| world.adopt(execution, now));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(execution_id = %id, %error, "its history can't be read now, trying again");
                unread.push(id);
                // Nobody answers: the others would only wait for the same.
                if matches!(error, ReadError::Unavailable(_)) {
                    unread.extend(due.by_ref());
                }
            }
        }
    }
    if unread.is_empty() {
        return None;
    }
    shared.with(|world, _| world.histories_due.append(&mut unread));
    Some(Instant::now() + HISTORY_RETRY)
}

/// All that is in the log about an execution, read from its leader.
#[derive(Debug)]
pub struct History {
    id: ExecutionId,
    events: Vec<(u64, Event)>,
    last_seq: u64,
}

impl History {
    /// # Errors
    /// See [`ReadError`].
    pub async fn read(shared: &Shared, id: &ExecutionId) -> Result<Self, ReadError> {
        let entries = shared.log.history(&shared.subjects.execution_event(id)).await?;
        let last_seq = entries.last().map_or(0, |entry| entry.seq);
        let decoded = entries.iter().filter_map(|entry| Some((entry.seq, Event::decode(&entry.bytes).ok()?)));
        let events = decoded.filter(|(_, event)| event.subject == id.as_str()).collect();
        Ok(Self { id: id.clone(), events, last_seq })
    }

    /// What happened to it, each with its sequence and time.
    pub fn events(&self) -> impl Iterator<Item = (u64, &ExecutionEvent, Timestamp)> {
        self.events.iter().filter_map(|(seq, event)| match &event.body {
            EventBody::Execution(body) if *body.execution_id() == self.id => Some((*seq, body, event.time)),
            _ => None,
        })
    }

    /// Whether the log has never heard of it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.last_seq == 0
    }

    /// Brings the world up to it, unless that knows as much.
    pub fn tell(&self, shared: &Shared) {
        let is_news = |world: &World| known_seq(world, &self.id).is_none_or(|known| known < self.last_seq);
        if shared.with(|world, _| is_news(world))
            && let Some(execution) = self.fold()
        {
            shared.with(|world, now| world.adopt(execution, now));
        }
    }

    /// What became of it. `None`: there is no valid submission.
    #[must_use]
    pub fn fold(&self) -> Option<Execution> {
        let mut execution = Execution::fold(self.events())?;
        // Entries that were skipped count for the next append.
        execution.seq = execution.seq.max(self.last_seq);
        Some(execution)
    }
}

/// Brings the world up to what is in the log about this execution now, read from the leader. `None`: the log has
/// never heard of it.
///
/// # Errors
/// See [`ReadError`].
pub async fn refresh(shared: &Shared, id: &ExecutionId) -> Result<Option<u64>, ReadError> {
    let Some(last) = shared.log.last(&shared.subjects.execution_event(id)).await? else { return Ok(None) };
    let known = shared.with(|world, _| known_seq(world, id));
    if known.is_none_or(|known| known < last.seq) {
        History::read(shared, id).await?.tell(shared);
    }
    Ok(Some(last.seq))
}

fn known_seq(world: &World, id: &ExecutionId) -> Option<u64> {
    world.executions.get(id).map(|e| e.seq).or_else(|| world.ended.get(id).map(|n| n.seq))
}
