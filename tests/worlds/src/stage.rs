//! What everybody in a world shares: the network with its weather, the log, capacity, the places of the processes, and
//! the truth that only the judge of the world may look at.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use rollcall_capacity::{ModelCapacity, ModelSnapshot};
use rollcall_core::{
    AgentId, ExecutionId, Prefix, Timestamp,
    event::{Event, EventBody},
    subject::Subjects,
    wire::Outcome,
};
use uuid::Uuid;

use crate::{
    Defect, Setup,
    agent::Instance,
    buffers::Notice,
    exec::{Exec, Promise, pause},
    log::{Appended, Log, Reports},
    services::{Kind, Place},
    truth::Truth,
};

/// Interval of every heartbeat: the shortest that the contract allows.
pub(crate) const INTERVAL_MS: u64 = 1_000;
/// The only pool.
pub(crate) const POOL: &str = "default";
/// Time one try of an append or a read of the log may take.
pub(crate) const LOG_TRY_MS: u64 = 1_500;
/// Time a message of our own may take through the bus.
pub(crate) const CANARY_TIMEOUT_MS: u64 = 2_000;
/// Tries of an append.
const LOG_TRIES: u32 = 6;

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
    /// Agents whose heartbeats are lost now and then, of a thousand.
    pub agents_losing: RefCell<BTreeMap<AgentId, u64>>,
    pub weather: Cell<Weather>,
    pub truth: RefCell<Truth>,
    /// Chaos is over: nothing new goes wrong.
    pub settling: Cell<bool>,
    /// Since when the clock of the log's server is how far ahead of the true time, in milliseconds.
    pub server_clock: RefCell<Vec<(u64, i64)>>,
    /// What happened how often, of that which has to happen somewhere.
    pub seen: RefCell<BTreeMap<&'static str, u64>>,
    /// A digest of what happened.
    pub digest: Cell<u64>,
    /// Capacity as it was at some time: where a failover to stale data leads.
    older: RefCell<Option<ModelSnapshot>>,
    events: Cell<u64>,
}

/// Somebody could not be reached in time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unreachable;

impl Stage {
    pub(crate) fn new(setup: Setup, kinds: &[Kind]) -> Rc<Self> {
        Rc::new(Self {
            exec: Exec::new(setup.seed),
            subjects: Subjects::new(Prefix::default()),
            log: RefCell::default(),
            reports: RefCell::default(),
            capacity: ModelCapacity::new(),
            places: RefCell::new(kinds.iter().map(|kind| Place::new(*kind)).collect()),
            instances: RefCell::default(),
            agents_cut: RefCell::default(),
            agents_losing: RefCell::default(),
            weather: Cell::new(Weather::FAIR),
            truth: RefCell::default(),
            settling: Cell::new(false),
            server_clock: RefCell::new(vec![(0, 0)]),
            seen: RefCell::default(),
            digest: Cell::new(0xcbf2_9ce4_8422_2325),
            older: RefCell::default(),
            events: Cell::new(0),
            setup,
        })
    }

    pub(crate) fn has(&self, defect: Defect) -> bool {
        self.setup.defect == Some(defect)
    }

    /// Notes that something happened.
    pub(crate) fn count(&self, what: &'static str) {
        *self.seen.borrow_mut().entry(what).or_default() += 1;
    }

    /// A line of the trace.
    pub(crate) fn say(&self, line: impl FnOnce() -> String) {
        if !self.setup.trace && !self.setup.digest {
            return;
        }
        let line = format!("{:>7} ms  {}", self.exec.now(), line());
        self.digest(line.as_bytes());
        if self.setup.trace {
            println!("{line}");
        }
    }

    /// Adds to the digest of all that happens (FNV-1a).
    pub(crate) fn digest(&self, bytes: &[u8]) {
        let add = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        self.digest.set(bytes.iter().fold(self.digest.get(), add));
    }

    pub(crate) fn is_cut(&self, agent: &AgentId) -> bool {
        self.agents_cut.borrow().contains(agent)
    }

    /// How long a message is on its way; `None`: lost.
    pub(crate) fn way(&self) -> Option<u64> {
        let weather = self.weather.get();
        if self.exec.chance(weather.loss) {
            self.count("messages lost");
            return None;
        }
        let astray = self.exec.chance(weather.astray);
        if astray {
            self.count("messages overtaken");
        }
        Some(self.exec.between(1, if astray { ASTRAY_MAX_MS } else { weather.way_max }))
    }

    /// A number of milliseconds back or forth.
    pub(crate) fn either_way(&self, most: u64) -> i64 {
        i64::try_from(self.exec.between(0, 2 * most)).unwrap_or(0) - i64::try_from(most).unwrap_or(0)
    }

    pub(crate) fn comes_twice(&self) -> bool {
        let twice = self.exec.chance(self.weather.get().twice);
        if twice {
            self.count("messages came twice");
        }
        twice
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
            self.exec.later(way, move || stage.tell(me, Notice::Tail));
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

    /// A message of a service's own through the bus. True: it is back in time, and all that came before it is there.
    pub(crate) async fn comes_back(self: &Rc<Self>, me: usize) -> bool {
        pause(&self.exec, self.weather.get().way_max * 2).await;
        if self.link(me).bus_cut {
            pause(&self.exec, CANARY_TIMEOUT_MS).await;
            return false;
        }
        if !self.has(Defect::StallIgnored) {
            self.drain(me);
        }
        true
    }

    /// The longest way of a message in the worst weather there is.
    pub(crate) const fn weather_max(&self) -> u64 {
        200
    }

    // ---- capacity

    pub(crate) fn wipe(&self) {
        self.say(|| "capacity is wiped".to_owned());
        self.truth.borrow_mut().wiped.push(self.exec.now());
        self.capacity.flush();
    }

    /// Capacity is copied to where a failover may lead.
    pub(crate) fn replicate(&self) {
        *self.older.borrow_mut() = Some(self.capacity.snapshot());
    }

    /// Capacity goes back to the last copy, or is lost if there is none.
    pub(crate) fn fail_over(&self) {
        let older = self.older.borrow().clone();
        let Some(older) = older else { return self.wipe() };
        self.say(|| "capacity goes back to an older state".to_owned());
        self.count("capacity moved back");
        self.truth.borrow_mut().moved_back.push(self.exec.now());
        self.capacity.restore(older);
    }

    // ---- the truth

    /// A slot is confirmed for an orchestrator, and (`done`) once more after the event that says so.
    pub(crate) fn note_granted(&self, id: &ExecutionId, attempt: u32, done: Option<u64>) {
        let now = self.exec.now();
        self.truth.borrow_mut().granted.entry((id.clone(), attempt)).or_insert((now, None)).1 = done;
    }

    pub(crate) fn note_report(&self, agent: &AgentId, id: &ExecutionId, attempt: u32, outcome: Outcome) {
        let report = (agent.clone(), id.clone(), attempt, outcome.as_str());
        self.truth.borrow_mut().reported.insert(report);
    }
}
