//! What operators ask for, and the deadlines of their drains.

use std::rc::Rc;

use health_prober::{decide::Wish, state::Index};
use rollcall_core::{AgentId, Timestamp, agent::Status, wire::InFlight};

use super::Prober;
use crate::exec::Promise;

/// A goodbye for a passed drain deadline is repeated this often until the instance is gone.
const DRAIN_AGAIN_MS: u64 = 10_000;

/// A wish with who waits for it. True: it is fulfilled, and in the log.
pub(super) type Wished = (Wish, Promise<bool>);

impl Prober {
    /// Asks for something about an agent, after a look into the log if it is not known here.
    pub(crate) async fn wish(self: &Rc<Self>, agent: &AgentId, wish: Wish) -> bool {
        if !self.ready.get() {
            return false;
        }
        let known = |prober: &Self| {
            let fleet = prober.fleet.borrow();
            let index = fleet.find(agent.as_str())?;
            fleet.get(index).is_some_and(|entry| entry.known.agent.is_known()).then_some(index)
        };
        if known(self).is_none() && self.stage.leader(self.me).await.is_ok() {
            let history = self.stage.log.borrow().history(&self.stage.subjects.agent_event(agent));
            for entry in history {
                self.fold_entry(&entry);
            }
        }
        let Some(index) = known(self) else { return false };
        let answer = Promise::new(&self.stage.exec);
        self.wishes.borrow_mut().entry(index).or_default().push_back((wish, answer.clone()));
        if let Some(entry) = self.fleet.borrow_mut().get_mut(index) {
            // An operator does not wait for a pause between tries.
            entry.work.retry_at = None;
        }
        self.reconcile(index);
        answer.await
    }

    /// A drain by an operator with its deadline so many milliseconds away.
    pub(crate) async fn drain(self: &Rc<Self>, agent: &AgentId, deadline_ms: Option<u64>) -> bool {
        let deadline = deadline_ms.map(|millis| self.now().plus_ms(millis));
        self.wish(agent, Wish::Drain { reason: "drain".to_owned(), deadline, in_flight: None }).await
    }

    pub(super) fn wish_of(&self, index: Index) -> Option<Wish> {
        self.wishes.borrow().get(&index)?.front().map(|(wish, _)| wish.clone())
    }

    pub(super) fn grant(&self, index: Index, fulfilled: bool) {
        let first = self.wishes.borrow_mut().get_mut(&index).and_then(|wishes| wishes.pop_front());
        if let Some((_, asker)) = first {
            asker.keep(fulfilled);
        }
    }

    /// The log does not take events now: whoever waits is told.
    pub(super) fn disappoint(&self, index: Index) {
        let wishes = self.wishes.borrow_mut().remove(&index).unwrap_or_default();
        wishes.into_iter().for_each(|(_, asker)| asker.keep(false));
    }

    /// An instance that is not gone by the deadline of its drain is told to hand back what it has.
    pub(super) fn enforce_deadline(self: &Rc<Self>, index: Index, now: Timestamp) {
        let (agent, instance) = {
            let mut fleet = self.fleet.borrow_mut();
            let Some(entry) = fleet.get_mut(index) else { return };
            if entry.known.agent.status == Some(Status::Gone) || entry.known.current_is_past() {
                return;
            }
            let Some(instance) = entry.known.agent.instance_id.clone() else { return };
            let drain = entry.known.agent.operator_drain.as_ref();
            let Some((since, deadline)) = drain.and_then(|d| d.deadline.map(|at| (d.since, at))) else {
                return;
            };
            let told = entry.work.partings.as_deref().and_then(|said| said.drain);
            let due = told.is_none_or(|(told, at)| told != since || now.since_ms(at) >= DRAIN_AGAIN_MS);
            if deadline > now || !due {
                return;
            }
            entry.work.partings.get_or_insert_default().drain = Some((since, now));
            (entry.known.agent.id.clone(), instance)
        };
        self.stage.count("drains enforced");
        self.say_goodbye(agent, instance, InFlight::Return);
    }
}
