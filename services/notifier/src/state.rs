//! The read model: agents, executions and counts, folded from the log and bounded in memory.
//!
//! An execution that ended long enough ago is forgotten here and read from the log when somebody asks; the counts
//! keep it.

use std::collections::{BTreeMap, HashMap};

use rollcall_core::{
    AgentId, ExecutionId, Pool, Timestamp,
    agent::{Agent, Status},
    event::{Event, EventBody, ExecutionEvent, RecoveryReason},
    execution::{Execution, State},
};

/// Ended executions that are kept in memory; older ones are read from the log.
pub const ENDED_KEPT_MAX: usize = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Facet<'a> {
    state: State,
    holder: Option<&'a AgentId>,
}

/// What became of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// Folded, or a repetition; the pool it concerns, where it is known.
    Folded(Option<Pool>),
    /// A valid event that cannot follow what is in the log already: its text says why.
    Misfit(String),
    /// It is about an execution that is not in memory: [`Model::restore`] it from its history, then apply again.
    NeedsHistory,
}

/// How many recoveries there were.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recoveries {
    /// By reason.
    pub by_reason: BTreeMap<&'static str, u64>,
    /// By what became of the execution.
    pub by_action: BTreeMap<&'static str, u64>,
    /// Executions that completed after they had been recovered: the verdict was wrong or early.
    pub late_completions: u64,
}

impl Recoveries {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_reason.values().sum()
    }
}

/// Everything that is folded.
#[derive(Debug)]
pub struct Model {
    agents: BTreeMap<AgentId, Agent>,
    executions: HashMap<ExecutionId, Execution>,
    /// In the order of submission.
    order: BTreeMap<u64, ExecutionId>,
    /// The same, apart for each state.
    order_of: BTreeMap<State, BTreeMap<u64, ExecutionId>>,
    /// The ended ones, by their last event: who is forgotten first.
    ended: BTreeMap<u64, ExecutionId>,
    ended_kept_max: usize,
    /// How many executions are in each state, forgotten ones included.
    by_state: BTreeMap<State, u64>,
    forgotten: u64,
    held: HashMap<AgentId, u32>,
    recoveries: Recoveries,
    last: Option<(u64, Timestamp)>,
}

impl Default for Model {
    fn default() -> Self {
        Self::new(ENDED_KEPT_MAX)
    }
}

impl Model {
    /// An empty model that keeps so many ended executions.
    #[must_use]
    pub fn new(ended_kept_max: usize) -> Self {
        Self {
            agents: BTreeMap::new(),
            executions: HashMap::new(),
            order: BTreeMap::new(),
            order_of: BTreeMap::new(),
            ended: BTreeMap::new(),
            ended_kept_max,
            by_state: BTreeMap::new(),
            forgotten: 0,
            held: HashMap::new(),
            recoveries: Recoveries::default(),
            last: None,
        }
    }

    /// Folds one valid event of the log in.
    pub fn apply(&mut self, seq: u64, event: &Event) -> Applied {
        if let EventBody::Execution(body) = &event.body
            && !matches!(body, ExecutionEvent::Submitted(_))
            && !self.executions.contains_key(body.execution_id())
        {
            return Applied::NeedsHistory;
        }
        self.last = Some((seq, event.time));
        match &event.body {
            EventBody::System(_) => Applied::Folded(None),
            EventBody::Agent(body) => {
                let id = body.agent_id();
                let agent = self.agents.entry(id.clone()).or_insert_with(|| Agent::unknown(id.clone()));
                agent.evolve(seq, body, event.time);
                Applied::Folded(agent.is_known().then(|| agent.pool()))
            }
            EventBody::Execution(body) => self.apply_execution(seq, body, event.time),
        }
    }

    fn apply_execution(&mut self, seq: u64, event: &ExecutionEvent, time: Timestamp) -> Applied {
        let id = event.execution_id();
        let Some(execution) = self.executions.get_mut(id) else {
            let ExecutionEvent::Submitted(request) = event else { return Applied::NeedsHistory };
            let execution = Execution::submitted(request.clone(), seq, time);
            let pool = request.pool.clone();
            *self.by_state.entry(execution.state).or_default() += 1;
            self.list(&execution);
            self.executions.insert(id.clone(), execution);
            return Applied::Folded(Some(pool));
        };
        let pool = Some(execution.request.pool.clone());
        if seq <= execution.seq {
            return Applied::Folded(pool);
        }
        let (state_before, seq_before, submitted_seq) =
            (execution.state, execution.seq, execution.submitted_seq);
        let holder_before = execution.holder().map(|a| a.agent_id.clone());
        let folded = execution.evolve(seq, event, time);
        let (state, holder) = (execution.state, execution.holder().map(|a| a.agent_id.clone()));
        self.move_counts(
            Facet { state: state_before, holder: holder_before.as_ref() },
            Facet { state, holder: holder.as_ref() },
        );
        if state != state_before {
            self.unlist(state_before, submitted_seq);
            self.order_of.entry(state).or_default().insert(submitted_seq, id.clone());
        }
        self.ended.remove(&seq_before);
        if state.is_terminal() {
            self.ended.insert(seq, id.clone());
        }
        if let Err(misfit) = folded {
            return Applied::Misfit(misfit.to_string());
        }
        self.count_recovery(event);
        self.forget_oldest();
        Applied::Folded(pool)
    }

    fn list(&mut self, execution: &Execution) {
        let (seq, id) = (execution.submitted_seq, execution.id().clone());
        self.order_of.entry(execution.state).or_default().insert(seq, id.clone());
        self.order.insert(seq, id);
    }

    fn unlist(&mut self, state: State, submitted_seq: u64) {
        if let Some(order) = self.order_of.get_mut(&state) {
            order.remove(&submitted_seq);
        }
    }

    fn move_counts(&mut self, before: Facet<'_>, after: Facet<'_>) {
        if before.state != after.state {
            if let Some(count) = self.by_state.get_mut(&before.state) {
                *count = count.saturating_sub(1);
            }
            *self.by_state.entry(after.state).or_default() += 1;
        }
        if before.holder != after.holder {
            if let Some(agent) = before.holder
                && let Some(held) = self.held.get_mut(agent)
            {
                *held = held.saturating_sub(1);
                if *held == 0 {
                    self.held.remove(agent);
                }
            }
            if let Some(agent) = after.holder {
                *self.held.entry(agent.clone()).or_default() += 1;
            }
        }
    }

    fn count_recovery(&mut self, event: &ExecutionEvent) {
        match event {
            ExecutionEvent::Recovered(recovered) => {
                *self.recoveries.by_reason.entry(recovered.reason.as_str()).or_default() += 1;
                *self.recoveries.by_action.entry(recovered.action.as_str()).or_default() += 1;
            }
            ExecutionEvent::Completed(done) if done.late => self.recoveries.late_completions += 1,
            _ => {}
        }
    }

    fn forget_oldest(&mut self) {
        while self.ended.len() > self.ended_kept_max {
            let Some((_, id)) = self.ended.pop_first() else { return };
            if let Some(execution) = self.executions.remove(&id) {
                self.order.remove(&execution.submitted_seq);
                self.unlist(execution.state, execution.submitted_seq);
                self.forgotten += 1;
            }
        }
    }

    /// Takes back an execution that was forgotten, as it was before the event that needs it. It is in the counts.
    pub fn restore(&mut self, execution: Execution) {
        let id = execution.id().clone();
        if self.executions.contains_key(&id) {
            return;
        }
        self.forgotten = self.forgotten.saturating_sub(1);
        self.list(&execution);
        if execution.state.is_terminal() {
            self.ended.insert(execution.seq, id.clone());
        }
        self.executions.insert(id, execution);
    }

    /// An agent, if the log knows it.
    #[must_use]
    pub fn agent(&self, id: &AgentId) -> Option<&Agent> {
        self.agents.get(id).filter(|agent| agent.is_known())
    }

    /// All agents, by id.
    pub fn agents(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values().filter(|agent| agent.is_known())
    }

    /// Executions that hold a slot of this agent.
    #[must_use]
    pub fn held_by(&self, agent: &AgentId) -> u32 {
        self.held.get(agent).copied().unwrap_or_default()
    }

    /// Executions that hold a slot of any agent.
    #[must_use]
    pub fn held_in_all(&self) -> u64 {
        self.held.values().copied().map(u64::from).sum()
    }

    /// An execution that is in memory.
    #[must_use]
    pub fn execution(&self, id: &ExecutionId) -> Option<&Execution> {
        self.executions.get(id)
    }

    /// Executions in memory that were submitted before `before`, the newest first. With one state named only
    /// those in it are looked at.
    pub fn newest_first<'a>(
        &'a self,
        before: u64,
        states: &[State],
    ) -> Box<dyn Iterator<Item = &'a Execution> + 'a> {
        let by_id = |(_, id): (&u64, &'a ExecutionId)| self.executions.get(id);
        match states {
            [state] => match self.order_of.get(state) {
                Some(order) => Box::new(order.range(..before).rev().filter_map(by_id)),
                None => Box::new(std::iter::empty()),
            },
            _ => Box::new(self.order.range(..before).rev().filter_map(by_id)),
        }
    }

    /// How many executions are in each state, forgotten ones included.
    #[must_use]
    pub fn states(&self) -> BTreeMap<&'static str, u64> {
        State::ALL
            .into_iter()
            .map(|s| (s.as_str(), self.by_state.get(&s).copied().unwrap_or_default()))
            .collect()
    }

    /// How many agents have each status.
    #[must_use]
    pub fn statuses(&self) -> BTreeMap<&'static str, u64> {
        let all = [
            Status::Connected,
            Status::Degraded,
            Status::Disconnected,
            Status::Error,
            Status::Draining,
            Status::Gone,
        ];
        let mut counts: BTreeMap<_, _> = all.into_iter().map(|s| (s.as_str(), 0)).collect();
        for status in self.agents().filter_map(|agent| agent.status) {
            *counts.entry(status.as_str()).or_default() += 1;
        }
        counts
    }

    /// Recoveries since the log began.
    #[must_use]
    pub const fn recoveries(&self) -> &Recoveries {
        &self.recoveries
    }

    /// Ended executions that are no longer in memory.
    #[must_use]
    pub const fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Sequence and time of the last event folded.
    #[must_use]
    pub const fn last(&self) -> Option<(u64, Timestamp)> {
        self.last
    }

    /// The pool of an execution or agent in memory.
    #[must_use]
    pub fn pool_of(&self, about: &crate::entry::About) -> Option<Pool> {
        if let Some(pool) = &about.pool {
            return Some(pool.clone());
        }
        match (&about.execution, &about.agent) {
            (Some(execution), _) => self.execution(execution).map(|e| e.request.pool.clone()),
            (None, Some(agent)) => self.agent(agent).map(Agent::pool),
            (None, None) => None,
        }
    }
}

/// Names of all recovery reasons, for lists that show zeros.
#[must_use]
pub fn reasons() -> [&'static str; RecoveryReason::ALL.len()] {
    RecoveryReason::ALL.map(RecoveryReason::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{self, agent_id};
    use proptest::prelude::*;

    fn id(text: &str) -> ExecutionId {
        text.parse().unwrap()
    }

    fn fold(model: &mut Model, events: &[Event]) {
        for event in events {
            let seq = model.last().map_or(1, |(seq, _)| seq + 1);
            assert!(matches!(model.apply(seq, event), Applied::Folded(_)), "{event:?}");
        }
    }

    #[test]
    fn counts_and_slots_follow_an_execution() {
        let mut model = Model::default();
        fold(&mut model, &[samples::submitted("e1", None), samples::dispatched("e1", "a1", 1)]);
        assert_eq!(model.held_by(&agent_id("a1")), 1);
        assert_eq!(model.states()["dispatching"], 1);
        fold(&mut model, &[samples::recovered("e1", "a1", 1)]);
        assert_eq!(model.held_by(&agent_id("a1")), 0);
        assert_eq!((model.states()["failed"], model.states()["dispatching"]), (1, 0));
        assert_eq!(model.recoveries().total(), 1);
        fold(&mut model, &[samples::completed("e1", "a1", 1, true)]);
        assert_eq!(model.recoveries().late_completions, 1);
        assert_eq!(model.states()["completed"], 1);
    }

    #[test]
    fn repetitions_and_misfits_change_no_count() {
        let mut model = Model::default();
        fold(&mut model, &[samples::submitted("e1", None), samples::dispatched("e1", "a1", 1)]);
        let before = model.states();
        assert!(matches!(model.apply(2, &samples::dispatched("e1", "a1", 1)), Applied::Folded(_)));
        assert!(matches!(model.apply(3, &samples::dispatched("e1", "a2", 1)), Applied::Misfit(_)));
        assert_eq!(model.states(), before);
        assert_eq!(model.held_by(&agent_id("a2")), 0);
        assert_eq!(model.execution(&id("e1")).unwrap().seq, 3, "the misfit's sequence counts");
    }

    #[test]
    fn the_oldest_ended_are_forgotten_but_counted() {
        let mut model = Model::new(2);
        for n in 1..=4 {
            let name = format!("e{n}");
            fold(
                &mut model,
                &[
                    samples::submitted(&name, None),
                    samples::dispatched(&name, "a1", 1),
                    samples::recovered(&name, "a1", 1),
                ],
            );
        }
        assert!(model.execution(&id("e2")).is_none());
        assert!(model.execution(&id("e3")).is_some());
        assert_eq!((model.states()["failed"], model.forgotten()), (4, 2));
        assert_eq!(model.newest_first(u64::MAX, &[State::Failed]).count(), 2);
        assert_eq!(model.newest_first(u64::MAX, &[State::Dispatching]).count(), 0);
        assert_eq!(
            model.newest_first(u64::MAX, &[]).map(|e| e.id().as_str()).collect::<Vec<_>>(),
            ["e4", "e3"]
        );
    }

    #[test]
    fn a_forgotten_execution_comes_back_when_something_happens_to_it() {
        let mut model = Model::new(0);
        let history = [
            samples::submitted("e1", None),
            samples::dispatched("e1", "a1", 1),
            samples::recovered("e1", "a1", 1),
        ];
        fold(&mut model, &history);
        assert_eq!(model.forgotten(), 1);
        let retried = samples::retried("e1", 2);
        assert_eq!(model.apply(4, &retried), Applied::NeedsHistory);
        assert_eq!(model.last().unwrap().0, 3, "not folded yet");
        let bodies: Vec<_> = history
            .iter()
            .map(|e| match &e.body {
                EventBody::Execution(body) => body,
                _ => unreachable!("only execution events"),
            })
            .collect();
        let folded = Execution::fold(bodies.into_iter().zip(1..).map(|(b, seq)| (seq, b, samples::NOW)));
        model.restore(folded.unwrap());
        assert_eq!(model.apply(4, &retried), Applied::Folded(Some(Pool::default())));
        assert_eq!((model.states()["failed"], model.states()["queued"]), (0, 1));
        assert_eq!(model.forgotten(), 0);
        assert_eq!(model.execution(&id("e1")).unwrap().attempt, 2);
    }

    #[test]
    fn agents_appear_with_their_first_event() {
        let mut model = Model::default();
        fold(
            &mut model,
            &[samples::registered("a1", "blue"), samples::status("a1", Status::Connected, None)],
        );
        assert_eq!(model.statuses()["connected"], 1);
        assert_eq!(model.agent(&agent_id("a1")).unwrap().pool().as_str(), "blue");
        assert!(model.agent(&agent_id("a2")).is_none());
    }

    proptest! {
        /// However short the memory, counts are those of an unbounded model.
        #[test]
        fn forgetting_changes_no_count(kept in 0usize..4, ends in proptest::collection::vec(0u8..4, 1..30)) {
            let mut small = Model::new(kept);
            let mut large = Model::new(usize::MAX);
            let mut seq = 0;
            for (n, end) in ends.iter().enumerate() {
                let name = format!("e{n}");
                let mut events = vec![samples::submitted(&name, None)];
                if *end > 0 { events.push(samples::dispatched(&name, "a1", 1)); }
                if *end > 1 { events.push(samples::recovered(&name, "a1", 1)); }
                if *end > 2 && kept > 0 { events.push(samples::completed(&name, "a1", 1, true)); }
                for event in &events {
                    seq += 1;
                    small.apply(seq, event);
                    large.apply(seq, event);
                }
            }
            prop_assert_eq!(small.states(), large.states());
            prop_assert_eq!(small.recoveries(), large.recoveries());
            prop_assert_eq!(small.held_by(&agent_id("a1")), large.held_by(&agent_id("a1")));
            prop_assert!(small.ended.len() <= kept);
        }
    }
}
