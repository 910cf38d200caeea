//! The sentry by itself: what the process finds out about its own loop and clock, and what becomes of our sight.

use std::{sync::Arc, time::Duration};

use rollcall_core::{Prefix, Timestamp};
use rollcall_nats::canary::{CANARY_INTERVAL, CANARY_TIMEOUT};
use rollcall_service::{Jump, LoopHealth, Stall};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::DropGuard;
use watchdog::{
    ears, sentry,
    shared::Shared,
    sight::{STALL_VOID_MS, Void},
};

use crate::harness::{Fleet, PATIENCE};

/// A sentry with a heartbeat reader, and the process's view of itself in the test's hands.
pub(crate) struct Post {
    pub(crate) fleet: Fleet,
    pub(crate) shared: Arc<Shared>,
    health: watch::Sender<LoopHealth>,
    /// How far the log was followed.
    pub(crate) seen: watch::Sender<u64>,
    _stop: DropGuard,
}

impl Post {
    /// It sees.
    pub(crate) async fn start() -> Self {
        let fleet = Fleet::start().await;
        let context = fleet.context();
        let shared = Shared::new(&fleet.bus, &context, Prefix::default());
        let stop = context.shutdown.clone();
        let heartbeats = fleet.bus.subscribe(shared.subjects.all_heartbeats()).await.unwrap();
        let (reader, alive, ended) =
            (Arc::clone(&shared), context.register_loop("heartbeats", PATIENCE), stop.clone());
        tokio::spawn(async move { ears::listen(&reader, heartbeats, alive, ended).await });
        let health = watch::Sender::new(LoopHealth::default());
        let (seen, seen_by_sentry) = watch::channel(0);
        tokio::spawn(sentry::watch_self(
            Arc::clone(&shared),
            seen_by_sentry,
            health.subscribe(),
            stop.clone(),
        ));
        shared.with(|world, _| world.sight.set_caught_up(true));
        let post = Self { fleet, shared, health, seen, _stop: stop.drop_guard() };
        post.sees_since(Timestamp::default()).await;
        post
    }

    /// Waits until sight began after this moment, and returns when.
    pub(crate) async fn sees_since(&self, before: Timestamp) -> Timestamp {
        let since = || self.shared.with(|world, _| world.sight.since());
        self.fleet.until("it sees", async || since().is_some_and(|since| since > before)).await;
        since().unwrap()
    }

    /// The process finds something out about itself.
    fn find(&self, change: impl FnOnce(&mut LoopHealth)) {
        self.health.send_modify(change);
    }

    /// What became of it: blinded for this reason, and seeing anew.
    async fn blinded(&self, before: Timestamp, why: Void) -> Timestamp {
        self.fleet
            .until("it was blinded", async || self.shared.with(|world, _| world.sight.trouble() == why))
            .await;
        self.sees_since(before).await
    }
}

fn stall(health: &mut LoopHealth, lasted_ms: u64) {
    let lasted = Duration::from_millis(lasted_ms);
    health.stalls += 1;
    health.last_stall = Some(Stall { at: Instant::now(), lasted });
    health.worst_stall = health.worst_stall.max(lasted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_of_a_heartbeat_and_a_jump_of_the_clock_make_evidence_void() {
    let post = Post::start().await;
    let first = post.sees_since(Timestamp::default()).await;
    post.find(|health| stall(health, STALL_VOID_MS));
    let second = post.blinded(first, Void::Stalled).await;
    post.find(|health| {
        health.jumps += 1;
        health.last_jump = Some(Jump { at: Instant::now(), by_ms: -3_600_000 });
    });
    let third = post.blinded(second, Void::ClockJump).await;
    // Of two stalls between two looks the longer one counts, though it was not the last.
    post.find(|health| {
        stall(health, 2 * STALL_VOID_MS);
        stall(health, STALL_VOID_MS / 5);
    });
    let fourth = post.blinded(third, Void::Stalled).await;
    // A short one leaves evidence alone: the jump behind it is all that blinds.
    let epoch = post.shared.with(|world, _| world.sight.epoch());
    post.find(|health| stall(health, STALL_VOID_MS - 1));
    post.find(|health| health.jumps += 1);
    post.blinded(fourth, Void::ClockJump).await;
    assert_eq!(post.shared.with(|world, _| world.sight.epoch()), epoch + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_blinds_us_the_eyes_are_opened_at_once() {
    let post = Post::start().await;
    let before = post.sees_since(Timestamp::default()).await;
    let blinded = Instant::now();
    post.shared.with(|world, _| world.void(Void::Gaps));
    post.sees_since(before).await;
    // Not only when the next canary is due by itself.
    assert!(blinded.elapsed() < CANARY_INTERVAL / 2, "{:?}", blinded.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_that_does_not_come_back_blinds_until_one_does() {
    let post = Post::start().await;
    let before = post.sees_since(Timestamp::default()).await;
    let begun = Instant::now();
    // The client itself takes a link for lost after some seconds without an answer: the canary is sooner.
    post.fleet.until("a canary is due soon", async || begun.elapsed() > CANARY_INTERVAL * 3 / 4).await;
    post.fleet.server.freeze().unwrap();
    let trouble = || post.shared.with(|world, _| (world.sight.since(), world.sight.trouble()));
    post.fleet.until("it is blind", async || trouble().0.is_none()).await;
    assert_eq!(trouble().1, Void::CanaryLost);
    post.fleet.server.thaw().unwrap();
    post.sees_since(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_is_noticed_while_a_canary_is_on_its_way() {
    let post = Post::start().await;
    let begun = Instant::now();
    post.fleet.until("a canary is due soon", async || begun.elapsed() > CANARY_INTERVAL * 3 / 4).await;
    post.fleet.server.freeze().unwrap();
    let sent = CANARY_INTERVAL + CANARY_TIMEOUT / 4;
    post.fleet.until("it was sent, and hangs", async || begun.elapsed() > sent).await;
    let trouble = || post.shared.with(|world, _| (world.sight.since(), world.sight.trouble()));
    assert!(trouble().0.is_some(), "{:?}", trouble());
    post.find(|health| stall(health, STALL_VOID_MS));
    post.fleet.until("it is blind", async || trouble().0.is_none()).await;
    assert!(begun.elapsed() < CANARY_INTERVAL + CANARY_TIMEOUT, "{:?}", begun.elapsed());
    assert_eq!(trouble().1, Void::Stalled);
}
