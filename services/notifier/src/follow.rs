//! Reading the log: every entry into the read model and to the subscribers.

use std::{sync::Arc, time::Duration};

use rollcall_core::{
    ExecutionId,
    event::{Event, EventBody},
    execution::Execution,
};
use rollcall_nats::{Entry, ReadError, TailError};
use rollcall_service::LoopBeat;

use crate::{
    entry::{About, read_entry},
    frame::Frame,
    shared::Shared,
    state::Applied,
};

/// Entries folded in one step.
const BATCH_MAX: usize = 1000;
/// Tries to read the history of one forgotten execution before the notifier gives up (and is restarted).
const RESTORE_TRIES_MAX: u32 = 60;
/// Time between two of them.
const RESTORE_PAUSE: Duration = Duration::from_secs(1);
/// The follower shows life this often while nothing happens.
const BEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Why the log can't be followed any more.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The log went away or back.
    #[error(transparent)]
    Tail(#[from] TailError),
    /// An execution's history can't be read.
    #[error("history of execution {execution} can't be read")]
    History {
        /// Which.
        execution: ExecutionId,
        /// Why.
        #[source]
        source: ReadError,
    },
}

/// Follows the log from its beginning until shutdown.
pub async fn follow(
    shared: &Arc<Shared>,
    beat: &LoopBeat,
    mut on_ready: impl FnMut(),
) -> Result<(), FollowError> {
    let mut tail = shared.log.tail(0, [shared.subjects.all_events().as_str()]);
    loop {
        beat.beat();
        let batch = {
            // One wait over all beats: opening the tail anew after a long outage may take longer than one.
            let mut next = std::pin::pin!(tail.next_batch(BATCH_MAX));
            loop {
                tokio::select! {
                    () = shared.shutdown.cancelled() => return Ok(()),
                    () = tokio::time::sleep(BEAT_INTERVAL) => beat.beat(),
                    batch = &mut next => break batch?,
                }
            }
        };
        if let Some(last) = batch.entries.last() {
            let behind = if batch.caught_up { 0.0 } else { age_ms(last) };
            metrics::gauge!("rollcall_notifier_position").set(last.seq as f64);
            metrics::gauge!("rollcall_notifier_lag_ms").set(behind);
            metrics::counter!("rollcall_notifier_events_total").increment(batch.entries.len() as u64);
        }
        take_in(shared, &batch.entries).await?;
        if batch.caught_up && shared.set_ready() {
            tracing::info!(seq = shared.feed.head(), "the log is read to its end");
            on_ready();
        }
    }
}

fn age_ms(entry: &Entry) -> f64 {
    let now = rollcall_core::Clock::now(&rollcall_core::time::SystemClock::new()).as_millis();
    (now - entry.time.timestamp_millis()).max(0) as f64
}

async fn take_in(shared: &Arc<Shared>, entries: &[Entry]) -> Result<(), FollowError> {
    let Some(head) = entries.last().map(|entry| entry.seq) else { return Ok(()) };
    let events: Vec<_> = entries.iter().filter_map(|entry| Some((entry, decode(shared, entry)?))).collect();
    let mut frames = Vec::with_capacity(events.len());
    let mut rest = events.as_slice();
    while !rest.is_empty() {
        let (folded, missing) = fold(shared, rest, &mut frames);
        rest = &rest[folded..];
        if let (Some(execution), [(entry, event), after @ ..]) = (missing, rest) {
            if restore(shared, &execution, entry.seq).await? {
                continue;
            }
            // Nothing was ever submitted under this id: subscribers still hear of it, the model can't.
            skip(entry, &"nothing was submitted under this id");
            frames.push(Frame::new(entry.seq, About::of(event), entry.bytes.clone()));
            rest = after;
        }
    }
    shared.feed.push(frames, head);
    Ok(())
}

/// An entry as an event, or none. Said and counted once, here: whoever reads it again later just skips it.
fn decode(shared: &Shared, entry: &Entry) -> Option<Event> {
    read_entry(&shared.subjects, &entry.subject, &entry.bytes).map_err(|error| skip(entry, &error)).ok()
}

fn skip(entry: &Entry, reason: &dyn std::fmt::Display) {
    metrics::counter!("rollcall_invalid_entries_total").increment(1);
    tracing::warn!(seq = entry.seq, subject = %entry.subject.escape_debug(), %reason, "entry of the log skipped");
}

/// Folds as far as memory reaches: how many were folded, and the execution that is missing for the next.
fn fold(
    shared: &Shared,
    events: &[(&Entry, Event)],
    frames: &mut Vec<Arc<Frame>>,
) -> (usize, Option<ExecutionId>) {
    let mut model = shared.model_mut();
    for (count, (entry, event)) in events.iter().enumerate() {
        let pool = match model.apply(entry.seq, event) {
            Applied::Folded(pool) => pool,
            Applied::Misfit(reason) => {
                skip(entry, &reason);
                None
            }
            Applied::NeedsHistory => {
                let EventBody::Execution(body) = &event.body else { continue };
                return (count, Some(body.execution_id().clone()));
            }
        };
        let mut about = About::of(event);
        about.pool = about.pool.or(pool);
        frames.push(Frame::new(entry.seq, about, entry.bytes.clone()));
    }
    (events.len(), None)
}

/// Brings back an execution as it was before `seq`. False: there is none.
async fn restore(shared: &Arc<Shared>, id: &ExecutionId, seq: u64) -> Result<bool, FollowError> {
    let mut tries = 0;
    let history = loop {
        match shared.log.history(&shared.subjects.execution_event(id)).await {
            Ok(history) => break history,
            Err(ReadError::Unavailable(reason)) if tries < RESTORE_TRIES_MAX => {
                tries += 1;
                tracing::warn!(execution = %id, %reason, "history not read, trying again");
                tokio::time::sleep(RESTORE_PAUSE).await;
            }
            Err(source) => return Err(FollowError::History { execution: id.clone(), source }),
        }
    };
    let folded = fold_history(shared, history.iter().filter(|entry| entry.seq < seq));
    let found = folded.is_some();
    if let Some(execution) = folded {
        shared.model_mut().restore(execution);
    }
    Ok(found)
}

/// The execution that a history tells of.
pub fn fold_history<'a>(shared: &Shared, history: impl IntoIterator<Item = &'a Entry>) -> Option<Execution> {
    let events: Vec<_> = history
        .into_iter()
        .filter_map(|entry| {
            let event = read_entry(&shared.subjects, &entry.subject, &entry.bytes).ok()?;
            match event.body {
                EventBody::Execution(body) => Some((entry.seq, body, event.time)),
                EventBody::Agent(_) | EventBody::System(_) => None,
            }
        })
        .collect();
    Execution::fold(events.iter().map(|(seq, body, time)| (*seq, body, *time)))
}
