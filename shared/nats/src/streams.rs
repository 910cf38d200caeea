//! The three streams: created when missing, compared when there, never changed or deleted by us.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::bus::Bus;
use crate::js::{self, JsError, code};

/// Largest event with its headers, in bytes (PROTOCOL.md, size limits).
pub const EVENT_MAX_BYTES: usize = 1024 * 1024;
/// Largest report and largest payload (input, result, checkpoint), in bytes (PROTOCOL.md, size limits).
pub const REPORT_MAX_BYTES: usize = 512 * 1024;
/// Room for headers that a sender may add to a report or payload.
const HEADERS_MAX_BYTES: usize = 16 * 1024;
/// How long the streams remember message ids (the server's default, named because retries count on it).
const DUPLICATE_WINDOW_NS: u64 = 120_000_000_000;
/// How long [`ensure_streams`] waits for a server that is restarting or has no leader yet.
pub const ENSURE_DEADLINE: Duration = Duration::from_secs(30);
/// Pause between two tries.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What an operator may choose. None of it is compared with a stream that is already there.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// Copies of each stream, 1 to 5.
    pub replicas: usize,
    /// Most bytes of the event stream; `None`: until the disk is full.
    pub events_max_bytes: Option<u64>,
    /// Most bytes of the report stream.
    pub reports_max_bytes: Option<u64>,
    /// Most bytes of the payload stream.
    pub payloads_max_bytes: Option<u64>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { replicas: 1, events_max_bytes: None, reports_max_bytes: None, payloads_max_bytes: None }
    }
}

/// One setting of a stream that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drift {
    /// The field as the server calls it.
    pub field: &'static str,
    /// What it must be, as JSON.
    pub wanted: String,
    /// What it is, as JSON.
    pub found: String,
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: wanted {}, found {}", self.field, self.wanted, self.found)
    }
}

/// Why the streams can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnsureStreamsError {
    /// A stream is there with other settings. It is for a person to decide what to do with it.
    #[error("stream {stream} has other settings than rollcall needs: {}", .fields.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Drifted {
        /// The stream.
        stream: String,
        /// Every field that differs.
        fields: Vec<Drift>,
    },
    /// JetStream is switched off on this server or for this account.
    #[error("jetstream is not enabled for this account: {0}")]
    NoJetStream(String),
    /// The server refuses.
    #[error("stream {stream} can't be created or read: {reason}")]
    Refused {
        /// The stream.
        stream: String,
        /// The server's words.
        reason: String,
    },
    /// Nobody answers now; worth trying again.
    #[error("stream {stream} can't be checked now: {reason}")]
    Unavailable {
        /// The stream.
        stream: String,
        /// What happened.
        reason: String,
    },
}

impl EnsureStreamsError {
    /// Worth trying again later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// [`ensure_streams_with`] the defaults.
///
/// # Errors
/// See [`EnsureStreamsError`].
pub async fn ensure_streams(bus: &Bus) -> Result<(), EnsureStreamsError> {
    ensure_streams_with(bus, &StreamOptions::default()).await
}

/// Creates the streams that are missing and compares those that are there. Several processes may do it at once.
/// Waits up to [`ENSURE_DEADLINE`] for a server that does not answer yet.
///
/// # Errors
/// See [`EnsureStreamsError`]; nothing that exists was changed.
pub async fn ensure_streams_with(bus: &Bus, options: &StreamOptions) -> Result<(), EnsureStreamsError> {
    let deadline = Instant::now() + ENSURE_DEADLINE;
    for spec in specs(bus, options) {
        loop {
            match ensure(bus, &spec).await {
                Ok(()) => break,
                Err(error) if error.is_transient() && Instant::now() + RETRY_PAUSE < deadline => {
                    tracing::debug!(%error, "trying again");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

struct Spec {
    name: String,
    /// Compared: nothing works right when one of these differs.
    must: Vec<(&'static str, Value)>,
    /// Only used when we create it.
    initial: Vec<(&'static str, Value)>,
}

fn specs(bus: &Bus, options: &StreamOptions) -> [Spec; 3] {
    let names = bus.names();
    let others = REPORT_MAX_BYTES + HEADERS_MAX_BYTES;
    let spec = |name, subjects, retention, max_size: usize, keep: bool, max_bytes: Option<u64>| Spec {
        name,
        must: vec![
            ("subjects", json!([subjects])),
            ("retention", json!(retention)),
            ("storage", json!("file")),
            ("discard", json!("new")),
            ("discard_new_per_subject", json!(false)),
            ("max_age", json!(0)),
            ("max_msgs_per_subject", json!(-1)),
            ("max_msg_size", json!(max_size)),
            ("deny_delete", json!(keep)),
            ("deny_purge", json!(keep)),
            ("allow_rollup_hdrs", json!(false)),
            ("allow_msg_ttl", json!(false)),
            ("no_ack", json!(false)),
            ("sealed", json!(false)),
            ("mirror", Value::Null),
            ("subject_transform", Value::Null),
        ],
        initial: vec![
            ("num_replicas", json!(options.replicas)),
            ("max_msgs", json!(-1)),
            ("max_bytes", max_bytes.map_or(json!(-1), |bytes| json!(bytes))),
            ("max_consumers", json!(-1)),
            ("duplicate_window", json!(DUPLICATE_WINDOW_NS)),
        ],
    };
    [
        spec(
            names.events_stream(),
            names.all_events(),
            "limits",
            EVENT_MAX_BYTES,
            true,
            options.events_max_bytes,
        ),
        spec(
            names.reports_stream(),
            names.all_reports(),
            "workqueue",
            others,
            false,
            options.reports_max_bytes,
        ),
        spec(
            names.payloads_stream(),
            names.all_payloads(),
            "limits",
            others,
            false,
            options.payloads_max_bytes,
        ),
    ]
}

async fn ensure(bus: &Bus, spec: &Spec) -> Result<(), EnsureStreamsError> {
    let config = match js::stream_info(bus, &spec.name).await {
        Ok(info) => info.config,
        Err(error) if error.code() == Some(code::STREAM_NOT_FOUND) => match create(bus, spec).await {
            Ok(()) => {
                tracing::info!(stream = %spec.name, "stream created");
                return Ok(());
            }
            // Somebody else created it a moment ago, with other settings than ours: compare.
            Err(error) if error.code() == Some(code::STREAM_NAME_IN_USE) => {
                js::stream_info(bus, &spec.name).await.map_err(|error| failed(spec, error))?.config
            }
            Err(error) => return Err(failed(spec, error)),
        },
        Err(error) => return Err(failed(spec, error)),
    };
    let fields = compare(spec, &config);
    if fields.is_empty() {
        Ok(())
    } else {
        Err(EnsureStreamsError::Drifted { stream: spec.name.clone(), fields })
    }
}

async fn create(bus: &Bus, spec: &Spec) -> Result<(), JsError> {
    let mut config = Map::new();
    config.insert("name".to_owned(), json!(spec.name));
    for (field, value) in spec.must.iter().chain(&spec.initial) {
        // What is off by default is left out: servers before the setting existed refuse nothing then.
        if !is_off(value) {
            config.insert((*field).to_owned(), value.clone());
        }
    }
    let _: Value = js::call(bus, &format!("STREAM.CREATE.{}", spec.name), &config).await?;
    Ok(())
}

fn is_off(value: &Value) -> bool {
    value.is_null() || *value == json!(false)
}

fn compare(spec: &Spec, found: &Map<String, Value>) -> Vec<Drift> {
    let absent = |wanted: &Value| if wanted.is_boolean() { json!(false) } else { Value::Null };
    spec.must
        .iter()
        .filter_map(|(field, wanted)| {
            let found = found.get(*field).cloned().unwrap_or_else(|| absent(wanted));
            let same = found == *wanted || (*field == "max_age" && found.is_null());
            (!same).then(|| Drift { field, wanted: wanted.to_string(), found: found.to_string() })
        })
        .collect()
}

fn failed(spec: &Spec, error: JsError) -> EnsureStreamsError {
    let stream = spec.name.clone();
    match error.code() {
        Some(code::JETSTREAM_NOT_ENABLED | code::JETSTREAM_DISABLED) => {
            EnsureStreamsError::NoJetStream(error.to_string())
        }
        _ if error.is_transient() => EnsureStreamsError::Unavailable { stream, reason: error.to_string() },
        _ => EnsureStreamsError::Refused { stream, reason: error.to_string() },
    }
}
