//! One step at a time: what is to be appended about an agent, and what follows when it is in the log.

use rollcall_core::Timestamp;
use rollcall_core::agent::Status;
use rollcall_core::event::{AgentEvent, Profile, StatusChanged};
use rollcall_core::time::Clock;
use rollcall_core::wire::{ApiError, Goodbye};
use rollcall_core::{AgentId, InstanceId};

use super::{Input, Shell};
use crate::decide::{Next, next};
use crate::detector::Grade;
use crate::effect::Appended;
use crate::state::Index;
use crate::view::AgentView;

/// Appends in flight at once. Each agent has at most one.
const APPENDS_MAX: usize = 256;
/// Goodbyes in flight at once; more are left out, the next heartbeat brings them up again.
const GOODBYES_MAX: usize = 64;
/// First pause after the log did not take an event; doubles up to [`RETRY_MAX_MS`].
const RETRY_MIN_MS: u64 = 250;
/// Longest pause.
const RETRY_MAX_MS: u64 = 8000;

/// An event on its way into the log.
#[derive(Debug)]
pub(crate) struct Step {
    event: AgentEvent,
    time: Timestamp,
}

impl Shell {
    /// Decides about an agent until there is nothing to decide or a step is on its way.
    pub(super) fn reconcile(&mut self, index: Index) {
        if !self.ready {
            return;
        }
        loop {
            let now = self.clock.now();
            let Some(entry) = self.fleet.get_mut(index) else { return };
            if entry.work.busy || entry.work.queued || entry.work.retry_at.is_some_and(|at| now < at) {
                return;
            }
            let wish = self.cold.get(&index).and_then(|cold| cold.wishes.front()).map(|(wish, _)| wish);
            match next(&entry.known, &entry.live, wish, &self.policy, now) {
                None => return self.settle(index),
                // The last thing that is decided about an agent, so that nothing else waits with it.
                Some(Next::Append(AgentEvent::Released(mark))) if mark.by.is_none() && !self.losses_read => {
                    return self.settle(index);
                }
                Some(Next::Append(_)) if self.appends >= APPENDS_MAX => {
                    entry.work.queued = true;
                    self.backlog.push_back(index);
                    return;
                }
                Some(Next::Append(event)) => {
                    entry.work.busy = true;
                    entry.work.retry_at = None;
                    let expected = entry.known.agent.seq;
                    self.append(index, Step { event, time: now }, expected);
                    return;
                }
                Some(Next::Fulfilled) => self.grant_wish(index, None, now),
                Some(Next::Refused(error)) => self.grant_wish(index, Some(error), now),
            }
        }
    }

    fn append(&mut self, index: Index, step: Step, expected: u64) {
        self.appends += 1;
        let (reach, inputs) = (self.reach.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let outcome = reach.append(step.event.clone(), step.time, expected).await;
            // The loop has ended: the next start decides again.
            let _ = inputs.send(Input::Appended { index, step: Box::new(step), outcome }).await;
        });
    }

    /// Nothing is left to do about this agent for now.
    fn settle(&mut self, index: Index) {
        let Some(entry) = self.fleet.get_mut(index) else { return };
        let (known, live) = (&entry.known, &mut entry.live);
        if live.profile.as_deref() == known.agent.profile.as_ref() {
            live.profile = None;
        }
        let well = known.agent.status.is_some_and(|status| !status.is_silent());
        live.settled = well && live.profile.is_none() && live.beat.grade == Grade::Good;
        if !self.cold.is_empty() {
            self.release_waiters(index);
        }
    }

    fn grant_wish(&mut self, index: Index, refused: Option<ApiError>, now: Timestamp) {
        let Some((_, asker)) = self.cold.get_mut(&index).and_then(|cold| cold.wishes.pop_front()) else {
            return;
        };
        self.tidy(index);
        let Some(entry) = self.fleet.get(index) else { return };
        let answer = refused.map_or_else(|| Ok(AgentView::new(entry, &self.policy, now)), Err);
        // Nobody waits any more: the wish is fulfilled all the same.
        let _ = asker.send(answer);
    }

    /// An append has come back.
    pub(super) fn appended(&mut self, index: Index, step: Step, outcome: Appended) {
        self.appends -= 1;
        if let Some(entry) = self.fleet.get_mut(index) {
            entry.work.busy = false;
        }
        match outcome {
            Appended::At(seq) => {
                if let Some(entry) = self.fleet.get_mut(index) {
                    entry.work.refusals = 0;
                }
                // The log may have brought it back before its acknowledgement came.
                self.fleet.apply(index, seq, &step.event, step.time, true);
                self.follow_up(index, &step.event);
            }
            Appended::Conflict(entries) => {
                metrics::counter!("rollcall_append_conflicts_total").increment(1);
                for entry in &entries {
                    self.fold_entry(entry);
                }
            }
            Appended::Failed(reason) => self.append_failed(index, &reason),
        }
        self.sync_probe(index);
        self.reconcile(index);
        self.rearm(index);
        self.append_waiting();
    }

    /// Gives the room that was freed to agents that wait for it.
    fn append_waiting(&mut self) {
        while self.appends < APPENDS_MAX {
            let Some(index) = self.backlog.pop_front() else { return };
            if let Some(entry) = self.fleet.get_mut(index) {
                entry.work.queued = false;
            }
            self.reconcile(index);
            self.rearm(index);
        }
    }

    /// Kept and tried again; whoever waits for it is told.
    fn append_failed(&mut self, index: Index, reason: &str) {
        metrics::counter!("rollcall_append_failures_total").increment(1);
        let now = self.clock.now();
        let Some(entry) = self.fleet.get_mut(index) else { return };
        let pause = RETRY_MIN_MS.saturating_mul(1 << entry.work.refusals.min(10)).min(RETRY_MAX_MS);
        entry.work.refusals = entry.work.refusals.saturating_add(1);
        entry.work.retry_at = Some(now.plus_ms(pause));
        if entry.work.refusals == 1 {
            tracing::warn!(agent_id = %entry.known.agent.id, reason, "the log did not take an event, it is kept and tried again");
        }
        let error = ApiError::unavailable("the log does not take events now");
        let wishes =
            self.cold.get_mut(&index).map(|cold| std::mem::take(&mut cold.wishes)).unwrap_or_default();
        for (_, asker) in wishes {
            let _ = asker.send(Err(error.clone()));
        }
        self.refuse_waiters(index, &error);
    }

    /// Effects of an event of our own.
    fn follow_up(&mut self, index: Index, event: &AgentEvent) {
        let Some(entry) = self.fleet.get(index) else { return };
        let id = entry.known.agent.id.clone();
        match event {
            AgentEvent::Connected(change) => log_transition(&id, Status::Connected, change),
            AgentEvent::Degraded(change) => log_transition(&id, Status::Degraded, change),
            AgentEvent::Disconnected(change) => log_transition(&id, Status::Disconnected, change),
            AgentEvent::Error(change) => log_transition(&id, Status::Error, change),
            AgentEvent::Draining(change) => log_transition(&id, Status::Draining, change),
            AgentEvent::Gone(change) => log_transition(&id, Status::Gone, change),
            AgentEvent::Superseded(event) => {
                let (old, new) = (&event.instance_id, &event.by_instance_id);
                tracing::info!(agent_id = %id, instance_id = %old, by_instance_id = %new, "instance superseded");
                self.say_goodbye(index, event.instance_id.clone(), super::intake::superseded());
            }
            AgentEvent::Registered(profile) => {
                warn_of_control(profile);
                tracing::info!(agent_id = %id, instance_id = %profile.instance_id, pool = %profile.pool,
                    capacity = profile.capacity, "agent registered");
            }
            AgentEvent::Updated(profile) => {
                warn_of_control(profile);
                tracing::info!(agent_id = %id, "agent updated");
            }
            AgentEvent::Flapping(mark)
            | AgentEvent::Settled(mark)
            | AgentEvent::Quarantined(mark)
            | AgentEvent::Released(mark) => {
                tracing::info!(agent_id = %id, mark = event.short_type(), reason = mark.reason, "agent marked");
            }
        }
        if matches!(event, AgentEvent::Connected(_) | AgentEvent::Disconnected(_) | AgentEvent::Error(_)) {
            // The other channel is looked at while this one is news.
            self.scheduler.suspect(index);
        }
        metrics::counter!("rollcall_agent_events_total", "type" => event.short_type()).increment(1);
    }

    /// Tells an instance goodbye, unless too many are being told.
    pub(super) fn say_goodbye(&mut self, index: Index, instance: InstanceId, goodbye: Goodbye) {
        if self.goodbyes >= GOODBYES_MAX {
            metrics::counter!("rollcall_goodbyes_skipped_total").increment(1);
            return;
        }
        let Some(entry) = self.fleet.get(index) else { return };
        self.goodbyes += 1;
        let agent = entry.known.agent.id.clone();
        let (reach, inputs) = (self.reach.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let heard = reach.say_goodbye(&agent, &instance, &goodbye).await.unwrap_or(false);
            let _ = inputs.send(Input::Parted { index, instance, heard }).await;
        });
    }

    /// A goodbye was heard: it need not be repeated in answers to heartbeats.
    pub(super) fn parted(&mut self, index: Index, instance: &InstanceId, heard: bool) {
        if heard && let Some(cold) = self.cold.get_mut(&index) {
            cold.goodbye.take_if(|due| due.instance == *instance);
            self.tidy(index);
        }
    }
}

fn warn_of_control(profile: &Profile) {
    if let Some(control) = profile.control.as_ref().filter(|control| !control.is_driven()) {
        tracing::warn!(agent_id = %profile.agent_id, kind = control.kind.escape_debug().to_string(),
            "its control endpoint is of a kind that nobody speaks: it is driven over NATS");
    }
}

fn log_transition(agent: &AgentId, status: Status, change: &StatusChanged) {
    tracing::info!(
        agent_id = %agent,
        instance_id = change.instance_id.as_ref().map(InstanceId::as_str),
        status = status.as_str(),
        previous = change.previous.map(Status::as_str),
        reason = change.reason,
        by = change.by,
        code = change.code,
        detail = change.message,
        "agent status changed"
    );
    metrics::counter!("rollcall_agent_transitions_total", "status" => status.as_str()).increment(1);
}
