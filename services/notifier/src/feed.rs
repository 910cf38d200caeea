//! The newest events, shared by all subscribers: one bounded ring, and each subscriber only a place in it.
//!
//! Nobody has a queue of his own, so a slow subscriber costs nothing and delays nobody: the ring moves on, and who
//! falls out of it is told where to resume.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use tokio::sync::watch;

use crate::{filter::Filter, frame::Frame};

/// Events the ring holds.
pub const FEED_EVENTS_MAX: usize = 16_384;
/// Bytes the ring's events may take, renderings included.
pub const FEED_BYTES_MAX: usize = 48 * 1024 * 1024;
/// Recoveries and system events that are remembered beyond the ring, for "the last ones" of a type.
pub const NOTABLE_MAX: usize = 256;

/// Bounds of a [`Feed`].
#[derive(Debug, Clone, Copy)]
pub struct FeedLimits {
    /// Most events.
    pub events: usize,
    /// Most bytes.
    pub bytes: usize,
}

impl Default for FeedLimits {
    fn default() -> Self {
        Self { events: FEED_EVENTS_MAX, bytes: FEED_BYTES_MAX }
    }
}

#[derive(Debug, Default)]
struct Ring {
    frames: VecDeque<Arc<Frame>>,
    notable: VecDeque<Arc<Frame>>,
    weight: usize,
    /// Everything after this sequence is still here.
    from: u64,
    /// Everything up to this sequence was pushed.
    head: u64,
}

/// What [`Feed::collect`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collected {
    /// What follows the given place is no longer (or not all) here.
    FellOut,
    /// The ring was looked through.
    UpTo {
        /// Up to this sequence.
        seq: u64,
        /// To its end.
        all: bool,
    },
}

/// The ring, and the news that it moved.
#[derive(Debug)]
pub struct Feed {
    ring: RwLock<Ring>,
    head: watch::Sender<u64>,
    limits: FeedLimits,
}

impl Feed {
    /// An empty feed: it begins at the log's beginning.
    #[must_use]
    pub fn new(limits: FeedLimits) -> Self {
        Self { ring: RwLock::default(), head: watch::Sender::new(0), limits }
    }

    // Every change of the ring is complete before anything in it can panic.
    fn read(&self) -> RwLockReadGuard<'_, Ring> {
        self.ring.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Ring> {
        self.ring.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what was read of the log, in its order; `head` is the last sequence read, valid entry or not.
    pub fn push(&self, frames: impl IntoIterator<Item = Arc<Frame>>, head: u64) {
        {
            let mut ring = self.write();
            for frame in frames {
                ring.weight += frame.weight();
                ring.frames.push_back(frame);
            }
            ring.head = ring.head.max(head);
            while ring.frames.len() > self.limits.events || ring.weight > self.limits.bytes {
                let Some(old) = ring.frames.pop_front() else { break };
                ring.weight -= old.weight();
                ring.from = old.seq;
                if old.about.kind == "execution.recovered" || old.about.kind.starts_with("system.") {
                    if ring.notable.len() == NOTABLE_MAX {
                        ring.notable.pop_front();
                    }
                    ring.notable.push_back(old);
                }
            }
        }
        self.head.send_if_modified(|now| {
            let moved = head > *now;
            *now = head.max(*now);
            moved
        });
    }

    /// Last sequence that was pushed.
    #[must_use]
    pub fn head(&self) -> u64 {
        *self.head.borrow()
    }

    /// Tells when the head moves.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    /// Hands matching frames after `after` to `take` until it says that it has enough.
    pub fn collect(
        &self,
        after: u64,
        filter: &Filter,
        mut take: impl FnMut(&Arc<Frame>) -> bool,
    ) -> Collected {
        let ring = self.read();
        if after < ring.from {
            return Collected::FellOut;
        }
        let start = ring.frames.partition_point(|frame| frame.seq <= after);
        for frame in ring.frames.range(start..) {
            if filter.matches(&frame.about) && !take(frame) {
                return Collected::UpTo { seq: frame.seq, all: false };
            }
        }
        Collected::UpTo { seq: ring.head.max(after), all: true }
    }

    /// The last `limit` matching events that are remembered, oldest first.
    #[must_use]
    pub fn last(&self, filter: &Filter, limit: usize) -> Vec<Arc<Frame>> {
        let ring = self.read();
        let newest_first = ring.frames.iter().rev().chain(ring.notable.iter().rev());
        let mut found: Vec<_> =
            newest_first.filter(|frame| filter.matches(&frame.about)).take(limit).cloned().collect();
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{entry::About, samples};
    use bytes::Bytes;

    fn frame(seq: u64, recovered: bool) -> Arc<Frame> {
        let event =
            if recovered { samples::recovered("e1", "a1", 1) } else { samples::submitted("e1", None) };
        Frame::new(seq, About::of(&event), Bytes::from(event.encode()))
    }

    const fn up_to(seq: u64) -> Collected {
        Collected::UpTo { seq, all: true }
    }

    fn after(feed: &Feed, after: u64) -> (Vec<u64>, Collected) {
        let mut seqs = Vec::new();
        let end = feed.collect(after, &Filter::default(), |f| {
            seqs.push(f.seq);
            true
        });
        (seqs, end)
    }

    #[test]
    fn a_place_in_the_ring_gets_exactly_what_follows() {
        let feed = Feed::new(FeedLimits::default());
        feed.push([frame(1, false), frame(2, false), frame(5, false)], 6);
        assert_eq!(after(&feed, 0), (vec![1, 2, 5], up_to(6)));
        assert_eq!(after(&feed, 2), (vec![5], up_to(6)));
        assert_eq!(after(&feed, 6), (vec![], up_to(6)));
        assert_eq!(after(&feed, 9), (vec![], up_to(9)), "a place ahead of us stays where it is");
        assert_eq!(feed.head(), 6);
    }

    #[test]
    fn it_stops_where_the_taker_has_enough() {
        let feed = Feed::new(FeedLimits::default());
        feed.push((1..=5).map(|seq| frame(seq, false)), 5);
        let mut taken = 0;
        let end = feed.collect(1, &Filter::default(), |_| {
            taken += 1;
            taken < 2
        });
        assert_eq!((taken, end), (2, Collected::UpTo { seq: 3, all: false }));
    }

    #[test]
    fn what_fell_out_is_said_and_never_skipped() {
        let feed = Feed::new(FeedLimits { events: 3, bytes: usize::MAX });
        feed.push((1..=5).map(|seq| frame(seq, false)), 5);
        assert_eq!(after(&feed, 1), (vec![], Collected::FellOut));
        assert_eq!(after(&feed, 2), (vec![3, 4, 5], up_to(5)));
    }

    #[test]
    fn bytes_are_bounded_too() {
        let weight = frame(1, false).weight();
        let feed = Feed::new(FeedLimits { events: usize::MAX, bytes: weight * 2 });
        feed.push((1..=9).map(|seq| frame(seq, false)), 9);
        assert_eq!(after(&feed, 7).0, [8, 9]);
        assert!(matches!(after(&feed, 6).1, Collected::FellOut));
    }

    #[test]
    fn recoveries_are_remembered_beyond_the_ring() {
        let feed = Feed::new(FeedLimits { events: 2, bytes: usize::MAX });
        feed.push([frame(1, true), frame(2, false), frame(3, false), frame(4, true)], 4);
        let mut filter = Filter::default();
        filter.add_types("execution.recovered").unwrap();
        let seqs = |limit| feed.last(&filter, limit).iter().map(|f| f.seq).collect::<Vec<_>>();
        assert_eq!(seqs(10), [1, 4]);
        assert_eq!(seqs(1), [4]);
    }
}
