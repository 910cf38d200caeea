//! `watchdog.status`, `watchdog.run` and `explain`.

use std::sync::Arc;

use bytes::Bytes;
use rollcall_core::{
    ExecutionId, Timestamp,
    event::ExecutionEvent,
    execution::State,
    wire::{ApiError as Refusal, ErrorCode, ExecutionRequest, read_object},
};
use rollcall_nats::{ApiError, ApiHandle, ApiOptions, ApiRequest, ApiServer, SubscribeError};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    cycle, effect,
    follow::History,
    matrix::{Row, verdict_in_words},
    shared::Shared,
    state::World,
};

/// Serves the verbs.
///
/// # Errors
/// The connection was closed.
pub async fn serve(shared: &Arc<Shared>) -> Result<ApiHandle, SubscribeError> {
    let mut options = ApiOptions::new("rollcall-watchdog", env!("CARGO_PKG_VERSION"));
    options.description = "judges open executions and recovers what is stuck".to_owned();
    let (for_status, for_run, for_explain) = (Arc::clone(shared), Arc::clone(shared), Arc::clone(shared));
    ApiServer::new(&shared.bus, options)
        .verb("watchdog.status", move |request| {
            let shared = Arc::clone(&for_status);
            async move { answer(status(&shared, &request)) }
        })
        .verb("watchdog.run", move |request| {
            let shared = Arc::clone(&for_run);
            async move { answer(run(&shared, &request).await) }
        })
        .verb("explain", move |request| {
            let shared = Arc::clone(&for_explain);
            async move { answer(explain(&shared, &request).await) }
        })
        .start()
        .await
}

fn answer(result: Result<Value, Refusal>) -> Result<Bytes, ApiError> {
    match result {
        Ok(value) => Ok(Bytes::from(value.to_string())),
        Err(refusal) => {
            let error = ApiError::new(refusal.code.as_str(), refusal.message);
            Err(match refusal.retry_after_ms {
                Some(after) => error.retry_after_ms(after),
                None => error,
            })
        }
    }
}

fn status(shared: &Shared, request: &ApiRequest) -> Result<Value, Refusal> {
    if !request.payload.is_empty() {
        serde_json::from_slice::<serde_json::Map<String, Value>>(&request.payload)
            .map_err(|error| Refusal::bad_json("watchdog.status", &error))?;
    }
    let last = shared.ledger.last();
    let status = shared.with(|world, now| {
        let count = world.silence(now);
        json!({
            "sees": world.sight.since().is_some(),
            "sight": {
                "since": world.sight.since(),
                "last_trouble": world.sight.trouble().as_str(),
                "log_read": world.sight.caught_up(),
            },
            "breaker": {
                "suspended": world.is_suspended(),
                "since": world.suspended_at,
                "silent": count.silent,
                "of": count.of,
                "nobody_is_heard": world.nobody_is_heard(),
                "fraction": world.config.breaker.fraction,
                "min_agents": world.config.breaker.min_agents,
                "window_ms": world.config.breaker.window_ms,
            },
            "rate_limit": {
                "per_second": world.config.recovery_rate,
                "backlog_ms": world.rate_backlog_ms(now),
            },
            "open": world.executions.len(),
            "troubled": world.troubles.len(),
            "totals": {
                "recovered": world.counters.recovered,
                "failed": world.counters.failed,
                "conflicts": world.counters.conflicts,
                "zombies": world.counters.zombies,
                "recovered_then_heard": world.counters.heard_again,
                "heartbeats": world.counters.beats,
                "heartbeats_ignored": world.counters.beats_ignored,
                "invalid_entries": world.counters.invalid,
            },
            "last_cycle": last,
        })
    });
    Ok(status)
}

#[derive(Debug, Default, Deserialize)]
struct RunRequest {
    #[serde(default)]
    dry_run: bool,
}

async fn run(shared: &Shared, request: &ApiRequest) -> Result<Value, Refusal> {
    let run: RunRequest = if request.payload.is_empty() {
        RunRequest::default()
    } else {
        read_object("watchdog.run", &request.payload)?
    };
    if !shared.with(|world, _| world.sight.caught_up()) {
        return Err(Refusal::not_ready("the log is still being read"));
    }
    let report = cycle::run_cycle(shared, run.dry_run)
        .await
        .ok_or_else(|| Refusal::retry_after(ErrorCode::Conflict, "a cycle is running", 1000))?;
    serde_json::to_value(report).map_err(|error| Refusal::unavailable(error.to_string()))
}

async fn explain(shared: &Shared, request: &ApiRequest) -> Result<Value, Refusal> {
    let wanted: ExecutionRequest = read_object("explain", &request.payload)?;
    let id = wanted.execution_id;
    if !shared.with(|world, _| world.sight.caught_up()) {
        return Err(Refusal::not_ready("the log is still being read"));
    }
    // The log's own word, from its leader, however far behind our fold is.
    let history =
        History::read(shared, &id).await.map_err(|error| Refusal::unavailable(error.to_string()))?;
    if history.is_empty() {
        return Err(Refusal::new(ErrorCode::NotFound, format!("no execution {id}")));
    }
    history.tell(shared);
    if let Some(mut explained) = shared.with(|world, now| explain_open(world, &id, now)) {
        explained["recoveries"] = recoveries(&history).into();
        return Ok(explained);
    }
    let execution = history
        .fold()
        .ok_or_else(|| Refusal::new(ErrorCode::NotFound, format!("no valid execution {id}")))?;
    let held = execution.attempts.last();
    let row = if execution.state == State::Expired { Row::QueueExpired } else { Row::Ended };
    Ok(json!({
        "execution_id": id,
        "state": execution.state,
        "attempt": execution.attempt,
        "agent_id": held.map(|a| &a.agent_id),
        "instance_id": held.map(|a| &a.instance_id),
        "row": row.key(),
        "situation": row.situation(),
        "rule": row.evidence(),
        "decision": format!("leave it: {} since {}", execution.state.as_str(), execution.state_since),
        "evidence": {
            "ended_at": execution.state_since,
            "reason": execution.reason,
            "error": execution.error,
            "recovered": held.and_then(|a| a.recovered),
            "late": execution.late,
            "claimed_by": shared.with(|world, _| zombies(world, &id)),
        },
        "recoveries": recoveries(&history),
    }))
}

/// Each recovery of it, with what was seen when it was decided.
fn recoveries(history: &History) -> Vec<Value> {
    let recovered = history.events().filter_map(|(_, event, time)| match event {
        ExecutionEvent::Recovered(recovered) => Some((recovered, time)),
        _ => None,
    });
    recovered
        .map(|(recovered, time)| {
            json!({
                "attempt": recovered.attempt,
                "time": time,
                "reason": recovered.reason,
                "action": recovered.action,
                "agent_id": recovered.agent_id,
                "instance_id": recovered.instance_id,
                "terminate": recovered.terminate,
                "detected_after_ms": recovered.detected_after_ms,
                "message": recovered.message,
                "evidence": recovered.evidence,
            })
        })
        .collect()
}

/// Who lists an attempt of it that it does not hold by the log, and how often it was asked to end that.
fn zombies(world: &World, id: &ExecutionId) -> Vec<Value> {
    let claims = world.agents.iter().flat_map(|(agent, entry)| entry.claims.iter().map(move |c| (agent, c)));
    claims
        .flat_map(|(agent, claims)| claims.extras().iter().map(move |extra| (agent, &claims.instance, extra)))
        .filter(|(_, _, extra)| extra.id == *id)
        .map(|(agent, instance, extra)| {
            // The registry of an agent over HTTP names no attempts.
            let attempt = Some(extra.attempt).filter(|attempt| *attempt > 0);
            json!({"agent_id": agent, "instance_id": instance, "attempt": attempt,
                "lists_in_a_row": extra.times, "asked_to_end": extra.asked})
        })
        .collect()
}

fn explain_open(world: &World, id: &ExecutionId, now: Timestamp) -> Option<Value> {
    let execution = world.executions.get(id)?;
    let (judgement, facts) = world.standing_judgement(id, now)?;
    let held = execution.holder();
    let entry = held.and_then(|h| world.agents.get(&h.agent_id));
    let trouble = world.troubles.get(id);
    let mut evidence = match held {
        Some(_) => effect::evidence(&facts, &world.config.limits, entry, now),
        None => json!({
            "waiting_since": execution.waiting_since,
            "expires_at": execution.expires_at(),
            "reason": execution.reason,
        }),
    };
    let zombies = zombies(world, id);
    if !zombies.is_empty() {
        evidence["claimed_by"] = zombies.into();
    }
    let progress = held.and_then(|h| entry?.claims_of(h.instance_id.as_str())?.progress(id, h.number));
    Some(json!({
        "execution_id": id,
        "state": execution.state,
        "attempt": execution.attempt,
        "agent_id": held.map(|h| &h.agent_id),
        "instance_id": held.map(|h| &h.instance_id),
        "row": judgement.row.key(),
        "situation": judgement.row.situation(),
        "rule": judgement.row.evidence(),
        "decision": verdict_in_words(&judgement, now),
        "look_again_at": world.due.of(id),
        "progress": progress,
        "trouble": trouble.map(|t| json!({
            "since": t.since,
            "row": t.row.key(),
            "terminate_asked": t.asked_times,
            "turn_at": t.turn_at,
            "being_worked_on": t.in_flight,
            "last_error": t.last_error,
        })),
        "evidence": evidence,
    }))
}
