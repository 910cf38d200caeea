//! The health-prober's process.

use std::process::ExitCode;

use rollcall_service::run_main;

fn main() -> ExitCode {
    run_main(health_prober::PROGRAM, health_prober::run)
}
