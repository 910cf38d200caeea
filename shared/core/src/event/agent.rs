//! What can happen to an agent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{DecodeError, from_raw};
use crate::{
    agent::Status,
    ids::{AgentId, InstanceId, Pool},
    time::Timestamp,
    wire::Endpoint,
};

/// `agent.registered` and `agent.updated`: what an instance says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The agent.
    pub agent_id: AgentId,
    /// The instance that counts from now on.
    pub instance_id: InstanceId,
    /// Executions it can hold at once.
    pub capacity: u32,
    /// Its pool.
    pub pool: Pool,
    /// When to expect its heartbeats; `None`: the fleet's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// Its default execution timeout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Its version, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Where it wants to be probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Endpoint>,
    /// Where it is driven, when not over NATS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Endpoint>,
}

/// `agent.connected`, `degraded`, `disconnected`, `error`, `draining`, `gone`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusChanged {
    /// The agent.
    pub agent_id: AgentId,
    /// Its current instance; `None` for an agent without heartbeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// The status before; `None`: it had none.
    pub previous: Option<Status>,
    /// Why, in one or two words: `first_heartbeat`, `missed_heartbeats`, `sigterm`, `forgotten` ...
    pub reason: String,
    /// Since when it is so.
    pub since: Timestamp,
    /// What was seen.
    #[serde(default)]
    pub evidence: serde_json::Value,
    /// Who decided it when it was not the detector: `operator` or `instance`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// With `error`: `unreachable`, `auth`, `tls`, `protocol`, `identity`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// With `error`: one sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// With `draining`: when the operator wants it to be over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// An operator's drain ends with this event.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undrained: bool,
}

/// `agent.superseded`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superseded {
    /// The agent.
    pub agent_id: AgentId,
    /// The instance that no longer counts.
    pub instance_id: InstanceId,
    /// The one that counts instead.
    pub by_instance_id: InstanceId,
}

/// `agent.flapping`, `settled`, `quarantined`, `released`: marks beside the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// The agent.
    pub agent_id: AgentId,
    /// Its instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// Why.
    pub reason: String,
    /// How many falls or losses were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Who decided, when an operator did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

macro_rules! agent_events {
    ($($variant:ident($payload:ident) = $name:literal),+ $(,)?) => {
        /// An event about an agent.
        #[derive(Debug, Clone, PartialEq)]
        pub enum AgentEvent {
            $(#[doc = concat!("`agent.", $name, "`")] $variant($payload),)+
        }

        impl AgentEvent {
            /// The names of all of them, as they stand after the family in a type.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// The type without `rollcall.` before it.
            #[must_use]
            pub fn short_type(&self) -> &'static str {
                match self { $(Self::$variant(_) => concat!("agent.", $name),)+ }
            }

            /// The agent it speaks of.
            #[must_use]
            pub fn agent_id(&self) -> &AgentId {
                match self { $(Self::$variant(event) => &event.agent_id,)+ }
            }

            pub(super) fn encode_in(&self, event: &super::Event) -> Vec<u8> {
                match self { $(Self::$variant(payload) => event.envelope(payload),)+ }
            }

            pub(super) fn decode(name: &str, raw: &RawValue) -> Result<Option<Self>, DecodeError> {
                Ok(Some(match name {
                    $($name => Self::$variant(from_raw(raw)?),)+
                    _ => return Ok(None),
                }))
            }
        }
    };
}

agent_events! {
    Registered(Profile) = "registered",
    Updated(Profile) = "updated",
    Connected(StatusChanged) = "connected",
    Degraded(StatusChanged) = "degraded",
    Disconnected(StatusChanged) = "disconnected",
    Error(StatusChanged) = "error",
    Draining(StatusChanged) = "draining",
    Gone(StatusChanged) = "gone",
    Superseded(Superseded) = "superseded",
    Flapping(Marked) = "flapping",
    Settled(Marked) = "settled",
    Quarantined(Marked) = "quarantined",
    Released(Marked) = "released",
}

impl AgentEvent {
    /// The event that says `status` came about.
    #[must_use]
    pub fn status(status: Status, change: StatusChanged) -> Self {
        match status {
            Status::Connected => Self::Connected(change),
            Status::Degraded => Self::Degraded(change),
            Status::Disconnected => Self::Disconnected(change),
            Status::Error => Self::Error(change),
            Status::Draining => Self::Draining(change),
            Status::Gone => Self::Gone(change),
        }
    }
}
