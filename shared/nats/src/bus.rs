//! The connection to NATS: one per process, cloned freely.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::client::{PublishErrorKind, RequestErrorKind};
use async_nats::{Client, HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::inbox::is_inbox;
use crate::link::{Link, Signals, watch_link};
use crate::names::Names;
use crate::version;

mod connect;

use connect::without_userinfo;
pub use connect::{CONNECT_TIMEOUT, ConnectError, RECONNECT_MAX_DELAY, RECONNECT_MIN_DELAY, check_url};

/// How long a publish may wait for room in the client's command queue.
pub const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`Bus::flush`] waits for its round trip.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// See [`Bus::end`].
const NO_MORE: u64 = u64::MAX;
/// Messages one subscription buffers before it drops (the library's default).
pub const SUBSCRIPTION_CAPACITY: usize = 65_536;

/// Where and as whom to connect.
#[derive(Clone, Default)]
pub struct BusOptions {
    /// `nats://host:port`, several separated by commas.
    pub url: String,
    /// A NATS credentials file.
    pub creds: Option<PathBuf>,
    /// User name; used with `password`.
    pub user: Option<String>,
    /// Password of `user`.
    pub password: Option<String>,
    /// How the connection is called in the server's listings.
    pub connection_name: String,
    /// Own inbox prefix, like `_INBOX_dispatcher`, for accounts that restrict it.
    pub inbox_prefix: Option<String>,
    /// The fleet's prefix (`ROLLCALL_PREFIX`).
    pub prefix: String,
    /// Messages a subscription buffers before it drops; `None` is [`SUBSCRIPTION_CAPACITY`].
    pub subscription_capacity: Option<usize>,
}

impl fmt::Debug for BusOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusOptions")
            .field("url", &without_userinfo(&self.url))
            .field("creds", &self.creds)
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("connection_name", &self.connection_name)
            .field("inbox_prefix", &self.inbox_prefix)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// Why a message was not published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// There is no connection now. Nothing was queued.
    #[error("nats is not connected")]
    Disconnected,
    /// More than the server's maximum payload.
    #[error("message is larger than the server allows")]
    TooLarge,
    /// Empty, with a wildcard, or with a space.
    #[error("subject {0:?} can't be published on")]
    InvalidSubject(String),
}

/// Why a request got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The server says that nobody listens there. This is evidence and arrives at once.
    #[error("no responders")]
    NoResponders,
    /// Nobody answered in time.
    #[error("no answer in time")]
    Timeout,
    /// There is no connection, or it was lost before the answer came. Says nothing about the other side.
    #[error("nats is not connected")]
    Disconnected,
    /// The request is larger than the server allows.
    #[error("request is larger than the server allows")]
    TooLarge,
    /// Anything else, in words.
    #[error("request failed: {0}")]
    Other(String),
}

/// Why there is no subscription.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("can't subscribe to {subject:?}: {reason}")]
pub struct SubscribeError {
    /// The subject asked for.
    pub subject: String,
    /// What is wrong.
    pub reason: String,
}

/// What became of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyOutcome {
    /// Handed to the connection.
    Sent,
    /// The message asked for no reply.
    NotAsked,
    /// The reply subject is not an inbox; counted, not answered.
    Refused,
    /// Not published (disconnected or too large).
    Failed,
}

struct Inner {
    client: Client,
    names: Names,
    link: watch::Receiver<Link>,
    signals: Arc<Signals>,
    _watcher: DropGuard,
}

/// The connection. Cloning is cheap and shares it.
#[derive(Clone)]
pub struct Bus(Arc<Inner>);

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").field("prefix", &self.prefix()).field("link", &*self.0.link.borrow()).finish()
    }
}

impl Bus {
    /// Connects, waiting for a server that is not up yet or does not accept us yet; reconnects by itself for ever.
    ///
    /// `cancel` ends the waiting. It is also cancelled by us if a later reconnect meets a server that is too old.
    ///
    /// # Errors
    /// What no waiting can heal: see [`ConnectError`].
    pub async fn connect(options: BusOptions, cancel: CancellationToken) -> Result<Self, ConnectError> {
        let names = Names::new(&options.prefix)?;
        let signals = Signals::new();
        let client = connect::wait_for_server(&options, &signals, &cancel).await?;
        let info = client.server_info();
        version::check(&info.version)?;
        tracing::info!(server = %info.server_name, version = %info.version, "nats connected");
        metrics::gauge!("rollcall_bus_connected").set(1.0);
        let (link, watcher) = watch_link(client.clone(), Arc::clone(&signals), cancel);
        Ok(Self(Arc::new(Inner { client, names, link, signals, _watcher: watcher })))
    }

    /// The fleet's prefix.
    pub fn prefix(&self) -> &str {
        self.0.names.prefix()
    }

    /// Stream names and subjects of this prefix.
    pub fn names(&self) -> &Names {
        &self.0.names
    }

    /// The version of the server connected to now.
    pub fn server_version(&self) -> String {
        self.0.client.server_info().version
    }

    /// Largest message the server takes, headers included, in bytes.
    pub fn max_payload(&self) -> usize {
        self.0.client.max_payload()
    }

    /// The state of the connection.
    pub fn link(&self) -> watch::Receiver<Link> {
        self.0.link.clone()
    }

    /// Connected as far as is known now.
    pub fn is_connected(&self) -> bool {
        self.0.link.borrow().connected
    }

    /// Waits until there is a connection and returns it.
    pub async fn connected(&self) -> Link {
        let mut link = self.link();
        let connected = link.wait_for(|link| link.connected).await.ok().map(|link| *link);
        match connected {
            Some(link) => link,
            // The watcher only ends with the process (or an unsupported server): never connected again.
            None => std::future::pending().await,
        }
    }

    /// How often a subscription of this process is known to have dropped a message because nobody read it in time.
    /// A lower bound: treat any change as a gap in everything core-subscribed.
    pub fn slow_consumer_drops(&self) -> watch::Receiver<u64> {
        self.0.signals.slow_consumer_drops()
    }

    /// Publishes without waiting for anything but room in the send queue.
    ///
    /// # Errors
    /// [`PublishError::Disconnected`] at once while there is no connection: nothing is sent later behind your back.
    pub async fn publish(&self, subject: impl Into<Subject>, payload: Bytes) -> Result<(), PublishError> {
        let subject = self.may_publish(subject.into())?;
        bounded(self.0.client.publish(subject, payload)).await
    }

    /// As [`Bus::publish`], with headers.
    ///
    /// # Errors
    /// See [`Bus::publish`].
    pub async fn publish_with_headers(
        &self,
        subject: impl Into<Subject>,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<(), PublishError> {
        let subject = self.may_publish(subject.into())?;
        bounded(self.0.client.publish_with_headers(subject, headers, payload)).await
    }

    pub(crate) async fn publish_with_reply(
        &self,
        subject: impl Into<Subject>,
        reply: String,
        payload: Bytes,
    ) -> Result<(), PublishError> {
        let subject = self.may_publish(subject.into())?;
        bounded(self.0.client.publish_with_reply(subject, reply, payload)).await
    }

    fn may_publish(&self, subject: Subject) -> Result<Subject, PublishError> {
        if subject.is_empty() || subject.bytes().any(|b| b == b'*' || b == b'>' || !b.is_ascii_graphic()) {
            return Err(PublishError::InvalidSubject(subject.escape_debug().to_string()));
        }
        if !self.is_connected() {
            return Err(PublishError::Disconnected);
        }
        Ok(subject)
    }

    /// Waits until the server has processed everything published before (a round trip through an inbox).
    ///
    /// # Errors
    /// [`PublishError::Disconnected`] if there is no connection, or no answer within [`FLUSH_TIMEOUT`].
    pub async fn flush(&self) -> Result<(), PublishError> {
        let inbox = self.new_inbox();
        let mut echo = self.subscribe(inbox.clone()).await.map_err(|_| PublishError::Disconnected)?;
        self.publish(inbox, Bytes::new()).await?;
        match tokio::time::timeout(FLUSH_TIMEOUT, echo.next()).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => Err(PublishError::Disconnected),
        }
    }

    /// Sends a request and waits for one answer, at most `timeout`.
    ///
    /// # Errors
    /// [`RequestError::NoResponders`] exactly when the server said so.
    pub async fn request(
        &self,
        subject: impl Into<Subject>,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Message, RequestError> {
        self.send_request(subject.into(), async_nats::Request::new().payload(payload), timeout).await
    }

    /// As [`Bus::request`], with headers.
    ///
    /// # Errors
    /// See [`Bus::request`].
    pub async fn request_with_headers(
        &self,
        subject: impl Into<Subject>,
        headers: HeaderMap,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Message, RequestError> {
        let request = async_nats::Request::new().headers(headers).payload(payload);
        self.send_request(subject.into(), request, timeout).await
    }

    async fn send_request(
        &self,
        subject: Subject,
        request: async_nats::Request,
        timeout: Duration,
    ) -> Result<Message, RequestError> {
        let subject = match self.may_publish(subject) {
            Ok(subject) => subject,
            Err(PublishError::Disconnected) => return Err(RequestError::Disconnected),
            Err(other) => return Err(RequestError::Other(other.to_string())),
        };
        let mut link = self.link();
        let epoch = link.borrow().epoch;
        let answer = self.0.client.send_request(subject, request.timeout(None));
        tokio::select! {
            biased;
            answer = answer => answer.map_err(|error| match error.kind() {
                RequestErrorKind::NoResponders => RequestError::NoResponders,
                RequestErrorKind::TimedOut => RequestError::Timeout,
                RequestErrorKind::MaxPayloadExceeded => RequestError::TooLarge,
                RequestErrorKind::InvalidSubject | RequestErrorKind::Other => RequestError::Other(error.to_string()),
            }),
            // An answer to a request of an older connection can't be told from a lost one: don't wait for it.
            _ = link.wait_for(|link| !link.connected || link.epoch != epoch) => Err(RequestError::Disconnected),
            () = tokio::time::sleep(timeout) => Err(RequestError::Timeout),
        }
    }

    /// Subscribes; survives reconnects (messages in between are missed, see [`Bus::link`]).
    ///
    /// # Errors
    /// The subject is malformed or the connection was closed.
    pub async fn subscribe(&self, subject: impl Into<Subject>) -> Result<Subscriber, SubscribeError> {
        let subject = subject.into();
        let name = subject.to_string();
        self.0
            .client
            .subscribe(subject)
            .await
            .map_err(|error| SubscribeError { subject: name, reason: error.to_string() })
    }

    /// Subscribes as one of a group of which one gets each message.
    ///
    /// # Errors
    /// The subject or group is malformed or the connection was closed.
    pub async fn queue_subscribe(
        &self,
        subject: impl Into<Subject>,
        group: impl Into<String>,
    ) -> Result<Subscriber, SubscribeError> {
        let subject = subject.into();
        let name = subject.to_string();
        self.0
            .client
            .queue_subscribe(subject, group.into())
            .await
            .map_err(|error| SubscribeError { subject: name, reason: error.to_string() })
    }

    /// Ends subscriptions: the server sends nothing more, and what it has sent until then is delivered before they end.
    ///
    /// The client's own drain forgets a subscription when it is next woken, be it before the server has heard of the end:
    /// what comes in between is dropped. So the server is told by a bound that this client never reaches, and that
    /// nats-server takes for none, since it reads no more than nine digits. The client forgets after a round trip.
    pub(crate) async fn end(&self, subscribers: Vec<&mut Subscriber>) {
        let mut ending = Vec::new();
        for subscriber in subscribers {
            // A closed connection has nothing left to unsubscribe from.
            if subscriber.unsubscribe_after(NO_MORE).await.is_ok() {
                ending.push(subscriber);
            }
        }
        if self.is_connected() {
            // Without an answer the connection is lost, and what was on its way with it.
            let _ = self.flush().await;
        }
        for subscriber in ending {
            let _ = subscriber.drain().await;
        }
    }

    /// Answers a message if its reply subject is an inbox; anything else is refused and counted.
    pub async fn reply(&self, message: &Message, payload: Bytes) -> ReplyOutcome {
        self.reply_to(message.reply.as_deref(), None, payload).await
    }

    /// As [`Bus::reply`], to a reply subject kept from a message, optionally with headers.
    pub async fn reply_to(
        &self,
        reply: Option<&str>,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> ReplyOutcome {
        let Some(reply) = reply else { return ReplyOutcome::NotAsked };
        if !is_inbox(reply) {
            metrics::counter!("rollcall_replies_refused_total").increment(1);
            tracing::warn!(reply = %reply.escape_debug(), "reply subject is not an inbox, not answered");
            return ReplyOutcome::Refused;
        }
        let sent = match headers {
            Some(headers) => self.publish_with_headers(reply.to_owned(), headers, payload).await,
            None => self.publish(reply.to_owned(), payload).await,
        };
        match sent {
            Ok(()) => ReplyOutcome::Sent,
            Err(error) => {
                tracing::debug!(%error, "reply not sent");
                ReplyOutcome::Failed
            }
        }
    }

    /// A fresh inbox subject.
    pub fn new_inbox(&self) -> String {
        self.0.client.new_inbox()
    }

    /// A fresh unique token for names.
    pub(crate) fn new_token(&self) -> String {
        let inbox = self.new_inbox();
        inbox.rsplit('.').next().unwrap_or(&inbox).to_owned()
    }

    /// Closes the connection, last of all: first stop what takes work ([`crate::ApiHandle::drain`],
    /// [`crate::WorkConsumer::stop`]), then settle what is in flight, then this, which flushes, unsubscribes what is
    /// left and closes. True if everything published before is known to have arrived.
    pub async fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let flushed = match tokio::time::timeout_at(deadline, self.flush()).await {
            Ok(Ok(())) => true,
            Ok(Err(_)) | Err(_) => false,
        };
        if self.0.client.drain().await.is_ok() && self.is_connected() {
            // Bounded: a connection that is just lost never reports that it closed.
            let _ = tokio::time::timeout_at(deadline, self.0.signals.closed().cancelled()).await;
        }
        flushed
    }
}

async fn bounded<F>(publish: F) -> Result<(), PublishError>
where
    F: Future<Output = Result<(), async_nats::PublishError>>,
{
    match tokio::time::timeout(PUBLISH_TIMEOUT, publish).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => PublishError::TooLarge,
            PublishErrorKind::InvalidSubject => PublishError::InvalidSubject(error.to_string()),
            PublishErrorKind::Send => PublishError::Disconnected,
        }),
        Err(_) => Err(PublishError::Disconnected),
    }
}
