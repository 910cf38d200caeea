//! The notifier over real HTTP, with a private nats-server.
#![allow(clippy::unwrap_used, reason = "a test has nothing better to do")]

mod api;
mod broadcast;
mod harness;
#[path = "../../src/samples.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the unit tests")]
mod samples;
mod sse;
mod ws;
