//! What the prober knows: the agents as the log tells them, and what it has seen of each since it started.

use std::collections::HashMap;

use rollcall_core::agent::{Agent, Status};
use rollcall_core::event::{AgentEvent, Profile, RecoveryReason};
use rollcall_core::wire::{AgentState, Endpoint};
use rollcall_core::{AgentId, InstanceId, Timestamp};

use crate::config::Policy;
use crate::detector::{Cause, Channel, Channels, Evidence, Grade};
use crate::guard::Trust;

/// Falls within [`FLAP_WINDOW_MS`] that make an agent flapping (PROTOCOL.md 2).
pub const FLAP_FALLS: usize = 4;
/// Five minutes (PROTOCOL.md 2).
pub const FLAP_WINDOW_MS: u64 = 300_000;
/// Losses within [`LOSS_WINDOW_MS`] that quarantine an agent (PROTOCOL.md 5).
pub const LOSSES_MAX: usize = 5;
/// Ten minutes (PROTOCOL.md 5); also how long without a loss lifts a quarantine.
pub const LOSS_WINDOW_MS: u64 = 600_000;
/// Agents that one prober follows; more are refused.
pub const AGENTS_MAX: usize = 2_000_000;
/// What the instance ids of agents from the agents file start with. They never beat.
pub const FILE_INSTANCE_PREFIX: &str = "file-";

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

/// What an agent is marked for.
#[derive(Debug, Clone, Default)]
struct Troubles {
    /// Times of its last falls from well to silent, oldest first; emptied by a new instance.
    falls: Vec<Timestamp>,
    /// Times of work it lost, oldest first.
    losses: Vec<Timestamp>,
    /// When it was quarantined or released the last time.
    quarantine_changed_at: Timestamp,
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
        let before = self.agent.status;
        self.agent.evolve(seq, event, time);
        if let (AgentEvent::Registered(_) | AgentEvent::Updated(_), Some(profile)) =
            (event, &mut self.agent.profile)
        {
            // One text instead of two: there may be a million of them.
            profile.agent_id.clone_from(&self.agent.id);
        }
        match event {
            AgentEvent::Registered(_) => {
                self.registered_seq = seq;
                self.silent_since = None;
                // What its predecessor did is not held against a new instance.
                if let Some(troubles) = &mut self.troubles {
                    troubles.falls = Vec::new();
                }
            }
            AgentEvent::Disconnected(change) | AgentEvent::Error(change) => {
                self.status_seq = seq;
                self.silent_since = self.silent_since.or(Some(change.since));
                if before.is_some_and(|status| !status.is_silent() && status != Status::Gone) {
                    remember(&mut self.troubles().falls, change.since, FLAP_FALLS);
                }
            }
            AgentEvent::Draining(change) if change.by.as_deref() == Some("operator") => self.status_seq = seq,
            AgentEvent::Connected(_)
            | AgentEvent::Degraded(_)
            | AgentEvent::Draining(_)
            | AgentEvent::Gone(_) => {
                self.status_seq = seq;
                self.silent_since = None;
            }
            AgentEvent::Quarantined(_) => self.troubles().quarantine_changed_at = time,
            AgentEvent::Released(_) => {
                self.troubles().quarantine_changed_at = time;
                self.troubles().losses = Vec::new();
            }
            AgentEvent::Updated(_)
            | AgentEvent::Superseded(_)
            | AgentEvent::Flapping(_)
            | AgentEvent::Settled(_) => {}
        }
        true
    }

    /// An entry of this agent's subject that is no valid event: only its sequence counts.
    pub fn skip(&mut self, seq: u64) {
        self.agent.seq = self.agent.seq.max(seq);
    }

    /// It lost work. Timeouts are the work's fault, and work handed back is not lost.
    pub fn lose(&mut self, reason: RecoveryReason, returned: bool, time: Timestamp) {
        if reason != RecoveryReason::TimedOut && !returned && time > self.troubles().quarantine_changed_at {
            remember(&mut self.troubles().losses, time, LOSSES_MAX);
        }
    }

    fn troubles(&mut self) -> &mut Troubles {
        self.troubles.get_or_insert_default()
    }

    fn times(&self, which: impl Fn(&Troubles) -> &Vec<Timestamp>) -> &[Timestamp] {
        self.troubles.as_deref().map_or(&[], |troubles| which(troubles))
    }

    /// Falls within the window that ends now.
    #[must_use]
    pub fn falls(&self, now: Timestamp) -> usize {
        self.times(|t| &t.falls).iter().filter(|at| now.since_ms(**at) < FLAP_WINDOW_MS).count()
    }

    /// When the oldest fall leaves the window.
    #[must_use]
    pub fn next_fall_expiry(&self, now: Timestamp) -> Option<Timestamp> {
        self.times(|t| &t.falls).iter().map(|at| at.plus_ms(FLAP_WINDOW_MS)).filter(|at| *at > now).min()
    }

    /// Losses within the window that ends now.
    #[must_use]
    pub fn losses(&self, now: Timestamp) -> usize {
        self.times(|t| &t.losses).iter().filter(|at| now.since_ms(**at) < LOSS_WINDOW_MS).count()
    }

    /// When good behaviour lifts a quarantine.
    #[must_use]
    pub fn release_due(&self) -> Timestamp {
        let last = self.times(|t| &t.losses).last().copied().unwrap_or_default();
        let changed = self.troubles.as_deref().map_or(Timestamp::default(), |t| t.quarantine_changed_at);
        last.max(changed).plus_ms(LOSS_WINDOW_MS)
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

    /// It sends heartbeats (it is not from the agents file).
    #[must_use]
    pub fn beats(&self) -> bool {
        self.agent
            .instance_id
            .as_ref()
            .is_none_or(|instance| !instance.as_str().starts_with(FILE_INSTANCE_PREFIX))
    }
}

fn remember(times: &mut Vec<Timestamp>, at: Timestamp, most: usize) {
    if times.len() >= most {
        times.remove(0);
    }
    times.push(at);
}

/// Whether an instance answers on its `ping` subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Answers {
    /// It was not asked yet, or too seldom to tell.
    #[default]
    Unknown,
    /// It answered before: from then on "no responders" is evidence.
    Yes,
    /// It was asked while it was certainly alive and does not listen there.
    No,
}

/// The pings at the edge of a late heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Edge {
    /// Whether this instance answers pings.
    pub answers: Answers,
    /// A ping is on its way.
    pub waiting: bool,
    /// Times it was asked while it was alive and nobody was there.
    pub introductions: u8,
    /// The failure that the last ping was meant to confirm or refute.
    pub pinged: u32,
    /// The last failure before which a ping was answered.
    pub vouched: u32,
}

/// What became of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PingOutcome {
    /// It answered.
    Answered,
    /// Nobody listens there.
    NoResponders,
    /// No answer in time, or no link: says nothing.
    Nothing,
}

/// Introductions after which an instance that does not answer is not asked any more.
pub const INTRODUCTIONS_MAX: u8 = 3;

/// What was last seen of an active probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeSeen {
    /// What is probed.
    pub endpoint: Endpoint,
    /// For this instance.
    pub instance_id: InstanceId,
    /// Who named it.
    pub trust: Trust,
    /// Only reports of this watch count.
    pub generation: u64,
    /// Its counters.
    pub channel: Channel,
    /// `ok`, `slow`, a cause, or why it is not probed.
    pub result: String,
    /// When.
    pub checked_at: Option<Timestamp>,
    /// How long it took, if it was made.
    pub latency_ms: Option<u64>,
}

/// What this process has seen of an agent. Nothing of it outlives the process.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// The instance that was heard last and counts, in the log already or about to be.
    pub instance: Option<InstanceId>,
    /// Last sequence number of it.
    pub seq: u64,
    /// When it was heard last.
    pub heard_at: Option<Timestamp>,
    /// From when its silence counts: its last heartbeat, or when we took over.
    pub anchor: Timestamp,
    /// The anchor that the failures of `beat` were counted from.
    pub counted_from: Timestamp,
    /// What it says of itself, as bytes hash; 0: compare anew.
    pub fingerprint: u64,
    /// What it says of itself, while that is not in the log yet.
    pub profile: Option<Box<Profile>>,
    /// It said that it drains.
    pub draining: bool,
    /// It said goodbye.
    pub gone: bool,
    /// Why it drains or went.
    pub reason: Option<Box<str>>,
    /// Heartbeat counters.
    pub beat: Channel,
    /// Edge pings.
    pub edge: Edge,
    /// Executions it claimed last.
    pub executions: u32,
    /// Hash of its claims with their progress; only with an activity timeout.
    pub claims: u64,
    /// Since when the claims stand still.
    pub claims_since: Timestamp,
    /// Its active probe.
    pub probe: Option<Box<ProbeSeen>>,
    /// Nothing is to be decided until something else is heard.
    pub settled: bool,
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

    /// The clock was set: whatever was measured with it starts at its new time.
    pub fn rebase(&mut self, now: Timestamp) {
        self.floor = now;
        self.reconnected_at = self.reconnected_at.map(|_| now);
        for entry in &mut self.entries {
            entry.work.armed = None;
            entry.work.retry_at = None;
            entry.work.partings = None;
            entry.live.heard_at = entry.live.heard_at.map(|_| now);
            entry.live.anchor = now;
            entry.live.claims_since = now;
        }
    }

    /// Evidence from before `now` is void: every clock starts again.
    pub fn restart_clocks(&mut self, now: Timestamp) {
        self.floor = self.floor.max(now);
    }
}

impl Live {
    /// Adjusts what was seen to what the log says now.
    fn follow(&mut self, known: &Known, event: &AgentEvent, time: Timestamp, ours: bool) {
        match event {
            // Another prober heard an instance that we have not heard yet: its clock starts with its registration.
            AgentEvent::Registered(profile)
                if !ours && self.instance.as_ref() != Some(&profile.instance_id) =>
            {
                self.meet(profile.instance_id.clone(), time);
            }
            // Whatever we counted, the agent is silent by the log: from here it takes the success threshold.
            AgentEvent::Disconnected(_) | AgentEvent::Error(_) if !ours => self.become_bad(),
            // Somebody heard it: that is as good as having heard it ourselves, once.
            AgentEvent::Connected(_) | AgentEvent::Degraded(_) if !ours => {
                self.anchor = self.anchor.max(time)
            }
            _ => {}
        }
        let status = known.agent.status;
        if self.heard_at.is_none() && !ours {
            // We have heard nothing of it: the log's word is all there is.
            if status.is_some_and(Status::is_silent) {
                self.become_bad();
            } else {
                self.beat = Channel::default();
            }
        }
    }

    fn become_bad(&mut self) {
        if self.beat.grade != Grade::Bad {
            self.beat = Channel::bad();
        }
        self.beat.goods = 0;
        if let Some(probe) = &mut self.probe
            && probe.channel.grade != Grade::Bad
        {
            probe.channel = Channel::bad();
        }
    }

    /// Starts over with another instance.
    pub fn meet(&mut self, instance: InstanceId, now: Timestamp) {
        *self = Self { instance: Some(instance), anchor: now, claims_since: now, ..Self::default() };
    }

    /// From when silence counts.
    #[must_use]
    pub fn silent_from(&self, floor: Timestamp) -> Timestamp {
        self.anchor.max(floor)
    }

    /// All channels, as the detector wants them.
    #[must_use]
    pub fn channels(&self, beats: bool) -> Channels {
        Channels {
            beat: beats.then_some(self.beat),
            vouched: self.edge.vouched > 0 && self.edge.vouched >= self.beat.fails,
            probe: self.probe.as_ref().map(|probe| probe.channel),
        }
    }

    /// A heartbeat was accepted.
    pub fn beaten(&mut self, now: Timestamp, successes: u32) {
        self.heard_at = Some(now);
        self.anchor = now;
        self.counted_from = now;
        self.edge.pinged = 0;
        self.edge.vouched = 0;
        self.beat.take(Evidence::Good, successes);
    }

    /// Counts the heartbeats that did not come until `now`; what was counted before a void is forgotten.
    pub fn miss(&mut self, floor: Timestamp, interval_ms: u64, now: Timestamp) {
        self.recount(floor);
        let missed = misses(now.since_ms(self.counted_from), interval_ms);
        if missed > 0 {
            self.beat.fail_to(missed, Cause::MissedHeartbeat);
        }
    }

    /// Starts counting anew if the clock was started anew since.
    pub fn recount(&mut self, floor: Timestamp) {
        let from = self.silent_from(floor);
        if self.counted_from != from {
            self.counted_from = from;
            self.edge.pinged = 0;
            self.edge.vouched = 0;
            self.beat.take(Evidence::Void, 0);
        }
    }
}

/// Failures after `elapsed` without a heartbeat: failure k falls at (k + 0.5) intervals (PROTOCOL.md 2).
#[must_use]
pub fn misses(elapsed_ms: u64, interval_ms: u64) -> u32 {
    let interval_ms = interval_ms.max(1);
    u32::try_from(elapsed_ms.saturating_sub(interval_ms / 2) / interval_ms).unwrap_or(u32::MAX)
}

/// When failure `k` falls, counted from the last heartbeat.
#[must_use]
pub fn miss_after_ms(k: u32, interval_ms: u64) -> u64 {
    interval_ms.saturating_mul(u64::from(k)).saturating_add(interval_ms / 2)
}

/// When the ping that confirms or refutes failure `k` early goes out: a fifth of an interval late. Later than ordinary
/// jitter, and early enough for an answer (or "no responders") well before the failure falls by itself.
#[must_use]
pub fn edge_after_ms(k: u32, interval_ms: u64) -> u64 {
    interval_ms.saturating_mul(u64::from(k)).saturating_add(interval_ms / 5)
}

/// The interval that is expected of an agent.
#[must_use]
pub fn interval_ms(known: &Known, live: &Live, policy: &Policy) -> u64 {
    let profile = live.profile.as_deref().or(known.agent.profile.as_ref());
    profile.and_then(|profile| profile.interval_ms).unwrap_or(policy.interval_ms)
}

/// Whether a heartbeat's state announces the end.
#[must_use]
pub fn is_leaving(state: AgentState) -> bool {
    matches!(state, AgentState::Draining | AgentState::Gone)
}
