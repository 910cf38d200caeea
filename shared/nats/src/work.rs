//! Durable work: each message goes to one taker until it is acknowledged.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use async_nats::{HeaderMap, Message, Subject};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::bus::{Bus, PublishError, RequestError};
use crate::js::{self, JsError, code};
use crate::pull::{Lost, Meta, PullConfig, PullSource};

/// How long a request for work stands at the server: short, since it can't be withdrawn.
const WORK_EXPIRES: Duration = Duration::from_secs(5);
/// Delay before work that was dropped unsettled is delivered again.
const NAK_ON_DROP_DELAY: Duration = Duration::from_millis(200);
/// How long a confirmed acknowledgement may take.
const DOUBLE_ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`WorkConsumer::stop`] waits for what is still on its way.
const STOP_GRACE: Duration = Duration::from_millis(250);
/// Pauses before the consumer is opened again, first and longest.
const REOPEN_MIN_PAUSE: Duration = Duration::from_millis(20);
const REOPEN_MAX_PAUSE: Duration = Duration::from_secs(1);
/// Time between two log lines about a stream that does not answer.
const REOPEN_LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Where a durable consumer starts when it is created. An existing one goes on where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartAt {
    /// At the first message there is.
    First,
    /// With messages stored from now on.
    New,
    /// After this sequence.
    After(u64),
}

/// How work is taken.
#[derive(Debug, Clone)]
pub struct WorkOptions {
    /// Subjects of the stream; none: all.
    pub filters: Vec<String>,
    /// Not settled within this time: delivered again, to anyone.
    pub ack_wait: Duration,
    /// Most deliveries of this consumer that are unsettled at once, over all processes.
    pub max_ack_pending: usize,
    /// Most messages fetched ahead by this process.
    pub prefetch: usize,
    /// Where it starts when it is new.
    pub start: StartAt,
}

impl Default for WorkOptions {
    fn default() -> Self {
        Self {
            filters: Vec::new(),
            ack_wait: Duration::from_secs(30),
            max_ack_pending: 1000,
            prefetch: 64,
            start: StartAt::First,
        }
    }
}

/// Why no work can be taken. Whatever waiting can heal is waited for instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// The server refuses the consumer.
    #[error("work of stream {stream} can't be taken: {reason}")]
    Refused {
        /// The stream.
        stream: String,
        /// The server's words.
        reason: String,
    },
    /// The connection was closed by us.
    #[error("the connection was closed")]
    Closed,
}

/// The settlement did not reach the server: the message will be delivered again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// Not sent.
    #[error("not settled: {0}")]
    Publish(#[from] PublishError),
    /// Sent, but not confirmed.
    #[error("not confirmed: {0}")]
    Unconfirmed(#[from] RequestError),
}

/// A taker of durable work. Several may share one durable name, in one process or many.
pub struct WorkConsumer {
    bus: Bus,
    stream: String,
    durable: String,
    options: WorkOptions,
    source: Option<PullSource>,
    /// Deliveries of a source that ended; they are still ours to settle.
    leftover: VecDeque<Delivery>,
    pause: Duration,
    reopen_at: Option<Instant>,
    logged_at: Option<Instant>,
}

impl WorkConsumer {
    /// Creates the durable consumer if it is missing (or adapts its timing if that differs) and takes from it.
    /// Nothing is asked for before the first [`WorkConsumer::next`].
    pub fn new(
        bus: &Bus,
        stream: impl Into<String>,
        durable: impl Into<String>,
        options: WorkOptions,
    ) -> Self {
        Self {
            bus: bus.clone(),
            stream: stream.into(),
            durable: durable.into(),
            options,
            source: None,
            leftover: VecDeque::new(),
            pause: Duration::ZERO,
            reopen_at: None,
            logged_at: None,
        }
    }

    /// The next piece of work. Waits as long as it takes, over reconnects; cancelling loses nothing.
    /// Get the permit to work on it before you call this.
    ///
    /// # Errors
    /// See [`WorkError`].
    pub async fn next(&mut self) -> Result<Delivery, WorkError> {
        loop {
            if let Some(delivery) = self.leftover.pop_front() {
                return Ok(delivery);
            }
            let Some(source) = self.source.as_mut() else {
                self.open().await?;
                continue;
            };
            match source.next().await {
                Ok(message) => {
                    self.pause = Duration::ZERO;
                    if let Some(delivery) = Delivery::new(&self.bus, message) {
                        return Ok(delivery);
                    }
                }
                Err(Lost::Closed) => return Err(WorkError::Closed),
                Err(lost) => {
                    if lost != Lost::Reconnected {
                        tracing::info!(stream = %self.stream, durable = %self.durable, reason = ?lost, "work ended, resuming");
                    }
                    self.take_leftover();
                    self.source = None;
                }
            }
        }
    }

    /// Takes nothing more and gives back what was fetched ahead, so that others get it at once.
    pub async fn stop(mut self) {
        if let Some(source) = self.source.as_mut() {
            source.unsubscribe().await;
            // What the server had sent already arrives before the end of the subscription.
            let deadline = Instant::now() + STOP_GRACE;
            while let Ok(Ok(message)) = tokio::time::timeout_at(deadline, source.next_sent()).await {
                self.leftover.extend(Delivery::new(&self.bus, message));
            }
        }
        for delivery in std::mem::take(&mut self.leftover) {
            if let Err(error) = delivery.nak(Duration::ZERO).await {
                tracing::debug!(%error, "work not given back, it comes again after its ack wait");
            }
        }
    }

    fn take_leftover(&mut self) {
        while let Some(Ok(message)) = self.source.as_mut().and_then(PullSource::try_next) {
            self.leftover.extend(Delivery::new(&self.bus, message));
        }
    }

    async fn open(&mut self) -> Result<(), WorkError> {
        // Kept over calls: whoever gives up waiting and calls again must not start the pause anew.
        let until = *self.reopen_at.get_or_insert_with(|| Instant::now() + self.pause);
        tokio::time::sleep_until(until).await;
        self.reopen_at = None;
        self.pause = (self.pause * 2).clamp(REOPEN_MIN_PAUSE, REOPEN_MAX_PAUSE);
        self.bus.connected().await;
        let config = PullConfig { batch: self.options.prefetch.max(1), expires: WORK_EXPIRES };
        let source = match PullSource::start(&self.bus, &self.stream, &self.durable, config).await {
            Ok(source) => source,
            Err(Lost::Closed) => return Err(WorkError::Closed),
            Err(_) => return Ok(()),
        };
        match self.ensure_consumer().await {
            Ok(()) => {
                self.source = Some(source);
                self.logged_at = None;
                Ok(())
            }
            Err(error) if error.is_transient() || error.code() == Some(code::STREAM_NOT_FOUND) => {
                if self.logged_at.is_none_or(|at| at.elapsed() >= REOPEN_LOG_INTERVAL) {
                    self.logged_at = Some(Instant::now());
                    tracing::warn!(stream = %self.stream, durable = %self.durable, %error, "no work can be taken, trying again");
                }
                Ok(())
            }
            Err(error) => Err(WorkError::Refused { stream: self.stream.clone(), reason: error.to_string() }),
        }
    }

    async fn ensure_consumer(&self) -> Result<(), JsError> {
        let info = format!("CONSUMER.INFO.{}.{}", self.stream, self.durable);
        let found: Option<Value> = match js::call(&self.bus, &info, &json!({})).await {
            Ok(found) => Some(found),
            Err(error) if error.code() == Some(code::CONSUMER_NOT_FOUND) => None,
            Err(error) => return Err(error),
        };
        let mut config = json!({
            "name": self.durable,
            "durable_name": self.durable,
            "ack_policy": "explicit",
            "ack_wait": u64::try_from(self.options.ack_wait.as_nanos()).unwrap_or(u64::MAX),
            "max_ack_pending": self.options.max_ack_pending,
            "max_deliver": -1,
            "replay_policy": "instant",
        });
        match self.options.start {
            StartAt::First => config["deliver_policy"] = json!("all"),
            StartAt::New => config["deliver_policy"] = json!("new"),
            StartAt::After(seq) => {
                config["deliver_policy"] = json!("by_start_sequence");
                config["opt_start_seq"] = json!(seq.saturating_add(1));
            }
        }
        match self.options.filters.as_slice() {
            [] => {}
            [one] => config["filter_subject"] = json!(one),
            many => config["filter_subjects"] = json!(many),
        }
        if let Some(found) = found {
            // Where it started can't be changed and does not matter any more.
            for field in ["deliver_policy", "opt_start_seq"] {
                match found["config"].get(field) {
                    Some(value) => config[field] = value.clone(),
                    None => {
                        if let Some(fields) = config.as_object_mut() {
                            fields.remove(field);
                        }
                    }
                }
            }
            let wanted = config.as_object().into_iter().flatten();
            if wanted.into_iter().all(|(field, value)| found["config"].get(field) == Some(value)) {
                return Ok(());
            }
        }
        let subject = format!("CONSUMER.CREATE.{}.{}", self.stream, self.durable);
        let _: Value =
            js::call(&self.bus, &subject, &json!({ "stream_name": self.stream, "config": config })).await?;
        Ok(())
    }
}

/// One piece of work. It must be settled; dropping it gives it back.
pub struct Delivery {
    bus: Bus,
    message: Message,
    meta: Meta,
    settled: bool,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("seq", &self.meta.stream_seq)
            .field("subject", &self.message.subject)
            .field("delivered", &self.meta.delivered)
            .finish_non_exhaustive()
    }
}

impl Delivery {
    fn new(bus: &Bus, message: Message) -> Option<Self> {
        let meta = Meta::parse(message.reply.as_deref()?)?;
        Some(Self { bus: bus.clone(), message, meta, settled: false })
    }

    /// Subject it was published on.
    pub fn subject(&self) -> &Subject {
        &self.message.subject
    }

    /// Its bytes.
    pub fn payload(&self) -> &Bytes {
        &self.message.payload
    }

    /// Its headers.
    pub fn headers(&self) -> Option<&HeaderMap> {
        self.message.headers.as_ref()
    }

    /// Sequence in its stream.
    pub fn seq(&self) -> u64 {
        self.meta.stream_seq
    }

    /// How often it was delivered, 1 the first time.
    pub fn delivered(&self) -> u64 {
        self.meta.delivered
    }

    /// When the stream took it.
    pub fn time(&self) -> DateTime<Utc> {
        self.meta.time
    }

    /// Done. The acknowledgement is sent, not confirmed: if it is lost, the message comes again.
    ///
    /// # Errors
    /// It could not be sent.
    pub async fn ack(self) -> Result<(), AckError> {
        self.settle(Bytes::from_static(b"+ACK")).await
    }

    /// Done, and the server said that it knows.
    ///
    /// # Errors
    /// Not confirmed in time: the message may come again.
    pub async fn double_ack(mut self) -> Result<(), AckError> {
        let Some(reply) = self.message.reply.clone() else { return Ok(()) };
        self.settled = true;
        self.bus.request(reply, Bytes::from_static(b"+ACK"), DOUBLE_ACK_TIMEOUT).await?;
        Ok(())
    }

    /// Not done: deliver it again after `delay`.
    ///
    /// # Errors
    /// It could not be sent; it comes again after its ack wait.
    pub async fn nak(self, delay: Duration) -> Result<(), AckError> {
        self.settle(nak_body(delay)).await
    }

    /// Never deliver it again, although nothing was done. Say why in an alarm of your own.
    ///
    /// # Errors
    /// It could not be sent; it comes again after its ack wait.
    pub async fn term(self) -> Result<(), AckError> {
        self.settle(Bytes::from_static(b"+TERM")).await
    }

    /// Still working on it: starts its ack wait anew.
    ///
    /// # Errors
    /// It could not be sent.
    pub async fn in_progress(&self) -> Result<(), AckError> {
        let Some(reply) = self.message.reply.clone() else { return Ok(()) };
        Ok(self.bus.publish(reply, Bytes::from_static(b"+WPI")).await?)
    }

    async fn settle(mut self, body: Bytes) -> Result<(), AckError> {
        let Some(reply) = self.message.reply.clone() else { return Ok(()) };
        self.bus.publish(reply, body).await?;
        self.settled = true;
        Ok(())
    }
}

fn nak_body(delay: Duration) -> Bytes {
    if delay.is_zero() {
        return Bytes::from_static(b"-NAK");
    }
    Bytes::from(format!("-NAK {{\"delay\":{}}}", delay.as_nanos()))
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let (Some(reply), Ok(runtime)) = (self.message.reply.clone(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let bus = self.bus.clone();
        runtime.spawn(async move {
            if let Err(error) = bus.publish(reply, nak_body(NAK_ON_DROP_DELAY)).await {
                tracing::debug!(%error, "dropped work not given back, it comes again after its ack wait");
            }
        });
    }
}
