//! What the fleet asks of an agent, and what the agent answers.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize, de::IntoDeserializer};
use serde_json::value::RawValue;

use super::{AgentState, OwnedClaim};
use crate::{
    ids::{ExecutionId, InstanceId},
    time::Timestamp,
};

/// Take this execution.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DispatchRequest {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
    /// How long it may run.
    pub timeout_ms: u64,
    /// When its time is up, by the fleet's clock.
    pub deadline: Timestamp,
    /// What the submitter handed in, its bytes untouched.
    pub input: Box<RawValue>,
    /// Where an earlier attempt had got to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Box<RawValue>>,
}

/// The reason with which an agent refuses what it can never do: the execution fails. With any other but
/// [`TERMINATED`] it may take it later, so the execution goes back to its queue (PROTOCOL.md 3).
pub const UNSUPPORTED: &str = "unsupported";

/// The reason of an agent that was told to end this attempt, perhaps while it ran, before the dispatch came (PROTOCOL.md 3).
pub const TERMINATED: &str = "terminated";

/// The answer to a dispatch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DispatchReply {
    /// It is taken, and listed from now on.
    pub accepted: bool,
    /// Why not: `draining`, `at_capacity`, `unsupported` ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// End this execution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminateRequest {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
    /// Why: `timed_out`, `stalled`, `cancelled`, `zombie` ...
    pub reason: String,
    /// Time between asking it to end and killing it.
    pub grace_ms: u64,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TerminateState {
    /// The work is dead.
    Terminated,
    /// It was not running here.
    NotRunning,
    /// It lives.
    StillRunning,
}

/// The answer to a terminate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminateReply {
    /// What became of it.
    pub state: TerminateState,
}

/// Why an instance is told goodbye.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoodbyeReason {
    /// A newer instance of the same agent is there.
    Superseded,
    /// It beats and does nothing that it was given.
    ActivityTimeout,
    /// An operator wants it.
    Operator,
    /// The agent is being drained.
    Drain,
    /// Start again.
    Restart,
    /// Whoever said it named no reason, or one that we don't know.
    #[default]
    Unknown,
}

impl GoodbyeReason {
    /// The reason of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let name: serde::de::value::StrDeserializer<'_, serde::de::value::Error> = name.into_deserializer();
        Self::deserialize(name).ok()
    }
}

/// A later fleet may know reasons that we don't: whoever is told to go has to go all the same.
fn named_or_unknown<'de, D: Deserializer<'de>>(deserializer: D) -> Result<GoodbyeReason, D::Error> {
    let name: Option<Cow<'de, str>> = Option::deserialize(deserializer)?;
    Ok(name.and_then(|name| GoodbyeReason::named(&name)).unwrap_or_default())
}

/// What is to become of the work in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InFlight {
    /// Finish it until the deadline, then return it.
    #[default]
    Finish,
    /// Return it now.
    Return,
    /// End it now.
    Abort,
}

/// Shut down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// Why.
    #[serde(default, deserialize_with = "named_or_unknown")]
    pub reason: GoodbyeReason,
    /// How long the drain may take.
    pub deadline_ms: u64,
    /// What is to become of the work in flight.
    #[serde(default)]
    pub in_flight: InFlight,
}

/// The answer to a goodbye.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoodbyeReply {
    /// It is heard.
    pub ok: bool,
}

/// The answer to `executions`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecutionsReply {
    /// Who answers.
    pub instance_id: InstanceId,
    /// The seq of its latest heartbeat.
    pub seq: u64,
    /// Everything it holds.
    pub executions: Vec<OwnedClaim>,
}

/// The answer to `ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReply {
    /// Who answers.
    pub instance_id: InstanceId,
    /// What it says of itself.
    pub state: AgentState,
}
