//! `/api/*`: the read model as JSON.

use std::sync::Arc;

use axum::{
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderValue, header},
    response::{IntoResponse, Json, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use rollcall_core::{
    AgentId, ExecutionId,
    agent::Agent,
    event::EventBody,
    execution::Execution,
    wire::{ApiError, ErrorCode, ExecutionView},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    error::Failure,
    openapi::{EntriesAnswer, ErrorAnswer, ExecutionAnswer, ExecutionsAnswer},
    params::Params,
    stream::within_log,
};
use crate::{
    entry::read_entry,
    feed::Collected,
    filter::Filter,
    follow::fold_history,
    frame::write_entry,
    shared::Shared,
    view::{AgentView, Summary},
};

/// Bytes of events in one answer, roughly; the rest is asked for with `after`.
const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Events looked through for one answer when few of them match.
const LOOKED_THROUGH_MAX: usize = 20_000;
/// Events read from the log at once.
const PAGE_EVENTS: usize = 1_000;

/// `GET /api/summary`
#[utoipa::path(
    get, path = "/api/summary", tag = "fleet", summary = "The fleet in numbers",
    responses(
        (status = 200, description = "The numbers", body = Summary),
        (status = 503, description = "Still reading the log", body = ErrorAnswer),
    )
)]
pub(super) async fn summary(State(shared): State<Arc<Shared>>) -> Json<Summary> {
    let head = shared.feed.head();
    Json(Summary::of(&shared.model(), head, shared.log.bus().is_connected()))
}

/// The answer of `GET /api/agents`.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentsAnswer {
    /// All agents, by id.
    agents: Vec<AgentView>,
}

/// `GET /api/agents`
#[utoipa::path(
    get, path = "/api/agents", tag = "fleet", summary = "All agents",
    responses(
        (status = 200, description = "All agents, by id", body = AgentsAnswer),
        (status = 503, description = "Still reading the log", body = ErrorAnswer),
    )
)]
pub(super) async fn agents(State(shared): State<Arc<Shared>>) -> Json<AgentsAnswer> {
    let model = shared.model();
    Json(AgentsAnswer { agents: model.agents().map(|a| AgentView::of(a, model.held_by(&a.id))).collect() })
}

type IdPath = Result<Path<String>, PathRejection>;

fn id_of<T: std::str::FromStr<Err = rollcall_core::InvalidId>>(path: IdPath) -> Result<T, Failure> {
    match path {
        Ok(Path(text)) => Ok(text.parse()?),
        Err(rejection) => Err(ApiError::bad_request(rejection.body_text()).into()),
    }
}

/// `GET /api/agents/{id}`
#[utoipa::path(
    get, path = "/api/agents/{id}", tag = "fleet", summary = "One agent",
    params(("id" = String, Path, description = "The agent")),
    responses(
        (status = 200, description = "The agent", body = AgentView),
        (status = 400, description = "No identifier", body = ErrorAnswer),
        (status = 404, description = "The log knows no such agent", body = ErrorAnswer),
        (status = 503, description = "Still reading the log, or it does not answer", body = ErrorAnswer),
    )
)]
pub(super) async fn agent(
    State(shared): State<Arc<Shared>>,
    path: IdPath,
) -> Result<Json<AgentView>, Failure> {
    let id: AgentId = id_of(path)?;
    {
        let model = shared.model();
        if let Some(agent) = model.agent(&id) {
            return Ok(Json(AgentView::of(agent, model.held_by(&id))));
        }
    }
    // Not known is only true if the log says so: it may be ahead of what was read of it.
    let mut agent = Agent::unknown(id.clone());
    let subject = shared.subjects.agent_event(&id);
    if shared.log.last(&subject).await?.is_some() {
        for entry in shared.log.history(&subject).await? {
            let Ok(event) = read_entry(&shared.subjects, &entry.subject, &entry.bytes) else { continue };
            if let EventBody::Agent(body) = &event.body {
                agent.evolve(entry.seq, body, event.time);
            }
        }
    }
    if agent.is_known() {
        return Ok(Json(AgentView::of(&agent, shared.model().held_by(&id))));
    }
    Err(ApiError::new(ErrorCode::NotFound, format!("there is no agent {id}")).into())
}

#[derive(Serialize)]
struct Executions {
    executions: Vec<ExecutionView>,
    next: Option<ExecutionId>,
    forgotten: u64,
}

/// `GET /api/executions`
#[utoipa::path(
    get, path = "/api/executions", tag = "fleet",
    summary = "Executions, the last submitted first",
    description = "All that are open and the last ended ones; older ones are found by their id.",
    params(super::openapi::ExecutionsParams),
    responses(
        (status = 200, description = "Executions", body = ExecutionsAnswer),
        (status = 400, description = "A parameter is wrong", body = ErrorAnswer),
        (status = 404, description = "There is no execution `after`", body = ErrorAnswer),
        (status = 503, description = "Still reading the log", body = ErrorAnswer),
    )
)]
pub(super) async fn executions(
    State(shared): State<Arc<Shared>>,
    params: Params,
) -> Result<Response, Failure> {
    let states = params.states()?;
    let agent: Option<AgentId> = params.id("agent")?;
    let limit = params.limit()?;
    let before = match params.id::<ExecutionId>("after")? {
        None => u64::MAX,
        Some(after) => submitted_seq(&shared, &after).await?,
    };
    let model = shared.model();
    let wanted = |execution: &&Execution| {
        (states.is_empty() || states.contains(&execution.state))
            && agent.as_ref().is_none_or(|agent| {
                let view_agent =
                    execution.current().map(|a| &a.agent_id).or(execution.request.agent_id.as_ref());
                view_agent == Some(agent)
            })
    };
    let mut rows: Vec<ExecutionView> =
        model.newest_first(before, &states).filter(wanted).take(limit + 1).map(Execution::view).collect();
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = rows.last().filter(|_| more).map(|row| row.execution_id.clone());
    Ok(Json(Executions { executions: rows, next, forgotten: model.forgotten() }).into_response())
}

async fn submitted_seq(shared: &Shared, id: &ExecutionId) -> Result<u64, Failure> {
    if let Some(execution) = shared.model().execution(id) {
        return Ok(execution.submitted_seq);
    }
    let history = shared.log.history(&shared.subjects.execution_event(id)).await?;
    match fold_history(shared, &history) {
        Some(execution) => Ok(execution.submitted_seq),
        None => Err(no_execution(id)),
    }
}

fn no_execution(id: &ExecutionId) -> Failure {
    ApiError::new(ErrorCode::NotFound, format!("there is no execution {id}")).into()
}

/// `GET /api/executions/{id}`
#[utoipa::path(
    get, path = "/api/executions/{id}", tag = "fleet",
    summary = "One execution with its whole history",
    description = "Read from the log for every answer, so it reflects all that was in the log when it was asked for.",
    params(("id" = String, Path, description = "The execution")),
    responses(
        (status = 200, description = "The execution", body = ExecutionAnswer),
        (status = 400, description = "No identifier", body = ErrorAnswer),
        (status = 404, description = "The log knows no such execution", body = ErrorAnswer),
        (status = 503, description = "Still reading the log, or it does not answer", body = ErrorAnswer),
    )
)]
pub(super) async fn execution(State(shared): State<Arc<Shared>>, path: IdPath) -> Result<Response, Failure> {
    let id: ExecutionId = id_of(path)?;
    let mut history = shared.log.history(&shared.subjects.execution_event(&id)).await?;
    history.retain(|entry| read_entry(&shared.subjects, &entry.subject, &entry.bytes).is_ok());
    let Some(execution) = fold_history(&shared, &history) else { return Err(no_execution(&id)) };
    let view = serde_json::to_vec(&execution.view())
        .map_err(|error| ApiError::unavailable(format!("execution {id} can't be shown: {error}")))?;
    let mut out =
        BytesMut::with_capacity(view.len() + 64 + history.iter().map(|e| e.bytes.len() + 32).sum::<usize>());
    out.put_slice(view.strip_suffix(b"}").unwrap_or(&view));
    out.put_slice(b",\"history\":");
    write_entries(&mut out, history.iter().map(|entry| (entry.seq, &entry.bytes)));
    out.put_u8(b'}');
    Ok(json(out))
}

/// Events that were found, and where to go on.
struct Found {
    entries: Vec<(u64, Bytes)>,
    next: u64,
    more: bool,
}

/// `GET /api/events`
#[utoipa::path(
    get, path = "/api/events", tag = "fleet", summary = "Events of the log",
    description = "With `after`: those that follow, oldest first. Without: the last ones that are in memory, oldest \
        first. `next` is where to go on, with `after=` here or on `/events`.",
    params(super::openapi::StreamParams, ("limit" = Option<usize>, Query, description = "1 to 1000, default 100")),
    responses(
        (status = 200, description = "Events", body = EntriesAnswer),
        (status = 400, description = "A parameter is wrong", body = ErrorAnswer),
        (status = 503, description = "Still reading the log, or it does not answer", body = ErrorAnswer),
    )
)]
pub(super) async fn events(State(shared): State<Arc<Shared>>, params: Params) -> Result<Response, Failure> {
    let (filter, limit) = (params.filter()?, params.limit()?);
    let found = match params.after()? {
        None => {
            let next = shared.feed.head();
            let frames = shared.feed.last(&filter, limit);
            let entries = frames.iter().map(|frame| (frame.seq, frame.bytes.clone())).collect();
            Found { entries, next, more: false }
        }
        Some(after) => {
            let after = within_log(&shared, after).await?;
            Box::pin(events_after(&shared, &filter, after, limit)).await?
        }
    };
    let mut out =
        BytesMut::with_capacity(64 + found.entries.iter().map(|(_, b)| b.len() + 32).sum::<usize>());
    out.put_slice(b"{\"events\":");
    write_entries(&mut out, found.entries.iter().map(|(seq, bytes)| (*seq, bytes)));
    out.put_slice(format!(",\"next\":{},\"more\":{}}}", found.next, found.more).as_bytes());
    Ok(json(out))
}

async fn events_after(
    shared: &Arc<Shared>,
    filter: &Filter,
    after: u64,
    limit: usize,
) -> Result<Found, Failure> {
    let mut entries = Vec::new();
    let mut bytes = 0;
    let collected = shared.feed.collect(after, filter, |frame| {
        entries.push((frame.seq, frame.bytes.clone()));
        bytes += frame.bytes.len();
        entries.len() < limit && bytes < ANSWER_BYTES_MAX
    });
    match collected {
        Collected::UpTo { seq, all } => Ok(Found { entries, next: seq, more: !all }),
        Collected::FellOut => old_events_after(shared, filter, after, limit).await,
    }
}

async fn old_events_after(
    shared: &Arc<Shared>,
    filter: &Filter,
    after: u64,
    limit: usize,
) -> Result<Found, Failure> {
    let mut subscription = crate::subscriber::LogReader::new(shared, filter.clone());
    let mut found = Found { entries: Vec::new(), next: after, more: true };
    let (mut bytes, mut looked) = (0, 0);
    while found.more && found.entries.len() < limit && bytes < ANSWER_BYTES_MAX && looked < LOOKED_THROUGH_MAX
    {
        let page = subscription.page(found.next, PAGE_EVENTS).await?;
        looked += page.looked_at.max(1);
        let mut cut = None;
        for frame in page.frames {
            if found.entries.len() == limit || bytes >= ANSWER_BYTES_MAX {
                cut = found.entries.last().map(|(seq, _)| *seq);
                break;
            }
            bytes += frame.bytes.len();
            found.entries.push((frame.seq, frame.bytes.clone()));
        }
        found.next = cut.unwrap_or(page.end);
        found.more = cut.is_some() || page.more;
    }
    Ok(found)
}

fn write_entries<'a>(out: &mut BytesMut, entries: impl Iterator<Item = (u64, &'a Bytes)>) {
    out.put_u8(b'[');
    for (index, (seq, bytes)) in entries.enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        write_entry(out, seq, bytes);
    }
    out.put_u8(b']');
}

fn json(body: BytesMut) -> Response {
    let mut response = body.freeze().into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
