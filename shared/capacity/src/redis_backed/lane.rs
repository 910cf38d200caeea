//! A multiplexed connection that comes back by itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{ErrorKind, RedisError, ServerErrorKind};

/// How long one answer may take. The client's own default of 500 ms is shorter than a pause that a busy host or a
/// snapshot's fork makes, and an answer given up leaves its outcome unknown.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long connecting may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Attempts to connect again while calls wait for it; then they fail, and the next call tries anew.
const RECONNECT_ATTEMPTS: usize = 2;
const RECONNECT_MIN_DELAY: Duration = Duration::from_millis(20);
const RECONNECT_MAX_DELAY: Duration = Duration::from_millis(200);

/// How long a handle waits for Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For an answer. After it, whether the operation took place is unknown.
    pub response: Duration,
    /// For a connection.
    pub connect: Duration,
}

impl Default for Timeouts {
    /// [`RESPONSE_TIMEOUT`] and [`CONNECT_TIMEOUT`].
    fn default() -> Self {
        Self { response: RESPONSE_TIMEOUT, connect: CONNECT_TIMEOUT }
    }
}

/// One connection, cloned for every call. The client library replaces it when it breaks; it is replaced here when it is silent
/// (a peer that vanished without a word) or turned out to be a replica (a failover behind one name).
pub(crate) struct Lane {
    client: redis::Client,
    timeouts: Timeouts,
    current: Mutex<(u64, ConnectionManager)>,
}

impl Lane {
    /// Connects at first use. Must be called inside a tokio runtime.
    pub(crate) fn new(client: redis::Client, timeouts: Timeouts) -> Result<Self, RedisError> {
        let connection = open(&client, timeouts)?;
        Ok(Self { client, timeouts, current: Mutex::new((0, connection)) })
    }

    /// The connection of now, and its number.
    pub(crate) fn get(&self) -> (u64, ConnectionManager) {
        self.lock().clone()
    }

    /// A call on connection `number` failed: replaces it if it is worn out and still the current one.
    pub(crate) fn failed(&self, number: u64, error: &RedisError) {
        let replica = matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly));
        if !(error.is_timeout() || replica) {
            return;
        }
        let mut current = self.lock();
        if current.0 == number
            && let Ok(connection) = open(&self.client, self.timeouts)
        {
            tracing::warn!(%error, "replacing the connection to redis");
            *current = (number + 1, connection);
        }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, ConnectionManager)> {
        // Only ever replaced whole.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(client: &redis::Client, timeouts: Timeouts) -> Result<ConnectionManager, RedisError> {
    let config = ConnectionManagerConfig::new()
        .set_response_timeout(Some(timeouts.response))
        .set_connection_timeout(Some(timeouts.connect))
        .set_number_of_retries(RECONNECT_ATTEMPTS)
        .set_min_delay(RECONNECT_MIN_DELAY)
        .set_max_delay(RECONNECT_MAX_DELAY);
    ConnectionManager::new_lazy_with_config(client.clone(), config)
}
