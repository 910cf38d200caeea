//! A subscriber's place in the log: old events from the log, then the newest from the feed, without a gap.
//!
//! The hand-over needs no coordination: the place is a sequence. As long as the feed no longer holds what follows
//! it, a page is read from the log; once the feed does, the feed is read. Pages and ring overlap, never leave a hole.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rollcall_core::Pool;
use rollcall_nats::{Page, ReadError};
use tokio::sync::watch;

use crate::{
    entry::{About, read_entry},
    feed::Collected,
    filter::Filter,
    follow::fold_history,
    frame::Frame,
    shared::{Place, Shared},
};

/// Events read from the log at once.
const PAGE_EVENTS: usize = 500;
/// Bytes of events handed over at once, roughly: one write to the socket.
pub const BATCH_BYTES: usize = 64 * 1024;
/// Tries to read a page from a log that does not answer.
const READ_TRIES_MAX: u32 = 120;
/// Time between two of them.
const READ_PAUSE: Duration = Duration::from_millis(500);
/// Pools of old executions remembered while resuming with a pool filter.
const POOLS_KNOWN_MAX: usize = 1000;

/// Why a subscription ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was live and did not keep up.
    Slow,
    /// Old events can't be read from the log.
    LogUnreadable(String),
}

/// One subscriber.
#[derive(Debug)]
pub struct Subscription {
    place: Place,
    filter: Filter,
    reader: LogReader,
    /// Everything that matches up to here was handed over.
    cursor: u64,
    /// It has reached the feed's head once.
    live: bool,
    head: watch::Receiver<u64>,
    page: VecDeque<Arc<Frame>>,
    page_end: u64,
    read_tries: u32,
}

impl Subscription {
    /// A subscriber that wants what matches and comes after `after`.
    #[must_use]
    pub fn new(place: Place, filter: Filter, after: u64) -> Self {
        let shared = place.shared();
        let reader = LogReader::new(shared, filter.clone());
        let head = shared.feed.watch();
        Self {
            place,
            filter,
            reader,
            cursor: after,
            live: false,
            head,
            page: VecDeque::new(),
            page_end: 0,
            read_tries: 0,
        }
    }

    /// Sequence to resume after: everything up to it was handed over.
    #[must_use]
    pub const fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Waits until there is something and hands over about [`BATCH_BYTES`] of it, in order. Cancelling loses
    /// nothing: what was handed over and the place move in one step.
    pub async fn next(&mut self, mut take: impl FnMut(&Arc<Frame>)) -> Result<(), Ended> {
        loop {
            if let Some(count) = self.take_page(&mut take) {
                self.count(count);
                return Ok(());
            }
            let (mut count, mut bytes) = (0, 0);
            let collected = self.place.shared().feed.collect(self.cursor, &self.filter, |frame| {
                take(frame);
                count += 1;
                bytes += frame.bytes.len();
                bytes < BATCH_BYTES
            });
            match collected {
                Collected::UpTo { seq, all } => {
                    self.cursor = seq;
                    self.live |= all;
                    if count > 0 {
                        self.count(count);
                        return Ok(());
                    }
                    let cursor = self.cursor;
                    // The sender lives in what the place holds.
                    let _ = self.head.wait_for(|head| *head > cursor).await;
                }
                Collected::FellOut if self.live => {
                    metrics::counter!("rollcall_notifier_slow_subscribers_total", "kind" => self.place.kind)
                        .increment(1);
                    tracing::info!(kind = self.place.kind, after = self.cursor, "subscriber is too slow");
                    return Err(Ended::Slow);
                }
                Collected::FellOut => Box::pin(self.read_page()).await?,
            }
        }
    }

    fn count(&self, events: u64) {
        metrics::counter!("rollcall_notifier_deliveries_total", "kind" => self.place.kind).increment(events);
    }

    fn take_page(&mut self, take: &mut impl FnMut(&Arc<Frame>)) -> Option<u64> {
        let (mut count, mut bytes) = (0, 0);
        while bytes < BATCH_BYTES {
            let Some(frame) = self.page.pop_front() else { break };
            take(&frame);
            self.cursor = frame.seq;
            count += 1;
            bytes += frame.bytes.len();
        }
        if count == 0 {
            return None;
        }
        if self.page.is_empty() {
            self.page = VecDeque::new();
            self.cursor = self.page_end;
        }
        Some(count)
    }

    async fn read_page(&mut self) -> Result<(), Ended> {
        let page = match self.reader.page(self.cursor, PAGE_EVENTS).await {
            Ok(page) => page,
            Err(ReadError::Unavailable(reason)) if self.read_tries < READ_TRIES_MAX => {
                self.read_tries += 1;
                tracing::debug!(%reason, "old events not read, trying again");
                tokio::time::sleep(READ_PAUSE).await;
                return Ok(());
            }
            Err(error) => return Err(Ended::LogUnreadable(error.to_string())),
        };
        self.read_tries = 0;
        if page.frames.is_empty() {
            self.cursor = page.end;
        }
        self.page = page.frames;
        self.page_end = page.end;
        Ok(())
    }
}

/// What matches in one page of the log.
#[derive(Debug)]
pub struct MatchingPage {
    /// In order.
    pub frames: VecDeque<Arc<Frame>>,
    /// Everything that matches up to here is in it.
    pub end: u64,
    /// There was more in the log at the time.
    pub more: bool,
    /// Entries that were read for it.
    pub looked_at: usize,
}

/// Reads a page and says up to where it has everything: to its end, or, when it ends the log, to what had been seen
/// of the log *before* it was read. What came meanwhile is not in the page and must not be skipped.
async fn read_covering(
    seen: impl FnOnce() -> u64,
    read: impl Future<Output = Result<Page, ReadError>>,
) -> Result<(Page, u64), ReadError> {
    let seen = seen();
    let page = read.await?;
    let end = if page.more { page.next_after } else { page.next_after.max(seen) };
    Ok((page, end))
}

/// Reads old events that match a filter.
#[derive(Debug)]
pub struct LogReader {
    shared: Arc<Shared>,
    filter: Filter,
    subjects: Vec<String>,
    pools: HashMap<String, Option<Pool>>,
}

impl LogReader {
    /// A reader of what matches.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, filter: Filter) -> Self {
        let subjects = filter.log_subjects(&shared.subjects);
        Self { shared: Arc::clone(shared), filter, subjects, pools: HashMap::new() }
    }

    /// The next entries after `after`, at most `limit` of them before the filter.
    pub async fn page(&mut self, after: u64, limit: usize) -> Result<MatchingPage, ReadError> {
        let shared = Arc::clone(&self.shared);
        let (page, end) = read_covering(|| shared.feed.head(), self.read(after, limit)).await?;
        let mut frames = VecDeque::new();
        for entry in &page.entries {
            let Ok(event) = read_entry(&self.shared.subjects, &entry.subject, &entry.bytes) else { continue };
            let mut about = About::of(&event);
            if self.filter.pool.is_some() {
                about.pool = self.pool_of(&about).await?;
            }
            if self.filter.matches(&about) {
                frames.push_back(Frame::new(entry.seq, about, entry.bytes.clone()));
            }
        }
        Ok(MatchingPage { frames, end, more: page.more, looked_at: page.entries.len() })
    }

    async fn read(&self, after: u64, limit: usize) -> Result<Page, ReadError> {
        if self.subjects.is_empty() {
            return Ok(Page { entries: Vec::new(), next_after: after, more: false });
        }
        let Ok(_permit) = self.shared.log_reads.acquire().await else {
            return Err(ReadError::Refused("shutting down".to_owned()));
        };
        let subjects: Vec<&str> = self.subjects.iter().map(String::as_str).collect();
        self.shared.log.read_range(after, limit, &subjects).await
    }

    /// The pool an old event concerns: what the model knows, else what the execution's first event says.
    async fn pool_of(&mut self, about: &About) -> Result<Option<Pool>, ReadError> {
        if let Some(pool) = self.shared.model().pool_of(about) {
            return Ok(Some(pool));
        }
        let Some(execution) = &about.execution else { return Ok(None) };
        if let Some(pool) = self.pools.get(execution.as_str()) {
            return Ok(pool.clone());
        }
        let history = self.shared.log.history(&self.shared.subjects.execution_event(execution)).await?;
        let pool = fold_history(&self.shared, &history).map(|execution| execution.request.pool);
        if self.pools.len() == POOLS_KNOWN_MAX {
            self.pools.clear();
        }
        self.pools.insert(execution.as_str().to_owned(), pool.clone());
        Ok(pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    async fn end(next_after: u64, more: bool) -> u64 {
        let head = AtomicU64::new(5);
        let page = async {
            // The log goes on while the page is read.
            head.store(9, Ordering::SeqCst);
            Ok(Page { entries: Vec::new(), next_after, more })
        };
        read_covering(|| head.load(Ordering::SeqCst), page).await.unwrap().1
    }

    #[tokio::test]
    async fn a_page_covers_what_was_seen_before_it_was_read_and_nothing_later() {
        assert_eq!(end(3, false).await, 5, "nothing that matches is between 3 and 5");
        assert_eq!(end(7, false).await, 7, "the log may be ahead of what was seen");
        assert_eq!(end(3, true).await, 3, "there is more between 3 and 5");
    }
}
