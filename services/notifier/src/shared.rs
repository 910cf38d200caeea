//! What all parts of a running notifier share.

use std::sync::{
    Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicUsize, Ordering},
};

use rollcall_core::subject::Subjects;
use rollcall_nats::EventLog;
use tokio::sync::{Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    feed::{Feed, FeedLimits},
    state::{ENDED_KEPT_MAX, Model},
};

/// Subscribers (SSE and WebSocket together) of one notifier; more are answered 503.
pub const SUBSCRIBERS_MAX: usize = 8_000;
/// Pages of old events that are read from the log at once, over all subscribers that resume.
pub const LOG_READS_MAX: usize = 8;

/// Bounds that tests make small.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The ring of the newest events.
    pub feed: FeedLimits,
    /// Ended executions in memory.
    pub ended_kept: usize,
    /// Subscribers.
    pub subscribers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { feed: FeedLimits::default(), ended_kept: ENDED_KEPT_MAX, subscribers: SUBSCRIBERS_MAX }
    }
}

/// Shared by the follower, the subscribers and the API.
#[derive(Debug)]
pub struct Shared {
    /// The fleet's subjects.
    pub subjects: Subjects,
    /// The log.
    pub log: EventLog,
    /// The newest events.
    pub feed: Feed,
    /// Subscribers, ended when it is cancelled.
    pub shutdown: CancellationToken,
    /// Connections and WebSockets, waited for at the end.
    pub tasks: TaskTracker,
    /// Bounds reads of old events.
    pub log_reads: Semaphore,
    model: RwLock<Model>,
    ready: watch::Sender<bool>,
    subscribers: AtomicUsize,
    subscribers_max: usize,
}

impl Shared {
    /// Nothing read yet.
    #[must_use]
    pub fn new(subjects: Subjects, log: EventLog, limits: Limits, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            subjects,
            log,
            feed: Feed::new(limits.feed),
            shutdown,
            tasks: TaskTracker::new(),
            log_reads: Semaphore::new(LOG_READS_MAX),
            model: RwLock::new(Model::new(limits.ended_kept)),
            ready: watch::Sender::new(false),
            subscribers: AtomicUsize::new(0),
            subscribers_max: limits.subscribers,
        })
    }

    /// The read model. Never held over an await.
    pub fn model(&self) -> RwLockReadGuard<'_, Model> {
        // A panic ends the process (the service's panic hook), so nobody sees a half-folded model.
        self.model.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The read model, for the follower only.
    pub fn model_mut(&self) -> RwLockWriteGuard<'_, Model> {
        self.model.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the log has been read to its end since the start.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// It has been read to its end. True if that is news.
    pub fn set_ready(&self) -> bool {
        !self.ready.send_replace(true)
    }

    /// A place among the subscribers, if there is one.
    #[must_use]
    pub fn subscriber(self: &Arc<Self>, kind: &'static str) -> Option<Place> {
        let free = |count: usize| (count < self.subscribers_max).then_some(count + 1);
        let taken = self.subscribers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, free).is_ok();
        taken.then(|| {
            metrics::gauge!("rollcall_notifier_subscribers", "kind" => kind).increment(1.0);
            Place { shared: Arc::clone(self), kind }
        })
    }

    /// Subscribers now.
    #[must_use]
    pub fn subscribers(&self) -> usize {
        self.subscribers.load(Ordering::SeqCst)
    }
}

/// A place among the subscribers; free again when dropped.
#[derive(Debug)]
pub struct Place {
    shared: Arc<Shared>,
    /// `sse` or `ws`.
    pub kind: &'static str,
}

impl Place {
    /// What it belongs to.
    #[must_use]
    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.subscribers.fetch_sub(1, Ordering::SeqCst);
        metrics::gauge!("rollcall_notifier_subscribers", "kind" => self.kind).decrement(1.0);
    }
}
