//! Errors as requesters see them: two headers of the services API and a JSON body.

use async_nats::HeaderMap;
use async_nats::header::HeaderValue;
use bytes::Bytes;
use serde::Serialize;

/// Longest error text in a header, in characters; the body has all of it.
const HEADER_TEXT_MAX: usize = 200;

/// An error answer. The codes are those of PROTOCOL.md 4.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    code: &'static str,
    message: String,
    retry_after_ms: Option<u64>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Fields<'a>,
}

#[derive(Serialize)]
struct Fields<'a> {
    code: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
}

impl From<rollcall_core::wire::ApiError> for ApiError {
    fn from(error: rollcall_core::wire::ApiError) -> Self {
        Self { code: error.code.as_str(), message: error.message, retry_after_ms: error.retry_after_ms }
    }
}

impl ApiError {
    /// An error with one of the protocol's codes and a sentence for a person.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: None }
    }

    /// Says when it is worth asking again.
    #[must_use]
    pub fn retry_after_ms(mut self, millis: u64) -> Self {
        self.retry_after_ms = Some(millis);
        self
    }

    /// The request can't be read.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new("bad_request", message)
    }

    /// Not ready, or not now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new("unavailable", message)
    }

    /// The code.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What goes into `Nats-Service-Error-Code`: the HTTP status that fits the code.
    pub fn status(&self) -> u16 {
        match self.code {
            "bad_request" | "invalid_id" => 400,
            "forbidden" => 403,
            "not_found" | "unknown_agent" => 404,
            "already_exists" | "conflict" => 409,
            "too_large" => 413,
            "queue_full" => 429,
            "not_ready" | "unavailable" => 503,
            _ => 500,
        }
    }

    /// `{"error":{"code","message","retry_after_ms"?}}`.
    pub fn body(&self) -> Bytes {
        let fields = Fields { code: self.code, message: &self.message, retry_after_ms: self.retry_after_ms };
        Bytes::from(serde_json::to_vec(&Body { error: fields }).expect("strings and numbers serialize"))
    }

    /// `Nats-Service-Error` and `Nats-Service-Error-Code`.
    pub fn headers(&self) -> HeaderMap {
        let text: String = self
            .to_string()
            .chars()
            .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
            .take(HEADER_TEXT_MAX)
            .collect();
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Service-Error", HeaderValue::from(text.as_str()));
        headers.insert("Nats-Service-Error-Code", HeaderValue::from(self.status().to_string().as_str()));
        headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_the_protocols() {
        let error = ApiError::new("queue_full", "queue of agent-7 is full").retry_after_ms(5000);
        assert_eq!(
            error.body(),
            r#"{"error":{"code":"queue_full","message":"queue of agent-7 is full","retry_after_ms":5000}}"#
        );
        assert_eq!(ApiError::bad_request("x").body(), r#"{"error":{"code":"bad_request","message":"x"}}"#);
    }

    #[test]
    fn a_line_break_can_not_leave_the_header() {
        let headers = ApiError::bad_request("a\r\nX: y").headers();
        assert_eq!(headers.get("Nats-Service-Error").unwrap().as_str(), "bad_request: a??X: y");
        assert_eq!(headers.get("Nats-Service-Error-Code").unwrap().as_str(), "400");
    }

    #[test]
    fn every_code_has_its_status() {
        let status = |code| ApiError::new(code, "").status();
        for (code, wanted) in [
            ("bad_request", 400),
            ("invalid_id", 400),
            ("forbidden", 403),
            ("not_found", 404),
            ("unknown_agent", 404),
            ("already_exists", 409),
            ("conflict", 409),
            ("too_large", 413),
            ("queue_full", 429),
            ("not_ready", 503),
            ("unavailable", 503),
        ] {
            assert_eq!(status(code), wanted, "{code}");
        }
    }
}
