//! Answering requests on `<prefix>.api.<verb>` as a NATS service, so that `nats micro` lists it.
//!
//! The services protocol is spoken here and not by the client library, because that one answers discovery requests
//! on any reply subject, and because errors carry a body as well as the two error headers.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::bus::{Bus, ReplyOutcome, SubscribeError};
use crate::inbox::is_inbox;
use crate::isolation;

mod discovery;
mod error;

use discovery::{Discovery, EndpointStats};
pub use error::ApiError;

/// The queue group of all replicas of a service (the services API's default).
const QUEUE_GROUP: &str = "q";

/// One request.
#[derive(Debug, Clone)]
pub struct ApiRequest {
    /// The verb, like `submit` or `watchdog.run`.
    pub verb: &'static str,
    /// The body.
    pub payload: Bytes,
    /// Where the answer goes; an inbox, or nothing if no answer was asked for.
    pub reply: Option<String>,
}

/// How a service presents itself and how much it takes on.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// Service name, like `rollcall-dispatcher` (letters, digits, `_`, `-`).
    pub service: String,
    /// Its version (semver).
    pub version: String,
    /// One sentence for `nats micro info`.
    pub description: String,
    /// Requests handled at once; beyond it the answer is `unavailable`.
    pub max_in_flight: usize,
    /// Largest request body in bytes; beyond it the answer is `too_large`.
    pub max_request_bytes: usize,
    /// What `unavailable` tells the requester to wait.
    pub busy_retry_after_ms: u64,
}

impl ApiOptions {
    /// Defaults: 256 at once, bodies up to 512 KiB (PROTOCOL.md, size limits).
    pub fn new(service: impl Into<String>, version: impl Into<String>) -> Self {
        Self {
            service: service.into(),
            version: version.into(),
            description: String::new(),
            max_in_flight: 256,
            max_request_bytes: 512 * 1024,
            busy_retry_after_ms: 500,
        }
    }
}

type Answer = Result<Bytes, ApiError>;
type Handler = Arc<dyn Fn(ApiRequest) -> Pin<Box<dyn Future<Output = Answer> + Send>> + Send + Sync>;

/// A service before it starts: name the verbs, then [`ApiServer::start`].
pub struct ApiServer {
    bus: Bus,
    options: ApiOptions,
    handlers: BTreeMap<&'static str, Handler>,
}

impl ApiServer {
    /// A service without verbs yet.
    pub fn new(bus: &Bus, options: ApiOptions) -> Self {
        Self { bus: bus.clone(), options, handlers: BTreeMap::new() }
    }

    /// Answers `<prefix>.api.<verb>` with what `handler` returns. Naming a verb again replaces its handler.
    #[must_use]
    pub fn verb<F, Fut>(mut self, verb: &'static str, handler: F) -> Self
    where
        F: Fn(ApiRequest) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Answer> + Send + 'static,
    {
        self.handlers.insert(verb, Arc::new(move |request| Box::pin(handler(request))));
        self
    }

    /// Subscribes everything and serves until the handle is drained or dropped.
    ///
    /// # Errors
    /// The connection was closed, or a verb does not make a subject.
    pub async fn start(self) -> Result<ApiHandle, SubscribeError> {
        let mut endpoints = Vec::new();
        let mut requests = SelectAll::new();
        for (verb, handler) in self.handlers {
            let subject = self.bus.names().api(verb);
            let subscriber = self.bus.queue_subscribe(subject.clone(), QUEUE_GROUP).await?;
            let index = endpoints.len();
            endpoints.push(Arc::new(Endpoint { verb, handler, stats: EndpointStats::new(verb, subject) }));
            requests.push(Intake { index, subscriber });
        }
        let stats = endpoints.iter().map(Arc::clone).collect();
        let discovery = Discovery::start(&self.bus, &self.options, stats).await?;
        let tracker = TaskTracker::new();
        let (stop, stopped) = oneshot::channel();
        let serving = Serving {
            bus: self.bus.clone(),
            permits: Arc::new(Semaphore::new(self.options.max_in_flight.max(1))),
            options: Arc::new(self.options),
            endpoints,
            tracker: tracker.clone(),
        };
        tracker.spawn(serving.run(requests, discovery, stopped));
        Ok(ApiHandle { bus: self.bus, tracker, stop: Some(stop) })
    }
}

/// A running service. Dropping it stops taking requests; [`ApiHandle::drain`] also waits for those in flight.
pub struct ApiHandle {
    bus: Bus,
    tracker: TaskTracker,
    stop: Option<oneshot::Sender<()>>,
}

impl ApiHandle {
    /// Stops taking requests, answers what was taken, flushes. True if all of it was done within `timeout`.
    pub async fn drain(mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        drop(self.stop.take());
        self.tracker.close();
        let finished = tokio::time::timeout_at(deadline, self.tracker.wait()).await.is_ok();
        finished && matches!(tokio::time::timeout_at(deadline, self.bus.flush()).await, Ok(Ok(())))
    }
}

/// One verb with its handler.
struct Endpoint {
    verb: &'static str,
    handler: Handler,
    stats: EndpointStats,
}

/// A verb's subscription, which says which verb a message is for.
struct Intake {
    index: usize,
    subscriber: Subscriber,
}

impl futures_util::Stream for Intake {
    type Item = (usize, Message);

    fn poll_next(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let index = self.index;
        self.subscriber.poll_next_unpin(cx).map(|message| message.map(|message| (index, message)))
    }
}

struct Serving {
    bus: Bus,
    options: Arc<ApiOptions>,
    permits: Arc<Semaphore>,
    endpoints: Vec<Arc<Endpoint>>,
    tracker: TaskTracker,
}

impl Serving {
    async fn run(
        self,
        mut requests: SelectAll<Intake>,
        mut discovery: Discovery,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let mut stopping = false;
        loop {
            tokio::select! {
                // Sent never, dropped when the handle goes: both mean stop.
                _ = &mut stopped, if !stopping => {
                    stopping = true;
                    // What the server sent already is still answered.
                    self.bus.end(requests.iter_mut().map(|intake| &mut intake.subscriber).collect()).await;
                }
                request = requests.next() => match request {
                    Some((index, message)) => self.take(index, message).await,
                    None => return,
                },
                // Answered as long as requests are.
                () = discovery.answer_one(), if !stopping => {}
            }
        }
    }

    async fn take(&self, index: usize, message: Message) {
        let Some(endpoint) = self.endpoints.get(index).map(Arc::clone) else { return };
        let reply = message.reply.as_deref().map(str::to_owned);
        if reply.as_deref().is_some_and(|reply| !is_inbox(reply)) {
            // Counts and logs it; the verb itself is not run for somebody who wants us to publish elsewhere.
            self.bus.reply_to(reply.as_deref(), None, Bytes::new()).await;
            return;
        }
        let size = message.payload.len();
        if size > self.options.max_request_bytes {
            let limit = self.options.max_request_bytes;
            let error =
                ApiError::new("too_large", format!("request of {size} bytes, at most {limit} are taken"));
            return self.finish(&endpoint, reply, Err(error), Instant::now()).await;
        }
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            metrics::counter!("rollcall_api_refused_busy_total").increment(1);
            let error = ApiError::new("unavailable", "too many requests at once")
                .retry_after_ms(self.options.busy_retry_after_ms);
            return self.finish(&endpoint, reply, Err(error), Instant::now()).await;
        };
        let request = ApiRequest { verb: endpoint.verb, payload: message.payload, reply };
        let shared = Self {
            bus: self.bus.clone(),
            options: Arc::clone(&self.options),
            permits: Arc::clone(&self.permits),
            endpoints: Vec::new(),
            tracker: self.tracker.clone(),
        };
        self.tracker.spawn(shared.handle(endpoint, request, permit));
    }

    async fn handle(self, endpoint: Arc<Endpoint>, request: ApiRequest, permit: OwnedSemaphorePermit) {
        let started = Instant::now();
        let reply = request.reply.clone();
        let handler = Arc::clone(&endpoint.handler);
        let answer = isolation::catch(async move { handler(request).await }).await.unwrap_or_else(|panic| {
            metrics::counter!("rollcall_api_panics_total").increment(1);
            tracing::error!(verb = endpoint.verb, panic, "request handler panicked");
            Err(ApiError::new("unavailable", "the request failed inside the service"))
        });
        self.finish(&endpoint, reply, answer, started).await;
        drop(permit);
    }

    async fn finish(&self, endpoint: &Endpoint, reply: Option<String>, answer: Answer, started: Instant) {
        endpoint.stats.count(started.elapsed(), answer.as_ref().err());
        metrics::counter!("rollcall_api_requests_total", "verb" => endpoint.verb,
            "outcome" => answer.as_ref().map_or_else(|error| error.code(), |_| "ok"))
        .increment(1);
        let Some(reply) = reply else { return };
        let (headers, body) = self.encode(answer);
        if self.bus.reply_to(Some(&reply), headers, body).await == ReplyOutcome::Failed {
            tracing::debug!(verb = endpoint.verb, "answer not sent");
        }
    }

    fn encode(&self, answer: Answer) -> (Option<HeaderMap>, Bytes) {
        match answer {
            Ok(body) if body.len() <= self.bus.max_payload() => (None, body),
            Ok(body) => {
                let error = ApiError::new("too_large", format!("the answer has {} bytes", body.len()));
                (Some(error.headers()), error.body())
            }
            Err(error) => (Some(error.headers()), error.body()),
        }
    }
}
