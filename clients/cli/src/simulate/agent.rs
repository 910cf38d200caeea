//! A light agent: speaks the wire protocol over a shared connection, holds what it holds in the library's own book, and
//! plays its fault. One task each.

mod requests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rollcall_agent::state::{Book, Ending, Key};
use rollcall_core::{
    Clock, Timestamp,
    ids::{AgentId, InstanceId},
    subject::Subjects,
    time::SystemClock,
    wire::{AgentState, Claim, Heartbeat},
};
use rollcall_nats::{Bus, SubscribeError, Subscriber};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    kind::Kind,
    plan::{LOSSES_MAX, PlannedAgent},
    truth::Truth,
};

/// From the acceptance of the work to the fault of its agent.
const FAULT_AFTER_MS: std::ops::Range<u64> = 1_000..4_000;
/// How often an agent that is down looks whether everybody has noticed.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// From being noticed to coming back.
const BACK_AFTER: Duration = Duration::from_secs(1);
/// How long a woken agent's old work still takes.
const WOKEN_WORK: Duration = Duration::from_secs(5);
/// Pauses of a flapping agent.
const FLAPS: u32 = 3;
/// A flap in heartbeat intervals: silent that long (over the 1.5 that make a fall, under any loss), then back that long.
const FLAP_INTERVALS: (u32, u32) = (2, 3);
/// A slow agent's heartbeats come up to this much of an interval late (a failure falls at 1.5).
const SLOW_SHARE_MAX: f64 = 0.4;
/// How wrong a skewed clock is, in either direction.
const SKEW_MS: std::ops::Range<i64> = 60_000..3_600_000;
/// Acknowledgements that may wait for their agent.
const ACKNOWLEDGED_MAX: usize = 64;

/// What all agents of a run share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) subjects: Subjects,
    pub(crate) interval: Duration,
    pub(crate) capacity: u32,
    pub(crate) truth: Mutex<Truth>,
    pub(crate) clock: SystemClock,
    pub(crate) over: CancellationToken,
    pub(crate) heartbeats: AtomicU64,
    pub(crate) dispatches: AtomicU64,
}

impl World {
    pub(crate) fn truth(&self) -> MutexGuard<'_, Truth> {
        // A panic in one agent's task ends the run with an error; what the others know stays readable.
        self.truth.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the submitter may know of an agent.
#[derive(Debug, Default)]
pub(crate) struct Front {
    /// It is up, and no fault of it is under way.
    pub(crate) is_up: AtomicBool,
    /// Executions handed in for it that have not ended.
    pub(crate) load: AtomicU32,
}

#[derive(Debug)]
enum Timer {
    Beat,
    Finish(Key),
    Forget(Key),
    Fault,
    Flap(u32),
    FlapOver(u32),
    /// Look whether everything was noticed.
    Look,
    ComeBack,
    Reply(String, Bytes),
}

/// What an instance's end leads to.
enum Next {
    Over,
    NewInstance { after: Duration, once_noticed: bool },
}

pub(crate) struct SimAgent {
    id: AgentId,
    kind: Kind,
    bus: Bus,
    world: Arc<World>,
    front: Arc<Front>,
    random: StdRng,
    skew_ms: i64,
    /// Losses of its work that are held against it.
    losses: u32,
}

impl SimAgent {
    pub(crate) fn new(planned: &PlannedAgent, bus: Bus, world: Arc<World>, front: Arc<Front>) -> Self {
        let mut random = StdRng::seed_from_u64(planned.seed);
        let skew_ms = if planned.kind == Kind::ClockSkewed {
            let by = random.random_range(SKEW_MS);
            if random.random_bool(0.5) { by } else { -by }
        } else {
            0
        };
        Self { id: planned.id.clone(), kind: planned.kind, bus, world, front, random, skew_ms, losses: 0 }
    }

    /// Lives, over all its instances, until the run is over.
    pub(crate) async fn live(mut self) -> Result<(), SubscribeError> {
        // Spread over an interval, as agents that were started by hand are.
        let mut wait = self.world.interval.mul_f64(self.random.random_range(0.0..1.0));
        loop {
            tokio::select! {
                () = self.world.over.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
            let mut instance = Instance::start(&mut self).await?;
            match instance.serve().await {
                Next::Over => return Ok(()),
                Next::NewInstance { after, once_noticed } => {
                    if once_noticed {
                        self.await_notice().await;
                    }
                    wait = after;
                }
            }
        }
    }

    async fn await_notice(&self) {
        while !self.world.truth().is_noticed(&self.id) && !self.world.over.is_cancelled() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// One process start of a simulated agent.
struct Instance<'a> {
    agent: &'a mut SimAgent,
    id: InstanceId,
    book: Book,
    requests: Subscriber,
    timers: BTreeMap<(Instant, u64), Timer>,
    timer_count: u64,
    /// Silent and deaf.
    muted: bool,
    fault_is_set: bool,
    /// When refusing work was first told to die.
    refused_since: HashMap<Key, Instant>,
    /// Terminated work whose completion is still to come.
    dying_late: HashSet<Key>,
    progress: HashMap<Key, (Instant, bool)>,
    acknowledged: (mpsc::Sender<Key>, mpsc::Receiver<Key>),
    next: Option<Next>,
}

impl<'a> Instance<'a> {
    async fn start(agent: &'a mut SimAgent) -> Result<Self, SubscribeError> {
        let id = InstanceId::new(&uuid::Uuid::now_v7().to_string()).expect("a uuid is an identifier");
        let requests = agent.bus.subscribe(agent.world.subjects.agent_requests(&agent.id, &id)).await?;
        agent.front.is_up.store(true, Ordering::Release);
        let book = Book::new(agent.world.capacity);
        let mut instance = Self {
            agent,
            id,
            book,
            requests,
            timers: BTreeMap::new(),
            timer_count: 0,
            muted: false,
            fault_is_set: false,
            refused_since: HashMap::new(),
            dying_late: HashSet::new(),
            progress: HashMap::new(),
            acknowledged: mpsc::channel(ACKNOWLEDGED_MAX),
            next: None,
        };
        instance.set(Duration::ZERO, Timer::Beat);
        Ok(instance)
    }

    fn set(&mut self, after: Duration, timer: Timer) {
        self.timer_count += 1;
        self.timers.insert((Instant::now() + after, self.timer_count), timer);
    }

    fn between(&mut self, millis: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.agent.random.random_range(millis))
    }

    async fn serve(&mut self) -> Next {
        loop {
            // The beat is always set, so there is always a next timer.
            let due = self.timers.first_key_value().map_or_else(Instant::now, |((at, _), _)| *at);
            tokio::select! {
                () = self.agent.world.over.cancelled() => {
                    self.beat(Some(AgentState::Gone)).await;
                    return Next::Over;
                }
                Some(key) = self.acknowledged.1.recv() => self.on_acknowledged(&key).await,
                Some(message) = self.requests.next() => self.on_request(message).await,
                () = tokio::time::sleep_until(due) => {
                    if let Some((_, timer)) = self.timers.pop_first() {
                        self.on_timer(timer).await;
                    }
                }
            }
            if let Some(next) = self.next.take() {
                self.agent.front.is_up.store(false, Ordering::Release);
                return next;
            }
        }
    }

    async fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Beat => {
                self.beat(None).await;
                let late = if self.agent.kind == Kind::Slow {
                    self.agent.random.random_range(0.0..SLOW_SHARE_MAX)
                } else {
                    0.0
                };
                self.set(self.agent.world.interval.mul_f64(1.0 + late), Timer::Beat);
            }
            Timer::Finish(key) => self.finish(&key, Ending::Completed),
            Timer::Forget(key) => {
                if self.book.forget(&key) {
                    let mut truth = self.agent.world.truth();
                    truth.struck(&key, Kind::Orphaning, self.agent.world.clock.now());
                    truth.dead(&key);
                }
            }
            Timer::Fault => self.fault().await,
            Timer::Flap(left) => {
                self.muted = true;
                self.set(self.agent.world.interval * FLAP_INTERVALS.0, Timer::FlapOver(left));
            }
            Timer::FlapOver(left) => {
                self.muted = false;
                self.beat(None).await;
                match left.checked_sub(1) {
                    Some(left) => self.set(self.agent.world.interval * FLAP_INTERVALS.1, Timer::Flap(left)),
                    None => self.unset_fault(),
                }
            }
            Timer::Look => {
                if self.agent.world.truth().is_noticed(&self.agent.id) {
                    self.set(BACK_AFTER, Timer::ComeBack);
                } else {
                    self.set(LOOK_INTERVAL, Timer::Look);
                }
            }
            Timer::ComeBack => self.wake().await,
            Timer::Reply(to, bytes) => self.reply_now(&to, bytes).await,
        }
    }

    fn unset_fault(&mut self) {
        self.fault_is_set = false;
        self.agent.front.is_up.store(true, Ordering::Release);
    }

    /// The agent's own fault strikes everything it holds.
    async fn fault(&mut self) {
        if self.book.unacked() > 0 {
            // What is finished is reported first: afterwards it would be open which way it went.
            self.set(LOOK_INTERVAL, Timer::Fault);
            return;
        }
        let held: Vec<Key> = self.book.claims().cloned().collect();
        let kind = self.agent.kind;
        let losses = self.agent.losses + u32::try_from(held.len()).unwrap_or(u32::MAX);
        if kind.is_held_against_agent() && losses > LOSSES_MAX {
            // Work that was put back came again: one more loss and the agent would rightly be quarantined.
            self.timers.retain(|_, timer| !matches!(timer, Timer::Finish(_)));
            held.into_iter().for_each(|key| self.set(WOKEN_WORK, Timer::Finish(key)));
            self.unset_fault();
            return;
        }
        self.agent.losses = losses;
        {
            let now = self.agent.world.clock.now();
            let mut truth = self.agent.world.truth();
            truth.instance_struck(self.id.clone());
            for key in &held {
                truth.struck(key, kind, now);
                // A silent agent's work is frozen with it, and does nothing.
                truth.dead(key);
            }
        }
        match kind {
            Kind::Silent => {
                self.muted = true;
                self.timers.retain(|_, timer| !matches!(timer, Timer::Finish(_)));
                self.set(LOOK_INTERVAL, Timer::Look);
            }
            Kind::Crashing => self.next = Some(Next::NewInstance { after: BACK_AFTER, once_noticed: true }),
            Kind::Restarting => {
                self.next = Some(Next::NewInstance { after: Duration::ZERO, once_noticed: false })
            }
            Kind::Returning => {
                self.book.close();
                self.timers.retain(|_, timer| !matches!(timer, Timer::Finish(_)));
                self.beat(None).await;
                for key in self.book.return_all() {
                    self.finish(&key, Ending::Stopped);
                }
                self.leave_if_empty().await;
            }
            _ => self.unset_fault(),
        }
    }

    async fn leave_if_empty(&mut self) {
        if self.agent.kind == Kind::Returning
            && self.book.state() == AgentState::Draining
            && self.book.claims().next().is_none()
        {
            self.beat(Some(AgentState::Gone)).await;
            self.next = Some(Next::NewInstance { after: BACK_AFTER, once_noticed: false });
        }
    }

    async fn wake(&mut self) {
        self.muted = false;
        self.unset_fault();
        // The same process goes on where it stood; it learns what became of its work when it reports it.
        let held: Vec<Key> = self.book.claims().cloned().collect();
        for key in held {
            self.set(WOKEN_WORK, Timer::Finish(key));
        }
        self.beat(None).await;
    }

    async fn beat(&mut self, state: Option<AgentState>) {
        if self.muted {
            return;
        }
        let seq = self.book.next_seq();
        let now = self.agent.world.clock.now();
        let claims = self
            .book
            .claims()
            .map(|key| Claim {
                id: key.execution_id.as_str().into(),
                attempt: key.attempt,
                progress: self.progress_of(key),
            })
            .collect();
        let millis = u64::try_from(self.agent.world.interval.as_millis()).unwrap_or(u64::MAX);
        let beat = Heartbeat {
            agent_id: None,
            instance_id: self.id.as_str().into(),
            seq,
            state: state.unwrap_or_else(|| self.book.state()),
            capacity: self.book.capacity(),
            executions: claims,
            interval_ms: Some(millis),
            pool: Some("simulated".into()),
            timeout_ms: None,
            reason: (self.book.state() == AgentState::Draining).then(|| "simulated".into()),
            version: None,
            labels: None,
            probe: None,
            control: None,
            sent_at: Some(Timestamp::from_millis(now.as_millis() + self.agent.skew_ms)),
        };
        let subject = self.agent.world.subjects.heartbeat(&self.agent.id);
        let bytes = serde_json::to_vec(&beat).expect("a heartbeat holds text and numbers");
        if self.agent.bus.publish(subject, bytes.into()).await.is_ok() {
            self.agent.world.heartbeats.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Rises with time while the work advances, and stands still where it does not.
    fn progress_of(&self, key: &Key) -> Option<f64> {
        let (since, advances) = self.progress.get(key)?;
        Some(if *advances { since.elapsed().as_secs_f64() } else { 1.0 })
    }
}
