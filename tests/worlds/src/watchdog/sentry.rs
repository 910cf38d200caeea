//! The watchdog watching itself: sight, its clock, and the breaker.

use std::rc::Rc;

use rollcall_core::event::{SystemEvent, SystemEventKind};
use watchdog::sight::{STALL_VOID_MS, Void};

use super::Watchdog;
use crate::{
    Defect,
    clock::Head,
    exec::pause,
    stage::{CANARY_TIMEOUT_MS, Unreachable},
};

const CANARY_INTERVAL_MS: u64 = 5_000;
const BLIND_INTERVAL_MS: u64 = 100;
const BREAKER_INTERVAL_MS: u64 = 500;
/// How soon the sentry knows that something else made the watchdog blind.
const NOTIFIED_MS: u64 = 20;
/// How often it looks whether the log was read as far as it has to be.
const READ_MS: u64 = 20;

impl Watchdog {
    /// The connection is known to be cut, or is back.
    pub(crate) fn link(&self, connected: bool) {
        if self.forgets_void() || !self.listening.get() {
            return;
        }
        self.with(|world, _| {
            world.sight.set_connected(connected);
            if connected {
                world.void(Void::BusCut);
            }
        });
    }

    /// The event loop stood still for so long. A short time leaves evidence alone: the canary before a verdict covers it.
    pub(crate) fn stalled(&self, lasted: u64) {
        if lasted >= STALL_VOID_MS && !self.stage.has(Defect::StallIgnored) {
            self.suspect(Void::Stalled);
        }
    }

    /// Something made evidence void.
    pub(crate) fn suspect(&self, why: Void) {
        if !self.forgets_void() && self.listening.get() {
            self.with(|world, _| world.void(why));
        }
    }

    pub(super) async fn canary(&self) -> bool {
        self.forgets_void() || self.stage.comes_back(self.me).await
    }

    /// Opens the eyes, proves that they are open, and keeps the clock.
    pub(super) async fn watch_self(self: Rc<Self>) {
        let mut saw = false;
        let mut next_at = 0;
        loop {
            let blind = self.with(|world, _| world.sight.since().is_none());
            let now = self.stage.even(self.me);
            if blind && saw {
                next_at = now;
            }
            saw = !blind;
            if now < next_at {
                pause(&self.stage.exec, NOTIFIED_MS.min(next_at - now)).await;
                continue;
            }
            let interval = if blind {
                self.open_eyes().await;
                BLIND_INTERVAL_MS
            } else {
                self.prove().await;
                CANARY_INTERVAL_MS
            };
            next_at = self.stage.even(self.me) + interval;
        }
    }

    async fn prove(&self) {
        if !self.with(|world, _| world.sight.connected()) {
            return;
        }
        let head = self.head().await;
        if !self.canary().await {
            return self.suspect(Void::CanaryLost);
        }
        // A log that does not answer now takes no verdict either.
        if let Ok(head) = head
            && !self.is_read(head.last_seq).await
        {
            self.suspect(Void::TailLag);
        }
    }

    async fn open_eyes(&self) {
        let (epoch, ready) =
            self.with(|world, _| (world.sight.epoch(), world.sight.caught_up() && world.sight.connected()));
        if !ready {
            return;
        }
        let Ok(head) = self.head().await else { return };
        if !self.is_read(head.last_seq).await || !self.canary().await {
            return;
        }
        self.with(|world, now| world.proven(epoch, now));
    }

    /// The end of the log. Its server's time comes with it: our clock follows, and what was measured begins anew.
    async fn head(&self) -> Result<Head, Unreachable> {
        let head = self.stage.head(self.me).await?;
        if self.stage.corrects(self.me, &head, false) {
            self.with(|world, now| world.rebase(now));
        }
        Ok(head)
    }

    async fn is_read(&self, last_seq: u64) -> bool {
        for _ in 0..CANARY_TIMEOUT_MS / READ_MS {
            if self.position.get() >= last_seq {
                return true;
            }
            pause(&self.stage.exec, READ_MS).await;
        }
        false
    }

    pub(super) async fn watch_breaker(self: Rc<Self>) {
        loop {
            pause(&self.stage.exec, BREAKER_INTERVAL_MS).await;
            let (speaks, tripped, expected, now) = self.with(|world, now| {
                if world.sight.caught_up() {
                    world.check_breaker(now);
                }
                let differs = world.is_tripped() != world.log_suspended;
                (world.sight.since().is_some() && differs, world.is_tripped(), world.system_seq, now)
            });
            if !speaks {
                continue;
            }
            let kind =
                if tripped { SystemEventKind::RecoverySuspended } else { SystemEventKind::RecoveryResumed };
            let body = SystemEvent { kind, data: serde_json::json!({}) };
            let subject = self.stage.subjects.system_event("watchdog");
            let event = self.stage.event(self.me, "watchdog", "watchdog", now, body.into());
            if self.stage.append(self.me, &subject, &event, expected).await.is_ok() {
                self.fold();
            }
        }
    }
}
