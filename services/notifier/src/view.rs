//! What the API shows of the read model.

use std::collections::BTreeMap;

use rollcall_core::{
    AgentId, InstanceId, Pool, Timestamp,
    agent::{Agent, Status},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::state::{Model, reasons};

/// An agent. What only its heartbeats tell is null here: the health-prober knows it.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AgentView {
    /// The agent.
    #[schema(value_type = String, example = "agent-7")]
    pub agent_id: AgentId,
    /// Its status; null between its registration and its first status event.
    #[schema(value_type = Option<String>, example = "connected")]
    pub status: Option<Status>,
    /// The instance that counts.
    #[schema(value_type = Option<String>)]
    pub instance_id: Option<InstanceId>,
    /// Executions it can hold at once.
    pub capacity: u32,
    /// Its pool.
    #[schema(value_type = String, example = "default")]
    pub pool: Pool,
    /// Since when it has this status.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Why, in a word or two.
    pub reason: String,
    /// The status before.
    #[schema(value_type = Option<String>)]
    pub previous: Option<Status>,
    /// With status `error`.
    #[serde(rename = "failure", skip_serializing_if = "Option::is_none")]
    pub error: Option<AgentErrorView>,
    /// Somebody wants it to drain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draining: Option<DrainView>,
    /// Why it is given no work, when it lost too much of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quarantined: Option<String>,
    /// Its status falls and rises too often.
    pub flapping: bool,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its version.
    pub version: Option<String>,
    /// When to expect its heartbeats, in milliseconds; null: the fleet's setting.
    pub interval_ms: Option<u64>,
    /// Not known here.
    pub last_heartbeat_age_ms: Option<u64>,
    /// Not known here.
    pub failures_in_a_row: Option<u32>,
    /// Not known here.
    pub successes_in_a_row: Option<u32>,
    /// Where it wants to be probed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<ProbeView>,
    /// Executions that hold a slot of it.
    pub executions: u32,
    /// Sequence in the log of its last event.
    pub seq: u64,
}

/// Why an agent is in error.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AgentErrorView {
    /// `unreachable`, `auth`, `tls`, `protocol`, `identity`.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
}

/// A wish to drain.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct DrainView {
    /// `operator` or `instance`.
    pub by: String,
    /// Why.
    pub reason: String,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// By when.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub deadline: Option<Timestamp>,
}

/// Where an agent wants to be probed; results are with the health-prober.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ProbeView {
    /// `http`, `tcp`, `nats` ...
    pub kind: String,
    /// Where.
    pub url: Option<String>,
}

impl ProbeView {
    fn of(probe: &rollcall_core::wire::Endpoint) -> Self {
        Self { kind: probe.kind.clone(), url: Some(probe.url.clone()).filter(|url| !url.is_empty()) }
    }
}

impl AgentView {
    /// The view of an agent that holds so many executions.
    #[must_use]
    pub fn of(agent: &Agent, executions: u32) -> Self {
        let profile = agent.profile.as_ref();
        let drain = agent.operator_drain.as_ref().map(|drain| ("operator", drain));
        let drain = drain.or_else(|| agent.instance_drain.as_ref().map(|drain| ("instance", drain)));
        Self {
            agent_id: agent.id.clone(),
            status: agent.status,
            instance_id: agent.instance_id.clone(),
            capacity: agent.capacity(),
            pool: agent.pool(),
            // Registered and nothing more.
            since: if agent.status.is_some() {
                agent.since
            } else {
                agent.registered_at.unwrap_or(agent.since)
            },
            reason: agent.reason.clone(),
            previous: agent.previous,
            error: (agent.status == Some(Status::Error)).then(|| AgentErrorView {
                code: agent.error_code.clone().unwrap_or_else(|| "unreachable".to_owned()),
                message: agent.error_message.clone().unwrap_or_default(),
                since: agent.since,
            }),
            draining: drain.map(|(by, drain)| DrainView {
                by: by.to_owned(),
                reason: drain.reason.clone(),
                since: drain.since,
                deadline: drain.deadline,
            }),
            quarantined: agent.quarantined.clone(),
            flapping: agent.flapping,
            labels: agent.labels().cloned().unwrap_or_default(),
            version: profile.and_then(|p| p.version.clone()),
            interval_ms: profile.and_then(|p| p.interval_ms),
            last_heartbeat_age_ms: None,
            failures_in_a_row: None,
            successes_in_a_row: None,
            probe: profile.and_then(|p| p.probe.as_ref()).map(ProbeView::of),
            executions,
            seq: agent.seq,
        }
    }
}

/// The fleet in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Summary {
    /// Agents.
    pub agents: AgentsSummary,
    /// Executions.
    pub executions: ExecutionsSummary,
    /// Recoveries since the log began.
    pub recoveries: RecoveriesSummary,
    /// The log as far as it is in these numbers.
    pub log: LogSummary,
}

/// Agents in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AgentsSummary {
    /// All that were ever heard of.
    pub total: u64,
    /// By status.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub by_status: BTreeMap<&'static str, u64>,
    /// Those whose status falls and rises too often.
    pub flapping: u64,
    /// Those that are given no work because they lost too much of it.
    pub quarantined: u64,
    /// Slots of the agents that take work now.
    pub capacity: u64,
    /// Executions that hold a slot.
    pub held: u64,
}

/// Executions in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ExecutionsSummary {
    /// All that were ever submitted.
    pub total: u64,
    /// By state.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub by_state: BTreeMap<&'static str, u64>,
    /// Ended ones that lists no longer show; they are found by their id.
    pub forgotten: u64,
}

/// Recoveries in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RecoveriesSummary {
    /// All of them.
    pub total: u64,
    /// By reason.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub by_reason: BTreeMap<&'static str, u64>,
    /// By what became of the execution.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub by_action: BTreeMap<&'static str, u64>,
    /// Executions that completed after they had been recovered.
    pub late_completions: u64,
}

/// The log as far as it was read.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct LogSummary {
    /// Sequence of the last entry read: pass it as `after` to follow from here.
    pub seq: u64,
    /// Time of the last event.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_event_at: Option<Timestamp>,
    /// False: the log can't be reached now, these numbers may be old.
    pub connected: bool,
}

impl Summary {
    /// The summary of a model that was read up to `head`.
    #[must_use]
    pub fn of(model: &Model, head: u64, connected: bool) -> Self {
        let by_state = model.states();
        let recoveries = model.recoveries();
        let mut by_reason: BTreeMap<_, _> = reasons().into_iter().map(|reason| (reason, 0)).collect();
        by_reason.extend(&recoveries.by_reason);
        let mut agents = AgentsSummary {
            total: 0,
            by_status: model.statuses(),
            flapping: 0,
            quarantined: 0,
            capacity: 0,
            held: model.held_in_all(),
        };
        for agent in model.agents() {
            agents.total += 1;
            agents.flapping += u64::from(agent.flapping);
            agents.quarantined += u64::from(agent.quarantined.is_some());
            agents.capacity += u64::from(if agent.takes_work() { agent.capacity() } else { 0 });
        }
        Self {
            agents,
            executions: ExecutionsSummary {
                total: by_state.values().sum(),
                by_state,
                forgotten: model.forgotten(),
            },
            recoveries: RecoveriesSummary {
                total: recoveries.total(),
                by_reason,
                by_action: recoveries.by_action.clone(),
                late_completions: recoveries.late_completions,
            },
            log: LogSummary { seq: head, last_event_at: model.last().map(|(_, time)| time), connected },
        }
    }
}
