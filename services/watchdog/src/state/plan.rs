//! What is to be looked at when, what is being worked on, and what came of it.

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp, event::RecoveryReason, execution::Execution,
    wire::TerminateState,
};

use super::{Looks, TERMINATE_RETRY_MAX_MS, TERMINATE_RETRY_MIN_MS, Trouble, World};
use crate::{
    decide::{Judgement, Verdict},
    facts::{Asked, Facts},
    matrix::Row,
};

impl World {
    /// Judges an execution after something changed, and plans when to look again. Nothing is planned before the log
    /// was read to its end, and for one that somebody works on: it is settled when that work is done.
    pub fn settle(&mut self, id: &ExecutionId, now: Timestamp) {
        if !self.sight.caught_up() {
            return;
        }
        if let Some(trouble) = self.troubles.get_mut(id).filter(|t| t.in_flight) {
            trouble.changed = true;
            return;
        }
        let Some((judgement, _)) = self.judge(id, &Looks::default(), now) else {
            self.forget(id);
            return;
        };
        self.note(id, judgement.row, now);
        self.plan(id, judgement.verdict, now);
    }

    pub(super) fn plan(&mut self, id: &ExecutionId, verdict: Verdict, now: Timestamp) {
        let at = match verdict {
            Verdict::Leave => return self.due.remove(id),
            Verdict::WaitUntil(at) => at,
            Verdict::Postpone(at) => {
                self.postponed.insert(id.clone());
                at
            }
            Verdict::Look(_) | Verdict::Terminate(_) | Verdict::Recover(_) => now,
        };
        self.plan_at(id, at);
    }

    pub(super) fn plan_at(&mut self, id: &ExecutionId, at: Timestamp) {
        self.woken |= self.due.next().is_none_or(|next| at < next);
        self.due.set(id, at);
    }

    pub(super) fn note(&mut self, id: &ExecutionId, row: Row, now: Timestamp) {
        let Some(execution) = self.executions.get(id) else { return };
        let attempt = execution.attempt;
        if self.troubles.get(id).is_some_and(|t| t.attempt != attempt) {
            self.troubles.remove(id);
        }
        match self.troubles.get_mut(id) {
            Some(trouble) => {
                trouble.row = row;
                trouble.decided = None;
                // A turn that could not be taken when it came is over, or all that passed while we were blind, or
                // suspended, or their agents answered, would be recovered at once.
                let takes_turns =
                    matches!(row, Row::AgentLost | Row::AgentGone | Row::Stale | Row::RateLimited);
                if !takes_turns {
                    trouble.turn_at = None;
                }
            }
            None if is_plain(row) => return,
            None => {
                self.troubles.insert(id.clone(), Trouble::new(attempt, row, now));
            }
        }
        if is_plain(row) && self.troubles.get(id).is_some_and(|t| !t.in_flight) {
            self.troubles.remove(id);
        }
    }

    pub(super) fn forget(&mut self, id: &ExecutionId) {
        self.due.remove(id);
        self.troubles.remove(id);
        self.postponed.remove(id);
    }

    /// Takes the first due execution that needs work; the others that were due are planned anew. It stays taken
    /// until [`World::landed`]. Comes with the attempt that is to be worked on.
    pub fn take_due(&mut self, now: Timestamp) -> Option<(ExecutionId, u32)> {
        while let Some(id) = self.due.pop(now) {
            self.postponed.remove(&id);
            let Some((judgement, _)) = self.judge(&id, &Looks::default(), now) else { continue };
            self.note(&id, judgement.row, now);
            if !judgement.verdict.is_work() {
                self.plan(&id, judgement.verdict, now);
                continue;
            }
            if let Some(execution) = self.executions.get(&id) {
                let attempt = execution.attempt;
                let trouble = self
                    .troubles
                    .entry(id.clone())
                    .or_insert_with(|| Trouble::new(attempt, judgement.row, now));
                trouble.in_flight = true;
                trouble.changed = false;
                return Some((id, attempt));
            }
        }
        None
    }

    /// The work on an execution is over, with this judgement on everything that was looked up, and with that (`None`:
    /// it ended, or the work failed). `retry_at`: not again before.
    pub fn landed(
        &mut self,
        (id, attempt): (&ExecutionId, u32),
        judged: Option<(Judgement, Facts)>,
        retry_at: Option<Timestamp>,
        now: Timestamp,
    ) {
        let mut changed = true;
        // The next attempt's work is not ours to end.
        if let Some(trouble) = self.troubles.get_mut(id).filter(|t| t.attempt == attempt) {
            trouble.in_flight = false;
            changed = std::mem::take(&mut trouble.changed);
            // Its turn is over: those that failed together wait in line again.
            if retry_at.is_some() {
                trouble.turn_at = None;
            }
        }
        match judged.filter(|(j, _)| !changed && !j.verdict.is_work() && self.executions.contains_key(id)) {
            // Judged without what was looked up it would only be looked up again at once.
            Some((judgement, facts)) => {
                self.note(id, judgement.row, now);
                self.plan(id, judgement.verdict, now);
                if let Some(trouble) = self.troubles.get_mut(id) {
                    trouble.decided = Some((judgement, facts));
                }
            }
            None => self.settle(id, now),
        }
        if let Some(at) = retry_at
            && self.due.of(id).is_some_and(|planned| planned < at)
        {
            self.plan_at(id, at);
        }
    }

    /// Judges again all that waited for sight or trust in silence.
    pub fn settle_postponed(&mut self, now: Timestamp) {
        for id in std::mem::take(&mut self.postponed) {
            self.settle(&id, now);
        }
    }

    /// Everything is judged: for the first time, when the log was read to its end, or anew.
    pub fn settle_all(&mut self, now: Timestamp) {
        let ids: Vec<ExecutionId> = self.executions.keys().cloned().collect();
        for id in ids {
            self.settle(&id, now);
        }
    }

    pub(super) fn settle_held(&mut self, agent: &AgentId, now: Timestamp) {
        let held: Vec<ExecutionId> =
            self.agents.get(agent).map(|e| e.held.iter().cloned().collect()).unwrap_or_default();
        for id in held {
            self.settle(&id, now);
        }
    }

    /// Notes what an agent answered to a request to end an execution for that reason. `None`: nothing that makes sense.
    pub fn note_asked(
        &mut self,
        id: &ExecutionId,
        reason: RecoveryReason,
        answer: Option<TerminateState>,
        now: Timestamp,
    ) {
        let Some(trouble) = self.troubles.get_mut(id) else { return };
        trouble.asked_for = Some(reason);
        let pause = TERMINATE_RETRY_MIN_MS.saturating_mul(1 << trouble.asked_times.min(16));
        trouble.asked_times = trouble.asked_times.saturating_add(1);
        let next_at = now.plus_ms(pause.min(TERMINATE_RETRY_MAX_MS));
        trouble.asked = match answer {
            Some(TerminateState::Terminated) => Asked::Confirmed,
            Some(TerminateState::NotRunning) => match trouble.asked {
                Asked::NotRunning { since, .. } => Asked::NotRunning { since, next_at },
                _ => Asked::NotRunning { since: now, next_at },
            },
            Some(TerminateState::StillRunning) | None => Asked::Unconfirmed { next_at },
        };
    }

    /// Notes that an instance answered without the execution; returns how many such answers there were in a row. Two
    /// within half of [`crate::facts::Channel::word_ms`] are one.
    pub fn note_empty_answer(&mut self, id: &ExecutionId, word_ms: u64, now: Timestamp) -> u32 {
        let Some(trouble) = self.troubles.get_mut(id) else { return 1 };
        let (times, last) = trouble.empty_answers.unwrap_or((0, Timestamp::default()));
        if times == 0 || now.since_ms(last) >= word_ms / 2 {
            trouble.empty_answers = Some((times.saturating_add(1), now));
            return times.saturating_add(1);
        }
        times
    }

    /// Notes that an instance listed the execution when asked.
    pub fn note_full_answer(&mut self, id: &ExecutionId, now: Timestamp) {
        if let Some(trouble) = self.troubles.get_mut(id) {
            trouble.empty_answers = None;
            trouble.vouched_at = Some(now);
        }
    }

    /// Executions that were dispatched within the grace, have not ended, and are asked for.
    pub fn count_in_grace(&self, now: Timestamp, wanted: impl Fn(&ExecutionId) -> bool) -> usize {
        let grace = self.config.limits.dispatch_grace_ms;
        let held = |at, id: &ExecutionId| {
            self.executions.get(id).and_then(Execution::holder).is_some_and(|held| held.dispatched_at == at)
        };
        let in_grace = self.in_grace.iter().filter(|(at, _)| at.plus_ms(grace) > now);
        in_grace.filter(|(at, id)| held(*at, id) && wanted(id)).count()
    }

    /// Takes instances whose claims are to be looked into, so many at the most; the others stay due. One that is looked into
    /// just now is not taken again before that is done.
    pub fn take_zombies(&mut self, most: usize) -> Vec<(AgentId, InstanceId)> {
        let due = self.zombies_due.difference(&self.zombies_under_way).take(most);
        let taken: Vec<_> = due.cloned().collect();
        for instance in &taken {
            self.zombies_due.remove(instance);
            self.zombies_under_way.insert(instance.clone());
        }
        taken
    }

    /// Its claims were looked into.
    pub fn zombies_done(&mut self, instance: &(AgentId, InstanceId)) {
        self.zombies_under_way.remove(instance);
    }

    /// Forgets those whose grace is over.
    pub fn drop_past_grace(&mut self, now: Timestamp) {
        let grace = self.config.limits.dispatch_grace_ms;
        while self.in_grace.front().is_some_and(|(at, _)| at.plus_ms(grace) <= now) {
            self.in_grace.pop_front();
        }
    }
}

const fn is_plain(row: Row) -> bool {
    matches!(row, Row::Healthy | Row::InGrace | Row::Unheard | Row::Ended | Row::QueueExpired | Row::Queued)
}
