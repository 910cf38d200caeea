//! `rollcall submit`

use std::{io::Read, time::Duration};

use clap::{Args, ValueEnum};
use rollcall_core::{
    execution::State,
    ids::{AgentId, ExecutionId, Pool},
    wire::{Delivery, ExecutionRequest, ExecutionView, OnLoss, PRIORITY_MAX, SubmitRequest},
};
use serde_json::value::RawValue;

use crate::{args::Label, connection::Fleet, exit, failure::Failure, output::Output};

/// Time between two looks at an execution that is waited for.
const WAIT_INTERVAL: Duration = Duration::from_millis(250);
/// Looks in a row that may fail while an execution is waited for: a service that is being restarted comes back.
const WAIT_FAILURES_MAX: u32 = 60;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnLossArg {
    Fail,
    Requeue,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DeliveryArg {
    Push,
    External,
}

/// What `rollcall submit` is told.
#[derive(Debug, Args)]
pub(crate) struct SubmitArgs {
    /// The agent that shall do it.
    #[arg(long, required_unless_present = "pool", conflicts_with = "pool")]
    agent: Option<AgentId>,
    /// The pool of which any agent may do it.
    #[arg(long)]
    pool: Option<Pool>,
    /// The input: JSON, @FILE with JSON in it, or - for JSON on stdin.
    #[arg(long, default_value = "null", value_name = "JSON|@FILE|-", allow_hyphen_values = true)]
    input: String,
    /// An id, so that submitting again starts nothing new.
    #[arg(long)]
    id: Option<ExecutionId>,
    /// Time it may run once dispatched.
    #[arg(long)]
    timeout_ms: Option<u64>,
    /// 0 first to 9 last [default: 5].
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=i64::from(PRIORITY_MAX)))]
    priority: Option<u8>,
    /// How long it may wait in a queue.
    #[arg(long)]
    queue_ttl_ms: Option<u64>,
    /// What a loss does to it [default: fail].
    #[arg(long, value_enum)]
    on_loss: Option<OnLossArg>,
    /// Losses after which it is quarantined [default: 3].
    #[arg(long)]
    max_attempts: Option<u32>,
    /// How long its progress may stand still.
    #[arg(long)]
    stall_timeout_ms: Option<u64>,
    /// How long its agent may be disconnected.
    #[arg(long)]
    lost_after_ms: Option<u64>,
    /// Who starts it: the dispatcher (push), or you once it is granted (external) [default: push].
    #[arg(long, value_enum)]
    delivery: Option<DeliveryArg>,
    /// A label, key=value; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<Label>,
    /// Waits for the end, shows it, and exits by how it ended.
    #[arg(long)]
    wait: bool,
}

/// Hands the work in, and waits for its end if that was asked for.
pub(crate) async fn run(args: SubmitArgs, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let wait = args.wait;
    let answer = fleet.ask("submit", &request(args)?).await?;
    if !wait {
        output.one(&answer)?;
        return Ok(exit::OK);
    }
    let reply: ExecutionRequest =
        serde_json::from_str(answer.get()).map_err(|error| Failure::failed(format!("submit: {error}")))?;
    await_end(fleet, output, &reply).await
}

fn request(args: SubmitArgs) -> Result<SubmitRequest, Failure> {
    Ok(SubmitRequest {
        execution_id: args.id,
        agent_id: args.agent,
        pool: args.pool,
        input: Some(read_input(&args.input)?),
        timeout_ms: args.timeout_ms,
        priority: args.priority,
        queue_ttl_ms: args.queue_ttl_ms,
        on_loss: args.on_loss.map(|on_loss| match on_loss {
            OnLossArg::Fail => OnLoss::Fail,
            OnLossArg::Requeue => OnLoss::Requeue,
        }),
        max_attempts: args.max_attempts,
        stall_timeout_ms: args.stall_timeout_ms,
        lost_after_ms: args.lost_after_ms,
        delivery: args.delivery.map(|delivery| match delivery {
            DeliveryArg::Push => Delivery::Push,
            DeliveryArg::External => Delivery::External,
        }),
        labels: args.labels.into_iter().map(|label| (label.key, label.value)).collect(),
    })
}

fn read_input(given: &str) -> Result<Box<RawValue>, Failure> {
    let (text, from) = if given == "-" {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|error| Failure::usage(format!("--input -: stdin can't be read: {error}")))?;
        (text, "stdin".to_owned())
    } else if let Some(path) = given.strip_prefix('@') {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::usage(format!("--input: {path} can't be read: {error}")))?;
        (text, path.to_owned())
    } else {
        (given.to_owned(), "--input".to_owned())
    };
    serde_json::from_str::<Box<RawValue>>(text.trim())
        .map_err(|error| Failure::usage(format!("{from} is not JSON: {error}")))
}

/// Looks until the execution has ended. Polls, because a submitter may ask the API and nothing else.
async fn await_end(fleet: &Fleet, output: Output, which: &ExecutionRequest) -> Result<u8, Failure> {
    let mut failures = 0;
    loop {
        match fleet.ask("execution", which).await {
            Ok(answer) => {
                failures = 0;
                let view: ExecutionView = serde_json::from_str(answer.get()).map_err(|error| {
                    Failure::failed(format!("execution: the answer can't be read: {error}"))
                })?;
                if view.state.is_terminal() {
                    output.one(&answer)?;
                    return Ok(status_of(view.state));
                }
            }
            Err(failure) if failure.status == exit::UNAVAILABLE && failures < WAIT_FAILURES_MAX => {
                failures += 1;
                tracing::warn!(%failure, "still waiting");
            }
            Err(failure) => return Err(failure),
        }
        tokio::time::sleep(WAIT_INTERVAL).await;
    }
}

const fn status_of(state: State) -> u8 {
    match state {
        State::Completed => exit::OK,
        State::Cancelled => exit::CANCELLED,
        State::Expired => exit::EXPIRED,
        State::Quarantined => exit::QUARANTINED,
        State::Failed | State::Queued | State::Dispatching | State::Running | State::Cancelling => {
            exit::FAILED
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_comes_from_the_argument_or_a_file_and_must_be_json() {
        assert_eq!(read_input(" {\"a\": 1} ").unwrap().get(), "{\"a\": 1}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[1,2]\n").unwrap();
        assert_eq!(read_input(&format!("@{}", file.path().display())).unwrap().get(), "[1,2]");
        for bad in ["hello", "", "{\"a\":}", "@/does/not/exist"] {
            assert_eq!(read_input(bad).unwrap_err().status, exit::USAGE, "{bad}");
        }
    }

    #[test]
    fn every_end_has_its_status() {
        assert_eq!(status_of(State::Completed), 0);
        assert_eq!(status_of(State::Failed), 1);
        assert_eq!(status_of(State::Cancelled), 4);
        assert_eq!(status_of(State::Expired), 5);
        assert_eq!(status_of(State::Quarantined), 6);
    }
}
