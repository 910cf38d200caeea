//! MCP over streamable HTTP: `server/discover` (2026-07-28); older servers `initialize` and `ping`, and the session that
//! this opens is closed again, also when the probe has run out of time meanwhile.

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
/// The versions with `ping`. Whoever answers with another one is there, and there is nothing that we could ask it.
const WITH_PING: [&str; 5] = ["2024-10-07", "2024-11-05", "2025-03-26", OLD, "2025-11-25"];
/// JSON-RPC: there is no such method.
const METHOD_NOT_FOUND: i64 = -32601;
/// This target answered to the old dialect.
const SPEAKS_OLD: u8 = 1;
/// Part of the timeout that a server gets to end a session while its probe waits for it.
const ENDING_SHARE: u32 = 4;

const VERSION_HEADER: HeaderName = HeaderName::from_static("mcp-protocol-version");
const METHOD_HEADER: HeaderName = HeaderName::from_static("mcp-method");
const SESSION_HEADER: HeaderName = HeaderName::from_static("mcp-session-id");

pub(super) async fn probe(prober: &Prober, target: &Target, warm: &mut Warm) -> Found {
    let url = match prober.web(target) {
        Ok(url) => url,
        Err(found) => return found,
    };
    let server = Server { prober, target, url: &url };
    let found = if warm.dialect == SPEAKS_OLD { None } else { server.discover(warm).await };
    match found {
        Some(found) => found,
        None => {
            let found = server.initialize(warm).await.unwrap_or_else(|found| found);
            // A server that was replaced by a newer one is asked the new way next time.
            warm.dialect = if found == Found::Good { SPEAKS_OLD } else { 0 };
            found
        }
    }
}

/// Whom we talk to.
#[derive(Clone, Copy)]
struct Server<'a> {
    prober: &'a Prober,
    target: &'a Target,
    url: &'a Url,
}

type Headers = Vec<(HeaderName, HeaderValue)>;

impl<'a> Server<'a> {
    /// `None`: it does not know the question.
    async fn discover(self, warm: &mut Warm) -> Option<Found> {
        let params = json!({ "_meta": {
            "io.modelcontextprotocol/protocolVersion": NEW,
            "io.modelcontextprotocol/clientInfo": { "name": "rollcall", "version": env!("CARGO_PKG_VERSION") },
            "io.modelcontextprotocol/clientCapabilities": {},
        } });
        let headers = vec![
            (VERSION_HEADER, HeaderValue::from_static(NEW)),
            (METHOD_HEADER, HeaderValue::from_static("server/discover")),
        ];
        let answer = match self.ask(warm, 1, "server/discover", params, headers).await {
            Ok(answer) => answer,
            Err(found) => return Some(found),
        };
        // Some old servers open a session for whoever comes.
        if let Some(session) = self.session(&answer, OLD) {
            session.end(warm).await;
        }
        let refused = [StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED];
        let reply = answer.reply.as_ref().unwrap_or(&Value::Null);
        match answer.judge() {
            found @ Found::Bad(Cause::Auth, _) => Some(found),
            _ if names_its_versions(reply) => Some(Found::Good),
            _ if reply["error"]["code"] == METHOD_NOT_FOUND || refused.contains(&answer.status) => None,
            Found::Good if reply["result"].is_object() => Some(Found::Good),
            // An old server may also refuse whatever comes before `initialize` with an error of its own.
            Found::Good if reply["error"].is_object() => None,
            Found::Good => {
                Some(Found::bad(Cause::Protocol, "its answer to server/discover is no answer of JSON-RPC"))
            }
            found => Some(found),
        }
    }

    async fn initialize(self, warm: &mut Warm) -> Result<Found, Found> {
        let params = json!({
            "protocolVersion": OLD, "capabilities": {},
            "clientInfo": { "name": "rollcall", "version": env!("CARGO_PKG_VERSION") },
        });
        // Never asked a second time because a kept connection broke: the first one may have opened a session.
        warm.clear();
        let answer = self.ask(warm, 2, "initialize", params, Vec::new()).await?;
        let reply = answer.reply.as_ref().unwrap_or(&Value::Null);
        let version = reply["result"]["protocolVersion"].as_str().unwrap_or(OLD);
        let session = self.session(&answer, version);
        let alive = match result_of(&answer, "initialize") {
            Found::Good if WITH_PING.contains(&version) => {
                let headers =
                    session.as_ref().map_or_else(|| headers_of(version), |open| open.headers.clone());
                self.ping(warm, headers).await
            }
            Found::Bad(cause, _) if cause != Cause::Auth && refuses_our_version(reply) => Ok(Found::Good),
            found => Ok(found),
        };
        if let Some(session) = session {
            session.end(warm).await;
        }
        alive
    }

    async fn ping(self, warm: &mut Warm, headers: Headers) -> Result<Found, Found> {
        let ready = json!({ "jsonrpc": "2.0", "method": "notifications/initialized" });
        let ready = post(self.url, &ready, headers.clone(), Want::Status);
        self.prober.exchange(self.target, warm, ready).await?;
        let answer = self.ask(warm, 3, "ping", json!({}), headers).await?;
        Ok(result_of(&answer, "ping"))
    }

    async fn ask(
        self,
        warm: &mut Warm,
        id: u32,
        method: &str,
        params: Value,
        headers: Headers,
    ) -> Result<Answer, Found> {
        let body = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        self.prober.exchange(self.target, warm, post(self.url, &body, headers, Want::Reply(id))).await
    }

    /// The session that this answer has opened, if it has.
    fn session(self, answer: &Answer, version: &str) -> Option<Session<'a>> {
        let mut headers = headers_of(version);
        headers.push((SESSION_HEADER, answer.headers.get(&SESSION_HEADER)?.clone()));
        Some(Session { server: self, headers, open: true })
    }
}

/// A session that is open on the other side until it is ended.
struct Session<'a> {
    server: Server<'a>,
    headers: Headers,
    open: bool,
}

impl Session<'_> {
    fn ending(&self) -> Ask {
        let (url, headers) = (self.server.url.clone(), self.headers.clone());
        Ask { method: Method::DELETE, url, headers, body: Bytes::new(), want: Want::Status }
    }

    /// Ends it. A server that does not let clients end their sessions answers 405, and that is its affair.
    async fn end(mut self, warm: &mut Warm) {
        let Server { prober, target, .. } = self.server;
        let ending = prober.exchange(target, warm, self.ending());
        self.open = !matches!(tokio::time::timeout(prober.timeout / ENDING_SHARE, ending).await, Ok(Ok(_)));
    }
}

impl Drop for Session<'_> {
    /// The probe ran out of time, or could not end it: it is ended beside the probes, over a connection of its own.
    fn drop(&mut self) {
        let Server { prober, target, .. } = self.server;
        let permit = prober.endings.clone().try_acquire_owned();
        let runtime = tokio::runtime::Handle::try_current();
        let (true, Ok(permit), Ok(runtime)) = (self.open, permit, runtime) else { return };
        let (prober, target, ending) = (prober.clone(), target.clone(), self.ending());
        runtime.spawn(async move {
            let mut warm = Warm::default();
            // Once: who does not end it now lets it expire.
            let _ = tokio::time::timeout(prober.timeout, prober.exchange(&target, &mut warm, ending)).await;
            drop(permit);
        });
    }
}

/// It knows none of the versions that we named, and says which ones it knows (2026-07-28 and later).
fn names_its_versions(reply: &Value) -> bool {
    reply["error"]["data"]["supported"].is_array()
}

/// As [`names_its_versions`]; earlier versions leave it to the server how to say so.
fn refuses_our_version(reply: &Value) -> bool {
    let words = reply["error"]["message"].as_str().unwrap_or_default().to_ascii_lowercase();
    names_its_versions(reply) || words.contains("protocol version")
}

fn result_of(answer: &Answer, method: &str) -> Found {
    match (answer.judge(), &answer.reply) {
        (Found::Good, Some(reply)) if reply["result"].is_object() => Found::Good,
        (Found::Good, Some(_)) => {
            Found::bad(Cause::Protocol, format!("its answer to {method} has no result"))
        }
        (Found::Good, None) => {
            Found::bad(Cause::Protocol, format!("its answer to {method} is no answer of JSON-RPC"))
        }
        (found, _) => found,
    }
}

fn headers_of(version: &str) -> Headers {
    HeaderValue::from_str(version).map(|value| (VERSION_HEADER, value)).into_iter().collect()
}

fn post(url: &Url, body: &Value, mut headers: Headers, want: Want) -> Ask {
    headers.push((CONTENT_TYPE, HeaderValue::from_static("application/json")));
    headers.push((ACCEPT, HeaderValue::from_static("application/json, text/event-stream")));
    let body = Bytes::from(body.to_string());
    Ask { method: Method::POST, url: url.clone(), headers, body, want }
}
