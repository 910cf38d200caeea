//! The health-prober around its real detector: heartbeats and silence become statuses in the log, operators' wishes and
//! marks as well. Heartbeats are its only channel here; edge pings and active probes stay out of the simulation.

mod hearing;
mod steps;
mod wishes;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use health_prober::{
    config::Policy,
    hear::{Heard, hear},
    state::{Fleet, Index, Loss, interval_ms, misses},
};
use rollcall_core::{
    AgentId, InstanceId, Timestamp,
    agent::Status,
    event::{EventBody, ExecutionEvent},
    sight::Void,
    wire::InFlight,
};

use crate::{
    Defect,
    agent::{Beat, Request},
    exec::{Owner, pause},
    log::Entry,
    stage::{INTERVAL_MS, Stage},
};
use hearing::Hearing;
use wishes::Wished;

const TICK_MS: u64 = 100;
const GOODBYE_TIMEOUT_MS: u64 = 2_000;
/// A past instance that goes on beating is told goodbye at most this often.
const FAREWELL_INTERVAL_MS: u64 = 1_000;

/// A prober process.
pub(crate) struct Prober {
    stage: Rc<Stage>,
    me: usize,
    policy: Policy,
    fleet: RefCell<Fleet>,
    position: Cell<u64>,
    /// Its clock is set, and it hears.
    listening: Cell<bool>,
    /// The log has been read; decisions are allowed.
    ready: Cell<bool>,
    hearing: RefCell<Hearing>,
    wishes: RefCell<BTreeMap<Index, VecDeque<Wished>>>,
    /// Nothing is judged before: buffers are being read after a stall.
    judge_after: Cell<Timestamp>,
    /// Since when nothing is judged.
    held_since: Cell<Option<Timestamp>>,
}

impl Prober {
    pub(crate) fn new(stage: &Rc<Stage>, me: usize) -> Rc<Self> {
        Rc::new(Self {
            stage: Rc::clone(stage),
            me,
            policy: Policy {
                interval_ms: INTERVAL_MS,
                failure_threshold: 3,
                success_threshold: 2,
                forget_after_ms: 25_000,
                activity_timeout_ms: None,
            },
            fleet: RefCell::default(),
            position: Cell::new(0),
            listening: Cell::new(false),
            ready: Cell::new(false),
            hearing: RefCell::default(),
            wishes: RefCell::default(),
            judge_after: Cell::default(),
            held_since: Cell::new(None),
        })
    }

    fn spawn(&self, work: impl Future<Output = ()> + 'static) {
        self.stage.exec.spawn(Owner::Service(self.me), work);
    }

    fn now(&self) -> Timestamp {
        self.stage.clock(self.me)
    }

    fn forgets_void(&self) -> bool {
        self.stage.has(Defect::VoidCountedAsAbsent)
    }

    pub(crate) fn run(self: &Rc<Self>) {
        let this = Rc::clone(self);
        self.spawn(async move {
            this.stage.set_clock(this.me).await;
            this.link_is(!this.stage.link(this.me).is_cut());
            this.listening.set(true);
            while this.stage.leader(this.me).await.is_err() {}
            this.fold();
            this.start();
            let mut last_tick = this.stage.even(this.me);
            loop {
                let now = this.stage.even(this.me);
                this.tick(now.saturating_sub(last_tick + TICK_MS));
                last_tick = now;
                pause(&this.stage.exec, TICK_MS).await;
            }
        });
    }

    /// The log has been read: from now on there are verdicts, and every clock starts here.
    fn start(self: &Rc<Self>) {
        self.ready.set(true);
        let now = self.now();
        self.fleet.borrow_mut().restart_clocks(now);
        self.listen_up();
    }

    pub(crate) fn tail(self: &Rc<Self>) {
        if self.ready.get() {
            self.fold();
        }
    }

    /// Folds the log to its end.
    fn fold(self: &Rc<Self>) {
        let from = usize::try_from(self.position.get()).unwrap_or(usize::MAX);
        let entries: Vec<_> = self.stage.log.borrow().entries().iter().skip(from).map(Rc::clone).collect();
        for entry in entries {
            self.position.set(entry.seq);
            self.fold_entry(&entry);
        }
    }

    fn fold_entry(self: &Rc<Self>, entry: &Entry) {
        // Another's clock may be ahead: nobody is heard in the future.
        let time = entry.event.time.min(self.now());
        let index = match &entry.event.body {
            EventBody::Agent(event) => {
                let ours = entry.event.source == self.source();
                let mut fleet = self.fleet.borrow_mut();
                let Ok(index) = fleet.find_or_add(event.agent_id()) else { return };
                if !fleet.apply(index, entry.seq, event, time, ours) {
                    return;
                }
                index
            }
            EventBody::Execution(ExecutionEvent::Recovered(lost)) => {
                let mut fleet = self.fleet.borrow_mut();
                let Ok(index) = fleet.find_or_add(&lost.agent_id) else { return };
                if let Some(entry) = fleet.get_mut(index) {
                    entry.known.lose(&Loss {
                        agent_id: lost.agent_id.clone(),
                        instance_id: lost.instance_id.clone(),
                        reason: lost.reason,
                        returned: lost.returned,
                        silent_since: None,
                        time,
                    });
                }
                index
            }
            _ => return,
        };
        self.reconcile(index);
    }

    fn source(&self) -> String {
        format!("/rollcall/health-prober/{}", self.me)
    }

    pub(crate) fn beat(self: &Rc<Self>, beat: &Beat) {
        if !self.ready.get() {
            return;
        }
        let now = self.now();
        let heard = hear(&mut self.fleet.borrow_mut(), beat.agent.as_str(), &beat.bytes, &self.policy, now);
        if self.fleet.borrow_mut().gaps.take_suspicion() {
            self.stage.count("gaps believed by a prober");
            self.void(Void::Gaps);
        }
        match heard {
            Ok((Some(index), Heard::News)) => self.reconcile(index),
            Ok((Some(index), Heard::Past(instance))) => self.farewell(index, &instance, now),
            _ => {}
        }
    }

    /// An instance that no longer counts still beats. Who said goodbye itself knows.
    fn farewell(self: &Rc<Self>, index: Index, instance: &InstanceId, now: Timestamp) {
        let agent = {
            let mut fleet = self.fleet.borrow_mut();
            let Some(entry) = fleet.get_mut(index) else { return };
            let superseded = entry.known.agent.instance_id.as_ref() != Some(instance);
            let said = entry.work.partings.as_deref().and_then(|said| said.past_at);
            let due = said.is_none_or(|at| now.since_ms(at) >= FAREWELL_INTERVAL_MS);
            if !due || !(superseded || entry.known.was_dismissed()) {
                return;
            }
            entry.work.partings.get_or_insert_default().past_at = Some(now);
            entry.known.agent.id.clone()
        };
        self.say_goodbye(agent, instance.clone(), InFlight::Finish);
    }

    fn say_goodbye(self: &Rc<Self>, agent: AgentId, instance: InstanceId, in_flight: InFlight) {
        let this = Rc::clone(self);
        self.spawn(async move {
            let request = Request::Goodbye(in_flight);
            let _ = this.stage.ask(this.me, &agent, &instance, request, GOODBYE_TIMEOUT_MS).await;
        });
    }

    fn tick(self: &Rc<Self>, late: u64) {
        self.stalled(late);
        if !self.stage.has(Defect::StallIgnored) {
            self.stage.drain(self.me);
        }
        self.go_off();
        self.canary_if_due();
    }

    /// Looks at every agent whose time may have come.
    fn go_off(self: &Rc<Self>) {
        let now = self.now();
        if !self.ready.get() || self.holds(now) {
            return;
        }
        self.look_at_proven(now);
        let all = indices(&self.fleet.borrow());
        for index in all {
            self.look_at(index, now);
        }
    }

    fn look_at(self: &Rc<Self>, index: Index, now: Timestamp) {
        let proven_at = if self.forgets_void() { now } else { self.hearing.borrow().proven_at.min(now) };
        {
            let mut fleet = self.fleet.borrow_mut();
            let (floor, deaf) = (fleet.floor, fleet.deaf);
            let Some(entry) = fleet.get_mut(index) else { return };
            if entry.work.retry_at.is_some_and(|at| at <= now) {
                entry.work.retry_at = None;
            }
            if entry.known.agent.status != Some(Status::Gone) && !deaf {
                let interval = interval_ms(&entry.known, &entry.live, &self.policy);
                entry.live.miss(floor, interval, proven_at);
                let missed = misses(now.since_ms(entry.live.counted_from), interval);
                // Beyond the threshold nothing depends on one more.
                if missed > entry.live.beat.fails && entry.live.beat.fails < self.policy.failure_threshold {
                    self.hearing.borrow_mut().unproven.push(index);
                }
            }
        }
        self.enforce_deadline(index, now);
        self.reconcile(index);
    }
}

fn indices(fleet: &Fleet) -> Vec<Index> {
    fleet.iter().map(|(index, _)| index).collect()
}
