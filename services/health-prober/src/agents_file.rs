//! Agents that never beat, described by the operator in a TOML file (`ROLLCALL_AGENTS_FILE`), read again when it changes.
//! What the file looks like is in docs/OPERATIONS.md too.
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
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rollcall_core::event::Profile;
use rollcall_core::wire::{CAPACITY_MAX, CONTROL_KIND, DURATION_MS_MAX, Endpoint};
use rollcall_core::{AgentId, InstanceId, Pool};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::probe::KINDS as PROBE_KINDS;
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
                kind: CONTROL_KIND.to_owned(),
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
        if let Some(control) = agent.control.as_ref().filter(|control| !control.is_driven()) {
            return Err(format!(
                "agent {id}: control has kind {:?}, only {CONTROL_KIND} is driven",
                control.kind
            ));
        }
        if let Some(probe) = agent.probe.as_ref().filter(|probe| !PROBE_KINDS.contains(&probe.kind.as_str()))
        {
            return Err(format!(
                "agent {id}: probe has kind {:?}, not one of {}",
                probe.kind,
                PROBE_KINDS.join(", ")
            ));
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

/// By what one state of the file is told from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

async fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some(Stamp { modified: metadata.modified().ok(), bytes: metadata.len(), inode: metadata.ino() })
}

/// Which state of the file is to be read. One that is being written may look whole, with agents missing from it: only a
/// file that did not change from one look to the next, nor while it was read, says anything.
#[derive(Debug, Default)]
struct Changes {
    last: Option<Stamp>,
    /// Read to the end, whatever was in it. Nothing else becomes of it until it changes.
    done: Option<Stamp>,
    said: Option<String>,
}

impl Changes {
    /// Whether the file is to be read now.
    fn is_due(&mut self, now: Option<Stamp>) -> bool {
        let steady = self.last == now;
        self.last = now;
        steady && (now.is_none() || self.done != now)
    }

    /// It was read, and then looked like this. What it says, if that counts and is news.
    fn take(
        &mut self,
        read: Result<Vec<FileAgent>, FileError>,
        after: Option<Stamp>,
    ) -> Option<Vec<FileAgent>> {
        if self.last != after {
            return None;
        }
        let error = match read {
            Ok(agents) => {
                self.done = after;
                self.said = None;
                return Some(agents);
            }
            Err(error) => error,
        };
        // One that can't be opened is tried again: permissions are no part of the stamp.
        if matches!(error, FileError::Invalid { .. }) {
            self.done = after;
        }
        let error = format!("{:#}", anyhow::Error::from(error));
        if self.said.as_ref() != Some(&error) {
            metrics::counter!("rollcall_agents_file_errors_total").increment(1);
            tracing::error!("the agents file is not used, what was read before stays: {error}");
            self.said = Some(error);
        }
        None
    }
}

/// Reads the file, and again whenever it has changed, for as long as the loop takes what is in it.
pub(crate) async fn follow(path: PathBuf, inputs: mpsc::Sender<Input>) {
    let mut changes = Changes::default();
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    loop {
        look.tick().await;
        if !changes.is_due(stamp(&path).await) {
            continue;
        }
        let read = load(&path).await;
        if let Some(agents) = changes.take(read, stamp(&path).await) {
            tracing::info!(path = %path.display(), agents = agents.len(), "agents file read");
            if inputs.send(Input::File(agents)).await.is_err() {
                return;
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

    /// The example in the manual is a file that is read.
    #[test]
    fn the_manual_shows_a_file_that_works() {
        let manual = include_str!("../../../docs/OPERATIONS.md");
        let (_, rest) = manual.split_once("```toml\n[[agents]]").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let agents = parse(&format!("[[agents]]{example}")).unwrap();
        assert!(agents.iter().any(|agent| agent.control.is_some() && agent.probe.is_none()));
        assert!(agents.iter().any(|agent| agent.control.is_none()));
        for field in ["pool", "timeout_ms", "version", "labels", "probe", "control"] {
            assert!(example.contains(field), "{field} is not shown");
        }
    }

    fn look(bytes: u64) -> Option<Stamp> {
        Some(Stamp { modified: None, bytes, inode: 1 })
    }

    fn unreadable() -> Result<Vec<FileAgent>, FileError> {
        Err(FileError::Io { path: "f".into(), source: std::io::ErrorKind::PermissionDenied.into() })
    }

    #[test]
    fn a_file_that_is_being_written_says_nothing() {
        let mut changes = Changes::default();
        assert!(!changes.is_due(look(100)), "it may be being written");
        assert!(changes.is_due(look(100)));
        assert_eq!(changes.take(Ok(Vec::new()), look(100)), Some(Vec::new()));
        assert!(!changes.is_due(look(100)), "no news");
        // Truncated, and whole again at the next look.
        assert!(!changes.is_due(look(0)) && !changes.is_due(look(120)));
        assert!(changes.is_due(look(120)));
        assert_eq!(changes.take(Ok(Vec::new()), look(60)), None, "it was written while it was read");
        assert!(!changes.is_due(look(60)) && changes.is_due(look(60)));
    }

    #[test]
    fn what_can_not_be_read_is_tried_again_and_what_is_wrong_is_not() {
        let mut changes = Changes::default();
        assert!(!changes.is_due(look(100)) && changes.is_due(look(100)));
        assert_eq!(changes.take(unreadable(), look(100)), None);
        assert!(changes.is_due(look(100)), "its permissions may have changed");
        let wrong = FileError::Invalid { path: "f".into(), reason: "no".to_owned() };
        assert_eq!(changes.take(Err(wrong), look(100)), None);
        assert!(!changes.is_due(look(100)));
        // Gone, and back as it was: no news.
        assert!(!changes.is_due(None) && changes.is_due(None));
        assert_eq!(changes.take(unreadable(), None), None);
        assert!(!changes.is_due(look(100)) && !changes.is_due(look(100)));
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
            (
                format!("[[agents]]\nagent_id = \"a\"\ncapacity = 1\n{}", probe.replace("tcp", "htttp")),
                "\"htttp\", not one of http, tcp",
            ),
            (
                format!("[[agents]]\nagent_id = \"a\"\ncapacity = 1\n{}", probe.replace("probe", "control")),
                "only http is driven",
            ),
            ("agents = 7".to_owned(), "agents"),
            ("[[agents]".to_owned(), ""),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(names), "{text}: {error}");
        }
    }
}
