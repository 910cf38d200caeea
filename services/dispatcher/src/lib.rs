//! The dispatcher: admits executions into slots and queues, dispatches them, takes in reports.
//!
//! The log decides; Redis and agents are told. [`state`] folds the log and [`decide`] says what a change
//! means: both are plain synchronous code. Everything else moves bytes.

mod alarms;
mod audit;
mod cancel;
mod config;
pub mod decide;
mod effect;
#[cfg(test)]
mod fixture;
mod launch;
mod ledger;
pub mod list;
mod moves;
mod payload;
mod rebuild;
mod reports;
mod run;
mod shell;
mod slots;
pub mod state;
mod submit;
mod verbs;
mod watch;

pub use run::run;

/// The program, for its own main and for tests.
pub const PROGRAM: rollcall_service::Program = rollcall_service::Program {
    name: "dispatcher",
    about: "Admits executions into per-agent slots and queues, dispatches them and takes in reports.",
    version: env!("CARGO_PKG_VERSION"),
    conditions: &["nats", "streams", "redis", "replay", "reconcile"],
};
