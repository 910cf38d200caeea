//! The watchdog's process. `watchdog matrix` prints what `docs/DECISIONS-MATRIX.md` holds.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("matrix") && arguments.next().is_none() {
        print!("{}", watchdog::matrix::document());
        return ExitCode::SUCCESS;
    }
    rollcall_service::run_main(watchdog::PROGRAM, watchdog::run)
}
