//! `rollcall agents`, `agent show`, `capacity`, `drain`, `undrain`, `goodbye`, `forget`

use clap::{Args, ValueEnum};
use rollcall_core::{
    ids::{AgentId, Pool},
    wire::{AgentRequest, CapacityRequest, InFlight},
};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use crate::{
    connection::Fleet,
    exit,
    failure::Failure,
    output::{Output, Shown, Tone, field, plain},
};

/// One agent.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// The agent.
    #[arg(value_name = "AGENT")]
    id: AgentId,
}

/// What `rollcall undrain` and `forget` are told, and what `drain` and `goodbye` are too.
#[derive(Debug, Args)]
pub(crate) struct IntentArgs {
    /// The agent.
    #[arg(value_name = "AGENT")]
    id: AgentId,
    /// Why.
    #[arg(long)]
    reason: Option<String>,
    /// By when, in milliseconds from now.
    #[arg(long)]
    deadline_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum InFlightArg {
    /// Finish it until the deadline, hand back the rest.
    Finish,
    /// Hand it back now.
    Return,
    /// End it now, without any grace.
    Abort,
}

impl From<InFlightArg> for InFlight {
    fn from(arg: InFlightArg) -> Self {
        match arg {
            InFlightArg::Finish => Self::Finish,
            InFlightArg::Return => Self::Return,
            InFlightArg::Abort => Self::Abort,
        }
    }
}

/// What `rollcall drain` is told.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    intent: IntentArgs,
    /// What is to become of the work in flight at the deadline [default: return].
    #[arg(long, value_enum, requires = "deadline_ms")]
    in_flight: Option<InFlightArg>,
}

/// What `rollcall goodbye` is told.
#[derive(Debug, Args)]
pub(crate) struct GoodbyeArgs {
    #[command(flatten)]
    intent: IntentArgs,
    /// What is to become of the work in flight [default: finish].
    #[arg(long, value_enum)]
    in_flight: Option<InFlightArg>,
}

/// What `rollcall capacity` is told.
#[derive(Debug, Args)]
pub(crate) struct CapacityArgs {
    /// Of this agent.
    #[arg(long, required_unless_present = "pool", conflicts_with = "pool")]
    agent: Option<AgentId>,
    /// Of this pool.
    #[arg(long)]
    pool: Option<Pool>,
}

#[derive(Deserialize)]
struct ListReply {
    agents: Vec<Box<RawValue>>,
}

pub(crate) async fn list(fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let answer = fleet.ask("agents", &json!({})).await?;
    let reply: ListReply = serde_json::from_str(answer.get())
        .map_err(|error| Failure::failed(format!("agents: the answer can't be read: {error}")))?;
    let header =
        ["AGENT", "STATUS", "SINCE", "REASON", "POOL", "HELD", "CAPACITY", "LAST BEAT", "MARKS", "INSTANCE"];
    output.list(&reply.agents, &header, |row| {
        vec![
            plain(field(row, "agent_id")),
            status_of(row),
            plain(field(row, "since")),
            plain(field(row, "reason")),
            plain(field(row, "pool")),
            plain(field(row, "executions")),
            plain(field(row, "capacity")),
            plain(age_of(row)),
            marks_of(row),
            (field(row, "instance_id"), Tone::Dim),
        ]
    })?;
    Ok(exit::OK)
}

fn status_of(row: &Value) -> Shown {
    let status = field(row, "status");
    let tone = match status.as_str() {
        "connected" => Tone::Good,
        "degraded" | "draining" => Tone::Warn,
        "disconnected" | "error" => Tone::Bad,
        "gone" => Tone::Dim,
        _ => Tone::Plain,
    };
    match row.pointer("/failure/code").and_then(Value::as_str) {
        Some(code) => (format!("{status}({code})"), tone),
        None => (status, tone),
    }
}

fn age_of(row: &Value) -> String {
    row.get("last_heartbeat_age_ms")
        .and_then(Value::as_f64)
        .map_or_else(|| "-".to_owned(), |ms| format!("{:.1} s", ms / 1000.0))
}

fn marks_of(row: &Value) -> Shown {
    let is_set = |name: &str| row.get(name).is_some_and(|v| !v.is_null() && *v != json!(false));
    let marks: Vec<_> =
        ["draining", "quarantined", "flapping"].into_iter().filter(|name| is_set(name)).collect();
    if marks.is_empty() { plain("-") } else { (marks.join(","), Tone::Warn) }
}

pub(crate) async fn show(args: AgentArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let question = AgentRequest { agent_id: args.id, reason: None, deadline_ms: None, in_flight: None };
    output.one(&fleet.ask("agent", &question).await?)?;
    Ok(exit::OK)
}

/// `undrain`, `forget`
pub(crate) async fn intent(
    verb: &str,
    args: IntentArgs,
    fleet: &Fleet,
    output: Output,
) -> Result<u8, Failure> {
    say(verb, args, None, fleet, output).await
}

pub(crate) async fn drain(args: DrainArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    say("drain", args.intent, args.in_flight, fleet, output).await
}

pub(crate) async fn goodbye(args: GoodbyeArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    say("goodbye", args.intent, args.in_flight, fleet, output).await
}

async fn say(
    verb: &str,
    IntentArgs { id, reason, deadline_ms }: IntentArgs,
    in_flight: Option<InFlightArg>,
    fleet: &Fleet,
    output: Output,
) -> Result<u8, Failure> {
    let question =
        AgentRequest { agent_id: id, reason, deadline_ms, in_flight: in_flight.map(InFlight::from) };
    output.one(&fleet.ask(verb, &question).await?)?;
    Ok(exit::OK)
}

pub(crate) async fn capacity(args: CapacityArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let question = CapacityRequest { agent_id: args.agent, pool: args.pool };
    output.one(&fleet.ask("capacity", &question).await?)?;
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_is_wrong() {
        let row = json!({"status": "error", "failure": {"code": "tls"}, "last_heartbeat_age_ms": 12_345,
            "draining": {"by": "operator"}, "flapping": false, "quarantined": null});
        assert_eq!(status_of(&row), ("error(tls)".to_owned(), Tone::Bad));
        assert_eq!(age_of(&row), "12.3 s");
        assert_eq!(marks_of(&row).0, "draining");
        assert_eq!(age_of(&json!({"last_heartbeat_age_ms": null})), "-");
    }
}
