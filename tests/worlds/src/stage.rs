//! What everybody in a world shares: the network with its weather, the log, capacity, clocks, the processes, and the
//! truth that only the judge of the world may look at.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use rollcall_capacity::ModelCapacity;
use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Prefix, Timestamp,
    event::{Event, EventBody},
    subject::Subjects,
    wire::Outcome,
};
use uuid::Uuid;

use crate::{
    Defect, Setup,
    agent::{Beat, Instance},
    dispatcher::Dispatcher,
    exec::{Exec, Owner, Promise, pause},
    log::{Appended, Log, Reports},
    prober::Prober,
    watchdog::Watchdog,
};

/// Interval of every heartbeat: the shortest that the contract allows.
pub(crate) const INTERVAL_MS: u64 = 1_000;
/// Where virtual time begins on the wall, milliseconds since 1970.
const EPOCH_MS: i64 = 1_800_000_000_000;
/// The only pool.
pub(crate) const POOL: &str = "default";
/// Time one try of an append or a read of the log may take.
const LOG_TRY_MS: u64 = 1_500;
/// Tries of an append.
const LOG_TRIES: u32 = 6;
/// A cut is noticed within this time.
const NOTICE_MAX_MS: u64 = 2_000;

/// How messages fare.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    /// Lost, of a thousand.
    pub loss: u64,
    /// Delivered twice, of a thousand.
    pub twice: u64,
    /// Longest ordinary way, in milliseconds. Messages of different lengths of way overtake each other.
    pub way_max: u64,
    /// On a long way, of a thousand: several heartbeats of the same instance overtake such a one.
    pub astray: u64,
}

/// The longest way of all.
const ASTRAY_MAX_MS: u64 = 4_000;

impl Weather {
    pub(crate) const FAIR: Self = Self { loss: 0, twice: 0, way_max: 3, astray: 0 };
}

/// A service's connection.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Link {
    /// Core messages (heartbeats, requests) don't pass.
    pub bus_cut: bool,
    /// The log is not reachable.
    pub log_cut: bool,
    /// The service knows.
    pub noticed: bool,
}

/// A service that runs.
#[derive(Clone)]
pub(crate) enum Body {
    Dispatcher(Rc<Dispatcher>),
    Watchdog(Rc<Watchdog>),
    Prober(Rc<Prober>),
}

/// What kind of service lives at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Dispatcher,
    Watchdog,
    Prober,
}

/// A place for a service process.
pub(crate) struct Place {
    pub kind: Kind,
    pub body: Option<Body>,
    pub link: Link,
    /// How far its clock is off, in milliseconds.
    pub offset: i64,
}

/// What really happened, for the judge.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// When heartbeats that listed this attempt got on the bus and were lost to nobody by chance.
    pub listed: BTreeMap<(InstanceId, ExecutionId, u32), Vec<u64>>,
    /// When the instance stopped holding it.
    pub dropped: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    /// When the work itself ended there, reported or not.
    pub over: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    /// Since when it stands still there.
    pub stuck: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    /// Everything that agents reported, whether it arrived or not.
    pub reported: BTreeSet<(AgentId, ExecutionId, u32, &'static str)>,
    /// What was put to agents and when, repetitions too.
    pub asked: Vec<(u64, AgentId, ExecutionId, u32)>,
    /// Executions whose submission was answered well.
    pub accepted: BTreeSet<ExecutionId>,
    /// Executions that were seen in a slot, and waiting by the log, for longer than any launch takes.
    pub stranded: BTreeSet<ExecutionId>,
}

/// See the module.
pub(crate) struct Stage {
    pub exec: Rc<Exec>,
    pub setup: Setup,
    pub subjects: Subjects,
    pub log: RefCell<Log>,
    pub reports: RefCell<Reports>,
    pub capacity: ModelCapacity,
    pub places: RefCell<Vec<Place>>,
    pub instances: RefCell<Vec<Instance>>,
    /// Agents whose network is cut.
    pub agents_cut: RefCell<BTreeSet<AgentId>>,
    pub weather: Cell<Weather>,
    pub truth: RefCell<Truth>,
    /// Chaos is over: nothing new goes wrong.
    pub settling: Cell<bool>,
    events: Cell<u64>,
}

/// Somebody could not be reached in time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unreachable;

impl Stage {
    pub(crate) fn new(setup: Setup, kinds: &[Kind]) -> Rc<Self> {
        let place = |kind: &Kind| Place { kind: *kind, body: None, link: Link::default(), offset: 0 };
        Rc::new(Self {
            exec: Exec::new(setup.seed),
            subjects: Subjects::new(Prefix::default()),
            log: RefCell::default(),
            reports: RefCell::default(),
            capacity: ModelCapacity::new(),
            places: RefCell::new(kinds.iter().map(place).collect()),
            instances: RefCell::default(),
            agents_cut: RefCell::default(),
            weather: Cell::new(Weather::FAIR),
            truth: RefCell::default(),
            settling: Cell::new(false),
            events: Cell::new(0),
            setup,
        })
    }

    pub(crate) fn has(&self, defect: Defect) -> bool {
        self.setup.defect == Some(defect)
    }

    /// A line of the trace.
    pub(crate) fn say(&self, line: impl FnOnce() -> String) {
        if self.setup.trace {
            println!("{:>7} ms  {}", self.exec.now(), line());
        }
    }

    /// The time as a service's clock has it.
    pub(crate) fn clock(&self, me: usize) -> Timestamp {
        let offset = self.places.borrow()[me].offset;
        Timestamp::from_millis(EPOCH_MS + i64::try_from(self.exec.now()).unwrap_or(0) + offset)
    }

    /// A moment of the world as an exact clock would have it.
    pub(crate) fn true_time(&self, at: u64) -> Timestamp {
        Timestamp::from_millis(EPOCH_MS + i64::try_from(at).unwrap_or(0))
    }

    pub(crate) fn body(&self, me: usize) -> Option<Body> {
        self.places.borrow()[me].body.clone()
    }

    pub(crate) fn link(&self, me: usize) -> Link {
        self.places.borrow()[me].link
    }

    pub(crate) fn is_cut(&self, agent: &AgentId) -> bool {
        self.agents_cut.borrow().contains(agent)
    }

    /// How long a message is on its way; `None`: lost.
    pub(crate) fn way(&self) -> Option<u64> {
        let weather = self.weather.get();
        if self.exec.chance(weather.loss) {
            return None;
        }
        let longest = if self.exec.chance(weather.astray) { ASTRAY_MAX_MS } else { weather.way_max };
        Some(self.exec.between(1, longest))
    }

    pub(crate) fn comes_twice(&self) -> bool {
        self.exec.chance(self.weather.get().twice)
    }

    // ---- services

    /// Starts the service at a place, unless it runs.
    pub(crate) fn start(self: &Rc<Self>, me: usize) {
        let kind = {
            let places = self.places.borrow();
            if places[me].body.is_some() {
                return;
            }
            places[me].kind
        };
        self.say(|| format!("{kind:?} {me} starts"));
        let body = match kind {
            Kind::Dispatcher => Body::Dispatcher(Dispatcher::new(self, me)),
            Kind::Watchdog => Body::Watchdog(Watchdog::new(self, me)),
            Kind::Prober => Body::Prober(Prober::new(self, me)),
        };
        self.places.borrow_mut()[me].body = Some(body.clone());
        match body {
            Body::Dispatcher(dispatcher) => dispatcher.run(),
            Body::Watchdog(watchdog) => watchdog.run(),
            Body::Prober(prober) => prober.run(),
        }
    }

    /// The service dies between two of its steps.
    pub(crate) fn crash(self: &Rc<Self>, me: usize) {
        self.say(|| format!("service {me} dies"));
        self.exec.kill(Owner::Service(me));
        self.places.borrow_mut()[me].body = None;
    }

    /// Cuts or heals a service's connection; it notices a cut after a while and a new connection at once.
    pub(crate) fn set_link(self: &Rc<Self>, me: usize, bus_cut: bool, log_cut: bool) {
        let before = self.link(me);
        if (before.bus_cut, before.log_cut) == (bus_cut, log_cut) {
            return;
        }
        self.say(|| format!("service {me}: bus cut {bus_cut}, log cut {log_cut}"));
        let whole = !bus_cut && !log_cut;
        self.places.borrow_mut()[me].link = Link { bus_cut, log_cut, noticed: before.noticed && !whole };
        if whole {
            self.tell_link(me, false);
            self.tell_link(me, true);
            self.tell_tail(me);
            return;
        }
        let stage = Rc::clone(self);
        self.exec.later(self.exec.between(0, NOTICE_MAX_MS), move || {
            let link = stage.link(me);
            if (link.bus_cut || link.log_cut) && !link.noticed {
                stage.places.borrow_mut()[me].link.noticed = true;
                stage.tell_link(me, false);
            }
        });
    }

    fn tell_link(&self, me: usize, connected: bool) {
        match self.body(me) {
            Some(Body::Watchdog(watchdog)) => watchdog.link(connected),
            Some(Body::Prober(prober)) => prober.link(connected),
            Some(Body::Dispatcher(_)) | None => {}
        }
    }

    pub(crate) fn tell_tail(&self, me: usize) {
        if self.link(me).log_cut {
            return;
        }
        match self.body(me) {
            Some(Body::Dispatcher(dispatcher)) => dispatcher.tail(),
            Some(Body::Watchdog(watchdog)) => watchdog.tail(),
            Some(Body::Prober(prober)) => prober.tail(),
            None => {}
        }
    }

    /// A heartbeat goes out to every service that listens. True: it gets to all of them, by an ordinary way.
    pub(crate) fn broadcast(self: &Rc<Self>, beat: &Rc<Beat>) -> bool {
        let mut clean = true;
        for me in 0..self.places.borrow().len() {
            for _ in 0..=usize::from(self.comes_twice()) {
                let Some(way) = self.way() else {
                    clean = false;
                    continue;
                };
                clean &= way <= self.weather.get().way_max;
                let (stage, beat) = (Rc::clone(self), Rc::clone(beat));
                self.exec.later(way, move || {
                    if stage.link(me).bus_cut {
                        return;
                    }
                    match stage.body(me) {
                        Some(Body::Dispatcher(dispatcher)) => dispatcher.beat(&beat),
                        Some(Body::Watchdog(watchdog)) => watchdog.beat(&beat),
                        Some(Body::Prober(prober)) => prober.beat(&beat),
                        None => {}
                    }
                });
            }
        }
        clean
    }

    // ---- the log

    /// An event of the service at a place, by its clock.
    pub(crate) fn event(
        &self,
        me: usize,
        kind: &str,
        subject: &str,
        time: Timestamp,
        body: EventBody,
    ) -> Event {
        self.events.set(self.events.get() + 1);
        Event {
            id: Uuid::from_u128(u128::from(self.events.get())),
            source: format!("/rollcall/{kind}/{me}"),
            subject: subject.to_owned(),
            time,
            body,
        }
    }

    /// Appends as the services do: the same event again until the log has answered, its id telling it apart.
    pub(crate) async fn append(
        self: &Rc<Self>,
        me: usize,
        subject: &str,
        event: &Event,
        expected: u64,
    ) -> Result<Appended, Unreachable> {
        let bytes: Rc<[u8]> = event.encode().into();
        let expected = (!self.has(Defect::NoCas)).then_some(expected);
        let decided_at = self.exec.now();
        for _ in 0..LOG_TRIES {
            let answer: Promise<Option<Appended>> = Promise::new(&self.exec);
            answer.keep_after(LOG_TRY_MS, None);
            if let Some(way) = self.way().filter(|_| !self.link(me).log_cut) {
                let (stage, answer, bytes, subject) =
                    (Rc::clone(self), answer.clone(), Rc::clone(&bytes), subject.to_owned());
                self.exec.later(way, move || {
                    if stage.link(me).log_cut {
                        return;
                    }
                    let appended = stage.land(&subject, &bytes, expected, decided_at);
                    if let Some(back) = stage.way() {
                        answer.keep_after(back, Some(appended));
                    }
                });
            }
            if let Some(appended) = answer.await {
                return Ok(appended);
            }
        }
        Err(Unreachable)
    }

    fn land(
        self: &Rc<Self>,
        subject: &str,
        bytes: &[u8],
        expected: Option<u64>,
        decided_at: u64,
    ) -> Appended {
        let now = self.exec.now();
        let before = self.log.borrow().last_seq();
        let appended = self.log.borrow_mut().append(subject, bytes, expected, decided_at, now);
        if self.log.borrow().last_seq() == before {
            return appended;
        }
        self.say(|| {
            let log = self.log.borrow();
            log.entries().last().map_or_else(String::new, |entry| {
                format!("log {} {} {:?}", entry.seq, entry.event.source, entry.event.body)
            })
        });
        for me in 0..self.places.borrow().len() {
            let stage = Rc::clone(self);
            let way = self.exec.between(1, self.weather.get().way_max);
            self.exec.later(way, move || stage.tell_tail(me));
        }
        appended
    }

    /// A way to the log's leader and back: what is read right after it is what the leader says.
    pub(crate) async fn leader(self: &Rc<Self>, me: usize) -> Result<(), Unreachable> {
        if self.link(me).log_cut {
            pause(&self.exec, LOG_TRY_MS).await;
            return Err(Unreachable);
        }
        pause(&self.exec, self.exec.between(1, self.weather.get().way_max)).await;
        if self.link(me).log_cut { Err(Unreachable) } else { Ok(()) }
    }

    /// The longest way of a message in the worst weather there is.
    pub(crate) const fn weather_max(&self) -> u64 {
        200
    }

    // ---- capacity

    pub(crate) fn wipe(&self) {
        self.say(|| "capacity is wiped".to_owned());
        self.capacity.flush();
    }

    // ---- the truth

    pub(crate) fn note_report(&self, agent: &AgentId, id: &ExecutionId, attempt: u32, outcome: Outcome) {
        let report = (agent.clone(), id.clone(), attempt, outcome.as_str());
        self.truth.borrow_mut().reported.insert(report);
    }
}
