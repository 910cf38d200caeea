//! From a slot to a running attempt: confirm the slot, write `dispatched`, ask the agent, write what it said.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_capacity::{Capacity, Confirmation, Grant, Stamp};
use rollcall_core::{
    AgentId, ExecutionId, Pool,
    agent::Agent,
    execution::{Attempt, Execution, Refusal, State},
    subject::AgentVerb,
    wire::{DispatchReply, DispatchRequest, UNSUPPORTED},
};
use rollcall_nats::RequestError;
use serde_json::value::RawValue;

use crate::{
    decide::{self, Answer},
    effect::{Leaves, Refused},
    ledger::DecideError,
    shell::Dispatcher,
    state::Change,
};

/// How long an agent has to answer a dispatch before its outcome is unknown (PROTOCOL.md 4, `submit`).
pub(crate) const DISPATCH_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// For how long nobody else asks an agent again: until it has answered, or has had its time to, and that is written down.
const ASK_TURN: Duration = Duration::from_millis(2_500);

/// Why an execution was put back that was dispatched by the log and whose slot was gone before its agent was asked.
const SLOT_LOST: &str = "slot_lost";
/// Why an execution was put back whose agent has more slots than it can hold.
const CROWDED: &str = "crowded";
/// Why an execution was put back whose agent is not there.
const NO_RESPONDERS: &str = "no_responders";

/// Why work that has to be dispatched went back from an agent of the agents file.
const NO_NATS: &str = "no_nats";

/// A dispatch that is about to be put to an agent.
pub(crate) struct Question {
    id: ExecutionId,
    held: Attempt,
    /// The request, or why it can't be made.
    body: Result<Bytes, String>,
}

impl Dispatcher {
    /// Brings a granted slot to use, or gives it back if the log has other plans. Returns when the agent has
    /// answered, or has had its time to.
    pub(crate) async fn launch(self: &Arc<Self>, pool: &Pool, grant: Grant) {
        // Boxed: it is the larger part of every submission.
        if let Some(question) = Box::pin(self.claim(pool, &grant)).await {
            self.ask(question).await;
        }
    }

    /// Writes down that a slot is put to use. What is left to do is to ask the agent.
    pub(crate) async fn claim(self: &Arc<Self>, pool: &Pool, grant: &Grant) -> Option<Question> {
        let id = ExecutionId::new(&grant.hold.execution_id).ok()?;
        // The permit bounds how many of these talk to the bus at once; it is never held across another one.
        let _permit = self.launches.acquire().await.ok()?;
        let dispatched = match self.try_claim(pool, &id, grant).await {
            Ok(dispatched) => dispatched.filter(|e| !e.is_external())?,
            Err(error) => {
                tracing::warn!(execution_id = %id, %error, "launch left to the audit");
                self.ask_for_audit();
                return None;
            }
        };
        self.question(dispatched).await
    }

    /// The dispatch as it will be sent. It is read before anything else is claimed, so that requests go out in the
    /// order of their slots.
    pub(crate) async fn question(&self, execution: Execution) -> Option<Question> {
        let held = execution.current()?.clone();
        let body = self.dispatch_body(&execution, &held).await;
        Some(Question { id: execution.id().clone(), held, body })
    }

    /// The execution once it is dispatched by the log; `None` when the slot went back.
    async fn try_claim(
        self: &Arc<Self>,
        pool: &Pool,
        id: &ExecutionId,
        grant: &Grant,
    ) -> Result<Option<Execution>, DecideError> {
        let Ok(agent_id) = AgentId::new(&grant.agent) else { return Ok(None) };
        // The log's own word, from its leader: whoever was told that an agent drains must not see it get work after
        // that, however far behind our fold is.
        let (execution, agent) =
            tokio::join!(self.ledger.fresh_execution(id), self.ledger.fresh_agent(&agent_id));
        // Reserved but not in the log yet: whoever submits it will find the slot when its event has landed.
        let (Some(execution), agent) = (execution?, agent?) else { return Ok(None) };
        if execution.state != State::Queued || execution.attempt != grant.hold.attempt {
            self.give_back_unless_held(pool, &grant.hold, Some(&execution)).await;
            return Ok(None);
        }
        if execution.request.agent_id.as_ref().is_some_and(|named| *named != agent_id) {
            // Granted to a request with this id of which nothing came; the one in the log asks for somewhere else.
            tracing::info!(execution_id = %id, %agent_id, "a slot of another agent than the submission names");
            self.give_back(pool, &grant.hold).await;
            self.place_waiting(id.as_str()).await;
            return Ok(None);
        }
        let Some((agent, instance)) = agent.and_then(|a| a.instance_id.clone().map(|i| (a, i))) else {
            tracing::warn!(%agent_id, "a slot of an agent without an instance");
            return Ok(None);
        };
        if agent.pool() != *pool {
            // It left, and nobody has told this pool yet.
            Box::pin(self.bring_over(&agent_id, pool)).await;
            self.place_waiting(id.as_str()).await;
            return Ok(None);
        }
        let out_of_reach = decide::is_out_of_reach(&execution, &agent).then_some(NO_NATS);
        if let Some(why) = decide::closed(&agent).or(out_of_reach) {
            self.take_back(pool, id, grant, &agent, why).await?;
            return Ok(None);
        }
        match self
            .in_redis(pool, "confirm", || self.capacity.confirm(pool.as_str(), grant, self.stamp()))
            .await
        {
            Some(Confirmation::Confirmed { .. }) => {}
            Some(Confirmation::Crowded) => {
                self.take_back(pool, id, grant, &agent, CROWDED).await?;
                return Ok(None);
            }
            Some(Confirmation::Lost) => {
                self.place_waiting(id.as_str()).await;
                return Ok(None);
            }
            None => return Ok(None),
        }
        let timeout_ms = execution
            .request
            .timeout_ms
            .or_else(|| agent.profile.as_ref().and_then(|p| p.timeout_ms))
            .unwrap_or(self.settings.default_timeout_ms);
        // Its time starts when this is decided, not when it was first tried.
        let decided = self
            .ledger
            .decide(id, |e| {
                // Put back since this began, by who took this launch for lost or its agent for closed.
                if e.queued_seq != execution.queued_seq {
                    return Err(Refusal::State(e.state.as_str()));
                }
                e.dispatch(grant.hold.attempt, &agent_id, &instance, timeout_ms, self.ledger.now())
            })
            .await;
        let dispatched = match decided {
            Ok(change) => change.after,
            Err(DecideError::Refused(_)) => {
                let fresh = self.ledger.fresh_execution(id).await?;
                self.give_back_unless_held(pool, &grant.hold, fresh.as_ref()).await;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        metrics::histogram!("rollcall_queue_wait_seconds")
            .record(Duration::from_millis(dispatched.state_since.since_ms(dispatched.waiting_since)));
        self.confirm_again(pool, grant, dispatched).await
    }

    /// The slot once more, now that the log says who has it. Whoever takes slots away (a rebuild, an agent's move) reads the
    /// log after that: either it found the dispatch there and kept its slot, or this finds the slot gone. Taken away twice, it
    /// may be found there beside what got its slot in between: then there is one too many. So nothing is put to an agent
    /// that has not a slot of its own which everybody knows of.
    async fn confirm_again(
        self: &Arc<Self>,
        pool: &Pool,
        grant: &Grant,
        dispatched: Execution,
    ) -> Result<Option<Execution>, DecideError> {
        let stamp = || {
            let now = self.stamp();
            // Whoever reads that the agent accepted knows by this how far Redis has come.
            Stamp { log_seq: now.log_seq.max(dispatched.seq), ..now }
        };
        let confirmed =
            self.in_redis(pool, "confirm", || self.capacity.confirm(pool.as_str(), grant, stamp())).await;
        let Some(held) = dispatched.holder().cloned() else { return Ok(None) };
        let has_it = matches!(confirmed, Some(Confirmation::Confirmed { .. }));
        // For an external orchestrator the event is the grant: it can't be taken back, and its slot is a fact.
        if dispatched.is_external() {
            if !has_it {
                self.give_by_log(&grant.hold, &held).await;
            }
            return Ok(Some(dispatched));
        }
        if self.ledger.now().since_ms(held.dispatched_at) >= self.take_up_ages().dispatch_ms {
            // Somebody else may have taken it up by now, and asked.
            self.spawn_settle_unknown(dispatched.id().clone(), held);
            return Ok(None);
        }
        if has_it {
            return Ok(Some(dispatched));
        }
        let id = dispatched.id();
        let crowded = confirmed == Some(Confirmation::Crowded);
        let why = if crowded { CROWDED } else { SLOT_LOST };
        tracing::warn!(execution_id = %id, agent_id = %held.agent_id, why, "no slot is its own, back to its queue unasked");
        let back = self.ledger.decide(id, |e| {
            if decide::is_in_dispatch(e, &held) {
                e.queue(1, Some(why.to_owned()))
            } else {
                Err(Refusal::State(e.state.as_str()))
            }
        });
        match back.await {
            Ok(change) => {
                let hold = grant.hold.clone();
                let leaves = if crowded {
                    Leaves::Refused(Refused::of(grant.agent.clone(), &change.after, Some(&held)))
                } else {
                    // The log may have been believed meanwhile, and the slot noted as it says.
                    Leaves::Granted(decide::millis(held.dispatched_at))
                };
                self.requeue(&change.after, hold.clone(), hold, leaves).await;
                if crowded {
                    self.spawn_reopen(held.agent_id);
                }
                Ok(None)
            }
            // It was cancelled, or taken up by somebody else.
            Err(DecideError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A slot of an agent that takes no work any more goes back; who was to have it waits at the head of its queue.
    async fn take_back(
        self: &Arc<Self>,
        pool: &Pool,
        id: &ExecutionId,
        grant: &Grant,
        agent: &Agent,
        why: &'static str,
    ) -> Result<(), DecideError> {
        tracing::info!(execution_id = %id, agent_id = %agent.id, why, "its agent takes no work now, back to its queue");
        match self.put_back(id, grant.hold.attempt, why).await {
            Ok(change) => {
                // First, or the slot would be given to the next one.
                self.tell_of(agent).await;
                let hold = grant.hold.clone();
                let refused = Leaves::Refused(Refused::of(grant.agent.clone(), &change.after, None));
                self.requeue(&change.after, hold.clone(), hold, refused).await;
                self.spawn_reopen(agent.id.clone());
            }
            Err(DecideError::Refused(_)) => {
                let fresh = self.ledger.fresh_execution(id).await?;
                self.give_back_unless_held(pool, &grant.hold, fresh.as_ref()).await;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Has the log say that what waits goes to the head of its queue: launches that are under way are void by that.
    pub(crate) async fn put_back(
        &self,
        id: &ExecutionId,
        attempt: u32,
        why: &str,
    ) -> Result<Change, DecideError> {
        let put_back = |e: &Execution| {
            if e.state == State::Queued && e.attempt == attempt {
                e.queue(1, Some(why.to_owned()))
            } else {
                Err(Refusal::State(e.state.as_str()))
            }
        };
        self.ledger.decide(id, put_back).await
    }

    /// Asks the agent to take what was dispatched, and writes down what it says.
    pub(crate) async fn ask(self: &Arc<Self>, question: Question) {
        let answer = match self.put(&question).await {
            Answer::Nobody => Answer::Back(NO_RESPONDERS.to_owned()),
            answer => answer,
        };
        if let Err(error) = self.answered(&question.id, &question.held, answer).await {
            tracing::warn!(execution_id = %question.id, %error, "could not write down what an agent said");
            self.spawn_settle_unknown(question.id, question.held);
        }
    }

    /// Asks an agent that may have been asked before, and does not list it. Only its own word takes it back now: that nobody
    /// is there may mean that it has lost its way to the bus.
    pub(crate) async fn ask_again(self: &Arc<Self>, execution: Execution, held: &Attempt) -> Answer {
        // The slot is claimed for one of them, and the question is made of the other.
        if !decide::is_in_dispatch(&execution, held) {
            return Answer::Unknown;
        }
        let pool = self.ledger.read(|p| p.pool_of(&execution));
        match self.claim_by_log(&pool, decide::hold(&execution, held.number), &held.agent_id).await {
            Some(Confirmation::Confirmed { .. }) => {}
            // Perhaps it was never put to it, and there is no room for it now.
            Some(Confirmation::Crowded) => return Answer::Unknown,
            // What was put to an agent has a slot, so it was not.
            Some(Confirmation::Lost) => return Answer::Back(SLOT_LOST.to_owned()),
            None => return Answer::Unknown,
        }
        // One dispatcher at a time: of two answers to the same question one can be a refusal, and the other not.
        let hold = decide::hold(&execution, held.number);
        match self.capacity.take_turn(pool.as_str(), &hold, ASK_TURN).await {
            Ok(true) => {}
            Ok(false) => return Answer::Unknown,
            Err(error) => {
                tracing::debug!(execution_id = %hold.execution_id, %error, "not asked again now");
                return Answer::Unknown;
            }
        }
        let Some(question) = self.question(execution).await else { return Answer::Unknown };
        match self.put(&question).await {
            Answer::Nobody => {
                tracing::info!(agent_id = %held.agent_id, "asked again, and nobody is there");
                Answer::Unknown
            }
            answer => answer,
        }
    }

    /// Writes down what an agent said to a dispatch.
    pub(crate) async fn answered(
        self: &Arc<Self>,
        id: &ExecutionId,
        held: &Attempt,
        answer: Answer,
    ) -> Result<(), DecideError> {
        let decided = match &answer {
            Answer::Accepted => self.ledger.decide(id, |e| decide::accepted(e, held)).await,
            Answer::Back(reason) => {
                tracing::info!(execution_id = %id, agent_id = %held.agent_id, reason, "dispatch refused, back to its queue");
                self.ledger
                    .decide(id, |e| {
                        if decide::is_in_dispatch(e, held) {
                            e.queue(1, Some(reason.clone()))
                        } else {
                            Err(Refusal::State(e.state.as_str()))
                        }
                    })
                    .await
            }
            Answer::Unfit(reason) => self.ledger.decide(id, |e| decide::unfit(e, held, reason)).await,
            Answer::Nobody | Answer::Unknown => {
                tracing::info!(execution_id = %id, agent_id = %held.agent_id, "dispatch not answered, waiting for its heartbeats");
                self.spawn_settle_unknown(id.clone(), held.clone());
                return Ok(());
            }
        };
        match decided {
            Ok(change) => {
                // Boxed: what a change causes can be another launch.
                Box::pin(self.carry_out(&change)).await;
                Ok(())
            }
            // It ended, or somebody cancelled it, in the meantime; whoever did that sees to the rest.
            Err(DecideError::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Puts a dispatch to its agent.
    pub(crate) async fn put(&self, question: &Question) -> Answer {
        let Question { id, held, body } = question;
        // It waited in the queue of an agent that was described in the agents file meanwhile.
        if held.instance_id.is_of_file() {
            return Answer::Unfit(UNSUPPORTED.to_owned());
        }
        let body = match body {
            Ok(body) => body.clone(),
            Err(why) => {
                tracing::warn!(execution_id = %id, why, "can't read what to dispatch");
                return Answer::Unknown;
            }
        };
        let subject = self.subjects.agent_request(&held.agent_id, &held.instance_id, AgentVerb::Dispatch);
        match self.bus.request(subject, body, DISPATCH_ANSWER_TIMEOUT).await {
            Ok(reply) => match serde_json::from_slice::<DispatchReply>(&reply.payload) {
                Ok(DispatchReply { accepted: true, .. }) => Answer::Accepted,
                Ok(DispatchReply { reason, .. }) => {
                    let answer = decide::refused(reason.as_deref());
                    if answer == Answer::Unknown {
                        tracing::info!(execution_id = %id, agent_id = %held.agent_id, reason,
                            "was told to end it before this came, left to the watchdog");
                    }
                    answer
                }
                Err(error) => {
                    tracing::warn!(agent_id = %held.agent_id, %error, "an answer to a dispatch that is none");
                    Answer::Unknown
                }
            },
            Err(RequestError::NoResponders) => Answer::Nobody,
            Err(_) => Answer::Unknown,
        }
    }

    async fn dispatch_body(&self, execution: &Execution, held: &Attempt) -> Result<Bytes, String> {
        let read = |bytes: Bytes| -> Result<Box<RawValue>, String> {
            serde_json::from_slice(&bytes).map_err(|e| format!("a stored payload is no JSON: {e}"))
        };
        let input = read(self.stored(&execution.request.input).await?)?;
        let checkpoint = match &execution.checkpoint {
            Some(stored) => Some(read(self.stored(stored).await?)?),
            None => None,
        };
        let request = DispatchRequest {
            execution_id: execution.id().clone(),
            attempt: held.number,
            timeout_ms: held.timeout_ms,
            deadline: held.deadline,
            input,
            checkpoint,
        };
        serde_json::to_vec(&request).map(Bytes::from).map_err(|e| e.to_string())
    }

    /// Where an execution stands for its submitter.
    pub(crate) async fn reply_for(&self, execution: &Execution) -> rollcall_core::wire::ExecutionReply {
        let view = execution.view();
        rollcall_core::wire::ExecutionReply {
            position: self.position_of(execution).await,
            execution_id: view.execution_id,
            state: view.state,
            agent_id: view.agent_id,
            attempt: view.attempt,
        }
    }

    /// Its place in the queue, while it waits.
    pub(crate) async fn position_of(&self, execution: &Execution) -> Option<u64> {
        if execution.state != State::Queued {
            return None;
        }
        let pool = self.ledger.read(|p| p.pool_of(execution));
        let limit = usize::try_from(self.settings.queue_depth).unwrap_or(usize::MAX).max(1);
        let queue = match decide::queue_of(execution) {
            rollcall_capacity::Queue::Agent(agent) => {
                self.capacity.inspect(pool.as_str(), &agent, limit).await.ok()?.queue
            }
            rollcall_capacity::Queue::Pool | rollcall_capacity::Queue::External => {
                self.capacity.inspect_pool(pool.as_str(), limit).await.ok()?.queue
            }
        };
        let hold = decide::hold(execution, execution.attempt);
        queue.iter().find(|waiting| waiting.hold == hold).map(|waiting| waiting.position)
    }
}

#[cfg(test)]
mod tests {
    use rollcall_capacity::Hold;
    use rollcall_core::wire::Delivery;

    use super::*;
    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn external_work_whose_slot_is_gone_gets_the_one_that_the_log_gives_it() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        fixture.submitted("x", Some("a"), "p", Delivery::External).await;
        let dispatched = fixture.granted("x", "a").await;
        let grant = Grant {
            hold: Hold::new("x", 1),
            agent: "a".to_owned(),
            epoch: dispatcher.capacity.meta("p").await.unwrap().unwrap().epoch,
        };
        // In its own epoch a grant without a slot is lost.
        let pool = Pool::new("p").unwrap();
        let told = dispatcher.confirm_again(&pool, &grant, dispatched).await.unwrap();
        assert!(told.is_some(), "the event is the grant");
        assert_eq!(fixture.held("p", "a").await, [grant.hold]);
    }

    /// `x` was dispatched to `a`, put back by somebody, and dispatched to `b`, as the same attempt. As it was on `a`.
    async fn dispatched_again() -> (Fixture, Execution) {
        let fixture = Fixture::new().await;
        for agent in ["a", "b"] {
            fixture.agent(agent, "p", 1).await;
        }
        fixture.follows().await;
        fixture.dispatcher.audit().await.unwrap();
        fixture.submitted("x", None, "p", Delivery::Push).await;
        let on_a = fixture.granted("x", "a").await;
        let back = |e: &Execution| e.queue(1, Some("test".to_owned()));
        fixture.dispatcher.ledger.decide(on_a.id(), back).await.unwrap();
        fixture.granted("x", "b").await;
        (fixture, on_a)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn who_was_not_asked_is_not_asked_again() {
        let (fixture, on_a) = dispatched_again().await;
        let dispatcher = &fixture.dispatcher;
        let now = dispatcher.ledger.execution(on_a.id()).unwrap();
        let answer = dispatcher.ask_again(now, on_a.current().unwrap()).await;
        assert_eq!(answer, Answer::Unknown);
        assert_eq!(fixture.held("p", "a").await, [], "it has nothing to do with it any more");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_slot_that_is_gone_takes_no_later_dispatch_back() {
        let (fixture, on_a) = dispatched_again().await;
        let dispatcher = &fixture.dispatcher;
        let grant = Grant {
            hold: Hold::new("x", 1),
            agent: "a".to_owned(),
            epoch: dispatcher.capacity.meta("p").await.unwrap().unwrap().epoch,
        };
        let before = dispatcher.ledger.execution(on_a.id()).unwrap();
        let told = dispatcher.confirm_again(&Pool::new("p").unwrap(), &grant, on_a).await.unwrap();
        assert_eq!(told, None, "nothing is put to anybody");
        assert_eq!(dispatcher.ledger.execution(before.id()), Some(before));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_its_agent_was_told_to_end_is_not_given_to_anybody_else() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        let following = fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        fixture.submitted("x", None, "p", Delivery::Push).await;
        let on_a = fixture.granted("x", "a").await;
        dispatcher.capacity.adopt("p", "a", &Hold::new("x", 1), 1, dispatcher.stamp()).await.unwrap();
        let told = [serde_json::json!({"accepted": false, "reason": "terminated"})];
        let asked = fixture.answers("a", AgentVerb::Dispatch, &told).await;
        dispatcher.ask(dispatcher.question(on_a.clone()).await.unwrap()).await;
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);
        assert_eq!(dispatcher.ledger.execution(on_a.id()), Some(on_a), "it may have run there");
        assert_eq!(fixture.held("p", "a").await, [Hold::new("x", 1)]);
        fixture.falls_behind(following).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_dispatcher_at_a_time_asks_an_agent_again() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        fixture.submitted("x", None, "p", Delivery::Push).await;
        let on_a = fixture.granted("x", "a").await;
        let held = on_a.current().unwrap();
        // It had no room for the one, and has for the other a moment later.
        let answers = [
            serde_json::json!({"accepted": false, "reason": "at_capacity"}),
            serde_json::json!({"accepted": true}),
        ];
        let asked = fixture.answers("a", AgentVerb::Dispatch, &answers).await;
        let (one, other) =
            tokio::join!(dispatcher.ask_again(on_a.clone(), held), dispatcher.ask_again(on_a.clone(), held));
        let refused = Answer::Back("at_capacity".to_owned());
        assert!(
            [&one, &other].contains(&&refused) && [&one, &other].contains(&&Answer::Unknown),
            "{one:?} {other:?}"
        );
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);
        // Whoever could not ask does later.
        while dispatcher.ask_again(on_a.clone(), held).await != Answer::Accepted {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
