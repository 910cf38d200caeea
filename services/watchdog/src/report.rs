//! What a cycle saw and did, by category.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, PoisonError},
};

use rollcall_core::{AgentId, ExecutionId, Timestamp};
use serde::Serialize;

use crate::{
    matrix::{Row, verdict_in_words},
    state::{Counters, World},
};

/// Executions that a report names one by one; beyond it they are only counted.
pub const NAMED_MAX: usize = 200;

/// One execution that is in trouble, or that a dry run would touch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Named {
    /// Which.
    pub execution_id: ExecutionId,
    /// Its attempt.
    pub attempt: u32,
    /// Its agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// The row of the matrix it is in.
    pub row: &'static str,
    /// What is, or would be, done about it.
    pub decision: String,
    /// What went wrong last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// One cycle.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CycleReport {
    /// Counts up from 1 since the start of this process.
    pub cycle: u64,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took.
    pub took_ms: u64,
    /// Nothing was done, only said.
    pub dry_run: bool,
    /// Executions that have not ended.
    pub open: usize,
    /// Agents the log knows.
    pub agents: usize,
    /// Executions by row of the matrix; `healthy` is the rest.
    pub rows: BTreeMap<&'static str, usize>,
    /// The categories that people know.
    pub categories: Categories,
    /// Registries called over HTTP, and how many did not answer.
    pub registries: Registry,
    /// Since the last cycle's report.
    pub since_last: Done,
    /// Those that are not simply healthy.
    pub executions: Vec<Named>,
}

/// Executions by what the fleet calls it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Categories {
    /// Listed and in time.
    pub healthy: usize,
    /// Waiting in queues.
    pub queued: usize,
    /// Dispatched a moment ago.
    pub in_grace: usize,
    /// Missing on their agents' lists, or never taken.
    pub orphaned: usize,
    /// Beyond their deadline.
    pub timed_out: usize,
    /// Standing still.
    pub stalled: usize,
    /// With an agent that is silent, gone or restarted.
    pub lost: usize,
    /// Due, and not confirmed: unreachable, refused, suspended, rate limited or not to be judged now.
    pub deferred: usize,
    /// Due, and a report waits.
    pub withheld: usize,
    /// Beyond the safety net.
    pub stale: usize,
    /// Something speaks against it, and its instance itself speaks for it.
    pub vouched: usize,
    /// To be ended, not confirmed yet.
    pub cancelling: usize,
}

/// Registry calls of a cycle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Registry {
    /// Agents that were asked.
    pub asked: usize,
    /// Of those, how many did not answer: skipped, nothing is concluded from it.
    pub unreachable: usize,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Recoveries in the log, by us.
    pub recovered: u64,
    /// Steps that failed.
    pub failed: u64,
    /// Appends that lost to another event.
    pub conflicts: u64,
    /// Zombies asked to end.
    pub zombies: u64,
    /// Recovered, then listed again or completed.
    pub recovered_then_heard: u64,
}

impl CycleReport {
    /// How all stands now. Every execution that has not ended is in exactly one category.
    #[must_use]
    pub fn of(world: &World, now: Timestamp, dry_run: bool) -> Self {
        let mut rows: BTreeMap<&'static str, usize> = BTreeMap::new();
        let mut categories = Categories::default();
        let mut executions = Vec::new();
        let mut due: HashSet<&ExecutionId> = world.troubles.keys().collect();
        if dry_run {
            due.extend(world.due.ripe(now, NAMED_MAX));
        }
        for id in &due {
            let Some((judgement, _)) = world.standing_judgement(id, now) else { continue };
            let trouble = world.troubles.get(*id);
            // Work under way knows more than a judgement without looks.
            let holds = !matches!(judgement.row, Row::Queued | Row::Ended | Row::QueueExpired);
            let row = trouble.filter(|t| t.in_flight && holds).map_or(judgement.row, |t| t.row);
            *rows.entry(row.key()).or_default() += 1;
            categories.count(row);
            if executions.len() < NAMED_MAX && (judgement.verdict.is_work() || row != Row::Healthy) {
                executions.push(Named::of(world, id, row, verdict_in_words(&judgement, now)));
            }
        }
        categories.in_grace += world.count_in_grace(now, |id| !due.contains(id));
        let held: usize = world.agents.values().map(|entry| entry.held.len()).sum();
        categories.queued = world.executions.len().saturating_sub(held);
        let counted = categories.sum();
        categories.healthy += world.executions.len().saturating_sub(counted);
        Self {
            cycle: 0,
            started_at: now,
            took_ms: 0,
            dry_run,
            open: world.executions.len(),
            agents: world.agents.len(),
            rows,
            categories,
            registries: Registry::default(),
            since_last: Done::default(),
            executions,
        }
    }
}

impl Named {
    fn of(world: &World, id: &ExecutionId, row: Row, decision: String) -> Self {
        let execution = world.executions.get(id);
        Self {
            execution_id: id.clone(),
            attempt: execution.map_or(0, |e| e.attempt),
            agent_id: execution.and_then(|e| e.holder()).map(|h| h.agent_id.clone()),
            row: row.key(),
            decision,
            last_error: world.troubles.get(id).and_then(|t| t.last_error.clone()),
        }
    }
}

impl Categories {
    /// All of them together.
    #[must_use]
    pub const fn sum(&self) -> usize {
        self.healthy
            + self.queued
            + self.in_grace
            + self.orphaned
            + self.timed_out
            + self.stalled
            + self.lost
            + self.deferred
            + self.withheld
            + self.stale
            + self.vouched
            + self.cancelling
    }

    const fn count(&mut self, row: Row) {
        let category = match row {
            // Those that wait are counted together.
            Row::Ended | Row::QueueExpired | Row::Queued => return,
            Row::Healthy | Row::Unheard => &mut self.healthy,
            Row::InGrace => &mut self.in_grace,
            Row::UnlistedOnce | Row::Orphaned | Row::DispatchLost => &mut self.orphaned,
            Row::TimedOut => &mut self.timed_out,
            Row::Stalled => &mut self.stalled,
            Row::AgentSilent | Row::AgentLost | Row::AgentRestarted | Row::AgentGone => &mut self.lost,
            Row::Withheld => &mut self.withheld,
            Row::Stale => &mut self.stale,
            Row::TerminateRefused
            | Row::Suspended
            | Row::RateLimited
            | Row::Blind
            | Row::SupersededUnsure
            | Row::GoneUnsure => &mut self.deferred,
            Row::SilentAnswers | Row::SupersededVouched | Row::GoneVouched | Row::UnlistedAnswers => {
                &mut self.vouched
            }
            Row::Cancelling | Row::CancelledLost => &mut self.cancelling,
        };
        *category += 1;
    }
}

impl Done {
    /// What happened between two counts.
    #[must_use]
    pub const fn between(before: &Counters, after: &Counters) -> Self {
        Self {
            recovered: after.recovered.saturating_sub(before.recovered),
            failed: after.failed.saturating_sub(before.failed),
            conflicts: after.conflicts.saturating_sub(before.conflicts),
            zombies: after.zombies.saturating_sub(before.zombies),
            recovered_then_heard: after.heard_again.saturating_sub(before.heard_again),
        }
    }

    /// Whether more than half of what was tried failed; `None`: nothing was tried, which says neither.
    #[must_use]
    pub const fn is_failing(&self) -> Option<bool> {
        if self.failed + self.recovered == 0 { None } else { Some(self.failed > self.recovered) }
    }
}

/// The last report, and the right to run a cycle.
#[derive(Debug, Default)]
pub struct Ledger {
    last: Mutex<Option<CycleReport>>,
    before: Mutex<Counters>,
    number: std::sync::atomic::AtomicU64,
    failing: std::sync::atomic::AtomicBool,
    running: tokio::sync::Mutex<()>,
}

impl Ledger {
    /// The right to run a cycle, if nobody else has it.
    pub fn try_begin(&self) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        self.running.try_lock().ok()
    }

    /// The number of the cycle that begins.
    pub fn next_number(&self) -> u64 {
        self.number.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1
    }

    /// What was done since this was asked last; a dry run asks without taking note.
    pub fn since_last(&self, now: &Counters, take_note: bool) -> Done {
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let done = Done::between(&before, now);
        if take_note {
            *before = now.clone();
        }
        done
    }

    /// Keeps a report for those who ask later.
    pub fn keep(&self, report: CycleReport) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }

    /// The last report.
    pub fn last(&self) -> Option<CycleReport> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes whether recovery fails; true if it begins to. Cycles without a try change nothing: what can't be ended is
    /// asked again with pauses that are longer than a cycle, and would be an alarm each time.
    pub fn begins_to_fail(&self, done: &Done) -> bool {
        let Some(failing) = done.is_failing() else { return false };
        !self.failing.swap(failing, std::sync::atomic::Ordering::Relaxed) && failing
    }

    /// That it fails did not get into the log: the next cycle that failed says it.
    pub fn unsaid(&self) {
        self.failing.store(false, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_fails_when_more_than_half_of_the_tries_did_and_that_is_said_once() {
        let ledger = Ledger::default();
        let says = |recovered, failed| {
            ledger.begins_to_fail(&Done { recovered, failed, conflicts: 9, ..Done::default() })
        };
        assert!(!says(0, 0), "nothing was tried");
        assert!(!says(3, 3), "half is not more than half");
        assert!(says(3, 4));
        assert!(!says(0, 9), "said already");
        assert!(!says(0, 0) && !says(0, 1), "a pause between two tries is no recovery from it");
        assert!(!says(2, 1));
        assert!(says(0, 1), "again, after it had gone well");
    }
}
