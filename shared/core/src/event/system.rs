//! What services have to say of themselves.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{DecodeError, from_raw};

macro_rules! system_events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),+ $(,)?) => {
        /// The kinds of system event.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum SystemEventKind { $($(#[$doc])* $variant,)+ }

        impl SystemEventKind {
            /// The names of all of them, as they stand after `system.` in a type.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// The name after `system.`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            const fn short_type(self) -> &'static str {
                match self { $(Self::$variant => concat!("system.", $name),)+ }
            }

            fn parse(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

system_events! {
    /// Too many agents fell silent at once: silence condemns nobody for now.
    RecoverySuspended = "recovery_suspended",
    /// It does again, with all clocks started anew.
    RecoveryResumed = "recovery_resumed",
    /// Over half of a cycle's recovery attempts failed.
    RecoveryFailing = "recovery_failing",
    /// A slot or queue place in Redis disagreed with the log.
    SlotLeakRepaired = "slot_leak_repaired",
    /// Redis was empty, replaced or stale, and was rebuilt from the log.
    CapacityRebuilt = "capacity_rebuilt",
    /// The log ended before what had been read from it.
    LogRegressed = "log_regressed",
    /// An entry of the log is no valid event for its subject.
    InvalidEntry = "invalid_entry",
    /// A report came from an agent that does not hold the execution.
    ReportRefused = "report_refused",
}

/// A system event: its data is whatever explains it.
#[derive(Debug, Clone, PartialEq)]
pub struct SystemEvent {
    /// Which.
    pub kind: SystemEventKind,
    /// A JSON object.
    pub data: serde_json::Value,
}

impl SystemEvent {
    /// The type without `rollcall.` before it.
    #[must_use]
    pub fn short_type(&self) -> &'static str {
        self.kind.short_type()
    }

    pub(super) fn decode(name: &str, raw: &RawValue) -> Result<Option<Self>, DecodeError> {
        SystemEventKind::parse(name).map(|kind| Ok(Self { kind, data: from_raw(raw)? })).transpose()
    }
}
