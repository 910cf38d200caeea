//! Work that agents lost, from the execution events: what an agent is quarantined for.

use rollcall_core::Timestamp;
use rollcall_core::event::{Event, EventBody, ExecutionEvent};
use rollcall_core::subject::Subjects;
use rollcall_nats::{EventLog, TailError};
use serde::Deserialize as _;
use tokio::sync::mpsc;

use crate::shell::Input;
use crate::state::Loss;

/// Events read at once.
const BATCH: usize = 1000;
/// The type of the only event that is parsed. Anything else is passed over by its bytes.
const RECOVERED: &[u8] = b"rollcall.execution.recovered";
/// How far into an event its type is searched: id, source and subject come before it.
const TYPE_WITHIN: usize = 600;

/// Follows the executions' events since then for as long as the loop takes what is found, and says when all that was there
/// has been read. What is older counts for nothing, and reading years of executions would keep that waiting.
pub(crate) async fn follow(
    log: EventLog,
    subjects: Subjects,
    since: Timestamp,
    inputs: mpsc::Sender<Input>,
) -> Result<(), TailError> {
    let all = subjects.all_execution_events();
    let mut tail = log.tail_since(since, [all.as_str()]);
    let mut is_read = false;
    loop {
        let batch = tail.next_batch(BATCH).await?;
        for loss in batch.entries.iter().filter_map(|entry| loss(&entry.bytes)) {
            if inputs.send(Input::Lost(loss)).await.is_err() {
                return Ok(());
            }
        }
        if batch.caught_up && !is_read {
            is_read = true;
            if inputs.send(Input::LossesRead).await.is_err() {
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
    use rollcall_nats::Append;
    use rollcall_nats::testing::NatsServer;

    use super::*;

    const RECOVERY: &str = r#","reason":"orphaned","action":"failed","next_attempt":null,"terminate":"not_attempted","detected_after_ms":1,"evidence":{"agent":{"silent_since":"2026-11-22T03:03:05.678Z"}},"message":"m""#;

    fn event(kind: &str, more: &str) -> String {
        format!(
            r#"{{"specversion":"1.0","id":"0199b2c4-0000-7000-8000-000000000000","source":"/rollcall/w/1","type":"rollcall.execution.{kind}","subject":"e","time":"2026-11-22T03:04:05.678Z","datacontenttype":"application/json","data":{{"execution_id":"e","attempt":1,"agent_id":"a","instance_id":"i"{more}}}}}"#
        )
    }

    /// What is said of everything since then: whether it was a loss, and the agent.
    async fn read(log: &EventLog, since: Timestamp) -> Vec<String> {
        let (sender, mut inputs) = mpsc::channel(8);
        let following = tokio::spawn(follow(log.clone(), Subjects::default(), since, sender));
        let mut said = Vec::new();
        while let Some(input) = inputs.recv().await {
            match input {
                Input::Lost(loss) => said.push(loss.agent_id.as_str().to_owned()),
                Input::LossesRead => break,
                other => panic!("{other:?}"),
            }
        }
        following.abort();
        said
    }

    #[tokio::test]
    async fn what_is_looked_back_at_is_a_time_however_much_happened_in_it() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        rollcall_nats::ensure_streams(&bus).await.unwrap();
        let log = EventLog::new(&bus);
        let lose = async |agent: &str| {
            let body = event("recovered", RECOVERY)
                .replace(r#""agent_id":"a""#, &format!(r#""agent_id":"{agent}""#));
            let subject = format!("rollcall.event.execution.{agent}");
            let appended = log.append(&subject, agent, body.into_bytes().into(), 0).await.unwrap();
            assert!(matches!(appended, Append::Appended { .. }));
            log.last(&subject).await.unwrap().unwrap().time.timestamp_millis()
        };
        let mut before = lose("old").await;
        let mut number = 0;
        let since = loop {
            number += 1;
            let at = lose(&format!("a{number}")).await;
            if at > before {
                break at;
            }
            before = at;
        };
        // As much as a busy fleet makes of it in a minute or two.
        for chunk in 0..13 {
            for _ in 0..4000 {
                bus.publish("rollcall.event.execution.noise", "{}".into()).await.unwrap();
            }
            // Its acknowledgement says that those before it are stored.
            log.append(&format!("rollcall.event.execution.n{chunk}"), "n", "{}".into(), 0).await.unwrap();
        }
        lose("last").await;
        assert!(log.last_seq().await.unwrap() > 50_000);
        assert_eq!(
            read(&log, Timestamp::from_millis(since)).await,
            [format!("a{number}"), "last".to_owned()]
        );
    }

    #[tokio::test]
    async fn it_is_said_when_nothing_was_lost() {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        rollcall_nats::ensure_streams(&bus).await.unwrap();
        assert!(read(&EventLog::new(&bus), Timestamp::default()).await.is_empty());
    }

    #[test]
    fn only_recoveries_are_losses() {
        let found = loss(event("recovered", RECOVERY).as_bytes()).unwrap();
        assert_eq!((found.agent_id.as_str(), found.instance_id.as_str()), ("a", "i"));
        assert_eq!(found.reason, RecoveryReason::Orphaned);
        assert_eq!(found.silent_since, Timestamp::parse("2026-11-22T03:03:05.678Z").ok());
        let vague = RECOVERY.replace("agent", "somebody");
        assert_eq!(loss(event("recovered", &vague).as_bytes()).unwrap().silent_since, None);
        assert!(loss(event("started", "").as_bytes()).is_none());
        assert!(loss(b"").is_none());
    }
}
