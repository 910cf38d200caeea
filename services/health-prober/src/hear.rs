//! Heartbeats as they come in: the hottest path of the fleet. What repeats itself is recognised by its bytes; only what
//! changed is parsed and owned.

use std::hash::{DefaultHasher, Hash, Hasher};

use rollcall_core::agent::Agent;
use rollcall_core::event::Profile;
use rollcall_core::wire::{AgentState, ApiError, Extras, Heartbeat};
use rollcall_core::{AgentId, InstanceId, Timestamp};

use crate::config::Policy;
use crate::detector::Grade;
use rollcall_core::agent::FILE_INSTANCE_PREFIX;

use crate::state::{Fleet, Index, Live, is_leaving, misses};

/// What a heartbeat amounted to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// As before: nothing to decide.
    Steady,
    /// Something may have to be decided.
    News,
    /// Not newer than the last one of its instance: dropped.
    Replay,
    /// From an instance that never counts again.
    Past(InstanceId),
    /// A goodbye from an instance that was never registered: nothing to say goodbye to.
    Stranger(InstanceId),
}

/// Takes in one heartbeat of `agent` (the token of its subject).
///
/// # Errors
/// What the contract forbids; nothing has changed then.
pub fn hear(
    fleet: &mut Fleet,
    agent: &str,
    bytes: &[u8],
    policy: &Policy,
    now: Timestamp,
) -> Result<(Option<Index>, Heard), ApiError> {
    let beat = Heartbeat::read(agent, bytes)?;
    if beat.instance_id.starts_with(FILE_INSTANCE_PREFIX) {
        // What never beats is told by its instance id, and what the operator trusts must not be impersonated.
        return Err(ApiError::bad_request(format!(
            "an instance_id must not start with {FILE_INSTANCE_PREFIX}"
        )));
    }
    let index = match fleet.find(agent) {
        Some(index) => index,
        None => {
            let id = AgentId::new(agent)?;
            // What can't be registered must not take up room.
            beat.extras()?;
            if beat.state == AgentState::Gone {
                return Ok((None, Heard::Stranger(beat.instance()?)));
            }
            fleet.find_or_add(&id).map_err(|full| ApiError::unavailable(full.to_string()))?
        }
    };
    let (floor, deaf) = (fleet.floor, fleet.deaf);
    let Some((entry, gaps)) = fleet.get_with_gaps(index) else { return Ok((None, Heard::Steady)) };
    let (known, live) = (&mut entry.known, &mut entry.live);
    if live.instance.as_ref().is_none_or(|instance| instance.as_str() != beat.instance_id) {
        let instance = beat.instance()?;
        if known.agent.is_past(&instance) {
            return Ok((Some(index), Heard::Past(instance)));
        }
        // The newest instance wins: what the log still takes for the current one is about to be superseded by it.
        let newer = live.instance.as_ref().filter(|newer| !known.agent.is_past(newer));
        if newer.is_some() && known.agent.instance_id.as_ref() == Some(&instance) {
            return Ok((Some(index), Heard::Steady));
        }
        if beat.state == AgentState::Gone {
            return Ok((Some(index), Heard::Stranger(instance)));
        }
        let extras = beat.extras()?;
        live.meet(instance.clone(), now);
        live.profile = Some(Box::new(profile(&known.agent.id, instance, &beat, extras)?));
        live.fingerprint = fingerprint(&beat);
    } else {
        if known.current_is_past() && live.instance == known.agent.instance_id {
            return Ok((Some(index), Heard::Past(beat.instance()?)));
        }
        if live.heard_at.is_some() && beat.seq <= live.seq {
            return Ok((Some(index), Heard::Replay));
        }
        compare(live, &known.agent, &beat)?;
    }
    live.recount(floor);
    let before = live.heard_at.filter(|at| *at >= floor && !deaf).map(|_| live.seq);
    let hole = gaps.hear(&mut live.steps, before, beat.seq, now);
    live.seq = beat.seq;
    let announced = is_leaving(beat.state) && announce(live, &beat);
    if policy.activity_timeout_ms.is_some() {
        work_seen(live, &beat, policy, now);
    }
    live.executions = u32::try_from(beat.executions.len()).unwrap_or(u32::MAX);
    let was = live.beat.grade;
    live.beaten(now, policy.successes(known.damping(now)));
    let steady = live.settled && !announced && was == Grade::Good;
    live.settled = steady;
    fleet.holes += u64::from(hole);
    Ok((Some(index), if steady { Heard::Steady } else { Heard::News }))
}

/// Notes a changed description of itself; the same one costs a hash.
fn compare(live: &mut Live, agent: &Agent, beat: &Heartbeat<'_>) -> Result<(), ApiError> {
    let fingerprint = fingerprint(beat);
    if fingerprint == live.fingerprint {
        return Ok(());
    }
    let profile = profile(&agent.id, beat.instance()?, beat, beat.extras()?)?;
    live.fingerprint = fingerprint;
    let in_log = agent.profile.as_ref() == Some(&profile);
    live.profile = (!in_log).then(|| Box::new(profile));
    if !in_log {
        live.settled = false;
    }
    Ok(())
}

fn announce(live: &mut Live, beat: &Heartbeat<'_>) -> bool {
    let news = (beat.state == AgentState::Gone && !live.gone) || !live.draining;
    if news {
        live.draining = true;
        live.gone = beat.state == AgentState::Gone;
        live.reason = beat.reason.as_deref().map(|reason| reason.chars().take(REASON_CHARS_MAX).collect());
    }
    news
}

/// Longest reason of an agent that is repeated in events, in characters.
const REASON_CHARS_MAX: usize = 200;

fn work_seen(live: &mut Live, beat: &Heartbeat<'_>, policy: &Policy, now: Timestamp) {
    // What names no progress may be moving: an instance that holds such work is left to the watchdog.
    live.measured =
        !beat.executions.is_empty() && beat.executions.iter().all(|claim| claim.progress.is_some());
    let interval_ms = beat.interval_ms.unwrap_or(policy.interval_ms);
    let gap = live.heard_at.is_none_or(|heard| misses(now.since_ms(heard), interval_ms) > 0);
    let mut hasher = DefaultHasher::new();
    for claim in &beat.executions {
        claim.id.hash(&mut hasher);
        claim.attempt.hash(&mut hasher);
        claim.progress.map(f64::to_bits).hash(&mut hasher);
    }
    let claims = hasher.finish();
    if !live.measured || gap || claims != live.claims {
        live.claims_since = now;
    }
    live.claims = claims;
}

/// Everything that an `agent.updated` would carry, as bytes hash. Never 0.
fn fingerprint(beat: &Heartbeat<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    (beat.capacity, beat.interval_ms, beat.timeout_ms).hash(&mut hasher);
    (beat.pool.as_deref(), beat.version.as_deref()).hash(&mut hasher);
    for raw in [beat.labels, beat.probe, beat.control] {
        raw.map(serde_json::value::RawValue::get).hash(&mut hasher);
    }
    hasher.finish() | 1
}

fn profile(
    agent: &AgentId,
    instance: InstanceId,
    beat: &Heartbeat<'_>,
    extras: Extras,
) -> Result<Profile, ApiError> {
    Ok(Profile {
        agent_id: agent.clone(),
        instance_id: instance,
        capacity: beat.capacity,
        pool: beat.pool_or_default()?,
        interval_ms: beat.interval_ms,
        timeout_ms: beat.timeout_ms,
        version: beat.version.as_deref().map(str::to_owned),
        labels: extras.labels,
        probe: extras.probe,
        control: extras.control,
    })
}
