//! The heartbeat: a task of its own, which waits for nothing but time.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_core::wire::{AgentState, Goodbye, GoodbyeReason, HeartbeatReply, InFlight};
use rollcall_nats::RequestError;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{Worker, shell::Shell, shutdown::Trigger};

/// How long a heartbeat that was sent as a request waits for its reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the last heartbeat may take (PROTOCOL.md 2, Shutdown, step 5).
pub(crate) const GONE_TIMEOUT: Duration = Duration::from_secs(15);
/// Pause before the last heartbeat is said again: over a lost connection, or to one who could not take it.
const GONE_RETRY: Duration = Duration::from_millis(250);
/// Deadline of the goodbye that a bare `superseded` status stands for, in milliseconds: nothing to wait for.
const SUPERSEDED_DEADLINE_MS: u64 = 0;

/// Beats until `shell.over`. Most heartbeats are published; the first, the first after a reconnect, and all while draining
/// are requests, so that a goodbye is heard even where no request reaches this agent.
pub(crate) async fn beat<W: Worker>(shell: Arc<Shell<W>>, every: Duration, stop: CancellationToken) {
    // At most one request waits for its reply; a newer one takes its place. Dropped (and ended) with this task.
    let mut asking = JoinSet::new();
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut link = shell.bus.link();
    let mut as_request = true;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
            () = shell.beat_now.notified() => as_request = true,
            changed = link.changed() => {
                if changed.is_err() {
                    return;
                }
                if !link.borrow_and_update().connected {
                    continue;
                }
                as_request = true;
            }
        }
        as_request |= shell.lock().book.state() == AgentState::Draining;
        let bytes = shell.heartbeat(None);
        if as_request {
            let shell = Arc::clone(&shell);
            asking.abort_all();
            while asking.try_join_next().is_some() {}
            asking.spawn(async move { ask(&shell, bytes).await });
        } else if let Err(error) = shell.bus.publish(shell.subjects.heartbeat(&shell.profile.id), bytes).await
        {
            tracing::debug!(%error, "heartbeat not sent");
        }
        as_request = false;
    }
}

async fn ask<W>(shell: &Shell<W>, bytes: Bytes) {
    match shell.bus.request(shell.subjects.heartbeat(&shell.profile.id), bytes, REPLY_TIMEOUT).await {
        Ok(reply) => hear(shell, &reply.payload),
        // Nobody has to listen: the fleet may come up after its agents.
        Err(error) => tracing::debug!(%error, "no reply to a heartbeat"),
    }
}

fn hear<W>(shell: &Shell<W>, payload: &[u8]) {
    match serde_json::from_slice::<HeartbeatReply>(payload) {
        Ok(reply) => {
            if let Some(goodbye) = goodbye_in(&reply) {
                shell.control.trigger(&Trigger::Goodbye(goodbye));
            }
        }
        Err(error) => tracing::warn!(%error, "the reply to a heartbeat can't be read"),
    }
}

/// The goodbye that a reply holds. An instance that no longer counts has to go even if the reply holds none.
fn goodbye_in(reply: &HeartbeatReply) -> Option<Goodbye> {
    let superseded = || Goodbye {
        reason: GoodbyeReason::Superseded,
        deadline_ms: SUPERSEDED_DEADLINE_MS,
        in_flight: InFlight::Return,
    };
    reply.goodbye.clone().or_else(|| (reply.status == "superseded").then(superseded))
}

/// The last heartbeat: `gone`, as a request, at most [`GONE_TIMEOUT`]. Whatever becomes of it, the agent goes. It is heard
/// when it is answered with a status; one that is refused, or that nobody was ready for, is said again.
pub(crate) async fn say_gone<W>(shell: &Shell<W>) {
    let subject = shell.subjects.heartbeat(&shell.profile.id);
    let attempt = async {
        loop {
            let bytes = shell.heartbeat(Some(AgentState::Gone));
            match shell.bus.request(subject.clone(), bytes, REPLY_TIMEOUT).await {
                Ok(reply) if is_heard(&reply.payload) => return Ok(()),
                Ok(_) => tracing::debug!("the last heartbeat was refused"),
                Err(RequestError::Disconnected | RequestError::Timeout) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(GONE_RETRY).await;
        }
    };
    match tokio::time::timeout(GONE_TIMEOUT, attempt).await {
        Ok(Ok(())) => tracing::info!("gone, and heard"),
        Ok(Err(error)) => tracing::warn!(%error, "gone, and nobody answered"),
        Err(_) => tracing::warn!("gone, and nobody could be told within {GONE_TIMEOUT:?}"),
    }
}

fn is_heard(payload: &[u8]) -> bool {
    serde_json::from_slice::<HeartbeatReply>(payload).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rollcall_core::time::Timestamp;

    fn reply(status: &str, goodbye: Option<Goodbye>) -> HeartbeatReply {
        HeartbeatReply {
            status: status.into(),
            interval_ms: 5000,
            server_time: Timestamp::from_millis(0),
            goodbye,
        }
    }

    #[test]
    fn a_goodbye_in_a_reply_is_heard_and_superseded_is_one() {
        assert_eq!(goodbye_in(&reply("connected", None)), None);
        let told = Goodbye { reason: GoodbyeReason::Restart, deadline_ms: 7, in_flight: InFlight::Finish };
        assert_eq!(goodbye_in(&reply("connected", Some(told.clone()))), Some(told));
        assert_eq!(goodbye_in(&reply("superseded", None)).unwrap().reason, GoodbyeReason::Superseded);
    }
}
