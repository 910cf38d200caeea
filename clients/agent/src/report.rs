//! The final report of an attempt: its bytes, within their limit, and their way onto the stream.

use std::time::Duration;

use bytes::Bytes;
use rollcall_core::{
    ids::InstanceId,
    time::Timestamp,
    wire::{ErrorBody, Outcome, REQUEST_BYTES_MAX, Report},
};
use rollcall_nats::{Bus, Reports};
use serde_json::value::RawValue;

use crate::{
    state::{Ending, Key},
    worker::Finish,
};

/// Room that a report needs besides its result: every other field at its longest, and the headers a server may add.
pub const REPORT_ENVELOPE_BYTES: usize = 2 * 1024;
/// Largest result or checkpoint, in bytes of JSON: the report's limit (PROTOCOL.md, Conventions) less its envelope.
pub const RESULT_BYTES_MAX: usize = REQUEST_BYTES_MAX - REPORT_ENVELOPE_BYTES;
/// Longest error code and message in a report, in bytes; the rest is cut and said to be.
pub const ERROR_MESSAGE_BYTES_MAX: usize = 16 * 1024;

/// First pause between two tries to publish a report; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two tries to publish a report.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Tries between two log lines about one report.
const LOG_EVERY: u32 = 16;

/// What the work handed over, apart from how it ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Payload {
    result: Option<Box<RawValue>>,
    error: Option<ErrorBody>,
    checkpoint: Option<Box<RawValue>>,
}

/// Splits what the worker said into how it ended and what it hands over; what is too large becomes a failure that says so.
pub(crate) fn of_finish(finish: Finish) -> (Ending, Payload) {
    match finish {
        Finish::Completed(Some(result)) if result.get().len() > RESULT_BYTES_MAX => (
            Ending::Failed,
            Payload { error: Some(too_large("result", result.get().len())), ..Payload::default() },
        ),
        Finish::Completed(result) => {
            let result = result.or_else(|| serde_json::value::to_raw_value(&()).ok());
            (Ending::Completed, Payload { result, ..Payload::default() })
        }
        Finish::Failed(error) => (Ending::Failed, Payload { error: Some(cut(error)), ..Payload::default() }),
        Finish::Returned(checkpoint) => (Ending::Returned, with_checkpoint(checkpoint)),
        Finish::Stopped(checkpoint) => (Ending::Stopped, with_checkpoint(checkpoint)),
    }
}

fn with_checkpoint(checkpoint: Option<Box<RawValue>>) -> Payload {
    match checkpoint {
        Some(checkpoint) if checkpoint.get().len() > RESULT_BYTES_MAX => {
            Payload { error: Some(too_large("checkpoint", checkpoint.get().len())), ..Payload::default() }
        }
        checkpoint => Payload { checkpoint, ..Payload::default() },
    }
}

fn too_large(what: &str, bytes: usize) -> ErrorBody {
    ErrorBody {
        code: "too_large".to_owned(),
        message: format!("the {what} has {bytes} bytes, at most {RESULT_BYTES_MAX} fit into a report"),
    }
}

fn cut(mut error: ErrorBody) -> ErrorBody {
    for text in [&mut error.code, &mut error.message] {
        if text.len() > ERROR_MESSAGE_BYTES_MAX {
            let whole = text.len();
            text.truncate(text.floor_char_boundary(ERROR_MESSAGE_BYTES_MAX));
            text.push_str(&format!(" ... ({whole} bytes in all)"));
        }
    }
    error
}

/// The report as the bytes that travel.
pub(crate) fn encode(
    instance: &InstanceId,
    key: &Key,
    outcome: Outcome,
    payload: Payload,
    now: Timestamp,
) -> Bytes {
    let unasked = || ErrorBody {
        code: "stopped".to_owned(),
        message: "the work stopped although nobody had asked it to".to_owned(),
    };
    let report = Report {
        agent_id: None,
        execution_id: None,
        instance_id: instance.clone(),
        attempt: key.attempt,
        outcome,
        result: payload.result.filter(|_| outcome == Outcome::Completed),
        error: match outcome {
            Outcome::Completed => None,
            Outcome::Failed => Some(payload.error.unwrap_or_else(unasked)),
            Outcome::Cancelled | Outcome::Terminated | Outcome::Returned => payload.error,
        },
        checkpoint: payload.checkpoint.filter(|_| outcome == Outcome::Returned),
        finished_at: Some(now),
    };
    serde_json::to_vec(&report)
        .expect("a report holds only text, numbers and JSON that was read before")
        .into()
}

/// Publishes a report until the stream acknowledges it, however long that takes; the caller bounds it by the life of the
/// process. Tries again at once when the connection comes back.
pub(crate) async fn publish_until_acknowledged(bus: &Bus, subject: &str, key: &Key, bytes: Bytes) {
    let reports = Reports::new(bus);
    let mut pause = RETRY_MIN;
    let mut link = bus.link();
    let mut tries = 0u32;
    loop {
        link.mark_unchanged();
        let error = match reports.publish(subject, bytes.clone()).await {
            Ok(seq) => {
                tracing::debug!(execution = %key, seq, "report acknowledged");
                return;
            }
            Err(error) => error,
        };
        if tries.is_multiple_of(LOG_EVERY) {
            tracing::warn!(execution = %key, %error, tries, "report not acknowledged yet, it stays listed and is sent again");
        }
        tries = tries.saturating_add(1);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // A change of the link: connected again, or cut (then the next try fails at once and waits here again).
            Ok(()) = link.changed() => {}
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    fn report_of(finish: Finish, outcome: Outcome) -> Report {
        let (_, payload) = of_finish(finish);
        let key = Key::new("x".parse().unwrap(), 3);
        let bytes = encode(&"i".parse().unwrap(), &key, outcome, payload, Timestamp::from_millis(0));
        Report::read(&"a".parse().unwrap(), &key.execution_id, &bytes)
            .expect("within the limit and of the right shape")
    }

    #[test]
    fn the_result_travels_with_completed_only() {
        let report = report_of(Finish::Completed(Some(raw("{\"a\": 1}"))), Outcome::Completed);
        assert_eq!(report.result.unwrap().get(), "{\"a\": 1}", "its bytes untouched");
        assert_eq!(report.attempt, 3);
        assert!(report.error.is_none());
        assert_eq!(report_of(Finish::Completed(None), Outcome::Completed).outcome, Outcome::Completed);
    }

    #[test]
    fn a_result_at_the_limit_fits_and_one_byte_more_is_a_failure_that_says_so() {
        let at = format!("\"{}\"", "x".repeat(RESULT_BYTES_MAX - 2));
        assert!(report_of(Finish::Completed(Some(raw(&at))), Outcome::Completed).result.is_some());
        let over = format!("\"{}\"", "x".repeat(RESULT_BYTES_MAX - 1));
        let (ending, payload) = of_finish(Finish::Completed(Some(raw(&over))));
        assert_eq!(ending, Ending::Failed);
        let error = payload.error.unwrap();
        assert_eq!(error.code, "too_large");
        assert!(error.message.contains(&over.len().to_string()), "{}", error.message);
    }

    #[test]
    fn a_checkpoint_travels_with_returned_only_and_is_never_cut() {
        let report = report_of(Finish::Stopped(Some(raw("7"))), Outcome::Returned);
        assert_eq!(report.checkpoint.unwrap().get(), "7");
        assert!(report_of(Finish::Stopped(Some(raw("7"))), Outcome::Terminated).checkpoint.is_none());
        let over = format!("\"{}\"", "x".repeat(RESULT_BYTES_MAX));
        let report = report_of(Finish::Stopped(Some(raw(&over))), Outcome::Returned);
        assert!(report.checkpoint.is_none());
        assert_eq!(report.error.unwrap().code, "too_large");
    }

    #[test]
    fn a_long_message_is_cut_and_says_how_long_it_was() {
        let report = report_of(Finish::failed("exit_1", "ä".repeat(300_000)), Outcome::Failed);
        let error = report.error.unwrap();
        assert!(error.message.len() < ERROR_MESSAGE_BYTES_MAX + 64);
        assert!(error.message.ends_with("(600000 bytes in all)"));
    }

    #[test]
    fn a_stop_that_nobody_asked_for_is_explained() {
        assert_eq!(report_of(Finish::Stopped(None), Outcome::Failed).error.unwrap().code, "stopped");
    }
}
