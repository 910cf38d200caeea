//! What an agent holds, as a pure state machine: no clock, no runtime, no connection.
//!
//! Invariants, each with a test below:
//! - a claim is listed from the moment its dispatch was accepted until its final report was acknowledged;
//! - one `(execution, attempt)` is started at most once, however often it is dispatched;
//! - an attempt that was terminated, even before its dispatch arrived, is never started;
//! - nothing is accepted once intake is closed, nor at capacity; unacknowledged finishes do not count there.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
};

use rollcall_core::{
    ids::ExecutionId,
    wire::{AgentState, Outcome, TERMINATED},
};

/// Ended attempts that are remembered, the oldest forgotten first. A dispatch that comes later than so many others ended
/// is no repetition any more: the dispatcher settles an unknown outcome within its dispatch grace.
pub const TOMBSTONES_MAX: usize = 4096;

/// Bytes that claims may take in a heartbeat, which has 64 KiB in all (PROTOCOL.md, Conventions). It is also what bounds
/// the finished executions whose report waits for its acknowledgement: 440 claims with the longest ids, 620 with ULIDs.
pub const CLAIM_BYTES_MAX: usize = 56 * 1024;

/// Bytes of a claim besides its id: names, punctuation, the longest attempt and the longest number.
const CLAIM_OVERHEAD_BYTES: usize = 66;

/// One attempt of one execution.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The execution.
    pub execution_id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
}

impl Key {
    /// The key of this attempt.
    #[must_use]
    pub const fn new(execution_id: ExecutionId, attempt: u32) -> Self {
        Self { execution_id, attempt }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.execution_id, self.attempt)
    }
}

/// Why a dispatch is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// This instance is shutting down.
    Draining,
    /// Every slot is in use.
    AtCapacity,
    /// One more would not fit into a heartbeat.
    HeartbeatFull,
    /// This attempt was terminated here.
    Terminated,
    /// A later attempt was here already.
    OldAttempt,
    /// This earlier attempt still runs here; it is to be ended first.
    OlderAttemptRuns(Key),
}

impl Refusal {
    /// The `reason` of the reply.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::AtCapacity => "at_capacity",
            Self::HeartbeatFull => "heartbeat_full",
            Self::Terminated => TERMINATED,
            Self::OldAttempt => "old_attempt",
            Self::OlderAttemptRuns(_) => "older_attempt_runs",
        }
    }
}

/// What a dispatch leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Taken: start it, answer `accepted`.
    Start,
    /// Taken before: answer `accepted`, start nothing.
    Held,
    /// Not taken.
    Refused(Refusal),
}

/// Why running work is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopCause {
    /// A terminate request with the reason `cancelled`.
    Cancelled,
    /// Any other terminate request, or a later attempt that takes its place.
    Terminated,
    /// This instance is shutting down.
    Returned,
}

impl StopCause {
    /// The cause that a terminate request with this reason means.
    #[must_use]
    pub fn of_terminate(reason: &str) -> Self {
        if reason == "cancelled" { Self::Cancelled } else { Self::Terminated }
    }

    const fn outcome(self) -> Outcome {
        match self {
            Self::Cancelled => Outcome::Cancelled,
            Self::Terminated => Outcome::Terminated,
            Self::Returned => Outcome::Returned,
        }
    }
}

/// What a terminate request leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// Nothing of this attempt runs here, nor ever will.
    NotRunning,
    /// It runs: stop it, answer when it is dead.
    Stop,
}

/// How the work itself ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It is done.
    Completed,
    /// It went wrong.
    Failed,
    /// It handed itself back.
    Returned,
    /// It ended because it was asked or forced to.
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Stopping(StopCause),
    Finished,
}

/// How an attempt that is not held any more ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tombstone {
    /// It ran and its end was acknowledged.
    Ended,
    /// It must not run (again).
    Terminated,
}

/// Everything one instance holds and what it must not start.
#[derive(Debug)]
pub struct Book {
    capacity: u32,
    closed: bool,
    slots: BTreeMap<Key, Phase>,
    claim_bytes: usize,
    tombstones: HashMap<Key, Tombstone>,
    /// Keys of `tombstones`, oldest first.
    tombstone_order: VecDeque<Key>,
    seq: u64,
}

impl Book {
    /// An instance that holds nothing.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        Self {
            capacity,
            closed: false,
            slots: BTreeMap::new(),
            claim_bytes: 0,
            tombstones: HashMap::new(),
            tombstone_order: VecDeque::new(),
            seq: 0,
        }
    }

    /// Executions that can run at once.
    #[must_use]
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// A dispatch came in.
    pub fn dispatch(&mut self, key: &Key) -> Admission {
        if self.slots.contains_key(key) {
            return Admission::Held;
        }
        match self.tombstones.get(key) {
            Some(Tombstone::Ended) => return Admission::Held,
            Some(Tombstone::Terminated) => return Admission::Refused(Refusal::Terminated),
            None => {}
        }
        if let Some(refusal) = self.why_not(key) {
            return Admission::Refused(refusal);
        }
        self.claim_bytes += claim_bytes(key);
        self.slots.insert(key.clone(), Phase::Running);
        Admission::Start
    }

    fn why_not(&self, key: &Key) -> Option<Refusal> {
        if self.closed {
            return Some(Refusal::Draining);
        }
        let mut attempts = self.attempts_of(&key.execution_id);
        if attempts.clone().any(|(held, _)| held.attempt > key.attempt) {
            return Some(Refusal::OldAttempt);
        }
        if let Some((older, _)) = attempts.find(|(_, phase)| **phase != Phase::Finished) {
            return Some(Refusal::OlderAttemptRuns(older.clone()));
        }
        if self.running() >= self.capacity as usize {
            return Some(Refusal::AtCapacity);
        }
        (self.claim_bytes + claim_bytes(key) > CLAIM_BYTES_MAX).then_some(Refusal::HeartbeatFull)
    }

    fn attempts_of<'a>(
        &'a self,
        execution: &'a ExecutionId,
    ) -> impl Iterator<Item = (&'a Key, &'a Phase)> + Clone {
        let first = Key::new(execution.clone(), 0);
        self.slots.range(first..).take_while(move |(key, _)| key.execution_id == *execution)
    }

    /// A terminate request came in, or the shell wants `key` ended. What is not here is remembered, so that a dispatch
    /// that was overtaken by its own termination starts nothing.
    pub fn terminate(&mut self, key: &Key, cause: StopCause) -> Termination {
        match self.slots.get_mut(key) {
            Some(Phase::Finished) => Termination::NotRunning,
            Some(phase @ (Phase::Running | Phase::Stopping(StopCause::Returned))) => {
                *phase = Phase::Stopping(cause);
                Termination::Stop
            }
            // Whoever asked first is told.
            Some(Phase::Stopping(_)) => Termination::Stop,
            None => {
                if !self.tombstones.contains_key(key) {
                    self.bury(key.clone(), Tombstone::Terminated);
                }
                Termination::NotRunning
            }
        }
    }

    /// Everything that runs and is not being stopped is handed back. Returns what that is.
    pub fn return_all(&mut self) -> Vec<Key> {
        let mut stopped = Vec::new();
        for (key, phase) in &mut self.slots {
            if *phase == Phase::Running {
                *phase = Phase::Stopping(StopCause::Returned);
                stopped.push(key.clone());
            }
        }
        stopped
    }

    /// The work is dead and ended like this. Returns the outcome to report, `None` if it was not running.
    ///
    /// Finished work is never thrown away: `completed` is reported whatever was asked of it meanwhile. A failure while it
    /// was being stopped is the stop.
    pub fn finish(&mut self, key: &Key, ending: Ending) -> Option<Outcome> {
        let phase = self.slots.get_mut(key)?;
        let outcome = match (*phase, ending) {
            (Phase::Finished, _) => return None,
            (_, Ending::Completed) => Outcome::Completed,
            (Phase::Stopping(cause), _) => cause.outcome(),
            (Phase::Running, Ending::Failed) => Outcome::Failed,
            (Phase::Running, Ending::Returned) => Outcome::Returned,
            // It says it was stopped and nobody stopped it.
            (Phase::Running, Ending::Stopped) => Outcome::Failed,
        };
        *phase = Phase::Finished;
        Some(outcome)
    }

    /// The stream acknowledged the final report: the claim ends. False if there was none to end.
    pub fn acknowledged(&mut self, key: &Key) -> bool {
        if self.slots.get(key) != Some(&Phase::Finished) {
            return false;
        }
        self.slots.remove(key);
        self.claim_bytes -= claim_bytes(key);
        self.bury(key.clone(), Tombstone::Ended);
        true
    }

    /// The shell lost it without an end (a fault that the simulator plays): not listed, not remembered.
    pub fn forget(&mut self, key: &Key) -> bool {
        let forgotten = self.slots.remove(key).is_some();
        if forgotten {
            self.claim_bytes -= claim_bytes(key);
        }
        forgotten
    }

    fn bury(&mut self, key: Key, stone: Tombstone) {
        if self.tombstones.insert(key.clone(), stone).is_none() {
            self.tombstone_order.push_back(key);
        }
        while self.tombstone_order.len() > TOMBSTONES_MAX {
            if let Some(oldest) = self.tombstone_order.pop_front() {
                self.tombstones.remove(&oldest);
            }
        }
    }

    /// Takes nothing more, from now on and for good. True the first time.
    pub fn close(&mut self) -> bool {
        !std::mem::replace(&mut self.closed, true)
    }

    /// What to say of oneself in the next heartbeat.
    #[must_use]
    pub fn state(&self) -> AgentState {
        if self.closed {
            AgentState::Draining
        } else if self.running() >= self.capacity as usize {
            AgentState::Busy
        } else {
            AgentState::Ready
        }
    }

    /// The sequence number of the next heartbeat.
    pub fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    /// The sequence number of the latest heartbeat, 0 before the first.
    #[must_use]
    pub const fn seq(&self) -> u64 {
        self.seq
    }

    /// Everything to list: accepted, running, and finished without an acknowledged report.
    pub fn claims(&self) -> impl Iterator<Item = &Key> {
        self.slots.keys()
    }

    /// Whether it is over and listed only because its report is not acknowledged.
    #[must_use]
    pub fn is_finished(&self, key: &Key) -> bool {
        self.slots.get(key) == Some(&Phase::Finished)
    }

    /// Executions that run or are being stopped.
    #[must_use]
    pub fn running(&self) -> usize {
        self.slots.values().filter(|phase| **phase != Phase::Finished).count()
    }

    /// Executions that finished and whose report is not acknowledged.
    #[must_use]
    pub fn unacked(&self) -> usize {
        self.slots.len() - self.running()
    }
}

fn claim_bytes(key: &Key) -> usize {
    key.execution_id.as_str().len() + CLAIM_OVERHEAD_BYTES
}

#[cfg(test)]
#[path = "state/tests.rs"]
mod tests;
