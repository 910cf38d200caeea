//! Asking an agent: what it holds, and to end something. Over NATS, or over HTTP where the agent is driven so.

use std::time::Duration;

use bytes::Bytes;
use rollcall_core::{
    AgentId, ExecutionId, InstanceId,
    subject::AgentVerb,
    wire::{ExecutionsReply, OwnedClaim, TerminateReply, TerminateRequest, TerminateState},
};
use rollcall_nats::RequestError;

use rollcall_control::{Control, RegistryError, RegistryList};
use tokio::time::Instant;

use crate::{claims::Claims, config::ms, shared::Shared};

/// How long an instance may take to say what it holds, over NATS. A registry gets what a probe of it would.
pub const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// A registry's answer serves everybody who asks within so long; never longer than half a cycle, nor than the dispatch
/// grace, so that it came after the dispatch of whatever it may count against.
const ANSWER_SHARED_FOR: Duration = Duration::from_secs(1);
/// What an agent gets beyond the grace to confirm an end.
pub const TERMINATE_SLACK: Duration = Duration::from_secs(2);

/// What an instance holds, by its own word.
#[derive(Debug)]
pub enum Answer {
    /// This.
    Holds(Vec<OwnedClaim>),
    /// These; its registry names no attempts.
    HoldsAnyAttempt(Vec<ExecutionId>),
    /// The server says that nobody listens there.
    NoResponders,
    /// No answer in time, or none that makes sense; why.
    None(String),
    /// We could not ask.
    Void,
}

/// What became of a request to end something.
#[derive(Debug)]
pub enum Ending {
    /// Dead.
    Confirmed,
    /// It was not running.
    NotRunning,
    /// Running still.
    StillRunning,
    /// Not confirmed; why.
    Unconfirmed(String),
}

impl Ending {
    /// Why the end is not confirmed.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        match self {
            Self::Confirmed | Self::NotRunning => None,
            Self::StillRunning => Some("still running"),
            Self::Unconfirmed(why) => Some(why),
        }
    }
}

/// The endpoint an agent is driven at, if not over NATS.
fn control(shared: &Shared, agent: &AgentId) -> Option<Control> {
    shared.with(|world, _| world.agents.get(agent).and_then(|e| Control::of(&e.agent)))
}

/// Asks an instance what it holds. The registry of an agent that is driven over HTTP is not asked again when it has
/// answered a moment ago.
pub async fn look(shared: &Shared, agent: &AgentId, instance: &InstanceId) -> Answer {
    let settings = &shared.settings;
    let shared_for = ANSWER_SHARED_FOR.min(settings.cycle_interval / 2).min(settings.dispatch_grace);
    let now = Instant::now();
    look_since(shared, agent, instance, now.checked_sub(shared_for).unwrap_or(now)).await
}

/// The same, for the cycle's own call: an answer from before it does not do.
pub async fn look_anew(shared: &Shared, agent: &AgentId, instance: &InstanceId) -> Answer {
    look_since(shared, agent, instance, Instant::now()).await
}

async fn look_since(shared: &Shared, agent: &AgentId, instance: &InstanceId, not_before: Instant) -> Answer {
    if let Some(endpoint) = control(shared, agent) {
        let interval = ms(shared.settings.cycle_interval);
        let news = |list: &RegistryList| shared.with(|world, now| world.registry(agent, list, interval, now));
        let of = (agent, &endpoint);
        let timeout = shared.settings.probe_timeout;
        return match shared.answers.get(&shared.registries, of, not_before, timeout, news).await {
            Ok(RegistryList { running, known }) => {
                Answer::HoldsAnyAttempt(running.into_iter().chain(known).collect())
            }
            Err(RegistryError::Ours(_)) => Answer::Void,
            // Our own guard refuses its URL: that says nothing about the agent, its instance may still answer here.
            Err(error @ RegistryError::Refused { .. }) => {
                shared.warn_of_registry(agent, &error);
                ping(shared, agent, instance, error.to_string()).await
            }
            Err(error) => Answer::None(error.to_string()),
        };
    }
    let subject = shared.subjects.agent_request(agent, instance, AgentVerb::Executions);
    let ask = || shared.bus.request(subject.clone(), Bytes::from_static(b"{}"), LOOK_TIMEOUT);
    let asked = match ask().await {
        // One question can get lost, and work hangs on it.
        Err(RequestError::Timeout) => ask().await,
        asked => asked,
    };
    let answer = match asked {
        Ok(message) => match serde_json::from_slice::<ExecutionsReply>(&message.payload) {
            Ok(reply) if reply.instance_id == *instance => Answer::Holds(reply.executions),
            Ok(reply) => Answer::None(format!("{} answered for {instance}", reply.instance_id)),
            Err(error) => Answer::None(format!("its answer makes no sense: {error}")),
        },
        Err(RequestError::NoResponders) => Answer::NoResponders,
        Err(RequestError::Disconnected) => Answer::Void,
        Err(error) => Answer::None(error.to_string()),
    };
    if matches!(answer, Answer::Holds(_)) {
        note(shared, agent, instance, |claims| claims.answered = true);
    }
    answer
}

/// Whether anybody is there at all: an answer proves life and nothing about what it holds.
async fn ping(shared: &Shared, agent: &AgentId, instance: &InstanceId, refused: String) -> Answer {
    let subject = shared.subjects.agent_request(agent, instance, AgentVerb::Ping);
    match shared.bus.request(subject, Bytes::from_static(b"{}"), LOOK_TIMEOUT).await {
        Ok(_) => {
            note(shared, agent, instance, |claims| claims.pinged = true);
            Answer::Void
        }
        Err(RequestError::Disconnected) => Answer::Void,
        Err(RequestError::NoResponders) => Answer::NoResponders,
        Err(error) => Answer::None(format!("{refused}; ping: {error}")),
    }
}

/// Notes that this instance listens there on NATS, which no answer on another subject or over HTTP shows.
fn note(shared: &Shared, agent: &AgentId, instance: &InstanceId, answered: impl FnOnce(&mut Claims)) {
    shared.with(|world, _| {
        world.agents.get_mut(agent).and_then(|entry| entry.claims_mut(instance.as_str())).map(answered)
    });
}

/// Asks an instance to end an attempt and to say when it is dead.
pub async fn terminate(
    shared: &Shared,
    agent: &AgentId,
    instance: &InstanceId,
    execution: &ExecutionId,
    attempt: u32,
    reason: &str,
) -> Ending {
    let timeout = shared.settings.terminate_grace + TERMINATE_SLACK;
    if let Some(endpoint) = control(shared, agent) {
        match shared.registries.terminate(&endpoint, execution, timeout).await {
            Ok(()) => return Ending::Confirmed,
            // We may not call it there. Perhaps it listens here as well; whatever else it says here, what it runs its registry
            // knows.
            Err(error @ RegistryError::Refused { .. }) => {
                let here = terminate_over_nats(shared, agent, instance, (execution, attempt), reason).await;
                return match here {
                    Ending::Confirmed => Ending::Confirmed,
                    _ => Ending::Unconfirmed(error.to_string()),
                };
            }
            Err(error) => return Ending::Unconfirmed(error.to_string()),
        }
    }
    terminate_over_nats(shared, agent, instance, (execution, attempt), reason).await
}

async fn terminate_over_nats(
    shared: &Shared,
    agent: &AgentId,
    instance: &InstanceId,
    (execution, attempt): (&ExecutionId, u32),
    reason: &str,
) -> Ending {
    let grace = shared.settings.terminate_grace;
    let timeout = grace + TERMINATE_SLACK;
    let request = TerminateRequest {
        execution_id: execution.clone(),
        attempt,
        reason: reason.to_owned(),
        grace_ms: ms(grace),
    };
    let payload = match serde_json::to_vec(&request) {
        Ok(bytes) => Bytes::from(bytes),
        Err(error) => return Ending::Unconfirmed(error.to_string()),
    };
    let subject = shared.subjects.agent_request(agent, instance, AgentVerb::Terminate);
    match shared.bus.request(subject, payload, timeout).await {
        Ok(message) => match serde_json::from_slice::<TerminateReply>(&message.payload) {
            Ok(TerminateReply { state: TerminateState::Terminated, .. }) => Ending::Confirmed,
            Ok(TerminateReply { state: TerminateState::NotRunning, .. }) => Ending::NotRunning,
            Ok(TerminateReply { state: TerminateState::StillRunning, .. }) => Ending::StillRunning,
            Err(error) => Ending::Unconfirmed(format!("its answer makes no sense: {error}")),
        },
        Err(error) => Ending::Unconfirmed(error.to_string()),
    }
}
