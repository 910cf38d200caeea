//! From a slot to a running attempt.

use std::rc::Rc;

use dispatcher::{
    decide::{self, Answer},
    state::Change,
};
use rollcall_capacity::{Capacity, Confirmation, Grant, Hold, Stamp};
use rollcall_core::{
    AgentId, ExecutionId,
    agent::Agent,
    execution::{Attempt, Execution, Refusal, State},
};

use super::{Dispatcher, TAKE_UP, Undecided};
use crate::{
    Defect,
    agent::{self, Reply, Request},
    exec::{at_once, pause},
    plan::worst_moment,
    stage::POOL,
};

pub(crate) const ANSWER_TIMEOUT_MS: u64 = 2_000;
const ASK_TURN_MS: u64 = 2_500;
const DEFAULT_TIMEOUT_MS: u64 = 5_000;

const SLOT_LOST: &str = "slot_lost";
const CROWDED: &str = "crowded";

impl Dispatcher {
    pub(super) async fn launch(self: Rc<Self>, grant: Grant) {
        match self.claim(&grant).await {
            Ok(Some(execution)) if !execution.is_external() || self.stage.has(Defect::ExternalAsked) => {
                self.ask(execution).await;
            }
            Ok(_) => {}
            Err(_) => self.audit_wanted.set(true),
        }
    }

    async fn claim(self: &Rc<Self>, grant: &Grant) -> Result<Option<Execution>, Undecided> {
        let Ok(id) = ExecutionId::new(&grant.hold.execution_id) else { return Ok(None) };
        let Some(execution) = self.fresh(&id).await? else { return Ok(None) };
        if execution.state != State::Queued || execution.attempt != grant.hold.attempt {
            self.give_back_unless_held(&grant.hold, Some(&execution)).await;
            return Ok(None);
        }
        let Ok(agent_id) = AgentId::new(&grant.agent) else { return Ok(None) };
        let agent = self.fresh_agent(&agent_id).await?;
        let Some((agent, instance)) = agent.and_then(|a| a.instance_id.clone().map(|i| (a, i))) else {
            return Ok(None);
        };
        let ignores = self.stage.has(Defect::DrainIgnored) && agent.operator_drain.is_some();
        if let Some(why) = decide::closed(&agent).filter(|_| !ignores) {
            self.take_back(&id, grant, &agent, why).await?;
            return Ok(None);
        }
        match self.in_capacity(|c| at_once(c.confirm(POOL, grant, self.stamp()))).await {
            Some(Confirmation::Confirmed { .. }) => {}
            Some(Confirmation::Crowded) => {
                self.take_back(&id, grant, &agent, CROWDED).await?;
                return Ok(None);
            }
            Some(Confirmation::Lost) => {
                self.place_waiting(&id).await;
                return Ok(None);
            }
            None => return Ok(None),
        }
        if execution.is_external() {
            self.stage.note_granted(&id, grant.hold.attempt, None);
        }
        worst_moment(&self.stage, &agent_id);
        self.step().await;
        let timeout = execution.request.timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS);
        let now = self.now();
        let decided = self
            .decide(&id, |e| {
                if e.queued_seq != execution.queued_seq {
                    return Err(Refusal::State(e.state.as_str()));
                }
                e.dispatch(grant.hold.attempt, &agent_id, &instance, timeout, now)
            })
            .await;
        match decided {
            Ok(change) => self.confirm_again(grant, change.after).await,
            Err(Undecided::Refused) => {
                let fresh = self.fresh(&id).await?;
                self.give_back_unless_held(&grant.hold, fresh.as_ref()).await;
                Ok(None)
            }
            Err(away) => Err(away),
        }
    }

    /// The slot once more, now that the log says who has it: a rebuild since then has found the dispatch there.
    async fn confirm_again(
        self: &Rc<Self>,
        grant: &Grant,
        dispatched: Execution,
    ) -> Result<Option<Execution>, Undecided> {
        // Whoever reads that the agent accepted knows by this how far capacity has come.
        let stamp = || Stamp { log_seq: self.stamp().log_seq.max(dispatched.seq), ..self.stamp() };
        let confirmed = self.in_capacity(|c| at_once(c.confirm(POOL, grant, stamp()))).await;
        let Some(held) = dispatched.holder().cloned() else { return Ok(None) };
        // For an orchestrator the event is the grant, and its slot a fact.
        if dispatched.is_external() {
            if !matches!(confirmed, Some(Confirmation::Confirmed { .. })) {
                self.adopt(held.agent_id.as_str(), &grant.hold, decide::millis(held.dispatched_at)).await;
            }
            self.stage.note_granted(dispatched.id(), held.number, Some(self.stage.exec.now()));
            return Ok(Some(dispatched));
        }
        if self.now().since_ms(held.dispatched_at) >= TAKE_UP.dispatch_ms {
            self.spawn_settle_unknown(dispatched.id().clone(), held);
            return Ok(None);
        }
        if matches!(confirmed, Some(Confirmation::Confirmed { .. })) || self.stage.has(Defect::AskUnconfirmed)
        {
            return Ok(Some(dispatched));
        }
        let crowded = confirmed == Some(Confirmation::Crowded);
        let why = if crowded { CROWDED } else { SLOT_LOST };
        let back = self.decide(dispatched.id(), |e| {
            if e.state == State::Dispatching && e.current() == Some(&held) {
                e.queue(1, Some(why.to_owned()))
            } else {
                Err(Refusal::State(e.state.as_str()))
            }
        });
        match back.await {
            Ok(change) => {
                let (hold, noted) = (grant.hold.clone(), decide::millis(held.dispatched_at));
                let refused = crowded.then(|| grant.agent.clone());
                let by = crowded.then(|| decide::millis(held.dispatched_at.max(change.after.state_since)));
                let noted = (!crowded).then_some(noted);
                self.requeue(&change.after, hold.clone(), hold, refused, noted, by).await;
                if crowded {
                    self.spawn_reopen(held.agent_id);
                }
                Ok(None)
            }
            Err(Undecided::Refused) => Ok(None),
            Err(away) => Err(away),
        }
    }

    async fn take_back(
        self: &Rc<Self>,
        id: &ExecutionId,
        grant: &Grant,
        agent: &Agent,
        why: &str,
    ) -> Result<(), Undecided> {
        match self.put_back(id, grant.hold.attempt, why).await {
            Ok(change) => {
                // First, or the slot would be given to the next one.
                self.tell_of(agent).await;
                let hold = grant.hold.clone();
                let by = Some(decide::millis(change.after.state_since));
                self.requeue(&change.after, hold.clone(), hold, Some(grant.agent.clone()), None, by).await;
                self.spawn_reopen(agent.id.clone());
            }
            Err(Undecided::Refused) => {
                let fresh = self.fresh(id).await?;
                self.give_back_unless_held(&grant.hold, fresh.as_ref()).await;
            }
            Err(away) => return Err(away),
        }
        Ok(())
    }

    pub(super) async fn put_back(
        self: &Rc<Self>,
        id: &ExecutionId,
        attempt: u32,
        why: &str,
    ) -> Result<Change, Undecided> {
        self.decide(id, |e| {
            if e.state == State::Queued && e.attempt == attempt {
                e.queue(1, Some(why.to_owned()))
            } else {
                Err(Refusal::State(e.state.as_str()))
            }
        })
        .await
    }

    /// Asks the agent to take what was dispatched, and writes down what it says.
    pub(super) async fn ask(self: &Rc<Self>, execution: Execution) {
        let Some(held) = execution.current().cloned() else { return };
        let id = execution.id().clone();
        let answer = match self.put(&id, &held).await {
            Answer::Nobody => Answer::Back("no_responders".to_owned()),
            Answer::Unknown if self.stage.has(Defect::SilenceRefuses) => Answer::Back("silent".to_owned()),
            answer => answer,
        };
        if self.answered(&id, &held, answer).await.is_err() {
            self.spawn_settle_unknown(id, held);
        }
    }

    /// Asks an agent that may have been asked before, and does not list it.
    async fn ask_again(self: &Rc<Self>, id: &ExecutionId, held: &Attempt) -> Answer {
        if self.stage.has(Defect::UnansweredIsUnasked) {
            return Answer::Back(SLOT_LOST.to_owned());
        }
        match self.claim_by_log(Hold::new(id.as_str(), held.number), &held.agent_id).await {
            Some(Confirmation::Confirmed { .. }) => {}
            Some(Confirmation::Crowded) => return Answer::Unknown,
            Some(Confirmation::Lost) => {
                self.stage.count("slots lost before an agent was asked again");
                return Answer::Back(SLOT_LOST.to_owned());
            }
            None => return Answer::Unknown,
        }
        let hold = Hold::new(id.as_str(), held.number);
        if !self.capacity.take_turn(POOL, &hold, ASK_TURN_MS, self.stage.exec.now()) {
            return Answer::Unknown;
        }
        match self.put(id, held).await {
            Answer::Nobody => Answer::Unknown,
            answer => answer,
        }
    }

    async fn put(&self, id: &ExecutionId, held: &Attempt) -> Answer {
        let request = Request::Dispatch(id.clone(), held.number, held.timeout_ms);
        let asked = self.stage.ask(self.me, &held.agent_id, &held.instance_id, request, ANSWER_TIMEOUT_MS);
        match asked.await {
            agent::Answer::Said(Reply::Accepted) => Answer::Accepted,
            agent::Answer::Said(Reply::Refused(reason)) => decide::refused(Some(reason)),
            agent::Answer::NoResponders => Answer::Nobody,
            agent::Answer::Said(_) | agent::Answer::Nothing | agent::Answer::Void => Answer::Unknown,
        }
    }

    async fn answered(
        self: &Rc<Self>,
        id: &ExecutionId,
        held: &Attempt,
        answer: Answer,
    ) -> Result<(), Undecided> {
        let decided = match answer {
            Answer::Accepted => self.decide(id, |e| decide::accepted(e, held)).await,
            Answer::Back(reason) => {
                self.decide(id, |e| {
                    if decide::is_in_dispatch(e, held) {
                        e.queue(1, Some(reason.clone()))
                    } else {
                        Err(Refusal::State(e.state.as_str()))
                    }
                })
                .await
            }
            // Nothing here is more than an agent can do.
            Answer::Nobody | Answer::Unknown | Answer::Unfit(_) => {
                self.spawn_settle_unknown(id.clone(), held.clone());
                return Ok(());
            }
        };
        match decided {
            Ok(change) => {
                Box::pin(self.carry_out(&change)).await;
                Ok(())
            }
            Err(Undecided::Refused) => Ok(()),
            Err(away) => Err(away),
        }
    }

    /// Settles a dispatch without an answer by the agent's heartbeats.
    pub(super) fn spawn_settle_unknown(self: &Rc<Self>, id: ExecutionId, held: Attempt) {
        if !self.unknown.borrow_mut().insert((id.clone(), held.number, held.dispatched_at)) {
            return;
        }
        let this = Rc::clone(self);
        self.spawn(async move {
            let mut seen = this.beats.borrow().get(&held.agent_id).map(|b| (b.instance.clone(), b.seq));
            loop {
                pause(&this.stage.exec, 100).await;
                let waits = |e: &Execution| decide::is_in_dispatch(e, &held);
                if !this.execution(&id).is_some_and(|e| waits(&e)) {
                    break;
                }
                let beat = this.beats.borrow().get(&held.agent_id).map(Rc::clone);
                let Some(beat) = beat.filter(|b| b.instance == held.instance_id) else { continue };
                let number = Some((beat.instance.clone(), beat.seq));
                if number == seen {
                    continue;
                }
                seen = number;
                let listed = !this.stage.has(Defect::UnansweredIsUnasked)
                    && beat.claims.iter().any(|c| c.id == id && c.attempt == held.number);
                let answer = if listed { Answer::Accepted } else { this.ask_again(&id, &held).await };
                if matches!(answer, Answer::Unknown) {
                    continue;
                }
                if this.answered(&id, &held, answer).await.is_ok() {
                    break;
                }
            }
            this.unknown.borrow_mut().remove(&(id, held.number, held.dispatched_at));
        });
    }
}
