//! Agents that never beat, described by the operator in a TOML file (`ROLLCALL_AGENTS_FILE`), read again when it changes.
//! A row that is wrong is set aside, and says nothing about its agent; a file that can't be read at all is not used.
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

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;

use crate::shell::Input;

mod rows;

pub use rows::*;

/// How often the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Rows set aside that are logged each, of one file.
const ASIDE_LOGGED_MAX: usize = 50;

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

async fn load(path: &Path) -> Result<FileRead, FileError> {
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
    fn take(&mut self, read: Result<FileRead, FileError>, after: Option<Stamp>) -> Option<FileRead> {
        if self.last != after {
            return None;
        }
        let error = match read {
            Ok(read) => {
                self.done = after;
                self.said = None;
                return Some(read);
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
        if let Some(read) = changes.take(read, stamp(&path).await) {
            tracing::info!(path = %path.display(), agents = read.agents.len(), aside = read.aside.len(), "agents file read");
            complain(&path, &read.aside);
            if inputs.send(Input::File(read)).await.is_err() {
                return;
            }
        }
    }
}

/// Says what is wrong with rows that are set aside.
fn complain(path: &Path, aside: &[Aside]) {
    metrics::counter!("rollcall_agents_file_errors_total").increment(aside.len() as u64);
    for Aside { why, .. } in aside.iter().take(ASIDE_LOGGED_MAX) {
        tracing::error!(path = %path.display(), "the agents file: {why}. This row is set aside, its agent stays as it was");
    }
    if aside.len() > ASIDE_LOGGED_MAX {
        tracing::error!(path = %path.display(), aside = aside.len(), "the agents file has more rows that are set aside");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

    use super::*;

    fn look(bytes: u64) -> Option<Stamp> {
        Some(Stamp { modified: None, bytes, inode: 1 })
    }

    fn unreadable() -> Result<FileRead, FileError> {
        Err(FileError::Io { path: "f".into(), source: std::io::ErrorKind::PermissionDenied.into() })
    }

    #[test]
    fn a_file_that_is_being_written_says_nothing() {
        let mut changes = Changes::default();
        assert!(!changes.is_due(look(100)), "it may be being written");
        assert!(changes.is_due(look(100)));
        assert_eq!(changes.take(Ok(FileRead::default()), look(100)), Some(FileRead::default()));
        assert!(!changes.is_due(look(100)), "no news");
        // Truncated, and whole again at the next look.
        assert!(!changes.is_due(look(0)) && !changes.is_due(look(120)));
        assert!(changes.is_due(look(120)));
        assert_eq!(changes.take(Ok(FileRead::default()), look(60)), None, "it was written while it was read");
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

    /// Counts what is counted, whatever it is called.
    #[derive(Default)]
    struct Count(Arc<AtomicU64>);

    impl Recorder for Count {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            assert_eq!(key.name(), "rollcall_agents_file_errors_total");
            Counter::from_arc(Arc::clone(&self.0))
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::noop()
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    #[test]
    fn every_row_that_is_set_aside_is_counted_however_many_are_logged() {
        let rows = ASIDE_LOGGED_MAX + 10;
        let aside = vec![Aside { agent_id: None, why: "no".to_owned() }; rows];
        let count = Count::default();
        metrics::with_local_recorder(&count, || complain(Path::new("f"), &aside));
        assert_eq!(count.0.load(Ordering::Relaxed), rows as u64);
        // One that is not used at all is one error, until it says something else.
        let mut changes = Changes::default();
        let wrong = |reason: &str| Err(FileError::Invalid { path: "f".into(), reason: reason.to_owned() });
        metrics::with_local_recorder(&count, || {
            for reason in ["no", "no", "neither"] {
                assert_eq!(changes.take(wrong(reason), None), None);
            }
        });
        assert_eq!(count.0.load(Ordering::Relaxed), rows as u64 + 2);
    }
}
