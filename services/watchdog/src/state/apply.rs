//! Folding the log.

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp,
    agent::Parting,
    event::{
        AgentEvent, DecodeError, Event, EventBody, ExecutionEvent, Recovered, RecoveryReason,
        SystemEventKind, TerminateOutcome,
    },
    execution::{Attempt, Execution, State},
    subject::{EventSubject, Subjects},
    wire::Outcome,
};

use super::{AgentEntry, World};

/// The rate limit is of recoveries a second.
const RATE_WINDOW_MS: u64 = 1_000;

/// An entry of the log that is no valid event for its subject. It is skipped; its sequence counts.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// Not an event.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// On a subject where no event belongs.
    #[error("no subject of the log")]
    Subject,
    /// About something else than its subject says.
    #[error("its content is not about its subject")]
    Mismatch,
    /// It cannot follow what is in the log already.
    #[error("{0}")]
    Misfit(String),
}

/// What an entry changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    /// An execution.
    Execution(ExecutionId),
    /// An agent.
    Agent(AgentId),
    /// The state of recovery itself.
    System,
}

/// What a dispatch gave out: whose slot, for which attempt, when, and whether it was accepted. The same attempt may be dispatched
/// again, and lists from before it was accepted are no lists without it.
type Slot = (AgentId, u32, Timestamp, bool);

fn slot(attempt: &Attempt) -> Slot {
    (attempt.agent_id.clone(), attempt.number, attempt.dispatched_at, attempt.started_at.is_some())
}

/// Whether a recovery was one for silence, by what the log says of it: those go through the rate limit.
fn took_a_turn(lost: &Recovered) -> bool {
    match lost.reason {
        RecoveryReason::AgentLost => true,
        RecoveryReason::Stale => lost.terminate == TerminateOutcome::NotAttempted,
        RecoveryReason::AgentGone => lost.evidence["instance"]["by"] == Parting::Forgotten.as_str(),
        RecoveryReason::Orphaned
        | RecoveryReason::TimedOut
        | RecoveryReason::Stalled
        | RecoveryReason::AgentRestarted
        | RecoveryReason::DispatchLost => false,
    }
}

impl World {
    /// Folds one entry of the log in. An entry that was applied already changes nothing.
    ///
    /// # Errors
    /// The entry is no valid event for its subject: it was skipped and counted.
    pub fn apply(
        &mut self,
        subjects: &Subjects,
        subject: &str,
        seq: u64,
        bytes: &[u8],
        now: Timestamp,
    ) -> Result<Applied, Invalid> {
        let about = subjects.of_event(subject);
        let result = match &about {
            None => Err(Invalid::Subject),
            Some(about) => self.apply_to(about, seq, bytes, now),
        };
        if result.is_err() {
            self.counters.invalid += 1;
            self.skip(about.as_ref(), seq);
        }
        result
    }

    fn apply_to(
        &mut self,
        about: &EventSubject,
        seq: u64,
        bytes: &[u8],
        now: Timestamp,
    ) -> Result<Applied, Invalid> {
        let event = Event::decode(bytes)?;
        match (about, &event.body) {
            (EventSubject::Execution(id), EventBody::Execution(body)) => {
                if event.subject != id.as_str() || body.execution_id() != id {
                    return Err(Invalid::Mismatch);
                }
                self.apply_execution(id, seq, body, event.time, now)?;
                match body {
                    ExecutionEvent::Completed(done) if done.late => {
                        self.hear_again(id, done.attempt, "completed")
                    }
                    ExecutionEvent::LateResult(late) if late.outcome == Outcome::Completed => {
                        self.hear_again(id, late.attempt, "completed");
                    }
                    _ => {}
                }
                Ok(Applied::Execution(id.clone()))
            }
            (EventSubject::Agent(id), EventBody::Agent(body)) => {
                if event.subject != id.as_str() || body.agent_id() != id {
                    return Err(Invalid::Mismatch);
                }
                self.apply_agent(id, seq, body, event.time, now);
                Ok(Applied::Agent(id.clone()))
            }
            (EventSubject::System(name), EventBody::System(body)) => {
                if name == crate::SERVICE && seq > self.system_seq {
                    self.system_seq = seq;
                    self.apply_system(body.kind, event.time, now);
                }
                Ok(Applied::System)
            }
            _ => Err(Invalid::Mismatch),
        }
    }

    /// What was skipped still is the subject's last entry, which the next append has to name.
    fn skip(&mut self, about: Option<&EventSubject>, seq: u64) {
        match about {
            Some(EventSubject::Execution(id)) => {
                if let Some(execution) = self.executions.get_mut(id) {
                    execution.seq = execution.seq.max(seq);
                }
            }
            Some(EventSubject::Agent(id)) => {
                if let Some(entry) = self.agents.get_mut(id) {
                    entry.agent.seq = entry.agent.seq.max(seq);
                }
            }
            Some(EventSubject::System(name)) if name == crate::SERVICE => {
                self.system_seq = self.system_seq.max(seq);
            }
            Some(EventSubject::System(_)) | None => {}
        }
    }

    fn apply_execution(
        &mut self,
        id: &ExecutionId,
        seq: u64,
        event: &ExecutionEvent,
        time: Timestamp,
        now: Timestamp,
    ) -> Result<(), Invalid> {
        let Some(execution) = self.executions.get_mut(id) else {
            return self.apply_unknown(id, seq, event, time);
        };
        if seq <= execution.seq {
            return Ok(());
        }
        if let ExecutionEvent::Recovered(lost) = event
            && took_a_turn(lost)
            && now.since_ms(time) < RATE_WINDOW_MS
        {
            self.yield_turn(id, now);
        }
        let Some(execution) = self.executions.get_mut(id) else { return Ok(()) };
        let before = execution.holder().map(slot);
        let result = execution.evolve(seq, event, time).map_err(|misfit| Invalid::Misfit(misfit.to_string()));
        self.index(id, before, now);
        result
    }

    fn apply_unknown(
        &mut self,
        id: &ExecutionId,
        seq: u64,
        event: &ExecutionEvent,
        time: Timestamp,
    ) -> Result<(), Invalid> {
        if let Some(note) = self.ended.get_mut(id) {
            if seq <= note.seq {
                return Ok(());
            }
            note.seq = seq;
            if matches!(event, ExecutionEvent::Completed(_)) {
                note.state = State::Completed;
            }
        }
        match event {
            ExecutionEvent::Submitted(request) if self.ended.get(id).is_none() => {
                self.executions.insert(id.clone(), Execution::submitted(request.clone(), seq, time));
            }
            // Started again, or its beginning is not in memory: its history says what it is now.
            ExecutionEvent::LateResult(_) | ExecutionEvent::Completed(_) => {}
            _ => self.histories_due.push(id.clone()),
        }
        Ok(())
    }

    /// Takes over an execution that was folded from its whole history.
    pub fn adopt(&mut self, execution: Execution, now: Timestamp) {
        let id = execution.id().clone();
        if self.executions.get(&id).is_some_and(|known| known.seq >= execution.seq) {
            return;
        }
        let before = self.executions.get(&id).and_then(Execution::holder);
        let before = before.map(slot);
        self.ended.remove(&id);
        self.executions.insert(id.clone(), execution);
        self.index(&id, before, now);
    }

    /// Brings everything that is kept beside the execution in line with it.
    fn index(&mut self, id: &ExecutionId, before: Option<Slot>, now: Timestamp) {
        let Some(execution) = self.executions.get(id) else { return };
        let after = execution.holder().map(slot);
        let holder = execution.holder().map(|a| a.instance_id.clone());
        let ended = execution.state.is_terminal();
        if before != after {
            if let Some((agent, ..)) = &before {
                self.release(agent, id, now);
            }
            if let (Some((agent, number, at, _)), Some(instance)) = (&after, holder) {
                let is_new = before.as_ref().is_none_or(|(_, n, t, _)| (n, t) != (number, at));
                // The log is full of dispatches whose grace was over long ago.
                if is_new && at.plus_ms(self.config.limits.dispatch_grace_ms) > now {
                    self.in_grace.push_back((*at, id.clone()));
                }
                self.hold(agent, instance, id);
            }
        }
        if ended {
            if let Some(execution) = self.executions.remove(id) {
                self.ended.insert(&execution);
            }
            self.forget(id);
        } else {
            self.settle(id, now);
        }
    }

    fn release(&mut self, agent: &AgentId, id: &ExecutionId, now: Timestamp) {
        let Some(entry) = self.agents.get_mut(agent) else { return };
        entry.held.remove(id);
        entry.claims.iter_mut().for_each(|claims| claims.release(id));
        if entry.held.is_empty() && entry.agent.operator_drain.is_some() {
            self.breaker.agent(&entry.agent, false, now);
            self.breaker_dirty = true;
        }
    }

    fn hold(&mut self, agent: &AgentId, instance: InstanceId, id: &ExecutionId) {
        let entry = self.agents.entry(agent.clone()).or_insert_with(|| AgentEntry::new(agent.clone()));
        entry.held.insert(id.clone());
        let at = entry.place_of(&instance);
        let Some(claims) = entry.claims.get_mut(at) else { return };
        claims.expect_anew();
        if !std::mem::replace(&mut claims.greeted, true) {
            self.greetings_due.push_back((agent.clone(), instance));
            self.woken = true;
        }
    }

    fn apply_agent(&mut self, id: &AgentId, seq: u64, event: &AgentEvent, time: Timestamp, now: Timestamp) {
        let entry = self.agents.entry(id.clone()).or_insert_with(|| AgentEntry::new(id.clone()));
        if seq <= entry.agent.seq {
            return;
        }
        if let AgentEvent::Registered(profile) = event {
            entry.keep_interval(&profile.instance_id, self.config.limits.interval_ms);
        }
        entry.agent.evolve(seq, event, time);
        self.breaker.agent(&entry.agent, !entry.held.is_empty(), time);
        self.breaker_dirty = true;
        self.settle_held(id, now);
    }

    fn apply_system(&mut self, kind: SystemEventKind, time: Timestamp, now: Timestamp) {
        match kind {
            SystemEventKind::RecoverySuspended => {
                self.log_suspended = true;
                self.suspended_at = Some(time);
                self.woken = true;
            }
            SystemEventKind::RecoveryResumed => {
                self.log_suspended = false;
                self.suspended_at = None;
                self.resume(now);
            }
            _ => {}
        }
    }
}
