//! What really ran: every attempt once, and nowhere more at a time than there is room for. The agents' own truth, in which
//! half of them take whatever they are asked to.

use std::collections::{BTreeMap, BTreeSet};

use rollcall_core::{
    ExecutionId, InstanceId,
    event::{ExecutionEvent, RecoveryReason, TerminateOutcome},
};

use super::{
    Verdict, broken,
    grants::{Capacities, LOWERED_MS, stood_still},
};
use crate::{
    dispatcher::ANSWER_TIMEOUT_MS,
    log::{Entry, Log},
    stage::Stage,
    truth::{End, Run},
};

/// Invariant 1: no attempt runs at two places, at once or one after the other, nor twice at one.
pub(super) fn once(stage: &Stage) -> Verdict {
    let (log, truth) = (stage.log.borrow(), stage.truth.borrow());
    let mut entries = log.entries().iter().peekable();
    let mut word = Word::default();
    let outlived = Outlived::of(&log);
    let mut ran: BTreeMap<(&ExecutionId, u32), &Run> = BTreeMap::new();
    for run in &truth.runs {
        while let Some(entry) = entries.next_if(|entry| entry.landed_at <= run.began_at) {
            word.enter(entry);
        }
        let Some(before) = ran.insert((&run.execution, run.attempt), run) else { continue };
        // Its instance lost it, which no agent should, and begins it anew when a question comes that was late. Or it did so before
        // anybody heard that it had begun: all that it said was that it had not. It is over by then.
        let forgotten = matches!(before.ended, Some((_, End::Forgotten)));
        let unknown = before.instance == run.instance || !word.started(before);
        if !(forgotten && unknown || outlived.began(before) || outlived.began(run)) {
            let (id, attempt) = (&run.execution, run.attempt);
            return Err(broken(1, format!("{id}:{attempt} ran twice: {before:?}, {run:?}")));
        }
    }
    Ok(())
}

/// Questions that were under way for longer than anybody waits for their answer, and came after their own instance had refused
/// when it was asked again: by the log it never had what they begin, which is a zombie.
pub(super) struct Outlived {
    /// Which dispatches were refused, and when that was written down.
    refused: Vec<(u64, InstanceId, ExecutionId, u32)>,
}

impl Outlived {
    pub(super) fn of(log: &Log) -> Self {
        let mut given: BTreeMap<(ExecutionId, u32), InstanceId> = BTreeMap::new();
        let mut refused = Vec::new();
        for entry in log.entries() {
            match entry.execution() {
                Some(ExecutionEvent::Dispatched(held)) => {
                    given.insert((held.execution_id.clone(), held.attempt), held.instance_id.clone());
                }
                Some(ExecutionEvent::Queued(back)) => {
                    let (id, attempt) = (back.execution_id.clone(), back.attempt);
                    // Without a slot it was not asked at all.
                    let unasked = matches!(back.reason.as_deref(), Some("slot_lost" | "crowded"));
                    if let Some(instance) = given.remove(&(id.clone(), attempt)).filter(|_| !unasked) {
                        refused.push((entry.landed_at, instance, id, attempt));
                    }
                }
                _ => {}
            }
        }
        Self { refused }
    }

    /// Whether such a question began this.
    pub(super) fn began(&self, run: &Run) -> bool {
        let is_it = |(at, instance, id, attempt): &(u64, InstanceId, ExecutionId, u32)| {
            *at > run.asked_at && (instance, id, *attempt) == (&run.instance, &run.execution, run.attempt)
        };
        run.began_at - run.asked_at > ANSWER_TIMEOUT_MS && self.refused.iter().any(is_it)
    }
}

/// Invariant 1: nothing begins on an instance on which as much runs as it can hold.
pub(super) fn room(stage: &Stage) -> Verdict {
    let (log, truth) = (stage.log.borrow(), stage.truth.borrow());
    let mut entries = log.entries().iter().peekable();
    let mut capacities = Capacities::default();
    let mut word = Word::default();
    for (at, run) in truth.runs.iter().enumerate() {
        while let Some(entry) = entries.next_if(|entry| entry.landed_at <= run.began_at) {
            capacities.enter(entry);
            word.enter(entry);
        }
        // The question was under way for so long that its attempt has been given up meanwhile.
        if word.gave_up(run) || truth.overlooks(&run.execution, run.attempt, run.began_at) {
            continue;
        }
        let beside = truth.runs[..at].iter().filter(|other| {
            other.instance == run.instance
                && other.ended.is_none_or(|(ended, _)| ended > run.began_at)
                && !word.gave_up(other)
                && !truth.overlooks(&other.execution, other.attempt, run.began_at)
                && !word.lost(other, &truth.moved_back, run.began_at)
        });
        let beside: Vec<String> = beside.map(|run| format!("{}:{}", run.execution, run.attempt)).collect();
        // It has its slot since it was dispatched, and keeps it when its agent can hold less.
        let since = word.dispatched(run).unwrap_or(run.asked_at);
        let known_late = LOWERED_MS + stood_still(stage, since, LOWERED_MS);
        let capacity = capacities.at_most(&run.agent, since.saturating_sub(known_late));
        if beside.len() >= capacity {
            let (instance, id, attempt) = (&run.instance, &run.execution, run.attempt);
            let what = format!("{instance} begins {id}:{attempt} beside {beside:?}, of {capacity}");
            return Err(broken(1, format!("at {} ms {what}", run.began_at)));
        }
    }
    Ok(())
}

/// Invariant 1: what went back to its queue because its slot was gone had never been put to its agent.
pub(super) fn unasked(stage: &Stage) -> Verdict {
    let (log, truth) = (stage.log.borrow(), stage.truth.borrow());
    let mut word = Word::default();
    for entry in log.entries() {
        if let Some(ExecutionEvent::Queued(back)) = entry.execution()
            && matches!(back.reason.as_deref(), Some("slot_lost" | "crowded"))
        {
            let (id, attempt) = (&back.execution_id, back.attempt);
            let found = truth.runs.iter().find(|run| {
                run.execution == *id && run.attempt == attempt && run.began_at <= entry.landed_at
            });
            if let Some(run) = found {
                let what = format!("{id}:{attempt} went back ({:?}) and had begun: {run:?}", back.reason);
                return Err(broken(1, what));
            }
        }
        word.enter(entry);
    }
    Ok(())
}

/// What the log says of attempts.
#[derive(Default)]
struct Word {
    dispatched: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    started: BTreeSet<(ExecutionId, u32)>,
    given_up: BTreeSet<(ExecutionId, u32)>,
}

impl Word {
    fn enter(&mut self, entry: &Entry) {
        match entry.execution() {
            Some(ExecutionEvent::Dispatched(held)) => {
                let key = (held.instance_id.clone(), held.execution_id.clone(), held.attempt);
                self.dispatched.insert(key, entry.landed_at);
            }
            Some(ExecutionEvent::Started(held)) => {
                self.started.insert((held.execution_id.clone(), held.attempt));
            }
            // Its end was asked for and not confirmed, or there was nobody to ask: what the agent does all the same is
            // bounded by nobody, and its slot is not kept for ever (invariant 8).
            Some(ExecutionEvent::Recovered(lost))
                if matches!(lost.terminate, TerminateOutcome::Failed | TerminateOutcome::NotAttempted) =>
            {
                self.given_up.insert((lost.execution_id.clone(), lost.attempt));
            }
            // So it is when the loss ended what was being cancelled.
            Some(ExecutionEvent::Cancelled(end)) if is_loss(&end.confirmed_by) => {
                self.given_up.insert((end.execution_id.clone(), end.attempt));
            }
            _ => {}
        }
    }

    fn started(&self, run: &Run) -> bool {
        self.started.contains(&(run.execution.clone(), run.attempt))
    }

    fn dispatched(&self, run: &Run) -> Option<u64> {
        self.dispatched.get(&(run.instance.clone(), run.execution.clone(), run.attempt)).copied()
    }

    /// That capacity went back behind a dispatch is known to nobody but its dispatcher until its agent has accepted.
    fn lost(&self, run: &Run, moved_back: &[u64], at: u64) -> bool {
        let Some(since) = self.dispatched(run) else { return false };
        !self.started(run) && moved_back.iter().any(|back| (since..=at).contains(back))
    }

    fn gave_up(&self, run: &Run) -> bool {
        self.given_up.contains(&(run.execution.clone(), run.attempt))
    }
}

fn is_loss(confirmed_by: &str) -> bool {
    RecoveryReason::ALL.iter().any(|reason| reason.as_str() == confirmed_by)
}
