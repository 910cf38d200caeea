//! What request handlers ask the loop.

use std::collections::BTreeMap;

use rollcall_core::time::Clock;
use rollcall_core::wire::{ApiError, ErrorCode, Goodbye, LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX};
use rollcall_core::{AgentId, InstanceId};
use tokio::sync::oneshot;

use super::timing::GOODBYE_DUE_MS;
use super::{Shell, Unheard};
use crate::api::{self, Ask, ListQuery, Listing};
use crate::decide::Wish;
use crate::state::Index;
use crate::view::AgentView;

/// A list is cut at this size, so that it fits a message with room to spare; `next` says where it goes on.
const LIST_BYTES_MAX: usize = 768 * 1024;
/// Wishes about one agent that may wait; more are refused.
const WISHES_MAX: usize = 16;

impl Shell {
    /// Answers a request handler. Whoever does not wait any more has timed out; nothing is lost by that.
    pub(super) fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::List(query, reply) => {
                let _ = reply.send(self.if_ready().map(|()| self.list(&query)));
            }
            Ask::View(id, reply) => {
                let _ = reply.send(self.if_ready().map(|()| self.view(&id)));
            }
            Ask::Fold(entries, reply) => {
                for entry in &entries {
                    self.fold_entry(entry);
                }
                let _ = reply.send(());
            }
            Ask::Wish(id, wish, reply) => {
                let index = self.fleet.find(id.as_str());
                match index {
                    Some(index) => self.wish(index, wish, reply),
                    None => {
                        drop(reply.send(Err(ApiError::new(ErrorCode::UnknownAgent, format!("agent {id}")))))
                    }
                }
            }
            Ask::Part(id, goodbye, reply) => {
                let _ = reply.send(self.part_with(&id, goodbye));
            }
            Ask::Told(goodbye) => self.told(goodbye),
            Ask::Parted(id, instance) => {
                if let Some(index) = self.fleet.find(id.as_str()) {
                    self.parted(index, &instance, true);
                }
            }
        }
    }

    fn if_ready(&self) -> Result<(), ApiError> {
        if self.ready {
            Ok(())
        } else {
            Err(ApiError::not_ready("the health-prober is still reading the log"))
        }
    }

    fn view(&self, id: &AgentId) -> Option<AgentView> {
        let entry = self.fleet.get(self.fleet.find(id.as_str())?)?;
        entry.known.agent.is_known().then(|| AgentView::new(entry, &self.policy, self.clock.now()))
    }

    fn wish(&mut self, index: Index, wish: Wish, reply: oneshot::Sender<Result<AgentView, ApiError>>) {
        let wishes = &mut self.cold.entry(index).or_default().wishes;
        if wishes.len() >= WISHES_MAX {
            let _ =
                reply.send(Err(ApiError::unavailable("too many requests about this agent wait for the log")));
            return;
        }
        wishes.push_back((wish, reply));
        if let Some(entry) = self.fleet.get_mut(index) {
            // An operator does not wait for a pause between tries.
            entry.work.retry_at = None;
        }
        self.reconcile(index);
        self.rearm(index);
    }

    fn part_with(&mut self, id: &AgentId, goodbye: Goodbye) -> Result<InstanceId, ApiError> {
        let gone =
            || ApiError::new(ErrorCode::Conflict, format!("agent {id} is gone, nobody is there to hear it"));
        let index = self.fleet.find(id.as_str()).ok_or_else(gone)?;
        let entry = self.fleet.get(index).ok_or_else(gone)?;
        let current = entry.known.agent.instance_id.clone().filter(|_| !entry.known.current_is_past());
        let instance = current.ok_or_else(gone)?;
        self.say_it_in_answers(index, instance.clone(), goodbye);
        Ok(instance)
    }

    fn told(&mut self, told: api::Unanswered) {
        let Some(index) = self.fleet.find(told.agent_id.as_str()) else { return };
        let Some(entry) = self.fleet.get(index) else { return };
        let is_there = entry.known.agent.instance_id.as_ref() == Some(&told.instance_id);
        if is_there && !entry.known.current_is_past() {
            self.say_it_in_answers(index, told.instance_id, told.goodbye);
        }
    }

    fn say_it_in_answers(&mut self, index: Index, instance: InstanceId, goodbye: Goodbye) {
        let until = self.clock.now().plus_ms(GOODBYE_DUE_MS);
        self.cold.entry(index).or_default().goodbye =
            Some(Unheard { instance, goodbye, until, while_still: false });
    }

    /// The first agents after `after`, in the order of ids, without sorting the fleet.
    fn list(&self, query: &ListQuery) -> Listing {
        let limit = query.limit.unwrap_or(LIST_LIMIT_DEFAULT).clamp(1, LIST_LIMIT_MAX);
        let after = query.after.as_ref().map_or("", AgentId::as_str);
        let mut first: BTreeMap<&str, Index> = BTreeMap::new();
        let mut more = false;
        for (index, entry) in self.fleet.iter() {
            let agent = &entry.known.agent;
            let wanted = agent.is_known()
                && agent.id.as_str() > after
                && query.status.is_none_or(|status| agent.status == Some(status))
                && query.pool.as_ref().is_none_or(|pool| agent.pool() == *pool);
            if !wanted
                || (first.len() > limit
                    && first.last_key_value().is_some_and(|(last, _)| agent.id.as_str() > *last))
            {
                more |= wanted;
                continue;
            }
            first.insert(agent.id.as_str(), index);
            if first.len() > limit {
                first.pop_last();
                more = true;
            }
        }
        let now = self.clock.now();
        let (mut agents, mut bytes) = (Vec::new(), 0);
        for index in first.into_values() {
            let Some(entry) = self.fleet.get(index) else { continue };
            let view = AgentView::new(entry, &self.policy, now);
            bytes += serde_json::to_vec(&view).map_or(0, |json| json.len() + 1);
            if bytes > LIST_BYTES_MAX && !agents.is_empty() {
                more = true;
                break;
            }
            agents.push(view);
        }
        let next = agents.last().filter(|_| more).map(|last: &AgentView| last.agent_id.clone());
        Listing { agents, next, sees: self.hearing.hears(), sight: self.hearing.view() }
    }
}
