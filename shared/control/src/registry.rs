//! Agents that are driven over HTTP (PROTOCOL.md 2.4): what they run, and ending something. The URL came from the
//! agent, so the address that is really used is checked against the guard.

use std::{error::Error, io, net::IpAddr, sync::Arc, time::Duration};

use futures_util::StreamExt;
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use rollcall_core::{ExecutionId, agent::Agent, wire::Endpoint};
use rollcall_service::Cidr;
use serde::Deserialize;

use crate::{Guard, Trust, is_ours, resolve};

/// Largest answer of a registry, in bytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Idle connections that are kept per host.
const IDLE_PER_HOST_MAX: usize = 1;
/// Registry calls at once; those beyond it wait, before their own time begins.
pub const CALLS_MAX: usize = 512;

/// Why a registry call failed.
#[derive(Debug, thiserror::Error)]
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

/// The guard, asked for every address that a name leads to.
#[derive(Debug, Clone)]
struct Guarded {
    guard: Guard,
    trust: Trust,
}

impl Guarded {
    fn check_url(&self, url: &Url) -> Result<(), String> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("scheme {:?} is not http or https", url.scheme()));
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
        let Self { guard, trust } = self.clone();
        Box::pin(async move {
            let addresses = resolve(name.as_str(), 0).await?;
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
        let of = |trust| {
            let guarded = Guarded { guard: Guard::new(allowed.to_vec()), trust };
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
        let refused =
            |reason: String| RegistryError::Refused { url: text.chars().take(200).collect(), reason };
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

    /// What it knows: running, accepted and not started, and finished a moment ago.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn running(
        &self,
        control: &Control,
        timeout: Duration,
    ) -> Result<Vec<ExecutionId>, RegistryError> {
        let (client, url) = self.prepare(control, &["api", "executions", "running"])?;
        let _place = self.places.acquire().await.map_err(|error| RegistryError::Ours(error.to_string()))?;
        let call = async {
            let answer = client.get(url).send().await.map_err(|error| failed(&error))?;
            if !answer.status().is_success() {
                return Err(RegistryError::Answer(answer.status().to_string()));
            }
            let mut body = Vec::new();
            let mut chunks = answer.bytes_stream();
            while let Some(chunk) = chunks.next().await {
                body.extend_from_slice(&chunk.map_err(|error| failed(&error))?);
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
        let answer = client.post(url).timeout(timeout).send().await.map_err(|error| failed(&error))?;
        if answer.status().is_success() {
            return Ok(());
        }
        Err(RegistryError::Answer(answer.status().to_string()))
    }
}

/// A call that failed, by the innermost cause: too few file handles, or no network, are ours.
fn failed(error: &(dyn Error + 'static)) -> RegistryError {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    match innermost.downcast_ref::<io::Error>() {
        Some(io) if is_ours(io) => RegistryError::Ours(io.to_string()),
        _ => RegistryError::Unreachable(innermost.to_string()),
    }
}

/// Null, malformed and empty entries are skipped.
fn read_running(body: &[u8]) -> Result<Vec<ExecutionId>, RegistryError> {
    let running: Running = serde_json::from_slice(body)
        .map_err(|error| RegistryError::Answer(format!("what is no list of executions: {error}")))?;
    let executions =
        running.executions.ok_or_else(|| RegistryError::Answer("an object without executions".to_owned()))?;
    let named = executions.iter().filter_map(|entry| entry.get("execution_id")?.as_str());
    // What has just finished there is known there: whoever orchestrates it may not have said so yet.
    let others = [running.pending_ids, running.recently_completed_ids];
    let others = others.iter().flatten().flatten().filter_map(|id| id.as_str());
    Ok(named.chain(others).filter_map(|id| ExecutionId::new(id).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(url: &str, trust: Trust) -> Control {
        Control { endpoint: Endpoint { kind: "http".to_owned(), url: url.to_owned() }, trust }
    }

    #[test]
    fn literals_are_checked_however_they_are_written() {
        let registries = Registries::new(&[]);
        for bad in
            ["http://127.0.0.1:80", "http://[::1]/", "http://2130706433/", "ftp://x/", "http://0x7f.1/"]
        {
            assert!(registries.prepare(&control(bad, Trust::Agent), &[]).is_err(), "{bad}");
        }
        assert!(registries.prepare(&control("http://10.0.0.7", Trust::Operator), &[]).is_ok());
        assert!(registries.prepare(&control("http://169.254.169.254", Trust::Operator), &[]).is_err());
    }

    #[tokio::test]
    async fn a_name_that_leads_to_a_private_address_is_refused() {
        let registries = Registries::new(&[]);
        let control = control("http://localhost:9", Trust::Agent);
        let error = registries.running(&control, Duration::from_secs(2)).await.unwrap_err();
        assert!(error.to_string().contains("ROLLCALL_ALLOW_CIDRS"), "{error}");
    }

    /// An error with a cause, as the client wraps them.
    #[derive(Debug, thiserror::Error)]
    #[error("sending the request")]
    struct Wrapped(#[source] io::Error);

    #[test]
    fn our_own_limits_are_not_held_against_the_agent() {
        for code in [24, 23, 105, 101, 99] {
            let error = failed(&Wrapped(io::Error::from_raw_os_error(code)));
            assert!(matches!(error, RegistryError::Ours(_)), "{code}: {error}");
        }
        for code in [111, 104, 113, 110] {
            let error = failed(&Wrapped(io::Error::from_raw_os_error(code)));
            assert!(matches!(error, RegistryError::Unreachable(_)), "{code}: {error}");
        }
    }

    /// Calls wait for a place before their own time begins: many others that hang don't make one time out.
    #[tokio::test]
    async fn waiting_for_a_place_is_not_counted_as_the_agents_time() {
        let mut registries = Registries::new(&["127.0.0.0/8".parse().unwrap()]);
        registries.places = tokio::sync::Semaphore::new(1);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let mut hung = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let mut request = [0; 1024];
                let read = stream.read(&mut request).await.unwrap_or(0);
                if request[..read].starts_with(b"GET /hangs") {
                    hung.push(stream);
                    continue;
                }
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"executions\":[]}";
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let hangs = control(&format!("{url}/hangs"), Trust::Agent);
        let answers = control(&url, Trust::Agent);
        let timeout = Duration::from_millis(500);
        let (one, two, three) = tokio::join!(
            registries.running(&hangs, timeout),
            registries.running(&hangs, timeout),
            registries.running(&answers, timeout)
        );
        assert!(matches!(one, Err(RegistryError::Unreachable(_))), "{one:?}");
        assert!(matches!(two, Err(RegistryError::Unreachable(_))), "{two:?}");
        assert_eq!(three.unwrap(), []);
    }

    #[test]
    fn odd_entries_of_a_registry_are_skipped() {
        let body =
            br#"{"executions":[{"execution_id":"a"},null,{"execution_id":null},{"execution_id":"x.y"},{}],
            "pending_ids":["p",null,""],"recently_completed_ids":["z",7]}"#;
        let ids: Vec<String> = read_running(body).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(ids, ["a", "p", "z"]);
        assert!(read_running(b"{}").is_err() && read_running(b"[]").is_err());
    }
}
