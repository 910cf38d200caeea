//! The notifier: everything that people and programs subscribe to.
//!
//! It follows the log from its beginning ([`follow`]) into a read model ([`state`]) and a ring of the newest events
//! ([`feed`]), from which SSE, WebSocket, the API and the dashboard are served ([`http`]). Beside that it publishes
//! recoveries, health and alarms on the bus ([`broadcast`]). It writes nothing to the log.
//!
//! What is absent, on purpose: a queue per subscriber (a subscriber is a place in the log, see [`subscriber`]), and
//! any change of an event's bytes. Webhooks will be one more taker of durable work beside [`broadcast`], with a
//! consumer per sink and its own retries, so that a sink that is down delays nobody.

pub mod broadcast;
pub mod entry;
pub mod feed;
pub mod filter;
pub mod follow;
pub mod frame;
pub mod http;
mod run;
#[cfg(test)]
#[allow(dead_code, clippy::unwrap_used, reason = "shared with the tests over HTTP; its constants are valid")]
mod samples;
pub mod shared;
pub mod state;
pub mod subscriber;
pub mod view;

pub use run::{PROGRAM, run, run_with};
