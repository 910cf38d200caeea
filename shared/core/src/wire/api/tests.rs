use serde_json::{Value, json};

use super::*;
use crate::{
    execution::Execution,
    samples,
    wire::{DispatchRequest, Goodbye, GoodbyeReason, Heartbeat, Report, TerminateState},
};

fn read(value: &Value) -> Result<SubmitRequest, ApiError> {
    SubmitRequest::read(&serde_json::to_vec(value).unwrap())
}

#[test]
fn an_error_names_the_field_and_a_list_is_no_object() {
    let refused = read(&json!({"pool": "default", "timeout_ms": "x"})).unwrap_err();
    assert_eq!(refused.code, ErrorCode::BadRequest);
    let said = &refused.message;
    assert!(said.starts_with(r#"submit: timeout_ms: invalid type: string "x", expected u64"#), "{said}");
    let deep =
        read(&json!({"pool": "default", "labels": {"zone": 1}, "input": {"any": ["thing"]}})).unwrap_err();
    assert!(deep.message.starts_with("submit: labels.zone: invalid type"), "{deep:?}");
    let id = read(&json!({"agent_id": "a.b"})).unwrap_err();
    assert_eq!(id.code, ErrorCode::InvalidId);
    assert!(id.message.starts_with("submit: agent_id: "), "{id:?}");
    let cut = SubmitRequest::read(b"{\"pool\": ").unwrap_err();
    assert!(cut.message.starts_with("submit: ") && cut.code == ErrorCode::BadRequest, "{cut:?}");

    let refused = |error: ApiError, what: &str| {
        assert_eq!(
            (error.code, error.message),
            (ErrorCode::BadRequest, format!("{what}: not a JSON object"))
        );
    };
    refused(crate::wire::read_object::<ExecutionRequest>("explain", b" [\"x\"]").unwrap_err(), "explain");
    refused(SubmitRequest::read(b"[]").unwrap_err(), "submit");
    refused(Heartbeat::read("a", br#"["i", 1, "ready", 1, []]"#).unwrap_err(), "heartbeat");
    refused(
        Report::read(&samples::agent(), &samples::execution(), br#"["i", 1, "completed"]"#).unwrap_err(),
        "report",
    );
    let spaced =
        crate::wire::read_object::<ExecutionRequest>("explain", b" \n{\"execution_id\": \"x\"}").unwrap();
    assert_eq!(spaced.execution_id.as_str(), "x");
}

#[test]
fn the_contracts_submission_is_read_whole() {
    let request = read(&json!({
        "execution_id": "e-1", "agent_id": "agent-7", "input": {"b": 1, "a": [2]},
        "timeout_ms": 900_000, "priority": 5, "queue_ttl_ms": 86_400_000, "on_loss": "fail",
        "max_attempts": 3, "stall_timeout_ms": null, "lost_after_ms": null, "delivery": "push",
        "labels": {}, "something_new": true
    }))
    .unwrap();
    assert_eq!(request.execution_id.unwrap().as_str(), "e-1");
    assert_eq!((request.priority, request.on_loss), (Some(5), Some(OnLoss::Fail)));
    assert_eq!((request.stall_timeout_ms, request.delivery), (None, Some(Delivery::Push)));
    let nulls = read(&json!({"pool": "default", "labels": null, "input": null, "priority": null})).unwrap();
    assert!(nulls.labels.is_empty() && nulls.priority.is_none());
    let smallest = read(&json!({"pool": "default"})).unwrap();
    assert!(smallest.input.is_none() && smallest.execution_id.is_none());
}

#[test]
fn an_input_is_carried_as_it_came() {
    let text = r#"{"pool":"p","input":{"z": 1.50, "a":  [1e3, "ä"]}}"#;
    let request = SubmitRequest::read(text.as_bytes()).unwrap();
    assert_eq!(request.input.unwrap().get(), r#"{"z": 1.50, "a":  [1e3, "ä"]}"#);
}

#[test]
fn a_wrong_submission_is_refused_by_name() {
    for (value, code, names) in [
        (json!({}), "bad_request", "agent_id or a pool"),
        (json!({"pool": "p", "agent_id": "a"}), "bad_request", "not both"),
        (json!({"pool": "p", "priority": 10}), "bad_request", "priority is 10"),
        (json!({"pool": "p", "priority": -1}), "bad_request", "-1"),
        (json!({"pool": "p", "max_attempts": 0}), "bad_request", "max_attempts"),
        (json!({"pool": "p", "timeout_ms": 0}), "bad_request", "timeout_ms"),
        (json!({"pool": "p", "queue_ttl_ms": DURATION_MS_MAX + 1}), "bad_request", "queue_ttl_ms"),
        (json!({"pool": "p", "stall_timeout_ms": 0}), "bad_request", "stall_timeout_ms"),
        (json!({"pool": "p", "lost_after_ms": u64::MAX}), "bad_request", "lost_after_ms"),
        (json!({"pool": "p", "on_loss": "shrug"}), "bad_request", "shrug"),
        (json!({"pool": "p", "delivery": "pigeon"}), "bad_request", "pigeon"),
        (json!({"pool": "p.q"}), "invalid_id", "pool"),
        (json!({"agent_id": "*"}), "invalid_id", "agent_id"),
        (json!({"pool": "p", "execution_id": ""}), "invalid_id", "execution_id"),
        (json!([]), "bad_request", "submit"),
    ] {
        let error = read(&value).expect_err(&value.to_string());
        assert_eq!(error.code.as_str(), code, "{value}: {error}");
        assert!(error.message.contains(names), "{value}: {error}");
        assert_eq!(error.retry_after_ms, None);
    }
    for (value, ok) in [
        (json!({"pool": "p", "priority": 9, "timeout_ms": 1, "max_attempts": 1}), true),
        (json!({"pool": "p", "priority": 0, "timeout_ms": DURATION_MS_MAX}), true),
    ] {
        assert_eq!(read(&value).is_ok(), ok, "{value}");
    }
    let error = SubmitRequest::read(b"{nope").unwrap_err();
    assert_eq!(error.code, ErrorCode::BadRequest);
    let big = vec![b' '; REQUEST_BYTES_MAX + 1];
    let error = SubmitRequest::read(&big).unwrap_err();
    assert_eq!(error.code, ErrorCode::TooLarge);
    assert!(error.message.contains("524289"), "{error}");
    assert_eq!(SubmitRequest::read(&big[1..]).unwrap_err().code, ErrorCode::BadRequest);
}

#[test]
fn an_error_never_repeats_more_than_a_little_of_what_came() {
    let error = read(&json!({"pool": "*".repeat(100_000)})).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidId);
    assert!(error.message.len() < 300, "{}", error.message.len());
}

#[test]
fn an_error_is_written_as_in_the_contract() {
    let error = ApiError::retry_after(ErrorCode::QueueFull, "full", 5000);
    assert_eq!(
        serde_json::to_value(&error).unwrap(),
        json!({"code": "queue_full", "message": "full", "retry_after_ms": 5000})
    );
    let plain = ApiError::new(ErrorCode::NotFound, "no such execution");
    assert_eq!(
        serde_json::to_value(&plain).unwrap(),
        json!({"code": "not_found", "message": "no such execution"})
    );
    let codes: Vec<_> = [
        ErrorCode::BadRequest,
        ErrorCode::InvalidId,
        ErrorCode::TooLarge,
        ErrorCode::NotFound,
        ErrorCode::AlreadyExists,
        ErrorCode::UnknownAgent,
        ErrorCode::QueueFull,
        ErrorCode::Conflict,
        ErrorCode::NotReady,
        ErrorCode::Unavailable,
        ErrorCode::Forbidden,
    ]
    .into_iter()
    .inspect(|code| assert_eq!(serde_json::to_value(code).unwrap(), code.as_str()))
    .map(ErrorCode::as_str)
    .collect();
    assert_eq!(
        codes.join(" "),
        "bad_request invalid_id too_large not_found already_exists unknown_agent queue_full conflict not_ready \
         unavailable forbidden"
    );
}

#[test]
fn every_state_is_written_as_in_the_contract() {
    let states: Vec<_> = State::ALL
        .into_iter()
        .inspect(|state| assert_eq!(serde_json::to_value(state).unwrap(), state.as_str()))
        .map(State::as_str)
        .collect();
    assert_eq!(
        states.join(" "),
        "queued dispatching running cancelling completed failed cancelled expired quarantined"
    );
}

#[test]
fn the_answer_to_a_submission_says_only_what_there_is() {
    let running = ExecutionReply {
        execution_id: samples::execution(),
        state: State::Running,
        agent_id: Some(samples::agent()),
        attempt: 1,
        position: None,
    };
    assert_eq!(
        serde_json::to_value(&running).unwrap(),
        json!({"execution_id": "01JABC", "state": "running", "agent_id": "agent-7", "attempt": 1})
    );
    let waiting = ExecutionReply { state: State::Queued, agent_id: None, position: Some(1), ..running };
    assert_eq!(
        serde_json::to_value(&waiting).unwrap(),
        json!({"execution_id": "01JABC", "state": "queued", "attempt": 1, "position": 1})
    );
}

#[test]
fn a_view_tells_what_was_submitted_and_where_it_stands() {
    let execution = Execution::submitted(samples::submitted(), 12, samples::at());
    let view = serde_json::to_value(execution.view()).unwrap();
    assert_eq!(
        view,
        json!({
            "execution_id": "01JABC", "state": "queued", "attempt": 1, "agent_id": "agent-7",
            "pool": "default", "priority": 5, "on_loss": "requeue", "losses": 0,
            "submitted_at": "2026-11-22T03:04:05.678Z", "labels": {"team": "blue", "zone": "b"}, "seq": 12
        })
    );
}

/// No zone, a number, nothing, whatever: nobody loses finished work or a heartbeat over a time that nobody needs.
#[test]
fn a_time_that_nothing_hangs_on_costs_nothing() {
    for time in [
        json!("2026-11-22T03:04:05.678"),
        json!("now"),
        json!(1_795_000_000),
        json!(null),
        json!({"at": [1]}),
    ] {
        let report = json!({"instance_id": "i", "attempt": 1, "outcome": "completed", "result": 1, "finished_at": time});
        let report =
            Report::read(&samples::agent(), &samples::execution(), report.to_string().as_bytes()).unwrap();
        assert_eq!((report.outcome, report.finished_at), (Outcome::Completed, None), "{time}");
        let beat = json!({"instance_id": "i", "seq": 1, "state": "ready", "capacity": 1, "executions": [], "sent_at": time});
        let beat = beat.to_string();
        assert_eq!(Heartbeat::read("a", beat.as_bytes()).unwrap().sent_at, None, "{time}");
    }
}

#[test]
fn the_contracts_other_examples_are_read() {
    let beat = r#"{
        "instance_id": "0199b2c4", "seq": 42, "state": "ready", "capacity": 4,
        "executions": [{"id": "01J", "attempt": 1, "progress": 17}], "interval_ms": 5000, "pool": "default",
        "timeout_ms": 900000, "reason": "sigterm", "version": "1.4.2", "labels": {"zone": "b"},
        "probe": {"kind": "http", "url": "http://10.0.0.7:8080/health"},
        "control": {"kind": "http", "url": "http://10.0.0.7:8080"}, "sent_at": "2026-11-22T03:04:05.678Z"}"#;
    let beat = Heartbeat::read("agent-7", beat.as_bytes()).unwrap();
    assert_eq!(beat.executions[0].progress, Some(17.0));
    assert_eq!(beat.extras().unwrap().control.unwrap().url, "http://10.0.0.7:8080");
    let read = |bytes: &[u8]| Report::read(&samples::agent(), &samples::execution(), bytes);
    let report = read(
        br#"{"instance_id": "i", "attempt": 1, "outcome": "completed", "result": {},
             "error": {"code": "c", "message": "m"}, "finished_at": "2026-11-22T03:04:05.678Z"}"#,
    )
    .unwrap();
    assert_eq!((report.outcome, report.result.unwrap().get()), (Outcome::Completed, "{}"));
    assert_eq!(report.finished_at, Some(samples::at()));
    assert_eq!(beat.sent_at, Some(samples::at()));
    assert_eq!(read(&vec![b' '; REQUEST_BYTES_MAX + 1]).unwrap_err().code, ErrorCode::TooLarge);
    assert_eq!(
        read(br#"{"instance_id":"i.j","attempt":1,"outcome":"failed"}"#).unwrap_err().code,
        ErrorCode::InvalidId
    );
    let named = |agent: &str, execution: &str| {
        let report = json!({"agent_id": agent, "execution_id": execution, "instance_id": "i", "attempt": 1,
            "outcome": "failed"});
        read(report.to_string().as_bytes()).map(|report| report.attempt).map_err(|error| error.code)
    };
    let (agent, execution) = (samples::agent(), samples::execution());
    assert_eq!(named(agent.as_str(), execution.as_str()), Ok(1));
    assert_eq!(named("other", execution.as_str()), Err(ErrorCode::BadRequest));
    assert_eq!(named(agent.as_str(), "other"), Err(ErrorCode::BadRequest));
    assert_eq!(named("o.ther", execution.as_str()), Err(ErrorCode::InvalidId));
    let goodbye: Goodbye =
        serde_json::from_value(json!({"reason": "superseded", "deadline_ms": 1000})).unwrap();
    assert_eq!((goodbye.reason, goodbye.in_flight), (GoodbyeReason::Superseded, InFlight::Finish));
    for reason in [json!("of a later version"), Value::Null] {
        let goodbye: Goodbye =
            serde_json::from_value(json!({"reason": reason, "deadline_ms": 1000})).unwrap();
        assert_eq!(goodbye.reason, GoodbyeReason::Unknown);
    }
    let dispatch = DispatchRequest {
        execution_id: samples::execution(),
        attempt: 1,
        timeout_ms: 1,
        deadline: samples::at(),
        input: samples::raw("{}"),
        checkpoint: None,
    };
    assert_eq!(
        serde_json::to_value(&dispatch).unwrap(),
        json!({"execution_id": "01JABC", "attempt": 1, "timeout_ms": 1,
               "deadline": "2026-11-22T03:04:05.678Z", "input": {}})
    );
    for (state, name) in [
        (TerminateState::Terminated, "terminated"),
        (TerminateState::NotRunning, "not_running"),
        (TerminateState::StillRunning, "still_running"),
    ] {
        assert_eq!(serde_json::to_value(state).unwrap(), name);
    }
}
