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
