//! What happens because nothing happened: missed heartbeats, edge pings, deadlines.
//!
//! How edge pings map to the contract's counting: failure k falls by itself at (k + 0.5) intervals of silence. At
//! (k + 0.2) the instance is pinged. "No responders", from an instance that answered before and not around a reconnect,
//! has failure k fall then and there (a dead process is known 1.2 intervals after its last heartbeat); it never adds
//! a failure of its own, so `error` does not come sooner than the threshold says by more than the 0.3. An answer vouches
//! for the process while failure k is the last one: `degraded` instead of `disconnected`. At the threshold it vouches no
//! more: whoever answers pings and does not beat is `error{protocol}`, so that the deferral has a bound.
//!
//! A failure of silence counts only as far as it is proven: once a canary that was sent after the failure fell is back
//! and every heartbeat before it was read.

use rollcall_core::agent::Status;
use rollcall_core::time::Clock;
use rollcall_core::wire::{Goodbye, GoodbyeReason, InFlight};
use rollcall_core::{InstanceId, Timestamp};

use super::intake::GOODBYE_DEADLINE_MS;
use super::{HOLD_MAX_MS, Input, Shell, Unheard};
use crate::detector::Cause;
use crate::state::{
    Answers, Entry, INTRODUCTIONS_MAX, Index, PingOutcome, edge_after_ms, interval_ms, miss_after_ms, misses,
};

/// Pings in flight at once; more are left out, heartbeats decide then.
const PINGS_MAX: usize = 256;
/// A goodbye for a passed drain deadline is repeated this often until the instance is gone.
const DRAIN_AGAIN_MS: u64 = 10_000;
/// How long a goodbye is repeated in the answers to heartbeats.
pub(super) const GOODBYE_DUE_MS: u64 = 600_000;
/// Shortest time to the next look at an agent.
const REARM_MIN_MS: u64 = 20;

impl Shell {
    /// Lets every timer that is due go off.
    pub(super) fn go_off(&mut self) {
        let now = self.clock.now();
        if !self.ready || self.holds(now) {
            return;
        }
        self.look_at_proven(now);
        while let Some((at, index)) = self.timers.pop_due(now) {
            let Some(entry) = self.fleet.get_mut(index) else { continue };
            if entry.work.armed != Some(at) {
                continue;
            }
            entry.work.armed = None;
            self.look_at(index, now);
            self.rearm(index);
        }
    }

    /// Whether buffers are still being read after a stall.
    pub(super) fn holds(&mut self, now: Timestamp) -> bool {
        if now >= self.judge_after {
            self.held_since = None;
            return false;
        }
        now.since_ms(*self.held_since.get_or_insert(now)) < HOLD_MAX_MS
    }

    pub(super) fn look_at(&mut self, index: Index, now: Timestamp) {
        let (floor, deaf) = (self.fleet.floor, self.fleet.deaf);
        let Some(entry) = self.fleet.get_mut(index) else { return };
        if entry.work.retry_at.is_some_and(|at| at <= now) {
            entry.work.retry_at = None;
        }
        if entry.known.agent.status != Some(Status::Gone) && entry.known.beats() && !deaf {
            let interval = interval_ms(&entry.known, &entry.live, &self.policy);
            let before = entry.live.beat.fails;
            entry.live.miss(floor, interval, self.hearing.proven_at.min(now));
            let missed = misses(now.since_ms(entry.live.counted_from), interval);
            // Beyond the threshold nothing depends on one more.
            if missed > entry.live.beat.fails && entry.live.beat.fails < self.policy.failure_threshold {
                self.hearing.unproven.push(index);
            }
            // While it is news. What is down is left to the plan, which probes it more and more seldom.
            let news = entry.live.beat.fails > before && before < self.policy.failure_threshold;
            if news && entry.work.probed {
                self.scheduler.suspect(index);
            }
            self.ask_at_the_edge(index, interval, now);
        }
        self.enforce_deadlines(index, now);
        self.reconcile(index);
    }

    /// Pings an instance whose heartbeat is late, and introduces itself to one that was never asked.
    fn ask_at_the_edge(&mut self, index: Index, interval: u64, now: Timestamp) {
        let threshold = self.policy.failure_threshold;
        let Some(entry) = self.fleet.get_mut(index) else { return };
        let live = &mut entry.live;
        let Some(instance) = live.instance.clone().filter(|_| !entry.known.current_is_past()) else { return };
        if live.edge.waiting || live.edge.answers == Answers::No || self.pings >= PINGS_MAX {
            return;
        }
        let elapsed = now.since_ms(live.counted_from);
        let k = u32::try_from(elapsed.saturating_sub(interval / 5) / interval.max(1)).unwrap_or(u32::MAX);
        let introduces = k == 0 && live.edge.answers == Answers::Unknown && live.heard_at.is_some();
        let confirms = k > live.edge.pinged && k <= threshold;
        if !introduces && !confirms {
            return;
        }
        live.edge.waiting = true;
        live.edge.pinged = k;
        let from = live.counted_from;
        let agent = entry.known.agent.id.clone();
        self.pings += 1;
        let (reach, inputs) = (self.reach.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let outcome = reach.ping(&agent, &instance, interval).await;
            let _ = inputs.send(Input::Pinged { index, instance, k, from, outcome }).await;
        });
    }

    /// A ping has come back. It moves the failure of its interval forward; it never adds one.
    pub(super) fn pinged(
        &mut self,
        index: Index,
        instance: &InstanceId,
        k: u32,
        from: Timestamp,
        outcome: PingOutcome,
    ) {
        let now = self.clock.now();
        let (floor, deaf, reconnected_at) = (self.fleet.floor, self.fleet.deaf, self.fleet.reconnected_at);
        let Some(entry) = self.fleet.get_mut(index) else { return };
        let interval = interval_ms(&entry.known, &entry.live, &self.policy);
        let live = &mut entry.live;
        if live.instance.as_ref() != Some(instance) {
            return;
        }
        live.edge.waiting = false;
        let same_silence = live.silent_from(floor) == from && live.counted_from == from;
        match outcome {
            PingOutcome::Nothing => return,
            PingOutcome::Answered => {
                live.edge.answers = Answers::Yes;
                if k > 0 && same_silence {
                    live.edge.vouched = k;
                }
            }
            PingOutcome::NoResponders if k == 0 => {
                live.edge.introductions = live.edge.introductions.saturating_add(1);
                if live.edge.introductions >= INTRODUCTIONS_MAX {
                    live.edge.answers = Answers::No;
                }
            }
            PingOutcome::NoResponders => {
                // Evidence only about somebody who answered before, and not while connections are being made again.
                let settled = !deaf && reconnected_at.is_none_or(|at| now.since_ms(at) > interval);
                if live.edge.answers != Answers::Yes || !same_silence || !settled {
                    return;
                }
                live.beat.fail_to(k, Cause::NoResponders);
                live.settled = false;
            }
        }
        self.reconcile(index);
        self.rearm(index);
    }

    pub(super) fn enforce_deadlines(&mut self, index: Index, now: Timestamp) {
        let Some(entry) = self.fleet.get_mut(index) else { return };
        if entry.known.agent.status == Some(Status::Gone) || entry.known.current_is_past() {
            return;
        }
        let Some(instance) = entry.known.agent.instance_id.clone() else { return };
        let drain =
            entry.known.agent.operator_drain.as_ref().and_then(|d| d.deadline.map(|at| (d.since, at)));
        if let Some((since, deadline)) = drain
            && deadline <= now
            && entry
                .work
                .partings
                .as_deref()
                .and_then(|said| said.drain)
                .is_none_or(|(told, at)| told != since || now.since_ms(at) >= DRAIN_AGAIN_MS)
        {
            entry.work.partings.get_or_insert_default().drain = Some((since, now));
            let in_flight = entry.known.drain_in_flight().unwrap_or(InFlight::Return);
            return self.part(index, instance, (GoodbyeReason::Drain, in_flight), now);
        }
        let told = entry.work.partings.as_deref().and_then(|said| said.still_at);
        let again = self.policy.activity_timeout_ms.unwrap_or_default();
        if told.is_none_or(|at| now.since_ms(at) >= again)
            && self.stands_still(index, &instance, now)
            && let Some(entry) = self.fleet.get_mut(index)
        {
            entry.work.partings.get_or_insert_default().still_at = Some(now);
            self.part(index, instance, (GoodbyeReason::ActivityTimeout, InFlight::Return), now);
        }
    }

    /// An instance beats and does no work that it was given, if that is asked for. What we could not hear is not held
    /// against it: neither our own deafness nor a gap in its heartbeats.
    pub(super) fn stands_still(&self, index: Index, instance: &InstanceId, now: Timestamp) -> bool {
        let (Some(timeout), Some(entry)) = (self.policy.activity_timeout_ms, self.fleet.get(index)) else {
            return false;
        };
        let interval = interval_ms(&entry.known, &entry.live, &self.policy);
        !self.fleet.deaf
            && entry.live.instance.as_ref() == Some(instance)
            && entry.live.stands_still(self.fleet.floor, interval, timeout, now)
    }

    /// Says goodbye on every way there is: by request, and in the answers to its heartbeats.
    fn part(
        &mut self,
        index: Index,
        instance: InstanceId,
        (reason, in_flight): (GoodbyeReason, InFlight),
        now: Timestamp,
    ) {
        let goodbye = Goodbye { reason, deadline_ms: GOODBYE_DEADLINE_MS, in_flight };
        self.cold.entry(index).or_default().goodbye = Some(Unheard {
            instance: instance.clone(),
            goodbye: goodbye.clone(),
            until: now.plus_ms(GOODBYE_DUE_MS),
            while_still: reason == GoodbyeReason::ActivityTimeout,
        });
        self.say_goodbye(index, instance, goodbye);
    }

    /// Arms an agent's timer for the next thing that may become due about it.
    pub(super) fn rearm(&mut self, index: Index) {
        if !self.ready {
            return;
        }
        let now = self.clock.now();
        let due = self.fleet.get(index).and_then(|entry| self.due(entry, now));
        if let Some(due) = due
            && let Some(entry) = self.fleet.get_mut(index)
        {
            self.timers.arm(index, &mut entry.work, due.max(now.plus_ms(REARM_MIN_MS)));
        }
    }

    /// The next moment at which something can be done about an agent. What is overdue and can't be done is not due: its timer
    /// would go off again and again.
    pub(super) fn due(&self, entry: &Entry, now: Timestamp) -> Option<Timestamp> {
        let (known, live) = (&entry.known, &entry.live);
        let agent = &known.agent;
        let mut due: Vec<Timestamp> = Vec::with_capacity(8);
        due.extend(entry.work.retry_at);
        if agent.status != Some(Status::Gone) {
            if known.beats() {
                due.push(self.silence_due(entry, now));
            }
            let drained =
                agent.operator_drain.as_ref().and_then(|drain| Some((drain.since, drain.deadline?)));
            // Nobody is told who does not count any more.
            if let Some((since, deadline)) =
                drained.filter(|_| agent.instance_id.is_some() && !known.current_is_past())
            {
                let told = entry.work.partings.as_deref().and_then(|said| said.drain);
                let again = told.filter(|(of, _)| *of == since).map(|(_, at)| at.plus_ms(DRAIN_AGAIN_MS));
                due.push(deadline.max(again.unwrap_or_default()));
            }
            due.extend(known.forget_due(self.policy.forget_after_ms).filter(|at| *at > now));
            if let Some(timeout) = self.policy.activity_timeout_ms.filter(|_| live.measured) {
                let told = entry.work.partings.as_deref().and_then(|said| said.still_at);
                let at = live.still_since(self.fleet.floor).max(told.unwrap_or_default()).plus_ms(timeout);
                // Due and not said: it was not heard just now.
                let look_again = now.plus_ms(interval_ms(known, live, &self.policy) / 4);
                due.push(if at > now { at } else { look_again });
            }
        }
        if agent.flapping {
            due.extend(known.steady_due().filter(|at| *at > now));
        }
        // What is on its way into the log, or waits for room, is looked at again when it is there.
        let can_append = !entry.work.busy && !entry.work.queued;
        if agent.quarantined.is_some() && self.losses_read && can_append {
            due.push(known.release_due().max(entry.work.retry_at.unwrap_or_default()));
        }
        due.into_iter().min()
    }

    /// The next moment at which silence of this agent means something.
    fn silence_due(&self, entry: &Entry, now: Timestamp) -> Timestamp {
        let live = &entry.live;
        let interval = interval_ms(&entry.known, live, &self.policy);
        if self.fleet.deaf {
            return now.plus_ms(interval);
        }
        let from = live.silent_from(self.fleet.floor);
        let elapsed = now.since_ms(from);
        let missed = misses(elapsed, interval);
        if missed >= self.policy.failure_threshold {
            // As bad as it gets: only being forgotten is left, and a clock that was started again.
            return now.plus_ms(interval.saturating_mul(u64::from(self.policy.failure_threshold)));
        }
        let miss = miss_after_ms(missed + 1, interval);
        let edge = match live.edge.answers {
            Answers::No => miss,
            Answers::Yes | Answers::Unknown => {
                let k =
                    u32::try_from(elapsed.saturating_sub(interval / 5) / interval.max(1)).unwrap_or(u32::MAX);
                edge_after_ms(k.saturating_add(1), interval)
            }
        };
        from.plus_ms(miss.min(edge))
    }
}
