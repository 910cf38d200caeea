//! The judge of a world: reads the whole log, capacity and the truth after a run, and says which invariant of DESIGN.md
//! was broken, if any.

mod external;
mod grants;
mod rest;
mod runs;

use std::collections::{BTreeMap, BTreeSet};

use rollcall_capacity::{Capacity, Place};
use rollcall_core::{
    AgentId, ExecutionId, InstanceId,
    event::{AgentEvent, EventBody, ExecutionEvent, Recovered, RecoveryReason, TerminateOutcome},
    execution::{Execution, Standing, State},
};

use crate::{
    exec::at_once,
    log::Entry,
    stage::{INTERVAL_MS, POOL, Stage},
    truth::{Run, Truth},
    watchdog::{LIMITS, history},
};

/// Clocks of services are this far apart at most.
const CLOCKS_APART_MS: u64 = 1_000;

/// Everybody has adopted the time of the log's server after this: a cut of the bus that leaves the log within reach (14 s,
/// in which a watchdog does not look for its sight), an interval of five seconds, and a try that fails.
const ADOPT_MAX_MS: u64 = 23_000;

/// When a heartbeat is overdue.
const OVERDUE_MS: u64 = INTERVAL_MS * 3 / 2;
/// Lists this far apart vouch for what is on them.
const LISTS_APART_MS: u64 = INTERVAL_MS * 5 / 2;

/// An invariant that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its number in DESIGN.md.
    pub invariant: u8,
    /// What happened.
    pub what: String,
}

type Verdict = Result<(), Violation>;

fn broken(invariant: u8, what: impl Into<String>) -> Violation {
    Violation { invariant, what: what.into() }
}

/// Looks at everything. `settled`: the world came to rest in its time.
pub(crate) fn judge(stage: &Stage, settled: bool) -> Verdict {
    grants::grants(stage)?;
    grants::drains(stage)?;
    external::external(stage)?;
    runs::once(stage)?;
    runs::room(stage)?;
    runs::unasked(stage)?;
    histories(stage)?;
    silences(stage)?;
    reports(stage)?;
    ends(stage, settled)
}

fn ids(stage: &Stage) -> BTreeSet<ExecutionId> {
    let log = stage.log.borrow();
    log.entries().iter().filter_map(|e| e.execution().map(|event| event.execution_id().clone())).collect()
}

/// Invariants 2, 3, 5 and 6 over each execution's own history.
fn histories(stage: &Stage) -> Verdict {
    for id in ids(stage) {
        let entries = stage.log.borrow().history(&stage.subjects.execution_event(&id));
        let mut execution: Option<Execution> = None;
        let mut recovered = BTreeSet::new();
        let mut ends = 0;
        for entry in &entries {
            let Some(event) = entry.execution() else { continue };
            let Some(known) = &mut execution else {
                match event {
                    ExecutionEvent::Submitted(request) => {
                        execution = Some(Execution::submitted(request.clone(), entry.seq, entry.event.time));
                        continue;
                    }
                    _ => return Err(broken(2, format!("{id} begins with {}", event.short_type()))),
                }
            };
            if let ExecutionEvent::Recovered(event) = event
                && !recovered.insert(event.attempt)
            {
                return Err(broken(3, format!("{id}:{} was recovered twice", event.attempt)));
            }
            if known.state == State::Cancelled && !matches!(event, ExecutionEvent::LateResult(_)) {
                return Err(broken(5, format!("{id} is cancelled and then {}", event.short_type())));
            }
            condemned(stage, entry, event, known)?;
            earned(stage, &id, event)?;
            let was = known.state.is_terminal();
            if let Err(misfit) = known.evolve(entry.seq, event, entry.event.time) {
                return Err(broken(2, format!("{id}: entry {} ({misfit})", entry.seq)));
            }
            match event {
                ExecutionEvent::Retried(_) => ends = 0,
                // The one end after another: finished work is worth more than a verdict.
                ExecutionEvent::Completed(done) if done.late => {}
                _ if known.state.is_terminal() && !matches!(event, ExecutionEvent::LateResult(_)) => {
                    ends += 1
                }
                _ if was && !known.state.is_terminal() => {
                    return Err(broken(2, format!("{id} rose from its end with {}", event.short_type())));
                }
                _ => {}
            }
            if ends > 1 {
                return Err(broken(2, format!("{id} ended {ends} times")));
            }
        }
    }
    Ok(())
}

/// Invariant 5: what ends an attempt by a report is a report that its agent made of that very attempt.
fn earned(stage: &Stage, id: &ExecutionId, event: &ExecutionEvent) -> Verdict {
    let (agent, outcome) = match event {
        ExecutionEvent::Completed(done) => (done.agent_id.clone(), "completed"),
        ExecutionEvent::Failed(failed) => {
            (failed.agent_id.clone(), failed.outcome.map_or("failed", |outcome| outcome.as_str()))
        }
        ExecutionEvent::Recovered(lost) if lost.returned => (Some(lost.agent_id.clone()), "returned"),
        _ => return Ok(()),
    };
    let Some(agent) = agent else { return Ok(()) };
    let report = (agent, id.clone(), event.attempt(), outcome);
    if stage.truth.borrow().reported.contains(&report) {
        return Ok(());
    }
    Err(broken(5, format!("{} of {report:?}, which was never reported", event.short_type())))
}

/// Invariant 7: where an agent's word that it is dead stands in the log, it was dead by then.
fn buried_alive(stage: &Stage, entry: &Entry, lost: &Recovered, id: &ExecutionId) -> Verdict {
    if !matches!(lost.terminate, TerminateOutcome::Confirmed | TerminateOutcome::NotRunning) {
        return Ok(());
    }
    let truth = stage.truth.borrow();
    let key = (lost.instance_id.clone(), id.clone(), lost.attempt);
    let dead = |at: Option<&u64>| at.is_some_and(|at| *at <= entry.decided_at);
    // Never begun there is dead as well.
    let begun = truth.listed.contains_key(&key);
    if dead(truth.over.get(&key)) || dead(truth.dropped.get(&key)) || !begun {
        return Ok(());
    }
    let said = lost.terminate;
    Err(broken(7, format!("{id}:{} was said to be dead ({said:?}) and runs on {}", key.2, key.0)))
}

/// Invariant 6: nobody is condemned for standing still that does not, or not for so long.
fn stood_still(stage: &Stage, entry: &Entry, lost: &Recovered, before: &Execution) -> Verdict {
    let key = (lost.instance_id.clone(), before.id().clone(), lost.attempt);
    // What its instance has lost does not move there either.
    let truth = stage.truth.borrow();
    let since = [truth.stuck.get(&key), truth.dropped.get(&key)].into_iter().flatten().min().copied();
    let timeout = before.request.stall_timeout_ms.unwrap_or(u64::MAX);
    if since.is_some_and(|since| entry.decided_at.saturating_sub(since) + CLOCKS_APART_MS >= timeout) {
        return Ok(());
    }
    let what = format!("{}:{} moved within {timeout} ms and was called stalled ({since:?})", key.1, key.2);
    Err(broken(6, what))
}

/// Invariant 6: nobody is condemned while its agent lists it within its time.
fn condemned(stage: &Stage, entry: &Entry, event: &ExecutionEvent, before: &Execution) -> Verdict {
    let ExecutionEvent::Recovered(lost) = event else { return Ok(()) };
    if lost.returned {
        return Ok(());
    }
    buried_alive(stage, entry, lost, before.id())?;
    match lost.reason {
        RecoveryReason::TimedOut => return in_time(stage, entry, lost.attempt, before),
        RecoveryReason::Stalled => return stood_still(stage, entry, lost, before),
        // The bound on what lasted too long by any measure.
        RecoveryReason::Stale => return Ok(()),
        _ => {}
    }
    let key = (lost.instance_id.clone(), before.id().clone(), lost.attempt);
    let at = entry.decided_at;
    // Of an instance that was replaced or forgotten the first heartbeat that is overdue says enough.
    let left = matches!(lost.reason, RecoveryReason::AgentGone | RecoveryReason::AgentRestarted);
    // What an instance left out of its lists it was heard to leave out.
    let is_silence = left || lost.reason == RecoveryReason::AgentLost;
    if is_silence && unheard_and_cut_off(&stage.truth.borrow(), entry, &lost.agent_id) {
        return Ok(());
    }
    if vouched(stage, &key, at, if left { OVERDUE_MS } else { LISTS_APART_MS }) {
        let reason = lost.reason.as_str();
        let what = format!("{}:{} was condemned ({reason}) while {} listed it", key.1, key.2, key.0);
        return Err(broken(6, what));
    }
    Ok(())
}

/// Who wrote it lost heartbeats without knowing it, and before the next one could show that its agent was cut off as well, so that
/// it was not there to be asked either: no evidence tells that from death.
fn unheard_and_cut_off(truth: &Truth, entry: &Entry, agent: &AgentId) -> bool {
    let mut cut = truth
        .cut
        .iter()
        .filter(|(who, from, until)| who == agent && (*from..*until).contains(&entry.decided_at));
    cut.any(|(_, from, _)| {
        let before = |(me, began, ended): &(usize, u64, u64)| {
            let theirs = entry.event.source.ends_with(&format!("/{me}"));
            theirs && (*began..ended + INTERVAL_MS * 3 / 2).contains(from)
        };
        truth.losing.iter().any(before)
    })
}

/// Whether the instance held the attempt at that moment and had listed it, heartbeat by heartbeat, for as long as silence
/// takes to count. Heartbeats that chance took from anybody don't count; that a service did not listen does not matter.
fn vouched(stage: &Stage, key: &(InstanceId, ExecutionId, u32), at: u64, silent_ms: u64) -> bool {
    let truth = stage.truth.borrow();
    if truth.dropped.get(key).is_some_and(|dropped| *dropped <= at) {
        return false;
    }
    let window = INTERVAL_MS * u64::from(LIMITS.failure_threshold) + LIMITS.lost_after_ms;
    let Some(times) = truth.listed.get(key) else { return false };
    let arrived: Vec<u64> =
        times.iter().copied().filter(|t| t + 2 * stage.weather_max() < at && t + window > at).collect();
    let ends = arrived.last().is_some_and(|last| at - last < silent_ms);
    arrived.len() >= 3 && ends && arrived.windows(2).all(|pair| pair[1] - pair[0] < LISTS_APART_MS)
}

/// Heartbeats in a row that chance took from nobody, before an agent can't be silent.
const STEADY: usize = 4;

/// Invariant 6: nobody is called silent whose heartbeats come.
fn silences(stage: &Stage) -> Verdict {
    let log = stage.log.borrow();
    let truth = stage.truth.borrow();
    for entry in log.entries() {
        let EventBody::Agent(AgentEvent::Disconnected(change) | AgentEvent::Error(change)) =
            &entry.event.body
        else {
            continue;
        };
        // An operator's undrain tells what was known before, as of then: "of one that nobody heard since" (PROTOCOL.md).
        if change.undrained || lost_heartbeats(&truth, entry) {
            continue;
        }
        // The newest instance wins: once it is heard, those before it speak for the agent no more.
        let instances = stage.instances.borrow();
        let mut of_agent = instances.iter().filter(|instance| instance.agent == change.agent_id);
        let newest = of_agent.rfind(|instance| instance.born_at <= entry.decided_at);
        if newest.map(|instance| &instance.id) != change.instance_id.as_ref() {
            continue;
        }
        let times = change.instance_id.as_ref().and_then(|instance| truth.beaten.get(instance));
        if is_steady(stage, times.map_or(&[], Vec::as_slice), entry.decided_at) {
            let (agent, reason) = (&change.agent_id, &change.reason);
            let what = format!("{agent} beat and was called silent ({reason}) at {}", entry.decided_at);
            return Err(broken(6, what));
        }
    }
    Ok(())
}

/// Who wrote it lost heartbeats a moment ago, and nothing had told it by then: the holes in their numbers come afterwards.
fn lost_heartbeats(truth: &Truth, entry: &Entry) -> bool {
    let lost = |(me, from, until): &(usize, u64, u64)| {
        let theirs = entry.event.source.ends_with(&format!("/{me}"));
        theirs && (*from..until + INTERVAL_MS * 3 / 2).contains(&entry.decided_at)
    };
    truth.losing.iter().any(lost)
}

/// Whether heartbeats of those times have come one by one until that moment.
fn is_steady(stage: &Stage, times: &[u64], at: u64) -> bool {
    let arrived = times.partition_point(|time| time + 2 * stage.weather_max() < at);
    let Some(last) = arrived.checked_sub(STEADY).map(|from| &times[from..arrived]) else { return false };
    let longest = INTERVAL_MS * 3 / 2;
    last.windows(2).all(|pair| pair[1] - pair[0] < longest) && at - last[STEADY - 1] < longest
}

fn in_time(stage: &Stage, entry: &Entry, attempt: u32, before: &Execution) -> Verdict {
    let id = before.id();
    let Some(held) = before.attempt_numbered(attempt) else {
        return Err(broken(6, format!("{id}:{attempt} timed out and was never dispatched")));
    };
    let decided = stage.fleet_time_at_most(entry.decided_at, ADOPT_MAX_MS);
    if decided.plus_ms(CLOCKS_APART_MS) < held.deadline {
        return Err(broken(
            6,
            format!("{id}:{attempt} timed out at {decided}, its deadline is {}", held.deadline),
        ));
    }
    Ok(())
}

/// Invariant 5: whatever the stream of reports took is in the log, refused, or still waits. Finished work is never lost.
fn reports(stage: &Stage) -> Verdict {
    for report in &stage.truth.borrow().released {
        let Some(execution) = history(stage, &report.execution) else { continue };
        match execution.standing(&report.agent, report.attempt, report.outcome) {
            Standing::Duplicate | Standing::Refused(_) => {}
            standing => {
                return Err(broken(5, format!("{report:?} was released and is in no log ({standing:?})")));
            }
        }
    }
    let outlived = runs::Outlived::of(&stage.log.borrow());
    let truth = stage.truth.borrow();
    for report in stage.reports.borrow().taken() {
        let of_it = |run: &&Run| {
            (&run.instance, &run.execution, run.attempt)
                == (&report.instance, &report.execution, report.attempt)
        };
        if truth.runs.iter().filter(of_it).any(|run| outlived.began(run)) {
            continue;
        }
        let Some(execution) = history(stage, &report.execution) else { continue };
        match execution.standing(&report.agent, report.attempt, report.outcome) {
            Standing::Duplicate | Standing::Refused(_) => {}
            standing if stage.reports.borrow().is_empty() => {
                return Err(broken(
                    5,
                    format!("{report:?} was acknowledged and is in no log ({standing:?})"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

pub(crate) use rest::restless;

/// Invariants 2, 4 and 8: what was accepted is in the log and has ended, or is visibly held; nothing else is held.
fn ends(stage: &Stage, settled: bool) -> Verdict {
    for id in &stage.truth.borrow().accepted {
        if history(stage, id).is_none() {
            return Err(broken(2, format!("{id} was accepted and is nowhere")));
        }
    }
    if let Some(id) = stage.truth.borrow().stranded.first() {
        return Err(broken(8, format!("{id} held a slot and nobody launched it")));
    }
    let capacity = stage.capacity.handle();
    let mut places: BTreeMap<(String, u32), Place> = BTreeMap::new();
    let mut from = None;
    while let Ok(page) = at_once(capacity.scan(POOL, from)) {
        for placed in page.holds {
            places.insert((placed.hold.execution_id, placed.hold.attempt), placed.place);
        }
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    for id in ids(stage) {
        let Some(execution) = history(stage, &id) else { continue };
        let place = places.remove(&(id.as_str().to_owned(), execution.attempt));
        match (execution.state.is_terminal(), place) {
            (true, None) => {}
            (true, Some(place)) if !settled => {
                return Err(broken(4, format!("{id} has ended and still has {place:?}")));
            }
            (false, _) if !settled => {
                let state = execution.state.as_str();
                return Err(broken(8, format!("{id} is {state} for ever, by entry {}", execution.seq)));
            }
            (true, Some(_)) | (false, _) => {}
        }
    }
    match places.keys().next() {
        Some(leaked) => Err(broken(4, format!("{leaked:?} holds a place that the log gives to nobody"))),
        None if settled => Ok(()),
        None if let Some((invariant, what)) = restless(stage) => Err(broken(invariant, what)),
        None => Err(broken(8, "the world did not come to rest")),
    }
}
