//! Heartbeats from the bus, and the answers to those that ask for one.

use std::collections::HashSet;

use rollcall_core::sight::Void;
use rollcall_core::time::Clock;
use rollcall_core::wire::{ApiError, Goodbye, GoodbyeReason, HeartbeatReply, InFlight};
use rollcall_core::{InstanceId, Timestamp};
use rollcall_nats::Message;
use serde_json::json;

use super::Shell;
use crate::decide::told;
use crate::hear::{Heard, hear};
use crate::state::{Index, interval_ms};

/// Sources of heartbeats that count for nothing that are remembered as logged; when full, all are forgotten, and logged
/// again.
const SOURCES_MAX: usize = 1024;
/// Heartbeats of one agent that wait for an answer; more are answered at once.
const WAITERS_MAX: usize = 16;
/// How long an instance gets to finish, in a goodbye of our own making.
pub(super) const GOODBYE_DEADLINE_MS: u64 = 30_000;
/// A past instance that goes on beating is told goodbye at most this often.
const FAREWELL_INTERVAL_MS: u64 = 1000;

/// Who was complained about already.
#[derive(Debug, Default)]
pub(super) struct Sources(HashSet<Box<str>>);

impl Sources {
    /// Whether this source is to be logged.
    fn is_new(&mut self, source: &str) -> bool {
        if self.0.contains(source) {
            return false;
        }
        if self.0.len() >= SOURCES_MAX {
            self.0.clear();
        }
        self.0.insert(source.into());
        true
    }
}

/// The goodbye for an instance that was replaced. Its work may finish: its list vouches for it until it is gone.
pub(super) const fn superseded() -> Goodbye {
    Goodbye {
        reason: GoodbyeReason::Superseded,
        deadline_ms: GOODBYE_DEADLINE_MS,
        in_flight: InFlight::Finish,
    }
}

/// The goodbye for an instance that was taken for gone and lives: only a new instance counts again.
const fn dismissed() -> Goodbye {
    Goodbye { reason: GoodbyeReason::Restart, deadline_ms: GOODBYE_DEADLINE_MS, in_flight: InFlight::Finish }
}

impl Shell {
    /// Takes in one heartbeat.
    pub(super) fn hear(&mut self, message: &Message) {
        self.counters.beats.increment(1);
        let reply = message.reply.as_deref();
        if !self.ready {
            // Not even refused: an answer would hide that of another prober, and a farewell would be taken for heard.
            return;
        }
        let agent = self.reach.subjects.agent_of_heartbeat(&message.subject).unwrap_or_default();
        let now = self.clock.now();
        let heard = hear(&mut self.fleet, agent, &message.payload, &self.policy, now);
        if self.fleet.gaps.take_suspicion() {
            self.void(Void::Gaps);
        }
        match heard {
            Ok((Some(index), Heard::Steady)) => {
                if let Some(reply) = reply {
                    self.reply_now(index, reply, now);
                }
            }
            Ok((Some(index), Heard::News)) => {
                self.reconcile(index);
                self.rearm(index);
                if let Some(reply) = reply {
                    self.reply_when_settled(index, reply, now);
                }
            }
            Ok((Some(index), Heard::Replay)) => {
                self.counters.replays.increment(1);
                if self.replayed.is_new(&message.subject) {
                    tracing::warn!(
                        agent,
                        "a heartbeat whose seq does not rise counts for nothing: sent twice, or by a process \
                        that has the instance_id of an earlier one"
                    );
                }
                if let Some(reply) = reply {
                    self.reply_when_settled(index, reply, now);
                }
            }
            Ok((Some(index), Heard::Past(instance))) => {
                self.counters.past.increment(1);
                self.farewell(index, &instance, reply, now);
            }
            Ok((_, Heard::Stranger(instance))) => {
                tracing::debug!(agent, instance_id = %instance, "goodbye of an instance that never registered");
                if let Some(reply) = reply {
                    self.send_reply(reply, "gone", self.policy.interval_ms, None, now);
                }
            }
            Ok((None, _)) => {}
            Err(error) => {
                metrics::counter!("rollcall_heartbeats_invalid_total").increment(1);
                if self.invalid.is_new(&message.subject) {
                    tracing::warn!(subject = %message.subject.escape_debug(), %error, "invalid heartbeat");
                }
                if let Some(reply) = reply {
                    self.refuse(reply, &error);
                }
            }
        }
    }

    /// An instance that no longer counts still beats.
    fn farewell(&mut self, index: Index, instance: &InstanceId, reply: Option<&str>, now: Timestamp) {
        let Some(entry) = self.fleet.get_mut(index) else { return };
        let status = told(&entry.known, instance);
        let goodbye = if entry.known.agent.instance_id.as_ref() != Some(instance) {
            Some(superseded())
        } else {
            // Who said goodbye itself knows, and what it still sends is on its way to its end.
            entry.known.was_dismissed().then(dismissed)
        };
        let interval = interval_ms(&entry.known, &entry.live, &self.policy);
        let due = entry
            .work
            .partings
            .as_deref()
            .and_then(|said| said.past_at)
            .is_none_or(|at| now.since_ms(at) >= FAREWELL_INTERVAL_MS);
        if let Some(goodbye) = goodbye.clone().filter(|_| due) {
            entry.work.partings.get_or_insert_default().past_at = Some(now);
            self.say_goodbye(index, instance.clone(), goodbye);
        }
        if let Some(reply) = reply {
            self.send_reply(reply, status, interval, goodbye, now);
        }
    }

    /// Answers once what the heartbeat led to is in the log; at once when it led to nothing.
    fn reply_when_settled(&mut self, index: Index, reply: &str, now: Timestamp) {
        let Some(entry) = self.fleet.get(index) else { return };
        let waits = (entry.work.busy || entry.work.queued) && rollcall_nats::is_inbox(reply);
        let instance = entry.live.instance.clone();
        match instance {
            Some(instance) if waits => {
                let waiters = &mut self.cold.entry(index).or_default().waiters;
                if waiters.len() < WAITERS_MAX {
                    waiters.push((reply.to_owned(), instance));
                    return;
                }
                self.reply_now(index, reply, now);
            }
            _ => self.reply_now(index, reply, now),
        }
    }

    /// Answers everybody who waited for this agent to be settled.
    pub(super) fn release_waiters(&mut self, index: Index) {
        let Some(cold) = self.cold.get_mut(&index) else { return };
        let waiters = std::mem::take(&mut cold.waiters);
        self.tidy(index);
        let now = self.clock.now();
        for (reply, instance) in waiters {
            self.reply_as(index, &instance, &reply, now);
        }
    }

    /// Tells everybody who waits that it did not work.
    pub(super) fn refuse_waiters(&mut self, index: Index, error: &ApiError) {
        let Some(cold) = self.cold.get_mut(&index) else { return };
        let waiters = std::mem::take(&mut cold.waiters);
        self.tidy(index);
        for (reply, _) in waiters {
            self.refuse(&reply, error);
        }
    }

    fn reply_now(&self, index: Index, reply: &str, now: Timestamp) {
        let Some(entry) = self.fleet.get(index) else { return };
        if let Some(instance) = &entry.live.instance {
            self.reply_as(index, instance, reply, now);
        }
    }

    fn reply_as(&self, index: Index, instance: &InstanceId, reply: &str, now: Timestamp) {
        let Some(entry) = self.fleet.get(index) else { return };
        let status = told(&entry.known, instance);
        let interval = interval_ms(&entry.known, &entry.live, &self.policy);
        let goodbye =
            if status == "superseded" { Some(superseded()) } else { self.goodbye_due(index, instance, now) };
        self.send_reply(reply, status, interval, goodbye, now);
    }

    /// The goodbye that an instance was told and has not confirmed. Work that moves again withdraws the one that it earned.
    pub(super) fn goodbye_due(&self, index: Index, instance: &InstanceId, now: Timestamp) -> Option<Goodbye> {
        let due = self.cold.get(&index)?.goodbye.as_ref()?;
        let holds = !due.while_still || self.stands_still(index, instance, now);
        (due.instance == *instance && now < due.until && holds).then(|| due.goodbye.clone())
    }

    fn send_reply(
        &self,
        reply: &str,
        status: &str,
        interval_ms: u64,
        goodbye: Option<Goodbye>,
        now: Timestamp,
    ) {
        let body = HeartbeatReply { status: status.to_owned(), interval_ms, server_time: now, goodbye };
        match serde_json::to_vec(&body) {
            Ok(body) => self.publish(reply, body),
            Err(error) => tracing::warn!(%error, "answer to a heartbeat can't be written"),
        }
    }

    fn refuse(&self, reply: &str, error: &ApiError) {
        self.publish(reply, json!({ "error": error }).to_string().into_bytes());
    }

    /// Forgets what is empty.
    pub(super) fn tidy(&mut self, index: Index) {
        if self.cold.get(&index).is_some_and(super::Cold::is_empty) {
            self.cold.remove(&index);
        }
    }
}
