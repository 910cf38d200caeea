//! `GET /api/openapi.json`, from the code of the handlers.
//!
//! The core's types know nothing of OpenAPI: what they look like is said here once more, and a test holds the two
//! together.

use std::collections::BTreeMap;

use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::Serialize;
use std::sync::LazyLock;
use utoipa::{IntoParams, OpenApi, ToSchema};

/// Parameters of everything that shows events.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes what `Params` reads")]
pub(super) struct StreamParams {
    /// Only events after this sequence.
    after: Option<u64>,
    /// Types, separated by commas, each with or without `rollcall.`: `execution.recovered,agent.*`.
    r#type: Option<String>,
    /// Only events that name this agent.
    agent: Option<String>,
    /// Only events of agents and executions in this pool.
    pool: Option<String>,
    /// Only events of this execution.
    execution: Option<String>,
}

/// Parameters of the list of executions.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes what `Params` reads")]
pub(super) struct ExecutionsParams {
    /// States, separated by commas.
    state: Option<String>,
    /// Only those that this agent holds or held, or in whose queue they wait.
    agent: Option<String>,
    /// 1 to 1000, default 100.
    limit: Option<usize>,
    /// Go on after this execution: `next` of the answer before.
    after: Option<String>,
}

/// An error.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorAnswer {
    /// The error.
    error: ErrorView,
}

/// Code and message of an error.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorView {
    /// For programs.
    #[schema(example = "not_found")]
    code: String,
    /// For people.
    message: String,
    /// When it may be worth trying again.
    retry_after_ms: Option<u64>,
}

/// An entry of the log.
#[derive(Serialize, ToSchema)]
pub(super) struct EntryView {
    /// Its sequence in the log.
    seq: u64,
    /// The CloudEvent, byte for byte.
    event: CloudEvent,
}

/// A CloudEvent 1.0.
#[derive(Serialize, ToSchema)]
pub(super) struct CloudEvent {
    /// `1.0`
    specversion: String,
    /// Unique.
    id: String,
    /// `/rollcall/<service>/<instance>`
    source: String,
    /// `rollcall.<family>.<name>`
    r#type: String,
    /// The execution, agent or service.
    subject: String,
    /// When its author decided it.
    #[schema(format = DateTime)]
    time: String,
    /// `application/json`
    datacontenttype: String,
    /// What happened.
    #[schema(value_type = Object)]
    data: serde_json::Value,
}

/// Events and where to go on.
#[derive(Serialize, ToSchema)]
pub(super) struct EntriesAnswer {
    /// Oldest first.
    events: Vec<EntryView>,
    /// Pass it as `after` to go on.
    next: u64,
    /// There is more in the log already.
    more: bool,
}

/// An execution.
#[derive(Serialize, ToSchema)]
#[schema(as = Execution)]
pub(super) struct ExecutionDoc {
    /// The execution.
    execution_id: String,
    /// Its state.
    #[schema(example = "running")]
    state: String,
    /// The attempt that counts.
    attempt: u32,
    /// The agent that holds or held it, or whose queue it waits in.
    agent_id: Option<String>,
    /// That agent's instance.
    instance_id: Option<String>,
    /// Its pool.
    pool: String,
    /// 0 first .. 9 last.
    priority: u8,
    /// `fail` or `requeue`.
    on_loss: String,
    /// Losses so far that count.
    losses: u32,
    /// When it was submitted.
    #[schema(format = DateTime)]
    submitted_at: String,
    /// When the present attempt was dispatched.
    #[schema(format = DateTime)]
    dispatched_at: Option<String>,
    /// When its time is up.
    #[schema(format = DateTime)]
    deadline: Option<String>,
    /// When it ended.
    #[schema(format = DateTime)]
    ended_at: Option<String>,
    /// Not known here: the dispatcher knows it.
    position: Option<u64>,
    /// Why it ended, or why it waits again.
    reason: Option<String>,
    /// What went wrong.
    failure: Option<ErrorBodyDoc>,
    /// Not shown here: the dispatcher's `execution` does.
    #[schema(value_type = Option<Object>)]
    result: Option<serde_json::Value>,
    /// Where the result lies.
    #[schema(value_type = Option<Object>)]
    result_ref: Option<serde_json::Value>,
    /// It completed after it had been recovered.
    late: Option<bool>,
    /// Its labels.
    labels: Option<BTreeMap<String, String>>,
    /// Sequence in the log of its last event.
    seq: u64,
}

/// What went wrong with an execution.
#[derive(Serialize, ToSchema)]
#[schema(as = ErrorBody)]
pub(super) struct ErrorBodyDoc {
    /// For programs.
    code: String,
    /// For people.
    message: String,
}

/// Executions and where to go on.
#[derive(Serialize, ToSchema)]
pub(super) struct ExecutionsAnswer {
    /// The last submitted first.
    executions: Vec<ExecutionDoc>,
    /// Pass it as `after` to go on; null: that was all.
    next: Option<String>,
    /// Ended ones that are found only by their id.
    forgotten: u64,
}

/// An execution and everything that happened to it.
#[derive(Serialize, ToSchema)]
pub(super) struct ExecutionAnswer {
    /// The execution.
    #[serde(flatten)]
    execution: ExecutionDoc,
    /// Oldest first.
    history: Vec<EntryView>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Rollcall notifier",
        description = "The fleet as the event log tells it: read model and event streams."
    ),
    paths(
        super::page::dashboard,
        super::sse::events,
        super::ws::upgrade,
        super::api::summary,
        super::api::agents,
        super::api::agent,
        super::api::executions,
        super::api::execution,
        super::api::events,
        document,
    ),
    components(schemas(ErrorAnswer, ErrorView))
)]
struct Document;

static DOCUMENT: LazyLock<Bytes> =
    LazyLock::new(|| Bytes::from(Document::openapi().to_json().unwrap_or_default()));

/// `GET /api/openapi.json`
#[utoipa::path(
    get, path = "/api/openapi.json", tag = "fleet", summary = "This document",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json", body = Object))
)]
pub(super) async fn document() -> Response {
    let mut response = DOCUMENT.clone().into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{samples, state::Model, view};
    use rollcall_core::event::EventBody;
    use serde_json::Value;
    use std::collections::BTreeSet;

    fn document() -> Value {
        serde_json::from_slice(&DOCUMENT).unwrap()
    }

    /// Field names of a schema, with those of what it is composed of.
    fn fields(document: &Value, schema: &Value) -> (BTreeSet<String>, BTreeSet<String>) {
        if let Some(name) = schema["$ref"].as_str() {
            let name = name.rsplit('/').next().unwrap();
            return fields(document, &document["components"]["schemas"][name]);
        }
        let mut all = BTreeSet::new();
        let mut required = BTreeSet::new();
        for part in schema["allOf"].as_array().into_iter().flatten() {
            let (a, r) = fields(document, part);
            all.extend(a);
            required.extend(r);
        }
        all.extend(schema["properties"].as_object().into_iter().flat_map(|p| p.keys().cloned()));
        let names = schema["required"].as_array().into_iter().flatten();
        required.extend(names.map(|n| n.as_str().unwrap().to_owned()));
        (all, required)
    }

    fn agrees(schema: &str, sample: &Value) {
        let document = document();
        let (all, required) = fields(&document, &document["components"]["schemas"][schema]);
        assert!(!all.is_empty(), "{schema} is in the document");
        let found: BTreeSet<String> = sample.as_object().unwrap().keys().cloned().collect();
        assert!(found.is_subset(&all), "{schema}: not documented: {:?}", found.difference(&all));
        assert!(required.is_subset(&found), "{schema}: not always there: {:?}", required.difference(&found));
    }

    #[test]
    fn every_path_that_is_served_is_documented_and_no_other() {
        let document = document();
        let documented: BTreeSet<&str> =
            document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(documented, crate::http::PATHS.into_iter().collect());
    }

    #[test]
    fn what_is_answered_is_what_is_documented() {
        let mut model = Model::default();
        let events = [
            samples::registered("a1", "default"),
            samples::status("a1", rollcall_core::agent::Status::Error, None),
            samples::submitted("e1", Some("a1")),
            samples::dispatched("e1", "a1", 1),
            samples::recovered("e1", "a1", 1),
            samples::completed("e1", "a1", 1, true),
        ];
        for (seq, event) in (1..).zip(&events) {
            model.apply(seq, event);
            if let EventBody::Execution(body) = &event.body {
                let view = model.execution(body.execution_id()).unwrap().view();
                agrees("Execution", &serde_json::to_value(view).unwrap());
            }
        }
        let agent = model.agents().next().unwrap();
        agrees("AgentView", &serde_json::to_value(view::AgentView::of(agent, 1)).unwrap());
        agrees("Summary", &serde_json::to_value(view::Summary::of(&model, 6, true)).unwrap());
        let error = rollcall_core::wire::ApiError::not_ready("x");
        agrees("ErrorView", &serde_json::to_value(error).unwrap());
        agrees("CloudEvent", &serde_json::from_slice(&events[0].encode()).unwrap());
    }
}
