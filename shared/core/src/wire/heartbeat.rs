//! Heartbeats, read without copying: this is the hottest path of the fleet.

use std::{borrow::Cow, collections::BTreeMap};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::{CAPACITY_MAX, DURATION_MS_MAX, Endpoint, HEARTBEAT_BYTES_MAX, INTERVAL_MS, read_object};
use crate::{
    ids::{ExecutionId, InstanceId, InvalidId, Pool, is_valid_id},
    time::Timestamp,
    wire::{ApiError, Goodbye},
};

/// What an agent says about its own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// Takes work.
    Ready,
    /// Saturated, and alive.
    Busy,
    /// Finishes what it has and takes nothing more.
    Draining,
    /// The last heartbeat of this instance.
    Gone,
}

impl AgentState {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// An execution that an agent holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Claim<'a> {
    /// The execution.
    #[serde(borrow)]
    pub id: Cow<'a, str>,
    /// The attempt.
    pub attempt: u32,
    /// Rises as work advances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<f64>,
}

/// An optional text, borrowed where it can be: serde does that by itself only for a text that must be there.
fn borrowed<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Cow<'a, str>>, D::Error> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    Ok(Option::<Text<'_>>::deserialize(deserializer)?.map(|text| text.0))
}

/// A heartbeat as it came, its identifiers checked by [`Heartbeat::read`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Heartbeat<'a> {
    /// The agent, which its subject names; if it is here as well, it must be the same.
    #[serde(default, borrow, deserialize_with = "borrowed", skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Cow<'a, str>>,
    /// The process start it comes from.
    #[serde(borrow)]
    pub instance_id: Cow<'a, str>,
    /// Rises with every heartbeat of the instance.
    pub seq: u64,
    /// What the agent says of itself.
    pub state: AgentState,
    /// Executions it can hold at once.
    pub capacity: u32,
    /// Everything it holds.
    #[serde(borrow)]
    pub executions: Vec<Claim<'a>>,
    /// When to expect the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// Its pool.
    #[serde(default, borrow, deserialize_with = "borrowed", skip_serializing_if = "Option::is_none")]
    pub pool: Option<Cow<'a, str>>,
    /// Its default execution timeout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Why it drains or goes.
    #[serde(default, borrow, deserialize_with = "borrowed", skip_serializing_if = "Option::is_none")]
    pub reason: Option<Cow<'a, str>>,
    /// Its version.
    #[serde(default, borrow, deserialize_with = "borrowed", skip_serializing_if = "Option::is_none")]
    pub version: Option<Cow<'a, str>>,
    /// Its labels, not looked into until they change.
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    pub labels: Option<&'a RawValue>,
    /// Its probe, not looked into until it changes.
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    pub probe: Option<&'a RawValue>,
    /// Its control endpoint, not looked into until it changes.
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    pub control: Option<&'a RawValue>,
    /// When it was sent, by the agent's clock. Nothing hangs on it: one that is no time is none.
    #[serde(default, deserialize_with = "super::time_if_any", skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<Timestamp>,
}

/// The parts of a heartbeat that are compared by their bytes and parsed only when they differ.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Probe.
    pub probe: Option<Endpoint>,
    /// Control endpoint.
    pub control: Option<Endpoint>,
}

impl<'a> Heartbeat<'a> {
    /// Reads a heartbeat of `agent` (the token of its subject) and checks everything that the contract bounds.
    pub fn read(agent: &str, bytes: &'a [u8]) -> Result<Self, ApiError> {
        if bytes.len() > HEARTBEAT_BYTES_MAX {
            return Err(ApiError::too_large("heartbeat", bytes.len(), HEARTBEAT_BYTES_MAX));
        }
        let beat: Self = read_object("heartbeat", bytes)?;
        let id = |field, text: &str| {
            if is_valid_id(text) {
                Ok(())
            } else {
                Err(InvalidId { field, shown: text.chars().take(80).collect() })
            }
        };
        if let Some(named) = beat.agent_id.as_deref().filter(|named| *named != agent) {
            id("agent_id", named)?;
            return Err(ApiError::not_the_subjects("agent_id", named, agent));
        }
        id("instance_id", &beat.instance_id)?;
        if let Some(pool) = &beat.pool {
            id("pool", pool)?;
        }
        for claim in &beat.executions {
            id("execution_id", &claim.id)?;
        }
        if beat.capacity > CAPACITY_MAX {
            return Err(ApiError::bad_request(format!(
                "capacity is {}, at most {CAPACITY_MAX}",
                beat.capacity
            )));
        }
        if let Some(interval) = beat.interval_ms.filter(|i| !INTERVAL_MS.contains(i)) {
            return Err(ApiError::bad_request(format!(
                "interval_ms is {interval}, not within {}..{}",
                INTERVAL_MS.start(),
                INTERVAL_MS.end()
            )));
        }
        if let Some(timeout) = beat.timeout_ms.filter(|t| *t == 0 || *t > DURATION_MS_MAX) {
            return Err(ApiError::bad_request(format!(
                "timeout_ms is {timeout}, not within 1..{DURATION_MS_MAX}"
            )));
        }
        Ok(beat)
    }

    /// The instance, as the identifier [`Heartbeat::read`] found it to be.
    pub fn instance(&self) -> Result<InstanceId, InvalidId> {
        InstanceId::new(&self.instance_id)
    }

    /// The pool it names, or the default one.
    pub fn pool_or_default(&self) -> Result<Pool, InvalidId> {
        self.pool.as_ref().map_or_else(|| Ok(Pool::default()), |pool| Pool::new(pool))
    }

    /// Labels, probe and control, parsed.
    pub fn extras(&self) -> Result<Extras, ApiError> {
        fn part<'r, T: Deserialize<'r> + Default>(
            name: &str,
            raw: Option<&'r RawValue>,
        ) -> Result<T, ApiError> {
            raw.map_or_else(
                || Ok(T::default()),
                |raw| serde_json::from_str(raw.get()).map_err(|e| ApiError::bad_json(name, &e)),
            )
        }
        fn endpoint(name: &str, raw: Option<&RawValue>) -> Result<Option<Endpoint>, ApiError> {
            // Not the parser's words: they would repeat a URL that stands there by itself.
            if raw.is_some_and(|raw| !raw.get().starts_with(['{', 'n'])) {
                return Err(ApiError::bad_request(format!("{name}: not a JSON object")));
            }
            part(name, raw)
        }
        let mut extras = Extras {
            labels: part("labels", self.labels)?,
            probe: endpoint("probe", self.probe)?,
            control: endpoint("control", self.control)?,
        };
        // It is neither probed nor driven there, and lives all the same.
        extras.probe.iter_mut().chain(&mut extras.control).for_each(Endpoint::hide_userinfo);
        Ok(extras)
    }
}

/// The reply to a heartbeat that was sent as a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatReply {
    /// The agent's status; `superseded` for an instance that no longer counts.
    pub status: String,
    /// The interval that the fleet expects of it.
    pub interval_ms: u64,
    /// The service's time.
    pub server_time: Timestamp,
    /// A goodbye that is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goodbye: Option<Goodbye>,
}

/// A claim that outlives its heartbeat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnedClaim {
    /// The execution.
    pub id: ExecutionId,
    /// The attempt.
    pub attempt: u32,
    /// Rises as work advances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_in_where_it_is_probed_or_driven_is_shown_to_nobody() {
        let extras = |more: &str| {
            let bytes = format!(
                r#"{{"instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[],{more}}}"#
            );
            Heartbeat::read("a", bytes.as_bytes()).unwrap().extras()
        };
        for (more, says) in [
            (r#""probe":"http://u:hunter2@h/""#, "probe: not a JSON object"),
            (r#""control": "http://u:hunter2@h/""#, "control: not a JSON object"),
        ] {
            let error = extras(more).expect_err(more).to_string();
            assert!(error.contains(says) && !error.contains("hunter2"), "{error}");
        }
        let hidden = extras(
            r#""probe":{"kind":"http","url":"http://u:hunter2@h/"},"control":{"kind":"http","url":"http://u:hunter2@h/"}"#,
        )
        .unwrap();
        assert!(!format!("{hidden:?}").contains("hunter2"), "{hidden:?}");
        let good = extras(r#""probe":null,"control":{"kind":"http","url":"http://h/x"}"#).unwrap();
        assert_eq!((good.probe, good.control.unwrap().url.as_str()), (None, "http://h/x"));
    }

    #[test]
    fn the_smallest_heartbeat_is_enough_and_unknown_fields_are_ignored() {
        let bytes =
            br#"{"instance_id":"i","seq":1,"state":"ready","capacity":0,"executions":[],"x":{"y":[1]}}"#;
        let beat = Heartbeat::read("a", bytes).unwrap();
        assert_eq!((beat.seq, beat.capacity, beat.state), (1, 0, AgentState::Ready));
        assert_eq!(beat.pool_or_default().unwrap().as_str(), "default");
        assert_eq!(beat.extras().unwrap(), Extras::default());
    }

    #[test]
    fn what_the_contract_bounds_is_refused_by_name() {
        let cases = [
            (
                r#"{"instance_id":"i.j","seq":1,"state":"ready","capacity":1,"executions":[]}"#,
                "invalid_id",
                "instance_id",
            ),
            (
                r#"{"instance_id":"i","seq":-1,"state":"ready","capacity":1,"executions":[]}"#,
                "bad_request",
                "-1",
            ),
            (
                r#"{"instance_id":"i","seq":1,"state":"asleep","capacity":1,"executions":[]}"#,
                "bad_request",
                "asleep",
            ),
            (
                r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1025,"executions":[]}"#,
                "bad_request",
                "1025",
            ),
            (r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1}"#, "bad_request", "executions"),
            (
                r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[],"interval_ms":1}"#,
                "bad_request",
                "interval_ms",
            ),
            (
                r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[{"id":"*","attempt":1}]}"#,
                "invalid_id",
                "execution_id",
            ),
            (
                r#"{"agent_id":"b","instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[]}"#,
                "bad_request",
                "\"b\"",
            ),
            (
                r#"{"agent_id":"b.c","instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[]}"#,
                "invalid_id",
                "agent_id",
            ),
            ("[]", "bad_request", "heartbeat"),
            ("not json", "bad_request", "heartbeat"),
        ];
        for (text, code, names) in cases {
            let error = Heartbeat::read("a", text.as_bytes()).expect_err(text);
            assert_eq!(error.code.as_str(), code, "{text}: {error}");
            assert!(error.message.contains(names), "{text}: {error}");
        }
        let big = vec![b' '; HEARTBEAT_BYTES_MAX + 1];
        assert_eq!(Heartbeat::read("a", &big).unwrap_err().code.as_str(), "too_large");
    }

    #[test]
    fn what_repeats_the_subject_is_fine_and_no_text_is_copied() {
        let bytes =
            br#"{"agent_id":"a","instance_id":"i","seq":1,"state":"gone","capacity":0,"executions":[],
            "pool":"p","reason":"r","version":"v"}"#;
        let beat = Heartbeat::read("a", bytes).unwrap();
        for text in [&beat.agent_id, &beat.pool, &beat.reason, &beat.version] {
            assert!(matches!(text, Some(Cow::Borrowed(_))), "{text:?}");
        }
        let escaped =
            br#"{"agent_id":"\u0061","instance_id":"i","seq":1,"state":"gone","capacity":0,"executions":[],
            "pool":null}"#;
        assert!(Heartbeat::read("a", escaped).unwrap().pool.is_none());
    }
}
