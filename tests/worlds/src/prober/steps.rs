//! One step at a time: what is to be appended about an agent, and what follows when it is in the log.

use std::rc::Rc;

use health_prober::{
    decide::{Next, next},
    detector::Grade,
    state::{Entry, Index},
};
use rollcall_core::{Timestamp, event::AgentEvent, wire::InFlight};

use super::Prober;
use crate::log::Appended;

const RETRY_MIN_MS: u64 = 250;
const RETRY_MAX_MS: u64 = 8_000;

impl Prober {
    /// Decides about an agent until there is nothing to decide or a step is on its way.
    pub(super) fn reconcile(self: &Rc<Self>, index: Index) {
        if !self.ready.get() {
            return;
        }
        let now = self.now();
        loop {
            let (event, expected) = {
                let mut fleet = self.fleet.borrow_mut();
                let Some(entry) = fleet.get_mut(index) else { return };
                if entry.work.busy || entry.work.retry_at.is_some_and(|at| now < at) {
                    return;
                }
                let wish = self.wish_of(index);
                match next(&entry.known, &entry.live, wish.as_ref(), &self.policy, now) {
                    Some(Next::Append(event)) => {
                        entry.work.busy = true;
                        entry.work.retry_at = None;
                        (event, entry.known.agent.seq)
                    }
                    Some(Next::Fulfilled) => {
                        self.grant(index, true);
                        continue;
                    }
                    Some(Next::Refused(_)) => {
                        self.grant(index, false);
                        continue;
                    }
                    None => return settle(entry),
                }
            };
            let this = Rc::clone(self);
            return self.spawn(async move { this.append(index, event, expected, now).await });
        }
    }

    async fn append(self: Rc<Self>, index: Index, event: AgentEvent, expected: u64, time: Timestamp) {
        let id = event.agent_id().clone();
        let subject = self.stage.subjects.agent_event(&id);
        let entry = self.stage.event(self.me, "health-prober", id.as_str(), time, event.clone().into());
        let appended = self.stage.append(self.me, &subject, &entry, expected).await;
        if let Some(entry) = self.fleet.borrow_mut().get_mut(index) {
            entry.work.busy = false;
        }
        match appended {
            Ok(Appended::At(seq)) => {
                {
                    let mut fleet = self.fleet.borrow_mut();
                    if let Some(entry) = fleet.get_mut(index) {
                        entry.work.refusals = 0;
                    }
                    // The log may have brought it back before its acknowledgement came.
                    fleet.apply(index, seq, &event, time, true);
                }
                if let AgentEvent::Superseded(event) = event {
                    self.say_goodbye(id, event.instance_id, InFlight::Finish);
                }
            }
            Ok(Appended::Conflict) => {
                if self.stage.leader(self.me).await.is_ok() {
                    let history = self.stage.log.borrow().history(&subject);
                    for entry in history {
                        self.fold_entry(&entry);
                    }
                }
            }
            Err(_) => {
                let now = self.now();
                if let Some(entry) = self.fleet.borrow_mut().get_mut(index) {
                    let pause = (RETRY_MIN_MS << entry.work.refusals.min(10)).min(RETRY_MAX_MS);
                    entry.work.refusals += 1;
                    entry.work.retry_at = Some(now.plus_ms(pause));
                }
                self.disappoint(index);
            }
        }
        self.reconcile(index);
    }
}

/// Nothing is left to do about this agent for now.
fn settle(entry: &mut Entry) {
    let (known, live) = (&entry.known, &mut entry.live);
    if live.profile.as_deref() == known.agent.profile.as_ref() {
        live.profile = None;
    }
    let well = known.agent.status.is_some_and(|status| !status.is_silent());
    live.settled = well && live.profile.is_none() && live.beat.grade == Grade::Good;
}
