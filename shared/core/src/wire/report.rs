//! Reports: how an attempt ended, in the agent's words.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::{ApiError, REQUEST_BYTES_MAX, read_object};
use crate::{
    ids::{AgentId, ExecutionId, InstanceId},
    time::Timestamp,
};

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done, with a result.
    Completed,
    /// Not done, with an error.
    Failed,
    /// Ended because it was cancelled.
    Cancelled,
    /// Ended because it was told to.
    Terminated,
    /// Handed back unfinished.
    Returned,
}

impl Outcome {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Terminated => "terminated",
            Self::Returned => "returned",
        }
    }
}

/// What went wrong, for programs and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A word for programs.
    #[serde(default = "unknown_code", deserialize_with = "code_or_unknown")]
    pub code: String,
    /// A sentence for people.
    #[serde(default, deserialize_with = "super::null_is_default")]
    pub message: String,
}

fn unknown_code() -> String {
    "unknown".to_owned()
}

fn code_or_unknown<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(unknown_code))
}

/// A report as it travels. `result` and `checkpoint` are carried as the bytes that came.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The agent, which its subject names; if it is here as well, it must be the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// The execution, which its subject names; if it is here as well, it must be the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// The instance that held the execution.
    pub instance_id: InstanceId,
    /// The attempt it speaks of.
    pub attempt: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// With `completed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Box<RawValue>>,
    /// With `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// With `returned`: where the next attempt may go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Box<RawValue>>,
    /// When, by the agent's clock. Nothing hangs on it: one that is no time is none.
    #[serde(default, deserialize_with = "super::time_if_any", skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

impl Report {
    /// Reads a report of `agent` on `execution` (the tokens of its subject) within its size limit.
    pub fn read(agent: &AgentId, execution: &ExecutionId, bytes: &[u8]) -> Result<Self, ApiError> {
        if bytes.len() > REQUEST_BYTES_MAX {
            return Err(ApiError::too_large("report", bytes.len(), REQUEST_BYTES_MAX));
        }
        let report: Self = read_object("report", bytes)?;
        if let Some(named) = report.agent_id.as_ref().filter(|named| *named != agent) {
            return Err(ApiError::not_the_subjects("agent_id", named.as_str(), agent.as_str()));
        }
        if let Some(named) = report.execution_id.as_ref().filter(|named| *named != execution) {
            return Err(ApiError::not_the_subjects("execution_id", named.as_str(), execution.as_str()));
        }
        Ok(report)
    }
}
