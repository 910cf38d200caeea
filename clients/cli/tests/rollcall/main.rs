//! The `rollcall` binary against a private nats-server and a scripted fleet.

#![expect(clippy::unwrap_used, reason = "a test that can not go on has failed")]

mod accounts;
mod agent_run;
mod commands;
mod fleet;
