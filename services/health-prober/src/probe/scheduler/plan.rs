//! What is due when, and what begins first. Plain synchronous code: the clock and the dice are the caller's.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Bounds;
use crate::state::Index;

/// Failures in a row from which an endpoint counts as down: below it is probed sooner, from it on later.
const DOWN_AFTER: u32 = 3;
/// What fails for the first times is probed this many times as often.
const SUSPECT_HASTE: u32 = 4;
/// What is down is probed at most this many times more seldom.
const BACKOFF_MAX: u32 = 4;
/// Shortest time between two probes of one endpoint, or half the interval if that is less.
const GAP_MIN: Duration = Duration::from_secs(1);
/// First probes are this far apart, so that no more than five hundred a second begin when a large fleet is new to us.
const FIRST_STEP: Duration = Duration::from_millis(2);
/// All first probes begin within two thirds of the interval: what is left of it is for those that hang.
const FIRST_WITHIN: (u32, u32) = (2, 3);
/// Within this time around its place a first probe begins somewhere.
const FIRST_JITTER: Duration = Duration::from_secs(1);

/// One endpoint in the plan.
#[derive(Debug)]
struct Slot {
    host: Arc<str>,
    /// In ordinary times it is probed at multiples of the interval from here.
    phase: Instant,
    due: Instant,
    /// Distinguishes this slot from an earlier one of the same agent.
    generation: u64,
    busy: bool,
    /// It waits for a free place.
    queued: bool,
    /// Probes that were begun: who waited for an earlier one waits no more.
    turn: u64,
    suspect: bool,
    /// Its last probe took all the time there is.
    hung: bool,
    fails: u32,
    started: Option<Instant>,
}

impl Slot {
    fn token(&self, index: Index) -> Token {
        Token { index, generation: self.generation, turn: self.turn, host: Arc::clone(&self.host) }
    }

    /// Whether this is what it waits with.
    fn awaits(&self, token: &Token) -> bool {
        self.queued && self.generation == token.generation && self.turn == token.turn
    }

    const fn rank(&self) -> Rank {
        match (self.hung, self.suspect) {
            (false, true) => Rank::Suspect,
            (false, false) => Rank::Ordinary,
            (true, true) => Rank::HungSuspect,
            (true, false) => Rank::Hung,
        }
    }
}

/// How a probe ended, as far as the plan cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Answered.
    Well,
    /// Answered wrongly, or was refused.
    Badly,
    /// Did not answer in time: it held its place for as long as a probe may.
    Hung,
    /// Says nothing about the endpoint.
    Void,
    /// There was nothing to probe.
    Skipped,
}

/// In which order what is due begins. What hung the last time will most likely hold its place for the whole timeout
/// again, so it goes last, and never gets more than its share of the places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Suspect,
    Ordinary,
    HungSuspect,
    Hung,
}

impl Rank {
    const ALL: [Self; 4] = [Self::Suspect, Self::Ordinary, Self::HungSuspect, Self::Hung];

    fn is_hung(self) -> bool {
        self >= Self::HungSuspect
    }
}

/// Somebody who waits. It counts for nothing once that turn was taken.
#[derive(Debug)]
struct Token {
    index: Index,
    generation: u64,
    turn: u64,
    host: Arc<str>,
}

/// Who waits, by rank, each in the order they came.
#[derive(Debug, Default)]
struct Lanes([VecDeque<Token>; Rank::ALL.len()]);

impl Lanes {
    fn push(&mut self, rank: Rank, token: Token) {
        self.0[rank as usize].push_back(token);
    }

    /// Before all others of its rank: it has waited already.
    fn push_front(&mut self, rank: Rank, token: Token) {
        self.0[rank as usize].push_front(token);
    }

    /// The first of those that may begin.
    fn pop(&mut self, hung_too: bool) -> Option<(Rank, Token)> {
        Rank::ALL
            .into_iter()
            .filter(|rank| hung_too || !rank.is_hung())
            .find_map(|rank| Some((rank, self.0[rank as usize].pop_front()?)))
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(VecDeque::is_empty)
    }
}

/// Places that are taken.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Taken {
    all: usize,
    hung: usize,
}

impl Taken {
    fn take(&mut self, hung: bool) {
        self.all += 1;
        self.hung += usize::from(hung);
    }

    fn free(&mut self, hung: bool) {
        self.all = self.all.saturating_sub(1);
        self.hung = self.hung.saturating_sub(usize::from(hung));
    }

    /// Room for one more: for one that did not hang the last time, and for one that did.
    const fn room(self, places: usize) -> (bool, bool) {
        let any = self.all < places;
        (any, any && self.hung < Bounds::hung(places))
    }
}

/// One host with something under way.
#[derive(Debug, Default)]
struct Host {
    taken: Taken,
    /// Due, and it has no room.
    waiting: Lanes,
}

/// A probe that was begun.
#[derive(Debug)]
struct Running {
    host: Arc<str>,
    hung: bool,
}

/// What is due when.
#[derive(Debug)]
pub struct Plan {
    interval: Duration,
    bounds: Bounds,
    /// Where the next first probe has its place.
    first: Option<Instant>,
    slots: HashMap<Index, Slot>,
    due: BinaryHeap<Reverse<(Instant, Index, u64)>>,
    waiting: Lanes,
    taken: Taken,
    hosts: HashMap<Arc<str>, Host>,
    running: HashMap<(Index, u64), Running>,
    generations: u64,
}

impl Plan {
    /// An empty plan.
    #[must_use]
    pub fn new(interval: Duration, bounds: Bounds) -> Self {
        Self {
            interval,
            bounds,
            first: None,
            slots: HashMap::new(),
            due: BinaryHeap::new(),
            waiting: Lanes::default(),
            taken: Taken::default(),
            hosts: HashMap::new(),
            running: HashMap::new(),
            generations: 0,
        }
    }

    /// Endpoints in the plan.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Probes an endpoint from now on; `jitter` within 0..1 is its place among the others. The first probe comes soon, the
    /// others are spread over the interval. Returns its generation.
    pub fn watch(&mut self, index: Index, host: &str, jitter: f64, now: Instant) -> u64 {
        self.generations += 1;
        let generation = self.generations;
        let jitter = jitter.clamp(0.0, 1.0);
        let within = self.interval * FIRST_WITHIN.0 / FIRST_WITHIN.1;
        let place = self.first.map_or(now, |first| first.max(now));
        let due = if place < now + within {
            self.first = Some(place + FIRST_STEP);
            place + FIRST_JITTER.min(self.interval - within).mul_f64(jitter)
        } else {
            // More than can begin one after the other in that time: anywhere in it.
            now + within.mul_f64(jitter)
        };
        let slot = Slot {
            host: host.into(),
            phase: now + self.interval.mul_f64(jitter),
            due,
            generation,
            busy: false,
            queued: false,
            turn: 0,
            suspect: false,
            hung: false,
            fails: 0,
            started: None,
        };
        self.slots.insert(index, slot);
        self.due.push(Reverse((due, index, generation)));
        generation
    }

    /// Probes it no more. One in flight still comes back, and is recognised by its generation.
    pub fn unwatch(&mut self, index: Index) {
        self.slots.remove(&index);
    }

    /// Something else says that it may be down, or up again: it is probed at once, before others.
    pub fn suspect(&mut self, index: Index, now: Instant) {
        let gap = gap(self.interval);
        let Some(slot) = self.slots.get_mut(&index) else { return };
        if slot.busy || slot.suspect || slot.started.is_some_and(|at| now < at + gap) {
            return;
        }
        slot.suspect = true;
        if slot.queued {
            // It waits behind others, maybe behind a host that hangs: again, in front. Whichever comes first counts.
            self.waiting.push(slot.rank(), slot.token(index));
        } else if slot.due > now {
            slot.due = now;
            self.due.push(Reverse((now, index, slot.generation)));
        }
    }

    /// When the next one is due that has a place to wait for.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.due.peek().map(|Reverse((at, ..))| *at)
    }

    /// What begins now, suspects first, as far as there is room.
    pub fn begin(&mut self, now: Instant) -> Vec<(Index, u64)> {
        self.line_up(now);
        let mut begun = Vec::new();
        loop {
            let (any, hung_too) = self.taken.room(self.bounds.total);
            let Some((rank, token)) = any.then(|| self.waiting.pop(hung_too)).flatten() else { break };
            let Some(slot) = self.slots.get_mut(&token.index).filter(|slot| slot.awaits(&token)) else {
                // Its place goes to another of its host.
                self.admit(&token.host);
                continue;
            };
            let host = self.hosts.entry(Arc::clone(&token.host)).or_default();
            let (room, room_for_hung) = host.taken.room(self.bounds.per_host);
            if !(if rank.is_hung() { room_for_hung } else { room }) {
                host.waiting.push(rank, token);
                continue;
            }
            let hung = rank.is_hung();
            host.taken.take(hung);
            self.taken.take(hung);
            slot.busy = true;
            slot.queued = false;
            slot.turn += 1;
            slot.started = Some(now);
            let key = (token.index, token.generation);
            self.running.insert(key, Running { host: token.host, hung });
            begun.push(key);
        }
        begun
    }

    /// Whatever is due waits from now on.
    fn line_up(&mut self, now: Instant) {
        while let Some(Reverse((at, index, generation))) = self.due.peek().copied() {
            if at > now {
                break;
            }
            self.due.pop();
            if let Some(slot) = self.slots.get_mut(&index)
                && slot.generation == generation
                && slot.due == at
                && !slot.busy
                && !slot.queued
            {
                slot.queued = true;
                self.waiting.push(slot.rank(), slot.token(index));
            }
        }
    }

    /// A host has room: the first of those that wait for it waits with all others now.
    fn admit(&mut self, host: &Arc<str>) {
        let Some(entry) = self.hosts.get_mut(host) else { return };
        loop {
            let (any, hung_too) = entry.taken.room(self.bounds.per_host);
            let Some((rank, token)) = any.then(|| entry.waiting.pop(hung_too)).flatten() else { break };
            if self.slots.get(&token.index).is_some_and(|slot| slot.awaits(&token)) {
                self.waiting.push_front(rank, token);
                break;
            }
        }
        if entry.taken.all == 0 && entry.waiting.is_empty() {
            self.hosts.remove(host);
        }
    }

    /// A probe has ended.
    pub fn ended(&mut self, index: Index, generation: u64, ended: Ended, now: Instant) {
        let Some(running) = self.running.remove(&(index, generation)) else { return };
        self.taken.free(running.hung);
        if let Some(host) = self.hosts.get_mut(&running.host) {
            host.taken.free(running.hung);
        }
        self.admit(&running.host);
        let interval = self.interval;
        let Some(slot) = self.slots.get_mut(&index).filter(|slot| slot.generation == generation) else {
            return;
        };
        slot.busy = false;
        slot.suspect = false;
        match ended {
            Ended::Well => (slot.fails, slot.hung) = (0, false),
            Ended::Badly => (slot.fails, slot.hung) = (slot.fails.saturating_add(1), false),
            Ended::Hung => (slot.fails, slot.hung) = (slot.fails.saturating_add(1), true),
            Ended::Void | Ended::Skipped => {}
        }
        slot.due = next(slot, interval, ended, now);
        self.due.push(Reverse((slot.due, index, generation)));
    }
}

fn gap(interval: Duration) -> Duration {
    GAP_MIN.min(interval / 2)
}

fn next(slot: &Slot, interval: Duration, ended: Ended, now: Instant) -> Instant {
    let started = slot.started.unwrap_or(now);
    let soonest = now.max(started + gap(interval));
    match (ended, slot.fails) {
        // Nothing will be different so soon.
        (Ended::Skipped, _) => soonest.max(started + interval.saturating_mul(BACKOFF_MAX)),
        (Ended::Well, _) | (Ended::Void, 0..DOWN_AFTER) => in_phase(slot.phase, interval, soonest),
        (Ended::Badly | Ended::Hung, 0..DOWN_AFTER) => soonest.max(started + interval / SUSPECT_HASTE),
        (Ended::Badly | Ended::Hung | Ended::Void, fails) => {
            let factor = 1_u32.checked_shl(fails - DOWN_AFTER).unwrap_or(BACKOFF_MAX).min(BACKOFF_MAX);
            soonest.max(started + interval.saturating_mul(factor))
        }
    }
}

/// The first tick from `soonest` on: ticks that were missed meanwhile are left out.
fn in_phase(phase: Instant, interval: Duration, soonest: Instant) -> Instant {
    let behind = soonest.saturating_duration_since(phase).as_nanos();
    let ticks = behind.div_ceil(interval.as_nanos().max(1));
    phase + interval.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests;
