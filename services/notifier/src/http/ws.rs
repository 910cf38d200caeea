//! `GET /ws`: events over WebSocket, subprotocol `rollcall.v1.json`.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{
        State, WebSocketUpgrade,
        ws::{
            CloseCode, CloseFrame, Message, Utf8Bytes, WebSocket, close_code,
            rejection::WebSocketUpgradeRejection,
        },
    },
    http::{HeaderMap, Uri, header},
    response::Response,
};
use futures_util::SinkExt;
use rollcall_core::wire::ApiError;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::{error::Failure, params::Params, stream::subscribe};
use crate::{
    shared::Shared,
    subscriber::{Ended, Subscription},
};

/// The subprotocol (PROTOCOL.md 7).
const SUBPROTOCOL: &str = "rollcall.v1.json";
/// A ping goes out this often (PROTOCOL.md 7).
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Pings without any sign of life after which the peer is taken for away.
const PINGS_UNANSWERED_MAX: u32 = 3;
/// How long the peer gets to answer a close.
const CLOSE_WAIT: Duration = Duration::from_secs(2);
/// Largest message a subscriber may send: it has nothing to say.
const INCOMING_MAX: usize = 4 * 1024;
/// Read buffer of an idle connection.
const READ_BUFFER: usize = 1024;
/// Bytes collected before they are written to the socket; kept allocated by the connection.
const WRITE_BUFFER: usize = 8 * 1024;

/// `GET /ws`
#[utoipa::path(
    get, path = "/ws", tag = "streams",
    summary = "Events as they happen, over WebSocket",
    description = "Subprotocol `rollcall.v1.json`; each text frame is `{\"seq\": n, \"event\": {...}}` with the \
        CloudEvent byte for byte. Close codes: 1001 the server ends, 1008 not allowed, 1013 too slow; \
        the reason of 1001 and 1013 ends with the sequence to resume after.",
    params(super::openapi::StreamParams),
    responses(
        (status = 101, description = "Switching to WebSocket"),
        (status = 400, description = "A parameter is wrong, or no WebSocket is asked for", body = super::openapi::ErrorAnswer),
        (status = 503, description = "Too many subscribers, or the log does not answer", body = super::openapi::ErrorAnswer),
    )
)]
pub(super) async fn upgrade(
    State(shared): State<Arc<Shared>>,
    params: Params,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Failure> {
    let upgrade = upgrade.map_err(|rejection| {
        Failure::with_status(rejection.status(), ApiError::bad_request(rejection.body_text()))
    })?;
    let mut upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_message_size(INCOMING_MAX)
        .max_frame_size(INCOMING_MAX);
    let other = upgrade.requested_protocols().find(|protocol| !protocol.is_empty()).cloned();
    let other = other.filter(|_| upgrade.selected_protocol().is_none());
    let refusal = if let Some(other) = other {
        // Most clients break off when none of theirs is named, and would never see the reason.
        upgrade.set_selected_protocol(other);
        Some("this speaks rollcall.v1.json")
    } else if is_cross_site(&headers) {
        Some("pages of other sites are not let in")
    } else {
        None
    };
    let tasks = shared.tasks.clone();
    if let Some(reason) = refusal {
        return Ok(upgrade.on_upgrade(move |socket| tasks.track_future(refuse(socket, reason))));
    }
    let subscription = subscribe(&shared, "ws", &params, None).await?;
    Ok(upgrade.on_upgrade(move |socket| {
        tasks.track_future(async move { Session { socket, subscription, shared }.run().await })
    }))
}

/// Browsers name the page that asks; programs don't. A page may only ask the host that it came from.
fn is_cross_site(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let origin = origin.to_str().ok().and_then(|text| text.parse::<Uri>().ok());
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    match (origin.as_ref().and_then(|origin| origin.authority()), host) {
        (Some(origin), Some(host)) => !origin.as_str().eq_ignore_ascii_case(host),
        _ => true,
    }
}

async fn refuse(mut socket: WebSocket, reason: &'static str) {
    close(&mut socket, close_code::POLICY, reason.to_owned()).await;
}

/// Says why, and waits a moment for the peer to have read it.
async fn close(socket: &mut WebSocket, code: CloseCode, reason: String) {
    let frame = CloseFrame { code, reason: reason.into() };
    if socket.send(Message::Close(Some(frame))).await.is_ok() {
        let answered = async { while let Some(Ok(_)) = socket.recv().await {} };
        let _ = tokio::time::timeout(CLOSE_WAIT, answered).await;
    }
}

struct Session {
    socket: WebSocket,
    subscription: Subscription,
    shared: Arc<Shared>,
}

/// How a session goes on.
enum Turn {
    Send(Vec<Utf8Bytes>),
    Ping,
    Heard,
    PeerLeft,
    End(CloseCode, &'static str),
}

impl Session {
    async fn run(mut self) {
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unanswered = 0;
        loop {
            let mut batch = Vec::new();
            let turn = tokio::select! {
                biased;
                () = self.shared.shutdown.cancelled() => Turn::End(close_code::AWAY, "shutting down"),
                _ = pings.tick() => Turn::Ping,
                heard = self.socket.recv() => match heard {
                    Some(Ok(Message::Close(_)) | Err(_)) | None => Turn::PeerLeft,
                    Some(Ok(_)) => Turn::Heard,
                },
                next = self.subscription.next(|frame| batch.push(frame.ws().clone())) => match next {
                    Ok(()) => Turn::Send(batch),
                    Err(Ended::Slow) => Turn::End(close_code::AGAIN, "too slow"),
                    Err(Ended::LogUnreadable(reason)) => {
                        tracing::warn!(%reason, "old events can't be sent");
                        Turn::End(close_code::AGAIN, "the log can't be read")
                    }
                },
            };
            let going = match turn {
                Turn::Send(batch) => self.send(batch).await.is_ok(),
                Turn::Ping if unanswered == PINGS_UNANSWERED_MAX => false,
                Turn::Ping => {
                    unanswered += 1;
                    self.socket.send(Message::Ping(bytes::Bytes::new())).await.is_ok()
                }
                Turn::Heard => {
                    unanswered = 0;
                    true
                }
                Turn::PeerLeft => false,
                Turn::End(code, why) => {
                    let reason = format!("{why}, resume after {}", self.subscription.cursor());
                    close(&mut self.socket, code, reason).await;
                    false
                }
            };
            if !going {
                return;
            }
        }
    }

    /// Feeds all, then flushes once.
    async fn send(&mut self, batch: Vec<Utf8Bytes>) -> Result<(), axum::Error> {
        for text in batch {
            self.socket.feed(Message::Text(text)).await?;
        }
        self.socket.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_page_of_the_same_host_is_let_in() {
        let asked = |origin: Option<&'static str>, host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            is_cross_site(&headers)
        };
        assert!(!asked(None, "127.0.0.1:8080"));
        assert!(!asked(Some("http://127.0.0.1:8080"), "127.0.0.1:8080"));
        assert!(!asked(Some("https://Fleet.example"), "fleet.example"));
        for origin in ["http://evil.example", "null", "http://127.0.0.1:8081", "http://127.0.0.1", "file://"]
        {
            assert!(asked(Some(origin), "127.0.0.1:8080"), "{origin}");
        }
    }
}
