//! Clocks: that of each service process, which goes on evenly until it is moved; that of its host, which people set; and
//! that of the log's server, which is the fleet's (decision 13). The correction is the services' own
//! [`Reading::correction_ms`].

use std::rc::Rc;

use rollcall_core::{Timestamp, time::Reading};

use crate::{
    buffers::Notice,
    exec::pause,
    stage::{LOG_TRY_MS, Stage, Unreachable},
};

/// Where virtual time begins on the wall, milliseconds since 1970.
const EPOCH_MS: i64 = 1_800_000_000_000;
/// Pause before the log's server is asked for its time again that did not answer.
const ASK_AGAIN_MS: u64 = 500;
/// A wall clock that moved this much more or less than the even one has jumped.
pub(crate) const JUMP_MS: u64 = 500;
/// A host that is right is wrong by so much.
pub(crate) const HOST_WRONG_MS: u64 = 200;
/// The monitor of the event loop looks this often.
const SAMPLE_MS: u64 = 50;

/// The clocks at one place, in milliseconds ahead of the true time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Clocks {
    /// Of the process.
    pub ours: i64,
    /// Of its host, on the wall.
    pub wall: i64,
    /// How long the machine has slept: its even clock stood still meanwhile.
    pub slept: u64,
}

/// The end of the log, and what the clocks said when somebody asked for it.
pub(crate) struct Head {
    pub last_seq: u64,
    reading: Reading,
}

fn signed(millis: u64) -> i64 {
    i64::try_from(millis).unwrap_or(i64::MAX)
}

impl Stage {
    /// The time as a service's clock has it.
    pub(crate) fn clock(&self, me: usize) -> Timestamp {
        let ours = self.places.borrow()[me].clocks.ours;
        self.true_time(self.exec.now(), ours)
    }

    /// Milliseconds of a service's even clock, which nobody sets, and which stands still while its machine sleeps.
    pub(crate) fn even(&self, me: usize) -> u64 {
        self.exec.now() - self.places.borrow()[me].clocks.slept
    }

    fn true_time(&self, at: u64, ahead: i64) -> Timestamp {
        Timestamp::from_millis(EPOCH_MS + signed(at) + ahead)
    }

    /// The time of the log's server.
    pub(crate) fn fleet_time(&self) -> Timestamp {
        let ahead = self.server_clock.borrow().last().map_or(0, |(_, ahead)| *ahead);
        self.true_time(self.exec.now(), ahead)
    }

    /// The latest that the fleet's time may be for anybody at that moment: whoever still goes by a time from which the
    /// server's clock was set back has `adopt_ms` to notice.
    pub(crate) fn fleet_time_at_most(&self, at: u64, adopt_ms: u64) -> Timestamp {
        let set = self.server_clock.borrow();
        let replaced = |n: usize| set.get(n + 1).map_or(u64::MAX, |(until, _)| *until);
        let held = (0..set.len()).filter(|n| set[*n].0 <= at && replaced(*n).saturating_add(adopt_ms) > at);
        let ahead = held.map(|n| set[n].1).max().unwrap_or(0);
        self.true_time(at, ahead)
    }

    /// Asks the log's leader for its end and its time.
    pub(crate) async fn head(self: &Rc<Self>, me: usize) -> Result<Head, Unreachable> {
        let asked_at = self.clock(me);
        if self.link(me).log_cut {
            pause(&self.exec, LOG_TRY_MS).await;
            return Err(Unreachable);
        }
        pause(&self.exec, self.exec.between(1, self.weather.get().way_max)).await;
        let (last_seq, server) = (self.log.borrow().last_seq(), self.fleet_time());
        pause(&self.exec, self.exec.between(1, self.weather.get().way_max)).await;
        if self.link(me).log_cut {
            return Err(Unreachable);
        }
        let clocks = self.places.borrow()[me].clocks;
        let reading = Reading {
            asked_at,
            answered_at: self.clock(me),
            wall_ahead_ms: clocks.wall - clocks.ours,
            server,
        };
        Ok(Head { last_seq, reading })
    }

    /// Moves a service's clock if it is not the log's. True: it was moved, and what was measured with it is void.
    pub(crate) fn corrects(&self, me: usize, head: &Head, first: bool) -> bool {
        let Some(by) = head.reading.correction_ms(first) else { return false };
        self.say(|| format!("service {me} moves its clock by {by} ms"));
        self.count("clocks corrected");
        self.places.borrow_mut()[me].clocks.ours += by;
        true
    }

    /// Sets a service's clock by the log's server before anything is decided on it.
    pub(crate) async fn set_clock(self: &Rc<Self>, me: usize) {
        loop {
            if let Ok(head) = self.head(me).await {
                self.corrects(me, &head, true);
                return;
            }
            pause(&self.exec, ASK_AGAIN_MS).await;
        }
    }

    /// Somebody sets the clock of a host. What runs there notices, and goes on evenly.
    pub(crate) fn set_wall(self: &Rc<Self>, me: usize, ahead: i64) {
        let before = std::mem::replace(&mut self.places.borrow_mut()[me].clocks.wall, ahead);
        self.say(|| format!("the clock on the wall of service {me} jumps from {before} to {ahead} ms"));
        if before.abs_diff(ahead) < JUMP_MS {
            return;
        }
        let stage = Rc::clone(self);
        self.exec.later(self.exec.between(0, SAMPLE_MS), move || stage.tell(me, Notice::Jump));
    }

    /// The time source of all hosts was wrong and is put right: the log's server and the hosts follow it, and services
    /// adopt that whenever they ask next. A host that was wrong by itself is right from then on, as its two clocks would
    /// outvote the server's otherwise.
    pub(crate) fn set_fleet_time(self: &Rc<Self>, by: i64) {
        let before = self.server_clock.borrow().last().map_or(0, |(_, ahead)| *ahead);
        self.say(|| format!("the fleet's time is set by {by} ms"));
        self.server_clock.borrow_mut().push((self.exec.now(), before + by));
        let places = self.places.borrow().len();
        for me in 0..places {
            self.set_wall(me, before + by + self.either_way(HOST_WRONG_MS));
        }
    }
}
