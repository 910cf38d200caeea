//! The agent as the log tells it: `evolve` folds events, nothing else changes it.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::{
    event::{AgentEvent, Profile, StatusChanged},
    ids::{AgentId, InstanceId, Pool},
    time::Timestamp,
    wire::Endpoint,
};

pub use crate::ids::FILE_INSTANCE_PREFIX;

/// An agent's status (PROTOCOL.md 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Good evidence on every channel.
    Connected,
    /// One of several channels bad or slow.
    Degraded,
    /// Every channel bad, below the threshold.
    Disconnected,
    /// Every channel bad, at the threshold; or reachable and wrong.
    Error,
    /// Finishes what it has.
    Draining,
    /// Only a new instance comes back.
    Gone,
}

impl Status {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 6] =
        [Self::Connected, Self::Degraded, Self::Disconnected, Self::Error, Self::Draining, Self::Gone];

    /// The name on the wire and in subjects.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Degraded => "degraded",
            Self::Disconnected => "disconnected",
            Self::Error => "error",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }

    /// Whether an agent with this status is given work.
    #[must_use]
    pub const fn takes_work(self) -> bool {
        matches!(self, Self::Connected | Self::Degraded)
    }

    /// Whether every channel is bad.
    #[must_use]
    pub const fn is_silent(self) -> bool {
        matches!(self, Self::Disconnected | Self::Error)
    }
}

/// On whose word an instance is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Parting {
    /// Its own: it handed back or finished all that it had.
    Goodbye,
    /// An operator's: by `forget`, or its row was taken out of the agents file. It may live.
    Dismissed,
    /// Nobody's: it was bad for too long. It may live.
    Forgotten,
}

impl Parting {
    /// By the `by` of its event.
    #[must_use]
    pub fn of(by: Option<&str>) -> Self {
        match by {
            Some("instance") => Self::Goodbye,
            Some("operator") => Self::Dismissed,
            _ => Self::Forgotten,
        }
    }

    /// The name in evidence.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Goodbye => "goodbye",
            Self::Dismissed => "dismissed",
            Self::Forgotten => "forgotten",
        }
    }
}

/// A wish to drain, apart from health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
    /// By when, if anybody said.
    pub deadline: Option<Timestamp>,
}

/// One agent, folded from its events.
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// Its id.
    pub id: AgentId,
    /// Sequence in the log of its last event.
    pub seq: u64,
    /// The instance that counts.
    pub instance_id: Option<InstanceId>,
    /// When that instance registered.
    pub registered_at: Option<Timestamp>,
    /// What that instance says of itself.
    pub profile: Option<Profile>,
    /// Its status; `None` until the first status event.
    pub status: Option<Status>,
    /// Since when.
    pub since: Timestamp,
    /// Why.
    pub reason: String,
    /// The status before.
    pub previous: Option<Status>,
    /// While it is gone: on whose word.
    pub parting: Option<Parting>,
    /// When it was last disconnected, or in error at once, while it still is.
    pub silent_since: Option<Timestamp>,
    /// With `error`.
    pub error_code: Option<String>,
    /// With `error`.
    pub error_message: Option<String>,
    /// The instance wants to drain.
    pub instance_drain: Option<Drain>,
    /// An operator wants it to drain; outlives instances.
    pub operator_drain: Option<Drain>,
    /// It loses work again and again and gets none.
    pub quarantined: Option<String>,
    /// Its status falls and rises too often.
    pub flapping: bool,
    /// Instances that never count again: superseded or gone.
    pub past: HashSet<InstanceId>,
}

impl Agent {
    /// An agent of which nothing is known.
    #[must_use]
    pub fn unknown(id: AgentId) -> Self {
        Self {
            id,
            seq: 0,
            instance_id: None,
            registered_at: None,
            profile: None,
            status: None,
            since: Timestamp::default(),
            reason: String::new(),
            previous: None,
            parting: None,
            silent_since: None,
            error_code: None,
            error_message: None,
            instance_drain: None,
            operator_drain: None,
            quarantined: None,
            flapping: false,
            past: HashSet::new(),
        }
    }

    /// Whether it was ever heard of.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.status.is_some() || self.profile.is_some()
    }

    /// Its pool.
    #[must_use]
    pub fn pool(&self) -> Pool {
        self.profile.as_ref().map_or_else(Pool::default, |p| p.pool.clone())
    }

    /// Executions it can hold at once.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.profile.as_ref().map_or(0, |p| p.capacity)
    }

    /// Its labels.
    #[must_use]
    pub fn labels(&self) -> Option<&BTreeMap<String, String>> {
        self.profile.as_ref().map(|p| &p.labels)
    }

    /// Where it is driven instead of over NATS. A control endpoint of a kind that nobody speaks is none.
    #[must_use]
    pub fn control(&self) -> Option<&Endpoint> {
        self.profile.as_ref().and_then(|p| p.control.as_ref()).filter(|control| control.is_driven())
    }

    /// Whether it is given work now. An instance that no longer counts gets none, whatever the status says.
    #[must_use]
    pub fn takes_work(&self) -> bool {
        self.status.is_some_and(Status::takes_work)
            && self.instance_id.as_ref().is_none_or(|instance| !self.is_past(instance))
            && self.quarantined.is_none()
            && self.operator_drain.is_none()
            && self.instance_drain.is_none()
    }

    /// Whether the operator described it in a file: it never beats, and its URLs are the operator's.
    #[must_use]
    pub fn is_from_file(&self) -> bool {
        self.instance_id.as_ref().is_some_and(InstanceId::is_of_file)
    }

    /// Whether a heartbeat of `instance` may never count again.
    #[must_use]
    pub fn is_past(&self, instance: &InstanceId) -> bool {
        self.past.contains(instance)
    }

    /// Folds one event in. `seq` is its sequence in the log; one that is not above the last is a repetition.
    pub fn evolve(&mut self, seq: u64, event: &AgentEvent, time: Timestamp) {
        if seq <= self.seq {
            return;
        }
        self.seq = seq;
        match event {
            AgentEvent::Registered(profile) => self.register(profile, time),
            AgentEvent::Updated(profile) => self.profile = Some(profile.clone()),
            AgentEvent::Connected(change) => self.change(Status::Connected, change),
            AgentEvent::Degraded(change) => self.change(Status::Degraded, change),
            AgentEvent::Disconnected(change) => self.change(Status::Disconnected, change),
            AgentEvent::Error(change) => self.change(Status::Error, change),
            AgentEvent::Draining(change) => self.change(Status::Draining, change),
            AgentEvent::Gone(change) => self.change(Status::Gone, change),
            AgentEvent::Superseded(event) => {
                self.past.insert(event.instance_id.clone());
            }
            AgentEvent::Flapping(_) => self.flapping = true,
            AgentEvent::Settled(_) => self.flapping = false,
            AgentEvent::Quarantined(mark) => self.quarantined = Some(mark.reason.clone()),
            AgentEvent::Released(_) => self.quarantined = None,
        }
    }

    fn register(&mut self, profile: &Profile, time: Timestamp) {
        if let Some(old) = self.instance_id.replace(profile.instance_id.clone())
            && old != profile.instance_id
        {
            self.past.insert(old);
        }
        self.registered_at = Some(time);
        self.profile = Some(profile.clone());
        self.parting = None;
        self.instance_drain = None;
        self.silent_since = None;
    }

    fn change(&mut self, status: Status, change: &StatusChanged) {
        if status.is_silent() {
            // Disconnected and then error is one silence.
            if !self.status.is_some_and(Status::is_silent) || self.silent_since.is_none() {
                self.silent_since = Some(change.since);
            }
        } else {
            self.silent_since = None;
        }
        if status == Status::Draining {
            let drain =
                Drain { reason: change.reason.clone(), since: change.since, deadline: change.deadline };
            match change.by.as_deref() {
                Some("operator") => self.operator_drain = Some(drain),
                Some("instance") => self.instance_drain = Some(drain),
                // Back to draining after a silence: the wish is known already.
                _ => {}
            }
        }
        if change.undrained {
            self.operator_drain = None;
        }
        if status == Status::Gone
            && let Some(instance) = self.instance_id.clone()
        {
            self.past.insert(instance);
        }
        self.parting = match (status, self.parting) {
            // What anybody says of it afterwards does not take its own word back.
            (Status::Gone, Some(Parting::Goodbye)) => self.parting,
            (Status::Gone, _) => Some(Parting::of(change.by.as_deref())),
            _ => None,
        };
        self.previous = change.previous;
        self.status = Some(status);
        self.since = change.since;
        self.reason = change.reason.clone();
        self.error_code = change.code.clone();
        self.error_message = change.message.clone();
    }
}

#[cfg(test)]
mod tests;
