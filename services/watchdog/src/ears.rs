//! Hearing: the heartbeat subscription, and the proof that we hear.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use rollcall_core::wire::Heartbeat;
use rollcall_nats::{
    Message, Subscriber,
    canary::{CANARY_TIMEOUT, comes_back},
};
use rollcall_service::LoopBeat;
use tokio::sync::{Mutex, Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::shared::Shared;

/// Heartbeats that are taken under one lock.
const BATCH_MAX: usize = 256;
/// The loop shows that it lives this often without any heartbeat.
const IDLE_BEAT: Duration = Duration::from_secs(1);

/// The heartbeat reader as others see it.
#[derive(Debug)]
pub struct Ears {
    /// Asks the reader to say when nothing is left to read.
    poke: Notify,
    /// Counts how often it said so.
    emptied: watch::Sender<u64>,
    /// One canary at a time; whoever waits meanwhile shares the next one.
    canary: Mutex<()>,
    /// Canaries that were sent.
    begun: AtomicU64,
    /// The last of them that came back.
    back: AtomicU64,
}

impl Default for Ears {
    fn default() -> Self {
        Self {
            poke: Notify::new(),
            emptied: watch::Sender::new(0),
            canary: Mutex::new(()),
            begun: AtomicU64::new(0),
            back: AtomicU64::new(0),
        }
    }
}

impl Ears {
    /// Waits until every heartbeat that had arrived when it was called has been taken in.
    async fn drained(&self) {
        let mut emptied = self.emptied.subscribe();
        let before = *emptied.borrow_and_update();
        self.poke.notify_one();
        // Never an error: the sender lives as long as we do.
        let _ = emptied.wait_for(|count| *count > before).await;
    }
}

/// Sends a message through the bus to ourselves and waits until it is back and everything that came before it was
/// taken in. False: it did not come back in time.
pub async fn canary(shared: &Shared) -> bool {
    let ears = &shared.ears;
    // One that is sent from now on proves what we need, whoever sends it.
    let needed = ears.begun.load(Ordering::Acquire) + 1;
    let proof = async {
        let _turn = ears.canary.lock().await;
        if ears.back.load(Ordering::Acquire) >= needed {
            return true;
        }
        let number = ears.begun.fetch_add(1, Ordering::AcqRel) + 1;
        if !comes_back(&shared.bus).await {
            return false;
        }
        ears.drained().await;
        ears.back.store(number, Ordering::Release);
        true
    };
    tokio::time::timeout(CANARY_TIMEOUT, proof).await.unwrap_or(false)
}

/// Reads heartbeats until shutdown.
pub async fn listen(shared: &Shared, mut heartbeats: Subscriber, alive: LoopBeat, stop: CancellationToken) {
    let mut batch: Vec<Message> = Vec::with_capacity(BATCH_MAX);
    loop {
        tokio::select! {
            // Heartbeats first: the poke is answered only when none is ready.
            biased;
            () = stop.cancelled() => return,
            message = heartbeats.next() => match message {
                Some(message) => batch.push(message),
                None => return,
            },
            () = shared.ears.poke.notified() => {
                shared.ears.emptied.send_modify(|count| *count += 1);
                continue;
            }
            () = tokio::time::sleep(IDLE_BEAT) => {}
        }
        while batch.len() < BATCH_MAX
            && let Some(Some(message)) = heartbeats.next().now_or_never()
        {
            batch.push(message);
        }
        take(shared, &batch);
        batch.clear();
        alive.beat();
        // Under a flood the other tasks of this thread have their turn as well.
        tokio::task::yield_now().await;
    }
}

fn take(shared: &Shared, batch: &[Message]) {
    let mut malformed = 0;
    shared.with(|world, now| {
        for message in batch {
            let Some(agent) = shared.subjects.agent_of_heartbeat(&message.subject) else { continue };
            match Heartbeat::read(agent, &message.payload) {
                Ok(beat) => world.beat(agent, &beat, now),
                // The prober counts it, logs it once per source and answers it.
                Err(_) => malformed += 1,
            }
        }
        world.counters.beats_ignored += malformed;
    });
}
