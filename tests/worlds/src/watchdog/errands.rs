//! The small errands beside the judgements: zombies and first greetings.

use std::{collections::BTreeSet, rc::Rc};

use rollcall_core::{AgentId, InstanceId, execution::Execution};
use watchdog::zombie::{ClaimFacts, ClaimVerdict, Known, judge_claim, retry_pause_ms};

use super::{LOOK_TIMEOUT_MS, TERMINATE_TIMEOUT_MS, Watchdog};
use crate::agent::{Answer, Request};

/// More than there are instances.
const ERRANDS_MAX: usize = 64;

impl Watchdog {
    pub(super) fn errands(self: &Rc<Self>) {
        let (zombies, greetings) = self.with(|world, _| {
            let zombies: BTreeSet<_> = world.take_zombies(ERRANDS_MAX).into_iter().collect();
            let greetings: Vec<_> = world.greetings_due.drain(..).collect();
            (zombies, greetings)
        });
        for (agent, instance) in greetings {
            let this = Rc::clone(self);
            self.spawn(async move {
                let asked = this.stage.ask(this.me, &agent, &instance, Request::Executions, LOOK_TIMEOUT_MS);
                if matches!(asked.await, Answer::Said(_)) {
                    this.answered(&agent, &instance);
                }
            });
        }
        for (agent, instance) in zombies {
            let this = Rc::clone(self);
            self.spawn(async move {
                this.lay_to_rest(&agent, &instance).await;
                this.with(|world, _| world.zombies_done(&(agent, instance)));
            });
        }
    }

    async fn lay_to_rest(&self, agent: &AgentId, instance: &InstanceId) {
        let extras: Vec<_> = self.with(|world, now| {
            let claims = world.agents.get(agent).and_then(|e| e.claims_of(instance.as_str()));
            let extras = claims.map_or(&[][..], |claims| claims.extras());
            let judged = extras.iter().map(|e| {
                let facts = ClaimFacts { known: e.known, times: e.times, next_ask_at: e.next_ask_at };
                (e.id.clone(), e.attempt, judge_claim(facts, now))
            });
            judged.filter(|(_, _, verdict)| *verdict != ClaimVerdict::Leave).collect()
        });
        for (id, attempt, verdict) in extras {
            let Ok(exists) = self.refresh(&id).await else { return };
            let known = if exists { Known::NotTheirs } else { Known::Nothing };
            let theirs = self.with(|world, _| {
                let held = world.executions.get(&id).and_then(Execution::holder);
                held.is_some_and(|h| {
                    h.agent_id == *agent && h.instance_id == *instance && h.number == attempt
                })
            });
            let asks = exists && !theirs && verdict == ClaimVerdict::Terminate;
            self.with(|world, now| {
                let claims = world.agents.get_mut(agent).and_then(|e| e.claims_mut(instance.as_str()));
                let extra = claims
                    .and_then(|c| c.extras_mut().iter_mut().find(|e| e.id == id && e.attempt == attempt));
                let Some(extra) = extra else { return };
                if extra.known != known {
                    extra.known = known;
                    extra.times = 0;
                }
                if asks {
                    extra.next_ask_at = Some(now.plus_ms(retry_pause_ms(extra.asked)));
                    extra.asked = extra.asked.saturating_add(1);
                }
            });
            if asks {
                let request = Request::Terminate(id, attempt);
                let _ = self.stage.ask(self.me, agent, instance, request, TERMINATE_TIMEOUT_MS).await;
            }
        }
    }
}
