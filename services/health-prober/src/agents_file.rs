//! Agents that never beat, described by the operator in a TOML file (`ROLLCALL_AGENTS_FILE`), read again when it changes.
//!
//! ```toml
//! [[agents]]
//! agent_id = "legacy-1"
//! capacity = 2
//! pool = "default"                                                # optional, like everything below
//! timeout_ms = 900000
//! version = "3.1"
//! labels = { zone = "b" }
//! probe = { kind = "http", url = "http://10.0.0.7:8080/health" }   # without it, its control endpoint is probed
//! control = { kind = "http", url = "http://10.0.0.7:8080" }        # PROTOCOL.md 2.4
//! ```

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rollcall_core::event::Profile;
use rollcall_core::wire::{CAPACITY_MAX, DURATION_MS_MAX, Endpoint};
use rollcall_core::{AgentId, InstanceId, Pool};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::shell::Input;

/// How often the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// One agent of the file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileAgent {
    /// Its id.
    pub agent_id: AgentId,
    /// Executions it can hold at once.
    pub capacity: u32,
    /// Its pool.
    #[serde(default)]
    pub pool: Pool,
    /// Its default execution timeout.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// For people.
    #[serde(default)]
    pub version: Option<String>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Where it is probed.
    #[serde(default)]
    pub probe: Option<Endpoint>,
    /// Where it is driven.
    #[serde(default)]
    pub control: Option<Endpoint>,
}

impl FileAgent {
    /// What its registration says.
    #[must_use]
    pub fn profile(&self, instance_id: InstanceId) -> Profile {
        Profile {
            agent_id: self.agent_id.clone(),
            instance_id,
            capacity: self.capacity,
            pool: self.pool.clone(),
            interval_ms: None,
            timeout_ms: self.timeout_ms,
            version: self.version.clone(),
            labels: self.labels.clone(),
            probe: self.probed(),
            control: self.control.clone(),
        }
    }

    /// Its probe, or else its control endpoint's list of executions.
    fn probed(&self) -> Option<Endpoint> {
        self.probe.clone().or_else(|| {
            self.control.as_ref().map(|control| Endpoint {
                kind: "http".to_owned(),
                url: format!("{}/api/executions/running", control.url.trim_end_matches('/')),
            })
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentsFile {
    #[serde(default)]
    agents: Vec<FileAgent>,
}

/// Why the file is not used. What was read before stays in force.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not readable.
    #[error("{path} can't be read")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Larger than is read.
    #[error("{path} has {bytes} bytes, at most {FILE_BYTES_MAX}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Not as described.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
}

/// Reads and checks the text of a file.
///
/// # Errors
/// What is wrong, in words.
pub fn parse(text: &str) -> Result<Vec<FileAgent>, String> {
    let file: AgentsFile = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut seen = HashSet::new();
    for agent in &file.agents {
        let id = &agent.agent_id;
        if !seen.insert(id) {
            return Err(format!("agent {id} is listed twice"));
        }
        if agent.capacity > CAPACITY_MAX {
            return Err(format!("agent {id}: capacity is {}, at most {CAPACITY_MAX}", agent.capacity));
        }
        if let Some(timeout) = agent.timeout_ms.filter(|t| *t == 0 || *t > DURATION_MS_MAX) {
            return Err(format!("agent {id}: timeout_ms is {timeout}, not within 1..{DURATION_MS_MAX}"));
        }
        if agent.probe.is_none() && agent.control.is_none() {
            return Err(format!("agent {id}: neither probe nor control, nothing could be known of it"));
        }
        if let Some(control) = agent.control.as_ref().filter(|control| control.kind != "http") {
            return Err(format!("agent {id}: control has kind {:?}, only http is driven", control.kind));
        }
    }
    Ok(file.agents)
}

async fn load(path: &Path) -> Result<Vec<FileAgent>, FileError> {
    let io = |source| FileError::Io { path: path.to_owned(), source };
    let bytes = tokio::fs::metadata(path).await.map_err(io)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(FileError::TooLarge { path: path.to_owned(), bytes });
    }
    let text = tokio::fs::read_to_string(path).await.map_err(io)?;
    parse(&text).map_err(|reason| FileError::Invalid { path: path.to_owned(), reason })
}

/// Reads the file, and again whenever it has changed, for as long as the loop takes what is in it.
pub(crate) async fn follow(path: PathBuf, inputs: mpsc::Sender<Input>) {
    let mut seen: Option<(Option<SystemTime>, u64)> = None;
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    loop {
        look.tick().await;
        let stamp = match tokio::fs::metadata(&path).await {
            Ok(metadata) => (metadata.modified().ok(), metadata.len()),
            Err(_) => (None, 0),
        };
        if seen == Some(stamp) {
            continue;
        }
        seen = Some(stamp);
        match load(&path).await {
            Ok(agents) => {
                tracing::info!(path = %path.display(), agents = agents.len(), "agents file read");
                if inputs.send(Input::File(agents)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                metrics::counter!("rollcall_agents_file_errors_total").increment(1);
                let error = anyhow::Error::from(error);
                tracing::error!("the agents file is not used, what was read before stays: {error:#}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_describes_agents() {
        let agents = parse(
            r#"
            [[agents]]
            agent_id = "legacy-1"
            capacity = 2
            labels = { zone = "b" }
            control = { kind = "http", url = "http://10.0.0.7:8080/" }
            [[agents]]
            agent_id = "legacy-2"
            capacity = 1
            pool = "gpu"
            probe = { kind = "tcp", url = "10.0.0.8:22" }
            "#,
        )
        .unwrap();
        let profile = agents[0].profile("file-1".parse().unwrap());
        assert_eq!((profile.pool.as_str(), profile.capacity), ("default", 2));
        assert_eq!(profile.probe.unwrap().url, "http://10.0.0.7:8080/api/executions/running");
        assert_eq!(agents[1].profile("file-2".parse().unwrap()).probe.unwrap().kind, "tcp");
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let probe = "probe = { kind = \"tcp\", url = \"h:1\" }";
        for (text, names) in [
            ("[[agents]]\nagent_id = \"a.b\"\ncapacity = 1".to_owned(), "agent_id"),
            (format!("[[agents]]\nagent_id = \"a\"\ncapacity = 9999\n{probe}"), "9999"),
            ("[[agents]]\nagent_id = \"a\"\ncapacity = 1".to_owned(), "neither probe nor control"),
            (format!("[[agents]]\nagent_id = \"a\"\ncapacity = 1\ncapcity = 2\n{probe}"), "capcity"),
            (format!("[[agents]]\nagent_id = \"a\"\ncapacity = 1\n{probe}\n").repeat(2), "twice"),
            ("agents = 7".to_owned(), "agents"),
            ("[[agents]".to_owned(), ""),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(names), "{text}: {error}");
        }
    }
}
