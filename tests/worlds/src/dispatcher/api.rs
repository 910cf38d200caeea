//! What submitters and operators ask for.

use std::rc::Rc;

use dispatcher::decide;
use rollcall_capacity::{Ask, Capacity, Error, Hold, ModelCapacity, Outcome};
use rollcall_core::{
    AgentId, ExecutionId,
    event::{ExecutionEvent, Submitted},
    execution::{Attempt, Execution, State},
};

use super::{Dispatcher, Undecided, report::ASKED_FOR_GRACE_MS};
use crate::{
    Defect,
    agent::{Answer, Reply, Request},
    exec::{at_once, pause},
    log::Appended,
    stage::POOL,
    watchdog::LIMITS,
};

const QUEUE_DEPTH: u32 = 6;
const LIST_TIMEOUT_MS: u64 = 1_000;
const CANCEL_PAUSE_MIN_MS: u64 = 250;
const CANCEL_PAUSE_MAX_MS: u64 = 4_000;

impl Dispatcher {
    /// `submit`. True: it is accepted.
    pub(crate) async fn submit(self: &Rc<Self>, request: Submitted) -> bool {
        if !self.ready.get() {
            return false;
        }
        let id = request.execution_id.clone();
        if let Some(agent) = &request.agent_id
            && self.state.borrow().agent(agent).is_none()
        {
            return false;
        }
        match self.fresh(&id).await {
            Err(_) => return false,
            Ok(Some(_)) => return true,
            Ok(None) => {}
        }
        let hold = Hold::new(id.as_str(), 1);
        let ask = Ask {
            priority: decide::priority_of(&Execution::submitted(request.clone(), 0, self.now())),
            queue_depth: QUEUE_DEPTH,
            external: request.delivery == rollcall_core::wire::Delivery::External,
        };
        let admitted = self.in_capacity(|c| self.admit(c, request.agent_id.as_ref(), &hold, ask)).await;
        let Some(admission) = admitted else { return false };
        self.spawn_launches(admission.promoted);
        if admission.outcome == Outcome::Full {
            return false;
        }
        self.step().await;
        let now = self.now();
        let subject = self.stage.subjects.execution_event(&id);
        let body = ExecutionEvent::Submitted(request.clone());
        let entry = self.stage.event(self.me, "dispatcher", id.as_str(), now, body.into());
        match self.stage.append(self.me, &subject, &entry, 0).await {
            Ok(Appended::At(seq)) => {
                self.state.borrow_mut().insert(Execution::submitted(request, seq, now));
            }
            Ok(Appended::Conflict) => return true,
            Err(_) => return false,
        }
        self.step().await;
        match admission.outcome {
            Outcome::Granted { grant, .. } => self.spawn_launches(vec![grant]),
            Outcome::Queued { position, .. } => {
                let _ = self.decide(&id, |e| e.queue(position, None)).await;
                let waits = self.in_capacity(|c| at_once(c.confirm_queued(POOL, &hold, self.stamp()))).await;
                if waits == Some(false) {
                    self.find_place(&id).await;
                }
            }
            Outcome::Full => {}
        }
        true
    }

    fn admit(
        &self,
        capacity: &ModelCapacity,
        agent: Option<&AgentId>,
        hold: &Hold,
        ask: Ask,
    ) -> Result<rollcall_capacity::Admission, Error> {
        match agent {
            Some(agent) => at_once(capacity.admit_to_agent(POOL, agent.as_str(), hold, ask, self.stamp())),
            None => at_once(capacity.admit_to_pool(POOL, hold, ask, self.stamp())),
        }
    }

    /// A submission that was promoted before it was in the log: its slot waits for it.
    async fn find_place(self: &Rc<Self>, id: &ExecutionId) {
        let Some(execution) = self.execution(id).filter(|e| e.state == State::Queued) else { return };
        let hold = decide::hold(&execution, execution.attempt);
        let ask = Ask {
            priority: decide::priority_of(&execution),
            queue_depth: u32::MAX,
            external: execution.is_external(),
        };
        let agent = execution.request.agent_id.as_ref();
        let admitted = self.in_capacity(|c| self.admit(c, agent, &hold, ask)).await;
        let Some(admitted) = admitted else { return };
        self.spawn_launches(admitted.promoted);
        if let Outcome::Granted { grant, .. } = admitted.outcome {
            self.spawn_launches(vec![grant]);
        }
    }

    /// `cancel`
    pub(crate) async fn cancel(self: &Rc<Self>, id: &ExecutionId) {
        if let Ok(change) = self.decide(id, |e| e.cancel("enough", "operator")).await {
            self.carry_out(&change).await;
        }
    }

    /// `retry`
    pub(crate) async fn retry(self: &Rc<Self>, id: &ExecutionId) {
        if let Ok(change) = self.decide(id, |e| e.retry("operator")).await {
            self.carry_out(&change).await;
        }
    }

    pub(super) async fn expire(self: &Rc<Self>) {
        let now = self.now();
        let expired = self.state.borrow().expired(now, 100);
        for id in expired {
            if let Ok(change) = self.decide(&id, |e| e.expire(now)).await {
                self.carry_out(&change).await;
            }
        }
    }

    pub(super) fn spawn_cancel(self: &Rc<Self>, id: ExecutionId, attempt: u32) {
        if !self.cancelling.borrow_mut().insert((id.clone(), attempt)) {
            return;
        }
        let this = Rc::clone(self);
        self.spawn(async move {
            let mut wait = CANCEL_PAUSE_MIN_MS;
            while !this.try_cancel(&id, attempt).await {
                pause(&this.stage.exec, wait).await;
                wait = (wait * 2).min(CANCEL_PAUSE_MAX_MS);
            }
            this.cancelling.borrow_mut().remove(&(id, attempt));
        });
    }

    /// It has finished, and its report is under way.
    async fn is_to_report(&self, execution: &Execution, held: &Attempt) -> bool {
        let asked = execution.cancel.as_ref().map_or(execution.state_since, |cancel| cancel.at);
        if self.now().since_ms(asked) >= ASKED_FOR_GRACE_MS {
            return false;
        }
        let request = Request::Executions;
        let (agent, instance) = (&held.agent_id, &held.instance_id);
        match self.stage.ask(self.me, agent, instance, request, LIST_TIMEOUT_MS).await {
            Answer::Said(Reply::Holds(claims)) => {
                claims.iter().any(|claim| claim.id == *execution.id() && claim.attempt == held.number)
            }
            _ => false,
        }
    }

    async fn try_cancel(self: &Rc<Self>, id: &ExecutionId, attempt: u32) -> bool {
        let Some(execution) = self.execution(id) else { return true };
        if execution.state != State::Cancelling || execution.attempt != attempt {
            return true;
        }
        let Some(held) = execution.current() else { return true };
        let request = Request::Terminate(id.clone(), attempt);
        let timeout = LIMITS.terminate_grace_ms + 2_000;
        let answer = self.stage.ask(self.me, &held.agent_id, &held.instance_id, request, timeout).await;
        let confirmed_by = match answer {
            Answer::Said(Reply::Terminated) => "terminated",
            Answer::Said(Reply::StillRunning) if self.stage.has(Defect::EndUnconfirmed) => "terminated",
            Answer::Said(Reply::NotRunning) => {
                if self.stage.leader(self.me).await.is_err() {
                    return false;
                }
                let last = self.stage.reports.borrow().last(&held.agent_id, id);
                if matches!(watchdog::effect::waiting(attempt, last), watchdog::facts::Waiting::Withholds(_))
                {
                    return false;
                }
                if self.is_to_report(&execution, held).await {
                    return false;
                }
                "not_running"
            }
            _ => return false,
        };
        match self.decide(id, |e| e.confirm_cancel(attempt, confirmed_by, None, None)).await {
            Ok(change) => {
                self.carry_out(&change).await;
                true
            }
            Err(Undecided::Refused) => true,
            Err(Undecided::Away) => false,
        }
    }
}
