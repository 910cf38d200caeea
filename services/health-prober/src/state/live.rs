//! What this process has seen of an agent, and how silence is counted.

use rollcall_core::agent::Status;
use rollcall_core::event::{AgentEvent, Profile, StatusChanged};
use rollcall_core::gaps::Steps;
use rollcall_core::wire::{AgentState, Endpoint};
use rollcall_core::{InstanceId, Timestamp};

use super::{Known, Listening};
use crate::config::Policy;
use crate::detector::{Cause, Channel, Channels, Evidence, Grade};
use rollcall_control::Trust;
use serde::Deserialize as _;

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
    /// Who listens where it is asked over the bus.
    pub listening: Listening,
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
    /// It holds something, and names a progress for everything that it holds; only with an activity timeout.
    pub measured: bool,
    /// Since when the claims stand still, as far as it was heard without a gap.
    pub claims_since: Timestamp,
    /// Its active probe.
    pub probe: Option<Box<ProbeSeen>>,
    /// The operator took its description out of the agents file.
    pub removed: bool,
    /// Another prober said last how it is in error; these were our own causes then. The same ones are no reason to
    /// contradict it.
    pub overruled: Option<Causes>,
    /// Nothing is to be decided until something else is heard.
    pub settled: bool,
    /// How its heartbeats are numbered.
    pub steps: Steps,
}

/// Why heartbeat and probe are bad, where they are.
pub type Causes = (Option<Cause>, Option<Cause>);

impl Live {
    /// Adjusts what was seen to what the log says now.
    pub(super) fn follow(&mut self, known: &Known, event: &AgentEvent, time: Timestamp, ours: bool) {
        match event {
            // Another prober heard an instance that we have not heard yet: its clock starts with its registration.
            AgentEvent::Registered(profile)
                if !ours && self.instance.as_ref() != Some(&profile.instance_id) =>
            {
                self.meet(profile.instance_id.clone(), time);
            }
            // Whatever we counted, the agent is silent by the log: from here it takes the success threshold.
            AgentEvent::Disconnected(_) | AgentEvent::Error(_) if !ours => self.become_bad(),
            AgentEvent::Connected(change) | AgentEvent::Degraded(change) | AgentEvent::Draining(change)
                if !ours =>
            {
                self.agree(change, time);
            }
            _ => {}
        }
        if matches!(event, AgentEvent::Registered(_) | AgentEvent::Updated(_)) {
            // What it says of itself was compared with what the log said until now.
            self.fingerprint = 0;
        }
        if matches!(event, AgentEvent::Error(_)) {
            self.overruled = (!ours).then(|| self.causes());
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

    /// Another prober's view holds until we see something ourselves. If ours held on only because it is older, the two
    /// would contradict each other as fast as the log takes it.
    fn agree(&mut self, change: &StatusChanged, time: Timestamp) {
        let seen = |channel: &str| Grade::deserialize(&change.evidence[channel]["grade"]).unwrap_or_default();
        let beat = seen("heartbeat");
        self.beat.agree(beat);
        if let Some(probe) = &mut self.probe {
            probe.channel.agree(seen("probe"));
        }
        if beat != Grade::Bad {
            // Somebody heard it: that is as good as having heard it ourselves, once.
            self.anchor = self.anchor.max(time);
        }
    }

    /// Why each channel is bad, where it is.
    #[must_use]
    pub fn causes(&self) -> Causes {
        (self.beat.cause, self.probe.as_ref().and_then(|probe| probe.channel.cause))
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
        *self = Self {
            instance: Some(instance),
            anchor: now,
            claims_since: now,
            // Its agent is counted once, whatever instances it goes through.
            steps: self.steps,
            ..Self::default()
        };
    }

    /// From when silence counts.
    #[must_use]
    pub fn silent_from(&self, floor: Timestamp) -> Timestamp {
        self.anchor.max(floor)
    }

    /// Since when its work stands still, as far as we could see.
    #[must_use]
    pub fn still_since(&self, floor: Timestamp) -> Timestamp {
        self.claims_since.max(floor)
    }

    /// Its work stands still by its own word: it was heard within its interval, names a progress for everything that it
    /// holds, and nothing of that has moved for so long.
    #[must_use]
    pub fn stands_still(&self, floor: Timestamp, interval_ms: u64, timeout_ms: u64, now: Timestamp) -> bool {
        self.measured
            && self.heard_at.is_some_and(|heard| now.since_ms(heard) <= interval_ms)
            && now.since_ms(self.still_since(floor)) >= timeout_ms
    }

    /// All channels, as the detector wants them. Nobody is pinged beyond the threshold: what was answered there holds.
    #[must_use]
    pub fn channels(&self, beats: bool, failure_threshold: u32) -> Channels {
        Channels {
            beat: beats.then_some(self.beat),
            vouched: self.edge.vouched > 0 && self.edge.vouched >= self.beat.fails.min(failure_threshold),
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
