//! Carrying out in capacity and on agents what the log says. Everything here may run twice.

use std::rc::Rc;

use dispatcher::{
    decide::{self, Effect},
    state::Change,
};
use rollcall_capacity::{AgentSetting, Capacity, Error, Grant, Hold, ModelCapacity, Requeue};
use rollcall_core::{
    AgentId, ExecutionId,
    agent::Agent,
    event::EventBody,
    execution::{Execution, State},
    wire::AgentState,
};

use super::{Dispatcher, Undecided};
use crate::{
    Defect,
    agent::Beat,
    exec::{at_once, pause},
    stage::POOL,
};

impl Dispatcher {
    /// Does something in capacity, rebuilding it when that is what it takes. `None`: left to the audit.
    pub(super) async fn in_capacity<T>(
        self: &Rc<Self>,
        operation: impl Fn(&ModelCapacity) -> Result<T, Error>,
    ) -> Option<T> {
        for _ in 0..4 {
            self.step().await;
            // A handle that has seen nothing takes whatever it finds for what is meant.
            let unsuspecting = self.stage.has(Defect::RestoredBelieved).then(|| self.stage.capacity.handle());
            match operation(unsuspecting.as_ref().unwrap_or(&self.capacity)) {
                Ok(done) => return Some(done),
                Err(error) if error.wants_rebuild() => {
                    let _ = self.rebuild().await;
                }
                Err(_) => {}
            }
        }
        self.audit_wanted.set(true);
        None
    }

    pub(super) async fn settle(self: &Rc<Self>, hold: &Hold) -> bool {
        let Some(settled) = self.in_capacity(|c| at_once(c.settle(POOL, hold, self.stamp()))).await else {
            return false;
        };
        self.spawn_launches(settled.promoted);
        settled.released || settled.dequeued
    }

    /// Gives up a reservation that nobody has confirmed.
    pub(super) async fn give_back(self: &Rc<Self>, hold: &Hold) {
        if let Some(settled) = self.in_capacity(|c| at_once(c.reclaim(POOL, hold, self.stamp()))).await {
            self.spawn_launches(settled.promoted);
        }
    }

    /// The end of an attempt gives its slot back. With the defect it gives back *a* slot of that agent.
    pub(super) async fn release(self: &Rc<Self>, hold: &Hold, agent: Option<&AgentId>) {
        if !self.settle(hold).await
            && self.stage.has(Defect::ReleaseWithoutCheck)
            && let Some(agent) = agent
            && let Ok(view) = at_once(self.capacity.inspect(POOL, agent.as_str(), 1))
            && let Some(slot) = view.held.first()
        {
            self.settle(&slot.hold).await;
        }
    }

    pub(super) async fn carry_out(self: &Rc<Self>, change: &Change) {
        for effect in decide::effects(change) {
            let now = self.execution(change.after.id());
            match decide::still_due(effect, now.as_ref()) {
                Effect::Terminate => self.spawn_cancel(change.after.id().clone(), change.after.attempt),
                Effect::Settle(hold) => {
                    let agent =
                        change.before.as_ref().and_then(Execution::holder).map(|h| h.agent_id.clone());
                    self.release(&hold, agent.as_ref()).await;
                }
                Effect::Requeue { old, new, hold_back } => {
                    let watched = hold_back.clone();
                    let asked = change.before.as_ref().and_then(Execution::holder).map(|h| h.dispatched_at);
                    let by = watched.as_ref().map(|_| {
                        decide::millis(
                            asked.map_or(change.after.state_since, |at| at.max(change.after.state_since)),
                        )
                    });
                    self.requeue(&change.after, old, new, hold_back, None, by).await;
                    if let Some(agent) = watched.and_then(|a| AgentId::new(&a).ok()) {
                        self.spawn_reopen(agent);
                    }
                }
            }
        }
    }

    pub(super) async fn requeue(
        self: &Rc<Self>,
        execution: &Execution,
        old: Hold,
        new: Hold,
        hold_back: Option<String>,
        granted_at_ms: Option<u64>,
        granted_by_ms: Option<u64>,
    ) {
        let requeue = Requeue {
            old,
            new,
            queue: decide::queue_of(execution),
            priority: decide::priority_of(execution),
            hold_back,
            granted_at_ms,
            granted_by_ms,
        };
        let done = self.in_capacity(|c| at_once(c.requeue(POOL, &requeue, self.stamp()))).await;
        if let Some(requeued) = done {
            let _ = at_once(self.capacity.confirm_queued(POOL, &requeue.new, self.stamp()));
            self.spawn_launches(requeued.promoted);
        }
    }

    pub(super) async fn place_waiting(self: &Rc<Self>, id: &ExecutionId) {
        if let Some(execution) = self.execution(id).filter(|e| e.state == State::Queued) {
            let hold = decide::hold(&execution, execution.attempt);
            self.requeue(&execution, hold.clone(), hold, None, None, None).await;
        }
    }

    pub(super) async fn apply_agent(self: &Rc<Self>, id: &AgentId) {
        let Some(agent) = self.state.borrow().agent(id).cloned() else { return };
        let setting = decide::setting(&agent);
        let same =
            |known: &AgentSetting| AgentSetting { setting_seq: known.setting_seq, ..setting } == *known;
        let before = self.applied.borrow_mut().insert(id.clone(), setting);
        if !before.as_ref().is_some_and(same) {
            self.tell_of(&agent).await;
        }
    }

    /// Tells capacity what is known of an agent; what it knows better stays.
    pub(super) async fn tell_of(self: &Rc<Self>, agent: &Agent) {
        let setting = self.setting(agent);
        let id = agent.id.as_str();
        let filled = self.in_capacity(|c| at_once(c.set_agent(POOL, id, setting, self.stamp()))).await;
        if let Some(filled) = filled {
            self.spawn_launches(filled.promoted);
        }
    }

    pub(super) fn setting(&self, agent: &Agent) -> AgentSetting {
        let mut setting = decide::setting(agent);
        if self.stage.has(Defect::DrainIgnored) {
            setting.open |= agent.operator_drain.is_some();
        }
        if self.stage.has(Defect::LoweredIgnored)
            && let Ok(view) = at_once(self.capacity.inspect(POOL, agent.id.as_str(), 0))
        {
            setting.capacity = setting.capacity.max(view.setting.map_or(0, |known| known.capacity));
        }
        setting
    }

    /// The agent as the leader has it.
    pub(super) async fn fresh_agent(self: &Rc<Self>, id: &AgentId) -> Result<Option<Agent>, Undecided> {
        self.stage.leader(self.me).await.map_err(|_| Undecided::Away)?;
        let mut agent = Agent::unknown(id.clone());
        for entry in self.stage.log.borrow().history(&self.stage.subjects.agent_event(id)) {
            if let EventBody::Agent(event) = &entry.event.body {
                agent.evolve(entry.seq, event, entry.event.time);
            }
        }
        Ok(Some(agent).filter(Agent::is_known))
    }

    /// Offers an agent work again after its next heartbeat, or when it runs as a new instance.
    pub(super) fn spawn_reopen(self: &Rc<Self>, agent: AgentId) {
        if !self.reopening.borrow_mut().insert(agent.clone()) {
            return;
        }
        let this = Rc::clone(self);
        self.spawn(async move {
            let instance = this.state.borrow().agent(&agent).and_then(|a| a.instance_id.clone());
            let takes = |b: &Rc<Beat>| {
                let current = instance.as_ref().is_none_or(|instance| b.instance == *instance);
                let takes = current && matches!(b.state, AgentState::Ready | AgentState::Busy);
                takes.then(|| (b.instance.clone(), b.seq))
            };
            let heard = || this.beats.borrow().get(&agent).and_then(takes);
            let seen = heard();
            loop {
                pause(&this.stage.exec, 200).await;
                let now = heard();
                let renewed =
                    this.state.borrow().agent(&agent).and_then(|a| a.instance_id.clone()) != instance;
                if (now.is_some() && now != seen) || renewed {
                    break;
                }
            }
            this.reopening.borrow_mut().remove(&agent);
            let filled = this.in_capacity(|c| at_once(c.reopen(POOL, agent.as_str(), this.stamp()))).await;
            if let Some(filled) = filled {
                this.spawn_launches(filled.promoted);
            }
        });
    }

    pub(super) fn spawn_launches(self: &Rc<Self>, grants: Vec<Grant>) {
        for grant in grants {
            let this = Rc::clone(self);
            self.spawn(async move { this.launch(grant).await });
        }
    }
}
