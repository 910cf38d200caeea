//! Inputs, results and checkpoints: in the payload stream, with only their size and hash in events.

use bytes::Bytes;
use rollcall_core::{ExecutionId, event::PayloadRef, subject::PayloadKind, wire::ApiError};
use rollcall_nats::StoreError;
use sha2::{Digest, Sha256};

use crate::shell::Dispatcher;

/// SHA-256 in lower-case hexadecimal.
#[must_use]
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Dispatcher {
    /// Stores a payload and returns what events say of it.
    pub(crate) async fn store(
        &self,
        execution: &ExecutionId,
        kind: PayloadKind,
        attempt: u32,
        bytes: Bytes,
    ) -> Result<PayloadRef, StoreError> {
        let sha256 = sha256_hex(&bytes);
        let size = bytes.len() as u64;
        let seq = self.payloads.put(&self.subjects.payload(execution, kind, attempt), bytes).await?;
        Ok(PayloadRef { bytes: size, sha256, seq, attempt })
    }

    /// Reads a stored payload back and checks that it is the one meant.
    pub(crate) async fn stored(&self, stored: &PayloadRef) -> Result<Bytes, String> {
        let found = self.payloads.get(stored.seq).await.map_err(|e| e.to_string())?;
        let bytes = found.ok_or_else(|| format!("payload {} is not in its stream any more", stored.seq))?;
        if sha256_hex(&bytes) == stored.sha256 {
            Ok(bytes)
        } else {
            Err(format!("payload {} is not what its event says", stored.seq))
        }
    }
}

/// A payload that could not be stored, as callers hear of it.
pub(crate) fn store_error(error: &StoreError) -> ApiError {
    ApiError::unavailable(format!("the payload could not be stored: {error}"))
}
