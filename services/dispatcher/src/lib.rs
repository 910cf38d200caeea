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
mod launch;
mod ledger;
mod payload;
mod rebuild;
mod reports;
mod run;
mod shell;
pub mod state;
mod submit;
mod verbs;
mod watch;

pub use run::run;
