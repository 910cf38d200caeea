//! The dispatcher on a private NATS and Redis: what it writes, and what it tells others.

#![allow(missing_docs, unreachable_pub)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

mod agents;
mod clock;
mod harness;
mod reports;
mod stopping;
mod submissions;
mod takeover;
