//! Errors as the API says them.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use rollcall_core::{
    InvalidId,
    wire::{ApiError, ErrorCode},
};
use rollcall_nats::ReadError;
use serde::Serialize;

/// An error answer: `{"error": {"code", "message"}}` with the HTTP status that goes with it.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    error: ApiError,
}

#[derive(Serialize)]
struct Body<'a> {
    error: &'a ApiError,
}

impl Failure {
    /// With another status than the code's.
    pub fn with_status(status: StatusCode, error: ApiError) -> Self {
        Self { status, error }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self { status: status_of(error.code), error }
    }
}

impl From<InvalidId> for Failure {
    fn from(error: InvalidId) -> Self {
        ApiError::from(error).into()
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        tracing::warn!(%error, "an answer needs the log");
        ApiError::unavailable(error.to_string()).into()
    }
}

const fn status_of(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest | ErrorCode::InvalidId => StatusCode::BAD_REQUEST,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::NotFound | ErrorCode::UnknownAgent => StatusCode::NOT_FOUND,
        ErrorCode::AlreadyExists | ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::QueueFull => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::NotReady | ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(Body { error: &self.error })).into_response();
        if let Some(millis) = self.error.retry_after_ms {
            let seconds = HeaderValue::from(millis.div_ceil(1000));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}
