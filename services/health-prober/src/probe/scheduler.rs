//! When which endpoint is probed. [`Plan`] decides and is plain synchronous code; [`Scheduler`] makes the probes.
//!
//! Phases are jittered; suspects go first; what is down is probed more and more seldom; a probe that is late is not made
//! twice; and neither a host, nor what hangs, nor all of them together get more than their share at once, so a hung
//! endpoint delays nobody.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Found, Prober, Target, Warm, host_of};
use crate::state::Index;

mod bounds;
mod plan;

pub use bounds::{Bounds, raise_file_limit};
pub use plan::{Ended, Plan};

/// A failure that took more than this share of the timeout held its place for nothing.
const HUNG_SHARE: u32 = 2;

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
    generation: u64,
    warm: Warm,
}

struct Shared {
    plan: Plan,
    watched: HashMap<Index, Watched>,
    warm: usize,
    warm_max: usize,
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
    pub fn new(interval: Duration, bounds: Bounds) -> Self {
        let plan = Plan::new(interval, bounds);
        let shared = Shared { plan, watched: HashMap::new(), warm: 0, warm_max: bounds.warm };
        Self { shared: Arc::new(Mutex::new(shared)), changed: Arc::new(Notify::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Changed by single calls only: a panic can't have left it half changed.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Probes this from now on, instead of what was probed for this agent. Returns the generation of its reports.
    pub fn watch(&self, index: Index, target: Target) -> u64 {
        let host = host_of(&target);
        let jitter = rand::random::<f64>();
        let mut shared = self.lock();
        let generation = shared.plan.watch(index, &host, jitter, Instant::now());
        let watched = Watched { target: Arc::new(target), generation, warm: Warm::default() };
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
            Found::Bad(cause, _) if took >= prober.timeout / HUNG_SHARE => (Ended::Hung, cause.as_str()),
            Found::Bad(cause, _) => (Ended::Badly, cause.as_str()),
            Found::Void(_) => (Ended::Void, "void"),
            Found::Skipped(_) => (Ended::Skipped, "skipped"),
        };
        metrics::counter!("rollcall_probes_total", "kind" => kind(&job.target), "result" => label)
            .increment(1);
        metrics::histogram!("rollcall_probe_seconds").record(took);
        // Its place is free only when its report was taken: reports that wait are bounded as probes are.
        report(Report { index: job.index, generation: job.generation, found, took }).await;
        self.lock().give_back(job, ended);
        self.changed.notify_one();
    }
}

/// The probe's kind as a label: only known ones, since agents name them.
fn kind(target: &Target) -> &'static str {
    super::KINDS.into_iter().find(|known| *known == target.endpoint.kind).unwrap_or("other")
}

struct Job {
    index: Index,
    generation: u64,
    target: Arc<Target>,
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
        let job = Job { index, generation, target: Arc::clone(&watched.target), warm };
        self.warm -= usize::from(job.warm.is_counted());
        Some(job)
    }

    fn give_back(&mut self, mut job: Job, ended: Ended) {
        self.plan.ended(job.index, job.generation, ended, Instant::now());
        let Some(watched) =
            self.watched.get_mut(&job.index).filter(|watched| watched.generation == job.generation)
        else {
            return;
        };
        let keep = job.warm.is_kept() && self.warm < self.warm_max;
        job.warm.count(keep);
        self.warm += usize::from(keep);
        watched.warm = job.warm;
    }
}
