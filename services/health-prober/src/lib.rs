//! The health-prober: every agent's status, from heartbeats and probes, as events in the log.
//!
//! [`detector`], [`state`], [`decide`], [`hear`] and [`timers`] are plain synchronous code; the shell is the loop
//! around them.

pub mod agents_file;
mod api;
pub mod config;
pub mod decide;
pub mod detector;
mod effect;
mod entry;
pub mod hear;
mod losses;
pub mod probe;
mod run;
mod shell;
pub mod state;
pub mod timers;
pub mod view;

pub use run::run;

/// What this program is.
pub const PROGRAM: rollcall_service::Program = rollcall_service::Program {
    name: "health-prober",
    about: "Knows which agents are alive: turns heartbeats and probes into statuses, and drains them on request.",
    version: env!("CARGO_PKG_VERSION"),
    conditions: &["nats", "replay"],
};
