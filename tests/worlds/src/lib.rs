//! Whole worlds of Rollcall in virtual time, one per seed: two of every service around their real, pure decisions, agents
//! that misbehave, orchestrators that start work themselves, a network with weather and cuts, a log, a stream of reports,
//! and capacity that is wiped now and then.
//! Nothing sleeps and nothing is random but the seed: a run of a minute takes milliseconds, and a failure comes back with
//! its seed. [`judge`] says after each run whether an invariant of the design was broken.
//!
//! What is real: `rollcall_core`'s aggregates, `watchdog::state` with its judgement, `dispatcher::{state, decide}`,
//! `health_prober::{hear, state, decide}`, `rollcall_agent::state`, `rollcall_capacity::ModelCapacity`. The shells around them are small copies of
//! the services' own, step by step in the same order; a service can die between any two steps.

mod agent;
mod buffers;
mod clock;
mod dispatcher;
mod disturb;
mod exec;
mod judge;
mod log;
mod operate;
mod orchestrate;
mod plan;
mod prober;
mod services;
mod stage;
mod truth;
mod watchdog;

use std::{collections::BTreeMap, rc::Rc};

use rollcall_capacity::Capacity;
use rollcall_core::execution::Execution;

pub use judge::Violation;
use services::Kind;
use stage::{POOL, Stage};

/// A guard that is left out, to see that its absence is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// Appends don't name the sequence they were decided on.
    NoCas,
    /// A report is acknowledged before what it causes is in the log.
    AckBeforeAppend,
    /// A report counts for whatever attempt is current.
    NoAttemptFence,
    /// Watchdog and prober take what they could not hear for silence.
    VoidCountedAsAbsent,
    /// An agent is asked without another look at its slot once the log says who has it.
    AskUnconfirmed,
    /// Who does not hold a slot gives back somebody else's.
    ReleaseWithoutCheck,
    /// A watchdog or prober that stood still judges silence as if it had listened, and before it has read what waited.
    StallIgnored,
    /// Capacity that went back to an older state is believed.
    RestoredBelieved,
    /// An operator's drain closes nothing.
    DrainIgnored,
    /// A capacity that is lowered is not told.
    LoweredIgnored,
    /// An agent starts what it was told to end before it came.
    NoTombstone,
    /// An agent that does not answer a dispatch is taken to have refused it.
    SilenceRefuses,
    /// A dispatch without an answer is taken never to have been put to its agent.
    UnansweredIsUnasked,
    /// An agent is asked to take work that an orchestrator starts.
    ExternalAsked,
    /// What was asked to end is taken to be dead, whatever its agent says.
    EndUnconfirmed,
}

/// A world to be run.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Everything follows from it.
    pub seed: u64,
    /// What is left out.
    pub defect: Option<Defect>,
    /// Says what happens on standard output.
    pub trace: bool,
    /// Takes a digest of all that happens, see [`Summary::digest`].
    pub digest: bool,
}

/// What a run was like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Entries of the log.
    pub entries: usize,
    /// Executions.
    pub executions: usize,
    /// Recoveries.
    pub recovered: usize,
    /// Virtual milliseconds.
    pub lasted_ms: u64,
    /// A digest of the whole log, byte by byte and with its moments, and of the trace; 0 without [`Setup::digest`].
    pub digest: u64,
    /// What else happened, how often.
    pub seen: BTreeMap<&'static str, u64>,
}

/// Longest time a world gets to come to rest after chaos, in virtual milliseconds: the sum of every bound in it
/// (queue time, time to run, lost or stale, three attempts) with room.
const REST_MAX_MS: u64 = 150_000;
const REST_LOOK_MS: u64 = 1_000;

/// Runs a world.
///
/// # Errors
/// The invariant it broke.
pub fn run(setup: Setup) -> Result<Summary, Violation> {
    use Kind::{Dispatcher, Prober, Watchdog};
    let stage = Stage::new(setup, &[Dispatcher, Dispatcher, Watchdog, Watchdog, Prober, Prober]);
    plan::begin(&stage);
    stage.exec.run_until(plan::CHAOS_MS);
    let mut settled = false;
    while !settled && stage.exec.now() < plan::CHAOS_MS + REST_MAX_MS {
        stage.exec.run_until(stage.exec.now() + REST_LOOK_MS);
        settled = stage.settling.get() && rests(&stage);
    }
    let verdict = judge::judge(&stage, settled);
    let summary = summary(&stage);
    stage.exec.clear();
    stage.places.borrow_mut().clear();
    verdict.map(|()| summary)
}

fn executions(stage: &Stage) -> Vec<Execution> {
    let log = stage.log.borrow();
    let submitted = log.entries().iter().filter_map(|entry| match entry.execution() {
        Some(rollcall_core::event::ExecutionEvent::Submitted(request)) => Some(&request.execution_id),
        _ => None,
    });
    submitted.filter_map(|id| watchdog::history(stage, id)).collect()
}

/// Whether nothing is left to do.
fn rests(stage: &Rc<Stage>) -> bool {
    let empty =
        exec::at_once(stage.capacity.handle().scan(POOL, None)).is_ok_and(|page| page.holds.is_empty());
    empty
        && stage.reports.borrow().is_empty()
        && executions(stage).iter().all(|e| e.state.is_terminal())
        && judge::restless(stage).is_none()
}

fn digest(stage: &Stage) -> u64 {
    if !stage.setup.digest {
        return 0;
    }
    for entry in stage.log.borrow().entries() {
        stage.digest(entry.subject.as_bytes());
        stage.digest(&entry.bytes);
        stage.digest(&entry.decided_at.to_le_bytes());
        stage.digest(&entry.landed_at.to_le_bytes());
    }
    stage.digest.get()
}

fn summary(stage: &Stage) -> Summary {
    let log = stage.log.borrow();
    let recovered = |entry: &&Rc<log::Entry>| entry.event.body.short_type() == "execution.recovered";
    Summary {
        entries: log.entries().len(),
        recovered: log.entries().iter().filter(recovered).count(),
        executions: executions(stage).len(),
        lasted_ms: stage.exec.now(),
        digest: digest(stage),
        seen: stage.seen.take(),
    }
}
