//! Events for tests: the smallest that are valid.

use std::sync::LazyLock;

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Pool, Timestamp,
    agent::Status,
    event::{
        AgentEvent, Completed, Dispatched, Event, EventBody, ExecutionEvent, PayloadRef, Profile, Recovered,
        RecoveryAction, RecoveryReason, Retried, Started, StatusChanged, Submitted, SystemEvent,
        SystemEventKind, TerminateOutcome,
    },
    subject::Subjects,
    wire::{Delivery, OnLoss},
};
use uuid::Uuid;

/// The subjects of the default fleet.
pub(crate) static FLEET: LazyLock<Subjects> = LazyLock::new(Subjects::default);

/// The instant at which everything in tests happens.
pub(crate) const NOW: Timestamp = Timestamp::from_millis(1_795_000_000_000);

/// Wraps a body.
pub(crate) fn event(subject: &str, body: impl Into<EventBody>) -> Event {
    Event {
        id: Uuid::now_v7(),
        source: "/rollcall/test/1".into(),
        subject: subject.into(),
        time: NOW,
        body: body.into(),
    }
}

fn execution(id: &str) -> ExecutionId {
    ExecutionId::new(id).unwrap()
}

/// An agent's id.
pub(crate) fn agent_id(id: &str) -> AgentId {
    AgentId::new(id).unwrap()
}

fn instance(agent: &str) -> InstanceId {
    InstanceId::new(&format!("{agent}-i1")).unwrap()
}

/// `execution.submitted`
pub(crate) fn submitted(id: &str, agent: Option<&str>) -> Event {
    let body: ExecutionEvent = Submitted {
        execution_id: execution(id),
        attempt: 1,
        agent_id: agent.map(agent_id),
        pool: Pool::default(),
        input: PayloadRef { bytes: 4, sha256: "00".into(), seq: 1, attempt: 1 },
        timeout_ms: Some(1000),
        priority: 5,
        queue_ttl_ms: 1000,
        on_loss: OnLoss::Fail,
        max_attempts: 3,
        stall_timeout_ms: None,
        lost_after_ms: None,
        delivery: Delivery::Push,
        labels: [("team".to_owned(), "blue".to_owned())].into(),
        request_sha256: "00".into(),
    }
    .into();
    event(id, body)
}

/// `execution.dispatched`
pub(crate) fn dispatched(id: &str, agent: &str, attempt: u32) -> Event {
    let body: ExecutionEvent = Dispatched {
        execution_id: execution(id),
        attempt,
        agent_id: agent_id(agent),
        instance_id: instance(agent),
        deadline: NOW.plus_ms(1000),
        timeout_ms: 1000,
    }
    .into();
    event(id, body)
}

/// `execution.started`
pub(crate) fn started(id: &str, agent: &str, attempt: u32) -> Event {
    let body: ExecutionEvent = Started {
        execution_id: execution(id),
        attempt,
        agent_id: agent_id(agent),
        instance_id: instance(agent),
    }
    .into();
    event(id, body)
}

/// `execution.completed`
pub(crate) fn completed(id: &str, agent: &str, attempt: u32, late: bool) -> Event {
    let body: ExecutionEvent = Completed {
        execution_id: execution(id),
        attempt,
        agent_id: Some(agent_id(agent)),
        instance_id: Some(instance(agent)),
        result: None,
        late,
    }
    .into();
    event(id, body)
}

/// `execution.recovered`, failed
pub(crate) fn recovered(id: &str, agent: &str, attempt: u32) -> Event {
    let body: ExecutionEvent = Recovered {
        execution_id: execution(id),
        attempt,
        agent_id: agent_id(agent),
        instance_id: instance(agent),
        reason: RecoveryReason::Orphaned,
        action: RecoveryAction::Failed,
        next_attempt: None,
        terminate: TerminateOutcome::NotRunning,
        detected_after_ms: 812,
        evidence: serde_json::json!({"heartbeats": 2}),
        message: "its agent is alive and does not know it".into(),
        returned: false,
        checkpoint: None,
    }
    .into();
    event(id, body)
}

/// `execution.retried`
pub(crate) fn retried(id: &str, attempt: u32) -> Event {
    let body: ExecutionEvent = Retried { execution_id: execution(id), attempt, by: "operator".into() }.into();
    event(id, body)
}

/// `agent.registered`
pub(crate) fn registered(agent: &str, pool: &str) -> Event {
    let profile = Profile {
        agent_id: agent_id(agent),
        instance_id: instance(agent),
        capacity: 4,
        pool: Pool::new(pool).unwrap(),
        interval_ms: Some(5000),
        timeout_ms: None,
        version: Some("1.4.2".into()),
        labels: [("zone".to_owned(), "b".to_owned())].into(),
        probe: None,
        control: None,
    };
    event(agent, EventBody::Agent(AgentEvent::Registered(profile)))
}

/// An agent's status event.
pub(crate) fn status(agent: &str, status: Status, previous: Option<Status>) -> Event {
    let change = StatusChanged {
        agent_id: agent_id(agent),
        instance_id: Some(instance(agent)),
        previous,
        reason: "missed_heartbeats".into(),
        since: NOW,
        evidence: serde_json::json!({}),
        by: None,
        code: (status == Status::Error).then(|| "unreachable".into()),
        message: (status == Status::Error).then(|| "no heartbeat for 3 intervals".into()),
        deadline: None,
        undrained: false,
    };
    event(agent, EventBody::Agent(AgentEvent::status(status, change)))
}

/// `system.recovery_suspended` of a service
pub(crate) fn system(service: &str, data: serde_json::Value) -> Event {
    let body = SystemEvent { kind: SystemEventKind::RecoverySuspended, data };
    event(service, EventBody::System(body))
}
