//! Work that agents lost, from the execution events: what an agent is quarantined for.

use rollcall_core::Timestamp;
use rollcall_core::event::{Event, EventBody, ExecutionEvent};
use rollcall_core::subject::Subjects;
use rollcall_nats::{EventLog, TailError};
use serde::Deserialize as _;
use tokio::sync::mpsc;

use crate::shell::Input;
use crate::state::Loss;

/// Execution and agent events that are looked back at from the end of the log at start: losses count for ten minutes
/// only, and reading years of executions for them would keep the start waiting.
const LOOK_BACK: u64 = 50_000;
/// Events read at once.
const BATCH: usize = 1000;
/// The type of the only event that is parsed. Anything else is passed over by its bytes.
const RECOVERED: &[u8] = b"rollcall.execution.recovered";
/// How far into an event its type is searched: id, source and subject come before it.
const TYPE_WITHIN: usize = 600;

/// Follows the executions' events for as long as the loop takes what is found.
pub(crate) async fn follow(
    log: EventLog,
    subjects: Subjects,
    inputs: mpsc::Sender<Input>,
) -> Result<(), TailError> {
    let last = loop {
        match log.last_seq().await {
            Ok(last) => break last,
            Err(error) => {
                tracing::warn!(%error, "can't look for lost executions yet");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    };
    let all = subjects.all_execution_events();
    let mut tail = log.tail(last.saturating_sub(LOOK_BACK), [all.as_str()]);
    loop {
        for entry in tail.next_batch(BATCH).await?.entries {
            let Some(loss) = loss(&entry.bytes) else { continue };
            if inputs.send(Input::Lost(loss)).await.is_err() {
                return Ok(());
            }
        }
    }
}

fn loss(bytes: &[u8]) -> Option<Loss> {
    let head = &bytes[..bytes.len().min(TYPE_WITHIN)];
    if !head.windows(RECOVERED.len()).any(|window| window == RECOVERED) {
        return None;
    }
    let event = Event::decode(bytes).ok()?;
    match event.body {
        EventBody::Execution(ExecutionEvent::Recovered(recovered)) => Some(Loss {
            // It tells one silence of an instance from another.
            silent_since: Timestamp::deserialize(&recovered.evidence["agent"]["silent_since"]).ok(),
            agent_id: recovered.agent_id,
            instance_id: recovered.instance_id,
            reason: recovered.reason,
            returned: recovered.returned,
            time: event.time,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rollcall_core::event::RecoveryReason;

    use super::*;

    #[test]
    fn only_recoveries_are_losses() {
        let event = |kind: &str, more: &str| {
            format!(
                r#"{{"specversion":"1.0","id":"0199b2c4-0000-7000-8000-000000000000","source":"/rollcall/w/1","type":"rollcall.execution.{kind}","subject":"e","time":"2026-11-22T03:04:05.678Z","datacontenttype":"application/json","data":{{"execution_id":"e","attempt":1,"agent_id":"a","instance_id":"i"{more}}}}}"#
            )
        };
        let recovered = r#","reason":"orphaned","action":"failed","next_attempt":null,"terminate":"not_attempted","detected_after_ms":1,"evidence":{"agent":{"silent_since":"2026-11-22T03:03:05.678Z"}},"message":"m""#;
        let found = loss(event("recovered", recovered).as_bytes()).unwrap();
        assert_eq!((found.agent_id.as_str(), found.instance_id.as_str()), ("a", "i"));
        assert_eq!(found.reason, RecoveryReason::Orphaned);
        assert_eq!(found.silent_since, Timestamp::parse("2026-11-22T03:03:05.678Z").ok());
        let vague = recovered.replace("agent", "somebody");
        assert_eq!(loss(event("recovered", &vague).as_bytes()).unwrap().silent_since, None);
        assert!(loss(event("started", "").as_bytes()).is_none());
        assert!(loss(b"").is_none());
    }
}
