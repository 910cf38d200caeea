//! `rollcall events`: straight from the log.

use clap::Args;
use rollcall_core::ids::{AgentId, ExecutionId};
use rollcall_nats::{EventLog, TailItem};
use serde_json::Value;

use crate::{
    connection::Fleet,
    exit,
    failure::Failure,
    output::{Format, Output, Shown, Tone, field, plain, printable, shown},
};

/// What every event type starts with.
const TYPE_PREFIX: &str = "rollcall.";

/// What `rollcall events` is told.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Goes on with what happens from now on, until it is ended.
    #[arg(short, long)]
    follow: bool,
    /// Only these types: execution.recovered, agent.*, ... several with commas.
    #[arg(long = "type", value_delimiter = ',', value_name = "TYPE")]
    types: Vec<String>,
    /// Only about this agent.
    #[arg(long)]
    agent: Option<AgentId>,
    /// Only about this execution.
    #[arg(long)]
    execution: Option<ExecutionId>,
    /// Only after this sequence number [default: 0; with --follow: the log's end].
    #[arg(long, value_name = "SEQ")]
    after: Option<u64>,
    /// Ends after so many.
    #[arg(long)]
    limit: Option<usize>,
}

pub(crate) async fn run(args: EventsArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let log = EventLog::new(&fleet.bus);
    let unreadable =
        |error: &dyn std::fmt::Display| Failure::unavailable(format!("the log can't be read: {error}"));
    let after = match args.after {
        Some(after) => after,
        None if args.follow => log.last_seq().await.map_err(|error| unreadable(&error))?,
        None => 0,
    };
    // One execution's events are on a subject of their own. An agent's are not: executions speak of it too.
    let subject = match &args.execution {
        Some(execution) => fleet.subjects.execution_event(execution),
        None => fleet.subjects.all_events(),
    };
    let mut tail = log.tail(after, [subject.as_str()]);
    let mut left = args.limit.unwrap_or(usize::MAX);
    let mut rows = Vec::new();
    while left > 0 {
        let entry = match tail.next().await.map_err(|error| unreadable(&error))? {
            TailItem::Entry(entry) => entry,
            TailItem::CaughtUp { .. } if args.follow => continue,
            TailItem::CaughtUp { .. } => break,
        };
        let Ok(event) = serde_json::from_slice::<Value>(&entry.bytes) else {
            tracing::warn!(seq = entry.seq, "an entry of the log is no event");
            continue;
        };
        if !args.wants(&event) {
            continue;
        }
        left -= 1;
        match output.format {
            Format::Json | Format::Jsonl => {
                output.line(&format!("{{\"seq\":{},\"event\":{}}}", entry.seq, text_of(&entry.bytes)))?;
            }
            Format::Table if args.follow => output.line(&line(entry.seq, &event))?,
            Format::Table => rows.push(cells(entry.seq, &event)),
        }
    }
    if output.format == Format::Table && !args.follow {
        output.table(&["SEQ", "TIME", "EVENT", "WHAT"], rows.into_iter())?;
    }
    Ok(exit::OK)
}

impl EventsArgs {
    fn wants(&self, event: &Value) -> bool {
        let kind = short_type(event);
        let type_fits = self.types.is_empty() || self.types.iter().any(|pattern| matches(pattern, &kind));
        let agent_fits = self.agent.as_ref().is_none_or(|agent| {
            let about = event.get("subject").filter(|_| kind.starts_with("agent."));
            [about, event.pointer("/data/agent_id")].into_iter().flatten().any(|id| id == agent.as_str())
        });
        let execution_fits = self
            .execution
            .as_ref()
            .is_none_or(|id| event.get("subject").is_some_and(|subject| subject == id.as_str()));
        type_fits && agent_fits && execution_fits
    }
}

/// `execution.*` fits every type of that family, anything else only itself.
fn matches(pattern: &str, kind: &str) -> bool {
    let pattern = pattern.strip_prefix(TYPE_PREFIX).unwrap_or(pattern);
    match pattern.strip_suffix('*') {
        Some(start) => kind.starts_with(start),
        None => pattern == kind,
    }
}

fn short_type(event: &Value) -> String {
    let kind = field(event, "type");
    kind.strip_prefix(TYPE_PREFIX).map_or(kind.clone(), ToOwned::to_owned)
}

/// The bytes of an event as text; they are JSON, or were found not to be before.
pub(crate) fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One event as a row of a table.
pub(crate) fn summary(seq: u64, bytes: &[u8]) -> Vec<Shown> {
    match serde_json::from_slice(bytes) {
        Ok(event) => cells(seq, &event),
        Err(_) => {
            vec![plain(seq.to_string()), plain("-"), ("not an event".to_owned(), Tone::Bad), plain("-")]
        }
    }
}

fn cells(seq: u64, event: &Value) -> Vec<Shown> {
    let kind = short_type(event);
    let tone = match kind.as_str() {
        "execution.completed" | "agent.connected" => Tone::Good,
        "execution.failed" | "execution.expired" | "agent.error" | "agent.quarantined" => Tone::Bad,
        "execution.recovered" | "agent.disconnected" | "agent.degraded" | "agent.flapping" => Tone::Warn,
        kind if kind.starts_with("system.") => Tone::Warn,
        _ => Tone::Plain,
    };
    vec![plain(seq.to_string()), plain(field(event, "time")), (kind, tone), plain(what(event))]
}

fn line(seq: u64, event: &Value) -> String {
    format!("{seq:>8}  {}  {:<24}  {}", field(event, "time"), short_type(event), what(event))
}

/// What a person wants to know of an event, in a line.
fn what(event: &Value) -> String {
    let none = Value::Null;
    let data = event.get("data").unwrap_or(&none);
    let mut text = field(event, "subject");
    for name in [
        "agent_id",
        "attempt",
        "reason",
        "action",
        "next_attempt",
        "terminate",
        "detected_after_ms",
        "position",
        "previous",
        "code",
        "outcome",
        "by",
        "late",
        "because",
        "message",
    ] {
        let Some(value) = data.get(name).filter(|value| !value.is_null()) else { continue };
        if name == "agent_id" && *value == event["subject"] {
            continue;
        }
        text.push_str(&format!("  {}={}", name.strip_suffix("_id").unwrap_or(name), quoted(value)));
    }
    if let Some(error) = data.get("error").filter(|error| error.is_object()) {
        text.push_str(&format!("  error={}: {}", field(error, "code"), field(error, "message")));
    }
    text
}

fn quoted(value: &Value) -> String {
    match value.as_str() {
        Some(text) if text.contains(' ') => format!("\"{}\"", printable(text)),
        _ => shown(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn args(types: &[&str], agent: Option<&str>) -> EventsArgs {
        EventsArgs {
            follow: false,
            types: types.iter().map(ToString::to_string).collect(),
            agent: agent.map(|id| id.parse().unwrap()),
            execution: None,
            after: None,
            limit: None,
        }
    }

    #[test]
    fn types_and_agents_are_filtered() {
        let recovered =
            json!({"type": "rollcall.execution.recovered", "subject": "x", "data": {"agent_id": "a"}});
        let connected =
            json!({"type": "rollcall.agent.connected", "subject": "a", "data": {"agent_id": "a"}});
        assert!(args(&[], None).wants(&recovered));
        assert!(args(&["execution.recovered", "agent.*"], None).wants(&recovered));
        assert!(args(&["agent.*"], None).wants(&connected));
        assert!(!args(&["agent.*"], None).wants(&recovered));
        assert!(args(&["rollcall.execution.*"], Some("a")).wants(&recovered));
        assert!(!args(&[], Some("b")).wants(&recovered));
        assert!(args(&[], Some("a")).wants(&connected));
    }

    #[test]
    fn a_recovery_in_a_line() {
        let event = json!({"type": "rollcall.execution.recovered", "subject": "x", "time": "T", "data":
            {"execution_id": "x", "agent_id": "a", "attempt": 1, "reason": "orphaned", "action": "failed",
             "next_attempt": null, "message": "one sentence"}});
        assert_eq!(
            what(&event),
            "x  agent=a  attempt=1  reason=orphaned  action=failed  message=\"one sentence\""
        );
    }
}
