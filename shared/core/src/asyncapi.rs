//! Holds `docs/asyncapi.yaml` and the Rust types together: addresses, messages, fields, what is required, what may
//! be null, and every enumeration. What the document says of types that live in services is listed as such.

mod channels;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{agent::Status, event::*, execution::State, samples, wire::*};

/// Schemas of answers that services put together themselves; their own tests and the e2e tests look at those.
const OF_SERVICES: [&str; 16] = [
    "AgentCapacity",
    "AgentView",
    "AgentsList",
    "AgentsRequest",
    "Counts",
    "CycleExecution",
    "CycleReport",
    "CycleRequest",
    "Empty",
    "ExecutionsList",
    "Explanation",
    "GoodbyeSent",
    "HeldSlot",
    "PoolCapacity",
    "QueuePlace",
    "WatchdogStatus",
];
/// Plain building blocks.
const PLAIN: [&str; 5] = ["CloudEvent", "ErrorReply", "Id", "Labels", "Timestamp"];

fn document() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/asyncapi.yaml");
    let text = std::fs::read_to_string(path).expect(path);
    serde_yaml_ng::from_str(&text).expect("docs/asyncapi.yaml is YAML")
}

fn names(object: &Value) -> BTreeSet<&str> {
    object.as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default()
}

fn texts(list: &Value) -> BTreeSet<&str> {
    list.as_array().map(|l| l.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

/// What a schema amounts to once its references are followed.
fn resolved<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let pointer = reference.strip_prefix('#').expect(reference);
            resolved(document, document.pointer(pointer).expect(reference))
        }
        None => schema,
    }
}

/// The JSON types that a schema lets through; empty: any.
fn types<'d>(document: &'d Value, schema: &'d Value) -> BTreeSet<&'d str> {
    let schema = resolved(document, schema);
    let mut found = texts(&schema["type"]);
    found.extend(schema["type"].as_str());
    for several in ["allOf", "anyOf"] {
        for part in schema[several].as_array().into_iter().flatten() {
            found.extend(types(document, part));
        }
    }
    found
}

fn lets_through(document: &Value, schema: &Value, value: &Value) -> bool {
    let types = types(document, schema);
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_u64() || n.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    types.is_empty() || types.contains(kind) || (kind == "integer" && types.contains("number"))
}

/// Who has to take what the schema allows.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// We read it: what it requires is what we can't do without.
    Read,
    /// We write it: what it requires is what we always write.
    Written,
}

/// Reads and writes again; `None` if it is refused.
type Again<'t> = &'t dyn Fn(&Value) -> Option<Value>;

struct Check {
    document: Value,
    seen: BTreeSet<String>,
}

impl Check {
    fn schema(&self, name: &str) -> &Value {
        let schema = &self.document["components"]["schemas"][name];
        assert!(schema.is_object(), "the document has no schema {name}");
        schema
    }

    fn of<T: Serialize + DeserializeOwned>(&mut self, name: &str, way: Way, sample: &T) {
        let sample = serde_json::to_value(sample).unwrap();
        self.with(name, way, &sample, &|value| {
            let read: T = serde_json::from_value(value.clone()).ok()?;
            serde_json::to_value(read).ok()
        });
    }

    /// `sample` has every field there is.
    fn with(&mut self, name: &str, way: Way, sample: &Value, again: Again<'_>) {
        let schema = self.schema(name);
        assert_eq!(names(&schema["properties"]), names(sample), "fields of {name}");
        assert_eq!(again(sample).as_ref(), Some(sample), "{name} comes back");
        let mut required = BTreeSet::new();
        for (field, value) in sample.as_object().unwrap() {
            let property = &schema["properties"][field];
            assert!(lets_through(&self.document, property, value), "{name}.{field} of {value}");
            let mut without = sample.clone();
            without.as_object_mut().unwrap().remove(field);
            let kept = match again(&without) {
                None => true,
                Some(written) => way == Way::Written && written.get(field).is_some(),
            };
            if kept {
                required.insert(field.as_str());
            }
            self.check_null(name, way, sample, field, again);
        }
        assert_eq!(texts(&schema["required"]), required, "what {name} requires");
        assert!(self.seen.insert(name.to_owned()), "{name} twice");
    }

    fn check_null(&self, name: &str, way: Way, sample: &Value, field: &str, again: Again<'_>) {
        let property = &self.schema(name)["properties"][field];
        if types(&self.document, property).is_empty() {
            return;
        }
        let mut nulled = sample.clone();
        nulled[field] = Value::Null;
        let may_be = match (way, again(&nulled)) {
            (_, None) => false,
            (Way::Read, Some(_)) => true,
            (Way::Written, Some(written)) => written.get(field) == Some(&Value::Null),
        };
        assert_eq!(lets_through(&self.document, property, &Value::Null), may_be, "null as {name}.{field}");
    }

    /// The error of an unknown variant names all that are known.
    fn enumeration<T: DeserializeOwned>(&mut self, name: &str) {
        let Err(error) = serde_json::from_value::<T>(json!("?")) else { panic!("{name} takes anything") };
        let error = error.to_string();
        let known: BTreeSet<&str> = error.split('`').skip(3).step_by(2).collect();
        assert!(known.len() > 1, "{error}");
        assert_eq!(texts(&self.schema(name)["enum"]), known, "{name}");
        assert!(self.seen.insert(name.to_owned()), "{name} twice");
    }
}

fn heartbeat() -> Value {
    json!({
        "agent_id": "a", "instance_id": "i", "seq": 42, "state": "ready", "capacity": 4,
        "executions": [{"id": "e", "attempt": 1, "progress": 17.5}],
        "interval_ms": 5000, "pool": "default", "timeout_ms": 900_000, "reason": "sigterm", "version": "1.4.2",
        "labels": {"zone": "b"}, "probe": {"kind": "http", "url": "http://h/"},
        "control": {"kind": "http", "url": "http://h/"}, "sent_at": "2026-11-22T03:04:05.678Z"
    })
}

fn read_heartbeat(value: &Value) -> Option<Value> {
    let bytes = serde_json::to_vec(value).ok()?;
    let beat = Heartbeat::read("a", &bytes).ok()?;
    beat.extras().ok()?;
    serde_json::to_value(beat).ok()
}

fn check_agent_side(check: &mut Check) {
    use Way::{Read, Written};
    check.with("Heartbeat", Read, &heartbeat(), &read_heartbeat);
    check.of("Claim", Read, &OwnedClaim { id: samples::execution(), attempt: 1, progress: Some(0.5) });
    check.of("Endpoint", Read, &samples::endpoint());
    let goodbye = Goodbye { reason: GoodbyeReason::Restart, deadline_ms: 1000, in_flight: InFlight::Return };
    check.of("Goodbye", Written, &goodbye);
    let reply = HeartbeatReply {
        status: "connected".into(),
        interval_ms: 5000,
        server_time: samples::at(),
        goodbye: Some(goodbye),
    };
    check.of("HeartbeatReply", Written, &reply);
    let report = Report {
        agent_id: Some(samples::agent()),
        execution_id: Some(samples::execution()),
        instance_id: samples::instance(),
        attempt: 1,
        outcome: Outcome::Completed,
        result: Some(samples::raw("{}")),
        error: Some(samples::error()),
        checkpoint: Some(samples::raw("[]")),
        finished_at: Some(samples::at()),
    };
    check.of("Report", Read, &report);
    check.of("ErrorBody", Read, &samples::error());
    let dispatch = DispatchRequest {
        execution_id: samples::execution(),
        attempt: 1,
        timeout_ms: 1,
        deadline: samples::at(),
        input: samples::raw("{}"),
        checkpoint: Some(samples::raw("[]")),
    };
    check.of("DispatchRequest", Written, &dispatch);
    check.of("DispatchReply", Read, &DispatchReply { accepted: false, reason: Some("draining".into()) });
    let terminate = TerminateRequest {
        execution_id: samples::execution(),
        attempt: 1,
        reason: "timed_out".into(),
        grace_ms: 5000,
    };
    check.of("TerminateRequest", Written, &terminate);
    check.of("TerminateReply", Read, &TerminateReply { state: TerminateState::NotRunning });
    check.of("GoodbyeReply", Read, &GoodbyeReply { ok: true });
    let held = ExecutionsReply { instance_id: samples::instance(), seq: 1, executions: Vec::new() };
    check.of("HeldExecutions", Read, &held);
    check.of("PingReply", Read, &PingReply { instance_id: samples::instance(), state: AgentState::Busy });
}

fn check_api(check: &mut Check) {
    use Way::{Read, Written};
    let submit = SubmitRequest {
        execution_id: Some(samples::execution()),
        agent_id: Some(samples::agent()),
        pool: Some(crate::Pool::default()),
        input: Some(samples::raw("{}")),
        timeout_ms: Some(1),
        priority: Some(5),
        queue_ttl_ms: Some(1),
        on_loss: Some(OnLoss::Fail),
        max_attempts: Some(3),
        stall_timeout_ms: Some(1),
        lost_after_ms: Some(1),
        delivery: Some(Delivery::Push),
        labels: samples::labels(),
    };
    check.of("SubmitRequest", Read, &submit);
    check.of("ExecutionRequest", Read, &ExecutionRequest { execution_id: samples::execution() });
    let cancel = CancelRequest { execution_id: samples::execution(), reason: Some("enough".into()) };
    check.of("CancelRequest", Read, &cancel);
    let release = ReleaseRequest {
        execution_id: samples::execution(),
        attempt: 1,
        outcome: Outcome::Completed,
        result: Some(samples::raw("{}")),
        error: Some(samples::error()),
    };
    check.of("ReleaseRequest", Read, &release);
    let list = ExecutionsRequest {
        state: Some(State::Running),
        agent_id: Some(samples::agent()),
        limit: Some(10),
        after: Some(samples::execution()),
    };
    check.of("ExecutionsListRequest", Read, &list);
    let capacity = CapacityRequest { agent_id: Some(samples::agent()), pool: Some(crate::Pool::default()) };
    check.of("CapacityRequest", Read, &capacity);
    let agent = AgentRequest {
        agent_id: samples::agent(),
        reason: Some("maintenance".into()),
        deadline_ms: Some(1),
        in_flight: Some(InFlight::Finish),
    };
    check.of("AgentRequest", Read, &agent);
    let reply = ExecutionReply {
        execution_id: samples::execution(),
        state: State::Queued,
        agent_id: Some(samples::agent()),
        attempt: 1,
        position: Some(1),
    };
    check.of("ExecutionReply", Written, &reply);
    check.of("ExecutionView", Written, &view());
    check.of("ApiError", Written, &ApiError::retry_after(ErrorCode::QueueFull, "full", 5000));
}

fn view() -> ExecutionView {
    ExecutionView {
        execution_id: samples::execution(),
        state: State::Completed,
        attempt: 1,
        agent_id: Some(samples::agent()),
        instance_id: Some(samples::instance()),
        pool: crate::Pool::default(),
        priority: 5,
        on_loss: OnLoss::Requeue,
        losses: 1,
        submitted_at: samples::at(),
        dispatched_at: Some(samples::at()),
        deadline: Some(samples::at()),
        ended_at: Some(samples::at()),
        position: Some(1),
        reason: Some("orphaned".into()),
        error: Some(samples::error()),
        result: Some(samples::raw("{}")),
        result_ref: Some(samples::payload()),
        late: true,
        labels: samples::labels(),
        seq: 12,
    }
}

/// The name of the schema of an event's data, found by way of the event's message.
fn schema_of_data<'d>(document: &'d Value, kind: &str) -> &'d str {
    let message = &document["components"]["messages"][kind];
    let full = format!("{TYPE_PREFIX}{kind}");
    assert_eq!(message["name"], full, "name of message {kind}");
    assert_eq!(message["contentType"], CONTENT_TYPE, "content type of {kind}");
    let parts = &message["payload"]["allOf"];
    assert_eq!(parts[0]["$ref"], "#/components/schemas/CloudEvent", "{kind}");
    assert_eq!(parts[1]["properties"]["type"]["const"], full, "type of {kind}");
    let reference = parts[1]["properties"]["data"]["$ref"].as_str().expect(kind);
    reference.strip_prefix("#/components/schemas/").expect(reference)
}

fn check_events(check: &mut Check) {
    let document = check.document.clone();
    let mut checked: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for event in samples::events() {
        let envelope: Value = serde_json::from_slice(&event.encode()).unwrap();
        let cloud = check.schema("CloudEvent");
        assert_eq!(names(&cloud["properties"]), names(&envelope));
        assert_eq!(texts(&cloud["required"]), names(&envelope));
        let name = schema_of_data(&document, event.body.short_type());
        let fields: BTreeSet<String> = names(&envelope["data"]).into_iter().map(str::to_owned).collect();
        if let Some(before) = checked.get(name) {
            assert!(name == "SystemData" || *before == fields, "{} is no {name}", event.body.short_type());
            continue;
        }
        checked.insert(name, fields);
        if name == "SystemData" {
            assert!(check.seen.insert(name.to_owned()));
            continue;
        }
        check.with(name, Way::Written, &envelope["data"], &|data| {
            let mut changed = envelope.clone();
            changed["data"] = data.clone();
            let read = Event::decode(&serde_json::to_vec(&changed).ok()?).ok()?;
            Some(serde_json::from_slice::<Value>(&read.encode()).ok()?["data"].take())
        });
    }
    check.of("PayloadRef", Way::Written, &samples::payload());
}

#[test]
fn every_schema_is_its_type() {
    let mut check = Check { document: document(), seen: BTreeSet::new() };
    check_agent_side(&mut check);
    check_api(&mut check);
    check_events(&mut check);
    check.enumeration::<AgentState>("AgentState");
    check.enumeration::<Outcome>("Outcome");
    check.enumeration::<TerminateState>("TerminateState");
    check.enumeration::<GoodbyeReason>("GoodbyeReason");
    check.enumeration::<InFlight>("InFlight");
    check.enumeration::<ErrorCode>("ErrorCode");
    check.enumeration::<OnLoss>("OnLoss");
    check.enumeration::<Delivery>("Delivery");
    check.enumeration::<State>("ExecutionState");
    check.enumeration::<Status>("AgentStatus");
    check.enumeration::<RecoveryReason>("RecoveryReason");
    check.enumeration::<RecoveryAction>("RecoveryAction");
    check.enumeration::<TerminateOutcome>("TerminateOutcome");
    let mut all: BTreeSet<&str> = check.seen.iter().map(String::as_str).collect();
    all.extend(OF_SERVICES);
    all.extend(PLAIN);
    assert_eq!(names(&check.document["components"]["schemas"]), all, "every schema is accounted for");
}
