//! What a verdict becomes: the loss with its evidence and its sentence, and words for people. Pure.

use rollcall_core::{
    Timestamp,
    agent::Agent,
    event::{RecoveryReason, TerminateOutcome},
    execution::{Attempt, Execution, Loss},
    wire::Outcome,
};
use serde_json::{Value, json};

use crate::{
    decide::Finding,
    facts::{Asked, Edge, Facts, Limits, Listing, Promise, Standing, Waiting},
    state::AgentEntry,
};

/// What is written about an agent's part in a verdict.
#[must_use]
pub fn agent_evidence(agent: &Agent) -> Value {
    json!({
        "status": agent.status.map(|s| s.as_str()),
        "since": agent.since,
        "reason": agent.reason,
        "silent_since": agent.silent_since,
        "instance_id": agent.instance_id,
        "error": agent.error_code,
    })
}

/// The evidence as it goes into the event and into `explain`: what was known, not what was concluded.
#[must_use]
pub fn evidence(facts: &Facts, limits: &Limits, entry: Option<&AgentEntry>, now: Timestamp) -> Value {
    let age = |at: Timestamp| now.since_ms(at);
    let listing = match facts.listing {
        Listing::Unknown => json!({"state": "unknown"}),
        Listing::Listed { at, rose_at, .. } => {
            json!({"state": "listed", "list_age_ms": age(at), "progress_rose_ms_ago": rose_at.map(age)})
        }
        Listing::Unlisted { since, first, times } => {
            json!({"state": "unlisted", "since": since, "lists_in_a_row": times, "first_missing_at": first})
        }
    };
    let standing = match facts.standing {
        Standing::Alive => json!({"state": "alive"}),
        Standing::Silent { since } => json!({"state": "silent", "since": since}),
        Standing::Superseded { since } => json!({"state": "superseded", "since": since}),
        Standing::Gone { since, by } => json!({"state": "gone", "since": since, "by": by.as_str()}),
    };
    json!({
        "dispatched_at": facts.dispatched_at,
        "deadline": facts.deadline,
        "started": facts.started,
        "agent": entry.map(|e| agent_evidence(&e.agent)),
        "instance": standing,
        "heartbeats": {
            "last_age_ms": facts.channel.last_at.map(age),
            "interval_ms": facts.channel.interval_ms,
            "silent_at": facts.silent_at(limits),
            "said_gone": facts.channel.said_gone,
        },
        "list": listing,
        "asked_directly": edge_in_words(facts.edge),
        "terminate": match (facts.asked, facts.promise) {
            (_, Promise::Ended) | (Asked::Confirmed, _) => "confirmed",
            (_, Promise::NotRunning) | (Asked::NotRunning { .. }, _) => "not running",
            (_, Promise::NoAnswer) | (Asked::Unconfirmed { .. }, _) => "not confirmed",
            (Asked::No, Promise::Unasked) => "not asked",
        },
        "report_waiting": match facts.waiting {
            Waiting::Unasked => "not looked at",
            Waiting::Nothing => "none",
            Waiting::Withholds(outcome) | Waiting::Confirms(outcome) => outcome.as_str(),
        },
        "sight_since": facts.sight_since,
        "canary": facts.canary,
        "suspended": facts.suspended,
    })
}

const fn edge_in_words(edge: Edge) -> &'static str {
    match edge {
        Edge::Unasked => "not asked",
        Edge::Lists => "lists it",
        Edge::ListsNot { .. } => "does not list it",
        Edge::NoResponders => "no responders",
        Edge::NoAnswer => "no answer",
        Edge::Void => "could not be asked",
    }
}

/// What waits on the report subject of `attempt`, by its last message.
#[must_use]
pub const fn waiting(attempt: u32, last: Option<(u32, Outcome)>) -> Waiting {
    match last {
        Some((named, outcome)) if named == attempt => match outcome {
            Outcome::Completed | Outcome::Failed | Outcome::Returned => Waiting::Withholds(outcome),
            Outcome::Terminated | Outcome::Cancelled => Waiting::Confirms(outcome),
        },
        _ => Waiting::Nothing,
    }
}

/// The loss that a finding establishes.
#[must_use]
pub fn loss(
    execution: &Execution,
    held: &Attempt,
    finding: &Finding,
    facts: &Facts,
    evidence: Value,
    now: Timestamp,
) -> Loss {
    Loss {
        attempt: execution.attempt,
        reason: finding.reason,
        terminate: finding.terminate,
        detected_after_ms: now.since_ms(finding.true_at),
        evidence,
        message: message(held, finding, facts, now),
        returned: false,
        checkpoint: None,
    }
}

fn message(held: &Attempt, finding: &Finding, facts: &Facts, now: Timestamp) -> String {
    let (agent, instance) = (&held.agent_id, &held.instance_id);
    let ending = match finding.terminate {
        TerminateOutcome::Confirmed => "the agent confirmed its end",
        TerminateOutcome::NotRunning => "the agent says that it is not running",
        TerminateOutcome::NotAttempted => "there was nobody to ask to end it",
        TerminateOutcome::Failed => "its end was never confirmed",
    };
    match finding.reason {
        RecoveryReason::Orphaned => {
            format!("agent {agent} is alive and no longer holds it: missing on its lists in a row, {ending}")
        }
        RecoveryReason::DispatchLost => {
            format!("agent {agent} is alive and never took it: dispatched, not started, not on its lists")
        }
        RecoveryReason::TimedOut => {
            format!("its time of {} ms on agent {agent} was up, {ending}", held.timeout_ms)
        }
        RecoveryReason::Stalled => format!(
            "its progress on agent {agent} stood still for {} ms, {ending}",
            facts.stall_timeout_ms.unwrap_or_default()
        ),
        RecoveryReason::AgentLost => {
            let since = match facts.standing {
                Standing::Silent { since } => now.since_ms(since),
                _ => now.since_ms(finding.true_at),
            };
            format!("agent {agent} has been silent for {since} ms and does not answer")
        }
        RecoveryReason::AgentRestarted => {
            format!("agent {agent} runs as a new instance, {instance} that held it is away")
        }
        RecoveryReason::AgentGone => format!("agent {agent} said goodbye or was forgotten while it held it"),
        RecoveryReason::Stale => {
            format!("nothing settled it within the safety net after it fell due on agent {agent}, {ending}")
        }
    }
}
