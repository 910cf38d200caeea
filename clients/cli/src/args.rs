//! The arguments that all commands share.

use std::{ffi::OsString, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand};
use rollcall_service::Settings;

use crate::{agent_run::RunArgs, command, exit, failure::Failure, output::Format};

/// Operates a Rollcall fleet.
#[derive(Debug, Parser)]
#[command(name = "rollcall", version, about, after_help = exit::TABLE, after_long_help = exit::with_settings(exit::TABLE))]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where NATS is [env: ROLLCALL_NATS_URL] [default: nats://127.0.0.1:4222].
    #[arg(long, global = true, value_name = "URL", hide_env = true)]
    nats_url: Option<String>,
    /// NATS credentials file [env: ROLLCALL_NATS_CREDS].
    #[arg(long, global = true, value_name = "FILE")]
    nats_creds: Option<PathBuf>,
    /// NATS user; its password is taken from ROLLCALL_NATS_PASSWORD [env: ROLLCALL_NATS_USER].
    #[arg(long, global = true, value_name = "USER")]
    nats_user: Option<String>,
    /// The fleet's prefix [env: ROLLCALL_PREFIX] [default: rollcall].
    #[arg(long, global = true)]
    prefix: Option<String>,
    /// TOML file with settings [env: ROLLCALL_CONFIG].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How answers are written.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
    /// How long a connection or an answer may take, in milliseconds.
    #[arg(long, global = true, value_name = "MS", default_value_t = 10_000)]
    answer_within_ms: u64,
}

impl Global {
    /// The settings: the options over the environment over the file.
    pub(crate) fn settings(&self) -> Result<rollcall_service::settings::Loaded, Failure> {
        let options: [(&str, Option<OsString>); 5] = [
            ("ROLLCALL_NATS_URL", self.nats_url.clone().map(Into::into)),
            ("ROLLCALL_NATS_CREDS", self.nats_creds.clone().map(Into::into)),
            ("ROLLCALL_NATS_USER", self.nats_user.clone().map(Into::into)),
            ("ROLLCALL_PREFIX", self.prefix.clone().map(Into::into)),
            ("ROLLCALL_CONFIG", self.config.clone().map(Into::into)),
        ];
        let given = options.iter().filter_map(|(name, value)| Some((OsString::from(name), value.clone()?)));
        // A command of `agent run` may itself call rollcall: what it was told of its execution is no setting.
        let environment =
            std::env::vars_os().filter(|(name, _)| !AGENT_VARIABLES.iter().any(|own| name == own));
        // The last value of a name counts.
        Settings::load_from("rollcall", environment.chain(given))
            .map_err(|error| Failure::new(exit::SETTINGS, error.to_string()))
    }

    pub(crate) const fn answer_within(&self) -> Duration {
        Duration::from_millis(self.answer_within_ms)
    }
}

/// What `agent run` tells its command in the environment.
const AGENT_VARIABLES: [&str; 5] = [
    "ROLLCALL_EXECUTION_ID",
    "ROLLCALL_ATTEMPT",
    "ROLLCALL_AGENT_ID",
    "ROLLCALL_DEADLINE",
    "ROLLCALL_CHECKPOINT",
];

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Operate(Operate),
    /// One agent: shows it, is it, lets it in.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Runs a fleet of simulated agents with every fault there is, and checks what becomes of it.
    Simulate(crate::simulate::SimulateArgs),
}

/// What is asked of the fleet.
#[derive(Debug, Subcommand)]
pub(crate) enum Operate {
    /// Hands work in.
    Submit(command::submit::SubmitArgs),
    /// Ends an execution.
    Cancel(command::executions::CancelArgs),
    /// Runs a failed, expired or quarantined execution again.
    Retry(command::executions::IdArgs),
    /// Lists executions.
    Executions(command::executions::ListArgs),
    /// Shows one execution and all that happened to it.
    Execution(command::executions::ShowArgs),
    /// Says why an execution is where it is, and what the watchdog thinks of it.
    Explain(command::executions::IdArgs),
    /// Lists agents.
    Agents,
    /// Shows slots and queues of an agent or a pool.
    Capacity(command::agents::CapacityArgs),
    /// Gives an agent nothing more.
    Drain(command::agents::DrainArgs),
    /// Gives it work again.
    Undrain(command::agents::IntentArgs),
    /// Tells an agent to shut down.
    Goodbye(command::agents::GoodbyeArgs),
    /// Counts an agent as gone.
    Forget(command::agents::IntentArgs),
    /// Shows events from the log.
    Events(command::events::EventsArgs),
    /// The watchdog's last cycle, or one now.
    #[command(subcommand)]
    Watchdog(command::watchdog::WatchdogCommand),
}

/// `rollcall agent`
#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Shows one agent and the evidence on it.
    Show(command::agents::AgentArgs),
    /// Lets an agent into the bus: gives it a user of its own.
    Credentials(command::credentials::CredentialsArgs),
    /// Makes any command an agent.
    Run(RunArgs),
    /// Kills the process groups of an agent that died (started by `agent run` itself).
    #[command(hide = true)]
    ReapGroups,
}

/// `key=value`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("a label is key=value".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_fits_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn help_lists_every_setting_with_its_default() {
        let mut all = Arguments::command();
        let whole = all.render_long_help().to_string();
        let run =
            all.find_subcommand_mut("agent").and_then(|agent| agent.find_subcommand_mut("run")).unwrap();
        for help in [whole, run.render_long_help().to_string()] {
            // However wide the terminal is.
            let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
            for variable in rollcall_service::settings::VARIABLES {
                let default = if variable.default.is_empty() { "none" } else { variable.default };
                let line = format!("{} {} [default: {default}]", variable.name, variable.meaning);
                assert!(help.contains(&line), "{line}");
            }
        }
    }

    #[test]
    fn labels() {
        assert_eq!("a=b=c".parse::<Label>().unwrap(), Label { key: "a".into(), value: "b=c".into() });
        assert!("a".parse::<Label>().is_err());
        assert!("=b".parse::<Label>().is_err());
    }
}
