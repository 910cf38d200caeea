//! The next event of an agent, if one is due. Pure and level-triggered: it compares what the log says with what was
//! seen and names *one* step. After the step is in the log (or somebody else's was) it is asked again, so a crash
//! between two steps, a lost race and a second prober all come out the same.

use rollcall_core::agent::{Agent, Status};
use rollcall_core::event::{AgentEvent, Marked, StatusChanged, Superseded};
use rollcall_core::wire::{ApiError, InFlight};
use rollcall_core::{InstanceId, Timestamp};
use serde_json::json;

use crate::config::Policy;
use crate::detector::{Cause, Channel, Grade, Health, judge};
use crate::state::{ASKED, FLAP_FALLS, IN_FLIGHT, Known, LOSSES_MAX, Live};

/// What an operator asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// No new work for this agent, over all its instances.
    Drain {
        /// Why.
        reason: String,
        /// When what is left is to be given up.
        deadline: Option<Timestamp>,
        /// What is to become of it then.
        in_flight: Option<InFlight>,
    },
    /// Work again; lifts a quarantine too.
    Undrain {
        /// Why.
        reason: String,
    },
    /// It won't come back.
    Forget {
        /// Why.
        reason: String,
    },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Append this.
    Append(AgentEvent),
    /// The wish is fulfilled.
    Fulfilled,
    /// The wish can't be.
    Refused(ApiError),
}

/// The next step about this agent, if any.
#[must_use]
pub fn next(
    known: &Known,
    live: &Live,
    wish: Option<&Wish>,
    policy: &Policy,
    now: Timestamp,
) -> Option<Next> {
    let append = |event: AgentEvent| Some(Next::Append(event));
    let leaves = || departure(known, live, now).or_else(|| removal(known, live, now));
    if let Some(event) = arrival(&known.agent, live).or_else(leaves) {
        return append(event);
    }
    if let Some(wish) = wish {
        return Some(grant(known, live, wish, policy, now));
    }
    let event = update(known, live)
        .or_else(|| status(known, live, policy, now))
        .or_else(|| forgotten(known, live, policy, now))
        .or_else(|| marks(known, now));
    event.and_then(append)
}

/// A new instance: the old one is superseded, the new one registered.
fn arrival(agent: &Agent, live: &Live) -> Option<AgentEvent> {
    let new = live.instance.as_ref()?;
    if agent.instance_id.as_ref() == Some(new) || agent.is_past(new) {
        return None;
    }
    let profile = live.profile.as_deref()?;
    if let Some(old) = agent.instance_id.as_ref().filter(|old| !agent.is_past(old)) {
        return Some(AgentEvent::Superseded(Superseded {
            agent_id: agent.id.clone(),
            instance_id: old.clone(),
            by_instance_id: new.clone(),
        }));
    }
    Some(AgentEvent::Registered(profile.clone()))
}

/// The current instance said goodbye.
fn departure(known: &Known, live: &Live, now: Timestamp) -> Option<AgentEvent> {
    if !live.gone || !hears_current(&known.agent, live) || known.current_is_past() {
        return None;
    }
    let reason = live.reason.as_deref().unwrap_or("gone");
    let mut change = changed(known, live, reason, now);
    change.by = Some("instance".to_owned());
    Some(AgentEvent::Gone(change))
}

/// It is not in the agents file any more.
fn removal(known: &Known, live: &Live, now: Timestamp) -> Option<AgentEvent> {
    if !live.removed || known.beats() || known.current_is_past() {
        return None;
    }
    let mut change = changed(known, live, "removed from the agents file", now);
    change.by = Some("operator".to_owned());
    Some(AgentEvent::Gone(change))
}

/// What was heard is about the instance that counts.
fn hears_current(agent: &Agent, live: &Live) -> bool {
    live.instance.is_some() && live.instance == agent.instance_id
}

fn update(known: &Known, live: &Live) -> Option<AgentEvent> {
    let profile = live.profile.as_deref()?;
    let applies = hears_current(&known.agent, live) && !known.current_is_past();
    (applies && known.agent.profile.as_ref() != Some(profile)).then(|| AgentEvent::Updated(profile.clone()))
}

/// The health that the channels amount to now.
#[must_use]
pub fn health(known: &Known, live: &Live, policy: &Policy) -> Option<Health> {
    let status = if known.is_fresh() { None } else { known.agent.status };
    judged(known, live, policy, status)
}

fn judged(known: &Known, live: &Live, policy: &Policy, status: Option<Status>) -> Option<Health> {
    let threshold = policy.failure_threshold;
    judge(&live.channels(known.beats(), threshold), threshold, status)
}

fn status(known: &Known, live: &Live, policy: &Policy, now: Timestamp) -> Option<AgentEvent> {
    let agent = &known.agent;
    let fresh = known.is_fresh();
    if agent.status == Some(Status::Gone) && !fresh {
        // A drain of a gone agent is never granted, so nothing but a new instance leads out of it.
        return None;
    }
    let health = health(known, live, policy)?;
    if known.current_is_past() && !health.status().is_silent() {
        return None;
    }
    let instance_drains = live.draining && hears_current(agent, live) && agent.instance_drain.is_none();
    let draining = instance_drains || agent.instance_drain.is_some() || agent.operator_drain.is_some();
    let reason = if fresh { "first_heartbeat" } else { health.reason() };
    match health {
        Health::Connected | Health::Degraded(_) if draining => {
            // Silent when it was drained, and well again: that silence is over.
            let recovered = known.silent_since.is_some();
            (instance_drains || fresh || recovered || agent.status != Some(Status::Draining)).then(|| {
                let mut change = changed(known, live, if fresh { reason } else { "recovered" }, now);
                if instance_drains {
                    change.by = Some("instance".to_owned());
                    change.reason = live.reason.as_deref().unwrap_or("draining").to_owned();
                }
                AgentEvent::Draining(change)
            })
        }
        Health::Connected | Health::Degraded(_) => {
            let to = health.status();
            let reason = match (health, agent.status) {
                (Health::Connected, Some(status)) if !fresh && status.is_silent() => "recovered",
                _ => reason,
            };
            (fresh || agent.status != Some(to))
                .then(|| AgentEvent::status(to, changed(known, live, reason, now)))
        }
        // A void came in between: silence begins with the next failure that is counted.
        Health::Disconnected(_) if known.beats() && live.beat.fails == 0 && !is_silent(agent) => None,
        // Draining silences alarms: below the threshold it goes on.
        Health::Disconnected(_) if draining => None,
        Health::Disconnected(_) => (fresh || agent.status != Some(Status::Disconnected))
            .then(|| AgentEvent::Disconnected(changed(known, live, health.reason(), now))),
        Health::Error(cause) => {
            // Two probers may see different causes; each says its own once, and again when it has changed.
            let differs = agent.error_code.as_deref() != Some(cause.code());
            let argues = differs && live.overruled != Some(live.causes());
            let news = fresh || agent.status != Some(Status::Error) || argues;
            news.then(|| AgentEvent::Error(error(known, live, cause, now)))
        }
    }
}

fn is_silent(agent: &Agent) -> bool {
    agent.status.is_some_and(Status::is_silent)
}

fn error(known: &Known, live: &Live, cause: Cause, now: Timestamp) -> StatusChanged {
    let mut change = changed(known, live, cause.as_str(), now);
    change.code = Some(cause.code().to_owned());
    change.message = Some(explain(live, known.beats(), cause, now));
    if known.agent.silent_since.is_none() {
        change.since = silence(known, live, now);
    }
    change
}

/// Since when an agent that was drained is silent: the drain did not end a silence.
fn silence(known: &Known, live: &Live, now: Timestamp) -> Timestamp {
    known.silent_since.filter(|since| live.heard_at.is_none_or(|heard| heard < *since)).unwrap_or(now)
}

fn explain(live: &Live, beats: bool, cause: Cause, now: Timestamp) -> String {
    let mut parts = Vec::new();
    if beats && live.beat.grade == Grade::Bad {
        parts.push(match live.heard_at {
            Some(heard) => format!("no heartbeat for {} ms", now.since_ms(heard)),
            None => "no heartbeat since the prober started".to_owned(),
        });
        if live.edge.vouched > 0 {
            parts.push("it answers pings all the same".to_owned());
        }
    }
    if let Some(probe) = live.probe.as_deref().filter(|probe| probe.channel.grade == Grade::Bad) {
        parts.push(format!("{} probe of {}: {}", probe.endpoint.kind, probe.endpoint.url, probe.result));
    }
    if parts.is_empty() { cause.as_str().to_owned() } else { parts.join("; ") }
}

fn forgotten(known: &Known, live: &Live, policy: &Policy, now: Timestamp) -> Option<AgentEvent> {
    let due = known.forget_due(policy.forget_after_ms)?;
    // What the log says of the past is not enough: it must be silent to the threshold for ourselves, too.
    let silent_now =
        judged(known, live, policy, None).is_some_and(|health| matches!(health, Health::Error(_)));
    (known.agent.status == Some(Status::Error) && silent_now && now >= due)
        .then(|| AgentEvent::Gone(changed(known, live, "forgotten", now)))
}

fn marks(known: &Known, now: Timestamp) -> Option<AgentEvent> {
    let agent = &known.agent;
    let mark = |reason: String, count: usize| Marked {
        agent_id: agent.id.clone(),
        instance_id: agent.instance_id.clone(),
        reason,
        count: u32::try_from(count).ok(),
        by: None,
    };
    let falls = known.falls(now);
    if !agent.flapping && falls >= FLAP_FALLS {
        return Some(AgentEvent::Flapping(mark(format!("{falls} falls within 5 minutes"), falls)));
    }
    if agent.flapping && known.is_steady(now) {
        let reason = format!("its falls weigh less than a fresh one, {falls} within 5 minutes");
        return Some(AgentEvent::Settled(mark(reason, falls)));
    }
    let losses = known.losses(now);
    if agent.quarantined.is_none() && losses >= LOSSES_MAX {
        let reason = format!("{losses} losses within 10 minutes");
        return Some(AgentEvent::Quarantined(mark(reason, losses)));
    }
    if agent.quarantined.is_some() && losses < LOSSES_MAX && known.is_forgiven() {
        return Some(AgentEvent::Released(mark(
            "a new instance, whose predecessor ended once".to_owned(),
            losses,
        )));
    }
    if agent.quarantined.is_some() && now >= known.release_due() {
        return Some(AgentEvent::Released(mark("no loss for 10 minutes".to_owned(), losses)));
    }
    None
}

fn grant(known: &Known, live: &Live, wish: &Wish, policy: &Policy, now: Timestamp) -> Next {
    let agent = &known.agent;
    match wish {
        Wish::Drain { reason, deadline, in_flight } => {
            let wanted = agent.operator_drain.as_ref();
            if wanted.is_some_and(|drain| drain.reason == *reason && drain.deadline == *deadline)
                && known.drain_in_flight() == *in_flight
            {
                return Next::Fulfilled;
            }
            if agent.status == Some(Status::Gone) {
                return Next::Refused(conflict(&format!(
                    "agent {} is gone, there is nothing to drain",
                    agent.id
                )));
            }
            let mut change = changed(known, live, reason, now);
            change.by = Some("operator".to_owned());
            change.deadline = *deadline;
            if let Some(in_flight) = in_flight {
                change.evidence[ASKED] = json!({ IN_FLIGHT: in_flight });
            }
            Next::Append(AgentEvent::Draining(change))
        }
        Wish::Undrain { reason } => {
            if agent.quarantined.is_some() {
                return Next::Append(AgentEvent::Released(Marked {
                    agent_id: agent.id.clone(),
                    instance_id: agent.instance_id.clone(),
                    reason: reason.clone(),
                    count: None,
                    by: Some("operator".to_owned()),
                }));
            }
            if agent.operator_drain.is_none() {
                return Next::Fulfilled;
            }
            Next::Append(undrained(known, live, reason, policy, now))
        }
        Wish::Forget { reason } => {
            let ended = agent.instance_id.is_none() || known.current_is_past();
            if agent.status == Some(Status::Gone) && ended {
                return Next::Fulfilled;
            }
            let mut change = changed(known, live, reason, now);
            change.by = Some("operator".to_owned());
            Next::Append(AgentEvent::Gone(change))
        }
    }
}

/// The status that an agent has once no operator drains it any more.
fn undrained(known: &Known, live: &Live, reason: &str, policy: &Policy, now: Timestamp) -> AgentEvent {
    let agent = &known.agent;
    let mut change = changed(known, live, reason, now);
    change.by = Some("operator".to_owned());
    change.undrained = true;
    let status = match agent.status {
        Some(Status::Draining) if agent.instance_drain.is_some() => {
            // Still draining, by its own will: said before, so by nobody now.
            change.by = None;
            Status::Draining
        }
        // Silent below the threshold is hidden by draining, and shows now. Unknown to us: what it was when it was drained.
        Some(Status::Draining) | None => match judged(known, live, policy, None) {
            Some(health) => health.status(),
            None if known.silent_since.is_some() || was_bad(known, live) => Status::Disconnected,
            None => Status::Connected,
        },
        Some(status) => status,
    };
    if status.is_silent() {
        change.since = agent.silent_since.unwrap_or_else(|| silence(known, live, now));
    }
    if status == Status::Error {
        let cause = live.beat.cause.unwrap_or(Cause::MissedHeartbeat);
        change.code = Some(agent.error_code.clone().unwrap_or_else(|| cause.code().to_owned()));
        change.message =
            Some(agent.error_message.clone().unwrap_or_else(|| explain(live, known.beats(), cause, now)));
    }
    AgentEvent::status(status, change)
}

/// It was bad, and nothing was counted since: by a void, or by the word of another prober.
fn was_bad(known: &Known, live: &Live) -> bool {
    let probe_bad = || live.probe.as_deref().is_some_and(|probe| probe.channel.grade == Grade::Bad);
    if known.beats() { live.beat.grade == Grade::Bad } else { probe_bad() }
}

fn conflict(message: &str) -> ApiError {
    ApiError::new(rollcall_core::wire::ErrorCode::Conflict, message)
}

fn changed(known: &Known, live: &Live, reason: &str, now: Timestamp) -> StatusChanged {
    let agent = &known.agent;
    StatusChanged {
        agent_id: agent.id.clone(),
        instance_id: agent.instance_id.clone(),
        previous: agent.status,
        reason: reason.to_owned(),
        since: now,
        evidence: evidence(known, live, now),
        by: None,
        code: None,
        message: None,
        deadline: None,
        undrained: false,
    }
}

/// What was seen, for the event.
fn evidence(known: &Known, live: &Live, now: Timestamp) -> serde_json::Value {
    let channel = |channel: &Channel| {
        json!({
            "grade": channel.grade,
            "failures_in_a_row": channel.fails,
            "successes_in_a_row": channel.goods,
            "cause": channel.cause,
        })
    };
    let mut evidence = serde_json::Map::new();
    if known.beats() {
        let mut beat = channel(&live.beat);
        beat["last_heartbeat_age_ms"] = json!(live.heard_at.map(|heard| now.since_ms(heard)));
        beat["seq"] = json!(live.seq);
        evidence.insert("heartbeat".to_owned(), beat);
    }
    if live.edge.vouched > 0 {
        evidence.insert("ping".to_owned(), json!({ "answered": true }));
    }
    if let Some(probe) = live.probe.as_deref() {
        let mut seen = channel(&probe.channel);
        seen["kind"] = json!(probe.endpoint.kind);
        seen["result"] = json!(probe.result);
        seen["latency_ms"] = json!(probe.latency_ms);
        evidence.insert("probe".to_owned(), seen);
    }
    serde_json::Value::Object(evidence)
}

/// The status as an instance is told it in the answer to its heartbeat.
#[must_use]
pub fn told(known: &Known, instance: &InstanceId) -> &'static str {
    let agent = &known.agent;
    if agent.is_past(instance) && agent.instance_id.as_ref() != Some(instance) {
        return "superseded";
    }
    agent.status.map_or("connected", Status::as_str)
}

#[cfg(test)]
mod tests;
