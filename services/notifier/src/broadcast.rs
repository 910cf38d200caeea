//! The broadcast subjects: recoveries, health and alarms, for whoever listens on the bus.
//!
//! | event | subject |
//! |---|---|
//! | `execution.recovered` | `<prefix>.recovery.<reason>.<agent>` |
//! | `agent.connected` `degraded` `disconnected` `error` `draining` `gone` | `<prefix>.health.<status>.<agent>` |
//! | `agent.flapping` `settled` `quarantined` `released` | `<prefix>.health.<mark>.<agent>`: alarms of the same listener |
//! | `system.*` | `<prefix>.system.<name>` |
//!
//! Everything else (an agent's profile, the superseded instance, the ordinary life of an execution) is on SSE and
//! WebSocket only. Replicas share one durable consumer, so each event is published by one of them, at least once,
//! with the same event id. A consumer that is new starts with what is appended from the notifier's start on: old
//! alarms are no news. From then on the server remembers how far it came.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use rollcall_core::{
    event::{AgentEvent, CONTENT_TYPE, Event, EventBody, ExecutionEvent},
    subject::Subjects,
};
use rollcall_nats::{
    Bus, Delivery, HeaderMap, PublishError, WorkConsumer, WorkError, WorkOptions, work::StartAt,
};
use rollcall_service::LoopBeat;
use tokio_util::sync::CancellationToken;

use crate::entry::read_entry;

/// The durable consumer that all replicas share.
pub const DURABLE: &str = "notifier-broadcast";
/// Header with the event's sequence in the log: where an SSE subscriber would resume.
pub const SEQUENCE_HEADER: &str = "Rollcall-Sequence";
/// Events published before they are confirmed together.
const BATCH_MAX: usize = 128;
/// Not published within this time: another replica gets it.
const ACK_WAIT: Duration = Duration::from_secs(10);
/// Pause after a failure to publish, before work is taken again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// The loop shows life this often while nothing happens.
const BEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Where an event is broadcast, if it is.
#[must_use]
pub fn subject_of(subjects: &Subjects, event: &Event) -> Option<String> {
    match &event.body {
        EventBody::Execution(ExecutionEvent::Recovered(recovered)) => {
            Some(subjects.recovery_broadcast(recovered.reason.as_str(), recovered.agent_id.as_str()))
        }
        EventBody::Execution(_) => None,
        EventBody::Agent(body) => match body {
            AgentEvent::Registered(_) | AgentEvent::Updated(_) | AgentEvent::Superseded(_) => None,
            AgentEvent::Connected(_)
            | AgentEvent::Degraded(_)
            | AgentEvent::Disconnected(_)
            | AgentEvent::Error(_)
            | AgentEvent::Draining(_)
            | AgentEvent::Gone(_)
            | AgentEvent::Flapping(_)
            | AgentEvent::Settled(_)
            | AgentEvent::Quarantined(_)
            | AgentEvent::Released(_) => {
                let name = body.short_type().strip_prefix("agent.")?;
                Some(subjects.health_broadcast(name, body.agent_id()))
            }
        },
        EventBody::System(body) => Some(subjects.system_broadcast(body.kind.as_str())),
    }
}

/// Broadcasts until shutdown. `start_after` is where a consumer that does not exist yet begins.
pub async fn broadcast(
    bus: &Bus,
    subjects: &Subjects,
    start_after: u64,
    beat: &LoopBeat,
    shutdown: &CancellationToken,
) -> Result<(), WorkError> {
    let options = WorkOptions {
        filters: vec![subjects.all_events()],
        ack_wait: ACK_WAIT,
        max_ack_pending: 4 * BATCH_MAX,
        prefetch: BATCH_MAX,
        start: StartAt::After(start_after),
    };
    let mut consumer = WorkConsumer::new(bus, subjects.events_stream(), DURABLE, options);
    loop {
        beat.beat();
        let first = tokio::select! {
            () = shutdown.cancelled() => break,
            () = tokio::time::sleep(BEAT_INTERVAL) => continue,
            first = consumer.next() => first?,
        };
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX {
            match consumer.next().now_or_never() {
                Some(next) => batch.push(next?),
                None => break,
            }
        }
        if let Err(error) = pass_on(bus, subjects, batch).await {
            // What was not acknowledged is given back when it is dropped, and comes again.
            tracing::warn!(%error, "broadcast held up");
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }
    consumer.stop().await;
    Ok(())
}

async fn pass_on(bus: &Bus, subjects: &Subjects, batch: Vec<Delivery>) -> Result<(), PublishError> {
    let epoch = bus.link().borrow().epoch;
    let mut published = 0;
    for delivery in &batch {
        published += u64::from(publish(bus, subjects, delivery).await?);
    }
    if published > 0 {
        // An acknowledgement could overtake an event that was lost with its connection: the server must have
        // processed the events, on the connection they were sent on, before anything is acknowledged.
        bus.flush().await?;
        if bus.link().borrow().epoch != epoch {
            return Err(PublishError::Disconnected);
        }
    }
    for delivery in batch {
        if let Err(error) = delivery.ack().await {
            tracing::debug!(%error, "broadcast not acknowledged, it will be repeated");
        }
    }
    metrics::counter!("rollcall_notifier_broadcasts_total").increment(published);
    Ok(())
}

/// True if there was something to publish.
async fn publish(bus: &Bus, subjects: &Subjects, delivery: &Delivery) -> Result<bool, PublishError> {
    // Invalid entries are counted and logged where the log is followed.
    let Ok(event) = read_entry(subjects, delivery.subject(), delivery.payload()) else { return Ok(false) };
    let Some(subject) = subject_of(subjects, &event) else { return Ok(false) };
    let mut headers = HeaderMap::new();
    headers.insert("Content-Type", CONTENT_TYPE);
    headers.insert(SEQUENCE_HEADER, delivery.seq().to_string());
    match bus.publish_with_headers(subject, headers, delivery.payload().clone()).await {
        Ok(()) => Ok(true),
        Err(PublishError::Disconnected) => Err(PublishError::Disconnected),
        Err(error) => {
            // No later try can do better; the event stays in the log and on SSE.
            metrics::counter!("rollcall_notifier_broadcasts_failed_total").increment(1);
            tracing::error!(seq = delivery.seq(), %error, "event can't be broadcast");
            Ok(false)
        }
    }
}

/// The future of [`broadcast`] with its own handles, to be spawned.
pub async fn run(
    shared: Arc<crate::shared::Shared>,
    start_after: u64,
    beat: LoopBeat,
) -> Result<(), WorkError> {
    let bus = shared.log.bus().clone();
    broadcast(&bus, &shared.subjects, start_after, &beat, &shared.shutdown).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{self, FLEET};
    use rollcall_core::agent::Status;

    #[test]
    fn each_event_goes_where_the_contract_says_or_nowhere() {
        let to = |event: &Event| subject_of(&FLEET, event);
        assert_eq!(to(&samples::recovered("e1", "a1", 1)).as_deref(), Some("rollcall.recovery.orphaned.a1"));
        assert_eq!(
            to(&samples::status("a1", Status::Error, None)).as_deref(),
            Some("rollcall.health.error.a1")
        );
        assert_eq!(
            to(&samples::system("watchdog", serde_json::json!({}))).as_deref(),
            Some("rollcall.system.recovery_suspended")
        );
        assert_eq!(to(&samples::submitted("e1", Some("a1"))), None);
        assert_eq!(to(&samples::registered("a1", "p")), None);
    }
}
