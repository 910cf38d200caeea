//! Carrying out judgements: one task per execution that needs work, each on its own, never two for one execution.

use std::{sync::Arc, time::Duration};

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp,
    event::{ExecutionEvent, RecoveryReason},
    wire::{Report, TerminateState},
};
use rollcall_nats::{Append, isolation};
use rollcall_service::LoopBeat;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    decide::{Finding, Judgement, Look, Verdict},
    ears,
    edge::{self, Answer, Ending},
    effect,
    facts::{Edge, Facts, Promise, Waiting},
    follow,
    shared::Shared,
    state::Looks,
};

/// Executions that are worked on at once; a hung agent holds its own executions' places for a terminate's timeout.
pub const WORK_MAX: usize = 4096;
/// Looks and requests for one judgement: every kind once, the log, an end asked for once more, and a recovery.
const STEPS_MAX: usize = 11;
/// Pause before work that failed (log or bus not reachable, lost a race) is tried again.
const RETRY_MS: u64 = 500;
/// The scheduler looks this often without being told.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// Takes what is due and has it worked on, until shutdown; then waits for what is under way.
pub async fn schedule(shared: Arc<Shared>, alive: LoopBeat, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(WORK_MAX));
    let tasks = TaskTracker::new();
    while !stop.is_cancelled() {
        alive.beat();
        // A place first, then the work.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { break };
        let (taken, next, now) = shared.with(|world, now| (world.take_due(now), world.due.next(), now));
        let Some((id, attempt)) = taken else {
            drop(permit);
            let pause = next.map_or(IDLE_LOOK, |at| Duration::from_millis(at.since_ms(now)).min(IDLE_LOOK));
            tokio::select! {
                () = stop.cancelled() => break,
                () = shared.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            crate::sentry::errands(&shared, &tasks).await;
            continue;
        };
        let shared = Arc::clone(&shared);
        tasks.spawn(async move {
            let _permit = permit;
            let (judged, retry_at) = match isolation::catch(work(&shared, &id)).await {
                Ok(Ok(judged)) => (judged, None),
                Ok(Err(reason)) => (None, Some(failed(&shared, &id, reason))),
                Err(panic) => (None, Some(failed(&shared, &id, format!("panic: {panic}")))),
            };
            shared.with(|world, now| world.landed((&id, attempt), judged, retry_at, now));
        });
    }
    tasks.close();
    // Bounded by the drain timeout of the process; whatever is cut is done by the next start.
    tasks.wait().await;
}

fn failed(shared: &Shared, id: &ExecutionId, reason: String) -> Timestamp {
    tracing::warn!(execution_id = %id, reason, "could not be worked on now, again in a moment");
    shared.with(|world, now| {
        world.counters.failed += 1;
        if let Some(trouble) = world.troubles.get_mut(id) {
            trouble.last_error = Some(reason);
        }
        now.plus_ms(RETRY_MS)
    })
}

/// Who holds the attempt that is worked on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    attempt: u32,
    agent: AgentId,
    instance: InstanceId,
    word_ms: u64,
}

/// Judges, fetches what the judgement asks for, and judges again, until there is nothing to do now. Returns the last
/// judgement, `None` when it was recovered or something else happened to it.
async fn work(shared: &Shared, id: &ExecutionId) -> Result<Option<(Judgement, Facts)>, String> {
    let mut looks = Looks::default();
    let mut first: Option<(u32, InstanceId)> = None;
    let mut is_fresh = false;
    for _ in 0..STEPS_MAX {
        let judged = shared.with(|world, now| {
            let held = world.executions.get(id)?.holder()?.clone();
            let (judgement, facts) = world.judge(id, &looks, now)?;
            let holder = Holder {
                attempt: held.number,
                agent: held.agent_id,
                instance: held.instance_id,
                word_ms: facts.channel.word_ms(),
            };
            Some((judgement, facts, holder))
        });
        let Some((judgement, facts, holder)) = judged else { return Ok(None) };
        // What was looked up for another attempt says nothing about this one.
        let key = (holder.attempt, holder.instance.clone());
        if first.get_or_insert_with(|| key.clone()) != &key {
            return Ok(None);
        }
        match judgement.verdict {
            Verdict::Leave | Verdict::WaitUntil(_) | Verdict::Postpone(_) => {
                return Ok(Some((judgement, facts)));
            }
            // No append on what we know stands before the end of work: the log's own word does, from its leader.
            Verdict::Terminate(_) | Verdict::Look(Look::Promise(_)) if !is_fresh => {
                follow::refresh(shared, id).await.map_err(|error| error.to_string())?;
                is_fresh = true;
            }
            Verdict::Terminate(reason) => {
                end(shared, id, &holder, reason).await;
                looks.waiting = Waiting::Unasked;
            }
            Verdict::Look(look) => {
                if look == Look::Instance {
                    looks.of_started = facts.started;
                }
                fetch(shared, id, &holder, look, &mut looks).await?;
            }
            Verdict::Recover(_) => return recover(shared, id, &looks).await.map(|()| None),
        }
    }
    Err(format!("no decision after {STEPS_MAX} looks"))
}

async fn fetch(
    shared: &Shared,
    id: &ExecutionId,
    holder: &Holder,
    look: Look,
    looks: &mut Looks,
) -> Result<(), String> {
    match look {
        Look::Canary => {
            if !ears::canary(shared).await {
                return Err("our own message did not come back through the bus".to_owned());
            }
            looks.canary = true;
        }
        Look::Report => {
            let subject = shared.subjects.report(&holder.agent, id);
            let last = shared.reports.last(&subject).await.map_err(|error| error.to_string())?;
            let last = last.and_then(|entry| Report::read(&holder.agent, id, &entry.bytes).ok());
            looks.waiting =
                effect::waiting(holder.attempt, last.map(|report| (report.attempt, report.outcome)));
        }
        Look::Turn => shared.with(|world, now| world.take_turn(id, now)),
        Look::Instance => looks.edge = look_at_instance(shared, id, holder).await,
        Look::Promise(reason) => {
            match ask_to_end(shared, id, holder, reason).await {
                Ending::Confirmed => looks.promise = Promise::Ended,
                Ending::NotRunning => looks.promise = Promise::NotRunning,
                // It has begun it meanwhile: its newest word counts.
                Ending::StillRunning => {
                    shared.with(|world, now| world.note_full_answer(id, now));
                    looks.edge = Edge::Lists;
                }
                Ending::Unconfirmed(why) => {
                    tracing::info!(execution_id = %id, agent_id = %holder.agent, why, "it does not promise not to begin it");
                    looks.promise = Promise::NoAnswer;
                }
            }
            looks.waiting = Waiting::Unasked;
        }
    }
    Ok(())
}

async fn look_at_instance(shared: &Shared, id: &ExecutionId, holder: &Holder) -> Edge {
    let lists = match edge::look(shared, &holder.agent, &holder.instance).await {
        Answer::Holds(claims) => {
            claims.iter().any(|claim| claim.id == *id && claim.attempt == holder.attempt)
        }
        Answer::HoldsAnyAttempt(ids) => ids.contains(id),
        Answer::NoResponders => return Edge::NoResponders,
        Answer::None(reason) => {
            tracing::debug!(execution_id = %id, agent_id = %holder.agent, reason, "asked, not answered");
            return Edge::NoAnswer;
        }
        Answer::Void => return Edge::Void,
    };
    shared.with(|world, now| {
        if lists {
            world.note_full_answer(id, now);
            Edge::Lists
        } else {
            Edge::ListsNot { times: world.note_empty_answer(id, holder.word_ms, now) }
        }
    })
}

async fn ask_to_end(shared: &Shared, id: &ExecutionId, holder: &Holder, reason: RecoveryReason) -> Ending {
    tracing::info!(execution_id = %id, agent_id = %holder.agent, attempt = holder.attempt,
        reason = reason.as_str(), "asking its agent to end it");
    let ending =
        edge::terminate(shared, &holder.agent, &holder.instance, id, holder.attempt, reason.as_str()).await;
    let outcome = match &ending {
        Ending::Confirmed => "confirmed",
        Ending::NotRunning => "not_running",
        Ending::StillRunning | Ending::Unconfirmed(_) => "unconfirmed",
    };
    metrics::counter!("rollcall_terminations_total", "reason" => reason.as_str(), "outcome" => outcome)
        .increment(1);
    ending
}

async fn end(shared: &Shared, id: &ExecutionId, holder: &Holder, reason: RecoveryReason) {
    let ending = ask_to_end(shared, id, holder, reason).await;
    let answer = match &ending {
        Ending::Confirmed => Some(TerminateState::Terminated),
        Ending::NotRunning => Some(TerminateState::NotRunning),
        Ending::StillRunning | Ending::Unconfirmed(_) => None,
    };
    let error = ending.trouble().map(str::to_owned);
    if let Some(error) = &error {
        tracing::warn!(execution_id = %id, agent_id = %holder.agent, error, "its end is not confirmed");
    }
    shared.with(|world, now| {
        if answer.is_none() {
            world.counters.failed += 1;
        }
        world.note_asked(id, reason, answer, now);
        if let Some(trouble) = world.troubles.get_mut(id) {
            trouble.last_error = error;
        }
    });
}

/// The verdict once more on what is known now, and its append on exactly that.
async fn recover(shared: &Shared, id: &ExecutionId, looks: &Looks) -> Result<(), String> {
    let decided = shared.with(|world, now| {
        let execution = world.executions.get(id)?;
        let held = execution.holder()?;
        let (judgement, facts) = world.judge(id, looks, now)?;
        let Verdict::Recover(finding) = judgement.verdict else { return None };
        let entry = world.agents.get(&held.agent_id);
        let evidence = effect::evidence(&facts, &world.config.limits, entry, now);
        let loss = effect::loss(execution, held, &finding, &facts, evidence, now);
        let detected_after_ms = loss.detected_after_ms;
        let event = execution.lose(loss).ok()?;
        Some((event, execution.seq, finding, detected_after_ms, now))
    });
    // Judged otherwise by now: it is settled anew.
    let Some((event, expected, finding, detected_after_ms, now)) = decided else { return Ok(()) };
    let subject = shared.subjects.execution_event(id);
    match shared.append(&subject, id.as_str(), event.clone().into(), expected, now).await {
        Ok(Append::Appended { .. }) => {
            // What was to be cancelled ended cancelled: that is no recovery.
            if matches!(event, ExecutionEvent::Recovered(_)) {
                shared.with(|world, _| world.counters.recovered += 1);
            }
            report(id, &event, &finding, detected_after_ms);
            Ok(())
        }
        Ok(Append::Conflict { winner_seq }) => {
            tracing::info!(execution_id = %id, expected, ?winner_seq, "something happened to it first, judged anew");
            shared.with(|world, _| world.counters.conflicts += 1);
            follow::refresh(shared, id).await.map(|_| ()).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

fn report(id: &ExecutionId, event: &ExecutionEvent, finding: &Finding, detected_after_ms: u64) {
    let reason = finding.reason.as_str();
    let action = match event {
        ExecutionEvent::Recovered(recovered) => recovered.action.as_str(),
        _ => "cancelled",
    };
    metrics::counter!("rollcall_recoveries_total", "reason" => reason, "action" => action).increment(1);
    metrics::histogram!("rollcall_detection_seconds", "reason" => reason)
        .record(std::time::Duration::from_millis(detected_after_ms));
    tracing::warn!(execution_id = %id, attempt = event.attempt(), reason, action, detected_after_ms, "recovered");
}
