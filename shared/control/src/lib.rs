//! Agents that are driven over HTTP (PROTOCOL.md 2.4): what they run, and ending something. The URL came from the
//! agent, so the address that is really used is checked against the guard below.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use rollcall_core::{ExecutionId, wire::Endpoint};
use rollcall_service::Cidr;
use serde::Deserialize;

/// Largest answer of a registry, in bytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Idle connections that are kept per host.
const IDLE_PER_HOST_MAX: usize = 1;
/// Registry calls at once; those beyond it wait inside their own timeout's round.
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

/// Which addresses may be used: public ones, and private ones in a configured range. Link-local (with the metadata
/// services of clouds), unspecified, multicast and documentation addresses never, in no disguise.
#[derive(Debug, Clone)]
struct Guard {
    allowed: Arc<[Cidr]>,
}

impl Guard {
    fn check(&self, address: IpAddr) -> Result<(), String> {
        let plain = undisguised(address);
        let refuse = |what: &str| Err(format!("{address} is {what}"));
        let never = match plain {
            IpAddr::V4(v4) => {
                v4.is_link_local()
                    || v4.is_unspecified()
                    || v4.is_multicast()
                    || v4.is_broadcast()
                    || v4.octets()[0] == 0
                    || v4.octets()[0] >= 240
            }
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast(),
        };
        if never {
            return refuse("never allowed");
        }
        if is_private(plain) && !self.allowed.iter().any(|range| range.contains(plain)) {
            return refuse("private and in no range of ROLLCALL_ALLOW_CIDRS");
        }
        Ok(())
    }

    fn check_url(&self, url: &Url) -> Result<(), String> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("scheme {:?} is not http or https", url.scheme()));
        }
        // Literals bypass the resolver, so they are checked here; names are checked when they are resolved.
        let host = url.host_str().ok_or("it names no host")?;
        match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(literal) => self.check(literal),
            Err(_) => Ok(()),
        }
    }
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            v4.is_private() || v4.is_loopback() || (v4.octets()[0] == 100 && (v4.octets()[1] & 0xc0) == 64)
        }
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local(),
    }
}

/// The v4 address inside a v6 one: mapped, compatible, NAT64 (`64:ff9b::/96`, `64:ff9b:1::/48`) and 6to4.
fn undisguised(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if v6.is_loopback() || v6.is_unspecified() {
        return address;
    }
    let s = v6.segments();
    let last = Ipv4Addr::from(((u32::from(s[6])) << 16) | u32::from(s[7]));
    let embedded = match s {
        [0, 0, 0, 0, 0, 0xffff | 0, _, _] | [0x64, 0xff9b, 0, 0, 0, 0, _, _] | [0x64, 0xff9b, 1, ..] => {
            Some(last)
        }
        [0x2002, high, low, ..] => Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))),
        _ => None,
    };
    embedded.map_or(IpAddr::V6(Ipv6Addr::from(s)), IpAddr::V4)
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let addresses: Vec<SocketAddr> = found.collect();
            // One bad address refuses the name: which one is used is not ours to choose.
            for address in &addresses {
                guard.check(address.ip())?;
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// The client. One for all agents.
pub struct Registries {
    guard: Guard,
    client: Result<reqwest::Client, String>,
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
    /// `allowed`: private ranges that may be called.
    pub fn new(allowed: &[Cidr]) -> Self {
        let guard = Guard { allowed: allowed.into() };
        let client = reqwest::Client::builder()
            .dns_resolver(Arc::new(guard.clone()))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .pool_max_idle_per_host(IDLE_PER_HOST_MAX)
            .build()
            .map_err(|error| error.to_string());
        Self { guard, client, places: tokio::sync::Semaphore::new(CALLS_MAX) }
    }

    fn prepare(&self, endpoint: &Endpoint, path: &[&str]) -> Result<(&reqwest::Client, Url), RegistryError> {
        let refused =
            |reason: String| RegistryError::Refused { url: endpoint.url.chars().take(200).collect(), reason };
        let mut url = Url::parse(&endpoint.url).map_err(|error| refused(error.to_string()))?;
        self.guard.check_url(&url).map_err(refused)?;
        url.path_segments_mut()
            .map_err(|()| refused("it can't be a base".to_owned()))?
            .pop_if_empty()
            .extend(path);
        url.set_query(None);
        let client = self.client.as_ref().map_err(|error| RegistryError::Ours(error.clone()))?;
        Ok((client, url))
    }

    /// What it knows: running, accepted and not started, and finished a moment ago.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn running(
        &self,
        endpoint: &Endpoint,
        timeout: Duration,
    ) -> Result<Vec<ExecutionId>, RegistryError> {
        let (client, url) = self.prepare(endpoint, &["api", "executions", "running"])?;
        let _place = self.places.acquire().await.map_err(|error| RegistryError::Ours(error.to_string()))?;
        let call = async {
            let answer = client.get(url).send().await.map_err(unreachable)?;
            if !answer.status().is_success() {
                return Err(RegistryError::Answer(answer.status().to_string()));
            }
            let mut body = Vec::new();
            let mut chunks = answer.bytes_stream();
            while let Some(chunk) = chunks.next().await {
                body.extend_from_slice(&chunk.map_err(unreachable)?);
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
        endpoint: &Endpoint,
        execution: &ExecutionId,
        timeout: Duration,
    ) -> Result<(), RegistryError> {
        let (client, url) =
            self.prepare(endpoint, &["api", "executions", execution.as_str(), "terminate"])?;
        let _place = self.places.acquire().await.map_err(|error| RegistryError::Ours(error.to_string()))?;
        let answer = client.post(url).timeout(timeout).send().await.map_err(unreachable)?;
        if answer.status().is_success() {
            return Ok(());
        }
        Err(RegistryError::Answer(answer.status().to_string()))
    }
}

fn unreachable(error: reqwest::Error) -> RegistryError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    RegistryError::Unreachable(text)
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

    fn guard(ranges: &[&str]) -> Guard {
        Guard { allowed: ranges.iter().map(|r| r.parse().unwrap()).collect() }
    }

    #[test]
    fn addresses_in_every_disguise_are_refused() {
        let none = guard(&[]);
        let all =
            guard(&["10.0.0.0/8", "127.0.0.0/8", "192.168.0.0/16", "172.16.0.0/12", "::1/128", "fc00::/7"]);
        for never in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "::169.254.169.254",
        ] {
            assert!(all.check(never.parse().unwrap()).is_err(), "{never}");
        }
        for private in
            ["10.1.2.3", "127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fd00::1", "100.64.0.1"]
        {
            assert!(none.check(private.parse().unwrap()).is_err(), "{private}");
        }
        for allowed in ["10.1.2.3", "::ffff:10.1.2.3", "fd00::1", "1.1.1.1", "2606:4700::1111"] {
            assert!(all.check(allowed.parse().unwrap()).is_ok(), "{allowed}");
        }
        for bad in
            ["http://127.0.0.1:80", "http://[::1]/", "http://2130706433/", "ftp://x/", "http://0x7f.1/"]
        {
            assert!(none.check_url(&Url::parse(bad).unwrap()).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_to_a_private_address_is_refused() {
        let registries = Registries::new(&[]);
        let endpoint = Endpoint { kind: "http".to_owned(), url: "http://localhost:9".to_owned() };
        let error = registries.running(&endpoint, Duration::from_secs(2)).await.unwrap_err();
        assert!(error.to_string().contains("ROLLCALL_ALLOW_CIDRS"), "{error}");
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
