//! Stream names and stream subjects, all derived from the prefix.

/// A prefix that may not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("prefix {0:?} is not 1 to 64 characters of A-Z a-z 0-9 _ -")]
pub struct PrefixError(pub String);

/// The names that one fleet (one prefix) uses on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    prefix: String,
    upper: String,
}

impl Names {
    /// Longest prefix (PROTOCOL.md, conventions).
    pub const PREFIX_MAX: usize = 64;

    /// Checks the prefix: `^[A-Za-z0-9_-]{1,64}$`.
    pub fn new(prefix: &str) -> Result<Self, PrefixError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if prefix.is_empty() || prefix.len() > Self::PREFIX_MAX || !prefix.chars().all(allowed) {
            return Err(PrefixError(prefix.to_owned()));
        }
        Ok(Self { prefix: prefix.to_owned(), upper: prefix.to_ascii_uppercase() })
    }

    /// The prefix as given.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// `<PREFIX>_EVENTS`.
    pub fn events_stream(&self) -> String {
        format!("{}_EVENTS", self.upper)
    }

    /// `<PREFIX>_REPORTS`.
    pub fn reports_stream(&self) -> String {
        format!("{}_REPORTS", self.upper)
    }

    /// `<PREFIX>_PAYLOADS`.
    pub fn payloads_stream(&self) -> String {
        format!("{}_PAYLOADS", self.upper)
    }

    /// Everything in the log: `<prefix>.event.>`.
    pub fn all_events(&self) -> String {
        format!("{}.event.>", self.prefix)
    }

    /// Every report: `<prefix>.report.*.*`.
    pub fn all_reports(&self) -> String {
        format!("{}.report.*.*", self.prefix)
    }

    /// Every payload: `<prefix>.payload.*.*.*`.
    pub fn all_payloads(&self) -> String {
        format!("{}.payload.*.*.*", self.prefix)
    }

    /// The request subject of an API verb: `<prefix>.api.<verb>`.
    pub fn api(&self, verb: &str) -> String {
        format!("{}.api.{verb}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_prefix_and_keep_the_dash() {
        let names = Names::new("fleet-a").unwrap();
        assert_eq!(names.events_stream(), "FLEET-A_EVENTS");
        assert_eq!(names.all_reports(), "fleet-a.report.*.*");
        assert_eq!(names.api("watchdog.run"), "fleet-a.api.watchdog.run");
    }

    #[test]
    fn a_prefix_that_could_reach_into_a_subject_is_refused() {
        for bad in ["", "a.b", "*", ">", "a b", "ä", &"x".repeat(65)] {
            assert!(Names::new(bad).is_err(), "{bad:?}");
        }
    }
}
