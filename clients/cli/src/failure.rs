//! Why a command did not do what it was asked to, and what the process exits with.

use std::fmt;

use rollcall_core::wire::{ApiError, ErrorCode};

use crate::exit;

/// A sentence for stderr and an exit status.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: u8,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(status: u8, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(exit::FAILED, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(exit::USAGE, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(exit::UNAVAILABLE, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let status = match error.code {
            ErrorCode::NotFound | ErrorCode::UnknownAgent => exit::NOT_FOUND,
            ErrorCode::NotReady | ErrorCode::Unavailable => exit::UNAVAILABLE,
            ErrorCode::QueueFull => exit::TRY_LATER,
            ErrorCode::Forbidden => exit::FORBIDDEN,
            ErrorCode::BadRequest
            | ErrorCode::InvalidId
            | ErrorCode::TooLarge
            | ErrorCode::AlreadyExists
            | ErrorCode::Conflict => exit::FAILED,
        };
        let message = match error.retry_after_ms {
            Some(after) => format!("{error} (try again after {after} ms)"),
            None => error.to_string(),
        };
        Self { status, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_statuses() {
        let status = |code| Failure::from(ApiError::new(code, "m")).status;
        assert_eq!(status(ErrorCode::UnknownAgent), 3);
        assert_eq!(status(ErrorCode::NotFound), 3);
        assert_eq!(status(ErrorCode::NotReady), 69);
        assert_eq!(status(ErrorCode::QueueFull), 75);
        assert_eq!(status(ErrorCode::Conflict), 1);
        let failure = Failure::from(ApiError::retry_after(ErrorCode::QueueFull, "full", 5000));
        assert_eq!(failure.to_string(), "queue_full: full (try again after 5000 ms)");
    }
}
