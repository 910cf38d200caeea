//! The shared middle of a running agent: its book behind a lock, its live work, and what its tasks wake each other with.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use rollcall_core::{
    subject::Subjects,
    time::{Clock, SystemClock},
    wire::{AgentState, Claim, ExecutionsReply, Heartbeat, Outcome, OwnedClaim},
};
use rollcall_nats::Bus;
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    builder::Profile,
    control::Control,
    state::{Book, Key},
    worker::{Progress, StopSender},
};

/// Where one execution is in its life here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Alive,
    /// The work is dead; its report is on its way.
    Dead(Outcome),
    /// The report is acknowledged.
    Acknowledged(Outcome),
}

/// The handles on one execution that is held.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) stop: StopSender,
    pub(crate) life: watch::Receiver<Life>,
    pub(crate) progress: Progress,
}

/// What the lock protects: both change together.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) book: Book,
    pub(crate) live: HashMap<Key, Live>,
}

/// One running agent. Its tasks share it.
#[derive(Debug)]
pub(crate) struct Shell<W> {
    pub(crate) bus: Bus,
    pub(crate) subjects: Subjects,
    pub(crate) profile: Arc<Profile>,
    pub(crate) control: Arc<Control>,
    pub(crate) worker: Arc<W>,
    pub(crate) work: Handle,
    pub(crate) stop_grace: Duration,
    pub(crate) clock: SystemClock,
    /// Something is worth a heartbeat at once.
    pub(crate) beat_now: Notify,
    /// Ends every task of this agent.
    pub(crate) over: CancellationToken,
    inner: Mutex<Inner>,
    /// Counts changes of what is held.
    changes: watch::Sender<u64>,
}

impl<W> Shell<W> {
    #[expect(clippy::too_many_arguments, reason = "called once, each is a part of its own")]
    pub(crate) fn new(
        bus: Bus,
        subjects: Subjects,
        profile: Arc<Profile>,
        control: Arc<Control>,
        worker: Arc<W>,
        work: Handle,
        stop_grace: Duration,
        over: CancellationToken,
    ) -> Self {
        let book = Book::new(profile.capacity);
        Self {
            bus,
            subjects,
            profile,
            control,
            worker,
            work,
            stop_grace,
            clock: SystemClock::new(),
            beat_now: Notify::new(),
            over,
            inner: Mutex::new(Inner { book, live: HashMap::new() }),
            changes: watch::Sender::new(0),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing that holds the lock panics half way through a change: each is one call into the book.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes whoever waits for what is held to change.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Waits until `is_so` of what is held.
    pub(crate) async fn until(&self, mut is_so: impl FnMut(&Inner) -> bool) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if is_so(&self.lock()) {
                return;
            }
            // The sender is `self`.
            let _ = changes.changed().await;
        }
    }

    /// The next heartbeat as the bytes that travel; `state` overrides what the book says.
    pub(crate) fn heartbeat(&self, state: Option<AgentState>) -> Bytes {
        let reason = self.control.plan().woken_by.map(|trigger| trigger.reason());
        let sent_at = self.clock.now();
        let mut inner = self.lock();
        let seq = inner.book.next_seq();
        let beat = Heartbeat {
            agent_id: None,
            instance_id: self.profile.instance.as_str().into(),
            seq,
            state: state.unwrap_or_else(|| inner.book.state()),
            capacity: self.profile.capacity,
            executions: inner
                .book
                .claims()
                .map(|key| Claim {
                    id: key.execution_id.as_str().into(),
                    attempt: key.attempt,
                    progress: inner.progress(key),
                })
                .collect(),
            interval_ms: Some(self.profile.interval_ms),
            pool: Some(self.profile.pool.as_str().into()),
            timeout_ms: self.profile.timeout_ms,
            reason: reason.as_deref().map(Into::into),
            version: self.profile.version.as_deref().map(Into::into),
            labels: self.profile.labels.as_deref(),
            probe: self.profile.probe.as_deref(),
            control: None,
            sent_at: Some(sent_at),
        };
        serde_json::to_vec(&beat)
            .expect("a heartbeat holds only text, numbers and JSON that was written before")
            .into()
    }

    pub(crate) fn executions(&self) -> ExecutionsReply {
        let inner = self.lock();
        ExecutionsReply {
            instance_id: self.profile.instance.clone(),
            seq: inner.book.seq(),
            executions: inner
                .book
                .claims()
                .map(|key| OwnedClaim {
                    id: key.execution_id.clone(),
                    attempt: key.attempt,
                    progress: inner.progress(key),
                })
                .collect(),
        }
    }
}

impl Inner {
    /// How far it got, if it ever said so. What has ended and only waits for its acknowledgement names none: it does not stand
    /// still.
    #[expect(clippy::cast_precision_loss, reason = "progress beyond 2^53 only has to rise")]
    fn progress(&self, key: &Key) -> Option<f64> {
        let live = self.live.get(key).filter(|_| !self.book.is_finished(key))?;
        live.progress.get().map(|progress| progress as f64)
    }
}
