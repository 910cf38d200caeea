//! Pulling from a JetStream consumer: keeps requests outstanding, counts what they still owe, notices when the
//! consumer, the server or the connection is gone. [`crate::Tail`] and [`crate::WorkConsumer`] are built on it.

use std::time::Duration;

use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{FutureExt, StreamExt};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::bus::Bus;
use crate::link::Link;

/// The server says this often that it is still there while it has nothing to send.
const IDLE_HEARTBEAT: Duration = Duration::from_secs(2);
/// Nothing heard for this long: the consumer is taken for lost.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// Most bytes one request may bring, which bounds what is buffered.
const PULL_MAX_BYTES: usize = 8 * 1024 * 1024;

/// How much to ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PullConfig {
    /// Messages per request; asked again when half of it came.
    pub(crate) batch: usize,
    /// How long a request stands.
    pub(crate) expires: Duration,
}

/// Why there are no more messages from this source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The connection was lost or is another one.
    Reconnected,
    /// Nothing was heard for [`SILENCE_LIMIT`].
    Silent,
    /// The server ended it.
    Ended(String),
    /// The connection was closed for good.
    Closed,
}

pub(crate) struct PullSource {
    bus: Bus,
    next_subject: String,
    config: PullConfig,
    inbox: String,
    subscriber: Subscriber,
    pulls: u64,
    owed: usize,
    heard_at: Instant,
    link: watch::Receiver<Link>,
    epoch: u64,
}

impl PullSource {
    /// Subscribes; the first request goes out with the first [`PullSource::next`].
    pub(crate) async fn start(
        bus: &Bus,
        stream: &str,
        consumer: &str,
        config: PullConfig,
    ) -> Result<Self, Lost> {
        let link = bus.link();
        let now = *link.borrow();
        if !now.connected {
            return Err(Lost::Reconnected);
        }
        let inbox = bus.new_inbox();
        let subscriber = bus.subscribe(format!("{inbox}.*")).await.map_err(|_| Lost::Closed)?;
        Ok(Self {
            bus: bus.clone(),
            next_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
            config,
            inbox,
            subscriber,
            pulls: 0,
            owed: 0,
            heard_at: Instant::now(),
            link,
            epoch: now.epoch,
        })
    }

    /// The next message. Cancelling it loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Message, Lost> {
        loop {
            self.refill().await?;
            let silent_at = self.heard_at + SILENCE_LIMIT;
            let epoch = self.epoch;
            let received = tokio::select! {
                biased;
                received = self.subscriber.next() => received,
                _ = self.link.wait_for(|link| !link.connected || link.epoch != epoch) => return Err(Lost::Reconnected),
                () = tokio::time::sleep_until(silent_at) => return Err(Lost::Silent),
            };
            let Some(message) = received else { return Err(Lost::Closed) };
            self.heard_at = Instant::now();
            if let Some(message) = self.absorb(message)? {
                return Ok(message);
            }
        }
    }

    /// A message that is already here.
    pub(crate) fn try_next(&mut self) -> Option<Result<Message, Lost>> {
        loop {
            let message = self.subscriber.next().now_or_never()??;
            match self.absorb(message) {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) => {}
                Err(lost) => return Some(Err(lost)),
            }
        }
    }

    /// The next message that was sent already; asks for nothing. After [`PullSource::unsubscribe`].
    pub(crate) async fn next_sent(&mut self) -> Result<Message, Lost> {
        loop {
            let message = self.subscriber.next().await.ok_or(Lost::Closed)?;
            if let Some(message) = self.absorb(message)? {
                return Ok(message);
            }
        }
    }

    /// Takes nothing more from the server.
    pub(crate) async fn unsubscribe(&mut self) {
        // What is on its way still arrives and can be given back.
        self.bus.end(vec![&mut self.subscriber]).await;
    }

    async fn refill(&mut self) -> Result<(), Lost> {
        if self.owed > self.config.batch / 2 {
            return Ok(());
        }
        self.pulls += 1;
        let request = json!({
            "batch": self.config.batch,
            "max_bytes": PULL_MAX_BYTES,
            "expires": nanos(self.config.expires),
            "idle_heartbeat": nanos(IDLE_HEARTBEAT.min(self.config.expires / 3)),
        });
        let reply = format!("{}.{}", self.inbox, self.pulls);
        self.bus
            .publish_with_reply(self.next_subject.clone(), reply, Bytes::from(request.to_string()))
            .await
            .map_err(|_| Lost::Reconnected)?;
        if self.owed == 0 {
            self.heard_at = Instant::now();
        }
        self.owed += self.config.batch;
        Ok(())
    }

    /// Counts what came; gives back real messages, swallows the server's own.
    fn absorb(&mut self, message: Message) -> Result<Option<Message>, Lost> {
        let Some(status) = message.status else {
            self.owed = self.owed.saturating_sub(1);
            return Ok(Some(message));
        };
        let text = message.description.as_deref().unwrap_or("");
        match status.as_u16() {
            100 => Ok(None),
            404 | 408 => {
                self.settle(&message);
                Ok(None)
            }
            409 if text.starts_with("Message Size Exceeds") || text.starts_with("Batch Completed") => {
                self.settle(&message);
                Ok(None)
            }
            _ if status == StatusCode::NO_RESPONDERS => Err(Lost::Ended("no such consumer".to_owned())),
            other => Err(Lost::Ended(format!("{other} {text}"))),
        }
    }

    /// A request ended early: what it still owed will not come.
    fn settle(&mut self, message: &Message) {
        let pending = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get("Nats-Pending-Messages"))
            .and_then(|value| value.as_str().parse::<usize>().ok());
        self.owed = pending.map_or(0, |pending| self.owed.saturating_sub(pending));
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What the acknowledgement subject of a delivered message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) stream_seq: u64,
    pub(crate) consumer_seq: u64,
    /// How often this message was delivered, 1 the first time.
    pub(crate) delivered: u64,
    pub(crate) time: DateTime<Utc>,
    /// Messages after this one that match the consumer, when it was sent.
    pub(crate) pending: u64,
}

impl Meta {
    /// Reads both forms: `$JS.ACK.<stream>.<consumer>.<5 numbers>` and, from 2.15,
    /// `$JS.ACK.<domain>.<account>.<stream>.<consumer>.<5 numbers>[.<token>]`.
    pub(crate) fn parse(reply: &str) -> Option<Self> {
        let rest = reply.strip_prefix("$JS.ACK.")?;
        let skip = match rest.split('.').count() {
            7 => 2,
            9.. => 4,
            _ => return None,
        };
        let mut tokens = rest.split('.').skip(skip);
        let mut number = || tokens.next()?.parse::<u64>().ok();
        let (delivered, stream_seq, consumer_seq) = (number()?, number()?, number()?);
        let time = DateTime::from_timestamp_nanos(i64::try_from(number()?).ok()?);
        let pending = number()?;
        Some(Self { stream_seq, consumer_seq, delivered, time, pending })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_acknowledgement_subject_are_read() {
        let old = Meta::parse("$JS.ACK.S.c.2.41.7.1700000000000000001.9").unwrap();
        assert_eq!((old.delivered, old.stream_seq, old.consumer_seq, old.pending), (2, 41, 7, 9));
        assert_eq!(old.time.timestamp_nanos_opt(), Some(1_700_000_000_000_000_001));
        assert_eq!(Meta::parse("$JS.ACK._.ACC.S.c.2.41.7.1700000000000000001.9"), Some(old));
        assert_eq!(Meta::parse("$JS.ACK._.ACC.S.c.2.41.7.1700000000000000001.9.tok"), Some(old));
    }

    #[test]
    fn anything_else_is_not() {
        for bad in
            ["", "_INBOX.a", "$JS.ACK.S.c.2.41.7.1700", "$JS.ACK.S.c.x.41.7.17.9", "$JS.ACK.a.b.c.d.e.f.g.h"]
        {
            assert_eq!(Meta::parse(bad), None, "{bad:?}");
        }
    }
}

#[cfg(all(test, feature = "testing"))]
mod silence {
    use super::*;
    use crate::testing::NatsServer;

    #[tokio::test]
    async fn a_consumer_that_says_nothing_is_lost() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("t").await;
        // Somebody takes the requests and never answers, as a server that has forgotten them.
        let _mute = bus.subscribe("$JS.API.CONSUMER.MSG.NEXT.T_EVENTS.mute").await.unwrap();
        let config = PullConfig { batch: 10, expires: Duration::from_secs(30) };
        let mut source = PullSource::start(&bus, "T_EVENTS", "mute", config).await.unwrap();
        let lost = tokio::time::timeout(SILENCE_LIMIT * 3, source.next()).await.unwrap();
        assert_eq!(lost.unwrap_err(), Lost::Silent);
    }
}
