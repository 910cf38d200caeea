//! Agents as callers see them.

use rollcall_core::Timestamp;
use rollcall_core::agent::{Drain, Status};
use rollcall_core::event::Profile;
use serde::Serialize;
use serde_json::{Value, json};

use crate::config::Policy;
use crate::state::{Entry, FALL, interval_ms};

/// `agent` and the rows of `agents`.
#[derive(Debug, Clone, Serialize)]
pub struct AgentView {
    /// Its id.
    pub agent_id: String,
    /// Its status.
    pub status: Option<Status>,
    /// The instance that counts.
    pub instance_id: Option<String>,
    /// Executions it can hold at once.
    pub capacity: u32,
    /// Its pool.
    pub pool: String,
    /// Since when the status is so.
    pub since: Timestamp,
    /// Why.
    pub reason: String,
    /// The status before.
    pub previous: Option<Status>,
    /// With status `error`: `{code, message, since}`. Not called `error` on the wire, as that is what errors have.
    #[serde(rename = "failure", skip_serializing_if = "Option::is_none")]
    pub error: Option<Value>,
    /// `{by, reason, since, deadline?, in_flight?}`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draining: Option<Value>,
    /// Why it gets no work though it may be well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quarantined: Option<String>,
    /// Its status falls and rises too often.
    pub flapping: bool,
    /// While it is flapping: what its falls weigh, 1 for a fresh one; it is settled below 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub penalty: Option<f64>,
    /// Its labels.
    pub labels: Value,
    /// Its version.
    pub version: Option<String>,
    /// When its heartbeats are expected.
    pub interval_ms: u64,
    /// Age of its last heartbeat; null: none since the prober started.
    pub last_heartbeat_age_ms: Option<u64>,
    /// Heartbeats that failed to come, in a row.
    pub failures_in_a_row: u32,
    /// Heartbeats that came, in a row.
    pub successes_in_a_row: u32,
    /// `{kind, url, last_result, checked_at, latency_ms}`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<Value>,
    /// `{kind, url, driven}`: where it wants to be driven, and whether that is a kind that anybody speaks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<Value>,
    /// Executions in its last heartbeat.
    pub executions: u32,
}

impl AgentView {
    /// The agent now.
    #[must_use]
    pub fn new(entry: &Entry, policy: &Policy, now: Timestamp) -> Self {
        let (known, live) = (&entry.known, &entry.live);
        let agent = &known.agent;
        let profile: Option<&Profile> = agent.profile.as_ref();
        let drain = |by: &str, drain: &Drain| {
            let mut view = json!({ "by": by, "reason": drain.reason, "since": drain.since });
            if let Some(deadline) = drain.deadline {
                view["deadline"] = json!(deadline);
            }
            view
        };
        // A channel without heartbeats counts its probe instead.
        let probe_channel = live.probe.as_ref().map(|probe| probe.channel);
        let channel = if known.beats() { live.beat } else { probe_channel.unwrap_or_default() };
        Self {
            agent_id: agent.id.as_str().to_owned(),
            status: agent.status,
            instance_id: agent.instance_id.as_ref().map(|id| id.as_str().to_owned()),
            capacity: agent.capacity(),
            pool: agent.pool().as_str().to_owned(),
            since: agent.since,
            reason: agent.reason.clone(),
            previous: agent.previous,
            error: (agent.status == Some(Status::Error)).then(|| {
                json!({
                    "code": agent.error_code,
                    "message": agent.error_message,
                    "since": agent.silent_since.unwrap_or(agent.since),
                })
            }),
            draining: agent
                .operator_drain
                .as_ref()
                .map(|wish| {
                    let mut view = drain("operator", wish);
                    if let Some(in_flight) = known.drain_in_flight() {
                        view["in_flight"] = json!(in_flight);
                    }
                    view
                })
                .or_else(|| agent.instance_drain.as_ref().map(|wish| drain("instance", wish))),
            quarantined: agent.quarantined.clone(),
            flapping: agent.flapping,
            penalty: agent.flapping.then(|| f64::from(known.penalty(now)) / f64::from(FALL)),
            labels: json!(agent.labels().cloned().unwrap_or_default()),
            version: profile.and_then(|profile| profile.version.clone()),
            interval_ms: interval_ms(known, live, policy),
            last_heartbeat_age_ms: live.heard_at.map(|heard| now.since_ms(heard)),
            failures_in_a_row: channel.fails,
            successes_in_a_row: channel.goods,
            probe: live.probe.as_deref().map(|probe| {
                json!({
                    "kind": probe.endpoint.kind,
                    "url": probe.endpoint.url,
                    "last_result": probe.result,
                    "checked_at": probe.checked_at,
                    "latency_ms": probe.latency_ms,
                })
            }),
            control: profile.and_then(|profile| profile.control.as_ref()).map(
                |control| json!({ "kind": control.kind, "url": control.url, "driven": control.is_driven() }),
            ),
            executions: live.executions,
        }
    }
}
