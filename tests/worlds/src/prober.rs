//! The health-prober around its real detector: heartbeats and silence become statuses in the log. Heartbeats are its
//! only channel here; edge pings and active probes stay out of the simulation.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use health_prober::{
    config::Policy,
    decide::{Next, next},
    hear::{Heard, hear},
    state::{Fleet, Index},
};
use rollcall_core::{
    AgentId, InstanceId, Timestamp,
    agent::Status,
    event::{AgentEvent, EventBody},
};

use crate::{
    Defect,
    agent::{Beat, Request},
    exec::{Owner, pause},
    log::Appended,
    stage::{INTERVAL_MS, Stage},
};

const TICK_MS: u64 = 250;
const RETRY_MS: u64 = 250;
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
    ready: Cell<bool>,
    farewell_at: Cell<u64>,
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
            ready: Cell::new(false),
            farewell_at: Cell::new(0),
        })
    }

    fn spawn(&self, work: impl Future<Output = ()> + 'static) {
        self.stage.exec.spawn(Owner::Service(self.me), work);
    }

    fn now(&self) -> Timestamp {
        self.stage.clock(self.me)
    }

    pub(crate) fn run(self: &Rc<Self>) {
        let link = self.stage.link(self.me);
        self.fleet.borrow_mut().deaf =
            (link.bus_cut || link.log_cut) && !self.stage.has(Defect::VoidCountedAsAbsent);
        let this = Rc::clone(self);
        self.spawn(async move {
            while this.stage.leader(this.me).await.is_err() {}
            this.fold(None);
            this.fleet.borrow_mut().restart_clocks(this.now());
            this.ready.set(true);
            loop {
                this.tick();
                pause(&this.stage.exec, TICK_MS).await;
            }
        });
    }

    pub(crate) fn tail(self: &Rc<Self>) {
        if self.ready.get() {
            self.fold(None);
            self.reconcile_all();
        }
    }

    /// Folds the log to its end; `ours`: an entry that this process appended.
    fn fold(&self, ours: Option<u64>) {
        let log = self.stage.log.borrow();
        let from = usize::try_from(self.position.get()).unwrap_or(usize::MAX);
        let mut fleet = self.fleet.borrow_mut();
        for entry in log.entries().iter().skip(from) {
            let EventBody::Agent(event) = &entry.event.body else { continue };
            let Ok(index) = fleet.find_or_add(event.agent_id()) else { continue };
            fleet.apply(index, entry.seq, event, entry.event.time, ours == Some(entry.seq));
        }
        self.position.set(log.last_seq());
    }

    pub(crate) fn link(&self, connected: bool) {
        if self.stage.has(Defect::VoidCountedAsAbsent) {
            return;
        }
        let now = self.now();
        let mut fleet = self.fleet.borrow_mut();
        fleet.deaf = !connected;
        if connected {
            fleet.reconnected_at = Some(now);
            fleet.restart_clocks(now);
        }
    }

    /// The wall clock was set and is adopted: every measure starts anew.
    pub(crate) fn clock_jumped(&self) {
        let now = self.now();
        let mut fleet = self.fleet.borrow_mut();
        fleet.rebase(now);
        if !self.stage.has(Defect::VoidCountedAsAbsent) {
            fleet.restart_clocks(now);
        }
    }

    pub(crate) fn beat(self: &Rc<Self>, beat: &Beat) {
        if !self.ready.get() {
            return;
        }
        let now = self.now();
        let heard = hear(&mut self.fleet.borrow_mut(), beat.agent.as_str(), &beat.bytes, &self.policy, now);
        match heard {
            Ok((Some(index), Heard::News)) => self.reconcile(index),
            Ok((Some(_), Heard::Past(instance))) => self.farewell(&beat.agent, instance),
            _ => {}
        }
    }

    fn farewell(self: &Rc<Self>, agent: &AgentId, instance: InstanceId) {
        let now = self.stage.exec.now();
        if now >= self.farewell_at.get() {
            self.farewell_at.set(now + FAREWELL_INTERVAL_MS);
            self.say_goodbye(agent.clone(), instance);
        }
    }

    fn say_goodbye(self: &Rc<Self>, agent: AgentId, instance: InstanceId) {
        let this = Rc::clone(self);
        self.spawn(async move {
            let _ = this.stage.ask(this.me, &agent, &instance, Request::Goodbye, GOODBYE_TIMEOUT_MS).await;
        });
    }

    fn tick(self: &Rc<Self>) {
        let now = self.now();
        {
            let mut fleet = self.fleet.borrow_mut();
            let (floor, deaf) = (fleet.floor, fleet.deaf);
            for index in indices(&fleet) {
                let Some(entry) = fleet.get_mut(index) else { continue };
                if entry.work.retry_at.is_some_and(|at| at <= now) {
                    entry.work.retry_at = None;
                }
                if entry.known.agent.status != Some(Status::Gone) && !deaf {
                    entry.live.miss(floor, INTERVAL_MS, now);
                }
            }
        }
        self.reconcile_all();
    }

    fn reconcile_all(self: &Rc<Self>) {
        let all = indices(&self.fleet.borrow());
        for index in all {
            self.reconcile(index);
        }
    }

    fn reconcile(self: &Rc<Self>, index: Index) {
        let now = self.now();
        let (event, expected) = {
            let mut fleet = self.fleet.borrow_mut();
            let Some(entry) = fleet.get_mut(index) else { return };
            if entry.work.busy || entry.work.retry_at.is_some_and(|at| now < at) {
                return;
            }
            match next(&entry.known, &entry.live, None, &self.policy, now) {
                Some(Next::Append(event)) => {
                    entry.work.busy = true;
                    (event, entry.known.agent.seq)
                }
                _ => {
                    if entry.live.profile.as_deref() == entry.known.agent.profile.as_ref() {
                        entry.live.profile = None;
                    }
                    return;
                }
            }
        };
        let this = Rc::clone(self);
        self.spawn(async move { this.append(index, event, expected, now).await });
    }

    async fn append(self: Rc<Self>, index: Index, event: AgentEvent, expected: u64, time: Timestamp) {
        let id = event.agent_id().clone();
        let subject = self.stage.subjects.agent_event(&id);
        let entry = self.stage.event(self.me, "health-prober", id.as_str(), time, event.clone().into());
        let appended = self.stage.append(self.me, &subject, &entry, expected).await;
        if let Some(entry) = self.fleet.borrow_mut().get_mut(index) {
            entry.work.busy = false;
            if appended.is_err() {
                entry.work.retry_at = Some(time.plus_ms(RETRY_MS));
            }
        }
        match appended {
            Ok(Appended::At(seq)) => {
                self.fold(Some(seq));
                if let AgentEvent::Superseded(event) = event {
                    self.say_goodbye(id, event.instance_id);
                }
            }
            Ok(Appended::Conflict) => {
                if self.stage.leader(self.me).await.is_ok() {
                    self.fold(None);
                }
            }
            Err(_) => {}
        }
        self.reconcile(index);
    }
}

fn indices(fleet: &Fleet) -> Vec<Index> {
    fleet.iter().map(|(index, _)| index).collect()
}
