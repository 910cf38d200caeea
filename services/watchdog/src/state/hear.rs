//! Hearing the agents: heartbeats, and the answers of registries.

use std::collections::{HashMap, HashSet};

use rollcall_control::RegistryList;
use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp,
    event::RecoveryReason,
    execution::Execution,
    wire::{Heartbeat, OwnedClaim},
};

use super::{AgentEntry, ENDED_KEPT_MAX, Ended, INSTANCES_MAX, World, ended::verdict_on};
use crate::{
    claims::{Claims, Expectation},
    sight::Void,
    zombie::Known,
};

/// Registry answers this far apart are two words, however long a cycle is: half of the cycle's default.
const REGISTRY_SPACING_MAX_MS: u64 = 15_000;

impl AgentEntry {
    /// Where the lists of this instance are, made if it is new.
    pub(super) fn place_of(&mut self, instance: &InstanceId) -> usize {
        if let Some(at) = self.claims.iter().position(|c| c.instance == *instance) {
            return at;
        }
        self.make_room();
        self.claims.push(Claims::new(instance.clone()));
        self.claims.len() - 1
    }

    /// Forgets the instance that was heard of longest ago, if there are too many; one that lists nothing first, as it vouches
    /// for nothing.
    fn make_room(&mut self) {
        if self.claims.len() < INSTANCES_MAX {
            return;
        }
        let current = self.agent.instance_id.clone();
        let oldest = self
            .claims
            .iter()
            .enumerate()
            .filter(|(_, claims)| Some(&claims.instance) != current.as_ref())
            .min_by_key(|(_, claims)| (claims.lists_something(), claims.listed_at))
            .map(|(at, _)| at);
        if let Some(at) = oldest {
            self.claims.swap_remove(at);
        }
    }
}

/// What the log expects of one instance.
struct Expected<'a> {
    executions: &'a HashMap<ExecutionId, Execution>,
    ended: &'a Ended,
    held: &'a HashSet<ExecutionId>,
    agent: &'a AgentId,
    instance: &'a InstanceId,
    grace_ms: u64,
}

impl Expectation for Expected<'_> {
    fn held(&self) -> impl Iterator<Item = (&ExecutionId, u32, Timestamp)> {
        self.held.iter().filter_map(|id| {
            let held = self.executions.get(id)?.holder()?;
            (held.instance_id == *self.instance && held.agent_id == *self.agent)
                .then(|| (id, held.number, held.dispatched_at.plus_ms(self.grace_ms)))
        })
    }

    fn holds(&self, id: &ExecutionId, attempt: u32) -> bool {
        self.executions.get(id).and_then(Execution::holder).is_some_and(|held| {
            held.number == attempt && held.instance_id == *self.instance && held.agent_id == *self.agent
        })
    }

    fn known(&self, id: &ExecutionId, attempt: u32) -> Known {
        // An attempt above the last that we know of is news that has not reached us yet.
        let last =
            self.executions.get(id).map(|e| e.attempt).or_else(|| self.ended.get(id).map(|n| n.attempt));
        match last {
            Some(last) if attempt <= last => Known::NotTheirs,
            _ => Known::Unread,
        }
    }
}

impl World {
    /// One heartbeat of `agent` (the subject's token).
    pub fn beat(&mut self, agent: &str, beat: &Heartbeat<'_>, now: Timestamp) {
        // Agents that the log does not know are the prober's business; their next heartbeat will find them known.
        let Some(entry) = self.agents.get_mut(agent) else {
            self.counters.beats_ignored += 1;
            return;
        };
        let at = match entry.claims.iter().position(|c| c.instance.as_str() == beat.instance_id) {
            Some(at) => at,
            None => {
                let Ok(instance) = beat.instance() else { return };
                entry.place_of(&instance)
            }
        };
        let registry = entry.agent.control().is_some();
        let Some(claims) = entry.claims.get_mut(at) else { return };
        // While we are blind nothing is known to have come before it.
        let before = (claims.seq != 0 && self.sight.since().is_some()).then_some(claims.seq);
        if !claims.beat(beat, now) {
            self.counters.beats_ignored += 1;
            return;
        }
        self.counters.beats += 1;
        let hole = self.gaps.hear(&mut entry.steps, before, beat.seq, now);
        // With `control` the registry replaces the list, and knows of no progress.
        let known = if registry {
            claims.hear_progress(&beat.executions, now);
            true
        } else {
            claims.hear_lists();
            claims.list_again(&beat.executions, now)
        };
        if hole {
            metrics::counter!("rollcall_heartbeat_gaps_total").increment(1);
            if self.gaps.take_suspicion() {
                self.void(Void::Gaps);
            }
        }
        if known {
            return;
        }
        let mut owned = Vec::with_capacity(beat.executions.len());
        for claim in &beat.executions {
            // Checked when the heartbeat was read.
            if let Ok(id) = ExecutionId::new(&claim.id) {
                owned.push(OwnedClaim { id, attempt: claim.attempt, progress: claim.progress });
            }
        }
        self.compare(agent, at, &owned, now);
    }

    /// The answer of the registry of an agent with `control`: its list, and a sign of life. A registry names neither
    /// attempts nor instances: it speaks for every instance that holds something by the log, and for the current one.
    /// What it only knows of (not begun yet, or just finished) is not missing, and is not running either.
    pub fn registry(&mut self, agent: &AgentId, list: &RegistryList, interval_ms: u64, now: Timestamp) {
        let Some(entry) = self.agents.get(agent) else { return };
        let holder = |id: &ExecutionId| self.executions.get(id).and_then(Execution::holder);
        let mut lists: HashMap<InstanceId, Vec<OwnedClaim>> = HashMap::new();
        for held in entry.held.iter().filter_map(holder) {
            lists.entry(held.instance_id.clone()).or_default();
        }
        if let Some(current) = &entry.agent.instance_id {
            lists.entry(current.clone()).or_default();
        }
        let running: HashSet<&ExecutionId> = list.running.iter().collect();
        let known: HashSet<&ExecutionId> = list.known.iter().collect();
        for id in running.union(&known).copied() {
            let held = holder(id).filter(|held| held.agent_id == *agent);
            let (instance, attempt) = match held {
                Some(held) => (Some(held.instance_id.clone()), held.number),
                // What it goes on with although it is not its own any more is what it held of it last.
                None if running.contains(id) => {
                    (entry.agent.instance_id.clone(), self.last_held_by(agent, id).unwrap_or_default())
                }
                None => continue,
            };
            if let Some(list) = instance.and_then(|instance| lists.get_mut(&instance)) {
                list.push(OwnedClaim { id: id.clone(), attempt, progress: None });
            }
        }
        for (instance, list) in lists {
            let Some(entry) = self.agents.get_mut(agent) else { return };
            let at = entry.place_of(&instance);
            if let Some(claims) = entry.claims.get_mut(at) {
                claims.last_at = Some(now);
                // Who beats is silent by its heartbeats; who never does, by this.
                if claims.instance.is_of_file() {
                    claims.interval_ms = Some(interval_ms);
                }
                // Asked whenever somebody wants to know: lists that come at once after another are no second word.
                claims.spacing_ms = (interval_ms / 2).min(REGISTRY_SPACING_MAX_MS);
            }
            self.compare(agent.as_str(), at, &list, now);
        }
    }

    fn compare(&mut self, agent: &str, at: usize, owned: &[OwnedClaim], now: Timestamp) {
        let grace_ms = self.config.limits.dispatch_grace_ms;
        let Some(entry) = self.agents.get_mut(agent) else { return };
        let AgentEntry { agent: known, held, claims, .. } = entry;
        let Some(claims) = claims.get_mut(at) else { return };
        let instance = claims.instance.clone();
        let expected = Expected {
            executions: &self.executions,
            ended: &self.ended,
            held,
            agent: &known.id,
            instance: &instance,
            grace_ms,
        };
        let odd = claims.list(owned, &expected, now);
        let agent = known.id.clone();
        for (id, attempt) in &odd.lasting_extras {
            if self.holder_of(id, *attempt) == Some(&agent) {
                self.hear_again(id, *attempt, "listed");
            }
        }
        for id in odd.missing.iter().chain(&odd.standing) {
            self.settle(id, now);
        }
        if odd.extras_due && self.zombies_due.insert((agent, instance)) {
            self.woken = true;
        }
    }

    /// The last attempt of an execution that this agent held, as far as that is remembered.
    fn last_held_by(&self, agent: &AgentId, id: &ExecutionId) -> Option<u32> {
        if let Some(execution) = self.executions.get(id) {
            let mut attempts = execution.attempts.iter().rev();
            return attempts.find(|held| held.agent_id == *agent).map(|held| held.number);
        }
        self.ended.get(id).filter(|note| note.agent_id.as_ref() == Some(agent)).map(|note| note.attempt)
    }

    /// Who held an attempt.
    fn holder_of(&self, id: &ExecutionId, attempt: u32) -> Option<&AgentId> {
        if let Some(execution) = self.executions.get(id) {
            return execution.attempt_numbered(attempt).map(|held| &held.agent_id);
        }
        self.ended.get(id).filter(|note| note.attempt == attempt)?.agent_id.as_ref()
    }

    /// Why an attempt was recovered, if it was. What its agent handed back is no verdict.
    fn recovered_as(&self, id: &ExecutionId, attempt: u32) -> Option<RecoveryReason> {
        if let Some(execution) = self.executions.get(id) {
            return execution.attempt_numbered(attempt).and_then(verdict_on);
        }
        self.ended.get(id).filter(|note| note.attempt == attempt)?.recovered
    }

    /// An attempt goes on or completed after it was recovered: a wrong verdict, whatever its reason. Each counts once.
    pub(super) fn hear_again(&mut self, id: &ExecutionId, attempt: u32, how: &'static str) {
        let Some(reason) = self.recovered_as(id, attempt).filter(|_| self.sight.caught_up()) else { return };
        // As many as ended executions are remembered; beyond that one may count twice.
        if self.heard_again.len() >= ENDED_KEPT_MAX {
            self.heard_again.clear();
        }
        if !self.heard_again.insert((id.clone(), attempt)) {
            return;
        }
        self.counters.heard_again += 1;
        metrics::counter!("rollcall_recovered_then_heard_total", "reason" => reason.as_str()).increment(1);
        tracing::warn!(execution_id = %id, attempt, reason = reason.as_str(), how,
            "an execution that was recovered is heard of again");
    }
}
