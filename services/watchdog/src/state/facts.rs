//! The facts of an execution, gathered from what is known.

use rollcall_core::{
    ExecutionId, InstanceId, Timestamp,
    agent::{Agent, Parting, Status},
    wire::INTERVAL_MS,
};

use super::{AgentEntry, Looks, World};
use crate::{
    claims::Claims,
    decide::{Judgement, judge},
    facts::{Asked, Channel, Edge, Facts, Listing, Promise, Standing},
};

impl World {
    /// The facts about an execution, with what was looked up for this judgement. `None`: not open.
    #[must_use]
    pub fn facts(&self, id: &ExecutionId, looks: &Looks) -> Option<Facts> {
        let execution = self.executions.get(id)?;
        let trouble = self.troubles.get(id).filter(|t| t.attempt == execution.attempt);
        let sight_since = self.sight.since().map(|since| since.max(self.resumed_at));
        let mut facts = Facts {
            state: execution.state,
            started: execution.is_external(),
            accepted: false,
            dispatched_at: Timestamp::default(),
            deadline: Timestamp::default(),
            cancelled_at: execution.cancel.as_ref().map(|c| c.at),
            stall_timeout_ms: execution.request.stall_timeout_ms,
            lost_after_ms: execution.request.lost_after_ms,
            standing: Standing::Alive,
            channel: Channel {
                last_at: None,
                interval_ms: self.config.limits.interval_ms,
                said_gone: false,
                answered: false,
                driven: false,
                spacing_ms: 0,
            },
            listing: Listing::Unknown,
            vouched_at: trouble.and_then(|t| t.vouched_at),
            sight_since,
            suspended: self.is_suspended(),
            asked: trouble.map_or(Asked::No, |t| t.asked),
            asked_for: trouble.and_then(|t| t.asked_for),
            waiting: looks.waiting,
            edge: looks.edge,
            promise: looks.promise,
            canary: looks.canary,
            turn_at: trouble.and_then(|t| t.turn_at),
        };
        let Some(held) = execution.holder() else { return Some(facts) };
        facts.accepted = held.started_at.is_some() && !execution.is_external();
        facts.started |= facts.accepted;
        if facts.started && !looks.of_started {
            // It was accepted since: what its instance said before that is no word about it.
            (facts.edge, facts.promise) = (Edge::Unasked, Promise::Unasked);
        }
        facts.dispatched_at = held.dispatched_at;
        facts.deadline = held.deadline;
        if let Some(entry) = self.agents.get(&held.agent_id) {
            let claims = entry.claims_of(held.instance_id.as_str());
            facts.standing = standing(&entry.agent, &held.instance_id, claims);
            facts.channel.interval_ms = self.interval_of(entry, &held.instance_id, claims);
            facts.channel.driven = entry.agent.control().is_some();
            facts.channel.said_gone = matches!(facts.standing, Standing::Gone { by: Parting::Goodbye, .. })
                || claims.is_some_and(|claims| claims.said_gone);
            if let Some(claims) = claims {
                facts.channel.last_at = claims.last_at;
                // Who is driven over HTTP is asked on NATS only whether it is there.
                facts.channel.answered = if facts.channel.driven { claims.pinged } else { claims.answered };
                facts.channel.spacing_ms = claims.spacing_ms;
                facts.listing = claims.listing(id, held.number);
                facts.vouched_at = facts.vouched_at.max(claims.vouched_at(id, held.number));
            }
        }
        Some(facts)
    }

    /// The interval of an instance, in milliseconds. One that does not count any more and was not heard yet had one
    /// of its own: what its successor says is nothing about it.
    pub(super) fn interval_of(
        &self,
        entry: &AgentEntry,
        instance: &InstanceId,
        claims: Option<&Claims>,
    ) -> u64 {
        let named = claims.and_then(|c| c.interval_ms);
        let is_current = entry.agent.instance_id.as_ref().is_none_or(|current| current == instance);
        let registered = entry.agent.profile.as_ref().filter(|_| is_current).and_then(|p| p.interval_ms);
        let is_known = is_current || claims.is_some_and(|c| c.seq != 0);
        let silent_on_it = if is_known { self.config.limits.interval_ms } else { *INTERVAL_MS.end() };
        named.or(registered).unwrap_or(silent_on_it)
    }

    /// Judges an execution on what is known now and what was looked up. `None`: not open.
    #[must_use]
    pub fn judge(&self, id: &ExecutionId, looks: &Looks, now: Timestamp) -> Option<(Judgement, Facts)> {
        let facts = self.facts(id, looks)?;
        Some((judge(&facts, &self.config.limits, now), facts))
    }

    /// How an execution is judged, for people: what was decided with everything looked up, and on what, while that
    /// stands.
    #[must_use]
    pub fn standing_judgement(&self, id: &ExecutionId, now: Timestamp) -> Option<(Judgement, Facts)> {
        let (judgement, facts) = self.judge(id, &Looks::default(), now)?;
        let decided = self.troubles.get(id).and_then(|t| t.decided.clone());
        Some(decided.filter(|_| judgement.verdict.is_work()).unwrap_or((judgement, facts)))
    }
}

/// Where the holding instance stands, by the log.
fn standing(agent: &Agent, instance: &InstanceId, claims: Option<&Claims>) -> Standing {
    let is_current = agent.instance_id.as_ref().is_none_or(|current| current == instance);
    let said_gone = claims.is_some_and(|claims| claims.said_gone);
    if is_current {
        return match agent.status {
            Some(Status::Gone) => {
                let by = match said_gone {
                    true => Parting::Goodbye,
                    false => agent.parting.unwrap_or(Parting::Forgotten),
                };
                Standing::Gone { since: agent.since, by }
            }
            Some(status) if status.is_silent() => {
                Standing::Silent { since: agent.silent_since.unwrap_or(agent.since) }
            }
            _ => Standing::Alive,
        };
    }
    if !agent.is_past(instance) {
        // Never registered: nothing is known of it, its deadline bounds the wait.
        return Standing::Alive;
    }
    let since = agent.registered_at.unwrap_or(agent.since);
    match said_gone {
        true => Standing::Gone { since, by: Parting::Goodbye },
        false => Standing::Superseded { since },
    }
}
