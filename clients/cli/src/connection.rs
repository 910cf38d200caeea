//! The connection to the fleet, and its API.

use std::time::Duration;

use rollcall_core::{ids::is_valid_id, subject::Subjects, wire::ApiError};
use rollcall_nats::{Bus, ConnectError, RequestError};
use rollcall_service::Settings;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use crate::{exit, failure::Failure};

/// A connected command line.
#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    pub(crate) bus: Bus,
    pub(crate) subjects: Subjects,
    answer_within: Duration,
}

impl Fleet {
    /// Connects, or fails after `within`.
    pub(crate) async fn connect(settings: &Settings, within: Duration) -> Result<Self, Failure> {
        let prefix =
            settings.prefix.parse().map_err(|error| Failure::new(exit::SETTINGS, format!("{error}")))?;
        let mut options = settings.bus_options("rollcall");
        // A user's account may restrict it to an inbox of its own (deploy/nats.conf).
        let user = settings.nats_user.as_ref().filter(|user| is_valid_id(user));
        options.inbox_prefix = user.map(|user| format!("_INBOX_{user}"));
        let connecting = Bus::connect(options, CancellationToken::new());
        match tokio::time::timeout(within, connecting).await {
            Ok(Ok(bus)) => Ok(Self { bus, subjects: Subjects::new(prefix), answer_within: within }),
            Ok(Err(error @ ConnectError::Unsupported(_))) => Err(Failure::unavailable(error.to_string())),
            Ok(Err(error)) => Err(Failure::new(exit::SETTINGS, format!("{:#}", anyhow::Error::from(error)))),
            Err(_) => Err(Failure::unavailable(format!(
                "no connection to nats within {within:?} (see ROLLCALL_NATS_URL)"
            ))),
        }
    }

    /// Asks a service; returns its answer as it came.
    pub(crate) async fn ask<Q: Serialize + Sync>(
        &self,
        verb: &str,
        question: &Q,
    ) -> Result<Box<RawValue>, Failure> {
        let body = serde_json::to_vec(question).map_err(|error| Failure::usage(error.to_string()))?;
        let answer = self.bus.request(self.subjects.api(verb), body.into(), self.answer_within).await;
        let answer = answer.map_err(|error| match error {
            RequestError::NoResponders => {
                Failure::unavailable(format!("nobody answers {verb}: is its service running?"))
            }
            RequestError::TooLarge => Failure::failed(format!("{verb}: {error}")),
            error => Failure::unavailable(format!("{verb}: {error}")),
        })?;
        read_answer(verb, &answer.payload)
    }
}

fn read_answer(verb: &str, payload: &[u8]) -> Result<Box<RawValue>, Failure> {
    #[derive(Deserialize)]
    struct Refused {
        error: ApiError,
    }
    // An execution's view has an `error` too, of another shape: only one with a code of the contract is a refusal, and it
    // stands alone.
    let is_refusal = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(payload)
        .is_ok_and(|fields| fields.len() == 1 && fields.contains_key("error"));
    if is_refusal && let Ok(Refused { error }) = serde_json::from_slice(payload) {
        return Err(error.into());
    }
    serde_json::from_slice(payload)
        .map_err(|error| Failure::failed(format!("{verb}: the answer can't be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_from_executions_that_failed() {
        let refused =
            read_answer("x", br#"{"error":{"code":"not_found","message":"no such execution"}}"#).unwrap_err();
        assert_eq!(refused.status, exit::NOT_FOUND);
        let failed =
            br#"{"execution_id":"x","state":"failed","error":{"code":"not_found","message":"a file"}}"#;
        assert!(read_answer("x", failed).is_ok());
        assert_eq!(read_answer("x", b"<html>").unwrap_err().status, exit::FAILED);
    }
}
