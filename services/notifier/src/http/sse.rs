//! `GET /events`: server-sent events.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use rollcall_core::wire::ApiError;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use super::{
    error::Failure,
    params::{Params, sequence},
    stream::subscribe,
};
use crate::{
    shared::Shared,
    subscriber::{Ended, Subscription},
};

/// A comment goes out this often (PROTOCOL.md 7).
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
/// How long a browser waits before it connects again, in milliseconds.
const RETRY_MS: u64 = 1_000;
/// First room for a batch.
const CHUNK_START: usize = 1024;

/// `GET /events`
#[utoipa::path(
    get, path = "/events", tag = "streams",
    summary = "Events as they happen, as server-sent events",
    description = "`id` is the sequence in the log, `event` the type without `rollcall.`, `data` the CloudEvent \
        byte for byte as it is in the log. Without `after` and `Last-Event-ID` the stream begins with the next event.",
    params(super::openapi::StreamParams, ("Last-Event-ID" = Option<u64>, Header,
        description = "Resume after this sequence; wins over `after`")),
    responses(
        (status = 200, description = "The stream", content_type = "text/event-stream", body = String),
        (status = 400, description = "A parameter is wrong", body = super::openapi::ErrorAnswer),
        (status = 503, description = "Too many subscribers, or the log does not answer", body = super::openapi::ErrorAnswer),
    )
)]
pub(super) async fn events(
    State(shared): State<Arc<Shared>>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let resume = last_event_id(&headers)?;
    let subscription = subscribe(&shared, "sse", &params, resume).await?;
    let stream = Stream::new(subscription, shared.shutdown.clone());
    let chunks = futures_util::stream::unfold(stream, |mut stream| async move {
        let chunk = stream.chunk().await?;
        Some((Ok::<_, std::convert::Infallible>(chunk), stream))
    });
    let mut response = Body::from_stream(chunks).into_response();
    let fixed = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store, no-transform"),
        // For nginx in front: it would hold events back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    for (name, value) in fixed {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get("last-event-id") else { return Ok(None) };
    match value.to_str().map(str::trim) {
        Ok("") => Ok(None),
        Ok(text) => sequence("Last-Event-ID", text).map(Some),
        Err(_) => Err(ApiError::bad_request("Last-Event-ID is not a sequence of the log")),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Streaming,
    Over,
}

struct Stream {
    subscription: Subscription,
    shutdown: CancellationToken,
    comments: Interval,
    phase: Phase,
    /// The place a browser would resume after, as far as it was told.
    told: u64,
}

impl Stream {
    fn new(subscription: Subscription, shutdown: CancellationToken) -> Self {
        let mut comments = interval_at(Instant::now() + COMMENT_INTERVAL, COMMENT_INTERVAL);
        comments.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let told = subscription.cursor();
        Self { subscription, shutdown, comments, phase: Phase::Greeting, told }
    }

    /// The next bytes; `None` ends the answer.
    async fn chunk(&mut self) -> Option<Bytes> {
        match self.phase {
            Phase::Over => return None,
            Phase::Greeting => {
                self.phase = Phase::Streaming;
                return Some(self.greeting());
            }
            Phase::Streaming => {}
        }
        let mut chunk = BytesMut::new();
        let mut last = self.told;
        let next = self.subscription.next(|frame| {
            let rendered = frame.sse();
            chunk.reserve(rendered.len().max(CHUNK_START));
            chunk.put_slice(rendered);
            last = frame.seq;
        });
        let ended = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Some("shutting down"),
            _ = self.comments.tick() => return Some(self.comment()),
            next = next => match next {
                Ok(()) => None,
                Err(Ended::Slow) => Some("too slow"),
                Err(Ended::LogUnreadable(reason)) => {
                    tracing::warn!(%reason, "old events can't be sent");
                    Some("the log can't be read")
                }
            },
        };
        self.told = last;
        match ended {
            None => Some(chunk.freeze()),
            Some(why) => {
                self.phase = Phase::Over;
                Some(Bytes::from(format!(": {why}, resume after {}\n\n", self.subscription.cursor())))
            }
        }
    }

    /// The first bytes, at once: a proxy or client sees that it works. The id makes a browser that has not seen an
    /// event yet resume from here and not from whenever it comes back.
    fn greeting(&self) -> Bytes {
        Bytes::from(format!(": rollcall\nretry: {RETRY_MS}\nid: {}\n\n", self.told))
    }

    fn comment(&mut self) -> Bytes {
        let cursor = self.subscription.cursor();
        if cursor == self.told {
            return Bytes::from_static(b": still here\n\n");
        }
        // Nothing of what went by was for this subscriber: it need not be looked through again after a cut.
        self.told = cursor;
        Bytes::from(format!(": still here\nid: {cursor}\n\n"))
    }
}
