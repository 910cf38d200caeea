//! The dispatcher's process.

use std::process::ExitCode;

use rollcall_service::{Program, run_main};

fn main() -> ExitCode {
    let program = Program {
        name: "dispatcher",
        about: "Admits executions into per-agent slots and queues, dispatches them and takes in reports.",
        version: env!("CARGO_PKG_VERSION"),
        conditions: &["nats", "streams", "redis", "replay", "reconcile"],
    };
    run_main(program, dispatcher::run)
}
