//! What the prober knows: the agents as the log tells them, and what it has seen of each since it started.

use std::borrow::Cow;
use std::collections::HashMap;

use rollcall_core::agent::{Agent, Status};
use rollcall_core::event::AgentEvent;
use rollcall_core::gaps::Gaps;
use rollcall_core::wire::{Endpoint, InFlight};
use rollcall_core::{AgentId, Timestamp};
use serde::Deserialize as _;

mod flapping;
mod live;
mod losing;
mod probed;

pub use flapping::*;
pub use live::*;
pub use losing::*;
pub use probed::{Listening, Nobody};

/// Where the event of a drain has what the operator asked for, in its evidence.
pub const ASKED: &str = "asked";
/// In there: what is to become of the work at the deadline.
pub const IN_FLIGHT: &str = "in_flight";
/// Agents that one prober follows; more are refused.
pub const AGENTS_MAX: usize = 2_000_000;

/// An agent as its events tell it, and a little more than the shared aggregate keeps.
#[derive(Debug, Clone)]
pub struct Known {
    /// The shared aggregate.
    pub agent: Agent,
    /// Sequence of the last registration.
    pub registered_seq: u64,
    /// Sequence of the last status event.
    pub status_seq: u64,
    /// Since when it was silent the last time; an operator's drain in between does not end a silence.
    pub silent_since: Option<Timestamp>,
    /// What few agents have.
    troubles: Option<Box<Troubles>>,
}

/// What an agent is marked for, and what else few have.
#[derive(Debug, Clone, Default)]
struct Troubles {
    /// Times of its last falls from well to silent, oldest first; emptied by a new instance.
    falls: Vec<Timestamp>,
    /// What its falls weigh, those that are forgotten above too.
    penalty: flapping::Penalty,
    /// The last losses that count.
    losses: Vec<losing::Counted>,
    /// When it was quarantined or released the last time.
    quarantine_changed_at: Timestamp,
    /// When the clock was set the last time while any of these times, or a silence, ran: they start here.
    clock_set_at: Timestamp,
    /// What is to become of its work at the deadline of the operator's drain, if that was said.
    drain_in_flight: Option<InFlight>,
    /// Its current instance was called gone by somebody else than itself.
    dismissed: bool,
    /// It does not beat, and was well by the probe that its profile names: somebody answered there.
    probe_answered: bool,
}

impl Known {
    fn new(id: AgentId) -> Self {
        Self {
            agent: Agent::unknown(id),
            registered_seq: 0,
            status_seq: 0,
            silent_since: None,
            troubles: None,
        }
    }

    /// Folds one event of this agent in. `false`: it was known already.
    pub fn apply(&mut self, seq: u64, event: &AgentEvent, time: Timestamp) -> bool {
        if seq <= self.agent.seq {
            return false;
        }
        let event = &*not_after(event, time);
        let before = self.agent.status;
        self.note_probe(event);
        self.agent.evolve(seq, event, time);
        if let (AgentEvent::Registered(_) | AgentEvent::Updated(_), Some(profile)) =
            (event, &mut self.agent.profile)
        {
            // One text instead of two: there may be a million of them.
            profile.agent_id.clone_from(&self.agent.id);
            // From before such were refused: whatever is said of it is said to everybody.
            profile.probe.iter_mut().chain(&mut profile.control).for_each(Endpoint::hide_userinfo);
        }
        self.note_drain(event);
        match event {
            AgentEvent::Registered(_) => {
                self.registered_seq = seq;
                self.silent_since = None;
                // What its predecessor did is not held against a new instance.
                if let Some(troubles) = &mut self.troubles {
                    troubles.falls = Vec::new();
                    troubles.penalty = flapping::Penalty::default();
                    troubles.dismissed = false;
                }
            }
            AgentEvent::Disconnected(change) | AgentEvent::Error(change) => {
                self.status_seq = seq;
                let well = before.is_some_and(|status| !status.is_silent() && status != Status::Gone);
                // A drain in the middle of a silence makes no second fall of it.
                if well && self.silent_since.is_none() {
                    self.troubles().fall(change.since);
                }
                self.silent_since = self.silent_since.or(Some(change.since));
            }
            AgentEvent::Draining(change) if change.by.as_deref() == Some("operator") => self.status_seq = seq,
            AgentEvent::Connected(_) | AgentEvent::Degraded(_) | AgentEvent::Draining(_) => {
                self.status_seq = seq;
                self.silent_since = None;
            }
            AgentEvent::Gone(change) => {
                self.status_seq = seq;
                self.silent_since = None;
                if change.by.as_deref() != Some("instance") {
                    self.troubles().dismissed = true;
                }
            }
            AgentEvent::Quarantined(_) => self.troubles().quarantine_changed_at = time,
            AgentEvent::Released(_) => {
                self.troubles().quarantine_changed_at = time;
                // Later ones may have been read before this.
                self.troubles().losses.retain(|loss| loss.at > time);
            }
            AgentEvent::Updated(_)
            | AgentEvent::Superseded(_)
            | AgentEvent::Flapping(_)
            | AgentEvent::Settled(_) => {}
        }
        true
    }

    /// Whether the probe that its profile names is what made it well. Who beats may be well by its heartbeats alone.
    fn note_probe(&mut self, event: &AgentEvent) {
        let answered = match event {
            AgentEvent::Registered(_) => false,
            AgentEvent::Updated(profile) => {
                let probe = self.agent.profile.as_ref().and_then(|profile| profile.probe.as_ref());
                self.probe_answered() && probe == profile.probe.as_ref()
            }
            AgentEvent::Connected(change) | AgentEvent::Degraded(change) if change.by.is_none() => {
                !self.beats()
            }
            _ => return,
        };
        if answered != self.probe_answered() {
            self.troubles().probe_answered = answered;
        }
    }

    /// It does not beat, and was well by the probe that its profile names.
    #[must_use]
    pub fn probe_answered(&self) -> bool {
        self.troubles.as_deref().is_some_and(|troubles| troubles.probe_answered)
    }

    /// A drain of an operator holds until the next one, or until it is ended.
    fn note_drain(&mut self, event: &AgentEvent) {
        let asked = match event {
            AgentEvent::Draining(change) if change.by.as_deref() == Some("operator") && !change.undrained => {
                InFlight::deserialize(&change.evidence[ASKED][IN_FLIGHT]).ok()
            }
            _ if self.agent.operator_drain.is_none() => None,
            _ => return,
        };
        if asked != self.drain_in_flight() {
            self.troubles().drain_in_flight = asked;
        }
    }

    /// What an operator wants to become of its work at the deadline of a drain, if that was said.
    #[must_use]
    pub fn drain_in_flight(&self) -> Option<InFlight> {
        self.troubles.as_deref().and_then(|troubles| troubles.drain_in_flight)
    }

    /// An entry of this agent's subject that is no valid event: only its sequence counts.
    pub fn skip(&mut self, seq: u64) {
        self.agent.seq = self.agent.seq.max(seq);
    }

    fn troubles(&mut self) -> &mut Troubles {
        self.troubles.get_or_insert_default()
    }

    /// How long ago something in the log was, as far as our clock can tell: from before it was set it counts from then.
    #[must_use]
    pub fn age_ms(&self, at: Timestamp, now: Timestamp) -> u64 {
        now.since_ms(at.max(self.clock_set_at()))
    }

    fn clock_set_at(&self) -> Timestamp {
        self.troubles.as_deref().map_or(Timestamp::default(), |troubles| troubles.clock_set_at)
    }

    /// The clock was set: nothing in the log is older than now by it.
    /// What was over by the old time stays so, what is not begins anew, and nothing was in the future.
    fn rebase(&mut self, before: Timestamp, now: Timestamp) {
        if let Some(troubles) = &mut self.troubles {
            let set_at = troubles.clock_set_at;
            let is_within = |at: Timestamp, window_ms| before.since_ms(at.max(set_at)) < window_ms;
            troubles.falls.retain(|at| is_within(*at, FLAP_WINDOW_MS));
            troubles.losses.retain(|loss| is_within(loss.at, LOSS_WINDOW_MS));
            troubles.penalty.rebase(set_at, before, now);
            for at in &mut troubles.falls {
                *at = (*at).min(now);
            }
            for loss in &mut troubles.losses {
                loss.at = loss.at.min(now);
            }
            troubles.quarantine_changed_at = troubles.quarantine_changed_at.min(now);
        }
        if self.troubles.is_some() || self.agent.silent_since.is_some() {
            self.troubles().clock_set_at = now;
        }
    }

    /// When something in the log is so old.
    fn old_at(&self, at: Timestamp, age_ms: u64) -> Timestamp {
        at.max(self.clock_set_at()).plus_ms(age_ms)
    }

    /// When an agent in error is forgotten.
    #[must_use]
    pub fn forget_due(&self, forget_after_ms: u64) -> Option<Timestamp> {
        self.agent.silent_since.map(|since| self.old_at(since, forget_after_ms))
    }

    /// No status event has come since the current instance registered.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.registered_seq > self.status_seq
    }

    /// The current instance was superseded or is gone.
    #[must_use]
    pub fn current_is_past(&self) -> bool {
        self.agent.instance_id.as_ref().is_some_and(|instance| self.agent.is_past(instance))
    }

    /// Its current instance was forgotten: by an operator, or because it was bad for too long. It may live.
    #[must_use]
    pub fn was_dismissed(&self) -> bool {
        self.troubles.as_deref().is_some_and(|troubles| troubles.dismissed) && self.current_is_past()
    }

    /// It sends heartbeats (it is not from the agents file).
    #[must_use]
    pub fn beats(&self) -> bool {
        !self.agent.is_from_file()
    }
}

/// Whatever an event says, it did not begin after it was told: by a clock that was ahead it would be younger than it is.
fn not_after(event: &AgentEvent, time: Timestamp) -> Cow<'_, AgentEvent> {
    let mut event = Cow::Borrowed(event);
    let is_later = match &*event {
        AgentEvent::Connected(change)
        | AgentEvent::Degraded(change)
        | AgentEvent::Disconnected(change)
        | AgentEvent::Error(change)
        | AgentEvent::Draining(change)
        | AgentEvent::Gone(change) => change.since > time,
        _ => false,
    };
    if is_later
        && let AgentEvent::Connected(change)
        | AgentEvent::Degraded(change)
        | AgentEvent::Disconnected(change)
        | AgentEvent::Error(change)
        | AgentEvent::Draining(change)
        | AgentEvent::Gone(change) = event.to_mut()
    {
        change.since = time;
    }
    event
}

fn remember<T>(all: &mut Vec<T>, one: T, most: usize) {
    if all.len() >= most {
        all.remove(0);
    }
    all.push(one);
}

/// One agent.
#[derive(Debug)]
pub struct Entry {
    /// From the log.
    pub known: Known,
    /// From our own ears.
    pub live: Live,
    /// What is under way about it.
    pub work: Work,
}

/// What is under way about an agent.
#[derive(Debug, Default)]
pub struct Work {
    /// An append or a read of its history is in flight.
    pub busy: bool,
    /// It waits for room to append.
    pub queued: bool,
    /// The log did not take its last event; not before then.
    pub retry_at: Option<Timestamp>,
    /// When its timer goes off; later or stale entries of the timer are ignored.
    pub armed: Option<Timestamp>,
    /// Goodbyes that were said.
    pub partings: Option<Box<Partings>>,
    /// Times in a row that the log did not take its event.
    pub refusals: u32,
    /// The scheduler probes something for it.
    pub probed: bool,
}

/// Goodbyes that were said to an agent's instances.
#[derive(Debug, Default)]
pub struct Partings {
    /// When a past instance was told the last time.
    pub past_at: Option<Timestamp>,
    /// Its drain deadline was acted upon for this drain, at this time.
    pub drain: Option<(Timestamp, Timestamp)>,
    /// When it was told the last time that its work stands still.
    pub still_at: Option<Timestamp>,
}

/// Place of an agent in the fleet. Never reused.
pub type Index = u32;

/// All agents.
#[derive(Debug, Default)]
pub struct Fleet {
    entries: Vec<Entry>,
    index: HashMap<AgentId, Index>,
    counts: [u64; Status::ALL.len()],
    /// Nothing from before counts as silence: we could not hear.
    pub floor: Timestamp,
    /// We can't hear now.
    pub deaf: bool,
    /// When the link came back the last time.
    pub reconnected_at: Option<Timestamp>,
    /// Holes in the numbers of heartbeats, of many agents at once.
    pub gaps: Gaps,
    /// Holes that nobody has counted yet.
    pub holes: u64,
}

/// There is no room for another agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{AGENTS_MAX} agents are known, no more are taken")]
pub struct FleetFull;

impl Fleet {
    /// How many agents are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where an agent is.
    #[must_use]
    pub fn find(&self, id: &str) -> Option<Index> {
        self.index.get(id).copied()
    }

    /// Where an agent is; made if it is new.
    ///
    /// # Errors
    /// [`FleetFull`]
    pub fn find_or_add(&mut self, id: &AgentId) -> Result<Index, FleetFull> {
        if let Some(index) = self.index.get(id) {
            return Ok(*index);
        }
        if self.entries.len() >= AGENTS_MAX {
            return Err(FleetFull);
        }
        let index = Index::try_from(self.entries.len()).map_err(|_| FleetFull)?;
        self.index.insert(id.clone(), index);
        self.entries.push(Entry {
            known: Known::new(id.clone()),
            live: Live::default(),
            work: Work::default(),
        });
        Ok(index)
    }

    /// One agent.
    #[must_use]
    pub fn get(&self, index: Index) -> Option<&Entry> {
        self.entries.get(index as usize)
    }

    /// One agent.
    pub fn get_mut(&mut self, index: Index) -> Option<&mut Entry> {
        self.entries.get_mut(index as usize)
    }

    /// One agent, and what its heartbeats' numbers are compared in.
    pub fn get_with_gaps(&mut self, index: Index) -> Option<(&mut Entry, &mut Gaps)> {
        self.entries.get_mut(index as usize).map(|entry| (entry, &mut self.gaps))
    }

    /// All agents with their places, in the order they were heard of.
    pub fn iter(&self) -> impl Iterator<Item = (Index, &Entry)> {
        (0..).zip(self.entries.iter())
    }

    /// Agents with this status.
    #[must_use]
    pub fn count(&self, status: Status) -> u64 {
        self.counts[status as usize]
    }

    /// Folds an event of the log in. `ours`: this process appended it. Returns whether it was news.
    pub fn apply(&mut self, index: Index, seq: u64, event: &AgentEvent, time: Timestamp, ours: bool) -> bool {
        let Some(entry) = self.entries.get_mut(index as usize) else { return false };
        let before = entry.known.agent.status;
        if !entry.known.apply(seq, event, time) {
            return false;
        }
        let after = entry.known.agent.status;
        if before != after {
            if let Some(status) = before {
                self.counts[status as usize] -= 1;
            }
            if let Some(status) = after {
                self.counts[status as usize] += 1;
            }
        }
        entry.live.settled = false;
        entry.live.follow(&entry.known, event, time, ours);
        true
    }

    /// The clock was set, from `before` to `now`: whatever was measured with it starts at its new time.
    pub fn rebase(&mut self, before: Timestamp, now: Timestamp) {
        self.floor = now;
        self.reconnected_at = self.reconnected_at.map(|_| now);
        for entry in &mut self.entries {
            entry.known.rebase(before, now);
            entry.work.armed = None;
            entry.work.retry_at = None;
            entry.work.partings = None;
            entry.live.heard_at = entry.live.heard_at.map(|_| now);
            entry.live.anchor = now;
            entry.live.claims_since = now;
            if let Some(probe) = &mut entry.live.probe {
                probe.listening.rebase(now);
            }
        }
    }

    /// Evidence is void: the failures that were counted count for nothing, also where the log has not taken their event yet.
    pub fn void(&mut self, now: Timestamp) {
        self.floor = self.floor.max(now);
        for entry in &mut self.entries {
            entry.live.recount(self.floor);
        }
    }

    /// Evidence from before `now` is void: every clock starts again.
    pub fn restart_clocks(&mut self, now: Timestamp) {
        self.floor = self.floor.max(now);
        self.gaps.restart(now);
    }
}
