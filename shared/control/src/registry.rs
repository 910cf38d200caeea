//! Agents that are driven over HTTP (PROTOCOL.md 2.4): what they run, and ending something. The URL came from the
//! agent, so the address that is really used is checked against the guard.

use std::{
    error::Error,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use rollcall_core::{ExecutionId, agent::Agent, wire::Endpoint};
use rollcall_service::Cidr;
use serde::Deserialize;

use crate::{Guard, Refusal, Trust, is_ours, resolve};

/// Largest answer of a registry, in bytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Idle connections that are kept per host.
const IDLE_PER_HOST_MAX: usize = 1;
/// Registry calls at once; those beyond it wait, before their own time begins.
pub const CALLS_MAX: usize = 512;

/// Why a registry call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// Its URL may not be used.
    #[error("its control url {url:?} may not be used: {reason}")]
    Refused {
        /// The URL, shortened.
        url: String,
        /// Why not.
        reason: String,
    },
    /// It can't be reached, or not in time.
    #[error("its registry does not answer: {0}")]
    Unreachable(String),
    /// It answers something else.
    #[error("its registry answers {0}")]
    Answer(String),
    /// The trouble is on our side and says nothing about the agent.
    #[error("no registry can be called from here: {0}")]
    Ours(String),
}

/// What a registry names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryList {
    /// What runs there.
    pub running: Vec<ExecutionId>,
    /// What it knows of besides: accepted and not begun, or finished a moment ago, so that whoever orchestrates it
    /// may not have said so yet. None of it has gone missing; none of it runs.
    pub known: Vec<ExecutionId>,
}

/// Where an agent is driven, and who said so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    endpoint: Endpoint,
    trust: Trust,
}

impl Control {
    /// The control endpoint of an agent, if it has one.
    #[must_use]
    pub fn of(agent: &Agent) -> Option<Self> {
        let trust = if agent.is_from_file() { Trust::Operator } else { Trust::Agent };
        Some(Self { endpoint: agent.control()?.clone(), trust })
    }
}

/// How names become addresses.
type Names = dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync;

/// The guard, asked for every address that a name leads to.
#[derive(Clone)]
struct Guarded {
    guard: Guard,
    trust: Trust,
    names: Arc<Names>,
}

impl Guarded {
    fn check_url(&self, url: &Url) -> Result<(), String> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("scheme {:?} is not http or https", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it carries a user or password".to_owned());
        }
        // Literals bypass the resolver, so they are checked here; names are checked when they are resolved.
        let host = url.host_str().ok_or("it names no host")?;
        match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(literal) => self.guard.check(literal, self.trust).map_err(|refusal| refusal.to_string()),
            Err(_) => Ok(()),
        }
    }

    fn client(&self) -> Result<reqwest::Client, String> {
        reqwest::Client::builder()
            .dns_resolver(Arc::new(self.clone()))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .pool_max_idle_per_host(IDLE_PER_HOST_MAX)
            .build()
            .map_err(|error| error.to_string())
    }
}

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let Self { guard, trust, names } = self.clone();
        Box::pin(async move {
            let addresses = names(name.as_str().to_owned()).await?;
            // One bad address refuses the name: which one is used is not ours to choose.
            for address in &addresses {
                guard.check(address.ip(), trust)?;
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// The clients: one for all agents that name their endpoint, one for those that the operator described.
pub struct Registries {
    of_agents: (Guarded, Result<reqwest::Client, String>),
    of_operator: (Guarded, Result<reqwest::Client, String>),
    places: tokio::sync::Semaphore,
}

#[derive(Deserialize)]
struct Running {
    #[serde(default)]
    executions: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    pending_ids: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    recently_completed_ids: Option<Vec<serde_json::Value>>,
}

impl Registries {
    /// `allowed`: private ranges that agents may name.
    #[must_use]
    pub fn new(allowed: &[Cidr]) -> Self {
        Self::with_names(allowed, Arc::new(|name| async move { resolve(&name, 0).await }.boxed()))
    }

    fn with_names(allowed: &[Cidr], names: Arc<Names>) -> Self {
        let of = |trust| {
            let guarded = Guarded { guard: Guard::new(allowed.to_vec()), trust, names: Arc::clone(&names) };
            let client = guarded.client();
            (guarded, client)
        };
        Self {
            of_agents: of(Trust::Agent),
            of_operator: of(Trust::Operator),
            places: tokio::sync::Semaphore::new(CALLS_MAX),
        }
    }

    fn prepare(&self, control: &Control, path: &[&str]) -> Result<(&reqwest::Client, Url), RegistryError> {
        let (guarded, client) = match control.trust {
            Trust::Agent => &self.of_agents,
            Trust::Operator => &self.of_operator,
        };
        let text = &control.endpoint.url;
        let refused = |reason: String| refused(control, reason);
        let mut url = Url::parse(text).map_err(|error| refused(error.to_string()))?;
        guarded.check_url(&url).map_err(refused)?;
        url.path_segments_mut()
            .map_err(|()| refused("it can't be a base".to_owned()))?
            .pop_if_empty()
            .extend(path);
        url.set_query(None);
        let client = client.as_ref().map_err(|error| RegistryError::Ours(error.clone()))?;
        Ok((client, url))
    }

    /// What it holds, and what it knows of besides.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn running(&self, control: &Control, timeout: Duration) -> Result<RegistryList, RegistryError> {
        let (client, url) = self.prepare(control, &["api", "executions", "running"])?;
        let _place = self.places.acquire().await.map_err(|error| RegistryError::Ours(error.to_string()))?;
        let call = async {
            let answer = client.get(url).send().await.map_err(|error| failed(control, &error))?;
            if !answer.status().is_success() {
                return Err(RegistryError::Answer(answer.status().to_string()));
            }
            let mut body = Vec::new();
            let mut chunks = answer.bytes_stream();
            while let Some(chunk) = chunks.next().await {
                body.extend_from_slice(&chunk.map_err(|error| failed(control, &error))?);
                if body.len() > ANSWER_BYTES_MAX {
                    return Err(RegistryError::Answer(format!("more than {ANSWER_BYTES_MAX} bytes")));
                }
            }
            read_running(&body)
        };
        tokio::time::timeout(timeout, call)
            .await
            .unwrap_or_else(|_| Err(RegistryError::Unreachable(format!("nothing within {timeout:?}"))))
    }

    /// Ends one there; `Ok` when it is dead.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn terminate(
        &self,
        control: &Control,
        execution: &ExecutionId,
        timeout: Duration,
    ) -> Result<(), RegistryError> {
        let (client, url) = self.prepare(control, &["api", "executions", execution.as_str(), "terminate"])?;
        let _place = self.places.acquire().await.map_err(|error| RegistryError::Ours(error.to_string()))?;
        let answer =
            client.post(url).timeout(timeout).send().await.map_err(|error| failed(control, &error))?;
        if answer.status().is_success() {
            return Ok(());
        }
        Err(RegistryError::Answer(answer.status().to_string()))
    }
}

/// Its URL may not be used.
fn refused(control: &Control, reason: String) -> RegistryError {
    RegistryError::Refused { url: control.endpoint.shown_url(200), reason }
}

/// A call that failed, by the innermost cause: too few file handles, or no network, are ours, and so is the guard that
/// refuses what a name leads to.
fn failed(control: &Control, error: &(dyn Error + 'static)) -> RegistryError {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    if let Some(refusal) = innermost.downcast_ref::<Refusal>() {
        return refused(control, refusal.to_string());
    }
    match innermost.downcast_ref::<io::Error>() {
        Some(io) if is_ours(io) => RegistryError::Ours(io.to_string()),
        _ => RegistryError::Unreachable(innermost.to_string()),
    }
}

/// Null, malformed and empty entries are skipped.
fn read_running(body: &[u8]) -> Result<RegistryList, RegistryError> {
    let running: Running = serde_json::from_slice(body)
        .map_err(|error| RegistryError::Answer(format!("what is no list of executions: {error}")))?;
    let executions =
        running.executions.ok_or_else(|| RegistryError::Answer("an object without executions".to_owned()))?;
    let id = |entry: &serde_json::Value| ExecutionId::new(entry.as_str()?).ok();
    let running_there = executions.iter().filter_map(|entry| id(entry.get("execution_id")?)).collect();
    let others = [running.pending_ids, running.recently_completed_ids];
    let known = others.iter().flatten().flatten().filter_map(id).collect();
    Ok(RegistryList { running: running_there, known })
}

#[cfg(test)]
mod tests;
