//! The watchdog: judges open executions. It finds those that are orphaned, timed out, stalled or lost with their
//! agent, makes sure, and recovers each exactly once. It never condemns healthy work.
//!
//! Pure: [`facts`], [`decide`], [`matrix`], [`zombie`], [`claims`], [`state`], [`sight`], [`breaker`], [`due`],
//! [`effect`], [`report`]. The rest carries out what they say.

pub mod answers;
pub mod breaker;
pub mod claims;
pub mod config;
pub mod cycle;
pub mod decide;
pub mod due;
pub mod ears;
pub mod edge;
pub mod effect;
pub mod facts;
pub mod follow;
pub mod matrix;
pub mod recover;
pub mod report;
pub mod sentry;
pub mod shared;
mod shell;
pub mod sight;
pub mod state;
pub mod verbs;
pub mod zombie;

pub use shell::run;

/// The service's name: its binary, its subject among the system events, the source of its events.
pub const SERVICE: &str = "watchdog";

/// What the process is.
pub const PROGRAM: rollcall_service::Program = rollcall_service::Program {
    name: SERVICE,
    about: "Finds executions that are orphaned, timed out, stalled or lost with their agent, and recovers each once.",
    version: env!("CARGO_PKG_VERSION"),
    conditions: &["nats", "streams", "replay"],
};
