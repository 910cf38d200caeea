//! `notifier`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    rollcall_service::run_main(notifier::PROGRAM, notifier::run)
}
