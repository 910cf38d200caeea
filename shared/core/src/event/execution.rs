//! What can happen to an execution.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{DecodeError, from_raw};
use crate::{
    ids::{AgentId, ExecutionId, InstanceId, Pool},
    time::Timestamp,
    wire::{Delivery, ErrorBody, OnLoss, Outcome},
};

/// A payload that lies in the payload stream; events carry only this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadRef {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the bytes, lower-case hexadecimal.
    pub sha256: String,
    /// Sequence of the message in the payload stream.
    pub seq: u64,
    /// The attempt in its subject.
    #[serde(default = "first_attempt")]
    pub attempt: u32,
}

const fn first_attempt() -> u32 {
    1
}

/// `execution.submitted`: the accepted request, defaults filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Submitted {
    /// The execution.
    pub execution_id: ExecutionId,
    /// 1.
    pub attempt: u32,
    /// The agent it was submitted to, or
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// the pool. For a submission to an agent the pool it was in then.
    pub pool: Pool,
    /// Its input.
    pub input: PayloadRef,
    /// Time it may run once dispatched; `None`: the agent's default, else the fleet's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// 0 first .. 9 last.
    pub priority: u8,
    /// How long it may wait in a queue.
    pub queue_ttl_ms: u64,
    /// What a loss does.
    pub on_loss: OnLoss,
    /// Losses after which it is quarantined.
    pub max_attempts: u32,
    /// How long `progress` may stand still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout_ms: Option<u64>,
    /// How long its agent may be disconnected; `None`: the fleet's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_after_ms: Option<u64>,
    /// Who starts the work.
    pub delivery: Delivery,
    /// Whatever the submitter wants to find again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// SHA-256 of the request as it came, for recognising a repeated submission.
    pub request_sha256: String,
}

/// `execution.queued`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queued {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that waits.
    pub attempt: u32,
    /// The agent whose queue it waits in; `None`: the pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// Place in the queue when it was put there, from 1.
    pub position: u64,
    /// Why it came back to the queue: `draining`, `at_capacity`, `no_responders`, `slot_lost` ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `execution.dispatched`: a slot is held and the agent is being asked (or, for external delivery, the grant).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispatched {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
    /// The agent whose slot it holds.
    pub agent_id: AgentId,
    /// The instance that is asked.
    pub instance_id: InstanceId,
    /// When its time is up.
    pub deadline: Timestamp,
    /// The time it was given.
    pub timeout_ms: u64,
}

/// `execution.started`: the agent accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
    /// The agent that holds it.
    pub agent_id: AgentId,
    /// The instance that holds it.
    pub instance_id: InstanceId,
}

/// `execution.cancel_requested`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequested {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that is to end.
    pub attempt: u32,
    /// The agent that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// Why, in the caller's words.
    pub reason: String,
    /// Who asked.
    pub by: String,
}

/// `execution.completed`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completed {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that completed.
    pub attempt: u32,
    /// The agent that did it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// Its instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// Its result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<PayloadRef>,
    /// It came after a recovery of this attempt.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
}

/// `execution.failed`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that failed.
    pub attempt: u32,
    /// The agent it failed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// Its instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// What went wrong.
    pub error: ErrorBody,
    /// The outcome that was reported, where it was not `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// `execution.cancelled`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cancelled {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt it ended in.
    pub attempt: u32,
    /// The agent that held it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// Its instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// Why it was cancelled.
    pub reason: String,
    /// How the end became certain: `queued`, `terminated`, `not_running`, `reported`, or a recovery reason.
    pub confirmed_by: String,
    /// What the watchdog saw, when a loss ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<serde_json::Value>,
    /// The outcome that was reported, when a report ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// `execution.expired`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expired {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that waited.
    pub attempt: u32,
    /// Whose queue it waited in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// How long it waited.
    pub waited_ms: u64,
    /// How long it was allowed to.
    pub queue_ttl_ms: u64,
}

/// Why an execution was recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryReason {
    /// Its agent is alive and does not know it.
    Orphaned,
    /// Its time was up.
    TimedOut,
    /// Its progress stood still for too long.
    Stalled,
    /// Its agent is silent.
    AgentLost,
    /// Its agent runs as a new instance.
    AgentRestarted,
    /// Its agent said goodbye, or handed it back.
    AgentGone,
    /// The agent never confirmed the dispatch.
    DispatchLost,
    /// Nothing else settled it within the safety net.
    Stale,
}

impl RecoveryReason {
    /// All reasons, in the contract's order.
    pub const ALL: [Self; 8] = [
        Self::Orphaned,
        Self::TimedOut,
        Self::Stalled,
        Self::AgentLost,
        Self::AgentRestarted,
        Self::AgentGone,
        Self::DispatchLost,
        Self::Stale,
    ];

    /// The name on the wire and in subjects.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Orphaned => "orphaned",
            Self::TimedOut => "timed_out",
            Self::Stalled => "stalled",
            Self::AgentLost => "agent_lost",
            Self::AgentRestarted => "agent_restarted",
            Self::AgentGone => "agent_gone",
            Self::DispatchLost => "dispatch_lost",
            Self::Stale => "stale",
        }
    }
}

/// What a recovery made of the execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryAction {
    /// It ended.
    Failed,
    /// It waits again, as the next attempt.
    Requeued,
    /// It was lost too often and ended until an operator retries it.
    Quarantined,
}

impl RecoveryAction {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Requeued => "requeued",
            Self::Quarantined => "quarantined",
        }
    }
}

/// How the death of the work was made certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TerminateOutcome {
    /// The agent says it is dead.
    Confirmed,
    /// The agent says it did not run.
    NotRunning,
    /// There was nobody to ask.
    NotAttempted,
    /// Asked, and not confirmed.
    Failed,
}

/// `execution.recovered`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recovered {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that was lost.
    pub attempt: u32,
    /// The agent that held it.
    pub agent_id: AgentId,
    /// Its instance.
    pub instance_id: InstanceId,
    /// Why.
    pub reason: RecoveryReason,
    /// What became of it.
    pub action: RecoveryAction,
    /// The attempt that waits now, when it was requeued.
    pub next_attempt: Option<u32>,
    /// How its death was made certain.
    pub terminate: TerminateOutcome,
    /// From the moment it became true to the append.
    pub detected_after_ms: u64,
    /// What was seen.
    pub evidence: serde_json::Value,
    /// One sentence that a person understands.
    pub message: String,
    /// The agent handed it back unfinished: no loss that counts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub returned: bool,
    /// Where it had got to, for the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<PayloadRef>,
}

/// `execution.retried`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retried {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that waits now.
    pub attempt: u32,
    /// Who asked.
    pub by: String,
}

/// `execution.late_result`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateResult {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt that no longer counts.
    pub attempt: u32,
    /// The agent that reported.
    pub agent_id: AgentId,
    /// Its instance.
    pub instance_id: InstanceId,
    /// What it reported.
    pub outcome: Outcome,
    /// What it produced, kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<PayloadRef>,
    /// Or what went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// Why it no longer counts, for people.
    pub because: String,
}

macro_rules! execution_events {
    ($($variant:ident($payload:ident) = $name:literal),+ $(,)?) => {
        /// An event about an execution.
        #[derive(Debug, Clone, PartialEq)]
        pub enum ExecutionEvent {
            $(#[doc = concat!("`execution.", $name, "`")] $variant($payload),)+
        }

        impl ExecutionEvent {
            /// The names of all of them, as they stand after the family in a type.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// The type without `rollcall.` before it.
            #[must_use]
            pub fn short_type(&self) -> &'static str {
                match self { $(Self::$variant(_) => concat!("execution.", $name),)+ }
            }

            /// The attempt it speaks of.
            #[must_use]
            pub fn attempt(&self) -> u32 {
                match self { $(Self::$variant(event) => event.attempt,)+ }
            }

            /// The execution it speaks of.
            #[must_use]
            pub fn execution_id(&self) -> &ExecutionId {
                match self { $(Self::$variant(event) => &event.execution_id,)+ }
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

        $(impl From<$payload> for ExecutionEvent {
            fn from(event: $payload) -> Self { Self::$variant(event) }
        })+
    };
}

execution_events! {
    Submitted(Submitted) = "submitted",
    Queued(Queued) = "queued",
    Dispatched(Dispatched) = "dispatched",
    Started(Started) = "started",
    CancelRequested(CancelRequested) = "cancel_requested",
    Completed(Completed) = "completed",
    Failed(Failed) = "failed",
    Cancelled(Cancelled) = "cancelled",
    Expired(Expired) = "expired",
    Recovered(Recovered) = "recovered",
    Retried(Retried) = "retried",
    LateResult(LateResult) = "late_result",
}
