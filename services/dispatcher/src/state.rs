//! What the dispatcher knows: the log, folded. Plain data; the shell keeps it behind one short lock.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use rollcall_core::{
    AgentId, ExecutionId, Pool, Timestamp,
    agent::Agent,
    event::{AgentEvent, ExecutionEvent},
    execution::{Attempt, Execution, Misfit, State},
};

/// Ended executions that stay in memory; older ones are read back from the log when somebody asks.
/// At about 1.5 KiB each: some 30 MiB.
pub const ENDED_KEPT_MAX: usize = 20_000;

/// How old a dispatch or a cancellation must be before whoever looks takes it up, whoever began it, in milliseconds: each
/// longer than its ordinary way takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeUpAges {
    /// A dispatch.
    pub dispatch_ms: u64,
    /// A cancellation.
    pub cancel_ms: u64,
}

impl TakeUpAges {
    const fn of(self, state: State) -> u64 {
        if matches!(state, State::Cancelling) { self.cancel_ms } else { self.dispatch_ms }
    }
}

/// One change to an execution.
#[derive(Debug, Clone)]
pub struct Change {
    /// Before; `None`: it was just submitted.
    pub before: Option<Execution>,
    /// After.
    pub after: Execution,
}

/// An event of an execution where it lies in the log.
#[derive(Debug, Clone, Copy)]
pub struct Logged<'a> {
    /// Its sequence.
    pub seq: u64,
    /// What it says.
    pub event: &'a ExecutionEvent,
    /// When it was written.
    pub time: Timestamp,
    /// Somebody other than a dispatcher wrote it.
    pub foreign: bool,
}

/// The fold of the log.
#[derive(Debug, Default)]
pub struct Projection {
    executions: HashMap<ExecutionId, Execution>,
    agents: HashMap<AgentId, Agent>,
    /// Open executions in the order of their ids, for lists.
    open: BTreeSet<ExecutionId>,
    /// Queued executions by the time they expire.
    expiries: BTreeSet<(Timestamp, ExecutionId)>,
    /// Executions whose agent has not answered a dispatch or a cancellation, by how long.
    unanswered: BTreeSet<(Timestamp, ExecutionId)>,
    /// Dispatches that nobody has accepted yet, with the sequences of their events.
    dispatched: HashMap<ExecutionId, (Pool, u64)>,
    /// How far each pool's capacity has reflected the log, by the log.
    reflected: BTreeMap<Pool, u64>,
    /// Ended executions, oldest first.
    ended: VecDeque<ExecutionId>,
    /// Some ended ones were dropped.
    forgotten: bool,
}

impl Projection {
    /// Folds an event of an execution in. `Ok(None)`: known already. An event of an execution whose beginning is
    /// not in memory (evicted) is not folded: whoever needs it reads its history.
    pub fn apply_execution(
        &mut self,
        seq: u64,
        event: &ExecutionEvent,
        time: Timestamp,
    ) -> Result<Option<Change>, Misfit> {
        let id = event.execution_id();
        let Some(known) = self.executions.get_mut(id) else {
            if let ExecutionEvent::Submitted(request) = event {
                let after = Execution::submitted(request.clone(), seq, time);
                self.insert(after.clone());
                return Ok(Some(Change { before: None, after }));
            }
            return Ok(None);
        };
        if seq <= known.seq {
            return Ok(None);
        }
        let before = known.clone();
        known.evolve(seq, event, time)?;
        let after = known.clone();
        self.note_reflected(seq, event, &after);
        self.reindex(Some(&before), &after);
        Ok(Some(Change { before: Some(before), after }))
    }

    /// Takes over an execution's whole history, as far as `last`, unless more of it is here. A read can be ahead of the tail,
    /// which skips what is folded already: so the changes that others made and that are news here come back, in their
    /// order, for whoever reads to have them carried out. Of an execution that is not here the tail has delivered what
    /// lies at or below `delivered`.
    pub fn catch_up<'a>(
        &mut self,
        history: impl IntoIterator<Item = Logged<'a>>,
        last: u64,
        delivered: u64,
    ) -> (Option<Execution>, Vec<Change>) {
        let mut folded: Option<Execution> = None;
        let mut changes = Vec::new();
        for Logged { seq, event, time, foreign } in history {
            let Some(execution) = &mut folded else {
                folded = Execution::fold([(seq, event, time)]);
                continue;
            };
            let known = self.executions.get(execution.id()).map_or(delivered, |known| known.seq);
            let before = (foreign && seq > known).then(|| execution.clone());
            // A misfit changes nothing but the sequence.
            if execution.evolve(seq, event, time).is_ok()
                && let Some(before) = before
            {
                changes.push(Change { before: Some(before), after: execution.clone() });
            }
        }
        if let Some(execution) = &mut folded {
            // An invalid entry at the end counts for the next append all the same.
            execution.seq = execution.seq.max(last);
            self.insert(execution.clone());
        }
        (folded, changes)
    }

    /// Before an agent was asked, its slot was confirmed with the sequence of its dispatch: an agent that accepted proves that, of
    /// the pool in which it was then.
    fn note_reflected(&mut self, seq: u64, event: &ExecutionEvent, after: &Execution) {
        match event {
            ExecutionEvent::Dispatched(_) => {
                let pool = self.pool_of(after);
                self.dispatched.insert(after.id().clone(), (pool, seq));
            }
            ExecutionEvent::Started(_) => {
                if let Some((pool, dispatched)) = self.dispatched.get(after.id()) {
                    let reflected = self.reflected.entry(pool.clone()).or_default();
                    *reflected = (*dispatched).max(*reflected);
                }
            }
            _ => {}
        }
    }

    /// How far each pool's capacity has reflected the log, at least.
    #[must_use]
    pub const fn reflected(&self) -> &BTreeMap<Pool, u64> {
        &self.reflected
    }

    /// Takes over an execution, unless a later one is here.
    pub fn insert(&mut self, execution: Execution) {
        let before = self.executions.get(execution.id()).cloned();
        if before.as_ref().is_some_and(|b| b.seq >= execution.seq) {
            return;
        }
        self.executions.insert(execution.id().clone(), execution.clone());
        self.reindex(before.as_ref(), &execution);
    }

    fn reindex(&mut self, before: Option<&Execution>, after: &Execution) {
        let id = after.id();
        let (was, is) = (before.and_then(Execution::expires_at), after.expires_at());
        if was != is {
            if let Some(at) = was {
                self.expiries.remove(&(at, id.clone()));
            }
            if let Some(at) = is {
                self.expiries.insert((at, id.clone()));
            }
        }
        if after.state != State::Dispatching {
            self.dispatched.remove(id);
        }
        let (was, is) = (before.and_then(unanswered_since), unanswered_since(after));
        if was != is {
            if let Some(since) = was {
                self.unanswered.remove(&(since, id.clone()));
            }
            if let Some(since) = is {
                self.unanswered.insert((since, id.clone()));
            }
        }
        if after.state.is_terminal() {
            if self.open.remove(id) || before.is_none() {
                self.ended.push_back(id.clone());
                self.evict();
            }
        } else {
            self.open.insert(id.clone());
        }
    }

    fn evict(&mut self) {
        while self.ended.len() > ENDED_KEPT_MAX {
            let Some(id) = self.ended.pop_front() else { return };
            // Retried meanwhile: it is open and will be put at the end of the list when it ends again.
            if self.executions.get(&id).is_some_and(|e| e.state.is_terminal()) {
                self.executions.remove(&id);
                self.forgotten = true;
            }
        }
    }

    /// Folds an event of an agent in. `true`: it was news.
    pub fn apply_agent(&mut self, seq: u64, event: &AgentEvent, time: Timestamp) -> bool {
        let id = event.agent_id();
        let agent = self.agents.entry(id.clone()).or_insert_with(|| Agent::unknown(id.clone()));
        let news = seq > agent.seq;
        agent.evolve(seq, event, time);
        news
    }

    /// An execution.
    #[must_use]
    pub fn execution(&self, id: &ExecutionId) -> Option<&Execution> {
        self.executions.get(id)
    }

    /// An agent that was heard of.
    #[must_use]
    pub fn agent(&self, id: &AgentId) -> Option<&Agent> {
        self.agents.get(id).filter(|a| a.is_known())
    }

    /// All agents.
    pub fn agents(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values().filter(|a| a.is_known())
    }

    /// All open executions, in the order of their ids.
    pub fn open(&self) -> impl Iterator<Item = &Execution> {
        self.open.iter().filter_map(|id| self.executions.get(id))
    }

    /// Whether ended executions are no longer in memory.
    #[must_use]
    pub const fn has_forgotten(&self) -> bool {
        self.forgotten
    }

    /// All executions in memory in the order of their ids.
    #[must_use]
    pub fn ids(&self, state: Option<State>) -> Vec<ExecutionId> {
        let mut ids: Vec<ExecutionId> = match state {
            Some(state) if !state.is_terminal() => self.open.iter().cloned().collect(),
            _ => self.executions.keys().cloned().collect(),
        };
        ids.sort_unstable();
        ids
    }

    /// The pool whose keys hold this execution's slot or place now: its holder's, its agent's, or the one asked for.
    #[must_use]
    pub fn pool_of(&self, execution: &Execution) -> Pool {
        let agent = match execution.holder() {
            Some(held) => Some(&held.agent_id),
            None => execution.request.agent_id.as_ref(),
        };
        agent.and_then(|id| self.agent(id)).map_or_else(|| execution.request.pool.clone(), Agent::pool)
    }

    /// Every pool that has an agent or open work.
    #[must_use]
    pub fn pools(&self) -> BTreeSet<Pool> {
        let of_agents = self.agents().map(Agent::pool);
        let of_work = self.open().map(|execution| self.pool_of(execution));
        of_agents.chain(of_work).collect()
    }

    /// When the next queued execution expires.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Timestamp> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// Executions that have waited too long, at most `limit`.
    #[must_use]
    pub fn expired(&self, now: Timestamp, limit: usize) -> Vec<ExecutionId> {
        self.expiries.iter().take_while(|(at, _)| *at <= now).take(limit).map(|(_, id)| id.clone()).collect()
    }

    /// Executions that have been dispatched, or are to end, for so long at least and whose agent has not answered: their
    /// state and the attempt that it is about.
    #[must_use]
    pub fn unanswered(&self, now: Timestamp, ages: TakeUpAges) -> Vec<(ExecutionId, State, Attempt)> {
        let least = ages.dispatch_ms.min(ages.cancel_ms);
        self.unanswered
            .iter()
            .take_while(|(since, _)| now.since_ms(*since) >= least)
            .filter_map(|(since, id)| Some((since, self.executions.get(id)?)))
            .filter(|(since, e)| now.since_ms(**since) >= ages.of(e.state))
            .filter_map(|(_, e)| Some((e.id().clone(), e.state, e.holder()?.clone())))
            .collect()
    }

    /// Whether anything waits in a queue.
    #[must_use]
    pub fn anything_waits(&self) -> bool {
        !self.expiries.is_empty()
    }
}

/// Since when an execution waits for its agent's answer, if it does.
fn unanswered_since(execution: &Execution) -> Option<Timestamp> {
    matches!(execution.state, State::Dispatching | State::Cancelling).then_some(execution.state_since)
}
