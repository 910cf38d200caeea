//! What a cycle saw and did, by category.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use rollcall_core::{AgentId, ExecutionId, Timestamp};
use serde::Serialize;

use crate::state::Counters;

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
    /// Recovered, then heard from.
    pub recovered_then_heard: u64,
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
