//! One HTTP request and its answer, over a warm connection where there is one. Never follows a redirect.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use url::Url;

use super::dial::{Place, place};
use super::events::{Events, reply_to};
use super::tls::{Inside, blame_stream};
use super::{Found, Prober, Target};
use crate::detector::Cause;

/// Most bytes of an answer's body that are read.
const BODY_MAX: usize = 64 * 1024;
/// Part of the timeout after which a kept connection without an answer gets a fresh one beside it. It may be half-open:
/// firewalls forget idle connections without a word. Small enough that what answers over the fresh one is not called slow.
const WARM_SHARE: u32 = 4;
/// What is said of ourselves.
pub(super) const AGENT_NAME: &str = concat!("rollcall-health-prober/", env!("CARGO_PKG_VERSION"));

type Sender = http1::SendRequest<Full<Bytes>>;

/// A connection that is kept for the next probe of the same target.
#[derive(Debug, Default)]
pub struct Warm {
    sender: Option<Sender>,
    /// Which dialect this target was found to speak, where there are several.
    pub(super) dialect: u8,
    counted: bool,
}

impl Warm {
    /// Drops the connection.
    pub fn clear(&mut self) {
        self.sender = None;
    }

    /// Keeps the connection if `keep`, drops it otherwise.
    pub(super) fn count(&mut self, keep: bool) {
        self.counted = keep;
        if !keep {
            self.clear();
        }
    }

    /// Whether it was counted among the kept ones.
    pub(super) fn is_counted(&self) -> bool {
        self.counted
    }

    /// Whether a connection is kept.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.sender.as_ref().is_some_and(|sender| !sender.is_closed())
    }
}

/// What is asked.
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) body: Bytes,
    /// How much of the body is wanted.
    pub(super) want: Want,
}

/// How much of an answer's body is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// Only its status; the body is read to its end so that the connection can be used again.
    Status,
    /// All of it.
    Body,
    /// The answer of JSON-RPC to the request of this id, alone or in a stream of events.
    Reply(u32),
}

impl Ask {
    pub(super) fn get(url: Url, want: Want) -> Self {
        Self { method: Method::GET, url, headers: Vec::new(), body: Bytes::new(), want }
    }
}

/// What was answered.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// Unless only its status or a reply was wanted.
    pub(super) body: Bytes,
    /// The reply, if one was wanted and came.
    pub(super) reply: Option<Value>,
}

impl Answer {
    /// What the status says, apart from anything in the body.
    pub(super) fn judge(&self) -> Found {
        match self.status.as_u16() {
            200..=299 => Found::Good,
            401 | 403 => Found::bad(Cause::Auth, format!("answered {}", self.status)),
            300..=399 => {
                Found::bad(Cause::Status, format!("answered {}, redirects are not followed", self.status))
            }
            _ => Found::bad(Cause::Status, format!("answered {}", self.status)),
        }
    }
}

pub(super) const WEB: [(&str, u16, bool); 2] = [("http", 80, false), ("https", 443, true)];

impl Prober {
    /// The target's URL, if it is one of the web.
    pub(super) fn web(&self, target: &Target) -> Result<Url, Found> {
        place(&target.endpoint.url, &WEB).map(|(url, _)| url)
    }

    /// Asks over the warm connection, if there is one, and asks again over a fresh one if that breaks or says nothing:
    /// whatever goes wrong on the warm one, a fresh connection decides.
    pub(super) async fn exchange(&self, target: &Target, warm: &mut Warm, ask: Ask) -> Result<Answer, Found> {
        let (_, place) = place(ask.url.as_str(), &WEB)?;
        let fresh = self.ask_anew(target, &ask, &place);
        let (sender, answer) = match warm.sender.take().filter(|sender| !sender.is_closed()) {
            None => fresh.await?,
            Some(sender) => {
                let mut kept = pin!(ask_again(sender, &ask, &place));
                match tokio::time::timeout(self.timeout / WARM_SHARE, &mut kept).await {
                    Ok(Some(answered)) => answered,
                    Ok(None) => fresh.await?,
                    // It may also be slow and nothing else.
                    Err(_) => tokio::select! {
                        biased;
                        Some(answered) = &mut kept => answered,
                        answered = fresh => answered?,
                    },
                }
            }
        };
        keep(warm, sender, &answer);
        Ok(answer)
    }

    async fn ask_anew(&self, target: &Target, ask: &Ask, place: &Place) -> Result<(Sender, Answer), Found> {
        let stream = self.dial(place, target.trust, Inside::Http1).await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| blame_http(&error))?;
        tokio::spawn(async move {
            // Its end is seen by the sender.
            let _ = connection.await;
        });
        let answer = once(&mut sender, ask, place).await?;
        Ok((sender, answer))
    }
}

async fn ask_again(mut sender: Sender, ask: &Ask, place: &Place) -> Option<(Sender, Answer)> {
    sender.ready().await.ok()?;
    let answer = once(&mut sender, ask, place).await.ok()?;
    Some((sender, answer))
}

fn keep(warm: &mut Warm, sender: Sender, answer: &Answer) {
    if answer.status.is_success() && !sender.is_closed() {
        warm.sender = Some(sender);
    }
}

async fn once(sender: &mut Sender, ask: &Ask, place: &Place) -> Result<Answer, Found> {
    let mut request = Request::new(Full::new(ask.body.clone()));
    request.method_mut().clone_from(&ask.method);
    let path = match ask.url.query() {
        Some(query) => format!("{}?{query}", ask.url.path()),
        None => ask.url.path().to_owned(),
    };
    *request.uri_mut() = path.parse().map_err(|_| Found::Skipped("its url has no usable path".to_owned()))?;
    let host = ask.url.host_str().unwrap_or(&place.host);
    let authority = ask.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    let headers = request.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&authority) {
        headers.insert(HOST, value);
    }
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT_NAME));
    for (name, value) in &ask.headers {
        headers.insert(name, value.clone());
    }
    let response = sender.send_request(request).await.map_err(|error| blame_http(&error))?;
    read(response, ask.want).await
}

async fn read(response: Response<Incoming>, want: Want) -> Result<Answer, Found> {
    let (parts, mut body) = response.into_parts();
    let streams = parts
        .headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.starts_with("text/event-stream"));
    let (mut collected, mut events, mut reply) = (BytesMut::new(), Events::default(), None);
    let mut total = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| blame_http(&error))?;
        let Some(data) = frame.data_ref() else { continue };
        total += data.len();
        if total > BODY_MAX {
            // Enough was seen; the connection can't be used again, which is right for such an endpoint.
            if want == Want::Status {
                break;
            }
            return Err(Found::bad(Cause::Protocol, format!("its answer has over {BODY_MAX} bytes")));
        }
        match want {
            Want::Status => {}
            Want::Reply(id) if streams => {
                events.push(data);
                reply = std::iter::from_fn(|| events.next()).find_map(|event| reply_to(id, &event));
                // The stream may stay open for good.
                if reply.is_some() {
                    break;
                }
            }
            Want::Body | Want::Reply(_) => collected.extend_from_slice(data),
        }
    }
    if let Want::Reply(id) = want
        && !streams
    {
        reply = reply_to(id, &collected);
    }
    Ok(Answer { status: parts.status, headers: parts.headers, body: collected.freeze(), reply })
}

/// What a failed exchange says about the other side.
pub(super) fn blame_http(error: &hyper::Error) -> Found {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return blame_stream(io, "http");
        }
        source = inner.source();
    }
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return Found::bad(Cause::Reset, format!("http: {error}"));
    }
    Found::bad(Cause::Protocol, format!("http: {error}"))
}
