//! Entries of the log as the notifier takes them: an entry that is no valid event for its subject is none.

use rollcall_core::{
    AgentId, ExecutionId, Pool,
    event::{DecodeError, Event, EventBody, ExecutionEvent, SystemEvent},
    subject::{EventSubject, Subjects},
};

/// Why an entry is skipped. Its sequence still counts.
#[derive(Debug, thiserror::Error)]
pub enum InvalidEntry {
    /// Bytes that are no text could not be sent on as text.
    #[error("not valid UTF-8")]
    NotText,
    /// No event.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A subject that is none of the log's, or another family's.
    #[error("a {0} event does not belong on its subject")]
    Family(&'static str),
    /// The event's `subject`, or the id in its data, is not the subject's.
    #[error("it is about {found:?}, its subject about {expected:?}")]
    Foreign {
        /// What the log's subject says.
        expected: String,
        /// What the event says.
        found: String,
    },
}

/// Reads an entry and checks that it may stand where it stands.
pub fn read_entry(subjects: &Subjects, subject: &str, bytes: &[u8]) -> Result<Event, InvalidEntry> {
    std::str::from_utf8(bytes).map_err(|_| InvalidEntry::NotText)?;
    let event = Event::decode(bytes)?;
    let place = subjects.of_event(subject);
    let expected = match (&place, &event.body) {
        (Some(EventSubject::Agent(id)), EventBody::Agent(_)) => id.as_str(),
        (Some(EventSubject::Execution(id)), EventBody::Execution(_)) => id.as_str(),
        (Some(EventSubject::System(service)), EventBody::System(_)) => service.as_str(),
        _ => return Err(InvalidEntry::Family(event.body.short_type())),
    };
    let inner = match &event.body {
        EventBody::Agent(body) => body.agent_id().as_str(),
        EventBody::Execution(body) => body.execution_id().as_str(),
        EventBody::System(_) => expected,
    };
    for found in [event.subject.as_str(), inner] {
        if found != expected {
            return Err(InvalidEntry::Foreign {
                expected: expected.to_owned(),
                found: found.chars().take(80).collect(),
            });
        }
    }
    Ok(event)
}

/// What an event is about, as far as subscribers can filter by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// The type without `rollcall.` before it.
    pub kind: &'static str,
    /// The agent it names.
    pub agent: Option<AgentId>,
    /// The execution it names.
    pub execution: Option<ExecutionId>,
    /// The pool it names, or else the pool its agent or execution is in.
    pub pool: Option<Pool>,
}

impl About {
    /// What the event itself says.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        let kind = event.body.short_type();
        match &event.body {
            EventBody::Agent(body) => Self {
                kind,
                agent: Some(body.agent_id().clone()),
                execution: None,
                pool: agent_pool(body).cloned(),
            },
            EventBody::Execution(body) => Self {
                kind,
                agent: agent_of(body).cloned(),
                execution: Some(body.execution_id().clone()),
                pool: match body {
                    ExecutionEvent::Submitted(submitted) => Some(submitted.pool.clone()),
                    _ => None,
                },
            },
            EventBody::System(body) => Self::of_system(kind, body),
        }
    }

    fn of_system(kind: &'static str, event: &SystemEvent) -> Self {
        let text = |field: &str| event.data.get(field).and_then(serde_json::Value::as_str);
        Self {
            kind,
            agent: text("agent_id").and_then(|id| AgentId::new(id).ok()),
            execution: text("execution_id").and_then(|id| ExecutionId::new(id).ok()),
            pool: text("pool").and_then(|id| Pool::new(id).ok()),
        }
    }
}

fn agent_pool(event: &rollcall_core::event::AgentEvent) -> Option<&Pool> {
    use rollcall_core::event::AgentEvent;
    match event {
        AgentEvent::Registered(profile) | AgentEvent::Updated(profile) => Some(&profile.pool),
        _ => None,
    }
}

fn agent_of(event: &ExecutionEvent) -> Option<&AgentId> {
    match event {
        ExecutionEvent::Submitted(e) => e.agent_id.as_ref(),
        ExecutionEvent::Queued(e) => e.agent_id.as_ref(),
        ExecutionEvent::Dispatched(e) => Some(&e.agent_id),
        ExecutionEvent::Started(e) => Some(&e.agent_id),
        ExecutionEvent::CancelRequested(e) => e.agent_id.as_ref(),
        ExecutionEvent::Completed(e) => e.agent_id.as_ref(),
        ExecutionEvent::Failed(e) => e.agent_id.as_ref(),
        ExecutionEvent::Cancelled(e) => e.agent_id.as_ref(),
        ExecutionEvent::Expired(e) => e.agent_id.as_ref(),
        ExecutionEvent::Recovered(e) => Some(&e.agent_id),
        ExecutionEvent::Retried(_) => None,
        ExecutionEvent::LateResult(e) => Some(&e.agent_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{self, FLEET};

    #[test]
    fn an_event_on_its_own_subject_is_valid() {
        let event = samples::submitted("e1", Some("a1"));
        let read = read_entry(&FLEET, "rollcall.event.execution.e1", &event.encode()).unwrap();
        assert_eq!(read, event);
        let about = About::of(&read);
        assert_eq!(about.kind, "execution.submitted");
        assert_eq!(about.agent.unwrap().as_str(), "a1");
        assert_eq!(about.pool.unwrap().as_str(), "default");
    }

    #[test]
    fn an_event_elsewhere_is_not() {
        let bytes = samples::submitted("e1", None).encode();
        for subject in ["rollcall.event.execution.e2", "rollcall.event.agent.e1", "other.event.execution.e1"]
        {
            assert!(read_entry(&FLEET, subject, &bytes).is_err(), "{subject}");
        }
        let mut renamed = samples::submitted("e1", None);
        renamed.subject = "e2".into();
        let error = read_entry(&FLEET, "rollcall.event.execution.e1", &renamed.encode()).unwrap_err();
        assert!(error.to_string().contains("\"e2\""), "{error}");
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_even_where_json_would_not_look() {
        let mut bytes = samples::submitted("e1", None).encode();
        bytes.pop();
        bytes.extend_from_slice(b",\"x\":\"\xff\"}");
        assert!(read_entry(&FLEET, "rollcall.event.execution.e1", &bytes).is_err());
    }

    #[test]
    fn a_system_event_is_about_what_its_data_names() {
        let event =
            samples::system("dispatcher", serde_json::json!({"agent_id": "a1", "execution_id": "no.id"}));
        let about = About::of(&event);
        assert_eq!(about.agent.unwrap().as_str(), "a1");
        assert_eq!(about.execution, None);
    }
}
