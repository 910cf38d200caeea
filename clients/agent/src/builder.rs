//! What an agent is told at its start: [`AgentBuilder`].

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use rollcall_core::{
    ids::{AgentId, InstanceId, InvalidId, Pool},
    subject::Subjects,
    wire::{CAPACITY_MAX, DURATION_MS_MAX, Endpoint, INTERVAL_MS},
};
use serde_json::value::{RawValue, to_raw_value};
use tokio::runtime::{Builder as RuntimeBuilder, Handle, Runtime};
use uuid::Uuid;

use crate::{Agent, Worker, control::Control};

/// Time between heartbeats when nothing else is said (PROTOCOL.md 8).
pub const INTERVAL_DEFAULT: Duration = Duration::from_secs(5);
/// How long running work may finish after the agent was told to end, when nothing else is said.
pub const DRAIN_DEFAULT: Duration = Duration::from_secs(30);
/// Time between asking work to end and killing it when this instance shuts down (PROTOCOL.md 8, terminate grace).
pub const STOP_GRACE_DEFAULT: Duration = Duration::from_secs(5);
/// Bytes that labels, probe and version may take in a heartbeat, so that its claims fit beside them.
pub const PROFILE_BYTES_MAX: usize = 4 * 1024;
/// Most threads of the runtime that work runs on.
const WORK_THREADS_MAX: usize = 8;

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An identifier that is none.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// A number out of its bounds.
    #[error("{name} is {value}, not within {from}..{to}")]
    OutOfBounds {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: u64,
        /// Smallest.
        from: u64,
        /// Largest.
        to: u64,
    },
    /// Labels, probe and version do not fit into a heartbeat.
    #[error("labels, probe and version take {0} bytes of each heartbeat, at most {PROFILE_BYTES_MAX}")]
    ProfileTooLarge(usize),
    /// The runtime for the work can't be started.
    #[error("no runtime for the work")]
    Runtime(#[source] io::Error),
}

/// What an agent says of itself and how it behaves. Checked by [`AgentBuilder::build`].
#[derive(Debug, Clone)]
#[must_use]
pub struct AgentBuilder {
    id: String,
    instance: Option<String>,
    capacity: u32,
    pool: Option<String>,
    prefix: Option<String>,
    interval: Duration,
    timeout: Option<Duration>,
    labels: BTreeMap<String, String>,
    version: Option<String>,
    probe: Option<Endpoint>,
    drain: Duration,
    stop_grace: Duration,
    work: Option<Handle>,
}

impl AgentBuilder {
    pub(crate) fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            instance: None,
            capacity: 1,
            pool: None,
            prefix: None,
            interval: INTERVAL_DEFAULT,
            timeout: None,
            labels: BTreeMap::new(),
            version: None,
            probe: None,
            drain: DRAIN_DEFAULT,
            stop_grace: STOP_GRACE_DEFAULT,
            work: None,
        }
    }

    /// This process start. Made up (a UUID) when it is not given; two processes must never share one.
    pub fn instance_id(mut self, id: impl Into<String>) -> Self {
        self.instance = Some(id.into());
        self
    }

    /// Executions it runs at once, 0 to 1024; 1.
    pub const fn capacity(mut self, capacity: u32) -> Self {
        self.capacity = capacity;
        self
    }

    /// The pool it belongs to; `default`.
    pub fn pool(mut self, pool: impl Into<String>) -> Self {
        self.pool = Some(pool.into());
        self
    }

    /// The fleet's prefix (`ROLLCALL_PREFIX`); `rollcall`.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// Time between heartbeats, 1 to 60 s; 5 s.
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long an execution may run here when its submission does not say.
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Adds a label.
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(name.into(), value.into());
        self
    }

    /// Its version, for people.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    /// Where the fleet may probe it: `http`, `tcp`, `nats`, `acp`, `a2a`, `mcp` or `grpc`, and the address.
    pub fn probe(mut self, kind: impl Into<String>, url: impl Into<String>) -> Self {
        self.probe = Some(Endpoint { kind: kind.into(), url: url.into() });
        self
    }

    /// How long running work may finish once the agent is to end; 30 s. What is left then is handed back.
    pub const fn drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }

    /// Time between asking work to end and killing it when this instance shuts down; 5 s.
    pub const fn stop_grace(mut self, grace: Duration) -> Self {
        self.stop_grace = grace;
        self
    }

    /// Runs the work on this runtime. Without it the agent starts one of its own, so that work that blocks its thread
    /// can't hold up the heartbeat.
    pub fn work_on(mut self, runtime: Handle) -> Self {
        self.work = Some(runtime);
        self
    }

    /// Checks everything and puts the agent together; nothing is sent before [`Agent::start`] or [`Agent::run`].
    ///
    /// # Errors
    /// The first thing that is wrong, by its name.
    pub fn build<W: Worker>(self, worker: W) -> Result<Agent<W>, BuildError> {
        let instance = self.instance.unwrap_or_else(|| Uuid::now_v7().to_string());
        let milliseconds = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        within("capacity", u64::from(self.capacity), 0, u64::from(CAPACITY_MAX))?;
        let interval_ms =
            within("interval_ms", milliseconds(self.interval), *INTERVAL_MS.start(), *INTERVAL_MS.end())?;
        let timeout_ms = self
            .timeout
            .map(|timeout| within("timeout_ms", milliseconds(timeout), 1, DURATION_MS_MAX))
            .transpose()?;
        within("drain_ms", milliseconds(self.drain), 0, DURATION_MS_MAX)?;
        within("stop_grace_ms", milliseconds(self.stop_grace), 0, DURATION_MS_MAX)?;
        let profile = Profile {
            id: AgentId::new(&self.id)?,
            instance: InstanceId::new(&instance)?,
            capacity: self.capacity,
            pool: self.pool.as_deref().map_or_else(|| Ok(Pool::default()), Pool::new)?,
            interval_ms,
            timeout_ms,
            version: self.version,
            labels: (!self.labels.is_empty()).then(|| raw(&self.labels)),
            probe: self.probe.map(|probe| raw(&probe)),
        };
        let bytes = profile.labels.as_ref().map_or(0, |raw| raw.get().len())
            + profile.probe.as_ref().map_or(0, |raw| raw.get().len())
            + profile.version.as_ref().map_or(0, String::len);
        if bytes > PROFILE_BYTES_MAX {
            return Err(BuildError::ProfileTooLarge(bytes));
        }
        let prefix = self.prefix.as_deref().map(rollcall_core::Prefix::new).transpose()?.unwrap_or_default();
        let work = match self.work {
            Some(handle) => WorkRuntime { handle, own: None },
            None => WorkRuntime::start().map_err(BuildError::Runtime)?,
        };
        Ok(Agent {
            subjects: Subjects::new(prefix),
            profile: Arc::new(profile),
            interval: self.interval,
            stop_grace: self.stop_grace,
            control: Arc::new(Control::new(self.drain)),
            work,
            worker: Arc::new(worker),
        })
    }
}

fn within(name: &'static str, value: u64, from: u64, to: u64) -> Result<u64, BuildError> {
    if (from..=to).contains(&value) {
        Ok(value)
    } else {
        Err(BuildError::OutOfBounds { name, value, from, to })
    }
}

fn raw<T: serde::Serialize>(value: &T) -> Box<RawValue> {
    to_raw_value(value).expect("maps with text keys and text values are JSON")
}

/// What every heartbeat says besides the claims.
#[derive(Debug)]
pub(crate) struct Profile {
    pub(crate) id: AgentId,
    pub(crate) instance: InstanceId,
    pub(crate) capacity: u32,
    pub(crate) pool: Pool,
    pub(crate) interval_ms: u64,
    pub(crate) timeout_ms: Option<u64>,
    pub(crate) version: Option<String>,
    pub(crate) labels: Option<Box<RawValue>>,
    pub(crate) probe: Option<Box<RawValue>>,
}

/// Where the work runs.
#[derive(Debug)]
pub(crate) struct WorkRuntime {
    pub(crate) handle: Handle,
    own: Option<Runtime>,
}

impl WorkRuntime {
    fn start() -> io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(WORK_THREADS_MAX);
        let runtime = RuntimeBuilder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("work")
            .enable_all()
            .build()?;
        Ok(Self { handle: runtime.handle().clone(), own: Some(runtime) })
    }
}

impl Drop for WorkRuntime {
    fn drop(&mut self) {
        // Never waits: work that blocks its thread must not hold up the exit.
        if let Some(runtime) = self.own.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Finish, worker_fn};

    fn refused(builder: AgentBuilder) -> String {
        match builder.build(worker_fn(|_| async { Finish::Completed(None) })) {
            Ok(_) => panic!("built"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn every_bad_setting_is_named() {
        let agent = || Agent::builder("a");
        let cases = [
            (Agent::builder("a.b"), "agent_id"),
            (agent().instance_id("*"), "instance_id"),
            (agent().pool(""), "pool"),
            (agent().prefix("x y"), "prefix"),
            (agent().capacity(1025), "capacity is 1025"),
            (agent().interval(Duration::from_millis(999)), "interval_ms is 999"),
            (agent().timeout(Duration::ZERO), "timeout_ms is 0"),
            (agent().label("x", "y".repeat(PROFILE_BYTES_MAX)), "labels"),
        ];
        for (builder, names) in cases {
            let error = refused(builder);
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn two_agents_are_two_instances() {
        let build = || Agent::builder("a").build(worker_fn(|_| async { Finish::Completed(None) })).unwrap();
        assert_ne!(build().instance_id(), build().instance_id());
    }
}
