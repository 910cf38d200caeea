//! Events: structured CloudEvents 1.0 JSON. The bytes made here are the bytes in the log, and every
//! subscriber gets them untouched.

mod agent;
mod execution;
mod system;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use uuid::Uuid;

pub use agent::*;
pub use execution::*;
pub use system::*;

use crate::time::Timestamp;

/// The content type of an event in the log and of a webhook body.
pub const CONTENT_TYPE: &str = "application/cloudevents+json";

/// What every event type starts with.
pub const TYPE_PREFIX: &str = "rollcall.";

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum EventBody {
    /// To an execution.
    Execution(ExecutionEvent),
    /// To an agent.
    Agent(AgentEvent),
    /// To a service.
    System(SystemEvent),
}

impl From<ExecutionEvent> for EventBody {
    fn from(event: ExecutionEvent) -> Self {
        Self::Execution(event)
    }
}

impl From<AgentEvent> for EventBody {
    fn from(event: AgentEvent) -> Self {
        Self::Agent(event)
    }
}

impl From<SystemEvent> for EventBody {
    fn from(event: SystemEvent) -> Self {
        Self::System(event)
    }
}

impl EventBody {
    /// The type without the `rollcall.` before it, as in `execution.recovered`.
    #[must_use]
    pub fn short_type(&self) -> &'static str {
        match self {
            Self::Execution(event) => event.short_type(),
            Self::Agent(event) => event.short_type(),
            Self::System(event) => event.short_type(),
        }
    }
}

/// One entry of the log.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// UUIDv7; also the message id of the append, so a repeated append is the same event.
    pub id: Uuid,
    /// `/rollcall/<service>/<instance>`.
    pub source: String,
    /// The execution, agent or service it is about.
    pub subject: String,
    /// When its author decided it.
    pub time: Timestamp,
    /// What happened.
    pub body: EventBody,
}

/// Why bytes are no event.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not JSON, or not the shape its type says.
    #[error("not a valid event")]
    Json(#[from] serde_json::Error),
    /// A CloudEvents version other than 1.0.
    #[error("specversion is {0:?}, not \"1.0\"")]
    Version(String),
    /// A type this version does not know.
    #[error("unknown event type {0:?}")]
    UnknownType(String),
}

#[derive(Serialize)]
struct EnvelopeOut<'a, D> {
    specversion: &'static str,
    id: Uuid,
    source: &'a str,
    #[serde(rename = "type")]
    kind: String,
    subject: &'a str,
    time: Timestamp,
    datacontenttype: &'static str,
    data: &'a D,
}

#[derive(Deserialize)]
struct EnvelopeIn<'a> {
    #[serde(borrow)]
    specversion: std::borrow::Cow<'a, str>,
    id: Uuid,
    source: String,
    #[serde(rename = "type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    subject: String,
    time: Timestamp,
    #[serde(borrow)]
    data: &'a RawValue,
}

pub(crate) fn from_raw<T: DeserializeOwned>(raw: &RawValue) -> Result<T, DecodeError> {
    Ok(serde_json::from_str(raw.get())?)
}

impl Event {
    /// The event as the bytes that go into the log: compact JSON without a line break.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match &self.body {
            EventBody::Execution(event) => event.encode_in(self),
            EventBody::Agent(event) => event.encode_in(self),
            EventBody::System(event) => self.envelope(&event.data),
        }
    }

    fn envelope<D: Serialize>(&self, data: &D) -> Vec<u8> {
        serde_json::to_vec(&EnvelopeOut {
            specversion: "1.0",
            id: self.id,
            source: &self.source,
            kind: format!("{TYPE_PREFIX}{}", self.body.short_type()),
            subject: &self.subject,
            time: self.time,
            datacontenttype: "application/json",
            data,
        })
        .expect("events hold only maps with text keys, numbers and text")
    }

    /// Reads an entry of the log.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let envelope: EnvelopeIn<'_> = serde_json::from_slice(bytes)?;
        if envelope.specversion != "1.0" {
            return Err(DecodeError::Version(envelope.specversion.into_owned()));
        }
        let unknown = || DecodeError::UnknownType(envelope.kind.chars().take(100).collect());
        let kind = envelope.kind.strip_prefix(TYPE_PREFIX).ok_or_else(unknown)?;
        let (family, name) = kind.split_once('.').ok_or_else(unknown)?;
        let body = match family {
            "execution" => ExecutionEvent::decode(name, envelope.data)?.map(EventBody::Execution),
            "agent" => AgentEvent::decode(name, envelope.data)?.map(EventBody::Agent),
            "system" => SystemEvent::decode(name, envelope.data)?.map(EventBody::System),
            _ => None,
        }
        .ok_or_else(unknown)?;
        Ok(Self {
            id: envelope.id,
            source: envelope.source,
            subject: envelope.subject,
            time: envelope.time,
            body,
        })
    }
}

#[cfg(test)]
mod tests;
