//! The dispatcher around its real fold and decisions: admits into capacity, dispatches, takes in reports, carries out
//! what changes mean, and audits capacity against the log.

mod api;
mod audit;
mod effects;
mod launch;
mod report;
mod slots;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use dispatcher::{
    decide,
    state::{Change, Logged, Projection, TakeUpAges},
};
use rollcall_capacity::{AgentSetting, ModelCapacity, Stamp};
use rollcall_core::{
    AgentId, ExecutionId, Pool, Timestamp,
    event::{EventBody, ExecutionEvent},
    execution::{Execution, Refusal, State},
};

use crate::{
    Defect,
    agent::Beat,
    exec::{Owner, pause},
    log::{Appended, Entry},
    stage::{POOL, Stage},
    watchdog::LIMITS,
};

pub(crate) use launch::ANSWER_TIMEOUT_MS;

const DECISION_TRIES_MAX: u32 = 16;
const EXPIRY_MS: u64 = 500;
const AUDIT_MS: u64 = 15_000;
const QUICK_AUDIT_MS: u64 = 1_000;
const CLOCK_MS: u64 = 5_000;
const TRY_AGAIN_MS: u64 = 500;
/// An agent's time to answer a dispatch, or that work is dead, and then some.
const TAKE_UP: TakeUpAges = TakeUpAges { dispatch_ms: 5_000, cancel_ms: LIMITS.terminate_grace_ms + 5_000 };
/// Pause between the steps of an effect: room for a crash.
const STEP_MS: u64 = 2;

/// A dispatcher process.
pub(crate) struct Dispatcher {
    stage: Rc<Stage>,
    me: usize,
    state: RefCell<Projection>,
    position: Cell<u64>,
    live: Cell<bool>,
    /// Capacity was brought in line with the log: before that nobody knows where it has an agent.
    audited: Cell<bool>,
    ready: Cell<bool>,
    capacity: ModelCapacity,
    /// What capacity was told of each agent last.
    applied: RefCell<BTreeMap<AgentId, AgentSetting>>,
    beats: RefCell<BTreeMap<AgentId, Rc<Beat>>>,
    reopening: RefCell<BTreeSet<AgentId>>,
    unknown: RefCell<BTreeSet<(ExecutionId, u32, Timestamp)>>,
    cancelling: RefCell<BTreeSet<(ExecutionId, u32)>>,
    audit_wanted: Cell<bool>,
}

/// Why a decision came to nothing.
#[derive(Debug)]
enum Undecided {
    Refused,
    Away,
}

impl Dispatcher {
    pub(crate) fn new(stage: &Rc<Stage>, me: usize) -> Rc<Self> {
        Rc::new(Self {
            capacity: stage.capacity.handle(),
            stage: Rc::clone(stage),
            me,
            state: RefCell::default(),
            position: Cell::new(0),
            live: Cell::new(false),
            audited: Cell::new(false),
            ready: Cell::new(false),
            applied: RefCell::default(),
            beats: RefCell::default(),
            reopening: RefCell::default(),
            unknown: RefCell::default(),
            cancelling: RefCell::default(),
            audit_wanted: Cell::new(false),
        })
    }

    fn spawn(&self, work: impl Future<Output = ()> + 'static) {
        self.stage.exec.spawn(Owner::Service(self.me), work);
    }

    async fn step(&self) {
        pause(&self.stage.exec, self.stage.exec.between(0, STEP_MS)).await;
    }

    fn now(&self) -> Timestamp {
        self.stage.clock(self.me)
    }

    fn stamp(&self) -> Stamp {
        Stamp::new(decide::millis(self.now()), self.position.get())
    }

    fn execution(&self, id: &ExecutionId) -> Option<Execution> {
        self.state.borrow().execution(id).cloned()
    }

    pub(crate) fn run(self: &Rc<Self>) {
        let this = Rc::clone(self);
        self.spawn(async move {
            // Deadlines are written on this clock, and judged by others.
            this.stage.set_clock(this.me).await;
            let keeper = Rc::clone(&this);
            this.spawn(async move { keeper.keep_clock().await });
            while this.stage.leader(this.me).await.is_err() {}
            this.fold();
            this.live.set(true);
            while this.audit().await.is_err() {
                pause(&this.stage.exec, TRY_AGAIN_MS).await;
            }
            this.audited.set(true);
            this.take_up().await;
            this.ready.set(true);
            this.take_reports();
            loop {
                pause(&this.stage.exec, EXPIRY_MS).await;
                this.expire().await;
            }
        });
        let this = Rc::clone(self);
        self.spawn(async move {
            let mut quiet = 0;
            loop {
                pause(&this.stage.exec, QUICK_AUDIT_MS).await;
                if !this.ready.get() {
                    continue;
                }
                this.take_up_unanswered();
                quiet += QUICK_AUDIT_MS;
                if this.audit_wanted.replace(false) || quiet >= AUDIT_MS {
                    quiet = 0;
                    let _ = this.audit().await;
                } else if this.state.borrow().anything_waits() {
                    this.finish_unconfirmed().await;
                    this.fill().await;
                }
            }
        });
    }

    /// Keeps the clock on the time of the log's server.
    async fn keep_clock(self: Rc<Self>) {
        loop {
            pause(&self.stage.exec, CLOCK_MS).await;
            self.compare_clocks().await;
        }
    }

    async fn compare_clocks(&self) {
        if let Ok(head) = self.stage.head(self.me).await {
            self.stage.corrects(self.me, &head, false);
        }
    }

    /// The host's clock jumped, or the process stood still.
    pub(crate) fn compares_clocks(self: &Rc<Self>) {
        if self.live.get() {
            let this = Rc::clone(self);
            self.spawn(async move { this.compare_clocks().await });
        }
    }

    /// What a predecessor left half done.
    async fn take_up(self: &Rc<Self>) {
        let agents: Vec<AgentId> = self.state.borrow().agents().map(|a| a.id.clone()).collect();
        for agent in agents.into_iter().collect::<BTreeSet<_>>() {
            self.apply_agent(&agent).await;
        }
        self.take_up_unanswered();
    }

    /// What its dispatcher may have left when it died.
    fn take_up_unanswered(self: &Rc<Self>) {
        let unanswered = self.state.borrow().unanswered(self.now(), TAKE_UP);
        for (id, state, held) in unanswered {
            match state {
                State::Cancelling => self.spawn_cancel(id, held.number),
                _ => self.spawn_settle_unknown(id, held),
            }
        }
    }

    pub(crate) fn beat(&self, beat: &Rc<Beat>) {
        let mut beats = self.beats.borrow_mut();
        let newer = |old: &Rc<Beat>| old.instance != beat.instance || old.seq < beat.seq;
        if beats.get(&beat.agent).is_none_or(newer) {
            beats.insert(beat.agent.clone(), Rc::clone(beat));
        }
    }

    pub(crate) fn tail(self: &Rc<Self>) {
        if self.live.get() {
            self.fold();
        }
    }

    fn fold(self: &Rc<Self>) {
        let log = self.stage.log.borrow();
        let from = usize::try_from(self.position.get()).unwrap_or(usize::MAX);
        let entries: Vec<_> = log.entries().iter().skip(from).map(Rc::clone).collect();
        self.position.set(log.last_seq());
        drop(log);
        for entry in entries {
            match &entry.event.body {
                EventBody::Execution(event) => {
                    let change = self.state.borrow_mut().apply_execution(entry.seq, event, entry.event.time);
                    if let Ok(Some(change)) = change
                        && is_foreign(&entry)
                    {
                        self.hand_out(vec![change]);
                    }
                }
                EventBody::Agent(event) => {
                    let news = self.state.borrow_mut().apply_agent(entry.seq, event, entry.event.time);
                    if news && self.audited.get() {
                        let (this, id) = (Rc::clone(self), event.agent_id().clone());
                        self.spawn(async move { this.apply_agent(&id).await });
                    }
                }
                EventBody::System(_) => {}
            }
        }
        if !self.stage.has(Defect::RestoredBelieved) {
            for (pool, seq) in self.state.borrow().reflected() {
                self.capacity.expect(pool.as_str(), *seq);
            }
        }
    }

    /// Whoever takes the fold past what others changed has it carried out.
    fn hand_out(self: &Rc<Self>, changes: Vec<Change>) {
        if changes.is_empty() || !self.live.get() {
            return;
        }
        let this = Rc::clone(self);
        self.spawn(async move {
            for change in &changes {
                this.carry_out(change).await;
            }
        });
    }

    /// The execution as the leader has it.
    async fn fresh(self: &Rc<Self>, id: &ExecutionId) -> Result<Option<Execution>, Undecided> {
        let delivered = self.position.get();
        self.stage.leader(self.me).await.map_err(|_| Undecided::Away)?;
        let entries = self.stage.log.borrow().history(&self.stage.subjects.execution_event(id));
        let logged = entries.iter().filter_map(|entry| {
            let (event, time, foreign) = (entry.execution()?, entry.event.time, is_foreign(entry));
            Some(Logged { seq: entry.seq, event, time, foreign })
        });
        let last = entries.last().map_or(0, |entry| entry.seq);
        let (folded, changes) = self.state.borrow_mut().catch_up(logged, last, delivered);
        self.hand_out(changes);
        Ok(folded)
    }

    async fn decide(
        self: &Rc<Self>,
        id: &ExecutionId,
        mut decision: impl FnMut(&Execution) -> Result<ExecutionEvent, Refusal>,
    ) -> Result<Change, Undecided> {
        for tries in 0..DECISION_TRIES_MAX {
            let known = self.execution(id).filter(|_| tries == 0);
            let execution = match known {
                Some(known) => known,
                None => self.fresh(id).await?.ok_or(Undecided::Refused)?,
            };
            let Ok(event) = decision(&execution) else {
                if tries > 0 {
                    return Err(Undecided::Refused);
                }
                continue;
            };
            let now = self.now();
            let subject = self.stage.subjects.execution_event(id);
            let entry = self.stage.event(self.me, "dispatcher", id.as_str(), now, event.clone().into());
            let appended = self.stage.append(self.me, &subject, &entry, execution.seq).await;
            let Appended::At(seq) = appended.map_err(|_| Undecided::Away)? else { continue };
            let mut after = execution.clone();
            let _ = after.evolve(seq, &event, now);
            self.state.borrow_mut().insert(after.clone());
            return Ok(Change { before: Some(execution), after });
        }
        Err(Undecided::Away)
    }
}

fn is_foreign(entry: &Entry) -> bool {
    !entry.event.source.starts_with("/rollcall/dispatcher/")
}

/// The pool as the decisions name it.
fn pool() -> Pool {
    Pool::new(POOL).unwrap_or_default()
}
