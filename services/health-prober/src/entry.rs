//! Entries of the log about agents, checked against their subject.

use rollcall_core::event::{AgentEvent, Event, EventBody};
use rollcall_core::subject::{EventSubject, Subjects};
use rollcall_core::{AgentId, Timestamp};
use rollcall_nats::Entry;

/// An entry as it is folded.
#[derive(Debug)]
pub(crate) enum Read {
    /// An event of this agent, when it was decided, and whether `source` (that is: this process) decided it.
    Event(AgentId, Box<AgentEvent>, Timestamp, bool),
    /// No valid event for this agent's subject, and why. Its sequence counts all the same.
    Invalid(AgentId, String),
    /// Not about an agent.
    Foreign,
}

/// Reads an entry. Who may append is the bus's business; what is no event of its subject is never believed.
pub(crate) fn read(subjects: &Subjects, source: &str, entry: &Entry) -> Read {
    let Some(EventSubject::Agent(id)) = subjects.of_event(&entry.subject) else { return Read::Foreign };
    match Event::decode(&entry.bytes) {
        Ok(event) if event.subject != id.as_str() => {
            Read::Invalid(id, format!("it is about {:?}", shown(&event.subject)))
        }
        Ok(event) => match event.body {
            EventBody::Agent(body) if *body.agent_id() == id => {
                Read::Event(id, Box::new(body), event.time, event.source == source)
            }
            EventBody::Agent(body) => {
                let why = format!("its data is about {:?}", shown(body.agent_id().as_str()));
                Read::Invalid(id, why)
            }
            other => Read::Invalid(id, format!("{} is no event of an agent", other.short_type())),
        },
        Err(error) => Read::Invalid(id, error.to_string()),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SOURCE: &str = "/rollcall/health-prober/1";

    fn entry(log_subject: &str, event: &serde_json::Value) -> Entry {
        Entry {
            seq: 7,
            subject: log_subject.into(),
            bytes: event.to_string().into_bytes().into(),
            time: Default::default(),
        }
    }

    fn event(kind: &str, about: &str, agent: &str) -> serde_json::Value {
        json!({
            "specversion": "1.0", "id": "0199b2c4-0000-7000-8000-000000000000", "source": SOURCE,
            "type": kind, "subject": about, "time": "2026-11-22T03:04:05.678Z",
            "datacontenttype": "application/json",
            "data": { "agent_id": agent, "instance_id": "i", "by_instance_id": "j" },
        })
    }

    #[test]
    fn only_a_valid_event_of_its_subject_is_believed() {
        let subjects = Subjects::default();
        let mine = "rollcall.event.agent.a";
        let good = event("rollcall.agent.superseded", "a", "a");
        match read(&subjects, SOURCE, &entry(mine, &good)) {
            Read::Event(id, _, _, ours) => assert_eq!((id.as_str(), ours), ("a", true)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(read(&subjects, "/other", &entry(mine, &good)), Read::Event(_, _, _, false)));
        for bad in [
            event("rollcall.agent.superseded", "b", "a"),
            event("rollcall.agent.superseded", "a", "b"),
            event("rollcall.agent.promoted", "a", "a"),
            event("rollcall.system.invalid_entry", "a", "a"),
            json!({ "stream": "ROLLCALL_EVENTS", "seq": 3 }),
            json!(null),
        ] {
            let found = read(&subjects, SOURCE, &entry(mine, &bad));
            assert!(matches!(&found, Read::Invalid(id, _) if id.as_str() == "a"), "{bad}: {found:?}");
        }
        assert!(matches!(
            read(&subjects, SOURCE, &entry("rollcall.event.execution.a", &good)),
            Read::Foreign
        ));
    }
}
