//! Every setting of every program: one table, one struct, one place where they are checked.
//!
//! Defaults, then the TOML file named by `ROLLCALL_CONFIG`, then the environment; an empty variable counts as unset.
//! Every program checks every key, and all that is wrong is named at once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::cidr::Cidr;

mod load;
mod table;

pub use table::{Kind, VARIABLES, Variable, help_table};

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value itself. Don't log it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// All settings, checked. Defaults and bounds are in [`VARIABLES`].
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where NATS is; several servers separated by commas.
    pub nats_url: Secret,
    /// NATS credentials file.
    pub nats_creds: Option<PathBuf>,
    /// NATS user, with `nats_password`.
    pub nats_user: Option<String>,
    /// NATS password.
    pub nats_password: Option<Secret>,
    /// Where Redis is; may hold a password.
    pub redis_url: Secret,
    /// Prefix of subjects, streams and Redis keys.
    pub prefix: String,
    /// Where the notifier serves the dashboard and event streams.
    pub http_addr: SocketAddr,
    /// Where this program serves `/healthz`, `/readyz` and `/metrics`.
    pub admin_addr: SocketAddr,
    /// When to expect the next heartbeat of an agent that names no interval.
    pub heartbeat_interval: Duration,
    /// Failures in a row that make an agent `error`.
    pub failure_threshold: u32,
    /// Successes in a row that make it `connected` again.
    pub success_threshold: u32,
    /// Time between two active probes of an agent.
    pub probe_interval: Duration,
    /// Time one probe may take.
    pub probe_timeout: Duration,
    /// After a dispatch, absence from the agent's list is no evidence for this long.
    pub dispatch_grace: Duration,
    /// Timeout of an execution when neither it nor its agent names one.
    pub default_timeout: Duration,
    /// Time an agent gets to end work before it is killed.
    pub terminate_grace: Duration,
    /// From disconnected to recovered.
    pub lost_after: Duration,
    /// Bounds every deferral of a recovery, from when it first fell due.
    pub stale_after: Duration,
    /// An agent that was bad for this long is `gone`.
    pub forget_after: Duration,
    /// Time between two audits of slots and queues against the log.
    pub audit_interval: Duration,
    /// Time between two rounds of asking registries.
    pub cycle_interval: Duration,
    /// Private or loopback ranges that agent-supplied URLs may point to.
    pub allow_cidrs: Vec<Cidr>,
    /// TOML file with agents that never beat.
    pub agents_file: Option<PathBuf>,
    /// An instance that beats while its work stands still for this long is told goodbye; `None`: never.
    pub activity_timeout: Option<Duration>,
    /// Most executions waiting in one queue; 0 queues nothing.
    pub queue_depth: usize,
    /// How long an execution may wait when it names no time.
    pub queue_ttl: Duration,
    /// Share of the connected agents whose silence suspends recovery, above 0 and up to 1.
    pub breaker_fraction: f64,
    /// Fewer silent agents than this never suspend it.
    pub breaker_min_agents: usize,
    /// Window in which they fell silent.
    pub breaker_window: Duration,
    /// Agent-lost recoveries per second, with a burst of the same size.
    pub recovery_rate: u32,
    /// Log filter (tracing directives).
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// Settings, and what is odd about the environment without being wrong.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings.
    pub settings: Settings,
    /// One sentence each, to be logged.
    pub warnings: Vec<String>,
}

/// One bad value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The variable, the key with its file, or the file.
    pub name: String,
    /// The value; hidden if it is a secret.
    pub value: String,
    /// What is wrong.
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(f, "{}: {}", self.name, self.why)
        } else {
            write!(f, "{} = {:?}: {}", self.name, self.value, self.why)
        }
    }
}

/// Everything that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} bad setting{}:{}", .problems.len(), if .problems.len() == 1 { "" } else { "s" },
    .problems.iter().map(|problem| format!("\n  {problem}")).collect::<String>())]
pub struct SettingsError {
    /// All of them.
    pub problems: Vec<Problem>,
}

impl Settings {
    /// Loads and checks the settings of `service` from this process's environment.
    ///
    /// # Errors
    /// Every bad value, all at once.
    pub fn load(service: &str) -> Result<Loaded, SettingsError> {
        Self::load_from(service, std::env::vars_os())
    }

    /// As [`Settings::load`], from the given environment.
    ///
    /// # Errors
    /// Every bad value, all at once.
    pub fn load_from(
        service: &str,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Loaded, SettingsError> {
        load::load(service, environment)
    }

    /// The defaults of `service`, as with an empty environment.
    pub fn defaults(service: &str) -> Self {
        let none: BTreeMap<OsString, OsString> = BTreeMap::new();
        Self::load_from(service, none).expect("the defaults are within their own bounds").settings
    }

    /// How to connect to NATS, as `connection_name`.
    pub fn bus_options(&self, connection_name: &str) -> rollcall_nats::BusOptions {
        rollcall_nats::BusOptions {
            url: self.nats_url.reveal().to_owned(),
            creds: self.nats_creds.clone(),
            user: self.nats_user.clone(),
            password: self.nats_password.as_ref().map(|password| password.reveal().to_owned()),
            connection_name: connection_name.to_owned(),
            prefix: self.prefix.clone(),
            // Each user of deploy/nats.conf may hear its own inbox only.
            inbox_prefix: self.nats_user.as_ref().map(|user| format!("_INBOX_{user}")),
            ..rollcall_nats::BusOptions::default()
        }
    }
}
