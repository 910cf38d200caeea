//! The JetStream API as far as it is used here: JSON requests on `$JS.API.`.

use std::time::Duration;

use async_nats::HeaderMap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bus::{Bus, RequestError};

/// How long one API request may take.
pub(crate) const API_TIMEOUT: Duration = Duration::from_secs(5);

/// `err_code`s that mean something to us (nats-server `errors.json`).
pub(crate) mod code {
    /// Resource limits exceeded for account.
    pub(crate) const ACCOUNT_RESOURCES: u64 = 10002;
    /// JetStream is not available now (clustered, no leader).
    pub(crate) const CLUSTER_NOT_AVAILABLE: u64 = 10008;
    /// The consumer is not there.
    pub(crate) const CONSUMER_NOT_FOUND: u64 = 10014;
    /// Insufficient resources.
    pub(crate) const INSUFFICIENT_RESOURCES: u64 = 10023;
    /// Maximum consumers, storage and similar limits of memory or file.
    pub(crate) const MEMORY_RESOURCES: u64 = 10028;
    /// No message found.
    pub(crate) const NO_MESSAGE: u64 = 10037;
    /// Not enough storage left.
    pub(crate) const STORAGE_RESOURCES: u64 = 10047;
    /// The message is larger than the stream's maximum.
    pub(crate) const MESSAGE_TOO_LARGE: u64 = 10054;
    /// A stream of this name with another configuration exists.
    pub(crate) const STREAM_NAME_IN_USE: u64 = 10058;
    /// The stream is not there.
    pub(crate) const STREAM_NOT_FOUND: u64 = 10059;
    /// Wrong last sequence, with the found one in the text.
    pub(crate) const WRONG_LAST_SEQUENCE: u64 = 10071;
    /// JetStream is not enabled for this account.
    pub(crate) const JETSTREAM_NOT_ENABLED: u64 = 10039;
    /// JetStream is not enabled.
    pub(crate) const JETSTREAM_DISABLED: u64 = 10076;
    /// Storing failed, with the reason (such as a limit reached) in the text.
    pub(crate) const STORE_FAILED: u64 = 10077;
    /// Wrong last sequence, from a cluster that does not say which.
    pub(crate) const WRONG_LAST_SEQUENCE_CONSTANT: u64 = 10164;
}

/// An error answer of the API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, thiserror::Error)]
#[error("{description} (code {code}, {err_code})")]
pub(crate) struct ApiRefusal {
    /// HTTP-like code.
    pub code: u16,
    /// The server's own code.
    #[serde(default)]
    pub err_code: u64,
    /// In words.
    #[serde(default)]
    pub description: String,
}

/// Why an API request has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JsError {
    #[error("jetstream does not answer: {0}")]
    Unavailable(RequestError),
    #[error(transparent)]
    Refused(#[from] ApiRefusal),
    #[error("jetstream's answer can't be read: {0}")]
    Unreadable(String),
}

impl JsError {
    pub(crate) fn code(&self) -> Option<u64> {
        match self {
            Self::Refused(refusal) => Some(refusal.err_code),
            Self::Unavailable(_) | Self::Unreadable(_) => None,
        }
    }

    /// Worth trying again: the server is away, restarting, or has no leader now.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(_) => true,
            Self::Refused(refusal) => refusal.code == 503 || refusal.err_code == code::CLUSTER_NOT_AVAILABLE,
            Self::Unreadable(_) => false,
        }
    }
}

#[derive(Deserialize)]
struct OnlyError {
    error: Option<ApiRefusal>,
}

/// Reads an answer: its `error` first, then the type.
pub(crate) fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, JsError> {
    let unreadable = |error: serde_json::Error| JsError::Unreadable(error.to_string());
    let answer: OnlyError = serde_json::from_slice(payload).map_err(unreadable)?;
    if let Some(refusal) = answer.error {
        return Err(refusal.into());
    }
    serde_json::from_slice(payload).map_err(unreadable)
}

pub(crate) async fn call<Q: Serialize + Sync, T: DeserializeOwned>(
    bus: &Bus,
    subject: &str,
    query: &Q,
) -> Result<T, JsError> {
    let body = serde_json::to_vec(query).map_err(|error| JsError::Unreadable(error.to_string()))?;
    let answer = bus
        .request(format!("$JS.API.{subject}"), Bytes::from(body), API_TIMEOUT)
        .await
        .map_err(JsError::Unavailable)?;
    read(&answer.payload)
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct StreamState {
    #[serde(default)]
    pub(crate) last_seq: u64,
}

/// The part of a stream's info that is read.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct StreamInfo {
    pub(crate) config: serde_json::Map<String, serde_json::Value>,
    pub(crate) state: StreamState,
    /// The server's time when it answered.
    pub(crate) ts: Option<DateTime<Utc>>,
}

pub(crate) async fn stream_info(bus: &Bus, stream: &str) -> Result<StreamInfo, JsError> {
    call(bus, &format!("STREAM.INFO.{stream}"), &serde_json::json!({})).await
}

/// A stored message as the leader has it.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) seq: u64,
    pub(crate) subject: String,
    pub(crate) payload: Bytes,
    pub(crate) time: DateTime<Utc>,
    /// Raw header block, empty if there is none.
    pub(crate) headers: Vec<u8>,
}

impl Stored {
    /// The value of a header, by its exact name (case ignored).
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let block = std::str::from_utf8(&self.headers).ok()?;
        block.split("\r\n").find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Which stored message to get.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Get<'a> {
    Seq { seq: u64 },
    Last { last_by_subj: &'a str },
    Next { seq: u64, next_by_subj: &'a str },
}

#[derive(Deserialize)]
struct GetAnswer {
    message: GetMessage,
}

#[derive(Deserialize)]
struct GetMessage {
    subject: String,
    seq: u64,
    #[serde(default)]
    hdrs: Option<String>,
    #[serde(default)]
    data: Option<String>,
    time: DateTime<Utc>,
}

/// Reads one message from the stream's leader (not a direct get, which a replica that lags may answer).
pub(crate) async fn get(bus: &Bus, stream: &str, which: &Get<'_>) -> Result<Option<Stored>, JsError> {
    let answer: GetAnswer = match call(bus, &format!("STREAM.MSG.GET.{stream}"), which).await {
        Ok(answer) => answer,
        Err(error) if error.code() == Some(code::NO_MESSAGE) => return Ok(None),
        Err(error) => return Err(error),
    };
    let decode = |text: Option<String>| {
        STANDARD.decode(text.unwrap_or_default()).map_err(|error| JsError::Unreadable(error.to_string()))
    };
    let message = answer.message;
    Ok(Some(Stored {
        seq: message.seq,
        subject: message.subject,
        payload: Bytes::from(decode(message.data)?),
        time: message.time,
        headers: decode(message.hdrs)?,
    }))
}

/// The acknowledgement of a stored message.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct StoreAck {
    pub(crate) seq: u64,
    #[serde(default)]
    pub(crate) duplicate: bool,
}

/// Stores one message and waits for the acknowledgement.
pub(crate) async fn store(
    bus: &Bus,
    subject: &str,
    headers: Option<HeaderMap>,
    payload: Bytes,
    timeout: Duration,
) -> Result<StoreAck, JsError> {
    let subject = subject.to_owned();
    let answer = match headers {
        Some(headers) => bus.request_with_headers(subject, headers, payload, timeout).await,
        None => bus.request(subject, payload, timeout).await,
    };
    read_ack(&answer.map_err(JsError::Unavailable)?.payload)
}

#[derive(Deserialize)]
struct AckOrError {
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
    error: Option<ApiRefusal>,
}

fn read_ack(payload: &[u8]) -> Result<StoreAck, JsError> {
    let answer: AckOrError =
        serde_json::from_slice(payload).map_err(|error| JsError::Unreadable(error.to_string()))?;
    match answer.error {
        Some(refusal) => Err(refusal.into()),
        None if answer.seq == 0 => Err(JsError::Unreadable("acknowledgement without a sequence".to_owned())),
        None => Ok(StoreAck { seq: answer.seq, duplicate: answer.duplicate }),
    }
}

/// True for the refusals that mean: no room.
pub(crate) fn is_full(refusal: &ApiRefusal) -> bool {
    match refusal.err_code {
        code::STORAGE_RESOURCES
        | code::ACCOUNT_RESOURCES
        | code::INSUFFICIENT_RESOURCES
        | code::MEMORY_RESOURCES => true,
        // The text says why: "maximum messages exceeded", "maximum bytes exceeded", "no space left on device", ...
        code::STORE_FAILED => {
            let text = refusal.description.to_ascii_lowercase();
            ["maximum", "exceeded", "space", "insufficient", "limit"].iter().any(|word| text.contains(word))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_from_results() {
        let refused = read_ack(br#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"S","seq":0}"#);
        assert_eq!(refused.unwrap_err().code(), Some(10071));
        let ack = read_ack(br#"{"stream":"S","seq":7,"duplicate":true}"#).unwrap();
        assert_eq!((ack.seq, ack.duplicate), (7, true));
        assert!(matches!(read_ack(b"+OK"), Err(JsError::Unreadable(_))));
        assert!(matches!(read_ack(b"{}"), Err(JsError::Unreadable(_))));
    }

    #[test]
    fn full_is_told_from_other_failures() {
        let refusal = |err_code, text: &str| ApiRefusal { code: 503, err_code, description: text.to_owned() };
        assert!(is_full(&refusal(10077, "maximum bytes exceeded")));
        assert!(is_full(&refusal(10077, "maximum messages exceeded")));
        assert!(is_full(&refusal(10047, "insufficient storage resources available")));
        assert!(!is_full(&refusal(10077, "raft: not leader")));
        assert!(!is_full(&refusal(10071, "wrong last sequence: 5")));
    }

    #[test]
    fn headers_are_found_whatever_their_case() {
        let stored = Stored {
            seq: 1,
            subject: "s".into(),
            payload: Bytes::new(),
            time: DateTime::default(),
            headers: b"NATS/1.0\r\nContent-Type: application/json\r\nnats-msg-id: a1\r\n\r\n".to_vec(),
        };
        assert_eq!(stored.header("Nats-Msg-Id"), Some("a1"));
        assert_eq!(stored.header("Nats-Expected"), None);
    }
}
