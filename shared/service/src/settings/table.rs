//! The table of settings: names, defaults, bounds, meanings. `--help` and the documentation are made from it.

use std::fmt::Write;

/// What a setting holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Text of any form.
    Text,
    /// Text that is never printed when it is wrong.
    Secret,
    /// A path to a file.
    File,
    /// `address:port` to listen on.
    Address,
    /// Whole number within bounds (both allowed).
    Count(u64, u64),
    /// Milliseconds within bounds (both allowed).
    Millis(u64, u64),
    /// Above 0 and up to 1.
    Fraction,
    /// Ranges separated by commas.
    Cidrs,
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Variable {
    /// Environment variable.
    pub name: &'static str,
    /// Default as text; empty: none.
    pub default: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// What it means.
    pub meaning: &'static str,
}

impl Variable {
    /// Key in the TOML file.
    pub fn key(&self) -> String {
        self.name.strip_prefix(PREFIX).unwrap_or(self.name).to_ascii_lowercase()
    }

    /// Default of `service`; only the admin address differs between services.
    pub fn default_for(&self, service: &str) -> &'static str {
        if self.name != "ROLLCALL_ADMIN_ADDR" {
            return self.default;
        }
        ADMIN_ADDRS.iter().find(|(name, _)| *name == service).map_or(self.default, |(_, addr)| addr)
    }
}

/// What every variable starts with.
pub(super) const PREFIX: &str = "ROLLCALL_";

/// PROTOCOL.md 7.
const ADMIN_ADDRS: [(&str, &str); 4] = [
    ("health-prober", "127.0.0.1:9101"),
    ("dispatcher", "127.0.0.1:9102"),
    ("watchdog", "127.0.0.1:9103"),
    ("notifier", "127.0.0.1:9104"),
];

const SECOND: u64 = 1000;
const HOUR: u64 = 3600 * SECOND;
const DAY: u64 = 24 * HOUR;
/// Longest time anything may be set to. Keeps sums of times far from overflow.
const LONGEST: u64 = 365 * DAY;
/// Shortest time between two rounds of anything.
const TICK: u64 = 10;

const fn var(name: &'static str, default: &'static str, kind: Kind, meaning: &'static str) -> Variable {
    Variable { name, default, kind, meaning }
}

/// Every setting of every program (PROTOCOL.md 8).
pub const VARIABLES: [Variable; 32] = [
    var("ROLLCALL_NATS_URL", "nats://127.0.0.1:4222", Kind::Secret, "NATS servers, separated by commas"),
    var("ROLLCALL_NATS_CREDS", "", Kind::File, "NATS credentials file"),
    var("ROLLCALL_NATS_USER", "", Kind::Text, "NATS user"),
    var("ROLLCALL_NATS_PASSWORD", "", Kind::Secret, "NATS password"),
    var("ROLLCALL_REDIS_URL", "redis://127.0.0.1:6379", Kind::Secret, "Redis server (dispatcher only)"),
    var("ROLLCALL_PREFIX", "rollcall", Kind::Text, "prefix of subjects, streams and Redis keys"),
    var("ROLLCALL_HTTP_ADDR", "127.0.0.1:8080", Kind::Address, "dashboard and event streams (notifier only)"),
    var("ROLLCALL_ADMIN_ADDR", "127.0.0.1:9100", Kind::Address, "/healthz, /readyz and /metrics"),
    var(
        "ROLLCALL_HEARTBEAT_INTERVAL_MS",
        "5000",
        // Less than an agent may name: who names none has nothing against it.
        Kind::Millis(100, 60 * SECOND),
        "heartbeat interval when an agent names none",
    ),
    var(
        "ROLLCALL_FAILURE_THRESHOLD",
        "3",
        Kind::Count(1, 1000),
        "failures in a row that make an agent error",
    ),
    var(
        "ROLLCALL_SUCCESS_THRESHOLD",
        "2",
        Kind::Count(1, 1000),
        "successes in a row that make it connected again",
    ),
    var(
        "ROLLCALL_PROBE_INTERVAL_MS",
        "30000",
        Kind::Millis(TICK, DAY),
        "time between two active probes of an agent",
    ),
    var(
        "ROLLCALL_PROBE_TIMEOUT_MS",
        "3000",
        Kind::Millis(TICK, HOUR),
        "time one probe may take, at most its interval; and one call of a registry",
    ),
    var(
        "ROLLCALL_DISPATCH_GRACE_MS",
        "60000",
        Kind::Millis(0, DAY),
        "after a dispatch, absence is no evidence for this long",
    ),
    var(
        "ROLLCALL_DEFAULT_TIMEOUT_MS",
        "900000",
        Kind::Millis(TICK, LONGEST),
        "execution timeout when neither it nor its agent names one",
    ),
    var("ROLLCALL_TERMINATE_GRACE_MS", "5000", Kind::Millis(0, HOUR), "time to end work before it is killed"),
    var("ROLLCALL_LOST_AFTER_MS", "60000", Kind::Millis(1, DAY), "from disconnected to recovered"),
    var(
        "ROLLCALL_STALE_AFTER_MS",
        "7200000",
        Kind::Millis(TICK, LONGEST),
        "the safety net that bounds every deferral of a recovery",
    ),
    var(
        "ROLLCALL_FORGET_AFTER_MS",
        "86400000",
        Kind::Millis(TICK, LONGEST),
        "an agent that was bad for this long is gone",
    ),
    var(
        "ROLLCALL_AUDIT_INTERVAL_MS",
        "30000",
        Kind::Millis(TICK, DAY),
        "time between two audits of slots and queues",
    ),
    var(
        "ROLLCALL_CYCLE_INTERVAL_MS",
        "30000",
        Kind::Millis(TICK, DAY),
        "time between two rounds of asking registries",
    ),
    var(
        "ROLLCALL_ALLOW_CIDRS",
        "",
        Kind::Cidrs,
        "private or loopback ranges that agent-supplied URLs may point to, separated by commas",
    ),
    var("ROLLCALL_AGENTS_FILE", "", Kind::File, "TOML file with agents that never beat"),
    var(
        "ROLLCALL_ACTIVITY_TIMEOUT_MS",
        "0",
        Kind::Millis(0, LONGEST),
        "an instance that beats while its work stands still for this long is told goodbye, 0 never",
    ),
    var(
        "ROLLCALL_QUEUE_DEPTH",
        "50",
        Kind::Count(0, 1_000_000),
        "most executions waiting in one queue, 0 queues nothing",
    ),
    var(
        "ROLLCALL_QUEUE_TTL_MS",
        "86400000",
        Kind::Millis(TICK, LONGEST),
        "how long an execution may wait in a queue",
    ),
    var(
        "ROLLCALL_BREAKER_FRACTION",
        "0.5",
        Kind::Fraction,
        "share of the connected agents whose silence suspends recovery",
    ),
    var(
        "ROLLCALL_BREAKER_MIN_AGENTS",
        "3",
        Kind::Count(1, 1_000_000),
        "fewer silent agents than this never suspend recovery",
    ),
    var("ROLLCALL_BREAKER_WINDOW_MS", "60000", Kind::Millis(SECOND, DAY), "window in which they fell silent"),
    var(
        "ROLLCALL_RECOVERY_RATE",
        "100",
        Kind::Count(1, 1_000_000),
        "agent-lost recoveries per second, with a burst of the same size",
    ),
    var("ROLLCALL_LOG", "info", Kind::Text, "log filter (tracing directives)"),
    var("ROLLCALL_LOG_FORMAT", "", Kind::Text, "text or json; text on a terminal, else json"),
];

/// The table as `--help` shows it.
pub fn help_table(service: &str) -> String {
    let width = VARIABLES.iter().map(|variable| variable.name.len()).max().unwrap_or(0);
    let mut text =
        String::from("Settings (environment, or keys of the TOML file named by ROLLCALL_CONFIG):\n");
    for variable in &VARIABLES {
        let default = match variable.default_for(service) {
            "" => "none",
            default => default,
        };
        let (name, meaning) = (variable.name, variable.meaning);
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:width$}  {meaning} [default: {default}]");
    }
    text
}
