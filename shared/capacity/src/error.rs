//! What can go wrong.

use crate::Epoch;

/// Why an operation was not carried out. None of them but `Unavailable` leaves in doubt whether it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis can't be reached, did not answer in time, or refused (loading, read-only, out of memory). Whether the
    /// operation took place is unknown; every operation may be repeated.
    #[error("redis is not available")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The pool is empty or being rebuilt: rebuild it from the log, or wait for who does.
    #[error("capacity of pool {pool} is not ready")]
    NotReady {
        /// Which pool.
        pool: String,
    },
    /// Another rebuild replaced this one, or the pool was rebuilt again and again during the call.
    #[error("pool {pool} is in epoch {epoch} now")]
    Stale {
        /// Which pool.
        pool: String,
        /// Its epoch now.
        epoch: Epoch,
    },
    /// Redis holds less than it did (a failover to stale data): rebuild it from the log.
    #[error("capacity of pool {pool} moved backwards")]
    MovedBack {
        /// Which pool.
        pool: String,
    },
    /// An answer that is none of the script's: a defect, or someone else writes to our keys.
    #[error("malformed reply of {operation}: {what}")]
    Reply {
        /// Of which script.
        operation: &'static str,
        /// What was wrong.
        what: String,
    },
    /// A number that can't be counted exactly.
    #[error("{what} out of range: {value}")]
    OutOfRange {
        /// Which.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// The address of Redis can't be understood.
    #[error("bad redis url")]
    Url(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// The pool has to be rebuilt from the log (or someone is about it).
    pub fn wants_rebuild(&self) -> bool {
        matches!(self, Self::NotReady { .. } | Self::MovedBack { .. })
    }
}
