//! The API: its errors, its requests and its answers.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{DURATION_MS_MAX, ErrorBody, InFlight, Outcome, REQUEST_BYTES_MAX, read_object};
use crate::{
    event::PayloadRef,
    execution::State,
    ids::{AgentId, ExecutionId, InvalidId, Pool},
    time::Timestamp,
};

/// The error codes of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// Not understood.
    BadRequest,
    /// An identifier that is none.
    InvalidId,
    /// Over a size limit.
    TooLarge,
    /// No such thing.
    NotFound,
    /// There is one, and it is another.
    AlreadyExists,
    /// Never heard of.
    UnknownAgent,
    /// No place left to wait in.
    QueueFull,
    /// Not in a state for that.
    Conflict,
    /// Starting up, or rebuilding.
    NotReady,
    /// A server that is needed does not answer.
    Unavailable,
    /// Not allowed.
    Forbidden,
}

impl ErrorCode {
    /// The code on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::InvalidId => "invalid_id",
            Self::TooLarge => "too_large",
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::UnknownAgent => "unknown_agent",
            Self::QueueFull => "queue_full",
            Self::Conflict => "conflict",
            Self::NotReady => "not_ready",
            Self::Unavailable => "unavailable",
            Self::Forbidden => "forbidden",
        }
    }
}

/// An error of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: names the thing.
    pub message: String,
    /// When it may be worth trying again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for ApiError {}

impl From<InvalidId> for ApiError {
    fn from(error: InvalidId) -> Self {
        Self::new(ErrorCode::InvalidId, error.to_string())
    }
}

impl ApiError {
    /// An error with nothing to wait for.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: None }
    }

    /// An error that may pass.
    #[must_use]
    pub fn retry_after(code: ErrorCode, message: impl Into<String>, retry_after_ms: u64) -> Self {
        Self { code, message: message.into(), retry_after_ms: Some(retry_after_ms) }
    }

    /// `bad_request`
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    /// `bad_request` or `invalid_id` for JSON of a wrong shape.
    #[must_use]
    pub fn bad_json(what: &str, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        // An identifier newtype refuses through serde, which knows no kinds of error.
        let code = if text.contains("must match ^[A-Za-z0-9_-]") {
            ErrorCode::InvalidId
        } else {
            ErrorCode::BadRequest
        };
        Self::new(code, format!("{what}: {text}"))
    }

    /// `bad_request` for an id in a payload that is another than the one in its subject.
    #[must_use]
    pub fn not_the_subjects(field: &str, named: &str, subject: &str) -> Self {
        Self::bad_request(format!("{field} is {named:?}, and its subject says {subject}"))
    }

    /// `too_large`
    #[must_use]
    pub fn too_large(what: &str, bytes: usize, limit: usize) -> Self {
        Self::new(ErrorCode::TooLarge, format!("{what} has {bytes} bytes, at most {limit}"))
    }

    /// `unavailable`, worth trying again in a second.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::retry_after(ErrorCode::Unavailable, message, 1000)
    }

    /// `not_ready`, worth trying again in a second.
    #[must_use]
    pub fn not_ready(message: impl Into<String>) -> Self {
        Self::retry_after(ErrorCode::NotReady, message, 1000)
    }
}

/// What a loss does to an execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// It fails.
    #[default]
    Fail,
    /// It waits again, as the next attempt.
    Requeue,
}

/// Who starts the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// The dispatcher asks the agent.
    #[default]
    Push,
    /// The submitter, once it has the grant.
    External,
}

/// `submit`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SubmitRequest {
    /// For idempotency; made up when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// The agent that shall do it, or
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
    /// Any JSON; missing is null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Box<RawValue>>,
    /// Time it may run once dispatched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// 0 first .. 9 last; 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// How long it may wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_ttl_ms: Option<u64>,
    /// What a loss does; fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_loss: Option<OnLoss>,
    /// Losses after which it is quarantined; 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    /// How long progress may stand still; unbounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout_ms: Option<u64>,
    /// How long its agent may be disconnected; the fleet's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_after_ms: Option<u64>,
    /// Who starts the work; push.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivery: Option<Delivery>,
    /// Labels.
    #[serde(
        default,
        deserialize_with = "super::null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
}

/// Last priority there is (PROTOCOL.md 4).
pub const PRIORITY_MAX: u8 = 9;
/// Priority of a submission that names none (PROTOCOL.md 4).
pub const PRIORITY_DEFAULT: u8 = 5;
/// `max_attempts` of a submission that names none (PROTOCOL.md 4).
pub const MAX_ATTEMPTS_DEFAULT: u32 = 3;

impl SubmitRequest {
    /// Reads a submission and checks everything that the contract bounds.
    pub fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        if bytes.len() > REQUEST_BYTES_MAX {
            return Err(ApiError::too_large("submit", bytes.len(), REQUEST_BYTES_MAX));
        }
        let request: Self = read_object("submit", bytes)?;
        match (&request.agent_id, &request.pool) {
            (None, None) => return Err(ApiError::bad_request("submit: name an agent_id or a pool")),
            (Some(_), Some(_)) => {
                return Err(ApiError::bad_request("submit: name an agent_id or a pool, not both"));
            }
            _ => {}
        }
        if let Some(priority) = request.priority.filter(|p| *p > PRIORITY_MAX) {
            return Err(ApiError::bad_request(format!(
                "submit: priority is {priority}, not within 0..{PRIORITY_MAX}"
            )));
        }
        if request.max_attempts == Some(0) {
            return Err(ApiError::bad_request("submit: max_attempts is 0, at least 1"));
        }
        for (name, value) in [
            ("timeout_ms", request.timeout_ms),
            ("queue_ttl_ms", request.queue_ttl_ms),
            ("stall_timeout_ms", request.stall_timeout_ms),
            ("lost_after_ms", request.lost_after_ms),
        ] {
            if let Some(value) = value.filter(|v| *v == 0 || *v > DURATION_MS_MAX) {
                return Err(ApiError::bad_request(format!(
                    "submit: {name} is {value}, not within 1..{DURATION_MS_MAX}"
                )));
            }
        }
        Ok(request)
    }
}

/// The answer to `submit`, `cancel`, `retry` and `release`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionReply {
    /// The execution.
    pub execution_id: ExecutionId,
    /// Its state.
    pub state: State,
    /// The agent that holds it, or whose queue it waits in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// The attempt that counts.
    pub attempt: u32,
    /// Its place in the queue, from 1, while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<u64>,
}

/// `execution`, `retry`, `explain`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionRequest {
    /// The execution.
    pub execution_id: ExecutionId,
}

/// `cancel`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequest {
    /// The execution.
    pub execution_id: ExecutionId,
    /// Why.
    #[serde(default)]
    pub reason: Option<String>,
}

/// `release`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// With `completed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Box<RawValue>>,
    /// With `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// `executions`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionsRequest {
    /// Only these states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// Only of this agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// At most so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Only those after this one, in the order of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<ExecutionId>,
}

/// Most rows of a list in one answer.
pub const LIST_LIMIT_MAX: usize = 1000;
/// Rows of a list whose caller names no limit.
pub const LIST_LIMIT_DEFAULT: usize = 100;

/// `capacity`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapacityRequest {
    /// Of an agent, or
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// of a pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
}

/// `agent`, `drain`, `undrain`, `goodbye`, `forget`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRequest {
    /// The agent.
    pub agent_id: AgentId,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// By when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// With `goodbye`, and with `drain` and a deadline: what is to become of the work in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<InFlight>,
}

/// An execution as `execution` and `executions` show it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecutionView {
    /// The execution.
    pub execution_id: ExecutionId,
    /// Its state.
    pub state: State,
    /// The attempt that counts.
    pub attempt: u32,
    /// The agent that holds or held it, or whose queue it waits in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// That agent's instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<crate::ids::InstanceId>,
    /// Its pool.
    pub pool: Pool,
    /// Its priority.
    pub priority: u8,
    /// What a loss does.
    pub on_loss: OnLoss,
    /// Losses so far that count.
    pub losses: u32,
    /// When it was submitted.
    pub submitted_at: Timestamp,
    /// When the present attempt was dispatched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatched_at: Option<Timestamp>,
    /// When its time is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Its place in the queue, while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<u64>,
    /// Why it ended, or why it waits again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What went wrong. Not called `error` on the wire: that field is what an answer that is an error has.
    #[serde(rename = "failure", default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// What it produced (`execution` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Box<RawValue>>,
    /// Where the result lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_ref: Option<PayloadRef>,
    /// It completed after it had been recovered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
    /// Its labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Sequence in the log of the last event that is in this view.
    pub seq: u64,
}

#[cfg(test)]
mod tests;
