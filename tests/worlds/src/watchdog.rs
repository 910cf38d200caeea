//! The watchdog around its real judgement: `watchdog::state::World` hears, folds and judges; this carries out what it
//! says over the simulated network, in the order the service does.

mod errands;
mod sentry;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    rc::Rc,
};

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp,
    event::{EventBody, ExecutionEvent, RecoveryReason},
    execution::Execution,
    wire::TerminateState,
};
use watchdog::{
    breaker::BreakerLimits,
    decide::{Judgement, Look, Verdict},
    effect,
    facts::{Edge, Facts, Limits, Promise, Waiting},
    sight::Void,
    state::{Config, Looks, World},
};

use crate::{
    Defect,
    agent::{Answer, Beat, Reply, Request},
    exec::{Owner, pause},
    log::Appended,
    stage::{INTERVAL_MS, Stage},
};

/// Durations of this small, fast fleet.
pub(crate) const LIMITS: Limits = Limits {
    dispatch_grace_ms: 3_000,
    lost_after_ms: 3_000,
    stale_after_ms: 15_000,
    terminate_grace_ms: 300,
    failure_threshold: 3,
    interval_ms: INTERVAL_MS,
};
const CONFIG: Config = Config {
    limits: LIMITS,
    breaker: BreakerLimits { fraction: 0.5, min_agents: 3, window_ms: 5_000 },
    recovery_rate: 20,
};
const LOOK_TIMEOUT_MS: u64 = 1_000;
const TERMINATE_TIMEOUT_MS: u64 = LIMITS.terminate_grace_ms + 2_000;
const SCHEDULE_MS: u64 = 100;
const STEPS_MAX: usize = 11;
const RETRY_MS: u64 = 500;

/// A watchdog process.
pub(crate) struct Watchdog {
    stage: Rc<Stage>,
    me: usize,
    world: RefCell<World>,
    position: Cell<u64>,
    /// Its clock is set, and it hears.
    listening: Cell<bool>,
    following: Cell<bool>,
}

impl Watchdog {
    pub(crate) fn new(stage: &Rc<Stage>, me: usize) -> Rc<Self> {
        Rc::new(Self {
            stage: Rc::clone(stage),
            me,
            world: RefCell::new(World::new(CONFIG)),
            position: Cell::new(0),
            listening: Cell::new(false),
            following: Cell::new(false),
        })
    }

    fn with<R>(&self, act: impl FnOnce(&mut World, Timestamp) -> R) -> R {
        act(&mut self.world.borrow_mut(), self.stage.clock(self.me))
    }

    fn spawn(&self, work: impl Future<Output = ()> + 'static) {
        self.stage.exec.spawn(Owner::Service(self.me), work);
    }

    fn forgets_void(&self) -> bool {
        self.stage.has(Defect::VoidCountedAsAbsent)
    }

    pub(crate) fn run(self: &Rc<Self>) {
        let this = Rc::clone(self);
        self.spawn(async move {
            // No deadline is judged on a clock that is not the log's.
            this.stage.set_clock(this.me).await;
            let connected = this.forgets_void() || !this.stage.link(this.me).is_cut();
            this.with(|world, _| world.sight.set_connected(connected));
            this.listening.set(true);
            let sentry = Rc::clone(&this);
            this.spawn(async move { sentry.watch_self().await });
            let breaker = Rc::clone(&this);
            this.spawn(async move { breaker.watch_breaker().await });
            while this.stage.leader(this.me).await.is_err() {}
            this.following.set(true);
            this.fold();
            this.with(|world, now| {
                world.sight.set_caught_up(true);
                world.check_breaker(now);
                world.settle_all(now);
            });
            loop {
                while let Some((id, attempt)) = this.with(World::take_due) {
                    let worker = Rc::clone(&this);
                    this.spawn(async move { worker.land(id, attempt).await });
                }
                this.errands();
                pause(&this.stage.exec, SCHEDULE_MS).await;
            }
        });
    }

    pub(crate) fn beat(&self, beat: &Beat) {
        if !self.listening.get() {
            return;
        }
        let epoch = self.with(|world, _| world.sight.epoch());
        let (after, why) = self.with(|world, now| {
            world.beat(beat.agent.as_str(), &beat.heartbeat(), now);
            (world.sight.epoch(), world.sight.trouble())
        });
        if after > epoch && why == Void::Gaps {
            self.stage.count("gaps believed by a watchdog");
        }
    }

    pub(crate) fn tail(self: &Rc<Self>) {
        if self.following.get() {
            self.fold();
        }
    }

    fn fold(&self) {
        let log = self.stage.log.borrow();
        let from = usize::try_from(self.position.get()).unwrap_or(usize::MAX);
        for entry in log.entries().iter().skip(from) {
            // What does not fit is the judge's business.
            let _ = self.with(|world, now| {
                world.apply(&self.stage.subjects, &entry.subject, entry.seq, &entry.bytes, now)
            });
        }
        self.position.set(log.last_seq());
        drop(log);
        self.with(World::after_batch);
        let due: BTreeSet<ExecutionId> =
            self.with(|world, _| std::mem::take(&mut world.histories_due)).into_iter().collect();
        for id in due {
            // Ended, and started again.
            if let Some(execution) = history(&self.stage, &id).filter(|e| !e.state.is_terminal()) {
                self.with(|world, now| world.adopt(execution, now));
            }
        }
    }

    fn adopt(&self, id: &ExecutionId) -> bool {
        let Some(execution) = history(&self.stage, id) else { return false };
        self.with(|world, now| {
            let known =
                world.executions.get(id).map(|e| e.seq).or_else(|| world.ended.get(id).map(|n| n.seq));
            if known.is_none_or(|known| known < execution.seq) {
                world.adopt(execution, now);
            }
        });
        true
    }

    async fn refresh(&self, id: &ExecutionId) -> Result<bool, String> {
        self.stage.leader(self.me).await.map_err(|_| "the log is away".to_owned())?;
        Ok(self.adopt(id))
    }

    // ---- judgements

    async fn land(self: Rc<Self>, id: ExecutionId, attempt: u32) {
        let worked = self.work(&id).await;
        let (judged, retry) = match worked {
            Ok(judged) => (judged, None),
            Err(why) => {
                self.stage.say(|| format!("watchdog {}: {id}: {why}", self.me));
                (None, Some(self.stage.clock(self.me).plus_ms(RETRY_MS)))
            }
        };
        self.with(|world, now| world.landed((&id, attempt), judged, retry, now));
    }

    async fn work(&self, id: &ExecutionId) -> Result<Option<(Judgement, Facts)>, String> {
        let mut looks = Looks::default();
        let mut first: Option<(u32, InstanceId)> = None;
        let mut is_fresh = false;
        for _ in 0..STEPS_MAX {
            let judged = self.with(|world, now| {
                let held = world.executions.get(id)?.holder()?.clone();
                world.judge(id, &looks, now).map(|(judgement, facts)| (judgement, facts, held))
            });
            let Some((judgement, facts, held)) = judged else { return Ok(None) };
            let key = (held.number, held.instance_id.clone());
            if first.get_or_insert_with(|| key.clone()) != &key {
                return Ok(None);
            }
            match judgement.verdict {
                Verdict::Leave | Verdict::WaitUntil(_) | Verdict::Postpone(_) => {
                    return Ok(Some((judgement, facts)));
                }
                Verdict::Look(Look::Canary) => {
                    if !self.canary().await {
                        return Err("the canary did not come back".to_owned());
                    }
                    looks.canary = true;
                }
                Verdict::Look(Look::Report) => {
                    self.stage.leader(self.me).await.map_err(|_| "the reports are away".to_owned())?;
                    let last = self.stage.reports.borrow().last(&held.agent_id, id);
                    looks.waiting = effect::waiting(held.number, last);
                }
                Verdict::Look(Look::Turn) => self.with(|world, now| world.take_turn(id, now)),
                Verdict::Look(Look::Instance) => {
                    looks.of_started = facts.started;
                    looks.edge = self.look(id, held.number, &held.agent_id, &held.instance_id).await;
                }
                Verdict::Terminate(_) | Verdict::Look(Look::Promise(_)) if !is_fresh => {
                    self.refresh(id).await?;
                    is_fresh = true;
                }
                Verdict::Look(Look::Promise(_)) => {
                    let asked = Request::Terminate(id.clone(), held.number);
                    let (agent, instance) = (&held.agent_id, &held.instance_id);
                    match self.stage.ask(self.me, agent, instance, asked, TERMINATE_TIMEOUT_MS).await {
                        Answer::Said(Reply::Terminated) => looks.promise = Promise::Ended,
                        Answer::Said(Reply::NotRunning) => looks.promise = Promise::NotRunning,
                        Answer::Said(Reply::StillRunning) => {
                            self.with(|world, now| world.note_full_answer(id, now));
                            looks.edge = Edge::Lists;
                        }
                        _ => looks.promise = Promise::NoAnswer,
                    }
                    looks.waiting = Waiting::Unasked;
                }
                Verdict::Terminate(reason) => {
                    self.end(id, held.number, &held.agent_id, &held.instance_id, reason).await;
                    looks.waiting = Waiting::Unasked;
                }
                Verdict::Recover(_) => return self.recover(id, &looks).await.map(|()| None),
            }
        }
        Err(format!("no decision after {STEPS_MAX} looks"))
    }

    fn answered(&self, agent: &AgentId, instance: &InstanceId) {
        self.with(|world, _| {
            let entry = world.agents.get_mut(agent);
            if let Some(claims) = entry.and_then(|entry| entry.claims_mut(instance.as_str())) {
                claims.answered = true;
            }
        });
    }

    async fn look(&self, id: &ExecutionId, attempt: u32, agent: &AgentId, instance: &InstanceId) -> Edge {
        let ask = || self.stage.ask(self.me, agent, instance, Request::Executions, LOOK_TIMEOUT_MS);
        let answer = match ask().await {
            Answer::Nothing => ask().await,
            answer => answer,
        };
        match answer {
            Answer::Said(Reply::Holds(claims)) => {
                self.answered(agent, instance);
                let lists = claims.iter().any(|claim| claim.id == *id && claim.attempt == attempt);
                self.with(|world, now| {
                    if lists {
                        world.note_full_answer(id, now);
                        Edge::Lists
                    } else {
                        Edge::ListsNot { times: world.note_empty_answer(id, INTERVAL_MS, now) }
                    }
                })
            }
            Answer::NoResponders => Edge::NoResponders,
            Answer::Void if !self.forgets_void() => Edge::Void,
            _ => Edge::NoAnswer,
        }
    }

    async fn end(
        &self,
        id: &ExecutionId,
        attempt: u32,
        agent: &AgentId,
        instance: &InstanceId,
        reason: RecoveryReason,
    ) {
        let request = Request::Terminate(id.clone(), attempt);
        let answer = self.stage.ask(self.me, agent, instance, request, TERMINATE_TIMEOUT_MS).await;
        let asked = match answer {
            Answer::Said(Reply::Terminated) => Some(TerminateState::Terminated),
            Answer::Said(Reply::NotRunning) => Some(TerminateState::NotRunning),
            _ => None,
        };
        self.with(|world, now| world.note_asked(id, reason, asked, now));
    }

    async fn recover(&self, id: &ExecutionId, looks: &Looks) -> Result<(), String> {
        let decided = self.with(|world, now| {
            let execution = world.executions.get(id)?;
            let held = execution.holder()?;
            let (judgement, facts) = world.judge(id, looks, now)?;
            let Verdict::Recover(finding) = judgement.verdict else { return None };
            let loss = effect::loss(execution, held, &finding, &facts, serde_json::Value::Null, now);
            Some((execution.lose(loss).ok()?, execution.seq, now))
        });
        let Some((event, expected, now)) = decided else { return Ok(()) };
        let subject = self.stage.subjects.execution_event(id);
        let event = self.stage.event(self.me, "watchdog", id.as_str(), now, EventBody::Execution(event));
        match self.stage.append(self.me, &subject, &event, expected).await {
            Ok(Appended::At(_)) => {
                self.fold();
                Ok(())
            }
            Ok(Appended::Conflict) => self.refresh(id).await.map(|_| ()),
            Err(_) => Err("the log is away".to_owned()),
        }
    }
}

/// An execution as the whole log has it now.
pub(crate) fn history(stage: &Stage, id: &ExecutionId) -> Option<Execution> {
    let entries = stage.log.borrow().history(&stage.subjects.execution_event(id));
    let event = |entry: &crate::log::Entry| -> Option<(u64, ExecutionEvent, Timestamp)> {
        entry.execution().map(|event| (entry.seq, event.clone(), entry.event.time))
    };
    let events: Vec<_> = entries.iter().filter_map(|entry| event(entry)).collect();
    let mut execution = Execution::fold(events.iter().map(|(seq, event, time)| (*seq, event, *time)))?;
    execution.seq = execution.seq.max(entries.last()?.seq);
    Some(execution)
}
