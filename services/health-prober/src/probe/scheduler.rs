//! When which endpoint is probed. [`Plan`] decides and is plain synchronous code; [`Scheduler`] makes the probes.
//!
//! Phases are jittered; suspects go first; what is down is probed more and more seldom; a probe that is late is not made
//! twice; and neither a host nor all of them together get more than their share at once, so a hung endpoint delays nobody.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Found, Prober, Target, Warm, host_of};
use crate::state::Index;

/// Probes in flight at once. Each holds a file handle or two.
pub const PROBES_MAX: usize = 1024;
/// Probes in flight at once to one host.
pub const PROBES_PER_HOST_MAX: usize = 128;
/// Connections kept between probes.
const WARM_MAX: usize = 4096;
/// Failures in a row from which an endpoint counts as down: below it is probed sooner, from it on later.
const DOWN_AFTER: u32 = 3;
/// What fails for the first times is probed this many times as often.
const SUSPECT_HASTE: u32 = 4;
/// What is down is probed at most this many times more seldom.
const BACKOFF_MAX: u32 = 4;
/// Shortest time between two probes of one endpoint.
const GAP_MIN: Duration = Duration::from_secs(1);
/// First probes are spread so that no more than this many a second begin.
const FIRST_PER_SECOND: u32 = 1000;

/// One endpoint in the plan.
#[derive(Debug)]
struct Slot {
    host: Arc<str>,
    /// Every probe is at a multiple of the interval from here.
    phase: Instant,
    due: Instant,
    /// Distinguishes this slot from an earlier one of the same agent.
    generation: u64,
    busy: bool,
    /// It waits for a free place.
    queued: bool,
    suspect: bool,
    fails: u32,
    started: Option<Instant>,
}

/// How a probe ended, as far as the plan cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Answered.
    Well,
    /// Did not answer, or wrongly.
    Badly,
    /// Was not made, or says nothing.
    Without,
}

/// What is due when.
#[derive(Debug)]
pub struct Plan {
    interval: Duration,
    slots: HashMap<Index, Slot>,
    due: BinaryHeap<Reverse<(Instant, Index, u64)>>,
    suspects: VecDeque<(Index, u64)>,
    ready: VecDeque<(Index, u64)>,
    /// Due, and their host is busy.
    parked: HashMap<Arc<str>, VecDeque<(Index, u64)>>,
    in_flight: usize,
    per_host: HashMap<Arc<str>, usize>,
    generations: u64,
}

impl Plan {
    /// An empty plan.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            slots: HashMap::new(),
            due: BinaryHeap::new(),
            suspects: VecDeque::new(),
            ready: VecDeque::new(),
            parked: HashMap::new(),
            in_flight: 0,
            per_host: HashMap::new(),
            generations: 0,
        }
    }

    /// Endpoints in the plan.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Probes an endpoint from now on; `jitter` within 0..1 places its first probe. Returns its generation.
    pub fn watch(&mut self, index: Index, host: &str, jitter: f64, now: Instant) -> u64 {
        self.generations += 1;
        let generation = self.generations;
        let fleet = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let spread = Duration::from_secs(u64::from(1 + fleet / FIRST_PER_SECOND)).min(self.interval);
        let due = now + spread.mul_f64(jitter.clamp(0.0, 1.0));
        let slot = Slot {
            host: host.into(),
            phase: due,
            due,
            generation,
            busy: false,
            queued: false,
            suspect: false,
            fails: 0,
            started: None,
        };
        self.slots.insert(index, slot);
        self.due.push(Reverse((due, index, generation)));
        generation
    }

    /// Probes it no more. One in flight still comes back, and is recognised by its generation.
    pub fn unwatch(&mut self, index: Index) {
        self.slots.remove(&index);
    }

    /// Something else says that it may be down, or up again: it is probed at once, before others.
    pub fn suspect(&mut self, index: Index, now: Instant) {
        let Some(slot) = self.slots.get_mut(&index) else { return };
        if slot.busy || slot.queued || slot.started.is_some_and(|at| now < at + GAP_MIN) {
            return;
        }
        slot.suspect = true;
        if slot.due > now {
            slot.due = now;
            self.due.push(Reverse((now, index, slot.generation)));
        }
    }

    /// When the next one is due that has a place to wait for.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.due.peek().map(|Reverse((at, ..))| *at)
    }

    /// What begins now, suspects first, as far as there is room.
    pub fn begin(&mut self, now: Instant) -> Vec<(Index, u64)> {
        while let Some(Reverse((at, index, generation))) = self.due.peek().copied() {
            if at > now {
                break;
            }
            self.due.pop();
            if let Some(slot) = self.slots.get_mut(&index)
                && slot.generation == generation
                && slot.due == at
                && !slot.busy
                && !slot.queued
            {
                slot.queued = true;
                let queue = if slot.suspect { &mut self.suspects } else { &mut self.ready };
                queue.push_back((index, generation));
            }
        }
        let mut begun = Vec::new();
        while self.in_flight < PROBES_MAX {
            let Some((index, generation)) = self.suspects.pop_front().or_else(|| self.ready.pop_front())
            else {
                break;
            };
            let Some(slot) = self.slots.get_mut(&index).filter(|slot| slot.generation == generation) else {
                continue;
            };
            let running = self.per_host.entry(Arc::clone(&slot.host)).or_default();
            if *running >= PROBES_PER_HOST_MAX {
                self.parked.entry(Arc::clone(&slot.host)).or_default().push_back((index, generation));
                continue;
            }
            *running += 1;
            self.in_flight += 1;
            slot.busy = true;
            slot.queued = false;
            slot.started = Some(now);
            begun.push((index, generation));
        }
        begun
    }

    /// A probe has ended. `host` is what it was begun with: its slot may be another one by now.
    pub fn ended(&mut self, index: Index, generation: u64, host: &str, ended: Ended, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(running) = self.per_host.get_mut(host) {
            *running -= 1;
            if *running == 0 {
                self.per_host.remove(host);
            }
        }
        if let Some(parked) = self.parked.get_mut(host) {
            // The first that is still watched: a place that went to one that is not would be lost to the others.
            while let Some((index, generation)) = parked.pop_front() {
                if self.slots.get(&index).is_some_and(|slot| slot.generation == generation) {
                    self.ready.push_front((index, generation));
                    break;
                }
            }
            if parked.is_empty() {
                self.parked.remove(host);
            }
        }
        let interval = self.interval;
        let Some(slot) = self.slots.get_mut(&index).filter(|slot| slot.generation == generation) else {
            return;
        };
        slot.busy = false;
        slot.suspect = false;
        match ended {
            Ended::Well => slot.fails = 0,
            Ended::Badly => slot.fails = slot.fails.saturating_add(1),
            Ended::Without => {}
        }
        slot.due = next(slot, interval, ended, now);
        self.due.push(Reverse((slot.due, index, generation)));
    }
}

fn next(slot: &mut Slot, interval: Duration, ended: Ended, now: Instant) -> Instant {
    let started = slot.started.unwrap_or(now);
    match (ended, slot.fails) {
        // In phase, and ticks that were missed meanwhile are left out.
        (Ended::Well, _) => {
            let passed = now.saturating_duration_since(slot.phase).as_nanos() / interval.as_nanos().max(1);
            let ticks = u32::try_from(passed).unwrap_or(u32::MAX).saturating_add(1);
            let due = slot.phase + interval.saturating_mul(ticks);
            if due < now + GAP_MIN.min(interval) { due + interval } else { due }
        }
        (Ended::Badly, fails) if fails < DOWN_AFTER => {
            now.max(started + (interval / SUSPECT_HASTE).max(GAP_MIN.min(interval)))
        }
        (Ended::Badly, fails) => {
            let factor = 1_u32.checked_shl(fails - DOWN_AFTER).unwrap_or(BACKOFF_MAX).min(BACKOFF_MAX);
            now.max(started + interval.saturating_mul(factor))
        }
        (Ended::Without, _) => now.max(started + interval.saturating_mul(BACKOFF_MAX)),
    }
}

/// What a probe brought.
#[derive(Debug)]
pub struct Report {
    /// The agent.
    pub index: Index,
    /// Of this watch.
    pub generation: u64,
    /// What was found.
    pub found: Found,
    /// How long it took.
    pub took: Duration,
}

struct Watched {
    target: Arc<Target>,
    host: Arc<str>,
    generation: u64,
    warm: Warm,
}

struct Shared {
    plan: Plan,
    watched: HashMap<Index, Watched>,
    warm: usize,
}

/// Makes the probes that a plan says. Cloning shares it.
#[derive(Clone)]
pub struct Scheduler {
    shared: Arc<Mutex<Shared>>,
    changed: Arc<Notify>,
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").finish_non_exhaustive()
    }
}

impl Scheduler {
    /// Nothing is watched yet.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        let shared = Shared { plan: Plan::new(interval), watched: HashMap::new(), warm: 0 };
        Self { shared: Arc::new(Mutex::new(shared)), changed: Arc::new(Notify::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Changed by single calls only: a panic can't have left it half changed.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Probes this from now on, instead of what was probed for this agent. Returns the generation of its reports.
    pub fn watch(&self, index: Index, target: Target) -> u64 {
        let host: Arc<str> = host_of(&target.endpoint).into();
        let jitter = rand::random::<f64>();
        let mut shared = self.lock();
        let generation = shared.plan.watch(index, &host, jitter, Instant::now());
        let watched = Watched { target: Arc::new(target), host, generation, warm: Warm::default() };
        shared.forget(index);
        shared.watched.insert(index, watched);
        drop(shared);
        self.changed.notify_one();
        generation
    }

    /// Probes nothing for this agent any more.
    pub fn unwatch(&self, index: Index) {
        let mut shared = self.lock();
        shared.plan.unwatch(index);
        shared.forget(index);
    }

    /// See [`Plan::suspect`].
    pub fn suspect(&self, index: Index) {
        self.lock().plan.suspect(index, Instant::now());
        self.changed.notify_one();
    }

    /// Makes probes until `stop`. Each report goes to `report`.
    pub async fn run<F, Fut>(self, prober: Prober, stop: CancellationToken, report: F)
    where
        F: Fn(Report) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        loop {
            let (begun, next) = {
                let mut shared = self.lock();
                let begun = shared.plan.begin(Instant::now());
                let begun: Vec<_> = begun
                    .into_iter()
                    .filter_map(|(index, generation)| shared.take(index, generation))
                    .collect();
                (begun, shared.plan.next_due())
            };
            for job in begun {
                let (scheduler, prober, report, stop) =
                    (self.clone(), prober.clone(), report.clone(), stop.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = scheduler.make(job, prober, report) => {}
                    }
                });
            }
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.changed.notified() => {}
                () = sleep => {}
            }
        }
    }

    async fn make<F, Fut>(self, mut job: Job, prober: Prober, report: F)
    where
        F: Fn(Report) -> Fut,
        Fut: Future<Output = ()>,
    {
        let (found, took) = prober.probe(&job.target, &mut job.warm).await;
        let (ended, label) = match &found {
            Found::Good => (Ended::Well, "ok"),
            Found::Bad(cause, _) => (Ended::Badly, cause.as_str()),
            Found::Void(_) => (Ended::Without, "void"),
            Found::Skipped(_) => (Ended::Without, "skipped"),
        };
        metrics::counter!("rollcall_probes_total", "kind" => kind(&job.target), "result" => label)
            .increment(1);
        metrics::histogram!("rollcall_probe_seconds").record(took);
        let (index, generation) = (job.index, job.generation);
        self.lock().give_back(job, ended);
        self.changed.notify_one();
        report(Report { index, generation, found, took }).await;
    }
}

/// The probe's kind as a label: only known ones, since agents name them.
fn kind(target: &Target) -> &'static str {
    ["http", "tcp", "nats", "acp", "a2a", "mcp", "grpc"]
        .into_iter()
        .find(|known| *known == target.endpoint.kind)
        .unwrap_or("other")
}

struct Job {
    index: Index,
    generation: u64,
    target: Arc<Target>,
    host: Arc<str>,
    warm: Warm,
}

impl Shared {
    fn forget(&mut self, index: Index) {
        if let Some(watched) = self.watched.remove(&index) {
            self.warm -= usize::from(watched.warm.is_counted());
        }
    }

    fn take(&mut self, index: Index, generation: u64) -> Option<Job> {
        let watched = self.watched.get_mut(&index).filter(|watched| watched.generation == generation)?;
        let warm = std::mem::take(&mut watched.warm);
        let job = Job {
            index,
            generation,
            target: Arc::clone(&watched.target),
            host: Arc::clone(&watched.host),
            warm,
        };
        self.warm -= usize::from(job.warm.is_counted());
        Some(job)
    }

    fn give_back(&mut self, mut job: Job, ended: Ended) {
        self.plan.ended(job.index, job.generation, &job.host, ended, Instant::now());
        let Some(watched) =
            self.watched.get_mut(&job.index).filter(|watched| watched.generation == job.generation)
        else {
            return;
        };
        let keep = job.warm.is_kept() && self.warm < WARM_MAX;
        job.warm.count(keep);
        self.warm += usize::from(keep);
        watched.warm = job.warm;
    }
}

#[cfg(test)]
mod tests;
