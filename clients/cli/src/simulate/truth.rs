//! What really happened, against what the log says happened. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use rollcall_agent::state::Key;
use rollcall_core::{
    Timestamp,
    event::{ExecutionEvent, RecoveryAction, RecoveryReason},
    ids::{AgentId, ExecutionId, InstanceId},
};

use super::kind::Kind;

/// Deviations that are kept with their words; more are only counted.
const DEVIATIONS_MAX: usize = 100;
/// How much earlier than it became true a recovery may be: clocks are read in two processes.
const EARLY_TOLERANCE_MS: u64 = 100;

/// Something that must be noticed: what, and since when it is so.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fate {
    kind: Kind,
    expected: RecoveryReason,
    since: Timestamp,
    noticed: bool,
}

/// One attempt, as its agent knows it.
#[derive(Debug, Clone)]
struct Attempt {
    agent: AgentId,
    alive: bool,
    fate: Option<Fate>,
}

/// One execution, as it was meant and as the log tells it.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    pub(crate) kind: Kind,
    pub(crate) duration_ms: u64,
    pub(crate) stall_timeout_ms: Option<u64>,
    attempts: BTreeMap<u32, Attempt>,
    recovered: HashSet<u32>,
    /// Instance that each attempt was dispatched to, by the log.
    dispatched: BTreeMap<u32, InstanceId>,
    completions: u32,
    ended: Option<&'static str>,
}

/// Why a run differs from what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Deviation {
    /// A fault that nobody noticed.
    Missed,
    /// Noticed, for a reason that it was not.
    WrongReason,
    /// Nothing was wrong with it.
    WronglyRecovered,
    /// Recovered or completed twice, or run twice at the same time.
    Doubled,
    /// Ended as it should not.
    WrongEnd,
    /// Accepted, and never ended.
    Stuck,
}

impl Deviation {
    pub(crate) const ALL: [Self; 6] =
        [Self::Missed, Self::WrongReason, Self::WronglyRecovered, Self::Doubled, Self::WrongEnd, Self::Stuck];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Missed => "missed",
            Self::WrongReason => "wrong_reason",
            Self::WronglyRecovered => "wrongly_recovered",
            Self::Doubled => "doubled",
            Self::WrongEnd => "wrong_end",
            Self::Stuck => "stuck",
        }
    }
}

/// What became of one kind of fault.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    pub(crate) played: u64,
    pub(crate) injected: u64,
    pub(crate) recovered: u64,
    /// From the moment it was so to the recovery, by the simulator's reckoning, in milliseconds.
    pub(crate) noticed_ms: Vec<u64>,
    /// The services' own `detected_after_ms`.
    pub(crate) detected_ms: Vec<u64>,
}

/// All that is known of a run.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    works: HashMap<ExecutionId, Work>,
    /// Instances that went through a fault: what was being dispatched to them may be lost with them.
    struck: HashSet<InstanceId>,
    pub(crate) tallies: BTreeMap<Kind, Tally>,
    pub(crate) counts: BTreeMap<Deviation, u64>,
    pub(crate) words: Vec<String>,
    /// Fates not noticed yet, for each agent.
    open_fates: HashMap<AgentId, usize>,
    open_works: usize,
    /// Recovered while being dispatched to an instance that fell over: no fault of anybody.
    pub(crate) lost_in_dispatch: u64,
    pub(crate) completed: u64,
    pub(crate) late_completions: u64,
}

impl Truth {
    /// An execution is about to be handed in.
    pub(crate) fn submitted(
        &mut self,
        id: ExecutionId,
        kind: Kind,
        duration_ms: u64,
        stall_timeout_ms: Option<u64>,
    ) {
        self.tallies.entry(kind).or_default().played += 1;
        self.open_works += 1;
        self.works.insert(
            id,
            Work {
                kind,
                duration_ms,
                stall_timeout_ms,
                attempts: BTreeMap::new(),
                recovered: HashSet::new(),
                dispatched: BTreeMap::new(),
                completions: 0,
                ended: None,
            },
        );
    }

    /// It was refused after all.
    pub(crate) fn withdrawn(&mut self, id: &ExecutionId) {
        if let Some(work) = self.works.remove(id) {
            self.open_works -= usize::from(work.ended.is_none());
            self.tallies.entry(work.kind).or_default().played -= 1;
        }
    }

    /// What an execution is meant to do.
    pub(crate) fn work(&self, id: &ExecutionId) -> Option<&Work> {
        self.works.get(id)
    }

    /// An agent accepted an attempt: it is alive from now on.
    pub(crate) fn accepted(&mut self, key: &Key, agent: &AgentId) {
        let Some(work) = self.works.get_mut(&key.execution_id) else { return };
        let twice = work.attempts.values().any(|attempt| attempt.alive);
        work.attempts.insert(key.attempt, Attempt { agent: agent.clone(), alive: true, fate: None });
        if twice {
            self.deviates(
                Deviation::Doubled,
                format!("{key} started on {agent} while an earlier attempt was alive"),
            );
        }
    }

    /// An attempt does not run any more (done, dead, or its process is gone).
    pub(crate) fn dead(&mut self, key: &Key) {
        if let Some(attempt) = self.attempt(key) {
            attempt.alive = false;
        }
    }

    /// A fault strikes an attempt; it is so since `since`.
    pub(crate) fn struck(&mut self, key: &Key, kind: Kind, since: Timestamp) {
        let Some(expected) = kind.expected() else { return };
        let Some(attempt) = self.attempt(key) else { return };
        if attempt.fate.is_some() {
            return;
        }
        attempt.fate = Some(Fate { kind, expected, since, noticed: false });
        let agent = attempt.agent.clone();
        *self.open_fates.entry(agent).or_default() += 1;
        self.tallies.entry(kind).or_default().injected += 1;
    }

    /// An instance falls over.
    pub(crate) fn instance_struck(&mut self, instance: InstanceId) {
        self.struck.insert(instance);
    }

    /// Whether everything that struck this agent was noticed.
    pub(crate) fn is_noticed(&self, agent: &AgentId) -> bool {
        self.open_fates.get(agent).is_none_or(|open| *open == 0)
    }

    fn attempt(&mut self, key: &Key) -> Option<&mut Attempt> {
        self.works.get_mut(&key.execution_id)?.attempts.get_mut(&key.attempt)
    }

    fn deviates(&mut self, deviation: Deviation, words: String) {
        *self.counts.entry(deviation).or_default() += 1;
        if self.words.len() < DEVIATIONS_MAX {
            self.words.push(format!("{}: {words}", deviation.as_str()));
        }
    }

    /// The log tells something. Events of others' executions are ignored.
    pub(crate) fn told(&mut self, event: &ExecutionEvent, time: Timestamp) {
        let id = event.execution_id();
        let Some(work) = self.works.get_mut(id) else { return };
        match event {
            ExecutionEvent::Dispatched(event) => {
                work.dispatched.insert(event.attempt, event.instance_id.clone());
            }
            ExecutionEvent::Recovered(event) => {
                let key = Key::new(id.clone(), event.attempt);
                self.recovered(&key, event.reason, event.action, event.detected_after_ms, time);
            }
            ExecutionEvent::Completed(event) => {
                work.completions += 1;
                let twice = work.completions > 1;
                self.completed += 1;
                self.late_completions += u64::from(event.late);
                let key = Key::new(id.clone(), event.attempt);
                if twice {
                    self.deviates(Deviation::Doubled, format!("{key} completed twice"));
                }
                // Finished work that was reported before the verdict: the fault resolved itself.
                self.resolved(&key);
                self.end(&key, "completed");
            }
            ExecutionEvent::Failed(event) => {
                let key = Key::new(id.clone(), event.attempt);
                let words = format!("{key} failed: {}: {}", event.error.code, event.error.message);
                self.deviates(Deviation::WrongEnd, words);
                self.end(&key, "failed");
            }
            ExecutionEvent::Cancelled(event) => {
                let key = Key::new(id.clone(), event.attempt);
                self.deviates(Deviation::WrongEnd, format!("{key} was cancelled by nobody"));
                self.end(&key, "cancelled");
            }
            ExecutionEvent::Expired(event) => {
                let key = Key::new(id.clone(), event.attempt);
                self.deviates(Deviation::WrongEnd, format!("{key} expired in the queue"));
                self.end(&key, "expired");
            }
            ExecutionEvent::Submitted(_)
            | ExecutionEvent::Queued(_)
            | ExecutionEvent::Started(_)
            | ExecutionEvent::CancelRequested(_)
            | ExecutionEvent::Retried(_)
            | ExecutionEvent::LateResult(_) => {}
        }
    }

    fn end(&mut self, key: &Key, how: &'static str) {
        if let Some(work) = self.works.get_mut(&key.execution_id)
            && work.ended.replace(how).is_none()
        {
            self.open_works -= 1;
        }
    }

    /// Takes the fate of an attempt as noticed; `None` if it has none, or was noticed before.
    fn notice(&mut self, key: &Key) -> Option<Fate> {
        let attempt = self.attempt(key)?;
        let fate = attempt.fate.as_mut().filter(|fate| !fate.noticed)?;
        fate.noticed = true;
        let (fate, agent) = (fate.clone(), attempt.agent.clone());
        if let Some(open) = self.open_fates.get_mut(&agent) {
            *open = open.saturating_sub(1);
        }
        Some(fate)
    }

    fn resolved(&mut self, key: &Key) {
        if let Some(fate) = self.notice(key) {
            self.tallies.entry(fate.kind).or_default().injected -= 1;
        }
    }

    fn recovered(
        &mut self,
        key: &Key,
        reason: RecoveryReason,
        action: RecoveryAction,
        detected_ms: u64,
        time: Timestamp,
    ) {
        let Some(work) = self.works.get_mut(&key.execution_id) else { return };
        if !work.recovered.insert(key.attempt) {
            self.deviates(Deviation::Doubled, format!("{key} recovered twice, now as {}", reason.as_str()));
            return;
        }
        let accepted = work.attempts.contains_key(&key.attempt);
        let on_struck =
            work.dispatched.get(&key.attempt).is_some_and(|instance| self.struck.contains(instance));
        match self.notice(key) {
            Some(fate) => {
                let tally = self.tallies.entry(fate.kind).or_default();
                tally.recovered += 1;
                tally.noticed_ms.push(time.since_ms(fate.since));
                tally.detected_ms.push(detected_ms);
                if fate.since.since_ms(time) > EARLY_TOLERANCE_MS {
                    let words =
                        format!("{key} ({}) recovered {} ms too early", fate.kind, fate.since.since_ms(time));
                    self.deviates(Deviation::WronglyRecovered, words);
                } else if fate.expected != reason {
                    let words = format!(
                        "{key} ({}) recovered as {}, not {}",
                        fate.kind,
                        reason.as_str(),
                        fate.expected.as_str()
                    );
                    self.deviates(Deviation::WrongReason, words);
                }
            }
            // Nobody can know better: it was on its way to somebody who was not there any more.
            None if !accepted && on_struck => self.lost_in_dispatch += 1,
            None => {
                self.deviates(
                    Deviation::WronglyRecovered,
                    format!("{key} recovered as {} while all was well", reason.as_str()),
                );
            }
        }
        if action != RecoveryAction::Requeued {
            self.end(key, "recovered");
        }
    }

    /// Executions that have not ended, and faults that nobody noticed.
    pub(crate) fn open(&self) -> (usize, usize) {
        (self.open_works, self.open_fates.values().sum())
    }

    /// Faults so far, and how many of them were noticed.
    pub(crate) fn progress(&self) -> (u64, u64) {
        self.tallies.values().fold((0, 0), |(injected, recovered), tally| {
            (injected + tally.injected, recovered + tally.recovered)
        })
    }

    /// The run is over: what is open now stays open.
    pub(crate) fn close(&mut self) {
        let mut found = Vec::new();
        for (id, work) in &self.works {
            for (number, attempt) in &work.attempts {
                if let Some(fate) = attempt.fate.as_ref().filter(|fate| !fate.noticed) {
                    found.push((
                        Deviation::Missed,
                        format!("{id}:{number} ({}) on {}", fate.kind, attempt.agent),
                    ));
                }
            }
            if work.ended.is_none() {
                let attempts: Vec<_> = work.attempts.keys().collect();
                found.push((
                    Deviation::Stuck,
                    format!("{id} ({}) after the attempts {attempts:?}", work.kind),
                ));
            }
        }
        found.sort();
        for (deviation, words) in found {
            self.deviates(deviation, words);
        }
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self, id: &ExecutionId) -> bool {
        self.works.get(id).is_none_or(|work| work.ended.is_some())
    }

    /// Whether the run was as it should be.
    pub(crate) fn is_as_it_should_be(&self) -> bool {
        self.counts.values().all(|count| *count == 0)
    }
}

#[cfg(test)]
#[path = "truth/tests.rs"]
mod tests;
