//! Capacity against the log, and building it anew.

use std::{collections::BTreeMap, rc::Rc};

use dispatcher::decide::{self, Misplaced, Unfinished};
use rollcall_capacity::{Capacity, Error, GrantedSlot, Hold, Place, PoolState};
use rollcall_core::{
    AgentId, ExecutionId,
    execution::{Execution, State},
};

use super::{Dispatcher, Undecided, pool};
use crate::{
    exec::{at_once, pause},
    stage::POOL,
};

const FINISH_AFTER_MS: u64 = 3_000;
const RECLAIM_AFTER_MS: u64 = 12_000;
/// A slot that waits for so long for its launch has been forgotten: a claim's time, an audit's interval, and a cut.
const STRANDED_MS: u64 = 42_000;
const OTHERS_REBUILD_MAX_MS: u64 = 3_000;

impl Dispatcher {
    /// Makes the pool usable again.
    pub(super) async fn rebuild(self: &Rc<Self>) -> Result<(), Undecided> {
        let began = self.stage.exec.now();
        loop {
            let meta = at_once(self.capacity.meta(POOL)).map_err(|_| Undecided::Away)?;
            match meta.map(|meta| meta.state) {
                Some(PoolState::Ready) => match at_once(self.capacity.waiting_with_free(POOL)) {
                    Err(error) if error.wants_rebuild() => break,
                    _ => return Ok(()),
                },
                Some(PoolState::Rebuilding) if self.stage.exec.now() - began < OTHERS_REBUILD_MAX_MS => {
                    pause(&self.stage.exec, 50).await;
                }
                _ => break,
            }
        }
        self.stage.say(|| format!("dispatcher {} rebuilds capacity", self.me));
        let begun = at_once(self.capacity.rebuild_begin(POOL, decide::millis(self.now())));
        let epoch = begun.map_err(|_| Undecided::Away)?;
        self.stage.leader(self.me).await.map_err(|_| Undecided::Away)?;
        self.fold();
        let members = self.state.borrow().agents().map(|a| a.id.clone()).collect();
        let items = decide::load_of(&pool(), &members, &self.state.borrow());
        self.step().await;
        let loaded = at_once(self.capacity.rebuild_load(POOL, &epoch, &items));
        self.step().await;
        let committed =
            loaded.and_then(|()| at_once(self.capacity.rebuild_commit(POOL, &epoch, self.stamp())));
        committed.map_err(|_| Undecided::Away)?;
        self.audit_wanted.set(true);
        Ok(())
    }

    fn scan(&self) -> Result<BTreeMap<Hold, Place>, Error> {
        let mut found = BTreeMap::new();
        let mut from = None;
        loop {
            let page = at_once(self.capacity.scan(POOL, from))?;
            found.extend(page.holds.into_iter().map(|placed| (placed.hold, placed.place)));
            match page.next {
                Some(next) => from = Some(next),
                None => return Ok(found),
            }
        }
    }

    pub(super) async fn audit(self: &Rc<Self>) -> Result<(), Undecided> {
        self.stage.leader(self.me).await.map_err(|_| Undecided::Away)?;
        self.fold();
        let found = match self.scan() {
            Ok(found) => found,
            Err(error) if error.wants_rebuild() => {
                self.rebuild().await?;
                self.scan().map_err(|_| Undecided::Away)?
            }
            Err(_) => return Err(Undecided::Away),
        };
        self.audit_agents().await;
        for (hold, place) in &found {
            self.audit_hold(hold, place).await?;
        }
        let missing: Vec<(ExecutionId, u32)> = decide::missing(&pool(), &self.state.borrow(), &found)
            .iter()
            .map(|e| (e.id().clone(), e.attempt))
            .collect();
        for (id, attempt) in missing {
            self.audit_missing(&id, attempt).await?;
        }
        self.finish_unconfirmed().await;
        self.fill().await;
        Ok(())
    }

    async fn audit_agents(self: &Rc<Self>) {
        let agents: BTreeMap<AgentId, _> =
            self.state.borrow().agents().map(|a| (a.id.clone(), decide::setting(a))).collect();
        for (id, setting) in agents {
            let Ok(view) = at_once(self.capacity.inspect(POOL, id.as_str(), 0)) else { continue };
            let known = self.state.borrow().agent(&id).cloned();
            if view.setting.is_none_or(|s| s.setting_seq < setting.setting_seq)
                && let Some(agent) = known
            {
                self.tell_of(&agent).await;
            }
            if view.held_back {
                self.spawn_reopen(id);
            }
        }
    }

    async fn audit_hold(self: &Rc<Self>, hold: &Hold, place: &Place) -> Result<(), Undecided> {
        let Ok(id) = ExecutionId::new(&hold.execution_id) else { return Ok(()) };
        if decide::misplaced(self.execution(&id).as_ref(), hold, place).is_none() {
            return Ok(());
        }
        let fresh = self.fresh(&id).await?;
        match decide::misplaced(fresh.as_ref(), hold, place) {
            None => {}
            Some(Misplaced::Promoted) => {
                if let (Some(execution), Place::Slot { granted_at_ms, .. }) = (&fresh, place) {
                    self.note_stranded(&id, *granted_at_ms);
                    self.relaunch(execution, hold, *granted_at_ms).await;
                }
            }
            Some(Misplaced::WrongQueue) => {
                let waited = self.settle(hold).await;
                if waited {
                    self.place_waiting(&id).await;
                }
            }
            Some(Misplaced::Leaked) if fresh.is_none() => {}
            Some(Misplaced::Leaked) => {
                self.settle(hold).await;
            }
            Some(Misplaced::Elsewhere { .. })
                if fresh.as_ref().is_some_and(|e| e.state == State::Dispatching) =>
            {
                self.claim_unanswered(fresh.as_ref()).await;
            }
            Some(Misplaced::Elsewhere { agent, since_ms }) => match place {
                Place::Slot { agent: on, granted_at_ms } => {
                    let (hold, granted_at_ms) = (hold.clone(), *granted_at_ms);
                    let found = GrantedSlot { hold, agent: on.clone(), granted_at_ms };
                    let move_it = |c: &_| {
                        at_once(Capacity::relocate(c, POOL, &found, agent.as_str(), since_ms, self.stamp()))
                    };
                    let _ = self.in_capacity(move_it).await;
                }
                Place::Waiting(_) => self.adopt(agent.as_str(), hold, since_ms).await,
            },
        }
        Ok(())
    }

    /// A slot of what waits, and whoever confirmed it has died.
    async fn relaunch(self: &Rc<Self>, execution: &Execution, hold: &Hold, granted_at_ms: u64) {
        let since = granted_at_ms.max(decide::millis(execution.state_since));
        if since >= decide::millis(self.now()).saturating_sub(RECLAIM_AFTER_MS) {
            return;
        }
        if let Ok(change) = self.put_back(execution.id(), hold.attempt, "launch_lost").await {
            self.requeue(&change.after, hold.clone(), hold.clone(), None, Some(granted_at_ms), None).await;
        }
    }

    fn note_stranded(&self, id: &ExecutionId, granted_at_ms: u64) {
        if decide::millis(self.now()).saturating_sub(granted_at_ms) > STRANDED_MS {
            self.stage.truth.borrow_mut().stranded.insert(id.clone());
        }
    }

    /// The slot of a dispatch that was perhaps never put to its agent, where there is room.
    async fn claim_unanswered(self: &Rc<Self>, execution: Option<&Execution>) {
        if let Some(execution) = execution
            && let Some(held) = execution.holder()
        {
            let _ = self.claim_by_log(decide::hold(execution, held.number), &held.agent_id).await;
        }
    }

    async fn audit_missing(self: &Rc<Self>, id: &ExecutionId, attempt: u32) -> Result<(), Undecided> {
        let Some(execution) = self.fresh(id).await? else { return Ok(()) };
        if execution.attempt != attempt || execution.state.is_terminal() {
            return Ok(());
        }
        let hold = decide::hold(&execution, attempt);
        match execution.holder() {
            Some(_) if execution.state == State::Dispatching => {
                self.claim_unanswered(Some(&execution)).await;
            }
            Some(held) => {
                self.adopt(held.agent_id.as_str(), &hold, decide::millis(held.dispatched_at)).await;
            }
            None if execution.state == State::Queued
                && self.now().since_ms(execution.state_since) >= FINISH_AFTER_MS =>
            {
                self.place_waiting(id).await;
            }
            None => {}
        }
        Ok(())
    }

    /// Carries out promotions that nobody carried out, and takes back reservations that came to nothing.
    pub(super) async fn finish_unconfirmed(self: &Rc<Self>) {
        let now = decide::millis(self.now());
        let before = now.saturating_sub(FINISH_AFTER_MS);
        let Ok(unconfirmed) = at_once(self.capacity.unconfirmed(POOL, before, 256)) else { return };
        for item in unconfirmed {
            let Ok(id) = ExecutionId::new(&item.placed.hold.execution_id) else { continue };
            let Ok(fresh) = self.fresh(&id).await else { return };
            let hold = &item.placed.hold;
            let grant = item.grant();
            let expired = item.since_ms < now.saturating_sub(RECLAIM_AFTER_MS);
            match (decide::unfinished(fresh.as_ref(), hold, grant.is_some(), expired), grant) {
                (Unfinished::Launch, Some(grant)) => self.spawn_launches(vec![grant]),
                (Unfinished::Confirm, Some(grant)) => {
                    let _ = at_once(self.capacity.confirm(POOL, &grant, self.stamp()));
                }
                (Unfinished::Confirm, None) => {
                    let _ = at_once(self.capacity.confirm_queued(POOL, hold, self.stamp()));
                }
                (Unfinished::Leave | Unfinished::Launch, _) => {}
                (Unfinished::Settle, _) if fresh.is_none() => self.give_back(hold).await,
                (Unfinished::Settle, _) => {
                    self.settle(hold).await;
                }
            }
        }
    }

    /// Gives free slots to waiting work.
    pub(super) async fn fill(self: &Rc<Self>) {
        let agents = self.in_capacity(|c| at_once(c.waiting_with_free(POOL))).await;
        for agent in agents.unwrap_or_default() {
            let filled = self.in_capacity(|c| at_once(c.promote(POOL, &agent, self.stamp()))).await;
            if let Some(filled) = filled {
                self.spawn_launches(filled.promoted);
            }
        }
    }
}
