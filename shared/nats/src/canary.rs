//! The proof that a subscriber hears: a message of our own through the bus, and everything before it read.

use std::time::Duration;

use crate::bus::Bus;

/// How long a message of our own may take through the bus.
pub const CANARY_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between two canaries of a service that hears.
pub const CANARY_INTERVAL: Duration = Duration::from_secs(5);
/// Time between two tries of one that does not.
pub const BLIND_INTERVAL: Duration = Duration::from_millis(100);

/// Sends a message to ourselves and waits until it is back. False: not within [`CANARY_TIMEOUT`].
///
/// It comes over the same connection as everything that this process subscribes to, so whatever the server had for us
/// before it is in its subscription's buffer by now. The proof is complete once that buffer was read to its end.
pub async fn comes_back(bus: &Bus) -> bool {
    tokio::time::timeout(CANARY_TIMEOUT, bus.flush()).await.is_ok_and(|flushed| flushed.is_ok())
}
