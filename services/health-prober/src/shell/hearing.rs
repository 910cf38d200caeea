//! Self-suspicion: whether we hear. Canaries through the bus, and everything that makes evidence void.
//!
//! We are deaf from the start, and from everything after which heartbeats may be missing or late, until a message of
//! our own that was sent after it is back and every heartbeat before it was read. Then every clock starts again. While
//! we hear, a canary goes out now and then, and at once when a heartbeat seems to be missing: the failure counts when
//! the canary is back.

use std::sync::Arc;
use std::time::Duration;

use rollcall_core::Timestamp;
use rollcall_core::sight::{Sight, Void};
use rollcall_core::time::Clock;
use rollcall_nats::canary::{BLIND_INTERVAL, CANARY_INTERVAL, CANARY_TIMEOUT, comes_back};
use rollcall_nats::{Link, Subscriber, bus::SUBSCRIPTION_CAPACITY};
use rollcall_service::{LoopHealth, clock::correction_ms};
use serde::Serialize;
use tokio::time::Instant;

use super::{Input, STALL, STALL_VOID, Shell};
use crate::state::Index;

/// What is known about our own ears.
#[derive(Debug)]
pub(super) struct Hearing {
    sight: Sight,
    /// When the last canary that came back was sent: silence is proven up to here.
    pub(super) proven_at: Timestamp,
    /// Agents whose heartbeat seems to be missing, and the proof is not there yet.
    pub(super) unproven: Vec<Index>,
    /// A canary came back since they were looked at.
    fresh: bool,
    /// A canary is on its way. Its own timeout brings it back.
    on_its_way: bool,
    /// When the next one goes out by itself.
    next_at: Instant,
}

/// A message of our own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Canary {
    /// Of our sight when it was sent.
    epoch: u64,
    sent_at: Timestamp,
    back: bool,
    /// By how much our clock is to be moved, by what the log's server said meanwhile.
    correction_ms: Option<i64>,
}

/// Whether we hear, for people.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct SightView {
    /// Since when; null: deaf now.
    since: Option<Timestamp>,
    last_trouble: &'static str,
    log_read: bool,
}

impl Default for Hearing {
    fn default() -> Self {
        Self {
            sight: Sight::default(),
            proven_at: Timestamp::default(),
            unproven: Vec::new(),
            fresh: false,
            on_its_way: false,
            next_at: Instant::now(),
        }
    }
}

impl Hearing {
    /// Silence counts.
    pub(super) const fn hears(&self) -> bool {
        self.sight.since().is_some()
    }

    pub(super) const fn view(&self) -> SightView {
        SightView {
            since: self.sight.since(),
            last_trouble: self.sight.trouble().as_str(),
            log_read: self.sight.caught_up(),
        }
    }
}

impl Shell {
    /// The log has been read; from the first canary on there are verdicts.
    pub(super) fn listen_up(&mut self) {
        self.hearing.sight.set_caught_up(true);
        self.send_canary();
    }

    /// Everything seen until now counts for nothing.
    pub(super) fn void(&mut self, why: Void) {
        let heard = !self.fleet.deaf;
        self.hearing.sight.void(why);
        self.hearing.unproven.clear();
        self.fleet.void(self.clock.now());
        self.show_hearing();
        if heard {
            metrics::counter!("rollcall_evidence_void_total").increment(1);
            tracing::warn!(why = why.as_str(), "evidence is void until a message of our own comes back");
        }
        self.send_canary();
    }

    fn show_hearing(&mut self) {
        self.fleet.deaf = !self.hearing.hears();
        metrics::gauge!("rollcall_prober_sees").set(if self.fleet.deaf { 0.0 } else { 1.0 });
    }

    /// Sends a canary if it is time for one, or if a silence waits for its proof.
    pub(super) fn canary_if_due(&mut self) {
        let waits = !self.hearing.unproven.is_empty() && !self.hearing.fresh;
        if waits || Instant::now() >= self.hearing.next_at {
            self.send_canary();
        }
    }

    fn send_canary(&mut self) {
        // Without a link there is nothing to find out; the link itself says when it is back.
        if !self.ready || self.hearing.on_its_way || !self.hearing.sight.connected() {
            return;
        }
        self.hearing.on_its_way = true;
        let (epoch, sent_at) = (self.hearing.sight.epoch(), self.clock.now());
        let (reach, clock, inputs) = (self.reach.clone(), Arc::clone(&self.clock), self.inputs.clone());
        tokio::spawn(async move {
            let head = tokio::time::timeout(CANARY_TIMEOUT, reach.log.head(&clock));
            let (back, head) = tokio::join!(comes_back(&reach.bus), head);
            let correction_ms = head.ok().and_then(Result::ok).and_then(|head| correction_ms(&head, false));
            let _ = inputs.send(Input::Canary(Canary { epoch, sent_at, back, correction_ms })).await;
        });
    }

    /// A canary is back, or lost.
    pub(super) fn canary_ended(&mut self, canary: Canary, beats: &mut Subscriber) {
        self.hearing.on_its_way = false;
        if let Some(by_ms) = canary.correction_ms {
            // It was sent at a time that was none.
            self.shift_clock(by_ms);
        } else if is_overdue(canary.sent_at, self.clock.now()) {
            // We stood still meanwhile: what it would prove may wait in buffers, or was lost there.
            self.void(Void::Stalled);
        } else if canary.back {
            self.hear_all(beats);
            self.proven(canary);
        } else if self.hearing.hears() {
            self.void(Void::CanaryLost);
        }
        let pause = if self.hearing.hears() { CANARY_INTERVAL } else { BLIND_INTERVAL };
        self.hearing.next_at = Instant::now() + pause;
        self.canary_if_due();
    }

    fn proven(&mut self, canary: Canary) {
        let now = self.clock.now();
        self.hearing.proven_at = canary.sent_at;
        self.hearing.fresh = true;
        if self.hearing.sight.proven(canary.epoch, now) {
            tracing::info!(after = self.hearing.sight.trouble().as_str(), "we see: every clock starts again");
            self.fleet.restart_clocks(now);
            self.show_hearing();
        }
        self.go_off();
    }

    /// Looks again at those whose silence may be proven now.
    pub(super) fn look_at_proven(&mut self, now: Timestamp) {
        if !std::mem::take(&mut self.hearing.fresh) {
            return;
        }
        for index in std::mem::take(&mut self.hearing.unproven) {
            self.look_at(index, now);
            self.rearm(index);
        }
    }

    /// Reads all heartbeats that are there.
    pub(super) fn hear_all(&mut self, beats: &mut Subscriber) {
        if !self.hear_waiting(beats, SUBSCRIPTION_CAPACITY) {
            // More than the buffer holds came while we read it: some may be lost.
            self.void(Void::Dropped);
        }
    }

    /// The state of the link when the loop begins.
    pub(super) fn link_is(&mut self, link: Link) {
        self.hearing.sight.set_connected(link.connected);
        self.show_hearing();
    }

    pub(super) fn link_changed(&mut self, before: Link, link: Link) {
        let made_again = link.epoch != before.epoch;
        self.hearing.sight.set_connected(link.connected);
        if link.connected && (made_again || !before.connected) {
            self.fleet.reconnected_at = Some(self.clock.now());
        }
        if made_again || !link.connected {
            self.void(Void::BusCut);
        }
        self.send_canary();
    }

    /// The lag monitor has seen something.
    pub(super) fn disturbed(&mut self, health: LoopHealth) {
        let before = std::mem::replace(&mut self.disturbances, health);
        if health.stalls > before.stalls
            && let Some(stall) = health.last_stall
        {
            self.stalled(stall.lasted);
        }
        if health.jumps > before.jumps {
            // Whether ours is right is what the next canary brings.
            self.void(Void::ClockJump);
        }
    }

    /// We did not turn for `late`.
    pub(super) fn stalled(&mut self, late: Duration) {
        if late < STALL {
            return;
        }
        if late >= STALL_VOID {
            self.void(Void::Stalled);
        }
        let hold = u64::try_from(late.min(STALL_VOID).as_millis()).unwrap_or(u64::MAX);
        self.judge_after = self.judge_after.max(self.clock.now().plus_ms(hold));
    }

    /// Our clock was not the log's: times from before can't be compared with times from now on.
    fn shift_clock(&mut self, by_ms: i64) {
        let before = self.clock.now();
        self.clock.shift(by_ms);
        let now = self.clock.now();
        self.judge_after = now;
        self.fleet.rebase(before, now);
        self.timers = crate::timers::Timers::default();
        self.void(Void::ClockJump);
        for index in 0..Index::try_from(self.fleet.len()).unwrap_or(Index::MAX) {
            self.rearm(index);
        }
    }
}

/// Whether a canary comes to hand later than its own timeout lets it: it was not the bus that took so long.
fn is_overdue(sent_at: Timestamp, now: Timestamp) -> bool {
    u128::from(now.since_ms(sent_at)) >= (CANARY_TIMEOUT + STALL_VOID / 2).as_millis()
}
