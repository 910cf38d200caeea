//! Identifiers, checked once at the edge. An id that was accepted here is safe in a subject, in a
//! Redis key and in a file name.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest identifier, in bytes (PROTOCOL.md, Conventions).
pub const ID_LENGTH_MAX: usize = 64;

/// Longest piece of a refused identifier that an error message repeats, in characters.
const SHOWN_MAX: usize = 80;

/// A string that is no identifier: names the field and shows the text, escaped and shortened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} must match ^[A-Za-z0-9_-]{{1,64}}$, not {shown:?}")]
pub struct InvalidId {
    /// The kind of identifier, as the wire names it.
    pub field: &'static str,
    /// What was given, at most 80 characters of it.
    pub shown: String,
}

/// Whether `text` matches `^[A-Za-z0-9_-]{1,64}$`.
#[must_use]
pub fn is_valid_id(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= ID_LENGTH_MAX
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `text` and takes it over.
            pub fn new(text: &str) -> Result<Self, InvalidId> {
                if is_valid_id(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(InvalidId { field: $field, shown: text.chars().take(SHOWN_MAX).collect() })
                }
            }

            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                Self::new(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// One agent, over all its restarts.
    AgentId,
    "agent_id"
);
id!(
    /// One process start of an agent.
    InstanceId,
    "instance_id"
);
id!(
    /// One piece of work, over all its attempts.
    ExecutionId,
    "execution_id"
);
id!(
    /// A named group of agents that share a queue.
    Pool,
    "pool"
);
id!(
    /// What separates one fleet from another on the same NATS and Redis.
    Prefix,
    "prefix"
);

/// What the instance ids of agents start with that an operator described in a file. No heartbeat may use it.
pub const FILE_INSTANCE_PREFIX: &str = "file-";

impl InstanceId {
    /// Whether it is of an agent that an operator described in a file: that has no NATS.
    #[must_use]
    pub fn is_of_file(&self) -> bool {
        self.0.starts_with(FILE_INSTANCE_PREFIX)
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self("default".into())
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self("rollcall".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wildcards_and_separators_are_no_identifiers() {
        for bad in ["", "*", ">", "a.b", "a b", "a\n", "ä", "{x}", &"x".repeat(65)] {
            let error = AgentId::new(bad).expect_err(bad);
            assert!(error.to_string().contains("agent_id"), "{error}");
        }
        assert!(AgentId::new(&"x".repeat(64)).is_ok());
    }

    #[test]
    fn a_json_string_is_checked_when_it_is_read() {
        assert!(serde_json::from_str::<ExecutionId>("\"a.b\"").is_err());
        assert_eq!(serde_json::from_str::<ExecutionId>("\"\\u0061\"").unwrap().as_str(), "a");
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_one_subject_token(text in ".{0,80}") {
            if let Ok(id) = AgentId::new(&text) {
                let unsafe_in_a_subject_or_key = ['.', '*', '>', ' ', '{', '}', ':', '/'];
                prop_assert!(!id.as_str().contains(unsafe_in_a_subject_or_key), "{}", id);
                prop_assert!(!id.as_str().is_empty());
            }
        }
    }
}
