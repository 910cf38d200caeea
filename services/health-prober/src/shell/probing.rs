//! Active probes and the agents file: what is to be probed, and what probes say.

use std::collections::HashSet;

use rollcall_core::agent::Status;
use rollcall_core::time::Clock;
use rollcall_core::{AgentId, InstanceId};
use uuid::Uuid;

use super::Shell;
use crate::agents_file::FileRead;
use crate::detector::{Cause, Channel, Evidence};
use crate::probe::scheduler::Report;
use crate::probe::{Found, Target};
use rollcall_control::Trust;
use rollcall_core::agent::FILE_INSTANCE_PREFIX;

use crate::state::{Index, Listening, Nobody, ProbeSeen, interval_ms};

/// An answer that takes more than this share of the probe's timeout is slow.
const SLOW_SHARE: u32 = 2;

impl Shell {
    /// Has probed what the log says that this agent wants probed, and nothing else.
    pub(super) fn sync_probe(&mut self, index: Index) {
        if !self.ready {
            return;
        }
        let Some(entry) = self.fleet.get_mut(index) else { return };
        let agent = &entry.known.agent;
        let ended =
            agent.status == Some(Status::Gone) && !entry.known.is_fresh() || entry.known.current_is_past();
        // One of the agents file that was given up is looked for all the same: nothing else would bring it back.
        let awaited = agent.is_from_file() && self.file.contains_key(&agent.id);
        let wanted = agent
            .profile
            .as_ref()
            .filter(|_| !ended || awaited)
            .and_then(|p| Some((p.probe.clone()?, p.instance_id.clone())));
        let Some((endpoint, instance_id)) = wanted else {
            entry.live.probe = None;
            if entry.work.probed {
                entry.work.probed = false;
                self.scheduler.unwatch(index);
            }
            return;
        };
        // By the log, as everybody else tells it: also when the file can't be read now.
        let trust = if agent.is_from_file() { Trust::Operator } else { Trust::Agent };
        let probed = entry.live.probe.as_deref();
        if probed.is_some_and(|p| p.endpoint == endpoint && p.instance_id == instance_id && p.trust == trust)
        {
            return;
        }
        let target = Target {
            agent_id: agent.id.clone(),
            instance_id: instance_id.clone(),
            endpoint: endpoint.clone(),
            trust,
        };
        let silent = agent.status.is_some_and(Status::is_silent) && !entry.known.is_fresh();
        entry.work.probed = true;
        let generation = self.scheduler.watch(index, target);
        entry.live.probe = Some(Box::new(ProbeSeen {
            endpoint,
            instance_id,
            trust,
            generation,
            channel: if silent { Channel::bad() } else { Channel::default() },
            listening: Listening::of(&entry.known),
            result: "not probed yet".to_owned(),
            checked_at: None,
            latency_ms: None,
        }));
    }

    /// A probe has come back.
    pub(super) fn probed(&mut self, report: Report) {
        let now = self.clock.now();
        let started =
            now.as_millis().saturating_sub(i64::try_from(report.took.as_millis()).unwrap_or(i64::MAX));
        // We were deaf or stalled ourselves while it was made: its failure may be ours.
        let disturbed = self.fleet.deaf || started < self.fleet.floor.as_millis() || self.holds(now);
        let slow_after = self.probe_timeout / SLOW_SHARE;
        let policy = &self.policy;
        let (floor, reconnected_at) = (self.fleet.floor, self.fleet.reconnected_at);
        let Some(entry) = self.fleet.get_mut(report.index) else { return };
        let successes = policy.successes(entry.known.damping(now));
        let silent = entry.known.agent.status.is_some_and(Status::is_silent) && !entry.known.is_fresh();
        let interval = interval_ms(&entry.known, &entry.live, policy);
        let silent_since = entry.known.beats().then(|| entry.live.silent_from(floor));
        let Some(seen) = entry.live.probe.as_deref_mut().filter(|seen| seen.generation == report.generation)
        else {
            return;
        };
        let before = seen.channel;
        seen.checked_at = Some(now);
        seen.latency_ms = Some(u64::try_from(report.took.as_millis()).unwrap_or(u64::MAX));
        if report.found == Found::Good {
            seen.listening.answered();
        }
        let (evidence, result) = match report.found {
            // While we are slow ourselves an answer says that it is there, and nothing about its speed.
            Found::Good if report.took >= slow_after && !disturbed => (Evidence::Slow, "slow".to_owned()),
            Found::Good => (Evidence::Good, "ok".to_owned()),
            Found::Bad(cause, words) if disturbed => {
                (Evidence::Void, format!("void: {}: {words}", cause.as_str()))
            }
            Found::Bad(Cause::NoResponders, words) => {
                let nobody = seen.listening.nobody(now, interval, silent_since, reconnected_at);
                nobody_listens(seen, nobody, &words)
            }
            Found::Bad(cause, words) => (Evidence::Bad(cause), format!("{}: {words}", cause.as_str())),
            Found::Void(words) => (Evidence::Void, format!("void: {words}")),
            Found::Skipped(why) => {
                if seen.result != why {
                    tracing::warn!(agent_id = %entry.known.agent.id, kind = seen.endpoint.kind, why, "agent is not probed");
                }
                if !entry.known.beats() {
                    // Nothing at all is known of it.
                    seen.channel.take(Evidence::Bad(Cause::NotProbed), successes);
                    seen.latency_ms = None;
                    seen.result = why;
                    entry.live.settled = false;
                    self.reconcile(report.index);
                    return self.rearm(report.index);
                }
                // No channel: what is not probed is not held against it.
                seen.channel = Channel::default();
                seen.latency_ms = None;
                seen.result = why;
                return;
            }
        };
        let answers = matches!(evidence, Evidence::Good | Evidence::Slow);
        seen.count(evidence, successes, silent);
        seen.result = result;
        if answers && entry.known.current_is_past() {
            // An agent of the agents file that was given up is there again.
            let id = entry.known.agent.id.clone();
            return self.describe(&id);
        }
        if seen.channel != before {
            entry.live.settled = false;
            self.reconcile(report.index);
            self.rearm(report.index);
        }
    }

    /// The agents file was read. A row that is wrong says nothing about its agent, which stays as it was; and if it does not
    /// even say whose it is, it may be anybody's.
    pub(super) fn file_read(&mut self, read: FileRead) {
        if !self.ready {
            self.file_waiting = Some(read);
            return;
        }
        let doubtful: HashSet<AgentId> = read.aside.iter().filter_map(|row| row.agent_id.clone()).collect();
        let any_may_be_meant = read.aside.iter().any(|row| row.agent_id.is_none());
        let stays = |id: &AgentId| any_may_be_meant || doubtful.contains(id);
        self.file.retain(|id, _| stays(id));
        self.file.extend(read.agents.into_iter().map(|agent| (agent.agent_id.clone(), agent)));
        let of_files: Vec<Index> =
            self.fleet.iter().filter(|(_, entry)| !entry.known.beats()).map(|(index, _)| index).collect();
        for index in of_files {
            let Some(entry) = self.fleet.get_mut(index) else { continue };
            let id = &entry.known.agent.id;
            entry.live.removed = !self.file.contains_key(id) && !stays(id);
            self.reconcile(index);
            self.sync_probe(index);
        }
        let ids: Vec<AgentId> = self.file.keys().cloned().collect();
        for id in ids {
            self.describe(&id);
        }
    }

    /// Registers an agent of the file, or updates it.
    fn describe(&mut self, id: &AgentId) {
        let Some(index) = self.place(id) else { return };
        let now = self.clock.now();
        let (Some(row), Some(entry)) = (self.file.get(id), self.fleet.get_mut(index)) else { return };
        let (known, live) = (&entry.known, &mut entry.live);
        let alive = known.agent.instance_id.is_some() && !known.current_is_past();
        if alive && known.beats() {
            tracing::warn!(agent_id = %id, "an agent of the agents file beats: its own word counts");
            return;
        }
        let kept = if alive { known.agent.instance_id.clone() } else { None };
        let Some(instance) = kept.or_else(new_instance) else { return };
        let profile = row.profile(instance.clone());
        if known.agent.profile.as_ref() != Some(&profile) {
            if live.instance.as_ref() != Some(&instance) {
                live.meet(instance, now);
            }
            live.profile = Some(Box::new(profile));
            live.settled = false;
        }
        self.reconcile(index);
        self.sync_probe(index);
        self.rearm(index);
    }
}

/// What "no responders" is worth, and in words.
fn nobody_listens(seen: &mut ProbeSeen, nobody: Nobody, words: &str) -> (Evidence, String) {
    match nobody {
        Nobody::Counts => (Evidence::Bad(Cause::NoResponders), format!("no_responders: {words}")),
        Nobody::TooSoon => (Evidence::Void, format!("void: no_responders: {words}")),
        Nobody::NeverAnswered => {
            // No channel: whether it ever listens there is not known.
            seen.channel = Channel::default();
            (Evidence::Void, "void: no_responders: it never answered there".to_owned())
        }
    }
}

fn new_instance() -> Option<InstanceId> {
    InstanceId::new(&format!("{FILE_INSTANCE_PREFIX}{}", Uuid::now_v7())).ok()
}
