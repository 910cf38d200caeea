//! Getting connected: options, addresses, what is waited for and what is not.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{BusOptions, SUBSCRIPTION_CAPACITY};
use crate::inbox::is_inbox;
use crate::link::Signals;
use crate::names::PrefixError;
use crate::version::UnsupportedServer;

/// How long one try to connect may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// First pause between tries to connect; it doubles up to [`RECONNECT_MAX_DELAY`].
pub const RECONNECT_MIN_DELAY: Duration = Duration::from_millis(50);
/// Longest pause between tries to connect.
pub const RECONNECT_MAX_DELAY: Duration = Duration::from_secs(2);
/// Time between two log lines about a server that is not there.
const WAIT_LOG_INTERVAL: Duration = Duration::from_secs(5);
/// How often an idle connection is asked for a sign of life; the third question without an answer ends it. Short,
/// because a connection that is dead but looks alive makes every agent look silent.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Why there is no bus. A server that is away or refuses the credentials is waited for and is not among these.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The prefix is not allowed.
    #[error(transparent)]
    Prefix(#[from] PrefixError),
    /// The inbox prefix is one that services would not answer.
    #[error("inbox prefix {0:?} is not _INBOX or _INBOX_<name>")]
    InboxPrefix(String),
    /// The URL can't be read.
    #[error("nats url {url:?} can't be used: {reason}")]
    Url {
        /// The URL, without user and password.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The credentials file can't be read.
    #[error("nats credentials file {path:?} can't be used")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The server is too old.
    #[error(transparent)]
    Unsupported(#[from] UnsupportedServer),
    /// Cancelled while waiting for a server.
    #[error("cancelled while waiting for nats")]
    Cancelled,
}

/// Tries until there is a connection.
pub(super) async fn wait_for_server(
    options: &BusOptions,
    signals: &Arc<Signals>,
    cancel: &CancellationToken,
) -> Result<Client, ConnectError> {
    check_inbox_prefix(options.inbox_prefix.as_deref())?;
    let servers = parse_servers(&options.url)?;
    let mut delay = RECONNECT_MIN_DELAY;
    let mut logged: Option<Instant> = None;
    loop {
        let try_once = client_options(options, signals).await?.connect(servers.clone());
        let tried = tokio::select! {
            () = cancel.cancelled() => return Err(ConnectError::Cancelled),
            tried = try_once => tried,
        };
        match tried {
            Ok(client) => return Ok(client),
            Err(error) if logged.is_none_or(|at| at.elapsed() >= WAIT_LOG_INTERVAL) => {
                logged = Some(Instant::now());
                log_waiting(options, &error);
            }
            Err(_) => {}
        }
        tokio::select! {
            () = cancel.cancelled() => return Err(ConnectError::Cancelled),
            () = tokio::time::sleep(delay) => {}
        }
        delay = (delay * 2).min(RECONNECT_MAX_DELAY);
    }
}

fn check_inbox_prefix(prefix: Option<&str>) -> Result<(), ConnectError> {
    match prefix {
        Some(prefix) if !is_inbox(&format!("{prefix}.x")) => {
            Err(ConnectError::InboxPrefix(prefix.to_owned()))
        }
        _ => Ok(()),
    }
}

async fn client_options(
    options: &BusOptions,
    signals: &Arc<Signals>,
) -> Result<ConnectOptions, ConnectError> {
    let mut connect = match (&options.creds, &options.user) {
        (Some(path), _) => ConnectOptions::with_credentials_file(path)
            .await
            .map_err(|source| ConnectError::Credentials { path: path.clone(), source })?,
        (None, Some(user)) => {
            ConnectOptions::with_user_and_password(user.clone(), options.password.clone().unwrap_or_default())
        }
        (None, None) => ConnectOptions::new(),
    };
    if let Some(prefix) = &options.inbox_prefix {
        connect = connect.custom_inbox_prefix(prefix);
    }
    let signals = Arc::clone(signals);
    Ok(connect
        .name(&options.connection_name)
        .connection_timeout(CONNECT_TIMEOUT)
        .ping_interval(PING_INTERVAL)
        .request_timeout(None)
        .subscription_capacity(options.subscription_capacity.unwrap_or(SUBSCRIPTION_CAPACITY))
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .event_callback(move |event| {
            signals.on_event(&event);
            std::future::ready(())
        }))
}

fn reconnect_delay(attempt: usize) -> Duration {
    // The first try is at once: most cuts are a server that restarted in place.
    let Some(doublings) = attempt.checked_sub(2) else { return Duration::ZERO };
    let factor = 1u32 << doublings.min(16);
    RECONNECT_MIN_DELAY.saturating_mul(factor).min(RECONNECT_MAX_DELAY)
}

fn parse_servers(url: &str) -> Result<Vec<ServerAddr>, ConnectError> {
    let fail = |reason: String| ConnectError::Url { url: without_userinfo(url), reason };
    let servers = url
        .split(',')
        .map(str::trim)
        .filter(|one| !one.is_empty())
        .map(|one| ServerAddr::from_str(one).map_err(|error| fail(error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    if servers.is_empty() {
        return Err(fail("it names no server".to_owned()));
    }
    if let Some(bad) = servers.iter().find(|server| server.is_websocket() || server.host().is_empty()) {
        return Err(fail(format!(
            "{} is not nats://host:port or tls://host:port",
            without_userinfo(bad.as_url_str())
        )));
    }
    Ok(servers)
}

/// Whether a server URL (or several, separated by commas) can be used at all; connects to nothing.
///
/// # Errors
/// [`ConnectError::Url`] with the reason.
pub fn check_url(url: &str) -> Result<(), ConnectError> {
    parse_servers(url).map(drop)
}

/// The URL as it may be logged.
pub(super) fn without_userinfo(url: &str) -> String {
    url.split(',')
        .map(|one| match one.rsplit_once('@') {
            Some((before, host)) => {
                let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
                if scheme.is_empty() { host.to_owned() } else { format!("{scheme}://{host}") }
            }
            None => one.to_owned(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

fn log_waiting(options: &BusOptions, error: &async_nats::ConnectError) {
    let server = without_userinfo(&options.url);
    match error.kind() {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            tracing::error!(%server, user = options.user.as_deref(), creds = ?options.creds, %error,
                "nats refuses our credentials, trying again");
        }
        _ => tracing::warn!(%server, %error, "waiting for nats"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_printed() {
        let options = BusOptions {
            url: "nats://joe:s3cret@h:4222,h2:4222".into(),
            password: Some("s3cret".into()),
            ..BusOptions::default()
        };
        let shown = format!("{options:?}");
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(shown.contains("nats://h:4222,h2:4222"), "{shown}");
    }

    #[test]
    fn urls_that_can_not_work_are_named() {
        for bad in ["", " , ", "http://x", "ws://x", "nats://", "nats://a:b:c"] {
            assert!(matches!(parse_servers(bad), Err(ConnectError::Url { .. })), "{bad:?}");
        }
        assert_eq!(parse_servers("nats://a:1, b:2").unwrap().len(), 2);
    }

    #[test]
    fn delays_are_bounded() {
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        assert_eq!(reconnect_delay(2), RECONNECT_MIN_DELAY);
        assert_eq!(reconnect_delay(usize::MAX), RECONNECT_MAX_DELAY);
    }
}
