//! The shapes that travel: heartbeats, reports, requests to agents, and the API.

mod api;
mod endpoint;
mod heartbeat;
mod report;
mod requests;

pub use api::*;
pub use endpoint::*;
pub use heartbeat::*;
pub use report::*;
pub use requests::*;

use serde::Deserialize as _;
use serde_json::value::RawValue;

use crate::Timestamp;

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

/// A time on which nothing hangs: whatever is no time is none, and what it came with counts all the same.
fn time_if_any<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let raw = Option::<Box<RawValue>>::deserialize(deserializer)?;
    Ok(raw.and_then(|raw| serde_json::from_str(raw.get()).ok()))
}

/// Reads what somebody sent, which must be a JSON object: from a list, serde would take the values in the order of the
/// fields. `what` names it in the error, which also says which field is wrong.
///
/// # Errors
/// `bad_request`; `invalid_id` for an identifier that is none.
pub fn read_object<'de, T: serde::Deserialize<'de>>(what: &str, bytes: &'de [u8]) -> Result<T, ApiError> {
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(ApiError::bad_request(format!("{what}: not a JSON object")));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        // Read once more with an eye on the way to the fault: what is right, which is most, does not pay for it.
        let mut again = serde_json::Deserializer::from_slice(bytes);
        match serde_path_to_error::deserialize::<_, T>(&mut again) {
            Err(found) if found.path().iter().next().is_some() => {
                ApiError::bad_json(&format!("{what}: {}", found.path()), found.inner())
            }
            _ => ApiError::bad_json(what, &error),
        }
    })
}

/// Reads `null` as the field's default: many languages write an empty map or text so.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + serde::Deserialize<'de>,
{
    use serde::Deserialize as _;
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
