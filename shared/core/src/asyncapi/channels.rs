//! Addresses, messages, references and answers of the document, and the examples of its companion for readers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{document, names, texts};
use crate::{
    event::*,
    subject::{AgentVerb, PayloadKind, Subjects},
    wire::*,
};

/// PROTOCOL.md 4, in its order.
const API_VERBS: [&str; 16] = [
    "submit",
    "release",
    "cancel",
    "retry",
    "execution",
    "executions",
    "capacity",
    "agents",
    "agent",
    "drain",
    "undrain",
    "goodbye",
    "forget",
    "watchdog.status",
    "watchdog.run",
    "explain",
];

/// The addresses, with placeholders instead of names.
fn addresses() -> BTreeMap<String, String> {
    let subjects = Subjects::default();
    let (agent, execution) = ("AGENT".parse().unwrap(), "EXECUTION".parse().unwrap());
    let instance = "INSTANCE".parse().unwrap();
    let payload = subjects.payload(&execution, PayloadKind::Input, 77);
    let mut found = BTreeMap::from([
        ("heartbeat".to_owned(), subjects.heartbeat(&agent)),
        ("report".to_owned(), subjects.report(&agent, &execution)),
        ("payload".to_owned(), payload.replace(".input.", ".KIND.").replace("77", "ATTEMPT")),
        ("event.agent".to_owned(), subjects.agent_event(&agent)),
        ("event.execution".to_owned(), subjects.execution_event(&execution)),
        ("event.system".to_owned(), subjects.system_event("SERVICE")),
        ("recovery".to_owned(), subjects.recovery_broadcast("REASON", "AGENT")),
        ("health".to_owned(), subjects.health_broadcast("STATUS", &agent)),
        ("system".to_owned(), subjects.system_broadcast("NAME")),
    ]);
    let verbs = [
        AgentVerb::Dispatch,
        AgentVerb::Terminate,
        AgentVerb::Goodbye,
        AgentVerb::Executions,
        AgentVerb::Ping,
    ];
    for verb in verbs {
        found.insert(format!("agent.{}", verb.as_str()), subjects.agent_request(&agent, &instance, verb));
    }
    for verb in API_VERBS {
        found.insert(format!("api.{verb}"), subjects.api(verb));
    }
    for address in found.values_mut() {
        for (placeholder, name) in [
            ("AGENT", "agent_id"),
            ("EXECUTION", "execution_id"),
            ("INSTANCE", "instance_id"),
            ("KIND", "kind"),
            ("ATTEMPT", "attempt"),
            ("SERVICE", "service"),
            ("REASON", "reason"),
            ("STATUS", "status"),
            ("NAME", "name"),
        ] {
            *address = address.replace(placeholder, &format!("{{{name}}}"));
        }
    }
    found
}

#[test]
fn every_channel_is_a_subject_and_every_subject_a_channel() {
    let document = document();
    let channels = document["channels"].as_object().unwrap();
    let found: BTreeMap<String, String> = channels
        .iter()
        .filter(|(name, _)| *name != "reply")
        .map(|(name, channel)| (name.clone(), channel["address"].as_str().expect(name).to_owned()))
        .collect();
    assert_eq!(found, addresses());
    assert_eq!(document["channels"]["reply"]["address"], Value::Null);
    for (name, channel) in channels {
        let address = channel["address"].as_str().unwrap_or_default();
        let in_address: BTreeSet<&str> =
            address.split('{').skip(1).map(|rest| rest.split('}').next().unwrap()).collect();
        assert_eq!(names(&channel["parameters"]), in_address, "parameters of {name}");
    }
    let kinds = [PayloadKind::Input, PayloadKind::Result, PayloadKind::Checkpoint].map(PayloadKind::as_str);
    assert_eq!(texts(&document["channels"]["payload"]["parameters"]["kind"]["enum"]), kinds.into());
    let reasons = RecoveryReason::ALL.map(RecoveryReason::as_str);
    assert_eq!(texts(&document["channels"]["recovery"]["parameters"]["reason"]["enum"]), reasons.into());
}

#[test]
fn every_event_is_a_message_of_its_channels() {
    let document = document();
    let messages = |channel: &str| names(&document["channels"][channel]["messages"]);
    let of =
        |family: &str, all: &[&str]| all.iter().map(|n| format!("{family}.{n}")).collect::<BTreeSet<_>>();
    let same = |channel: &str, wanted: &BTreeSet<String>| {
        assert_eq!(messages(channel), wanted.iter().map(String::as_str).collect(), "{channel}");
    };
    same("event.execution", &of("execution", ExecutionEvent::NAMES));
    same("event.agent", &of("agent", AgentEvent::NAMES));
    same("event.system", &of("system", SystemEventKind::NAMES));
    same("system", &of("system", SystemEventKind::NAMES));
    same("recovery", &of("execution", &["recovered"]));
    // Status and marks; what an instance says of itself and who superseded it is not health.
    let health: Vec<_> = AgentEvent::NAMES
        .iter()
        .filter(|name| !["registered", "updated", "superseded"].contains(*name))
        .copied()
        .collect();
    same("health", &of("agent", &health));
    let parameter =
        |channel: &str, name: &str| texts(&document["channels"][channel]["parameters"][name]["enum"]);
    assert_eq!(parameter("health", "status"), health.into_iter().collect());
    assert_eq!(parameter("system", "name"), SystemEventKind::NAMES.iter().copied().collect());
}

/// Every reference leads somewhere, and every channel, message and schema is used.
#[test]
fn every_reference_leads_somewhere_and_nothing_is_left_over() {
    fn walk<'d>(value: &'d Value, found: &mut BTreeSet<&'d str>) {
        match value {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str));
                object.values().for_each(|v| walk(v, found));
            }
            Value::Array(list) => list.iter().for_each(|v| walk(v, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = BTreeSet::new();
    walk(&document, &mut found);
    for reference in &found {
        let pointer = reference.strip_prefix('#').expect(reference);
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
    for (place, all) in [
        ("/channels", &document["channels"]),
        ("/components/messages", &document["components"]["messages"]),
        ("/components/schemas", &document["components"]["schemas"]),
    ] {
        for name in names(all) {
            let reference = format!("#{place}/{name}");
            assert!(found.contains(reference.as_str()), "{reference} is used by nothing");
        }
    }
    for (name, operation) in document["operations"].as_object().unwrap() {
        let channel = operation["channel"]["$ref"].as_str().expect(name);
        for message in operation["messages"].as_array().into_iter().flatten() {
            let message = message["$ref"].as_str().expect(name);
            assert!(
                message.starts_with(&format!("{channel}/messages/")),
                "{name} sends what {channel} has not"
            );
        }
    }
}

/// A request has its answer.
#[test]
fn every_request_has_an_answer() {
    let document = document();
    let replies = names(&document["channels"]["reply"]["messages"]);
    for name in names(&document["channels"]) {
        if name.starts_with("api.") || name.starts_with("agent.") {
            assert!(replies.contains(format!("{name}.reply").as_str()), "{name} has no answer");
        }
        if name.starts_with("api.") {
            let answer = &document["components"]["messages"][format!("{name}.reply")]["payload"]["anyOf"];
            let last = answer.as_array().and_then(|all| all.last()).expect(name);
            assert_eq!(last["$ref"], "#/components/schemas/ErrorReply", "{name} may fail");
        }
    }
}

/// The examples of the reader's version of the contract are JSON, and what we read of them is readable.
#[test]
fn the_examples_of_the_readers_contract_are_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/PROTOCOL.md");
    let text = std::fs::read_to_string(path).expect(path);
    let examples: Vec<&str> =
        text.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let mut read = BTreeSet::new();
    for example in examples {
        let value: Value = serde_json::from_str(example).expect(example);
        let bytes = example.trim().as_bytes();
        if value.get("seq").is_some() && value.get("state").is_some_and(|state| state == "ready") {
            Heartbeat::read("a", bytes).expect(example).extras().expect(example);
            read.insert("heartbeat");
        } else if value.get("on_loss").is_some() && value.get("max_attempts").is_some() {
            SubmitRequest::read(bytes).expect(example);
            read.insert("submit");
        } else if value.get("outcome").is_some() {
            Report::read(&crate::samples::agent(), &crate::samples::execution(), bytes).expect(example);
            read.insert("report");
        } else if value.get("losses").is_some() {
            serde_json::from_value::<ExecutionView>(value).expect(example);
            read.insert("view");
        } else if value.get("detected_after_ms").is_some() {
            serde_json::from_value::<Recovered>(value).expect(example);
            read.insert("recovered");
        }
    }
    assert_eq!(read, ["heartbeat", "recovered", "report", "submit", "view"].into());
}
