//! What every event of a status says, as it is on the wire.

use std::collections::BTreeSet;

use rollcall_core::event::{Event, EventBody};
use serde_json::Value;
use uuid::Uuid;

use super::*;

/// The data of each status event in the log, with its type.
fn said(lab: &Lab) -> Vec<(&'static str, Value)> {
    let data = |(event, time): (&AgentEvent, &Timestamp)| {
        let encoded = Event {
            id: Uuid::now_v7(),
            source: "/rollcall/health-prober/test".to_owned(),
            subject: AGENT.to_owned(),
            time: *time,
            body: EventBody::Agent(event.clone()),
        }
        .encode();
        let event_of: Value = serde_json::from_slice(&encoded).unwrap();
        (event.short_type(), event_of["data"].clone())
    };
    let all = lab.log.iter().zip(&lab.times).map(data);
    all.filter(|(kind, _)| Status::ALL.iter().any(|status| *kind == format!("agent.{}", status.as_str())))
        .collect()
}

#[test]
fn every_status_event_says_since_when_why_what_was_before_and_what_was_seen() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.watch();
    lab.probed(Evidence::Good);
    lab.probed(Evidence::Bad(Cause::Refused));
    for _ in 0..2 {
        lab.probed(Evidence::Bad(Cause::Refused));
    }
    lab.pass(1500);
    lab.pass(2000);
    lab.beat("i1", 2, "");
    lab.beat("i1", 3, "");
    lab.wish(Some(&Wish::Drain {
        reason: "maintenance".into(),
        deadline: None,
        in_flight: Some(InFlight::Abort),
    }));
    lab.wish(Some(&Wish::Undrain { reason: "done".into() }));
    lab.beat("i1", 4, r#","state":"draining","reason":"sigterm""#);
    lab.beat("i1", 5, r#","state":"gone""#);
    // Given up: by the detector, and by an operator.
    lab.beat("i2", 1, "");
    lab.pass(3500);
    lab.pass(60_000);
    lab.beat("i3", 1, "");
    lab.wish(Some(&Wish::Forget { reason: "broken".into() }));

    let said = said(&lab);
    let kinds: BTreeSet<_> = said.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds.len(), Status::ALL.len(), "{kinds:?}");
    let mut before = Value::Null;
    for (kind, data) in said {
        let text = |name: &str| data[name].as_str().filter(|text| !text.is_empty());
        assert!(text("reason").is_some(), "{kind} without a reason: {data}");
        assert!(text("since").is_some_and(|at| Timestamp::parse(at).is_ok()), "{kind} since when: {data}");
        assert_eq!(data.get("previous"), Some(&before), "{kind}: {data}");
        let evidence = data["evidence"].as_object();
        assert!(
            evidence.is_some_and(|seen| seen.contains_key("heartbeat")),
            "{kind} on what evidence: {data}"
        );
        before = json!(kind.trim_start_matches("agent."));
    }
}
