//! The server's version. Older servers silently ignore newer expectation headers, so it is checked before anything runs.

use std::fmt;

/// A nats-server version. Ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerVersion {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Patch; 0 when the server names none.
    pub patch: u32,
}

/// The oldest server that is accepted.
pub const MINIMUM: ServerVersion = ServerVersion { major: 2, minor: 10, patch: 0 };

impl ServerVersion {
    /// Reads `2.10.25`, `v2.12.0-beta.1`, `2.15`. `None` if there is no major and minor.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let core = text.strip_prefix('v').unwrap_or(text).split(['-', '+']).next()?;
        let mut parts = core.split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        let patch = parts.next().map_or(Some(0), |p| p.parse().ok())?;
        Some(Self { major, minor, patch })
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The server is too old, or says nothing that can be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("nats-server {found:?} is not supported: at least {MINIMUM} is needed")]
pub struct UnsupportedServer {
    /// What the server said.
    pub found: String,
}

/// Refuses what is older than [`MINIMUM`] and what cannot be read.
pub fn check(found: &str) -> Result<ServerVersion, UnsupportedServer> {
    match ServerVersion::parse(found) {
        Some(version) if version >= MINIMUM => Ok(version),
        _ => Err(UnsupportedServer { found: found.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_unreadable_versions_are_refused_by_name() {
        for bad in ["2.9.10", "2.9.25", "1.99.0", "", "latest", "2", "2.x.1"] {
            let error = check(bad).unwrap_err();
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
            assert!(error.to_string().contains("2.10.0"));
        }
    }

    #[test]
    fn minor_is_compared_as_a_number() {
        for good in ["2.10.0", "2.10.25", "v2.15.1", "2.12.0-beta.1", "3.0.0", "2.10"] {
            assert!(check(good).is_ok(), "{good}");
        }
    }
}
