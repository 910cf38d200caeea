//! Self-suspicion: when our own eyes can be trusted. Pure.

pub use rollcall_core::sight::{Sight, Void};

/// A stall of the event loop shorter than this leaves evidence alone: the shortest heartbeat interval
/// (PROTOCOL.md 2), so no list can be staler than one interval, and the canary before a verdict covers the rest.
pub const STALL_VOID_MS: u64 = 1_000;
