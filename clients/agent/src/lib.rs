//! The Rollcall agent library: makes a Rust program an agent of a fleet.
//!
//! An agent answers the roll call (a heartbeat in a task of its own), takes executions, runs them, and reports how they
//! ended until the report is on the bus. What it holds is never forgotten, what it is told to end is dead when it says
//! so, and it leaves in order: PROTOCOL.md 2 ("Shutdown, agent side").
//!
//! ```no_run
//! use rollcall_agent::{Agent, BusOptions, Execution, Finish, worker_fn};
//!
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let worker = worker_fn(|execution: Execution| async move {
//!     match execution.input::<Vec<f64>>() {
//!         Ok(numbers) => Finish::completed(&numbers.iter().sum::<f64>()),
//!         Err(error) => Finish::failed("bad_input", error.to_string()),
//!     }
//! });
//! let agent = Agent::builder("adder-1").capacity(4).build(worker)?;
//! let options = BusOptions { url: "nats://127.0.0.1:4222".into(), ..BusOptions::default() };
//! let exit = agent.start(options).await?;
//! std::process::exit(i32::from(exit.status));
//! # }
//! ```
//!
//! Inside: `state` decides what is taken and listed and `shutdown` what ends the process, both pure; `shell` shares them
//! between the tasks `heartbeat`, `requests` and `supervise` (one per execution); `run` is the life of the agent.

mod builder;
mod control;
mod heartbeat;
mod report;
mod requests;
mod run;
mod shell;
pub mod shutdown;
pub mod state;
mod supervise;
mod worker;

pub use builder::{
    AgentBuilder, BuildError, DRAIN_DEFAULT, INTERVAL_DEFAULT, PROFILE_BYTES_MAX, STOP_GRACE_DEFAULT,
};
pub use control::AgentHandle;
pub use report::{ERROR_MESSAGE_BYTES_MAX, REPORT_ENVELOPE_BYTES, RESULT_BYTES_MAX};
pub use requests::{GRACE_MAX, KILL_CONFIRM_BOUND};
pub use rollcall_nats::{Bus, BusOptions, ConnectError};
pub use run::{Agent, REPORTS_BOUND, RunError, bus_options};
pub use shutdown::{Exit, Signal, Trigger};
pub use worker::{Death, Execution, Finish, FnWorker, Progress, Stop, Worker, worker_fn};
