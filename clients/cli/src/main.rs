//! `rollcall`: the operator's command line, the runner that makes any command an agent, and the fleet simulator.

mod agent_run;
mod args;
mod command;
mod connection;
mod exit;
mod failure;
mod output;
mod simulate;

use std::process::ExitCode;

use clap::Parser;
use rollcall_service::telemetry;

use crate::{
    args::{AgentCommand, Arguments, Command, Operate},
    connection::Fleet,
    failure::Failure,
    output::Output,
};

/// What is logged when nothing else is set: an operator asked a question and wants its answer.
const LOG_DEFAULT: &str = "warn";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if matches!(arguments.command, Command::Agent(AgentCommand::ReapGroups)) {
        // No runtime, no settings: it must live through whatever befalls its agent.
        agent_run::reap(std::io::stdin().lock());
        return ExitCode::from(exit::OK);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(Box::pin(run(arguments)));
            // A read of stdin or a name look-up that still waits must not hold up the exit.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(Failure::failed(format!("no runtime: {error}"))),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("rollcall: {failure}");
            ExitCode::from(failure.status)
        }
    }
}

async fn run(arguments: Arguments) -> Result<u8, Failure> {
    let loaded = arguments.global.settings()?;
    let settings = loaded.settings;
    let runs_agent = matches!(arguments.command, Command::Agent(AgentCommand::Run(_)));
    let log_is_set = std::env::var_os("ROLLCALL_LOG").is_some_and(|value| !value.is_empty());
    let filter = if runs_agent || log_is_set { settings.log.as_str() } else { LOG_DEFAULT };
    telemetry::init_logs(filter, settings.log_format).map_err(|error| Failure::failed(error.to_string()))?;
    for warning in loaded.warnings {
        tracing::warn!("{warning}");
    }
    let output = Output::new(arguments.global.output);
    let connect = || Fleet::connect(&settings, arguments.global.answer_within());
    match arguments.command {
        Command::Operate(command) => operate(command, &connect().await?, output).await,
        Command::Agent(AgentCommand::Show(args)) => {
            command::agents::show(args, &connect().await?, output).await
        }
        Command::Agent(AgentCommand::Run(args)) => agent_run::run(args, &settings).await,
        Command::Agent(AgentCommand::Credentials(args)) => {
            command::credentials::run(&args, &settings.prefix, output)
        }
        Command::Agent(AgentCommand::ReapGroups) => Ok(exit::OK),
        Command::Simulate(args) => simulate::run(args, &settings, output).await,
    }
}

async fn operate(command: Operate, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    match command {
        Operate::Submit(args) => command::submit::run(args, fleet, output).await,
        Operate::Cancel(args) => command::executions::cancel(args, fleet, output).await,
        Operate::Retry(args) => command::executions::ask("retry", args, fleet, output).await,
        Operate::Executions(args) => command::executions::list(args, fleet, output).await,
        Operate::Execution(args) => command::executions::show(args, fleet, output).await,
        Operate::Explain(args) => command::executions::ask("explain", args, fleet, output).await,
        Operate::Agents => command::agents::list(fleet, output).await,
        Operate::Capacity(args) => command::agents::capacity(args, fleet, output).await,
        Operate::Drain(args) => command::agents::drain(args, fleet, output).await,
        Operate::Undrain(args) => command::agents::intent("undrain", args, fleet, output).await,
        Operate::Goodbye(args) => command::agents::goodbye(args, fleet, output).await,
        Operate::Forget(args) => command::agents::intent("forget", args, fleet, output).await,
        Operate::Events(args) => command::events::run(args, fleet, output).await,
        Operate::Watchdog(command) => command::watchdog::run(command, fleet, output).await,
    }
}
