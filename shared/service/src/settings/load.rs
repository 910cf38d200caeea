//! Reading and checking: collects every problem before it gives up.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use figment::Figment;
use figment::providers::{Format, Serialized, Toml};
use figment::value::Value;
use tracing_subscriber::EnvFilter;

use super::table::{Kind, PREFIX, VARIABLES, Variable};
use super::{Loaded, LogFormat, Problem, Secret, Settings, SettingsError};
use crate::cidr::Cidr;

/// Names the TOML file.
const CONFIG: &str = "ROLLCALL_CONFIG";
/// Variables that are ours but no settings: tests, benchmarks and scripts.
const FOREIGN: [&str; 5] =
    ["ROLLCALL_TEST_", "ROLLCALL_BENCH_", "ROLLCALL_NATS_SERVER", "ROLLCALL_REDIS_SERVER", "ROLLCALL_CONFIG"];

pub(super) fn load(
    service: &str,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Loaded, SettingsError> {
    let mut problems = Vec::new();
    let Environment { values, config, warnings } = read_environment(environment, &mut problems);
    let file = config.as_deref().map(|path| read_file(path, &mut problems)).unwrap_or_default();
    let merged = merge(service, file, values);
    let mut reader = Reader { merged, file: config, problems };
    let settings = reader.settings();
    if reader.problems.is_empty() {
        Ok(Loaded { settings, warnings })
    } else {
        Err(SettingsError { problems: reader.problems })
    }
}

#[derive(Default)]
struct Environment {
    /// By key, as the TOML file names them.
    values: BTreeMap<String, String>,
    config: Option<PathBuf>,
    warnings: Vec<String>,
}

fn read_environment(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Vec<Problem>,
) -> Environment {
    let mut read = Environment::default();
    for (name, value) in environment {
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else { continue };
        if name == CONFIG && !value.is_empty() {
            read.config = Some(PathBuf::from(value));
            continue;
        }
        let Some(variable) = VARIABLES.iter().find(|variable| variable.name == name) else {
            if !FOREIGN.iter().any(|foreign| name.starts_with(foreign)) {
                read.warnings.push(format!("{name} is no setting and is ignored"));
            }
            continue;
        };
        match value.into_string() {
            Ok(value) if value.is_empty() => {}
            Ok(value) => {
                read.values.insert(variable.key(), value);
            }
            Err(_) => problems.push(problem(name, "", "is not UTF-8")),
        }
    }
    read.warnings.sort();
    read
}

/// The file's values by key, all as text.
fn read_file(path: &Path, problems: &mut Vec<Problem>) -> BTreeMap<String, String> {
    let name = format!("{CONFIG} ({})", path.display());
    if !path.is_file() {
        problems.push(problem(&name, "", "there is no such file"));
        return BTreeMap::new();
    }
    let values = match Figment::from(Toml::file_exact(path)).extract::<BTreeMap<String, Value>>() {
        Ok(values) => values,
        Err(errors) => {
            for error in errors {
                problems.push(problem(&name, "", &error.to_string()));
            }
            return BTreeMap::new();
        }
    };
    let mut texts = BTreeMap::new();
    for (key, value) in values {
        if !VARIABLES.iter().any(|variable| variable.key() == key) {
            problems.push(problem(&format!("{key} in {}", path.display()), "", "there is no such setting"));
            continue;
        }
        match text_of(&value) {
            Some(text) => {
                texts.insert(key, text);
            }
            None => {
                problems.push(problem(&format!("{key} in {}", path.display()), "", "is not a plain value"))
            }
        }
    }
    texts
}

/// A plain value, or a list of them, as the environment would have it.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(_, text) => Some(text.clone()),
        Value::Bool(_, flag) => Some(flag.to_string()),
        Value::Num(_, number) => number
            .to_i128()
            .map(|whole| whole.to_string())
            .or_else(|| number.to_u128().map(|whole| whole.to_string()))
            .or_else(|| number.to_f64().map(|real| real.to_string())),
        Value::Array(_, values) => {
            values.iter().map(text_of).collect::<Option<Vec<_>>>().map(|all| all.join(","))
        }
        Value::Char(..) | Value::Empty(..) | Value::Dict(..) => None,
    }
}

/// A value and whether it came from the environment, the file or the table.
#[derive(Clone)]
struct Found {
    text: String,
    from: From,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Default,
    File,
    Environment,
}

fn merge(
    service: &str,
    file: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
) -> BTreeMap<String, Found> {
    let defaults: BTreeMap<String, String> = VARIABLES
        .iter()
        .filter(|variable| !variable.default_for(service).is_empty())
        .map(|variable| (variable.key(), variable.default_for(service).to_owned()))
        .collect();
    let from = |key: &str| {
        if environment.contains_key(key) {
            From::Environment
        } else if file.contains_key(key) {
            From::File
        } else {
            From::Default
        }
    };
    let layered = Figment::from(Serialized::globals(&defaults))
        .merge(Serialized::globals(&file))
        .merge(Serialized::globals(&environment))
        .extract::<BTreeMap<String, String>>()
        .expect("three maps of text merge into one");
    layered.into_iter().map(|(key, text)| (key.clone(), Found { text, from: from(&key) })).collect()
}

fn problem(name: &str, value: &str, why: &str) -> Problem {
    Problem { name: name.to_owned(), value: value.to_owned(), why: why.to_owned() }
}

struct Reader {
    merged: BTreeMap<String, Found>,
    file: Option<PathBuf>,
    problems: Vec<Problem>,
}

impl Reader {
    /// What is bad is noted and stands in for itself with something harmless; with problems, nothing of it is used.
    fn settings(&mut self) -> Settings {
        let mut settings = Settings {
            nats_url: Secret(self.checked("ROLLCALL_NATS_URL", check_nats_url)),
            nats_creds: self.path("ROLLCALL_NATS_CREDS"),
            nats_user: self.text("ROLLCALL_NATS_USER"),
            nats_password: self.text("ROLLCALL_NATS_PASSWORD").map(Secret),
            redis_url: Secret(self.checked("ROLLCALL_REDIS_URL", check_redis_url)),
            prefix: self.checked("ROLLCALL_PREFIX", check_prefix),
            http_addr: self.address("ROLLCALL_HTTP_ADDR"),
            admin_addr: self.address("ROLLCALL_ADMIN_ADDR"),
            heartbeat_interval: self.millis("ROLLCALL_HEARTBEAT_INTERVAL_MS"),
            failure_threshold: self.count("ROLLCALL_FAILURE_THRESHOLD"),
            success_threshold: self.count("ROLLCALL_SUCCESS_THRESHOLD"),
            probe_interval: self.millis("ROLLCALL_PROBE_INTERVAL_MS"),
            probe_timeout: self.millis("ROLLCALL_PROBE_TIMEOUT_MS"),
            dispatch_grace: self.millis("ROLLCALL_DISPATCH_GRACE_MS"),
            default_timeout: self.millis("ROLLCALL_DEFAULT_TIMEOUT_MS"),
            terminate_grace: self.millis("ROLLCALL_TERMINATE_GRACE_MS"),
            lost_after: self.millis("ROLLCALL_LOST_AFTER_MS"),
            stale_after: self.millis("ROLLCALL_STALE_AFTER_MS"),
            forget_after: self.millis("ROLLCALL_FORGET_AFTER_MS"),
            audit_interval: self.millis("ROLLCALL_AUDIT_INTERVAL_MS"),
            cycle_interval: self.millis("ROLLCALL_CYCLE_INTERVAL_MS"),
            allow_cidrs: self.cidrs("ROLLCALL_ALLOW_CIDRS"),
            agents_file: self.path("ROLLCALL_AGENTS_FILE"),
            activity_timeout: Some(self.millis("ROLLCALL_ACTIVITY_TIMEOUT_MS"))
                .filter(|time| !time.is_zero()),
            queue_depth: self.count("ROLLCALL_QUEUE_DEPTH"),
            queue_ttl: self.millis("ROLLCALL_QUEUE_TTL_MS"),
            breaker_fraction: self.fraction("ROLLCALL_BREAKER_FRACTION"),
            breaker_min_agents: self.count("ROLLCALL_BREAKER_MIN_AGENTS"),
            breaker_window: self.millis("ROLLCALL_BREAKER_WINDOW_MS"),
            recovery_rate: self.count("ROLLCALL_RECOVERY_RATE"),
            log: self.checked("ROLLCALL_LOG", check_log),
            log_format: self.log_format("ROLLCALL_LOG_FORMAT"),
        };
        self.check_together(&mut settings);
        settings
    }

    fn text(&self, name: &str) -> Option<String> {
        self.found(name).map(|found| found.text.clone())
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    fn found(&self, name: &str) -> Option<&Found> {
        self.merged.get(&variable(name).key())
    }

    fn parse<T>(&mut self, name: &str, fallback: T, read: impl FnOnce(&str) -> Result<T, String>) -> T {
        let Some(found) = self.found(name).cloned() else { return fallback };
        match read(&found.text) {
            Ok(value) => value,
            Err(why) => {
                self.note(name, &found, &why);
                fallback
            }
        }
    }

    fn note(&mut self, name: &str, found: &Found, why: &str) {
        let variable = variable(name);
        let value = if variable.kind == Kind::Secret { "***" } else { &found.text };
        let name = match (&self.file, found.from) {
            (Some(file), From::File) => format!("{} in {}", variable.key(), file.display()),
            _ => name.to_owned(),
        };
        self.problems.push(problem(&name, value, why));
    }

    fn checked(&mut self, name: &str, check: impl FnOnce(&str) -> Result<(), String>) -> String {
        self.parse(name, String::new(), |text| check(text).map(|()| text.to_owned()))
    }

    fn address(&mut self, name: &str) -> SocketAddr {
        self.parse(name, SocketAddr::from(([127, 0, 0, 1], 0)), |text| {
            SocketAddr::from_str(text).map_err(|_| "must be address:port, like 127.0.0.1:8080".to_owned())
        })
    }

    fn whole(&mut self, name: &str) -> u64 {
        let (low, high) = match variable(name).kind {
            Kind::Count(low, high) | Kind::Millis(low, high) => (low, high),
            _ => (0, u64::MAX),
        };
        self.parse(name, low, |text| match text.parse::<u64>() {
            Ok(number) if (low..=high).contains(&number) => Ok(number),
            _ => Err(format!("must be a whole number from {low} to {high}")),
        })
    }

    fn count<T: TryFrom<u64> + Default>(&mut self, name: &str) -> T {
        // The bounds in the table fit the type.
        T::try_from(self.whole(name)).unwrap_or_default()
    }

    fn millis(&mut self, name: &str) -> Duration {
        Duration::from_millis(self.whole(name))
    }

    fn fraction(&mut self, name: &str) -> f64 {
        self.parse(name, 1.0, |text| match text.parse::<f64>() {
            Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
            _ => Err("must be above 0 and at most 1".to_owned()),
        })
    }

    fn cidrs(&mut self, name: &str) -> Vec<Cidr> {
        self.parse(name, Vec::new(), |text| {
            text.split(',')
                .map(str::trim)
                .filter(|one| !one.is_empty())
                .map(|one| one.parse::<Cidr>().map_err(|error| error.to_string()))
                .collect()
        })
    }

    fn log_format(&mut self, name: &str) -> LogFormat {
        self.parse(name, LogFormat::Auto, |text| match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("must be text or json".to_owned()),
        })
    }

    /// What only is wrong in company. Only what somebody gave can be wrong: a default gives way.
    fn check_together(&mut self, settings: &mut Settings) {
        if settings.probe_timeout > settings.probe_interval {
            if !self.is_given("ROLLCALL_PROBE_TIMEOUT_MS") {
                settings.probe_timeout = settings.probe_interval;
            } else if !self.is_given("ROLLCALL_PROBE_INTERVAL_MS") {
                settings.probe_interval = settings.probe_timeout;
            } else if !self.is_bad("ROLLCALL_PROBE_INTERVAL_MS") {
                self.note_if_found(
                    "ROLLCALL_PROBE_TIMEOUT_MS",
                    "must not be above ROLLCALL_PROBE_INTERVAL_MS",
                );
            }
        }
        if settings.nats_password.is_some() && settings.nats_user.is_none() {
            self.note_if_found("ROLLCALL_NATS_PASSWORD", "needs ROLLCALL_NATS_USER");
        }
        if settings.nats_creds.is_some() && settings.nats_user.is_some() {
            self.note_if_found("ROLLCALL_NATS_USER", "can't be used together with ROLLCALL_NATS_CREDS");
        }
    }

    fn is_given(&self, name: &str) -> bool {
        self.found(name).is_some_and(|found| found.from != From::Default)
    }

    /// The value stands in for one that is wrong already.
    fn is_bad(&self, name: &str) -> bool {
        let in_file = format!("{} in ", variable(name).key());
        self.problems.iter().any(|problem| problem.name == name || problem.name.starts_with(&in_file))
    }

    fn note_if_found(&mut self, name: &str, why: &str) {
        if let Some(found) = self.found(name).cloned() {
            self.note(name, &found, why);
        }
    }
}

fn variable(name: &str) -> &'static Variable {
    VARIABLES
        .iter()
        .find(|variable| variable.name == name)
        .expect("every setting that is read is in the table")
}

fn check_nats_url(text: &str) -> Result<(), String> {
    rollcall_nats::bus::check_url(text).map_err(|error| error.to_string())
}

fn check_redis_url(text: &str) -> Result<(), String> {
    let rest = ["redis://", "rediss://", "unix://", "redis+unix://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    match rest {
        Some(rest) if !rest.is_empty() && !rest.contains(char::is_whitespace) => Ok(()),
        _ => Err("must be redis://host:port, rediss://host:port or unix:///path".to_owned()),
    }
}

fn check_prefix(text: &str) -> Result<(), String> {
    rollcall_nats::Names::new(text)
        .map(drop)
        .map_err(|_| "must be 1 to 64 characters of A-Z a-z 0-9 _ -".to_owned())
}

fn check_log(text: &str) -> Result<(), String> {
    EnvFilter::try_new(text).map(drop).map_err(|error| error.to_string())
}
