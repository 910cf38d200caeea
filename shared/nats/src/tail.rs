//! Following the log: every entry once, in order, across reconnects, restarts and lost consumers.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::Message;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use rollcall_core::Timestamp;
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use crate::bus::Bus;
use crate::js::{self, Get, JsError, code};
use crate::log::Entry;
use crate::pull::{Lost, Meta, PullConfig, PullSource};

/// Messages per request to the server; the measured optimum of replay.
const TAIL_BATCH: usize = 1000;
/// How long a request stands.
const TAIL_EXPIRES: Duration = Duration::from_secs(30);
/// The server forgets a consumer that nobody pulled from for this long.
const CONSUMER_INACTIVE: Duration = Duration::from_secs(120);
/// First pause before a consumer is created again; doubles up to [`REOPEN_MAX_PAUSE`].
const REOPEN_MIN_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause before a consumer is created again.
const REOPEN_MAX_PAUSE: Duration = Duration::from_secs(1);
/// Time between two log lines about a log that does not answer.
const REOPEN_LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Why following ended. Whatever waiting can heal is waited for instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TailError {
    /// The log holds less than was read from it before, or something else: it was replaced or restored.
    #[error("the log went back: sequence {seen} was read before, now it ends at {found}")]
    LogRegressed {
        /// Sequence read before.
        seen: u64,
        /// The log's last sequence now.
        found: u64,
    },
    /// There is no such stream.
    #[error("stream {0} does not exist")]
    NoStream(String),
    /// The server refuses to serve it.
    #[error("the log can't be followed: {0}")]
    Refused(String),
    /// The connection was closed by us.
    #[error("the connection was closed")]
    Closed,
}

/// What [`Tail::next`] brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailItem {
    /// The next event.
    Entry(Entry),
    /// All that was in the log (as filtered) has been delivered: once after the start, and again after every resume.
    CaughtUp {
        /// Sequence of the last entry delivered, or where it started.
        seq: u64,
    },
}

/// What [`Tail::next_batch`] brings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// In stream order; may be empty when only `caught_up` is news.
    pub entries: Vec<Entry>,
    /// Nothing more was waiting when the last of these was sent.
    pub caught_up: bool,
}

/// A reader of the log. Dropping it lets the server forget it.
pub struct Tail {
    bus: Bus,
    stream: String,
    filters: Vec<String>,
    batch: usize,
    /// Last sequence handed out (or given at the start).
    seen: u64,
    /// Where it starts as long as nothing was handed out, if not after a sequence.
    since: Option<Timestamp>,
    /// Time of that entry, to tell it from another one of the same sequence.
    seen_time: Option<DateTime<Utc>>,
    consumer: Option<String>,
    consumer_seq: u64,
    source: Option<PullSource>,
    caught_up: bool,
    /// Not caught up yet since the start or the last resume.
    behind: bool,
    /// `behind` became false and nobody was told yet.
    announce: bool,
    pause: Duration,
    reopen_at: Option<Instant>,
    logged_at: Option<Instant>,
    ready: VecDeque<Entry>,
}

#[derive(Deserialize)]
struct ConsumerCreated {
    #[serde(default)]
    num_pending: u64,
}

impl Tail {
    pub(crate) fn new(bus: Bus, stream: String, after: u64, filters: Vec<String>) -> Self {
        Self {
            bus,
            stream,
            filters,
            batch: TAIL_BATCH,
            seen: after,
            since: None,
            seen_time: None,
            consumer: None,
            consumer_seq: 0,
            source: None,
            caught_up: false,
            behind: true,
            announce: false,
            pause: Duration::ZERO,
            reopen_at: None,
            logged_at: None,
            ready: VecDeque::new(),
        }
    }

    pub(crate) fn starting_at(mut self, since: Timestamp) -> Self {
        self.since = Some(since);
        self
    }

    pub(crate) fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch.clamp(1, TAIL_BATCH);
        self
    }

    /// Sequence of the last entry handed out.
    pub fn position(&self) -> u64 {
        self.ready.front().map_or(self.seen, |entry| entry.seq.saturating_sub(1))
    }

    /// Nothing was waiting when the last entry was sent. False from a cut until all missed entries were delivered.
    pub fn is_caught_up(&self) -> bool {
        self.caught_up && self.ready.is_empty()
    }

    /// The next entry or the news of having caught up. Waits as long as it takes; cancelling loses nothing.
    ///
    /// # Errors
    /// See [`TailError`]; the tail must not be used after one.
    pub async fn next(&mut self) -> Result<TailItem, TailError> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(TailItem::Entry(entry));
            }
            if self.announce {
                self.announce = false;
                return Ok(TailItem::CaughtUp { seq: self.seen });
            }
            self.fill(self.batch).await?;
        }
    }

    /// Up to `max` entries: at least one, or the news of having caught up. Cancelling loses nothing.
    ///
    /// # Errors
    /// See [`TailError`]; the tail must not be used after one.
    pub async fn next_batch(&mut self, max: usize) -> Result<Batch, TailError> {
        let max = max.max(1);
        while self.ready.is_empty() && !self.announce {
            self.fill(max).await?;
        }
        let take = self.ready.len().min(max);
        let entries: Vec<Entry> = self.ready.drain(..take).collect();
        let caught_up = self.is_caught_up();
        if caught_up {
            self.announce = false;
        }
        Ok(Batch { entries, caught_up })
    }

    /// Waits for one message and takes what else is there.
    async fn fill(&mut self, max: usize) -> Result<(), TailError> {
        if self.source.is_none() {
            return self.open().await;
        }
        let Some(source) = self.source.as_mut() else { return Ok(()) };
        let mut received = source.next().await;
        let mut taken = 0;
        loop {
            match received {
                Ok(message) => {
                    if !self.accept(message) {
                        return Ok(());
                    }
                    taken += 1;
                }
                Err(lost) => return self.lose(lost),
            }
            if taken >= max {
                return Ok(());
            }
            match self.source.as_mut().and_then(PullSource::try_next) {
                Some(next) => received = next,
                None => return Ok(()),
            }
        }
    }

    /// Takes one message; false if the source was given up because something is missing.
    fn accept(&mut self, message: Message) -> bool {
        let Some(meta) = message.reply.as_deref().and_then(Meta::parse) else { return true };
        if meta.consumer_seq != self.consumer_seq + 1 || meta.stream_seq <= self.seen {
            metrics::counter!("rollcall_log_tail_gaps_total").increment(1);
            tracing::warn!(stream = %self.stream, seen = self.seen, got = meta.stream_seq,
                "log delivery skipped a message, reading again from the last one");
            self.source = None;
            self.caught_up = false;
            self.behind = true;
            self.announce = false;
            return false;
        }
        self.consumer_seq = meta.consumer_seq;
        self.seen = meta.stream_seq;
        self.seen_time = Some(meta.time);
        self.pause = Duration::ZERO;
        self.caught_up = meta.pending == 0;
        if self.caught_up && self.behind {
            self.behind = false;
            self.announce = true;
        } else if !self.caught_up && self.announce {
            // It is the end no more, and nobody was told: there is another one to come.
            self.behind = true;
            self.announce = false;
        }
        self.ready.push_back(Entry {
            seq: meta.stream_seq,
            subject: message.subject,
            bytes: message.payload,
            time: meta.time,
        });
        true
    }

    fn lose(&mut self, lost: Lost) -> Result<(), TailError> {
        self.source = None;
        self.caught_up = false;
        self.behind = true;
        self.announce = false;
        metrics::counter!("rollcall_log_tail_resumes_total").increment(1);
        match lost {
            Lost::Closed => Err(TailError::Closed),
            Lost::Reconnected => Ok(()),
            other => {
                tracing::info!(stream = %self.stream, seen = self.seen, reason = ?other, "log delivery ended, resuming");
                Ok(())
            }
        }
    }

    /// Checks that the log still is the one that was read, and starts reading after the last entry.
    async fn open(&mut self) -> Result<(), TailError> {
        self.forget_consumer();
        // Kept over calls: whoever gives up waiting and calls again must not start the pause anew.
        let until = *self.reopen_at.get_or_insert_with(|| Instant::now() + self.pause);
        tokio::time::sleep_until(until).await;
        self.reopen_at = None;
        self.pause = (self.pause * 2).clamp(REOPEN_MIN_PAUSE, REOPEN_MAX_PAUSE);
        self.bus.connected().await;
        match self.try_open().await {
            Ok(()) => {
                self.logged_at = None;
                Ok(())
            }
            Err(OpenError::Fatal(error)) => Err(error),
            Err(OpenError::Again(reason)) => {
                if self.logged_at.is_none_or(|at| at.elapsed() >= REOPEN_LOG_INTERVAL) {
                    self.logged_at = Some(Instant::now());
                    tracing::warn!(stream = %self.stream, seen = self.seen, %reason, "the log does not answer, trying again");
                }
                Ok(())
            }
        }
    }

    async fn try_open(&mut self) -> Result<(), OpenError> {
        self.check_regression().await?;
        let name = format!("tail-{}", self.bus.new_token());
        self.consumer = Some(name.clone());
        let mut config = json!({
            "name": name,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": true,
            "num_replicas": 1,
            "inactive_threshold": u64::try_from(CONSUMER_INACTIVE.as_nanos()).unwrap_or(u64::MAX),
        });
        if let Some(since) = self.since.filter(|_| self.seen == 0) {
            config["deliver_policy"] = json!("by_start_time");
            config["opt_start_time"] = json!(since);
        } else {
            config["deliver_policy"] = json!("by_start_sequence");
            config["opt_start_seq"] = json!(self.seen + 1);
        }
        if !self.filters.is_empty() {
            config["filter_subjects"] = json!(self.filters);
        }
        let request = json!({ "stream_name": self.stream, "config": config, "action": "create" });
        // Subscribed before the consumer is there, on the link it was checked on.
        let pull = PullConfig { batch: self.batch, expires: TAIL_EXPIRES };
        let source =
            PullSource::start(&self.bus, &self.stream, &name, pull).await.map_err(|lost| match lost {
                Lost::Closed => OpenError::Fatal(TailError::Closed),
                other => OpenError::Again(format!("{other:?}")),
            })?;
        let subject = format!("CONSUMER.CREATE.{}.{name}", self.stream);
        let created: ConsumerCreated =
            js::call(&self.bus, &subject, &request).await.map_err(|error| self.classify(error))?;
        self.consumer_seq = 0;
        self.source = Some(source);
        if created.num_pending == 0 {
            self.caught_up = true;
            self.behind = false;
            self.announce = true;
        }
        Ok(())
    }

    async fn check_regression(&self) -> Result<(), OpenError> {
        let found = match js::stream_info(&self.bus, &self.stream).await {
            Ok(info) => info.state.last_seq,
            Err(error) => return Err(self.classify(error)),
        };
        let regressed = OpenError::Fatal(TailError::LogRegressed { seen: self.seen, found });
        if found < self.seen {
            return Err(regressed);
        }
        // A log that was replaced and has grown past us again: what stands at our sequence is another message.
        if let Some(time) = self.seen_time {
            match js::get(&self.bus, &self.stream, &Get::Seq { seq: self.seen }).await {
                Ok(Some(stored)) if stored.time == time => {}
                Ok(_) => return Err(regressed),
                Err(error) => return Err(self.classify(error)),
            }
        }
        Ok(())
    }

    fn classify(&self, error: JsError) -> OpenError {
        if error.code() == Some(code::STREAM_NOT_FOUND) {
            return OpenError::Fatal(match self.seen {
                0 => TailError::NoStream(self.stream.clone()),
                seen => TailError::LogRegressed { seen, found: 0 },
            });
        }
        if error.is_transient() {
            OpenError::Again(error.to_string())
        } else {
            OpenError::Fatal(TailError::Refused(error.to_string()))
        }
    }

    /// Tells the server that the last consumer is not needed; it would forget it by itself after a while.
    fn forget_consumer(&mut self) {
        let Some(name) = self.consumer.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let bus = self.bus.clone();
        let subject = format!("$JS.API.CONSUMER.DELETE.{}.{name}", self.stream);
        runtime.spawn(async move {
            let reply = bus.new_inbox();
            if let Err(error) = bus.publish_with_reply(subject, reply, Bytes::new()).await {
                tracing::debug!(%error, "old consumer not deleted, the server will forget it");
            }
        });
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.forget_consumer();
    }
}

enum OpenError {
    Again(String),
    Fatal(TailError),
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::testing::NatsServer;
    use crate::{EventLog, ensure_streams};

    /// What was the end a moment ago is none any more: that nobody has been told of it must not stop the reading.
    #[tokio::test]
    async fn an_end_that_is_passed_before_anybody_was_told_is_none() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("t").await;
        ensure_streams(&bus).await.unwrap();
        let log = EventLog::new(&bus);
        let append = async |id: &str| {
            log.append(&format!("t.event.agent.{id}"), id, Bytes::from_static(b"{}"), 0).await.unwrap();
        };
        append("a").await;
        let mut tail = log.tail(0, []);
        tail.open().await.unwrap();
        let end = tail.source.as_mut().unwrap().next().await.unwrap();
        assert!(tail.accept(end));
        append("b").await;
        let mut more = tail.source.as_mut().unwrap().next().await.unwrap();
        // Behind this one another waits by now: the last token of its subject says so.
        let meta = more.reply.take().unwrap();
        more.reply = Some(format!("{}.1", meta.rsplit_once('.').unwrap().0).into());
        assert!(tail.accept(more));
        let batch = tail.next_batch(10).await.unwrap();
        assert_eq!((batch.entries.len(), batch.caught_up), (2, false));
        append("c").await;
        let batch =
            tokio::time::timeout(Duration::from_secs(30), tail.next_batch(10)).await.unwrap().unwrap();
        assert_eq!((batch.entries.len(), batch.caught_up), (1, true), "{batch:?}");
    }

    #[tokio::test]
    async fn a_delivery_that_skips_is_read_again() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("t").await;
        ensure_streams(&bus).await.unwrap();
        let log = EventLog::new(&bus);
        let mut tail = log.tail(0, []);
        tail.open().await.unwrap();
        for id in ["a", "b", "c"] {
            log.append(&format!("t.event.agent.{id}"), id, Bytes::from_static(b"{}"), 0).await.unwrap();
        }
        // The first delivery is lost on the way.
        let lost = tail.source.as_mut().unwrap().next().await.unwrap();
        assert_eq!(lost.subject.as_str(), "t.event.agent.a");
        let mut seqs = Vec::new();
        while seqs.len() < 3 {
            let item = tokio::time::timeout(Duration::from_secs(30), tail.next()).await.unwrap();
            if let TailItem::Entry(entry) = item.unwrap() {
                seqs.push(entry.seq);
            }
        }
        assert_eq!(seqs, [1, 2, 3]);
    }
}
