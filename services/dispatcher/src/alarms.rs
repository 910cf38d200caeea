//! Alarms about a source, at most one a minute: whoever sends nonsense may not fill the log with it.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use rollcall_core::Timestamp;

/// Time between two alarms about one source, in milliseconds.
const PAUSE_MS: u64 = 60_000;
/// Sources remembered; beyond it the oldest are forgotten, and may be spoken of again.
const SOURCES_MAX: usize = 4096;

/// When each source was last spoken of.
#[derive(Debug, Default)]
pub(crate) struct Alarms(Mutex<HashMap<String, Timestamp>>);

impl Alarms {
    /// Whether an alarm about `source` may be raised now; if so, it counts as raised.
    pub(crate) fn may_speak(&self, source: &str, now: Timestamp) -> bool {
        // Plain values, changed by single calls.
        let mut spoken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spoken.get(source).is_some_and(|last| now.since_ms(*last) < PAUSE_MS) {
            return false;
        }
        if spoken.len() >= SOURCES_MAX {
            spoken.retain(|_, last| now.since_ms(*last) < PAUSE_MS);
            if spoken.len() >= SOURCES_MAX {
                spoken.clear();
            }
        }
        spoken.insert(source.to_owned(), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_spoken_of_once_a_minute() {
        let alarms = Alarms::default();
        let at = Timestamp::from_millis;
        assert!(alarms.may_speak("a", at(0)));
        assert!(!alarms.may_speak("a", at(59_999)));
        assert!(alarms.may_speak("b", at(1)));
        assert!(alarms.may_speak("a", at(60_000)));
    }
}
