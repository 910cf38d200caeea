//! The shapes that travel: heartbeats, reports, requests to agents, and the API.

mod api;
mod heartbeat;
mod report;
mod requests;

pub use api::*;
pub use heartbeat::*;
pub use report::*;
pub use requests::*;

/// Largest heartbeat, in bytes (PROTOCOL.md, Conventions).
pub const HEARTBEAT_BYTES_MAX: usize = 64 * 1024;
/// Largest submission or report, in bytes (PROTOCOL.md, Conventions).
pub const REQUEST_BYTES_MAX: usize = 512 * 1024;
/// Largest event, in bytes: 1 MiB less 4 KiB for headers (PROTOCOL.md, Conventions).
pub const EVENT_BYTES_MAX: usize = 1024 * 1024 - 4096;
/// Largest capacity an agent may name (PROTOCOL.md 2).
pub const CAPACITY_MAX: u32 = 1024;
/// Bounds of a heartbeat's `interval_ms` (PROTOCOL.md 2).
pub const INTERVAL_MS: std::ops::RangeInclusive<u64> = 1_000..=60_000;
/// Longest timeout, deadline or time to live anybody may ask for: a year.
pub const DURATION_MS_MAX: u64 = 366 * 24 * 3600 * 1000;

/// Reads `null` as the field's default: many languages write an empty map or text so.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + serde::Deserialize<'de>,
{
    use serde::Deserialize as _;
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
