//! The event log: compare-and-set appends, and reads from the stream's leader.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use rollcall_core::{
    Clock as _, Timestamp,
    time::{Reading, SystemClock},
};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::bus::{Bus, RequestError};
use crate::js::{self, Get, JsError, Stored, code};
use crate::streams::EVENT_MAX_BYTES;
use crate::tail::{Tail, TailError};

/// How long one append waits for its acknowledgement before it is looked up and tried again.
pub const APPEND_ACK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an append goes on trying altogether before it is [`AppendError::Unavailable`].
pub const APPEND_DEADLINE: Duration = Duration::from_secs(15);
/// Appends of one process that may be in flight at once; more wait.
pub const APPEND_WINDOW: usize = 1024;
/// Pause between two tries of one append.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// History up to this many events is read one by one; a longer one through a consumer.
const HISTORY_SINGLE_READS: usize = 32;
/// Most events in one page of [`EventLog::read_range`].
pub const PAGE_MAX: usize = 1000;

const CONTENT_TYPE: &str = "application/cloudevents+json";

/// One event as the log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Sequence in the stream.
    pub seq: u64,
    /// Subject it was appended to.
    pub subject: Subject,
    /// The CloudEvent, byte for byte.
    pub bytes: Bytes,
    /// When the log took it (the server's clock).
    pub time: DateTime<Utc>,
}

impl From<Stored> for Entry {
    fn from(stored: Stored) -> Self {
        Self { seq: stored.seq, subject: stored.subject.into(), bytes: stored.payload, time: stored.time }
    }
}

/// The end of the log, and the time there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The stream's last sequence: a projection that has seen it is current.
    pub last_seq: u64,
    /// The server's clock beside ours; `None` from one that does not tell.
    pub reading: Option<Reading>,
}

/// What became of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Append {
    /// It is in the log.
    Appended {
        /// Its sequence.
        seq: u64,
    },
    /// The subject has moved on since it was read: read it again and decide again.
    Conflict {
        /// Sequence of the event that took the place, if there is one.
        winner_seq: Option<u64>,
    },
}

/// Why it is not known to be in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// No answer within [`APPEND_DEADLINE`]. It may or may not have landed: try again with the same event id.
    #[error("the log does not answer: {0}")]
    Unavailable(String),
    /// The stream or the disk is full; nothing was stored.
    #[error("the log is full: {0}")]
    Full(String),
    /// The event is larger than the log takes; nothing was stored.
    #[error("event of {bytes} bytes is larger than the log takes")]
    TooLarge {
        /// Its size without headers.
        bytes: usize,
    },
    /// Anything else, in words.
    #[error("append failed: {0}")]
    Other(String),
}

/// Why the log can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Nobody answers now; worth trying again.
    #[error("the log does not answer: {0}")]
    Unavailable(String),
    /// The server refuses, or its answer makes no sense.
    #[error("the log can't be read: {0}")]
    Refused(String),
}

impl From<JsError> for ReadError {
    fn from(error: JsError) -> Self {
        if error.is_transient() {
            Self::Unavailable(error.to_string())
        } else {
            Self::Refused(error.to_string())
        }
    }
}

impl From<TailError> for ReadError {
    fn from(error: TailError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// A page of events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In stream order.
    pub entries: Vec<Entry>,
    /// Where the next page starts: pass it as `after`.
    pub next_after: u64,
    /// There was more at the time.
    pub more: bool,
}

/// Handle on the event stream. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct EventLog {
    bus: Bus,
    stream: Arc<str>,
    window: Arc<Semaphore>,
}

impl EventLog {
    /// The event stream of the bus's prefix.
    pub fn new(bus: &Bus) -> Self {
        Self {
            bus: bus.clone(),
            stream: bus.names().events_stream().into(),
            window: Arc::new(Semaphore::new(APPEND_WINDOW)),
        }
    }

    /// The bus it is on.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Appends one event if `expected_last_subject_seq` is still the subject's last sequence (0: no event yet).
    ///
    /// A lost acknowledgement is resolved here: what stands after the expected sequence is read back and its id
    /// compared, and what did not land is sent again with the same id. [`Append::Conflict`] therefore means that
    /// this event is not in the log.
    ///
    /// # Errors
    /// See [`AppendError`].
    pub async fn append(
        &self,
        subject: &str,
        event_id: &str,
        bytes: Bytes,
        expected_last_subject_seq: u64,
    ) -> Result<Append, AppendError> {
        if bytes.len() > EVENT_MAX_BYTES {
            return Err(AppendError::TooLarge { bytes: bytes.len() });
        }
        let _permit = self.window.acquire().await.map_err(|error| AppendError::Other(error.to_string()))?;
        let deadline = Instant::now() + APPEND_DEADLINE;
        loop {
            let headers = append_headers(event_id, expected_last_subject_seq)?;
            let sent = js::store(&self.bus, subject, Some(headers), bytes.clone(), APPEND_ACK_TIMEOUT).await;
            let doubt = match sent {
                Ok(ack) if !ack.duplicate => return Ok(Append::Appended { seq: ack.seq }),
                Ok(_) => Doubt::Settled,
                Err(error) => judge(error, bytes.len())?,
            };
            match self.read_back(subject, event_id, expected_last_subject_seq, deadline).await? {
                ReadBack::Ours(seq) => return Ok(Append::Appended { seq }),
                ReadBack::Other(seq) => return Ok(Append::Conflict { winner_seq: Some(seq) }),
                ReadBack::Nothing => match doubt {
                    Doubt::Settled => return Ok(Append::Conflict { winner_seq: None }),
                    Doubt::Unknown(reason) if Instant::now() + RETRY_PAUSE >= deadline => {
                        return Err(AppendError::Unavailable(reason));
                    }
                    Doubt::Unknown(_) => {
                        metrics::counter!("rollcall_log_append_retries_total").increment(1);
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                },
            }
        }
    }

    /// What stands right after `expected` on the subject: whoever won the compare-and-set.
    async fn read_back(
        &self,
        subject: &str,
        event_id: &str,
        expected: u64,
        deadline: Instant,
    ) -> Result<ReadBack, AppendError> {
        let which = Get::Next { seq: expected.saturating_add(1), next_by_subj: subject };
        loop {
            let unavailable = |error: &dyn std::fmt::Display| AppendError::Unavailable(error.to_string());
            if tokio::time::timeout_at(deadline, self.bus.connected()).await.is_err() {
                return Err(unavailable(&RequestError::Disconnected));
            }
            match js::get(&self.bus, &self.stream, &which).await {
                Ok(None) => return Ok(ReadBack::Nothing),
                Ok(Some(stored)) if carries_id(&stored, event_id) => return Ok(ReadBack::Ours(stored.seq)),
                Ok(Some(stored)) => return Ok(ReadBack::Other(stored.seq)),
                Err(error) if !error.is_transient() => return Err(AppendError::Other(error.to_string())),
                Err(error) if Instant::now() + RETRY_PAUSE >= deadline => return Err(unavailable(&error)),
                Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// The subject's last event, from the leader. The subject may hold wildcards.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn last(&self, subject: &str) -> Result<Option<Entry>, ReadError> {
        Ok(js::get(&self.bus, &self.stream, &Get::Last { last_by_subj: subject }).await?.map(Entry::from))
    }

    /// All events of one subject, oldest first, at least up to those that were there when it was asked for.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn history(&self, subject: &str) -> Result<Vec<Entry>, ReadError> {
        let mut entries: Vec<Entry> = Vec::new();
        while entries.len() < HISTORY_SINGLE_READS {
            let from = entries.last().map_or(1, |entry| entry.seq + 1);
            let which = Get::Next { seq: from, next_by_subj: subject };
            match js::get(&self.bus, &self.stream, &which).await? {
                Some(stored) => entries.push(stored.into()),
                None => return Ok(entries),
            }
        }
        let after = entries.last().map_or(0, |entry| entry.seq);
        let mut tail = self.tail(after, [subject]);
        loop {
            let batch = tail.next_batch(PAGE_MAX).await?;
            entries.extend(batch.entries);
            if batch.caught_up {
                return Ok(entries);
            }
        }
    }

    /// The stream's last sequence, from the leader: a projection that has seen it is current.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn last_seq(&self) -> Result<u64, ReadError> {
        Ok(js::stream_info(&self.bus, &self.stream).await?.state.last_seq)
    }

    /// The log's end, and what its leader's clock says beside `clock`: one question for both.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn head(&self, clock: &SystemClock) -> Result<Head, ReadError> {
        let asked_at = clock.now();
        let info = js::stream_info(&self.bus, &self.stream).await?;
        let reading = info.ts.map(|ts| Reading {
            asked_at,
            answered_at: clock.now(),
            wall_ahead_ms: clock.drift_ms(),
            server: Timestamp::from_millis(ts.timestamp_millis()),
        });
        Ok(Head { last_seq: info.state.last_seq, reading })
    }

    /// Last sequence of anything that matches `filter` (wildcards allowed), 0 if there is none: what a filtered
    /// [`Tail`] must have seen to be current.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn last_seq_of(&self, filter: &str) -> Result<u64, ReadError> {
        Ok(self.last(filter).await?.map_or(0, |entry| entry.seq))
    }

    /// Up to `limit` (at most [`PAGE_MAX`]) events after sequence `after`, of the subjects in `filter` or of all.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read_range(&self, after: u64, limit: usize, filter: &[&str]) -> Result<Page, ReadError> {
        let limit = limit.clamp(1, PAGE_MAX);
        let mut tail = self.tail(after, filter.iter().copied()).with_batch(limit);
        let mut entries = Vec::new();
        let mut more = true;
        while more && entries.len() < limit {
            let batch = tail.next_batch(limit - entries.len()).await?;
            entries.extend(batch.entries);
            more = !batch.caught_up;
        }
        let next_after = entries.last().map_or(after, |entry: &Entry| entry.seq);
        Ok(Page { entries, next_after, more })
    }

    /// Follows the log after sequence `after_seq`, of the given subjects (wildcards allowed) or of all if none.
    pub fn tail<'a>(&self, after_seq: u64, filter_subjects: impl IntoIterator<Item = &'a str>) -> Tail {
        let filters = filter_subjects.into_iter().map(str::to_owned).collect();
        Tail::new(self.bus.clone(), self.stream.to_string(), after_seq, filters)
    }

    /// Follows what the log took at `time` (by the server's clock) or later, otherwise as [`Self::tail`].
    pub fn tail_since<'a>(
        &self,
        time: Timestamp,
        filter_subjects: impl IntoIterator<Item = &'a str>,
    ) -> Tail {
        self.tail(0, filter_subjects).starting_at(time)
    }
}

enum ReadBack {
    Ours(u64),
    Other(u64),
    Nothing,
}

/// What is left open after a try.
enum Doubt {
    /// The server decided against it (or says that it has it already).
    Settled,
    /// Nobody knows whether it landed.
    Unknown(String),
}

fn judge(error: JsError, bytes: usize) -> Result<Doubt, AppendError> {
    match error {
        JsError::Unavailable(RequestError::TooLarge) => Err(AppendError::TooLarge { bytes }),
        JsError::Unavailable(reason) => Ok(Doubt::Unknown(reason.to_string())),
        JsError::Refused(refusal) => match refusal.err_code {
            code::WRONG_LAST_SEQUENCE | code::WRONG_LAST_SEQUENCE_CONSTANT => Ok(Doubt::Settled),
            code::MESSAGE_TOO_LARGE => Err(AppendError::TooLarge { bytes }),
            _ if js::is_full(&refusal) => Err(AppendError::Full(refusal.to_string())),
            _ if JsError::Refused(refusal.clone()).is_transient() => Ok(Doubt::Unknown(refusal.to_string())),
            _ => Err(AppendError::Other(refusal.to_string())),
        },
        JsError::Unreadable(reason) => Err(AppendError::Other(reason)),
    }
}

fn append_headers(event_id: &str, expected: u64) -> Result<HeaderMap, AppendError> {
    // A line break in the id would end the header: refuse what is not a plain token.
    if event_id.is_empty() || !event_id.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(AppendError::Other(format!("event id {event_id:?} is not a plain token")));
    }
    let mut headers = HeaderMap::new();
    headers.insert("Content-Type", CONTENT_TYPE);
    headers.insert("Nats-Msg-Id", event_id);
    headers.insert("Nats-Expected-Last-Subject-Sequence", expected.to_string());
    Ok(headers)
}

#[derive(Deserialize)]
struct OnlyId<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
}

fn carries_id(stored: &Stored, event_id: &str) -> bool {
    match stored.header("Nats-Msg-Id") {
        Some(id) => id == event_id,
        None => serde_json::from_slice::<OnlyId<'_>>(&stored.payload).is_ok_and(|event| event.id == event_id),
    }
}
