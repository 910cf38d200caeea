//! One value of every type that travels, with every optional field filled in. Struct literals without a rest
//! pattern on purpose: a new field does not compile until it is here, and what uses these then checks it.

use std::collections::BTreeMap;

use serde_json::{json, value::RawValue};
use uuid::Uuid;

use crate::{
    agent::Status,
    event::*,
    ids::{AgentId, ExecutionId, InstanceId, Pool},
    time::Timestamp,
    wire::*,
};

pub(crate) fn agent() -> AgentId {
    AgentId::new("agent-7").unwrap()
}

pub(crate) fn instance() -> InstanceId {
    InstanceId::new("0199b2c4-0000-7000-8000-000000000001").unwrap()
}

pub(crate) fn execution() -> ExecutionId {
    ExecutionId::new("01JABC").unwrap()
}

pub(crate) fn at() -> Timestamp {
    Timestamp::parse("2026-11-22T03:04:05.678Z").unwrap()
}

pub(crate) fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).unwrap()
}

pub(crate) fn payload() -> PayloadRef {
    PayloadRef { bytes: 17, sha256: "ab".repeat(32), seq: 9, attempt: 2 }
}

pub(crate) fn error() -> ErrorBody {
    ErrorBody { code: "oops".into(), message: "it \"broke\"\nbadly \u{2028} \u{e4}".into() }
}

pub(crate) fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([("team".into(), "blue".into()), ("zone".into(), "b".into())])
}

pub(crate) fn endpoint() -> Endpoint {
    Endpoint { kind: "http".into(), url: "http://10.0.0.7:8080/health".into() }
}

pub(crate) fn submitted() -> Submitted {
    Submitted {
        execution_id: execution(),
        attempt: 1,
        agent_id: Some(agent()),
        pool: Pool::default(),
        input: payload(),
        timeout_ms: Some(900_000),
        priority: 5,
        queue_ttl_ms: 86_400_000,
        on_loss: OnLoss::Requeue,
        max_attempts: 3,
        stall_timeout_ms: Some(60_000),
        lost_after_ms: Some(30_000),
        delivery: Delivery::External,
        labels: labels(),
        request_sha256: "cd".repeat(32),
    }
}

pub(crate) fn recovered() -> Recovered {
    Recovered {
        execution_id: execution(),
        attempt: 1,
        agent_id: agent(),
        instance_id: instance(),
        reason: RecoveryReason::Orphaned,
        action: RecoveryAction::Requeued,
        next_attempt: Some(2),
        terminate: TerminateOutcome::Confirmed,
        detected_after_ms: 812,
        evidence: json!({"heartbeats": [{"seq": 7, "listed": false}], "at": null}),
        message: "agent-7 is alive and does not know it".into(),
        returned: true,
        checkpoint: Some(payload()),
    }
}

/// One of every kind of execution event, in the order of [`ExecutionEvent::NAMES`].
pub(crate) fn execution_events() -> Vec<ExecutionEvent> {
    vec![
        submitted().into(),
        Queued {
            execution_id: execution(),
            attempt: 1,
            agent_id: Some(agent()),
            position: 3,
            reason: Some("at_capacity".into()),
        }
        .into(),
        Dispatched {
            execution_id: execution(),
            attempt: 1,
            agent_id: agent(),
            instance_id: instance(),
            deadline: at().plus_ms(900_000),
            timeout_ms: 900_000,
        }
        .into(),
        Started { execution_id: execution(), attempt: 1, agent_id: agent(), instance_id: instance() }.into(),
        CancelRequested {
            execution_id: execution(),
            attempt: 1,
            agent_id: Some(agent()),
            reason: "no longer needed".into(),
            by: "operator".into(),
        }
        .into(),
        Completed {
            execution_id: execution(),
            attempt: 1,
            agent_id: Some(agent()),
            instance_id: Some(instance()),
            result: Some(payload()),
            late: true,
        }
        .into(),
        Failed {
            execution_id: execution(),
            attempt: 1,
            agent_id: Some(agent()),
            instance_id: Some(instance()),
            error: error(),
            outcome: Some(Outcome::Terminated),
        }
        .into(),
        Cancelled {
            execution_id: execution(),
            attempt: 1,
            agent_id: Some(agent()),
            instance_id: Some(instance()),
            reason: "no longer needed".into(),
            confirmed_by: "terminated".into(),
            evidence: Some(json!({"state": "terminated"})),
            outcome: Some(Outcome::Cancelled),
        }
        .into(),
        Expired {
            execution_id: execution(),
            attempt: 1,
            agent_id: Some(agent()),
            waited_ms: 90_000,
            queue_ttl_ms: 60_000,
        }
        .into(),
        recovered().into(),
        Retried { execution_id: execution(), attempt: 2, by: "operator".into() }.into(),
        LateResult {
            execution_id: execution(),
            attempt: 1,
            agent_id: agent(),
            instance_id: instance(),
            outcome: Outcome::Failed,
            result: Some(payload()),
            error: Some(error()),
            because: "attempt 2 counts now".into(),
        }
        .into(),
    ]
}

pub(crate) fn profile() -> Profile {
    Profile {
        agent_id: agent(),
        instance_id: instance(),
        capacity: 4,
        pool: Pool::default(),
        interval_ms: Some(5000),
        timeout_ms: Some(900_000),
        version: Some("1.4.2".into()),
        labels: labels(),
        probe: Some(endpoint()),
        control: Some(endpoint()),
    }
}

pub(crate) fn status_changed() -> StatusChanged {
    StatusChanged {
        agent_id: agent(),
        instance_id: Some(instance()),
        previous: Some(Status::Connected),
        reason: "missed_heartbeats".into(),
        since: at(),
        evidence: json!({"failures_in_a_row": 3}),
        by: Some("operator".into()),
        code: Some("unreachable".into()),
        message: Some("nothing heard for 15 s".into()),
        deadline: Some(at().plus_ms(1)),
        undrained: true,
    }
}

/// One of every kind of agent event, in the order of [`AgentEvent::NAMES`].
pub(crate) fn agent_events() -> Vec<AgentEvent> {
    let mark = || Marked {
        agent_id: agent(),
        instance_id: Some(instance()),
        reason: "4 falls in 5 minutes".into(),
        count: Some(4),
        by: Some("operator".into()),
    };
    vec![
        AgentEvent::Registered(profile()),
        AgentEvent::Updated(profile()),
        AgentEvent::Connected(status_changed()),
        AgentEvent::Degraded(status_changed()),
        AgentEvent::Disconnected(status_changed()),
        AgentEvent::Error(status_changed()),
        AgentEvent::Draining(status_changed()),
        AgentEvent::Gone(status_changed()),
        AgentEvent::Superseded(Superseded {
            agent_id: agent(),
            instance_id: instance(),
            by_instance_id: InstanceId::new("next").unwrap(),
        }),
        AgentEvent::Flapping(mark()),
        AgentEvent::Settled(mark()),
        AgentEvent::Quarantined(mark()),
        AgentEvent::Released(mark()),
    ]
}

/// One of every kind of system event, in the order of [`SystemEventKind::NAMES`].
pub(crate) fn system_events() -> Vec<SystemEvent> {
    SystemEventKind::NAMES
        .iter()
        .map(|name| SystemEvent {
            kind: serde_json::from_value(json!(name)).unwrap(),
            data: json!({"cause": "7 of 9 agents silent", "silent": 7, "of": 9}),
        })
        .collect()
}

/// One of every kind of event there is.
pub(crate) fn events() -> Vec<Event> {
    let wrap = |n: usize, subject: String, body: EventBody| Event {
        id: Uuid::from_u128(0x0199_b2c4_0000_7000_8000_0000_0000_0000 + n as u128),
        source: "/rollcall/watchdog/w-1".into(),
        subject,
        time: at(),
        body,
    };
    let executions = execution_events().into_iter().map(|e| (execution().to_string(), EventBody::from(e)));
    let agents = agent_events().into_iter().map(|e| (agent().to_string(), EventBody::from(e)));
    let system = system_events().into_iter().map(|e| ("watchdog".to_owned(), EventBody::from(e)));
    executions
        .chain(agents)
        .chain(system)
        .enumerate()
        .map(|(n, (subject, body))| wrap(n, subject, body))
        .collect()
}
