use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::samples;

fn value(event: &Event) -> Value {
    serde_json::from_slice(&event.encode()).unwrap()
}

fn decode(value: &Value) -> Result<Event, DecodeError> {
    Event::decode(&serde_json::to_vec(value).unwrap())
}

#[test]
fn there_is_a_sample_of_every_type() {
    let mut types: Vec<_> = samples::events().iter().map(|e| e.body.short_type()).collect();
    let mut names = Vec::new();
    for (family, of_family) in [
        ("execution", ExecutionEvent::NAMES),
        ("agent", AgentEvent::NAMES),
        ("system", SystemEventKind::NAMES),
    ] {
        names.extend(of_family.iter().map(|name| format!("{family}.{name}")));
    }
    names.sort();
    types.sort_unstable();
    assert_eq!(types, names);
}

#[test]
fn the_contract_names_every_type() {
    assert_eq!(
        ExecutionEvent::NAMES,
        [
            "submitted",
            "queued",
            "dispatched",
            "started",
            "cancel_requested",
            "completed",
            "failed",
            "cancelled",
            "expired",
            "recovered",
            "retried",
            "late_result"
        ]
    );
    assert_eq!(
        AgentEvent::NAMES,
        [
            "registered",
            "updated",
            "connected",
            "degraded",
            "disconnected",
            "error",
            "draining",
            "gone",
            "superseded",
            "flapping",
            "settled",
            "quarantined",
            "released"
        ]
    );
    for name in [
        "recovery_suspended",
        "recovery_resumed",
        "recovery_failing",
        "slot_leak_repaired",
        "capacity_rebuilt",
        "log_regressed",
        "invalid_entry",
    ] {
        assert!(SystemEventKind::NAMES.contains(&name), "{name}");
    }
}

#[test]
fn every_event_comes_back_and_its_bytes_stay() {
    for event in samples::events() {
        let bytes = event.encode();
        let read = Event::decode(&bytes).unwrap();
        assert_eq!(read, event, "{}", event.body.short_type());
        assert_eq!(read.encode(), bytes, "{}", event.body.short_type());
    }
}

#[test]
fn every_event_is_one_compact_line() {
    for event in samples::events() {
        let bytes = event.encode();
        let text = std::str::from_utf8(&bytes).unwrap();
        assert!(!text.contains('\n') && !text.contains('\r'), "{text}");
        // Read into a tree and written again without spaces it has the same length: there were none.
        assert_eq!(serde_json::to_string(&value(&event)).unwrap().len(), text.len(), "{text}");
    }
}

#[test]
fn the_envelope_is_the_one_of_the_contract() {
    for event in samples::events() {
        let value = value(&event);
        let mut fields: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!(
            fields,
            ["data", "datacontenttype", "id", "source", "specversion", "subject", "time", "type"]
        );
        assert_eq!(value["specversion"], "1.0");
        assert_eq!(value["datacontenttype"], "application/json");
        assert_eq!(value["type"], format!("rollcall.{}", event.body.short_type()));
        assert_eq!(value["time"], "2026-11-22T03:04:05.678Z");
        assert_eq!(value["id"], event.id.to_string());
        assert_eq!(value["source"], "/rollcall/watchdog/w-1");
        assert_eq!(value["subject"], event.subject);
        assert!(value["data"].is_object());
    }
}

#[test]
fn a_recovery_is_written_with_the_names_of_the_contract() {
    let mut plain = samples::recovered();
    plain.action = RecoveryAction::Failed;
    plain.next_attempt = None;
    plain.returned = false;
    plain.checkpoint = None;
    plain.evidence = json!({});
    assert_eq!(
        serde_json::to_value(&plain).unwrap(),
        json!({
            "execution_id": "01JABC", "attempt": 1, "agent_id": "agent-7",
            "instance_id": "0199b2c4-0000-7000-8000-000000000001",
            "reason": "orphaned", "action": "failed", "next_attempt": null, "terminate": "confirmed",
            "detected_after_ms": 812, "evidence": {}, "message": "agent-7 is alive and does not know it"
        })
    );
    for reason in RecoveryReason::ALL {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
    }
    let reasons: Vec<_> = RecoveryReason::ALL.iter().map(|r| r.as_str()).collect();
    assert_eq!(
        reasons,
        [
            "orphaned",
            "timed_out",
            "stalled",
            "agent_lost",
            "agent_restarted",
            "agent_gone",
            "dispatch_lost",
            "stale"
        ]
    );
    for (action, name) in [
        (RecoveryAction::Failed, "failed"),
        (RecoveryAction::Requeued, "requeued"),
        (RecoveryAction::Quarantined, "quarantined"),
    ] {
        assert_eq!(serde_json::to_value(action).unwrap(), name);
        assert_eq!(action.as_str(), name);
    }
    for (outcome, name) in [
        (TerminateOutcome::Confirmed, "confirmed"),
        (TerminateOutcome::NotRunning, "not_running"),
        (TerminateOutcome::NotAttempted, "not_attempted"),
        (TerminateOutcome::Failed, "failed"),
    ] {
        assert_eq!(serde_json::to_value(outcome).unwrap(), name);
    }
}

#[test]
fn events_from_somewhere_else_are_typed_errors() {
    let good = value(&samples::events()[3]);
    assert!(decode(&good).is_ok());
    let with = |field: &str, new: Value| {
        let mut changed = good.clone();
        changed[field] = new;
        decode(&changed).unwrap_err()
    };
    assert!(matches!(with("specversion", json!("0.3")), DecodeError::Version(v) if v == "0.3"));
    for kind in [
        "rollcall.execution.exploded",
        "rollcall.agent.started",
        "rollcall.other.started",
        "rollcall.started",
        "execution.started",
        "",
    ] {
        assert!(matches!(with("type", json!(kind)), DecodeError::UnknownType(k) if k == kind), "{kind}");
    }
    // What an error repeats is bounded.
    assert!(matches!(with("type", json!("x".repeat(5000))), DecodeError::UnknownType(k) if k.len() == 100));
    for (field, bad) in [
        ("id", json!("not a uuid")),
        ("time", json!("yesterday")),
        ("data", json!([])),
        ("data", json!({})),
        ("data", json!({"execution_id": "a.b", "attempt": 1, "agent_id": "a", "instance_id": "i"})),
        ("data", json!({"execution_id": "a", "attempt": -1, "agent_id": "a", "instance_id": "i"})),
        ("type", json!(7)),
        ("source", json!(null)),
    ] {
        assert!(matches!(with(field, bad.clone()), DecodeError::Json(_)), "{field} {bad}");
    }
    for field in ["specversion", "id", "source", "type", "subject", "time", "data"] {
        let mut less = good.clone();
        less.as_object_mut().unwrap().remove(field);
        assert!(matches!(decode(&less), Err(DecodeError::Json(_))), "{field}");
    }
    for garbage in [&b""[..], b"null", b"[]", b"{", b"\xff\xfe", b"{} {}"] {
        assert!(matches!(Event::decode(garbage), Err(DecodeError::Json(_))));
    }
}

#[test]
fn what_is_not_known_is_ignored() {
    for event in samples::events() {
        let mut more = value(&event);
        more["traceparent"] = json!("00-ab-cd-01");
        if !matches!(event.body, EventBody::System(_)) {
            // A system event's data is free: there is nothing unknown in it.
            more["data"]["later_addition"] = json!({"nested": [1, 2]});
        }
        assert_eq!(decode(&more).unwrap(), event);
    }
}

#[test]
fn escaped_text_in_the_envelope_is_read() {
    let text = String::from_utf8(samples::events()[3].encode()).unwrap();
    let escaped = text.replace("rollcall.execution", "rollcall.\\u0065xecution").replace("1.0", "1\\u002e0");
    assert_ne!(text, escaped);
    assert_eq!(Event::decode(escaped.as_bytes()).unwrap(), samples::events()[3]);
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Event::decode(&bytes).is_err());
    }

    /// Cut short or with a byte changed, an event is another event or an error, never a panic.
    #[test]
    fn damage_never_panics(which in 0usize..33, place in 0usize..2000, byte: u8, cut: bool) {
        let events = samples::events();
        let mut bytes = events[which % events.len()].encode();
        let place = place % bytes.len();
        if cut {
            bytes.truncate(place);
            prop_assert!(Event::decode(&bytes).is_err());
        } else {
            bytes[place] = byte;
            let _ = Event::decode(&bytes);
        }
    }

    #[test]
    fn any_text_survives(reason in "\\PC{0,40}|.{0,40}", key in ".{0,10}", number: i64) {
        let mut event = samples::events().remove(9);
        let EventBody::Execution(ExecutionEvent::Recovered(recovered)) = &mut event.body else { unreachable!() };
        recovered.message = reason;
        recovered.evidence = json!({ key: number });
        let bytes = event.encode();
        prop_assert!(!bytes.contains(&b'\n'));
        let read = Event::decode(&bytes).unwrap();
        prop_assert_eq!(&read, &event);
        prop_assert_eq!(read.encode(), bytes);
    }
}
