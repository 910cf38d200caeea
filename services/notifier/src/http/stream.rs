//! What SSE and WebSocket have in common: who is let in, and from where.

use std::sync::Arc;

use rollcall_core::wire::{ApiError, ErrorCode};

use super::{error::Failure, params::Params};
use crate::{shared::Shared, subscriber::Subscription};

/// When a subscriber that found no place may try again.
const FULL_RETRY_MS: u64 = 5_000;

/// A subscription for a request: after `resume`, or `after=`, or from now on.
pub(super) async fn subscribe(
    shared: &Arc<Shared>,
    kind: &'static str,
    params: &Params,
    resume: Option<u64>,
) -> Result<Subscription, Failure> {
    let filter = params.filter()?;
    let after = params.after()?;
    let Some(place) = shared.subscriber(kind) else {
        let error = ApiError::retry_after(ErrorCode::Unavailable, "too many subscribers", FULL_RETRY_MS);
        return Err(error.into());
    };
    let after = match resume.or(after) {
        Some(after) => within_log(shared, after).await?,
        // Everything after what has been read is new to a subscriber, also what waits in the log.
        None if shared.is_ready() => shared.feed.head(),
        None => shared.log.last_seq().await?,
    };
    Ok(Subscription::new(place, filter, after))
}

/// A place beyond the log's end would wait in silence for events that are other than the ones meant.
pub(super) async fn within_log(shared: &Shared, after: u64) -> Result<u64, Failure> {
    if after <= shared.feed.head() {
        return Ok(after);
    }
    let last = shared.log.last_seq().await?;
    if after <= last {
        return Ok(after);
    }
    let message = format!("the log ends at {last}, before {after}: it was replaced, start anew");
    Err(ApiError::bad_request(message).into())
}
