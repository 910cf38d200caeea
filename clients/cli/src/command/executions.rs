//! `rollcall cancel`, `retry`, `executions`, `execution`, `explain`

use clap::Args;
use rollcall_core::{
    execution::State,
    ids::{AgentId, ExecutionId},
    wire::{CancelRequest, ExecutionRequest, ExecutionsRequest, LIST_LIMIT_MAX},
};
use rollcall_nats::EventLog;
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::events::{summary, text_of};
use crate::{
    connection::Fleet,
    exit,
    failure::Failure,
    output::{Format, Output, Shown, Tone, field, plain},
};

/// One execution.
#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    /// The execution.
    #[arg(value_name = "EXECUTION")]
    id: ExecutionId,
}

/// What `rollcall cancel` is told.
#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// The execution.
    #[arg(value_name = "EXECUTION")]
    id: ExecutionId,
    /// Why.
    #[arg(long)]
    reason: Option<String>,
}

/// What `rollcall executions` is told.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only in this state: queued, dispatching, running, cancelling, completed, failed, cancelled, expired, quarantined.
    #[arg(long, value_parser = read_state)]
    state: Option<State>,
    /// Only of this agent.
    #[arg(long)]
    agent: Option<AgentId>,
    /// At most so many.
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// Only those after this one, in the order of the list.
    #[arg(long, value_name = "EXECUTION")]
    after: Option<ExecutionId>,
}

/// What `rollcall execution` is told.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// The execution.
    #[arg(value_name = "EXECUTION")]
    id: ExecutionId,
    /// Only its present state. The history is read from the log, which not every user may.
    #[arg(long)]
    no_history: bool,
}

fn read_state(text: &str) -> Result<State, String> {
    State::ALL
        .into_iter()
        .find(|state| state.as_str() == text)
        .ok_or_else(|| format!("one of {}", State::ALL.map(State::as_str).join(", ")))
}

pub(crate) async fn cancel(args: CancelArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let answer = fleet.ask("cancel", &CancelRequest { execution_id: args.id, reason: args.reason }).await?;
    output.one(&answer)?;
    Ok(exit::OK)
}

/// `retry` and `explain`: a verb about one execution.
pub(crate) async fn ask(verb: &str, args: IdArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let answer = fleet.ask(verb, &ExecutionRequest { execution_id: args.id }).await?;
    output.one(&answer)?;
    Ok(exit::OK)
}

#[derive(Deserialize)]
struct ListPage {
    executions: Vec<Box<RawValue>>,
    #[serde(default)]
    next: Option<ExecutionId>,
}

pub(crate) async fn list(args: ListArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let mut rows = Vec::new();
    let mut after = args.after;
    let more = loop {
        let question = ExecutionsRequest {
            state: args.state,
            agent_id: args.agent.clone(),
            limit: Some((args.limit - rows.len()).min(LIST_LIMIT_MAX)),
            after,
        };
        if question.limit == Some(0) {
            break true;
        }
        let answer = fleet.ask("executions", &question).await?;
        let page: ListPage = serde_json::from_str(answer.get())
            .map_err(|error| Failure::failed(format!("executions: the answer can't be read: {error}")))?;
        let got = page.executions.len();
        rows.extend(page.executions);
        after = page.next;
        if after.is_none() || got == 0 {
            break false;
        }
        if rows.len() >= args.limit {
            break true;
        }
    };
    let header =
        ["EXECUTION", "STATE", "ATTEMPT", "AGENT", "POOL", "POSITION", "SUBMITTED", "DEADLINE", "REASON"];
    output.list(&rows, &header, |row| {
        vec![
            plain(field(row, "execution_id")),
            state_of(row),
            plain(field(row, "attempt")),
            plain(field(row, "agent_id")),
            plain(field(row, "pool")),
            plain(field(row, "position")),
            plain(field(row, "submitted_at")),
            plain(field(row, "deadline")),
            plain(reason_of(row)),
        ]
    })?;
    if more && output.format == Format::Table {
        eprintln!("there may be more: --limit, or --after the last one");
    }
    Ok(exit::OK)
}

fn state_of(row: &Value) -> Shown {
    let state = field(row, "state");
    let tone = match state.as_str() {
        "completed" => Tone::Good,
        "failed" | "quarantined" | "expired" => Tone::Bad,
        "cancelling" | "dispatching" => Tone::Warn,
        "cancelled" => Tone::Dim,
        _ => Tone::Plain,
    };
    (state, tone)
}

fn reason_of(row: &Value) -> String {
    match row.get("failure").and_then(|failure| failure.get("code")) {
        Some(code) => crate::output::shown(code),
        None => field(row, "reason"),
    }
}

pub(crate) async fn show(args: ShowArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let answer = fleet.ask("execution", &ExecutionRequest { execution_id: args.id.clone() }).await?;
    if args.no_history {
        output.one(&answer)?;
        return Ok(exit::OK);
    }
    let subject = fleet.subjects.execution_event(&args.id);
    let history = EventLog::new(&fleet.bus).history(&subject).await.map_err(|error| {
        Failure::unavailable(format!("the history can't be read: {error} (without it: --no-history)"))
    })?;
    match output.format {
        Format::Json | Format::Jsonl => {
            let events: Vec<_> = history
                .iter()
                .map(|entry| format!("{{\"seq\":{},\"event\":{}}}", entry.seq, text_of(&entry.bytes)))
                .collect();
            output.line(&format!("{{\"execution\":{},\"history\":[{}]}}", answer.get(), events.join(",")))?;
        }
        Format::Table => {
            output.one(&answer)?;
            output.line("")?;
            output.table(
                &["SEQ", "TIME", "EVENT", "WHAT"],
                history.iter().map(|entry| summary(entry.seq, &entry.bytes)),
            )?;
        }
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_those_of_the_contract() {
        assert_eq!(read_state("cancelling"), Ok(State::Cancelling));
        assert!(read_state("sleeping").unwrap_err().contains("quarantined"));
    }
}
