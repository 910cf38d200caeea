//! gRPC: `grpc.health.v1.Health/Check` says SERVING. `grpc://` and `http://` are plain, `grpcs://` and `https://` TLS;
//! the path, if there is one, names the service that is asked about.

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE, USER_AGENT};
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::dial::{Place, place};
use super::exchange::{AGENT_NAME, blame_http};
use super::tls::Inside;
use super::{Found, Prober, Target, Warm};
use crate::detector::Cause;

const METHOD: &str = "/grpc.health.v1.Health/Check";
pub(super) const SCHEMES: [(&str, u16, bool); 4] =
    [("grpc", 80, false), ("http", 80, false), ("grpcs", 443, true), ("https", 443, true)];
/// `HealthCheckResponse.status`.
const SERVING: u8 = 1;
/// Most bytes of an answer.
const BODY_MAX: usize = 1024;

pub(super) async fn probe(prober: &Prober, target: &Target, _: &mut Warm) -> Found {
    let (url, place) = match place(&target.endpoint.url, &SCHEMES) {
        Ok(read) => read,
        Err(found) => return found,
    };
    let service = url.path().trim_matches('/').to_owned();
    check(prober, target, &place, &service).await.unwrap_or_else(|found| found)
}

async fn check(prober: &Prober, target: &Target, place: &Place, service: &str) -> Result<Found, Found> {
    let stream = prober.dial(place, target.trust, Inside::Http2).await?;
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| blame_http(&error))?;
    let driver = tokio::spawn(async move {
        let _ = connection.await;
    });
    let answered = ask(&mut sender, place, service).await;
    // One call per connection: HTTP/2 keeps no warm state worth a file handle at this rate.
    driver.abort();
    answered
}

async fn ask(
    sender: &mut http2::SendRequest<Full<Bytes>>,
    place: &Place,
    service: &str,
) -> Result<Found, Found> {
    let scheme = if place.secure { "https" } else { "http" };
    let host = if place.host.contains(':') { format!("[{}]", place.host) } else { place.host.clone() };
    let uri = format!("{scheme}://{host}:{}{METHOD}", place.port);
    let mut request = Request::new(Full::new(message(service)?));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.parse().map_err(|_| Found::Skipped("its url can't be used".to_owned()))?;
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT_NAME));
    let response = sender.send_request(request).await.map_err(|error| blame_http(&error))?;
    let (parts, mut body) = response.into_parts();
    match parts.status.as_u16() {
        200 => {}
        401 | 403 => return Ok(Found::bad(Cause::Auth, format!("answered {}", parts.status))),
        // What stands before it has nobody behind it: UNAVAILABLE, as gRPC reads these.
        429 | 502..=504 => return Ok(Found::bad(Cause::Status, format!("answered {}", parts.status))),
        _ => return Ok(Found::bad(Cause::Protocol, format!("answered {}, which is not gRPC", parts.status))),
    }
    let mut data = BytesMut::new();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| blame_http(&error))?;
        match frame.into_data() {
            Ok(bytes) if data.len() + bytes.len() <= BODY_MAX => data.extend_from_slice(&bytes),
            Ok(_) => return Ok(Found::bad(Cause::Protocol, "its answer is too long for a health check")),
            Err(frame) => trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    // An answer without a message carries its status in the headers.
    let status = trailers.get("grpc-status").or_else(|| parts.headers.get("grpc-status"));
    let code = status.and_then(|status| status.to_str().ok()).unwrap_or("none");
    Ok(judge(code, &data))
}

fn judge(code: &str, data: &[u8]) -> Found {
    match code {
        "0" => match serving(data) {
            Some(SERVING) => Found::Good,
            Some(other) => Found::bad(Cause::Status, format!("its health is {other}, not SERVING")),
            None => Found::bad(Cause::Protocol, "its answer is no health check's"),
        },
        // PERMISSION_DENIED, UNAUTHENTICATED
        "7" | "16" => Found::bad(Cause::Auth, format!("grpc status {code}")),
        // NOT_FOUND: it does not know the service. UNIMPLEMENTED: it has no health service, so nothing says that it is
        // well, and whoever configured this probe is told so.
        "5" | "12" => {
            Found::bad(Cause::Protocol, format!("grpc status {code}: it does not serve this health check"))
        }
        other => {
            let shown: String = other.chars().take(20).collect();
            Found::bad(Cause::Status, format!("grpc status {shown}"))
        }
    }
}

/// `HealthCheckRequest { service }`, framed: no compression, length, message.
fn message(service: &str) -> Result<Bytes, Found> {
    let too_long = || Found::Skipped("the name of its service is too long".to_owned());
    let length = u8::try_from(service.len()).ok().filter(|length| *length < 0x80).ok_or_else(too_long)?;
    let mut message = BytesMut::new();
    if length > 0 {
        message.put_slice(&[0x0a, length]);
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).map_err(|_| too_long())?);
    framed.put_slice(&message);
    Ok(framed.freeze())
}

/// Field 1 of `HealthCheckResponse`; absent is 0, UNKNOWN.
fn serving(data: &[u8]) -> Option<u8> {
    let (frame, message) = data.split_at_checked(5)?;
    let length = u32::from_be_bytes(frame.get(1..5)?.try_into().ok()?);
    if frame.first() != Some(&0) || usize::try_from(length) != Ok(message.len()) {
        return None;
    }
    match message {
        [] => Some(0),
        [0x08, status, ..] => Some(*status),
        _ => None,
    }
}
