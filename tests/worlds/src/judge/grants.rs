//! What agents are given: never more than they can hold, and nothing while an operator drains them.

use std::collections::{BTreeMap, BTreeSet};

use rollcall_core::{
    AgentId, ExecutionId,
    agent::Agent,
    event::{AgentEvent, EventBody, ExecutionEvent},
    execution::{Execution, State},
};

use super::{Verdict, broken};
use crate::{log::Entry, stage::Stage};

/// A lowered capacity is everybody's after this, unless all who could tell it stand still: the way to who follows the log.
pub(super) const LOWERED_MS: u64 = 2_500;
/// The longest way from the look at an agent to the dispatch in the log: a rebuild of capacity can lie in between.
const LAUNCH_MS: u64 = 6_000;

/// How long services stood still in the time of `window` before `at`, all together.
pub(super) fn stood_still(stage: &Stage, at: u64, window: u64) -> u64 {
    let from = at.saturating_sub(window);
    let truth = stage.truth.borrow();
    let within =
        truth.stood.iter().map(|(_, since, until)| (*until).min(at).saturating_sub((*since).max(from)));
    within.sum()
}

/// Invariant 1: nothing is put to an agent that was given as much as it can hold and has it still by the log. What is
/// dispatched by the log and was never put to its agent counts only when it is.
pub(super) fn grants(stage: &Stage) -> Verdict {
    let log = stage.log.borrow();
    let truth = stage.truth.borrow();
    let mut books = Books::default();
    let mut entries = log.entries().iter().peekable();
    for (at, agent, id, attempt) in &truth.asked {
        while let Some(entry) = entries.next_if(|entry| entry.landed_at <= *at) {
            books.enter(entry);
        }
        let known_late = LOWERED_MS + stood_still(stage, *at, LOWERED_MS);
        books.moved_back_at = truth.moved_back.iter().rev().find(|back| *back <= at).copied();
        books.unseen =
            truth.granted.keys().filter(|(id, number)| truth.overlooks(id, *number, *at)).cloned().collect();
        books
            .ask(agent, id, *attempt, at.saturating_sub(known_late))
            .map_err(|what| broken(1, format!("at {at} ms {what}")))?;
    }
    Ok(())
}

/// What each agent can hold by the log, since when.
#[derive(Default)]
pub(super) struct Capacities(BTreeMap<AgentId, Vec<(u64, u32)>>);

impl Capacities {
    pub(super) fn enter(&mut self, entry: &Entry) {
        if let EventBody::Agent(AgentEvent::Registered(profile) | AgentEvent::Updated(profile)) =
            &entry.event.body
        {
            let said = self.0.entry(profile.agent_id.clone()).or_default();
            said.push((entry.landed_at, profile.capacity));
        }
    }

    /// The most that it held at any time since then.
    pub(super) fn at_most(&self, agent: &AgentId, since: u64) -> usize {
        let said = self.0.get(agent).map_or(&[][..], Vec::as_slice);
        let first = said.partition_point(|(from, _)| *from <= since).saturating_sub(1);
        said[first..].iter().map(|(_, capacity)| *capacity).max().unwrap_or(0) as usize
    }
}

/// Who has what by the log, and what of it was put to its agent.
#[derive(Default)]
struct Books {
    executions: BTreeMap<ExecutionId, Execution>,
    capacities: Capacities,
    given: BTreeMap<AgentId, BTreeSet<(ExecutionId, u32)>>,
    /// When what the log gives was dispatched, by its last dispatch.
    dispatched: BTreeMap<ExecutionId, u64>,
    /// What orchestrators were given, and capacity does not know of.
    unseen: BTreeSet<(ExecutionId, u32)>,
    /// When capacity went back to an older state for the last time.
    moved_back_at: Option<u64>,
}

impl Books {
    fn enter(&mut self, entry: &Entry) {
        match &entry.event.body {
            EventBody::Agent(_) => self.capacities.enter(entry),
            EventBody::Execution(event) => {
                let id = event.execution_id();
                if let ExecutionEvent::Submitted(request) = event
                    && !self.executions.contains_key(id)
                {
                    let new = Execution::submitted(request.clone(), entry.seq, entry.event.time);
                    self.executions.insert(id.clone(), new);
                    return;
                }
                let Some(execution) = self.executions.get_mut(id) else { return };
                if let ExecutionEvent::Dispatched(held) = event {
                    self.dispatched.insert(id.clone(), entry.landed_at);
                    if execution.is_external() {
                        let given = self.given.entry(held.agent_id.clone()).or_default();
                        given.insert((id.clone(), held.attempt));
                    }
                }
                let _ = execution.evolve(entry.seq, event, entry.event.time);
                let holder = execution.holder().map(|held| (held.agent_id.clone(), held.number));
                for (agent, given) in &mut self.given {
                    given.retain(|(of, number)| of != id || holder == Some((agent.clone(), *number)));
                }
            }
            _ => {}
        }
    }

    /// `known_since`: what was said of a capacity before then is known, and nothing older counts.
    fn ask(
        &mut self,
        agent: &AgentId,
        id: &ExecutionId,
        attempt: u32,
        known_since: u64,
    ) -> Result<(), String> {
        let holder = self.executions.get(id).and_then(Execution::holder);
        if !holder.is_some_and(|held| held.agent_id == *agent && held.number == attempt) {
            // The log has gone on since: it is nobody's any more, and the answer will change nothing.
            return Ok(());
        }
        let given = self.given.entry(agent.clone()).or_default();
        if !given.insert((id.clone(), attempt)) {
            // It was put to it before, and may be more by now than the agent wants to hold.
            return Ok(());
        }
        let capacity = self.capacities.at_most(agent, known_since);
        // That capacity went back behind a dispatch is known to nobody but its dispatcher until its agent has accepted.
        let lost = |id: &ExecutionId| {
            self.executions.get(id).is_some_and(|e| e.state == State::Dispatching)
                && self.dispatched.get(id).copied() <= self.moved_back_at
        };
        let known = given
            .iter()
            .filter(|held| held.0 == *id || !(lost(&held.0) || self.unseen.contains(held)))
            .count();
        if known > capacity {
            return Err(format!("{agent} is asked to take {id}:{attempt} and has {given:?}, of {capacity}"));
        }
        Ok(())
    }
}

/// Invariant 1 as well: who is drained by an operator, by the log and for longer than a launch takes, is given nothing.
pub(super) fn drains(stage: &Stage) -> Verdict {
    let mut agents: BTreeMap<AgentId, Agent> = BTreeMap::new();
    let mut drained: BTreeMap<AgentId, u64> = BTreeMap::new();
    for entry in stage.log.borrow().entries() {
        match &entry.event.body {
            EventBody::Agent(event) => {
                let id = event.agent_id();
                let agent = agents.entry(id.clone()).or_insert_with(|| Agent::unknown(id.clone()));
                agent.evolve(entry.seq, event, entry.event.time);
                if agent.operator_drain.is_some() {
                    drained.entry(id.clone()).or_insert(entry.landed_at);
                } else {
                    drained.remove(id);
                }
            }
            EventBody::Execution(ExecutionEvent::Dispatched(event)) => {
                let Some(since) = drained.get(&event.agent_id) else { continue };
                let late = entry.decided_at.saturating_sub(*since);
                if late > LAUNCH_MS + stood_still(stage, entry.decided_at, late) {
                    let what = format!(
                        "{} got {} {late} ms after it was drained",
                        event.agent_id, event.execution_id
                    );
                    return Err(broken(1, what));
                }
            }
            _ => {}
        }
    }
    Ok(())
}
