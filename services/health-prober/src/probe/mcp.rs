//! MCP over streamable HTTP: `server/discover` (2026-07-28); older servers `initialize` and `ping`, and the session that
//! this opens is closed again.

use bytes::Bytes;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use url::Url;

use super::exchange::{Answer, Ask, Want};
use super::{Found, Prober, Target, Warm};
use crate::detector::Cause;

/// The first version without `ping` and without sessions.
const NEW: &str = "2026-07-28";
/// What is offered to servers before it.
const OLD: &str = "2025-06-18";
/// JSON-RPC: there is no such method.
const METHOD_NOT_FOUND: i64 = -32601;
/// This target answered to the old dialect.
const SPEAKS_OLD: u8 = 1;

const VERSION_HEADER: HeaderName = HeaderName::from_static("mcp-protocol-version");
const METHOD_HEADER: HeaderName = HeaderName::from_static("mcp-method");
const SESSION_HEADER: HeaderName = HeaderName::from_static("mcp-session-id");

pub(super) async fn probe(prober: &Prober, target: &Target, warm: &mut Warm) -> Found {
    let url = match prober.web(target) {
        Ok(url) => url,
        Err(found) => return found,
    };
    let found = if warm.dialect == SPEAKS_OLD { None } else { discover(prober, target, warm, &url).await };
    match found {
        Some(found) => found,
        None => {
            let found = initialize(prober, target, warm, &url).await.unwrap_or_else(|found| found);
            // A server that was replaced by a newer one is asked the new way next time.
            warm.dialect = if found == Found::Good { SPEAKS_OLD } else { 0 };
            found
        }
    }
}

/// `None`: it does not know the question.
async fn discover(prober: &Prober, target: &Target, warm: &mut Warm, url: &Url) -> Option<Found> {
    let body = json!({
        "jsonrpc": "2.0", "id": "probe", "method": "server/discover",
        "params": { "_meta": {
            "io.modelcontextprotocol/protocolVersion": NEW,
            "io.modelcontextprotocol/clientInfo": { "name": "rollcall", "version": env!("CARGO_PKG_VERSION") },
            "io.modelcontextprotocol/clientCapabilities": {},
        } },
    });
    let headers = vec![
        (VERSION_HEADER, HeaderValue::from_static(NEW)),
        (METHOD_HEADER, HeaderValue::from_static("server/discover")),
    ];
    let answer = match prober.exchange(target, warm, post(url, &body, headers)).await {
        Ok(answer) => answer,
        Err(found) => return Some(found),
    };
    let refused = [StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED];
    let message = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
    if message["error"]["code"] == METHOD_NOT_FOUND || refused.contains(&answer.status) {
        return None;
    }
    Some(match answer.judge() {
        Found::Good if message["result"].is_object() => Found::Good,
        // An old server may also refuse whatever comes before `initialize` with an error of its own.
        Found::Good if message["error"].is_object() => return None,
        Found::Good => Found::bad(Cause::Protocol, "its answer to server/discover is no JSON-RPC"),
        found => found,
    })
}

async fn initialize(prober: &Prober, target: &Target, warm: &mut Warm, url: &Url) -> Result<Found, Found> {
    let body = json!({
        "jsonrpc": "2.0", "id": 1, "method": "initialize",
        "params": {
            "protocolVersion": OLD, "capabilities": {},
            "clientInfo": { "name": "rollcall", "version": env!("CARGO_PKG_VERSION") },
        },
    });
    let answer = prober.exchange(target, warm, post(url, &body, Vec::new())).await?;
    let result = result_of(&answer, "initialize")?;
    let version = result["protocolVersion"].as_str().unwrap_or(OLD);
    let mut headers = Vec::new();
    if let Ok(value) = HeaderValue::from_str(version) {
        headers.push((VERSION_HEADER, value));
    }
    let session = answer.headers.get(&SESSION_HEADER).cloned();
    if let Some(session) = &session {
        headers.push((SESSION_HEADER, session.clone()));
    }
    let alive = ping(prober, target, warm, url, &headers).await;
    if session.is_some() {
        // No session is left behind. A server that does not let clients end them answers 405, and that is its affair.
        let end =
            Ask { method: Method::DELETE, url: url.clone(), headers, body: Bytes::new(), want: Want::Status };
        let _ = prober.exchange(target, warm, end).await;
    }
    alive
}

async fn ping(
    prober: &Prober,
    target: &Target,
    warm: &mut Warm,
    url: &Url,
    headers: &[(HeaderName, HeaderValue)],
) -> Result<Found, Found> {
    let ready = json!({ "jsonrpc": "2.0", "method": "notifications/initialized" });
    prober.exchange(target, warm, post(url, &ready, headers.to_vec())).await?;
    let body = json!({ "jsonrpc": "2.0", "id": 2, "method": "ping" });
    let answer = prober.exchange(target, warm, post(url, &body, headers.to_vec())).await?;
    result_of(&answer, "ping").map(|_| Found::Good)
}

fn result_of(answer: &Answer, method: &str) -> Result<Value, Found> {
    match answer.judge() {
        Found::Good => {}
        found => return Err(found),
    }
    let message: Value = serde_json::from_slice(&answer.body)
        .map_err(|_| Found::bad(Cause::Protocol, format!("its answer to {method} is no JSON-RPC")))?;
    if message["result"].is_object() {
        return Ok(message["result"].clone());
    }
    Err(Found::bad(Cause::Protocol, format!("its answer to {method} has no result")))
}

fn post(url: &Url, body: &Value, mut headers: Vec<(HeaderName, HeaderValue)>) -> Ask {
    headers.push((CONTENT_TYPE, HeaderValue::from_static("application/json")));
    headers.push((ACCEPT, HeaderValue::from_static("application/json, text/event-stream")));
    let body = Bytes::from(body.to_string());
    Ask { method: Method::POST, url: url.clone(), headers, body, want: Want::Message }
}
