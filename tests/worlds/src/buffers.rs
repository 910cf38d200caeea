//! What waits for a service that stands still: heartbeats in its buffer, as far as that reaches, and what its connection
//! and its monitor have to tell. A process stands still by itself or with its machine, whose even clock stops then.

use std::{collections::VecDeque, rc::Rc};

use rollcall_core::sight::Void;

use crate::{agent::Beat, clock::JUMP_MS, services::Body, stage::Stage};

/// A sample of the event loop that comes this much late is a stall.
const STALL_MS: u64 = 200;
/// So long at most takes a service that stood still to know it: less than any message is on its way.
const NOTICED_MS: u64 = 1;
/// So long at most takes a service to read what waited in its buffer.
const READ_MAX_MS: u64 = 500;
/// The server gives up a connection on which nobody reads for so long.
const GIVEN_UP_MS: u64 = 6_000;

/// Something that a service is told about itself.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Notice {
    /// Its connection is cut, or made again.
    Link(bool),
    /// The log has something new.
    Tail,
    /// Its event loop stood still for so many milliseconds.
    Stalled(u64),
    /// The clock on its wall jumped.
    Jump,
    /// Heartbeats were dropped because they were not read in time.
    Dropped,
}

/// What waits for a service.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// Processes that died here.
    pub lives: u64,
    beats: VecDeque<Rc<Beat>>,
    /// Heartbeats that find room while nobody reads.
    room: usize,
    dropped: bool,
    notices: Vec<Notice>,
}

impl Buffers {
    /// The process dies, and all that waits for it is lost.
    pub(crate) fn die(&mut self) {
        *self = Self { lives: self.lives + 1, ..Self::default() };
    }
}

impl Stage {
    /// Tells a service something, or does so when it runs again.
    pub(crate) fn tell(&self, me: usize, notice: Notice) {
        if self.exec.is_frozen(me) {
            if !matches!(notice, Notice::Tail) {
                self.places.borrow_mut()[me].buffers.notices.push(notice);
            }
            return;
        }
        if matches!(notice, Notice::Tail) && self.link(me).log_cut {
            return;
        }
        match (self.body(me), notice) {
            (Some(Body::Dispatcher(dispatcher)), Notice::Tail) => dispatcher.tail(),
            (Some(Body::Dispatcher(dispatcher)), Notice::Stalled(_) | Notice::Jump) => {
                dispatcher.compares_clocks();
            }
            (Some(Body::Watchdog(watchdog)), Notice::Link(connected)) => watchdog.link(connected),
            (Some(Body::Watchdog(watchdog)), Notice::Tail) => watchdog.tail(),
            (Some(Body::Watchdog(watchdog)), Notice::Stalled(lasted)) => watchdog.stalled(lasted),
            (Some(Body::Watchdog(watchdog)), Notice::Jump) => watchdog.suspect(Void::ClockJump),
            (Some(Body::Watchdog(watchdog)), Notice::Dropped) => watchdog.suspect(Void::Dropped),
            (Some(Body::Prober(prober)), Notice::Link(connected)) => prober.link(connected),
            (Some(Body::Prober(prober)), Notice::Tail) => prober.tail(),
            (Some(Body::Prober(prober)), Notice::Stalled(lasted)) => prober.stalled(lasted),
            // Whether ours is right is what the next canary brings.
            (Some(Body::Prober(prober)), Notice::Jump) => prober.void(Void::ClockJump),
            (Some(Body::Prober(prober)), Notice::Dropped) => prober.void(Void::Dropped),
            (Some(Body::Dispatcher(_)), Notice::Link(_) | Notice::Dropped) | (None, _) => {}
        }
    }

    /// A heartbeat is there.
    pub(crate) fn receive(&self, me: usize, beat: Rc<Beat>) {
        {
            let waits = self.exec.is_frozen(me);
            let buffers = &mut self.places.borrow_mut()[me].buffers;
            if waits || !buffers.beats.is_empty() {
                if buffers.beats.len() < buffers.room {
                    buffers.beats.push_back(beat);
                } else {
                    buffers.dropped = true;
                }
                return;
            }
        }
        self.hear(me, &beat);
    }

    fn hear(&self, me: usize, beat: &Rc<Beat>) {
        match self.body(me) {
            Some(Body::Dispatcher(dispatcher)) => dispatcher.beat(beat),
            Some(Body::Watchdog(watchdog)) => watchdog.beat(beat),
            Some(Body::Prober(prober)) => prober.beat(beat),
            None => {}
        }
    }

    /// A service reads what waits for it.
    pub(crate) fn drain(&self, me: usize) {
        loop {
            let next = self.places.borrow_mut()[me].buffers.beats.pop_front();
            let Some(beat) = next else { return };
            self.hear(me, &beat);
        }
    }

    /// A service stands still, alone or with its whole machine.
    pub(crate) fn stall(self: &Rc<Self>, me: usize, lasts: u64, asleep: bool) {
        if self.body(me).is_none() || self.exec.is_frozen(me) {
            return;
        }
        self.say(|| format!("service {me} stands still for {lasts} ms, its machine sleeps: {asleep}"));
        self.count(if asleep { "machines slept" } else { "services stood still" });
        self.exec.freeze(me);
        let now = self.exec.now();
        self.truth.borrow_mut().stood.push((me, now, now + lasts));
        let room = usize::try_from(self.exec.between(2, 60)).unwrap_or(0);
        let life = {
            let buffers = &mut self.places.borrow_mut()[me].buffers;
            buffers.room = room;
            buffers.lives
        };
        let stage = Rc::clone(self);
        self.exec.later(lasts, move || {
            if stage.places.borrow()[me].buffers.lives == life {
                stage.go_on(me, lasts, asleep);
            }
        });
    }

    /// It runs again: its tasks, its monitor and its readers come in whatever order.
    fn go_on(self: &Rc<Self>, me: usize, lasted: u64, asleep: bool) {
        self.say(|| format!("service {me} goes on"));
        self.exec.thaw(me);
        let mut notices = {
            let place = &mut self.places.borrow_mut()[me];
            if asleep {
                place.clocks.ours -= i64::try_from(lasted).unwrap_or(0);
                place.clocks.slept += lasted;
            }
            std::mem::take(&mut place.buffers.notices)
        };
        if lasted >= GIVEN_UP_MS && !self.link(me).is_cut() && self.exec.chance(500) {
            self.places.borrow_mut()[me].buffers.beats.clear();
            notices.extend([Notice::Link(false), Notice::Link(true)]);
        }
        if std::mem::take(&mut self.places.borrow_mut()[me].buffers.dropped) {
            // The client library tells only of some drops.
            if self.exec.chance(500) {
                notices.push(Notice::Dropped);
            } else {
                let now = self.exec.now();
                self.truth.borrow_mut().losing.push((me, now - lasted, now));
            }
        }
        let slept = asleep && lasted >= JUMP_MS;
        if slept || (!asleep && lasted >= STALL_MS) {
            let stage = Rc::clone(self);
            let seen = if asleep { Notice::Jump } else { Notice::Stalled(lasted) };
            // Its sample is overdue, so it comes with the first turn of the loop.
            self.exec.later(self.exec.between(0, NOTICED_MS), move || stage.tell(me, seen));
        }
        let stage = Rc::clone(self);
        self.exec.later(self.exec.between(0, NOTICED_MS), move || {
            for notice in notices {
                stage.tell(me, notice);
            }
            stage.tell(me, Notice::Tail);
        });
        let stage = Rc::clone(self);
        self.exec.later(self.exec.between(0, READ_MAX_MS), move || {
            if !stage.exec.is_frozen(me) {
                stage.drain(me);
            }
        });
    }
}
