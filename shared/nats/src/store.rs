//! Reports (agents to the dispatcher, durable) and payloads (inputs, results and checkpoints beside the log).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::bus::{Bus, RequestError};
use crate::js::{self, Get, JsError, code};
use crate::log::{Entry, ReadError};
use crate::streams::REPORT_MAX_BYTES;
use crate::work::{WorkConsumer, WorkOptions};

/// How long a report or payload waits for the stream's acknowledgement.
pub const STORE_ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Why something is not known to be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No acknowledgement. It may or may not have landed; storing it again is harmless.
    #[error("the stream does not answer: {0}")]
    Unavailable(String),
    /// The stream or the disk is full; nothing was stored.
    #[error("the stream is full: {0}")]
    Full(String),
    /// Larger than the stream takes; nothing was stored.
    #[error("{bytes} bytes are more than the stream takes")]
    TooLarge {
        /// The size.
        bytes: usize,
    },
    /// Anything else, in words.
    #[error("not stored: {0}")]
    Other(String),
}

async fn store(bus: &Bus, subject: &str, bytes: Bytes) -> Result<u64, StoreError> {
    let size = bytes.len();
    if size > REPORT_MAX_BYTES {
        return Err(StoreError::TooLarge { bytes: size });
    }
    match js::store(bus, subject, None, bytes, STORE_ACK_TIMEOUT).await {
        Ok(ack) => Ok(ack.seq),
        Err(JsError::Unavailable(RequestError::TooLarge)) => Err(StoreError::TooLarge { bytes: size }),
        Err(JsError::Refused(refusal)) if refusal.err_code == code::MESSAGE_TOO_LARGE => {
            Err(StoreError::TooLarge { bytes: size })
        }
        Err(JsError::Refused(refusal)) if js::is_full(&refusal) => Err(StoreError::Full(refusal.to_string())),
        Err(error) if error.is_transient() => Err(StoreError::Unavailable(error.to_string())),
        Err(error) => Err(StoreError::Other(error.to_string())),
    }
}

/// The report stream. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Reports {
    bus: Bus,
    stream: Arc<str>,
}

impl Reports {
    /// The report stream of the bus's prefix.
    pub fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone(), stream: bus.names().reports_stream().into() }
    }

    /// Stores a report and waits for the stream's acknowledgement; returns its sequence. No message id is set.
    ///
    /// # Errors
    /// See [`StoreError`]; one try, the caller repeats it until it is acknowledged.
    pub async fn publish(&self, subject: &str, bytes: Bytes) -> Result<u64, StoreError> {
        store(&self.bus, subject, bytes).await
    }

    /// The last report that still waits on the subject, from the leader.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn last(&self, subject: &str) -> Result<Option<Entry>, ReadError> {
        Ok(js::get(&self.bus, &self.stream, &Get::Last { last_by_subj: subject }).await?.map(Entry::from))
    }

    /// Takes reports as durable work.
    pub fn work(&self, durable: &str, options: WorkOptions) -> WorkConsumer {
        WorkConsumer::new(&self.bus, &*self.stream, durable, options)
    }
}

/// The payload stream. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Payloads {
    bus: Bus,
    stream: Arc<str>,
}

impl Payloads {
    /// The payload stream of the bus's prefix.
    pub fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone(), stream: bus.names().payloads_stream().into() }
    }

    /// Stores a payload; returns the sequence to get it by.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn put(&self, subject: &str, bytes: Bytes) -> Result<u64, StoreError> {
        store(&self.bus, subject, bytes).await
    }

    /// The payload with this sequence.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn get(&self, seq: u64) -> Result<Option<Bytes>, ReadError> {
        Ok(js::get(&self.bus, &self.stream, &Get::Seq { seq }).await?.map(|stored| stored.payload))
    }

    /// The last payload on a subject.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn last(&self, subject: &str) -> Result<Option<Entry>, ReadError> {
        Ok(js::get(&self.bus, &self.stream, &Get::Last { last_by_subj: subject }).await?.map(Entry::from))
    }
}
