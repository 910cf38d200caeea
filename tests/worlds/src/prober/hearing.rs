//! Whether the prober hears: canaries through the bus, and everything that makes evidence void.

use std::rc::Rc;

use health_prober::state::Index;
use rollcall_core::{
    Timestamp,
    sight::{Sight, Void},
};

use super::Prober;
use crate::{Defect, stage::CANARY_TIMEOUT_MS};

const CANARY_INTERVAL_MS: u64 = 5_000;
const BLIND_INTERVAL_MS: u64 = 100;
/// A tick that comes this late is a stall.
const STALL_MS: u64 = 250;
/// A stall from this length on voids all evidence. After a shorter one nothing is judged for as long as it lasted.
const STALL_VOID_MS: u64 = 5_000;
/// A machine that stalls all the time must not keep the prober from judging for ever.
const HOLD_MAX_MS: u64 = 5_000;

/// What is known about our own ears.
#[derive(Debug, Default)]
pub(super) struct Hearing {
    sight: Sight,
    /// When the last canary that came back was sent: silence is proven up to here.
    pub(super) proven_at: Timestamp,
    /// Agents whose heartbeat seems to be missing, and the proof is not there yet.
    pub(super) unproven: Vec<Index>,
    /// A canary came back since they were looked at.
    fresh: bool,
    /// A canary is on its way.
    on_its_way: bool,
    /// When the next one goes out by itself, by the even clock.
    next_at: u64,
}

impl Prober {
    /// The log has been read; from the first canary on there are verdicts.
    pub(super) fn listen_up(self: &Rc<Self>) {
        self.hearing.borrow_mut().sight.set_caught_up(true);
        if self.forgets_void() {
            self.fleet.borrow_mut().deaf = false;
        }
        self.send_canary();
    }

    /// Everything seen until now counts for nothing.
    pub(crate) fn void(self: &Rc<Self>, why: Void) {
        if self.forgets_void() || !self.listening.get() {
            return;
        }
        {
            let mut hearing = self.hearing.borrow_mut();
            hearing.sight.void(why);
            hearing.unproven.clear();
        }
        let now = self.now();
        self.fleet.borrow_mut().void(now);
        self.show_hearing();
        self.send_canary();
    }

    fn show_hearing(&self) {
        let hears = self.hearing.borrow().sight.since().is_some();
        self.fleet.borrow_mut().deaf = !hears && !self.forgets_void();
    }

    /// Sends a canary if it is time for one, or if a silence waits for its proof.
    pub(super) fn canary_if_due(self: &Rc<Self>) {
        let due = {
            let hearing = self.hearing.borrow();
            let waits = !hearing.unproven.is_empty() && !hearing.fresh;
            waits || self.stage.even(self.me) >= hearing.next_at
        };
        if due {
            self.send_canary();
        }
    }

    fn send_canary(self: &Rc<Self>) {
        let (epoch, sent_at) = {
            let mut hearing = self.hearing.borrow_mut();
            if !self.ready.get() || hearing.on_its_way || !hearing.sight.connected() {
                return;
            }
            hearing.on_its_way = true;
            (hearing.sight.epoch(), self.now())
        };
        let this = Rc::clone(self);
        self.spawn(async move {
            let head = this.stage.head(this.me).await;
            let back = this.stage.comes_back(this.me).await;
            this.hearing.borrow_mut().on_its_way = false;
            let before = this.now();
            if head.is_ok_and(|head| this.stage.corrects(this.me, &head, false)) {
                // It was sent at a time that was none.
                this.rebase(before);
            } else if this.now().since_ms(sent_at) >= CANARY_TIMEOUT_MS + STALL_VOID_MS / 2 {
                // It stood still meanwhile.
                this.void(Void::Stalled);
            } else if back {
                this.proven(epoch, sent_at);
            } else if this.hearing.borrow().sight.since().is_some() {
                this.void(Void::CanaryLost);
            }
            {
                let mut hearing = this.hearing.borrow_mut();
                let hears = hearing.sight.since().is_some();
                let pause = if hears { CANARY_INTERVAL_MS } else { BLIND_INTERVAL_MS };
                hearing.next_at = this.stage.even(this.me) + pause;
            }
            this.canary_if_due();
        });
    }

    fn proven(self: &Rc<Self>, epoch: u64, sent_at: Timestamp) {
        let now = self.now();
        let sees_anew = {
            let mut hearing = self.hearing.borrow_mut();
            hearing.proven_at = sent_at;
            hearing.fresh = true;
            hearing.sight.proven(epoch, now)
        };
        if sees_anew {
            self.fleet.borrow_mut().restart_clocks(now);
            self.show_hearing();
        }
        self.go_off();
    }

    /// Looks again at those whose silence may be proven now.
    pub(super) fn look_at_proven(self: &Rc<Self>, now: Timestamp) {
        if !std::mem::take(&mut self.hearing.borrow_mut().fresh) {
            return;
        }
        let unproven = std::mem::take(&mut self.hearing.borrow_mut().unproven);
        for index in unproven {
            self.look_at(index, now);
        }
    }

    /// The state of the link when the process begins.
    pub(super) fn link_is(&self, connected: bool) {
        self.hearing.borrow_mut().sight.set_connected(connected || self.forgets_void());
        self.show_hearing();
    }

    /// The connection is known to be cut, or is made again.
    pub(crate) fn link(self: &Rc<Self>, connected: bool) {
        if self.forgets_void() || !self.listening.get() {
            return;
        }
        self.hearing.borrow_mut().sight.set_connected(connected);
        if connected {
            self.fleet.borrow_mut().reconnected_at = Some(self.now());
        }
        self.void(Void::BusCut);
        self.send_canary();
    }

    /// We did not turn for `late` milliseconds.
    pub(crate) fn stalled(self: &Rc<Self>, late: u64) {
        if late < STALL_MS || self.forgets_void() || self.stage.has(Defect::StallIgnored) {
            return;
        }
        if late >= STALL_VOID_MS {
            self.void(Void::Stalled);
        }
        let until = self.now().plus_ms(late.min(STALL_VOID_MS));
        self.judge_after.set(self.judge_after.get().max(until));
    }

    /// Whether buffers are still being read after a stall.
    pub(super) fn holds(&self, now: Timestamp) -> bool {
        if now >= self.judge_after.get() {
            self.held_since.set(None);
            return false;
        }
        let since = self.held_since.get().unwrap_or(now);
        self.held_since.set(Some(since));
        now.since_ms(since) < HOLD_MAX_MS
    }

    /// Our clock was not the log's: times from before can't be compared with times from now on.
    fn rebase(self: &Rc<Self>, before: Timestamp) {
        let now = self.now();
        self.judge_after.set(now);
        self.fleet.borrow_mut().rebase(before, now);
        self.void(Void::ClockJump);
    }
}
