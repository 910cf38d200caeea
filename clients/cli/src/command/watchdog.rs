//! `rollcall watchdog`

use clap::Subcommand;
use serde_json::json;

use crate::{connection::Fleet, exit, failure::Failure, output::Output};

/// `rollcall watchdog`
#[derive(Debug, Subcommand)]
pub(crate) enum WatchdogCommand {
    /// Shows the report of its last cycle.
    Status,
    /// Runs a cycle now and shows its report.
    Run {
        /// Says what it would do and does nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

pub(crate) async fn run(command: WatchdogCommand, fleet: &Fleet, output: Output) -> Result<u8, Failure> {
    let answer = match command {
        WatchdogCommand::Status => fleet.ask("watchdog.status", &json!({})).await?,
        WatchdogCommand::Run { dry_run } => fleet.ask("watchdog.run", &json!({ "dry_run": dry_run })).await?,
    };
    output.one(&answer)?;
    Ok(exit::OK)
}
