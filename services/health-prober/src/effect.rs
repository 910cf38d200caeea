//! What decisions do to the world: appends, pings, goodbyes. Each runs as a task of its own and comes back as an input.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rollcall_core::event::{AgentEvent, Event, EventBody};
use rollcall_core::subject::{AgentVerb, Subjects};
use rollcall_core::wire::{Goodbye, GoodbyeReply, PingReply};
use rollcall_core::{AgentId, InstanceId, Timestamp};
use rollcall_nats::{Append, AppendError, Bus, Entry, EventLog, ReadError, RequestError};
use uuid::Uuid;

use crate::state::PingOutcome;

/// How long an instance may take to answer a goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pings have a quarter of an interval to be answered, at most this: an answer must come before the failure falls.
const PING_TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// What came of an append.
#[derive(Debug)]
pub(crate) enum Appended {
    /// In the log at this sequence.
    At(u64),
    /// Something else is; this is the agent's history.
    Conflict(Vec<Entry>),
    /// Not known to be in the log.
    Failed(String),
}

/// Everything effects need.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    pub(crate) bus: Bus,
    pub(crate) log: EventLog,
    pub(crate) subjects: Subjects,
    /// `source` of our events.
    pub(crate) source: String,
}

impl Reach {
    /// Appends one event after sequence `expected` of its agent.
    pub(crate) async fn append(&self, event: AgentEvent, time: Timestamp, expected: u64) -> Appended {
        let agent = event.agent_id().clone();
        let subject = self.subjects.agent_event(&agent);
        let id = Uuid::now_v7();
        let event = Event {
            id,
            source: self.source.clone(),
            subject: agent.as_str().to_owned(),
            time,
            body: EventBody::Agent(event),
        };
        let started = Instant::now();
        let appended =
            self.log.append(&subject, &id.to_string(), Bytes::from(event.encode()), expected).await;
        metrics::histogram!("rollcall_append_seconds").record(started.elapsed());
        match appended {
            Ok(Append::Appended { seq }) => Appended::At(seq),
            Ok(Append::Conflict { .. }) => match self.history(&agent).await {
                Ok(entries) => Appended::Conflict(entries),
                Err(error) => Appended::Failed(format!("lost a race and can't read what won: {error}")),
            },
            Err(error @ AppendError::Full(_)) => {
                metrics::counter!("rollcall_log_full_total").increment(1);
                Appended::Failed(error.to_string())
            }
            Err(error) => Appended::Failed(error.to_string()),
        }
    }

    /// Everything the log has about an agent, from its leader.
    pub(crate) async fn history(&self, agent: &AgentId) -> Result<Vec<Entry>, ReadError> {
        self.log.history(&self.subjects.agent_event(agent)).await
    }

    /// Asks an instance whether it is there.
    pub(crate) async fn ping(&self, agent: &AgentId, instance: &InstanceId, interval_ms: u64) -> PingOutcome {
        let subject = self.subjects.agent_request(agent, instance, AgentVerb::Ping);
        let timeout = Duration::from_millis(interval_ms / 4).min(PING_TIMEOUT_MAX);
        let outcome = match self.bus.request(subject, Bytes::from_static(b"{}"), timeout).await {
            Ok(answer) => match serde_json::from_slice::<PingReply>(&answer.payload) {
                Ok(reply) if reply.instance_id == *instance => PingOutcome::Answered,
                // Whatever answered there, it is not the instance: no evidence for it, and none against it.
                Ok(_) | Err(_) => PingOutcome::Nothing,
            },
            Err(RequestError::NoResponders) => PingOutcome::NoResponders,
            Err(_) => PingOutcome::Nothing,
        };
        let label = match outcome {
            PingOutcome::Answered => "answered",
            PingOutcome::NoResponders => "no_responders",
            PingOutcome::Nothing => "nothing",
        };
        metrics::counter!("rollcall_pings_total", "outcome" => label).increment(1);
        outcome
    }

    /// Tells an instance goodbye. `Ok`: whether it said yes.
    pub(crate) async fn say_goodbye(
        &self,
        agent: &AgentId,
        instance: &InstanceId,
        goodbye: &Goodbye,
    ) -> Result<bool, RequestError> {
        let subject = self.subjects.agent_request(agent, instance, AgentVerb::Goodbye);
        let body = serde_json::to_vec(goodbye).map_err(|error| RequestError::Other(error.to_string()))?;
        let answer = self.bus.request(subject, Bytes::from(body), GOODBYE_TIMEOUT).await;
        let reason = goodbye.reason;
        match &answer {
            Ok(_) => tracing::info!(agent_id = %agent, instance_id = %instance, ?reason, "goodbye was heard"),
            Err(error) => {
                tracing::info!(agent_id = %agent, instance_id = %instance, ?reason, %error, "goodbye was not answered");
            }
        }
        answer
            .map(|answer| serde_json::from_slice::<GoodbyeReply>(&answer.payload).is_ok_and(|reply| reply.ok))
    }
}
