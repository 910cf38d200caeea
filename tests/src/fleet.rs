//! A whole fleet: nats-server, redis-server and the services, on ports the kernel picks.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rollcall_capacity::testing::RedisServer;
use rollcall_core::{Clock as _, Prefix, subject::Subjects, time::SystemClock};
use rollcall_nats::{Bus, EventLog, testing::NatsServer};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    credentials::Credentials,
    process::{Process, binary},
    proxy::{Proxy, Upstream},
    wait::until,
};

pub use crate::options::Options;

/// How long anything may take that should happen soon, on two busy cores.
pub const SOON: Duration = Duration::from_secs(30);

/// The stories' settings: a second where the defaults have five, and the rest scaled alike.
const SCALED: [(&str, &str); 9] = [
    ("ROLLCALL_HEARTBEAT_INTERVAL_MS", "1000"),
    ("ROLLCALL_DISPATCH_GRACE_MS", "2000"),
    ("ROLLCALL_LOST_AFTER_MS", "1000"),
    ("ROLLCALL_TERMINATE_GRACE_MS", "1000"),
    ("ROLLCALL_CYCLE_INTERVAL_MS", "2000"),
    ("ROLLCALL_AUDIT_INTERVAL_MS", "2000"),
    ("ROLLCALL_DEFAULT_TIMEOUT_MS", "600000"),
    ("ROLLCALL_LOG", "info"),
    ("ROLLCALL_LOG_FORMAT", "json"),
];

/// An error answer of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiFailure {
    /// Its code.
    pub code: String,
    /// Its message.
    pub message: String,
    /// Whether the error headers of the NATS services API were there.
    pub headers: bool,
}

/// A running fleet.
pub struct Fleet {
    /// Service processes by name; the second of a service is `<name>-2`.
    pub services: BTreeMap<String, Process>,
    /// The bus's server.
    pub nats: NatsServer,
    /// The capacity's server.
    pub redis: RedisServer,
    /// A connection of the test's own.
    pub bus: Bus,
    /// The event log.
    pub log: EventLog,
    /// Subjects.
    pub subjects: Subjects,
    env: Vec<(String, String)>,
    credentials: Option<Credentials>,
    _slow_redis: Option<Proxy>,
    folder: TempDir,
}

impl Fleet {
    /// An ordinary fleet, ready.
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    /// A fleet, ready.
    ///
    /// # Panics
    /// When a server or a service does not start: nothing can be tested then.
    pub async fn start_with(options: Options) -> Self {
        let credentials = options.accounts.as_ref().map(|agents| Credentials::make(agents));
        let config =
            options.nats_config.clone().or_else(|| credentials.as_ref().map(Credentials::nats_config));
        let mut nats = NatsServer::start_with(config.as_deref()).unwrap_or_else(|e| panic!("{e}"));
        let mut redis = RedisServer::start();
        let bus = match &credentials {
            Some(credentials) => credentials.bus(&nats, "operator").await,
            None => nats.bus("rollcall").await,
        };
        let slow_redis = slowed(&redis, options.redis_delays).await;
        if options.servers_down {
            nats.stop().unwrap_or_else(|e| panic!("{e}"));
            redis.kill();
        }
        let mut env: Vec<(String, String)> = SCALED.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        env.push(("ROLLCALL_NATS_URL".into(), nats.url()));
        let redis_url =
            slow_redis.as_ref().map_or_else(|| redis.url(), |p| format!("redis://{}", p.address()));
        env.push(("ROLLCALL_REDIS_URL".into(), redis_url));
        if let Some(credentials) = &credentials {
            env.push(("ROLLCALL_NATS_USER".into(), "services".into()));
            env.push(("ROLLCALL_NATS_PASSWORD".into(), credentials.password("services")));
        }
        env.push(("ROLLCALL_ADMIN_ADDR".into(), "127.0.0.1:0".into()));
        env.push(("ROLLCALL_HTTP_ADDR".into(), "127.0.0.1:0".into()));
        for (name, value) in &options.env {
            env.retain(|(n, _)| n != name);
            env.push(((*name).to_owned(), value.clone()));
        }
        let mut fleet = Self {
            services: BTreeMap::new(),
            log: EventLog::new(&bus),
            bus,
            nats,
            redis,
            subjects: Subjects::new(Prefix::default()),
            env,
            credentials,
            _slow_redis: slow_redis,
            folder: TempDir::new().expect("a folder for the test"),
        };
        for (service, count) in &options.replicas {
            for index in 1..=*count {
                let name = if index == 1 { (*service).to_owned() } else { format!("{service}-{index}") };
                fleet.start_service(&name, service);
            }
        }
        if !options.servers_down {
            fleet.ready().await;
        }
        fleet
    }

    /// The passwords of a fleet with accounts.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        self.credentials.as_ref().expect("a fleet started with accounts")
    }

    fn start_service(&mut self, name: &str, service: &str) {
        let process = Process::start(name, &binary(service), &[], &self.env, self.folder.path());
        self.services.insert(name.to_owned(), process);
    }

    /// Starts another program with the fleet's environment, like `rollcall agent run`.
    #[must_use]
    pub fn program(&self, name: &str, program: &str, args: &[&str]) -> Process {
        self.program_as(name, program, args, &[])
    }

    /// The same, with other settings.
    #[must_use]
    pub fn program_as(&self, name: &str, program: &str, args: &[&str], other: &[(&str, String)]) -> Process {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        let mut env = self.env.clone();
        env.retain(|(n, _)| other.iter().all(|(o, _)| o != n));
        env.extend(other.iter().map(|(n, v)| ((*n).to_owned(), v.clone())));
        Process::start(name, &binary(program), &args, &env, self.folder.path())
    }

    /// The environment that programs get.
    #[must_use]
    pub fn env(&self) -> &[(String, String)] {
        &self.env
    }

    /// A service process.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn service(&mut self, name: &str) -> &mut Process {
        self.services.get_mut(name).unwrap_or_else(|| panic!("no service {name}"))
    }

    /// Kills a service and starts it again.
    pub async fn crash(&mut self, name: &str) {
        let process = self.service(name);
        process.kill();
        process.start_again();
        self.ready().await;
    }

    /// Waits until every service says that it is ready.
    pub async fn ready(&self) {
        let names: Vec<&String> = self.services.keys().collect();
        for name in names {
            let what = format!("{name} to be ready");
            until(&what, SOON, || async {
                let address = self.admin_address(name).ok_or_else(|| "no admin address yet".to_owned())?;
                let answer =
                    reqwest::get(format!("http://{address}/readyz")).await.map_err(|e| e.to_string())?;
                if answer.status().is_success() {
                    Ok(())
                } else {
                    Err(answer.text().await.unwrap_or_default())
                }
            })
            .await;
        }
    }

    /// Where a service's admin pages are, from its log.
    #[must_use]
    pub fn admin_address(&self, name: &str) -> Option<String> {
        logged_address(&self.services.get(name)?.output(), "admin pages")
    }

    /// Where the dashboard and the event streams are, from the notifier's log.
    #[must_use]
    pub fn http_address(&self) -> Option<String> {
        logged_address(&self.services.get("notifier")?.output(), "dashboard and event streams")
    }

    /// Asks the API.
    ///
    /// # Errors
    /// The API's error answer.
    pub async fn api(&self, verb: &str, body: Value) -> Result<Value, ApiFailure> {
        self.api_bytes(verb, body.to_string().into_bytes()).await
    }

    /// Asks the API with these very bytes.
    ///
    /// # Errors
    /// The API's error answer.
    pub async fn api_bytes(&self, verb: &str, body: Vec<u8>) -> Result<Value, ApiFailure> {
        let failure = |code: &str, message: String| ApiFailure { code: code.into(), message, headers: false };
        let reply = self
            .bus
            .request(self.subjects.api(verb), Bytes::from(body), Duration::from_secs(10))
            .await
            .map_err(|e| failure("transport", e.to_string()))?;
        let value: Value =
            serde_json::from_slice(&reply.payload).map_err(|e| failure("not_json", e.to_string()))?;
        // Views of executions and agents have an error among their other fields; an error answer has nothing else.
        let only_error = value.as_object().is_some_and(|fields| fields.len() == 1);
        match value.get("error").filter(|e| e.get("code").is_some() && only_error) {
            Some(error) => Err(ApiFailure {
                code: error["code"].as_str().unwrap_or_default().to_owned(),
                message: error["message"].as_str().unwrap_or_default().to_owned(),
                headers: reply.headers.as_ref().is_some_and(|h| {
                    h.get("Nats-Service-Error").is_some() && h.get("Nats-Service-Error-Code").is_some()
                }),
            }),
            None => Ok(value),
        }
    }

    /// Has the server deliver nothing of the event log to whoever follows it now, for `duration`. Direct reads still
    /// answer. Returns how many followers that concerns.
    ///
    /// # Panics
    /// When the server does not do it.
    pub async fn pause_tails(&self, duration: Duration) -> usize {
        let ask = |subject: String, body: Value| async move {
            let body = Bytes::from(body.to_string());
            let reply = self.bus.request(subject, body, SOON).await.expect("the server answers");
            serde_json::from_slice::<Value>(&reply.payload).expect("JSON")
        };
        let names = ask("$JS.API.CONSUMER.NAMES.ROLLCALL_EVENTS".to_owned(), json!({})).await;
        let names = names["consumers"].as_array().expect("a list of consumers").clone();
        let until = SystemClock::new().now().plus_ms(duration.as_millis().try_into().expect("short"));
        for name in &names {
            let subject =
                format!("$JS.API.CONSUMER.PAUSE.ROLLCALL_EVENTS.{}", name.as_str().expect("a name"));
            let paused = ask(subject, json!({"pause_until": until})).await;
            assert_eq!(paused["paused"], true, "{paused}");
        }
        names.len()
    }

    /// Submits and expects it to be taken. While a service restarts or rebuilds, the submission is repeated as the
    /// contract says (same id, same body).
    ///
    /// # Panics
    /// When it is refused for any other reason, or for too long.
    pub async fn submit(&self, body: Value) -> Value {
        let mut body = body;
        if body.get("execution_id").is_none() {
            body["execution_id"] = json!(uuid::Uuid::now_v7().to_string());
        }
        let last = std::cell::RefCell::new(String::new());
        until("a submission to be taken", SOON, || async {
            match self.api("submit", body.clone()).await {
                Ok(reply) => Ok(reply),
                Err(e) if matches!(e.code.as_str(), "not_ready" | "unavailable" | "transport") => {
                    last.replace(e.message.clone());
                    Err(e)
                }
                Err(e) => panic!("submit refused: {e:?}"),
            }
        })
        .await
    }

    /// An execution as the API shows it.
    pub async fn execution(&self, id: &str) -> Result<Value, ApiFailure> {
        self.api("execution", json!({"execution_id": id})).await
    }

    /// Waits until an execution is in this state, and returns it.
    pub async fn state(&self, id: &str, state: &str, within: Duration) -> Value {
        until(&format!("execution {id} to be {state}"), within, || async {
            match self.execution(id).await {
                Ok(view) if view["state"] == state => Ok(view),
                Ok(view) => Err(view.to_string()),
                Err(error) => Err(format!("{error:?}")),
            }
        })
        .await
    }

    /// Waits until an agent has this status, and returns it.
    pub async fn status(&self, id: &str, status: &str, within: Duration) -> Value {
        until(&format!("agent {id} to be {status}"), within, || async {
            match self.api("agent", json!({"agent_id": id})).await {
                Ok(view) if view["status"] == status => Ok(view),
                Ok(view) => Err(view.to_string()),
                Err(error) => Err(format!("{error:?}")),
            }
        })
        .await
    }

    /// Waits until an agent's slots are all free. An end is in the log before its slot comes back.
    pub async fn holds_nothing(&self, agent: &str) {
        until(&format!("agent {agent} to hold nothing"), SOON, || async {
            match self.api("capacity", json!({"agent_id": agent})).await {
                Ok(view) if view["held_count"] == 0 => Ok(()),
                Ok(view) => Err(view.to_string()),
                Err(error) => Err(format!("{error:?}")),
            }
        })
        .await;
    }

    /// All events of an execution, oldest first.
    ///
    /// # Panics
    /// When the log can't be read.
    pub async fn history(&self, id: &str) -> Vec<Value> {
        let id = rollcall_core::ExecutionId::new(id).expect("a valid id");
        self.events_on(&self.subjects.execution_event(&id)).await
    }

    /// All events of an agent, oldest first.
    ///
    /// # Panics
    /// When the log can't be read.
    pub async fn agent_history(&self, id: &str) -> Vec<Value> {
        let id = rollcall_core::AgentId::new(id).expect("a valid id");
        self.events_on(&self.subjects.agent_event(&id)).await
    }

    async fn events_on(&self, subject: &str) -> Vec<Value> {
        let entries = until("the log to answer", SOON, || async { self.log.history(subject).await }).await;
        entries.iter().map(|e| serde_json::from_slice(&e.bytes).expect("an event is JSON")).collect()
    }

    /// All events of a type without prefix in the whole log, oldest first.
    ///
    /// # Panics
    /// When the log can't be read.
    pub async fn events_of(&self, kind: &str) -> Vec<Value> {
        let wanted = format!("rollcall.{kind}");
        let (mut found, mut after) = (Vec::new(), 0);
        loop {
            let page = until("a page of the log", SOON, || self.log.read_range(after, 1000, &[])).await;
            let events = page.entries.iter().filter_map(|e| serde_json::from_slice::<Value>(&e.bytes).ok());
            found.extend(events.filter(|e| e["type"] == wanted.as_str()));
            after = page.next_after;
            if !page.more {
                return found;
            }
        }
    }

    /// What a service says on `/readyz`: nothing when it is ready, else what it waits for.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn waits_for(&self, name: &str) -> Result<Vec<String>, String> {
        let address = self.admin_address(name).ok_or_else(|| "no admin address yet".to_owned())?;
        let answer = reqwest::get(format!("http://{address}/readyz")).await.map_err(|e| e.to_string())?;
        let ready = answer.status().is_success();
        let body: Value = answer.json().await.map_err(|e| e.to_string())?;
        let waits: Vec<String> = serde_json::from_value(body["waiting_for"].clone()).unwrap_or_default();
        assert_eq!(ready, waits.is_empty(), "{body}");
        Ok(waits)
    }

    /// A metric without labels as a service shows it, if it does.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metric(&self, name: &str, metric: &str) -> Result<Option<f64>, String> {
        let address = self.admin_address(name).ok_or_else(|| "no admin address yet".to_owned())?;
        let answer = reqwest::get(format!("http://{address}/metrics")).await.map_err(|e| e.to_string())?;
        let text = answer.text().await.map_err(|e| e.to_string())?;
        let line = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        Ok(line.and_then(|value| value.trim().parse().ok()))
    }

    /// Waits for an event of an execution by its type without prefix, and returns the first.
    pub async fn event(&self, id: &str, kind: &str, within: Duration) -> Value {
        let wanted = format!("rollcall.{kind}");
        until(&format!("{kind} of {id}"), within, || async {
            let history = self.history(id).await;
            history.iter().find(|e| e["type"] == wanted.as_str()).cloned().ok_or_else(|| kinds(&history))
        })
        .await
    }

    /// Waits for an event of an agent by its type without prefix, and returns the first.
    pub async fn agent_event(&self, id: &str, kind: &str, within: Duration) -> Value {
        let wanted = format!("rollcall.{kind}");
        until(&format!("{kind} of {id}"), within, || async {
            let history = self.agent_history(id).await;
            history.iter().find(|e| e["type"] == wanted.as_str()).cloned().ok_or_else(|| kinds(&history))
        })
        .await
    }
}

async fn slowed(redis: &RedisServer, delays: &'static [Duration]) -> Option<Proxy> {
    if delays.is_empty() {
        return None;
    }
    let socket = redis.url().trim_start_matches("redis+unix://").into();
    Some(Proxy::start(Upstream::Socket(socket), delays).await)
}

/// The types of events, in order.
#[must_use]
pub fn kinds(events: &[Value]) -> Vec<String> {
    events
        .iter()
        .map(|e| e["type"].as_str().unwrap_or("?").trim_start_matches("rollcall.").to_owned())
        .collect()
}

/// Milliseconds since an instant, for messages.
#[must_use]
pub fn millis_since(begun: Instant) -> u128 {
    begun.elapsed().as_millis()
}

/// The address in the JSON log line with this message.
fn logged_address(output: &str, message: &str) -> Option<String> {
    output.lines().rev().find_map(|line| {
        let value: Value = serde_json::from_str(line).ok()?;
        let fields = value.get("fields").unwrap_or(&value);
        (fields["message"] == message).then(|| fields["address"].as_str().map(str::to_owned)).flatten()
    })
}
