//! The pure core of Rollcall: identifiers, time, the subject table, events, wire types, the two aggregates, and when a
//! service may trust its own ears. Everything here is synchronous and deterministic: no runtime, no sockets, no clock
//! of its own and no randomness besides the event ids that callers pass in.

pub mod agent;
#[cfg(test)]
mod asyncapi;
pub mod event;
pub mod execution;
pub mod gaps;
pub mod ids;
#[cfg(test)]
mod samples;
pub mod sight;
pub mod subject;
pub mod time;
pub mod wire;

pub use ids::{AgentId, ExecutionId, InstanceId, InvalidId, Pool, Prefix};
pub use time::{Clock, Timestamp};
