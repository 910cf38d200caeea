//! Hands work in, again and again until it is known to be accepted or refused.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rollcall_core::{
    ids::{AgentId, ExecutionId},
    wire::{OnLoss, SubmitRequest},
};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    agent::{Front, World},
    plan::PlannedWork,
};
use crate::{connection::Fleet, exit, failure::Failure};

/// Submissions under way at once; more wait.
const SUBMISSIONS_MAX: usize = 64;
/// Pause before a submission is tried again.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// How long one submission is tried.
const TRY_BOUND: Duration = Duration::from_secs(60);

pub(crate) struct Submitter {
    fleet: Fleet,
    world: Arc<World>,
    fronts: Arc<Vec<Arc<Front>>>,
    tag: String,
    permits: Arc<Semaphore>,
    count: AtomicU64,
    refused: AtomicU64,
    /// Which agent each open execution was meant for.
    meant_for: Mutex<HashMap<ExecutionId, usize>>,
}

impl Submitter {
    pub(crate) fn new(fleet: Fleet, world: Arc<World>, fronts: Arc<Vec<Arc<Front>>>, tag: &str) -> Self {
        Self {
            fleet,
            world,
            fronts,
            tag: tag.to_owned(),
            permits: Arc::new(Semaphore::new(SUBMISSIONS_MAX)),
            count: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            meant_for: Mutex::default(),
        }
    }

    pub(crate) fn submitted(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.permits.available_permits() == SUBMISSIONS_MAX
    }

    /// Begins a submission; waits only for a place among those under way.
    pub(crate) async fn submit(self: &Arc<Self>, work: PlannedWork, agent: AgentId) {
        let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return };
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let id = ExecutionId::new(&format!("sim-{}-{number}", self.tag))
            .expect("the tag was checked in an agent's name");
        let duration_ms = u64::try_from(work.work.as_millis()).unwrap_or(u64::MAX);
        self.world.truth().submitted(id.clone(), work.kind, duration_ms, work.stall_timeout_ms);
        self.fronts[work.agent].load.fetch_add(1, Ordering::AcqRel);
        self.meant_for().insert(id.clone(), work.agent);
        let request = SubmitRequest {
            execution_id: Some(id.clone()),
            agent_id: Some(agent),
            timeout_ms: Some(work.timeout_ms),
            stall_timeout_ms: work.stall_timeout_ms,
            on_loss: Some(if work.requeue { OnLoss::Requeue } else { OnLoss::Fail }),
            ..SubmitRequest::default()
        };
        let submitter = Arc::clone(self);
        tokio::spawn(async move {
            submitter.try_until_known(&id, &request).await;
            drop(permit);
        });
    }

    async fn try_until_known(&self, id: &ExecutionId, request: &SubmitRequest) {
        let until = Instant::now() + TRY_BOUND;
        loop {
            let failure = match self.fleet.ask("submit", request).await {
                Ok(_) => return,
                Err(failure) => failure,
            };
            if !is_worth_another_try(&failure) || Instant::now() >= until {
                tracing::warn!(execution = %id, %failure, "not submitted");
                // Without an answer it may be in the log all the same; then it is told of and stays.
                if failure.status != exit::UNAVAILABLE {
                    self.world.truth().withdrawn(id);
                    self.ended(id);
                }
                self.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }

    /// An execution is over: its agent may be given the next.
    pub(crate) fn ended(&self, id: &ExecutionId) {
        if let Some(agent) = self.meant_for().remove(id) {
            self.fronts[agent].load.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn meant_for(&self) -> std::sync::MutexGuard<'_, HashMap<ExecutionId, usize>> {
        self.meant_for.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Services that restart, queues that are full and agents that the dispatcher has not heard of yet come round.
const fn is_worth_another_try(failure: &Failure) -> bool {
    matches!(failure.status, exit::UNAVAILABLE | exit::TRY_LATER | exit::NOT_FOUND)
}
