//! Simulated agents: one `Instance` per process start, around the agent library's real book of what it holds. It keeps the
//! contract's promises (list from acceptance until the final report is acknowledged, run an attempt once); what becomes
//! of the work is drawn.

mod work;

use std::{collections::BTreeMap, rc::Rc};

use rollcall_agent::state::{Admission, Book, Key, Refusal};
use rollcall_core::{
    AgentId, ExecutionId, InstanceId,
    wire::{AgentState, Claim, Heartbeat, InFlight, OwnedClaim},
};

use crate::{
    exec::{Owner, Promise, pause},
    stage::{INTERVAL_MS, Stage},
    truth::End,
};

/// More than any agent holds here.
const CAPACITY_MAX: u32 = 16;
/// Of a thousand instances.
const TRUSTING: u64 = 500;
/// Pause between two tries to hand in a report.
const REPORT_AGAIN_MS: u64 = 400;

/// A heartbeat, as everybody gets it.
#[derive(Debug)]
pub(crate) struct Beat {
    pub agent: AgentId,
    pub instance: InstanceId,
    pub seq: u64,
    pub state: AgentState,
    pub claims: Vec<OwnedClaim>,
    pub capacity: u32,
    pub bytes: Vec<u8>,
}

impl Beat {
    /// The heartbeat without its bytes.
    pub(crate) fn heartbeat(&self) -> Heartbeat<'_> {
        let claim = |c: &'_ OwnedClaim| (c.id.clone(), c.attempt, c.progress);
        let executions = self
            .claims
            .iter()
            .map(claim)
            .map(|(id, attempt, progress)| Claim { id: id.as_str().to_owned().into(), attempt, progress })
            .collect();
        Heartbeat {
            agent_id: None,
            instance_id: self.instance.as_str().into(),
            seq: self.seq,
            state: self.state,
            capacity: self.capacity,
            executions,
            interval_ms: Some(INTERVAL_MS),
            pool: None,
            timeout_ms: None,
            reason: None,
            version: None,
            labels: None,
            probe: None,
            control: None,
            sent_at: None,
        }
    }
}

/// A process of an agent.
#[derive(Debug)]
pub(crate) struct Instance {
    pub agent: AgentId,
    pub id: InstanceId,
    pub alive: bool,
    /// When it began.
    pub born_at: u64,
    /// Stopped (not dead) until then.
    pub frozen_until: u64,
    book: Book,
    /// Executions that it can hold, by its own word now. The library's book knows a bound only.
    pub capacity: u32,
    /// The progress of work that stands still.
    stuck: BTreeMap<Key, u64>,
    /// How it answers requests to end something: never, of ten.
    stubborn: u64,
    /// Takes whatever it is asked to, as others have to see to it that this is not more than it can hold.
    trusts: bool,
}

/// What an agent says to a request; `None`: nothing.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    Accepted,
    Refused(&'static str),
    Terminated,
    NotRunning,
    StillRunning,
    Holds(Vec<OwnedClaim>),
    Ok,
}

/// A request to an agent.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Dispatch(ExecutionId, u32, u64),
    Terminate(ExecutionId, u32),
    Executions,
    Goodbye(InFlight),
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    Said(Reply),
    NoResponders,
    Nothing,
    /// The link was known to be cut: it could not be asked.
    Void,
}

impl Stage {
    /// A new process of an agent.
    pub(crate) fn boot(self: &Rc<Self>, agent: &AgentId, capacity: u32) -> usize {
        let at = self.instances.borrow().len();
        let id = InstanceId::new(&format!("{agent}-i{at}")).expect("a valid id");
        self.say(|| format!("agent {agent} starts as {id}"));
        let stubborn = if self.exec.chance(150) { 10 } else { 1 };
        let trusts = self.exec.chance(TRUSTING);
        self.instances.borrow_mut().push(Instance {
            agent: agent.clone(),
            id,
            alive: true,
            born_at: self.exec.now(),
            frozen_until: 0,
            book: Book::new(CAPACITY_MAX),
            capacity,
            stuck: BTreeMap::new(),
            stubborn,
            trusts,
        });
        let stage = Rc::clone(self);
        self.exec.spawn(Owner::Instance(at), async move {
            // Instances don't beat in step.
            pause(&stage.exec, stage.exec.between(0, 200)).await;
            loop {
                stage.beat(at, None);
                pause(&stage.exec, INTERVAL_MS).await;
            }
        });
        at
    }

    /// The process is killed.
    pub(crate) fn kill_instance(self: &Rc<Self>, at: usize) {
        let mut instances = self.instances.borrow_mut();
        let instance = &mut instances[at];
        if !instance.alive {
            return;
        }
        self.say(|| format!("{} is killed", instance.id));
        instance.alive = false;
        let held: Vec<Key> = instance.book.claims().cloned().collect();
        let id = instance.id.clone();
        drop(instances);
        for key in held {
            let now = self.exec.now();
            self.truth.borrow_mut().ran(&id, &key.execution_id, key.attempt, now, End::Killed);
            self.note_dropped(&id, key);
        }
        self.exec.kill(Owner::Instance(at));
    }

    /// An agent holds more from now on, or less, perhaps less than it has.
    pub(crate) fn set_capacity(&self, at: usize, capacity: u32) {
        let instance = &mut self.instances.borrow_mut()[at];
        let before = std::mem::replace(&mut instance.capacity, capacity);
        let (id, runs) = (&instance.id, instance.book.running());
        self.say(|| format!("{id} holds {capacity} from now on, {before} until now, and has {runs}"));
        self.count(if runs > capacity as usize { "capacity below what runs" } else { "capacity changed" });
    }

    fn note_dropped(&self, instance: &InstanceId, key: Key) {
        let now = self.exec.now();
        self.truth.borrow_mut().dropped.insert((instance.clone(), key.execution_id, key.attempt), now);
    }

    fn beat(self: &Rc<Self>, at: usize, state: Option<AgentState>) {
        let now = self.exec.now();
        let beat = {
            let mut instances = self.instances.borrow_mut();
            let instance = &mut instances[at];
            if !instance.alive || instance.frozen_until > now {
                return;
            }
            let mut beat = Beat {
                agent: instance.agent.clone(),
                instance: instance.id.clone(),
                seq: instance.book.next_seq(),
                state: state.unwrap_or(instance.state()),
                claims: instance.claims(now),
                capacity: instance.capacity,
                bytes: Vec::new(),
            };
            beat.bytes = serde_json::to_vec(&beat.heartbeat()).expect("plain values");
            Rc::new(beat)
        };
        let loses = self.agents_losing.borrow().get(&beat.agent).copied();
        if self.is_cut(&beat.agent) || loses.is_some_and(|per_mille| self.exec.chance(per_mille)) {
            return;
        }
        if self.broadcast(&beat) {
            let mut truth = self.truth.borrow_mut();
            truth.beaten.entry(beat.instance.clone()).or_default().push(now);
            for claim in &beat.claims {
                let key = (beat.instance.clone(), claim.id.clone(), claim.attempt);
                truth.listed.entry(key).or_default().push(now);
            }
        }
    }

    /// Asks an instance something over the bus.
    pub(crate) async fn ask(
        self: &Rc<Self>,
        me: usize,
        agent: &AgentId,
        instance: &InstanceId,
        request: Request,
        timeout: u64,
    ) -> Answer {
        if self.link(me).noticed {
            return Answer::Void;
        }
        if let Request::Dispatch(id, attempt, _) = &request {
            let ask = (self.exec.now(), agent.clone(), id.clone(), *attempt);
            self.truth.borrow_mut().asked.push(ask);
        }
        let answer = Promise::new(&self.exec);
        let asked_at = self.exec.now();
        answer.keep_after(timeout, Answer::Nothing);
        for _ in 0..=usize::from(self.comes_twice()) {
            let Some(way) = self.way().filter(|_| !self.link(me).bus_cut) else { continue };
            let (stage, answer, request) = (Rc::clone(self), answer.clone(), request.clone());
            let (agent, instance) = (agent.clone(), instance.clone());
            self.exec.later(way, move || {
                let (reply, thinking) = stage.deliver(&agent, &instance, &request, asked_at);
                if let Some(way) = stage.way().filter(|_| !stage.link(me).bus_cut)
                    && reply != Answer::Nothing
                {
                    answer.keep_after(way + thinking, reply);
                }
            });
        }
        answer.await
    }

    pub(crate) fn deliver(
        self: &Rc<Self>,
        agent: &AgentId,
        instance: &InstanceId,
        request: &Request,
        asked_at: u64,
    ) -> (Answer, u64) {
        let now = self.exec.now();
        let at = self.instances.borrow().iter().position(|i| i.id == *instance);
        let Some(at) = at.filter(|at| self.instances.borrow()[*at].alive) else {
            return (Answer::NoResponders, 0);
        };
        if self.is_cut(agent) || self.instances.borrow()[at].frozen_until > now {
            return (Answer::Nothing, 0);
        }
        let reply = match request {
            Request::Executions => Reply::Holds(self.instances.borrow()[at].claims(now)),
            Request::Dispatch(id, attempt, timeout) => {
                self.take(at, Key::new(id.clone(), *attempt), *timeout, asked_at)
            }
            Request::Terminate(id, attempt) => return (Answer::Said(self.end(at, id, *attempt)), 50),
            Request::Goodbye(in_flight) => {
                self.shut_down(at, *in_flight);
                Reply::Ok
            }
        };
        self.say(|| format!("{instance} answers {request:?} with {reply:?}"));
        (Answer::Said(reply), 0)
    }

    fn take(self: &Rc<Self>, at: usize, key: Key, timeout: u64, asked_at: u64) -> Reply {
        let admission = self.instances.borrow_mut()[at].admit(&key);
        match admission {
            Admission::Start => {
                self.note_run(at, &key, asked_at);
                self.perform(at, key, timeout);
                Reply::Accepted
            }
            Admission::Held => Reply::Accepted,
            Admission::Refused(refusal) => {
                if let Refusal::OlderAttemptRuns(older) = &refusal {
                    // It no longer counts and is in the way.
                    self.end(at, &older.execution_id, older.attempt);
                }
                Reply::Refused(refusal.as_str())
            }
        }
    }
}

impl Instance {
    /// What it holds.
    pub(crate) fn claims_left(&self) -> impl Iterator<Item = &Key> {
        self.book.claims()
    }

    fn admit(&mut self, key: &Key) -> Admission {
        let full = !self.trusts && self.book.running() >= self.capacity as usize;
        match self.book.dispatch(key) {
            Admission::Start if full => {
                self.book.forget(key);
                Admission::Refused(Refusal::AtCapacity)
            }
            admission => admission,
        }
    }

    fn state(&self) -> AgentState {
        match self.book.state() {
            AgentState::Ready if self.book.running() >= self.capacity as usize => AgentState::Busy,
            state => state,
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn claims(&self, now: u64) -> Vec<OwnedClaim> {
        self.book
            .claims()
            .map(|key| OwnedClaim {
                id: key.execution_id.clone(),
                attempt: key.attempt,
                progress: Some(self.stuck.get(key).copied().unwrap_or(now) as f64),
            })
            .collect()
    }
}
