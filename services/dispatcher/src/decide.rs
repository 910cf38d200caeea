//! What the dispatcher does about what it reads: pure functions from the log to capacity.

use std::collections::{BTreeMap, BTreeSet};

use rollcall_capacity::{AgentSetting, Hold, Load, Place, Priority, Queue};
use rollcall_core::{
    AgentId, ExecutionId, Pool, Timestamp,
    agent::{Agent, Status},
    event::ExecutionEvent,
    execution::{Attempt, Execution, Refusal, ReportFacts, State},
    wire::{ErrorBody, Outcome, TERMINATED, UNSUPPORTED},
};

use crate::state::{Change, Projection};

/// What has to be done in Redis because of an event. May be done again without harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// An attempt is over: its slot or place goes.
    Settle(Hold),
    /// It waits, as `new`, at the head of a queue, and `old` holds nothing any more.
    Requeue {
        /// The attempt that held.
        old: Hold,
        /// The attempt that waits.
        new: Hold,
        /// The agent that refused it.
        hold_back: Option<String>,
    },
    /// It is to be ended on its agent.
    Terminate,
}

/// Characters of a refusal's reason that are kept.
const REASON_CHARS_MAX: usize = 200;

/// What an agent said to a dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It has it.
    Accepted,
    /// Not now: back to the queue, for this reason.
    Back(String),
    /// Nobody is there. Who was never asked before has not taken it; who was may have lost its way to the bus since.
    Nobody,
    /// Never, for this reason.
    Unfit(String),
    /// Nobody knows, or it is not the dispatcher's to say.
    Unknown,
}

/// What the reason of a refusal means. Without one it is refused for now. An attempt that its agent was told to end may have
/// run there: it does not run once more. Whoever told it that says what becomes of it, or the watchdog finds it again.
#[must_use]
pub fn refused(reason: Option<&str>) -> Answer {
    match reason.unwrap_or("refused") {
        UNSUPPORTED => Answer::Unfit(UNSUPPORTED.to_owned()),
        TERMINATED => Answer::Unknown,
        reason => Answer::Back(reason.chars().take(REASON_CHARS_MAX).collect()),
    }
}

/// The hold of an attempt.
#[must_use]
pub fn hold(execution: &Execution, attempt: u32) -> Hold {
    Hold::new(execution.id().as_str(), attempt)
}

/// Whether the log gives this attempt a slot.
#[must_use]
pub fn holds(execution: Option<&Execution>, hold: &Hold) -> bool {
    execution.and_then(Execution::holder).is_some_and(|held| held.number == hold.attempt)
}

/// The queue an execution waits in.
#[must_use]
pub fn queue_of(execution: &Execution) -> Queue {
    match &execution.request.agent_id {
        Some(agent) => Queue::Agent(agent.as_str().to_owned()),
        None if execution.is_external() => Queue::External,
        None => Queue::Pool,
    }
}

/// Its priority.
#[must_use]
pub fn priority_of(execution: &Execution) -> Priority {
    Priority::new(execution.request.priority).unwrap_or_default()
}

/// What a change means for capacity.
#[must_use]
pub fn effects(change: &Change) -> Vec<Effect> {
    let Some(before) = &change.before else { return Vec::new() };
    let after = &change.after;
    if before.state == after.state && before.attempt == after.attempt {
        return Vec::new();
    }
    match after.state {
        state if state.is_terminal() => {
            if before.state.is_terminal() {
                return Vec::new();
            }
            // A late completion of attempt n takes attempt n + 1 out of its queue.
            let mut ended = vec![Effect::Settle(hold(before, before.attempt))];
            if after.attempt != before.attempt {
                ended.push(Effect::Settle(hold(after, after.attempt)));
            }
            ended
        }
        State::Queued if before.attempt != after.attempt => vec![Effect::Requeue {
            old: hold(before, before.attempt),
            new: hold(after, after.attempt),
            hold_back: returned_again(after),
        }],
        State::Queued => vec![Effect::Requeue {
            old: hold(before, before.attempt),
            new: hold(after, after.attempt),
            hold_back: before.holder().map(|a| a.agent_id.as_str().to_owned()),
        }],
        State::Cancelling => vec![Effect::Terminate],
        _ => Vec::new(),
    }
}

/// Who handed this back twice in a row. `returned` is no loss and has no other bound: nothing more goes there before its
/// next heartbeat, or it would come and go as fast as the bus is.
fn returned_again(execution: &Execution) -> Option<String> {
    let mut latest = execution.attempts.iter().rev();
    let (now, before) = (latest.next()?, latest.next()?);
    let returned = |attempt: &Attempt| attempt.reports.contains(&Outcome::Returned);
    let again = returned(now) && returned(before) && now.agent_id == before.agent_id;
    again.then(|| now.agent_id.as_str().to_owned())
}

/// An effect as it is due when the log has come to `now`: what does not wait any more gets no place in a queue, because
/// whoever ended it or took it further has seen to that attempt; what held before is released all the same.
#[must_use]
pub fn still_due(effect: Effect, now: Option<&Execution>) -> Effect {
    match effect {
        Effect::Requeue { old, new, .. }
            if now.is_none_or(|e| e.state.is_terminal() || e.attempt != new.attempt) =>
        {
            Effect::Settle(old)
        }
        due => due,
    }
}

/// What Redis has to know of an agent.
#[must_use]
pub fn setting(agent: &Agent) -> AgentSetting {
    AgentSetting {
        capacity: agent.capacity(),
        open: agent.takes_work(),
        // It has no NATS: nobody could dispatch anything to it.
        external_only: agent.is_from_file(),
        setting_seq: agent.seq,
    }
}

/// Why an agent takes no work now. `None`: it does.
#[must_use]
pub fn closed(agent: &Agent) -> Option<&'static str> {
    if agent.takes_work() {
        None
    } else if agent.operator_drain.is_some() || agent.instance_drain.is_some() {
        Some("draining")
    } else if agent.quarantined.is_some() {
        Some("quarantined")
    } else {
        Some(agent.status.map_or("unknown", Status::as_str))
    }
}

/// Whether an execution is still in the very dispatch that `held` was, and its agent has not answered: put back by somebody
/// else it may have been dispatched again, elsewhere and as the same attempt, and what one agent says is nothing about another.
#[must_use]
pub fn is_in_dispatch(execution: &Execution, held: &Attempt) -> bool {
    execution.state == State::Dispatching && is_of_dispatch(execution, held)
}

/// Whether what an execution does now came of the very dispatch that `held` was, whatever its state.
#[must_use]
pub fn is_of_dispatch(execution: &Execution, held: &Attempt) -> bool {
    let same = |now: &Attempt| {
        (now.number, now.dispatched_at) == (held.number, held.dispatched_at)
            && (&now.agent_id, &now.instance_id) == (&held.agent_id, &held.instance_id)
    };
    execution.holder().is_some_and(same)
}

/// The event of a dispatch that its agent accepted, if the execution still is in that one.
pub fn accepted(execution: &Execution, held: &Attempt) -> Result<ExecutionEvent, Refusal> {
    if is_of_dispatch(execution, held) {
        execution.start(held.number)
    } else {
        Err(Refusal::State(execution.state.as_str()))
    }
}

/// The event of a dispatch that its agent can never do, if the execution still is in that one.
pub fn unfit(execution: &Execution, held: &Attempt, reason: &str) -> Result<ExecutionEvent, Refusal> {
    let facts = ReportFacts {
        agent_id: held.agent_id.clone(),
        instance_id: held.instance_id.clone(),
        attempt: held.number,
        outcome: Outcome::Failed,
        result: None,
        checkpoint: None,
        error: Some(ErrorBody {
            code: reason.to_owned(),
            message: format!("agent {} refused the dispatch: {reason}", held.agent_id),
        }),
    };
    let failed = if is_of_dispatch(execution, held) { execution.report(facts) } else { None };
    failed.ok_or(Refusal::State(execution.state.as_str()))
}

/// Whether nobody could dispatch this to the agent that it was granted: it has no NATS, and somebody else may take it.
/// Work that names this very agent has nowhere else to go; its dispatch fails.
#[must_use]
pub fn is_out_of_reach(execution: &Execution, agent: &Agent) -> bool {
    agent.is_from_file() && !execution.is_external() && execution.request.agent_id.is_none()
}

/// Everything that Redis has to hold for a pool, from the log. Work is offered to the `members`, which no other pool has.
#[must_use]
pub fn load_of(pool: &Pool, members: &BTreeSet<AgentId>, projection: &Projection) -> Vec<Load> {
    let agents = projection
        .agents()
        .filter(|agent| agent.pool() == *pool && members.contains(&agent.id))
        .map(|agent| Load::Agent { agent: agent.id.as_str().to_owned(), setting: setting(agent) });
    let work =
        projection.open().filter(|execution| projection.pool_of(execution) == *pool).map(place_of_load);
    agents.chain(work).collect()
}

fn place_of_load(execution: &Execution) -> Load {
    match execution.holder() {
        Some(held) => Load::Slot {
            agent: held.agent_id.as_str().to_owned(),
            hold: hold(execution, held.number),
            granted_at_ms: millis(held.dispatched_at),
        },
        None => Load::Queued {
            queue: queue_of(execution),
            hold: hold(execution, execution.attempt),
            priority: priority_of(execution),
            order: order_of(execution),
        },
    }
}

/// The order inside a priority that a rebuild gives: by submission; what was put back goes before, last put back first.
fn order_of(execution: &Execution) -> i64 {
    let seq = |seq: u64| {
        i64::try_from(seq).unwrap_or(rollcall_capacity::MAX_ORDER).min(rollcall_capacity::MAX_ORDER)
    };
    if execution.at_head { -seq(execution.seq) } else { seq(execution.submitted_seq) }
}

/// What an agent has by the log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Belongings {
    /// What holds its slots, and since when, milliseconds since 1970.
    pub held: Vec<(Hold, u64)>,
    /// What waits in its queue, the last one first.
    pub waiting: Vec<ExecutionId>,
}

/// What `agent` has by the log.
#[must_use]
pub fn belongings(agent: &AgentId, projection: &Projection) -> Belongings {
    let holds = |e: &&Execution| e.holder().is_some_and(|held| held.agent_id == *agent);
    let waits = |e: &&Execution| e.holder().is_none() && e.request.agent_id.as_ref() == Some(agent);
    let held = projection
        .open()
        .filter(holds)
        .filter_map(|e| e.holder().map(|held| (hold(e, held.number), millis(held.dispatched_at))));
    Belongings { held: held.collect(), waiting: last_first(projection.open().filter(waits)) }
}

/// Executions that wait, the last one of each priority first: put at the head one by one, they come to be in their order.
#[must_use]
pub fn last_first<'a>(waiting: impl Iterator<Item = &'a Execution>) -> Vec<ExecutionId> {
    let mut ordered: Vec<&Execution> = waiting.collect();
    ordered.sort_by_key(|execution| std::cmp::Reverse(order_of(execution)));
    ordered.into_iter().map(|execution| execution.id().clone()).collect()
}

/// Milliseconds since 1970 as Redis counts them.
#[must_use]
pub fn millis(time: Timestamp) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(0)
}

/// What is wrong with a hold in Redis, by the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misplaced {
    /// It holds a slot and the log says it waits: a promotion that nobody carried out.
    Promoted,
    /// It is on another agent, or waits, and the log says where it runs.
    Elsewhere {
        /// Where it runs.
        agent: AgentId,
        /// Since when, milliseconds since 1970.
        since_ms: u64,
    },
    /// It waits, in another queue than its submission names.
    WrongQueue,
    /// The log gives it nothing: a leak.
    Leaked,
}

/// Compares one place in Redis with the log. `None`: as it should be.
#[must_use]
pub fn misplaced(execution: Option<&Execution>, found: &Hold, place: &Place) -> Option<Misplaced> {
    let entitled = execution.filter(|e| e.attempt == found.attempt && !e.state.is_terminal());
    let Some(execution) = entitled else { return Some(Misplaced::Leaked) };
    match (execution.holder(), place) {
        (None, Place::Waiting(queue)) if *queue != queue_of(execution) => Some(Misplaced::WrongQueue),
        (None, Place::Waiting(_)) => None,
        (None, Place::Slot { .. }) => Some(Misplaced::Promoted),
        (Some(held), Place::Slot { agent, .. }) if held.agent_id.as_str() == agent => None,
        (Some(held), _) => {
            Some(Misplaced::Elsewhere { agent: held.agent_id.clone(), since_ms: millis(held.dispatched_at) })
        }
    }
}

/// What is to be done about an admission or promotion that nobody has confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// Its submission may still be on its way into the log; or it was put to use since it was found.
    Leave,
    /// A promotion that nobody carried out.
    Launch,
    /// The log says what Redis has not been told.
    Confirm,
    /// Nobody is entitled to it.
    Settle,
}

/// Judges an unconfirmed `hold` by what the log says of its execution now, which is later than when it was found.
/// `in_slot`: it was found in a slot, and not in a queue. `expired`: a submission would be in the log by now.
#[must_use]
pub fn unfinished(fresh: Option<&Execution>, hold: &Hold, in_slot: bool, expired: bool) -> Unfinished {
    let Some(execution) = fresh else {
        return if expired { Unfinished::Settle } else { Unfinished::Leave };
    };
    let waits = execution.state == State::Queued && execution.attempt == hold.attempt;
    let runs = execution.holder().is_some_and(|held| held.number == hold.attempt);
    match (waits, runs, in_slot) {
        (true, _, true) => Unfinished::Launch,
        (true, _, false) | (_, true, true) => Unfinished::Confirm,
        // Promoted and put to use since it was found: settling would take the slot of what runs.
        (_, true, false) => Unfinished::Leave,
        (false, false, _) => Unfinished::Settle,
    }
}

/// Open executions of a pool that have no place among `found`; those that wait last, the last one of each priority first.
#[must_use]
pub fn missing<'a>(
    pool: &Pool,
    projection: &'a Projection,
    found: &BTreeMap<Hold, Place>,
) -> Vec<&'a Execution> {
    let mut missing: Vec<&Execution> = projection
        .open()
        .filter(|execution| projection.pool_of(execution) == *pool)
        .filter(|execution| !found.contains_key(&hold(execution, execution.attempt)))
        .collect();
    missing.sort_by_key(|execution| (execution.holder().is_none(), std::cmp::Reverse(order_of(execution))));
    missing
}

#[cfg(test)]
mod tests;
