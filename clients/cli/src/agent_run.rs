//! `rollcall agent run -- CMD`: makes any command an agent. Each execution is one run of the command.

mod groups;
mod output;
mod reaper;
mod worker;

use std::{ffi::OsString, sync::Arc, time::Duration};

use clap::Args;
use rollcall_agent::{Agent, AgentBuilder, BuildError, RunError};
use rollcall_core::ids::{AgentId, Pool};
use rollcall_service::Settings;

use groups::Groups;
pub(crate) use reaper::reap;
use worker::CommandWorker;

use crate::{args::Label, failure::Failure};

/// What `rollcall agent run --help` says of the command it runs.
const CONDITIONS: &str = "\
Each execution runs CMD in a process group of its own, with these variables:
  ROLLCALL_EXECUTION_ID, ROLLCALL_ATTEMPT, ROLLCALL_AGENT_ID
  ROLLCALL_DEADLINE     when its time is up, RFC 3339 UTC
  ROLLCALL_CHECKPOINT   JSON that an earlier attempt left, if any
and without ROLLCALL_NATS_* and ROLLCALL_REDIS_URL. Its input comes as one line of JSON on stdin (CMD need not read it).

What becomes of it:
  exit status 0         completed; the result is stdout: JSON as it is, other text as a JSON string without its last line
                        break, nothing as null. Over 510 KiB, or not UTF-8: failed (too_large, not_text)
  any other status      failed, code exit_N or signal_N, with the end of stderr as its message
  terminate, shutdown   SIGTERM to the whole group, SIGKILL to it after the grace; it counts as stopped whatever the exit
                        status. When it is handed back, JSON on its stdout goes to the next attempt as its checkpoint
What CMD leaves running in its group when it ends is killed. Progress is the number of lines on stdout and stderr, from the
first line on: a command that prints none does not stand still.

Exit status: 0 after a clean drain, or do not restart (the log says which); 75 restart me; 1 something was left behind;
128+N a third signal; 64 bad settings. SIGTERM or SIGINT drains, a second one hands work back now, a third exits at once.";

/// What `rollcall agent run` is told.
#[derive(Debug, Args)]
#[command(after_help = CONDITIONS, after_long_help = crate::exit::with_settings(CONDITIONS))]
pub(crate) struct RunArgs {
    /// The agent's id.
    #[arg(long)]
    id: AgentId,
    /// Executions at once.
    #[arg(long, default_value_t = 1)]
    capacity: u32,
    /// The pool it belongs to.
    #[arg(long)]
    pool: Option<Pool>,
    /// A label, key=value; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<Label>,
    /// Time between heartbeats [default: ROLLCALL_HEARTBEAT_INTERVAL_MS].
    #[arg(long)]
    interval_ms: Option<u64>,
    /// How long an execution may run here when its submission does not say.
    #[arg(long)]
    timeout_ms: Option<u64>,
    /// How long running work may finish once the agent is to end.
    #[arg(long, default_value_t = 30_000)]
    drain_ms: u64,
    /// Time between SIGTERM and SIGKILL at shutdown [default: ROLLCALL_TERMINATE_GRACE_MS].
    #[arg(long)]
    grace_ms: Option<u64>,
    /// Where the fleet may probe it.
    #[arg(long, value_name = "URL")]
    probe_url: Option<String>,
    /// How to probe there: http, tcp, nats, acp, a2a, mcp, grpc.
    #[arg(long, default_value = "http", requires = "probe_url")]
    probe_kind: String,
    /// Its version, for people.
    #[arg(long = "agent-version", value_name = "VERSION")]
    version: Option<String>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs until the agent ends; returns the exit status.
pub(crate) async fn run(args: RunArgs, settings: &Settings) -> Result<u8, Failure> {
    let groups = Arc::new(Groups::start());
    let builder = describe(&args, settings);
    let mut command = args.command.into_iter();
    let program = command.next().ok_or_else(|| Failure::usage("no command"))?;
    let worker = CommandWorker::new(program, command.collect(), Arc::clone(&groups));
    // Commands run apart from us: nothing here can block a thread, so the work needs no runtime of its own.
    let agent =
        builder.work_on(tokio::runtime::Handle::current()).build(worker).map_err(|error| match error {
            BuildError::Runtime(_) => Failure::failed(error.to_string()),
            error => Failure::usage(error.to_string()),
        })?;
    let _strays = groups.reap_strays();
    let exit = agent.start(settings.bus_options("")).await.map_err(|error| match error {
        RunError::Connect(_) => {
            Failure::new(crate::exit::SETTINGS, format!("{:#}", anyhow::Error::from(error)))
        }
        error => Failure::failed(format!("{:#}", anyhow::Error::from(error))),
    })?;
    Ok(exit.status)
}

fn describe(args: &RunArgs, settings: &Settings) -> AgentBuilder {
    let mut builder = Agent::builder(args.id.as_str())
        .prefix(settings.prefix.clone())
        .capacity(args.capacity)
        .interval(args.interval_ms.map_or(settings.heartbeat_interval, Duration::from_millis))
        .drain(Duration::from_millis(args.drain_ms))
        .stop_grace(args.grace_ms.map_or(settings.terminate_grace, Duration::from_millis));
    if let Some(pool) = &args.pool {
        builder = builder.pool(pool.as_str());
    }
    if let Some(timeout) = args.timeout_ms {
        builder = builder.timeout(Duration::from_millis(timeout));
    }
    if let Some(url) = &args.probe_url {
        builder = builder.probe(args.probe_kind.as_str(), url.as_str());
    }
    if let Some(version) = &args.version {
        builder = builder.version(version.as_str());
    }
    for label in &args.labels {
        builder = builder.label(&label.key, &label.value);
    }
    builder
}
