//! The verbs: `agents`, `agent`, `drain`, `undrain`, `goodbye`, `forget`.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use rollcall_core::agent::Status;
use rollcall_core::time::{Clock, SystemClock};
use rollcall_core::wire::{AgentRequest, ApiError, ErrorCode, Goodbye, GoodbyeReason, InFlight, read_object};
use rollcall_core::{AgentId, InstanceId, Pool};
use rollcall_nats::{
    ApiHandle, ApiOptions, ApiRequest, ApiServer, Bus, Entry, RequestError, SubscribeError, Subscriber,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use crate::decide::Wish;
use crate::effect::Reach;
use crate::shell::{Input, SightView};
use crate::view::AgentView;

/// Drain time of a goodbye that names none.
const GOODBYE_DEADLINE_MS_DEFAULT: u64 = 30_000;
/// Longest deadline that may be asked for: thirty days.
const DEADLINE_MS_MAX: u64 = 30 * 24 * 3600 * 1000;
/// Longest reason, in characters.
const REASON_CHARS_MAX: usize = 500;

/// A question of a request handler to the loop.
#[derive(Debug)]
pub(crate) enum Ask {
    /// `agents`
    List(ListQuery, oneshot::Sender<Result<Listing, ApiError>>),
    /// One agent; `None`: not known here.
    View(AgentId, oneshot::Sender<Result<Option<AgentView>, ApiError>>),
    /// What the log's leader has about an agent that was not known here.
    Fold(Vec<Entry>, oneshot::Sender<()>),
    /// A wish about a known agent.
    Wish(AgentId, Wish, oneshot::Sender<Result<AgentView, ApiError>>),
    /// The instance to say goodbye to; it is repeated in answers to its heartbeats.
    Part(AgentId, Goodbye, oneshot::Sender<Result<InstanceId, ApiError>>),
    /// Another prober said goodbye to this instance, which did not confirm it.
    Told(Unanswered),
    /// The goodbye was heard.
    Parted(AgentId, InstanceId),
}

/// `agents`
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct ListQuery {
    /// Only with this status.
    #[serde(default)]
    pub(crate) status: Option<Status>,
    /// Only of this pool.
    #[serde(default)]
    pub(crate) pool: Option<Pool>,
    /// At most so many.
    #[serde(default)]
    pub(crate) limit: Option<usize>,
    /// Only those after this one, in the order of ids.
    #[serde(default)]
    pub(crate) after: Option<AgentId>,
}

/// A goodbye that its instance has not confirmed, as probers tell each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unanswered {
    pub(crate) agent_id: AgentId,
    pub(crate) instance_id: InstanceId,
    pub(crate) goodbye: Goodbye,
}

/// Hands on what other probers say until the connection is closed.
pub(crate) async fn follow_goodbyes(mut told: Subscriber, inputs: mpsc::Sender<Input>) {
    while let Some(message) = told.next().await {
        match read_object::<Unanswered>("prober.goodbye", &message.payload) {
            Ok(unanswered) => {
                if inputs.send(Input::Ask(Ask::Told(unanswered))).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!(%error, "a goodbye of another prober can't be read"),
        }
    }
}

/// The answer to `agents`.
#[derive(Debug, Serialize)]
pub(crate) struct Listing {
    pub(crate) agents: Vec<AgentView>,
    /// Pass it as `after` for the rest.
    pub(crate) next: Option<String>,
    /// False: silence of heartbeats counts for nothing now.
    pub(crate) sees: bool,
    pub(crate) sight: SightView,
}

/// Answers requests until the handle is drained.
///
/// # Errors
/// The connection was closed.
pub(crate) async fn serve(
    bus: &Bus,
    reach: Reach,
    inputs: mpsc::Sender<Input>,
    clock: Arc<SystemClock>,
) -> Result<ApiHandle, SubscribeError> {
    let mut options = ApiOptions::new("rollcall-health-prober", env!("CARGO_PKG_VERSION"));
    "Who is alive: agents, their status and drains.".clone_into(&mut options.description);
    let verbs = Verbs { reach, inputs, clock };
    let mut server = ApiServer::new(bus, options);
    for verb in ["agents", "agent", "drain", "undrain", "goodbye", "forget"] {
        let verbs = verbs.clone();
        server = server.verb(verb, move |request| {
            let verbs = verbs.clone();
            async move { verbs.handle(&request).await.map_err(|error| outward(&error)) }
        });
    }
    server.start().await
}

fn outward(error: &ApiError) -> rollcall_nats::ApiError {
    let out = rollcall_nats::ApiError::new(error.code.as_str(), error.message.clone());
    match error.retry_after_ms {
        Some(millis) => out.retry_after_ms(millis),
        None => out,
    }
}

#[derive(Clone)]
struct Verbs {
    reach: Reach,
    inputs: mpsc::Sender<Input>,
    clock: Arc<SystemClock>,
}

impl Verbs {
    async fn handle(&self, request: &ApiRequest) -> Result<Bytes, ApiError> {
        let verb = request.verb;
        if verb == "agents" {
            let query = match request.payload.as_ref() {
                b"" => ListQuery::default(),
                bytes => read_object(verb, bytes)?,
            };
            let listing = self.ask(|reply| Ask::List(query, reply)).await??;
            return encode(&listing);
        }
        let asked: AgentRequest = read_object(verb, &request.payload)?;
        check(verb, &asked)?;
        let id = asked.agent_id.clone();
        let view = self.known(&id).await?;
        let reason = |default: &str| asked.reason.clone().unwrap_or_else(|| default.to_owned());
        match verb {
            "agent" => encode(&view),
            "drain" => {
                let now = self.clock.now();
                let deadline = asked.deadline_ms.map(|millis| now.plus_ms(millis));
                self.wish(id, Wish::Drain { reason: reason("drain"), deadline, in_flight: asked.in_flight })
                    .await
            }
            "undrain" => self.wish(id, Wish::Undrain { reason: reason("undrain") }).await,
            "forget" => self.wish(id, Wish::Forget { reason: reason("forgotten") }).await,
            "goodbye" => self.goodbye(id, &asked).await,
            other => Err(ApiError::bad_request(format!("there is no verb {other}"))),
        }
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        let ended = |_| ApiError::unavailable("the health-prober is ending");
        self.inputs.send(Input::Ask(question(reply))).await.map_err(|_| ended(()))?;
        answer.await.map_err(|_| ended(()))
    }

    /// The agent, after a look into the log itself if it is not known here.
    async fn known(&self, id: &AgentId) -> Result<AgentView, ApiError> {
        if let Some(view) = self.ask(|reply| Ask::View(id.clone(), reply)).await?? {
            return Ok(view);
        }
        let entries = self.reach.history(id).await.map_err(|error| {
            ApiError::unavailable(format!("whether agent {id} is known can't be told: {error}"))
        })?;
        if !entries.is_empty() {
            self.ask(|reply| Ask::Fold(entries, reply)).await?;
        }
        let unknown = || ApiError::new(ErrorCode::UnknownAgent, format!("agent {id} was never heard of"));
        self.ask(|reply| Ask::View(id.clone(), reply)).await??.ok_or_else(unknown)
    }

    async fn wish(&self, id: AgentId, wish: Wish) -> Result<Bytes, ApiError> {
        encode(&self.ask(|reply| Ask::Wish(id, wish, reply)).await??)
    }

    async fn goodbye(&self, id: AgentId, asked: &AgentRequest) -> Result<Bytes, ApiError> {
        let reason = asked.reason.as_deref().map_or(GoodbyeReason::Operator, named);
        let goodbye = Goodbye {
            reason,
            deadline_ms: asked.deadline_ms.unwrap_or(GOODBYE_DEADLINE_MS_DEFAULT),
            in_flight: asked.in_flight.unwrap_or(InFlight::Finish),
        };
        let instance = self.ask(|reply| Ask::Part(id.clone(), goodbye.clone(), reply)).await??;
        tracing::info!(agent_id = %id, instance_id = %instance, ?reason, why = asked.reason, "an operator says goodbye");
        let said = self.reach.say_goodbye(&id, &instance, &goodbye).await;
        let mut answer = json!({ "agent_id": id, "instance_id": instance, "sent": true, "answered": false });
        match said {
            Ok(ok) => {
                answer["answered"] = json!(true);
                answer["ok"] = json!(ok);
                // Whether the loop still takes it or not: the goodbye itself is said.
                let _ = self.inputs.send(Input::Ask(Ask::Parted(id, instance))).await;
            }
            Err(RequestError::Disconnected) => {
                return Err(ApiError::unavailable("nats is not connected, the goodbye was not sent"));
            }
            Err(error) => {
                self.tell_the_others(Unanswered { agent_id: id, instance_id: instance, goodbye }).await;
                answer["note"] = match error {
                    RequestError::NoResponders => {
                        json!("no_responders: nobody listens there; it is repeated in answers to heartbeats")
                    }
                    error => json!(error.to_string()),
                };
            }
        }
        encode(&answer)
    }

    /// Whichever prober answers its next heartbeat says it.
    async fn tell_the_others(&self, unanswered: Unanswered) {
        let subject = self.reach.subjects.prober_goodbye();
        let told = match serde_json::to_vec(&unanswered) {
            Ok(bytes) => self.reach.bus.publish(subject, bytes.into()).await.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = told {
            tracing::warn!(agent_id = %unanswered.agent_id, error, "the other probers do not know of a goodbye");
        }
    }
}

/// The reason that an agent is told: one of the contract's names (PROTOCOL.md 3) as it is, anything else is an operator's
/// own words, which are for people.
fn named(reason: &str) -> GoodbyeReason {
    GoodbyeReason::named(reason)
        .filter(|named| *named != GoodbyeReason::Unknown)
        .unwrap_or(GoodbyeReason::Operator)
}

fn check(verb: &str, asked: &AgentRequest) -> Result<(), ApiError> {
    if let Some(deadline) = asked.deadline_ms.filter(|millis| *millis > DEADLINE_MS_MAX) {
        return Err(ApiError::bad_request(format!(
            "{verb}: deadline_ms is {deadline}, at most {DEADLINE_MS_MAX}"
        )));
    }
    if asked.in_flight.is_some() {
        // Not what anybody would find out that it was not obeyed.
        match verb {
            "goodbye" => {}
            "drain" if asked.deadline_ms.is_some() => {}
            "drain" => {
                let why = "says what becomes of the work at the deadline, and there is no deadline_ms";
                return Err(ApiError::bad_request(format!("{verb}: in_flight {why}")));
            }
            _ => {
                return Err(ApiError::bad_request(format!("{verb}: in_flight is of drain and goodbye only")));
            }
        }
    }
    if asked.reason.as_ref().is_some_and(|reason| reason.chars().count() > REASON_CHARS_MAX) {
        return Err(ApiError::bad_request(format!("{verb}: reason has over {REASON_CHARS_MAX} characters")));
    }
    Ok(())
}

fn encode<T: Serialize>(value: &T) -> Result<Bytes, ApiError> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| ApiError::unavailable(format!("the answer can't be written: {error}")))
}
