//! Exit codes (sysexits where one fits).

/// Ended as asked.
pub const OK: u8 = 0;
/// Ended by an error, or did not drain in time.
pub const FAILURE: u8 = 1;
/// Bad arguments or settings (`EX_USAGE`): starting again does not help.
pub const USAGE: u8 = 64;
/// A panic (`EX_SOFTWARE`).
pub const PANIC: u8 = 70;
