//! The dispatcher's process.

use std::process::ExitCode;

use rollcall_service::run_main;

fn main() -> ExitCode {
    run_main(dispatcher::PROGRAM, dispatcher::run)
}
