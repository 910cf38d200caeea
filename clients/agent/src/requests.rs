//! What the fleet asks of this instance, and the answers.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use rollcall_core::wire::{
    ApiError, DispatchReply, DispatchRequest, Goodbye, GoodbyeReply, Outcome, PingReply, TerminateReply,
    TerminateRequest, TerminateState, read_object,
};
use rollcall_nats::{Message, Subscriber};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    Worker,
    shell::{Life, Live, Shell},
    shutdown::Trigger,
    state::{Admission, Key, Refusal, StopCause, Termination},
    supervise,
    worker::Urgency,
};

/// Terminate requests that may wait for a death at once; more are answered `still_running`.
const TERMINATIONS_MAX: usize = 1024;
/// Longest grace that a terminate request may ask for.
pub const GRACE_MAX: Duration = Duration::from_secs(60);
/// How long a terminate request waits for the death after the kill, before it is answered `still_running`.
pub const KILL_CONFIRM_BOUND: Duration = Duration::from_secs(2);
/// How long the answer to a terminate request holds back for a completion that won: it should be on the stream first.
const COMPLETION_HEAD_START: Duration = Duration::from_secs(1);

/// Answers requests until `shell.over`.
pub(crate) async fn answer<W: Worker>(shell: Arc<Shell<W>>, mut requests: Subscriber) {
    let terminations = Arc::new(Semaphore::new(TERMINATIONS_MAX));
    loop {
        let message = tokio::select! {
            () = shell.over.cancelled() => return,
            message = requests.next() => message,
        };
        let Some(message) = message else {
            tracing::error!("the subscription to requests ended");
            shell.control.trigger(&Trigger::Program("bus_closed".to_owned()));
            return;
        };
        let verb = message.subject.rsplit('.').next().unwrap_or_default().to_owned();
        let reply = match verb.as_str() {
            "dispatch" => read(&message).map(|request| json(&dispatch(&shell, request))),
            "terminate" => match read(&message) {
                Ok(request) => {
                    terminate(&shell, &terminations, message, request);
                    continue;
                }
                Err(error) => Err(error),
            },
            "goodbye" => match read::<Goodbye>(&message) {
                Ok(goodbye) => {
                    // Answered before anything else: the routine may be quick.
                    shell.bus.reply(&message, json(&GoodbyeReply { ok: true })).await;
                    shell.control.trigger(&Trigger::Goodbye(goodbye));
                    continue;
                }
                Err(error) => Err(error),
            },
            "executions" => Ok(json(&shell.executions())),
            "ping" => Ok(json(&PingReply {
                instance_id: shell.profile.instance.clone(),
                state: shell.lock().book.state(),
            })),
            _ => Err(ApiError::bad_request("no such request")),
        };
        let reply = reply.unwrap_or_else(|error| {
            tracing::warn!(subject = %message.subject.escape_debug(), %error, "a request can't be read");
            json(&serde_json::json!({ "error": error }))
        });
        shell.bus.reply(&message, reply).await;
    }
}

fn read<T: DeserializeOwned>(message: &Message) -> Result<T, ApiError> {
    read_object("request", &message.payload)
}

fn json<T: Serialize>(value: &T) -> Bytes {
    serde_json::to_vec(value).expect("replies hold only text and numbers").into()
}

fn dispatch<W: Worker>(shell: &Arc<Shell<W>>, request: DispatchRequest) -> DispatchReply {
    let key = Key::new(request.execution_id.clone(), request.attempt);
    match supervise::admit(shell, request) {
        Admission::Start | Admission::Held => DispatchReply { accepted: true, reason: None },
        Admission::Refused(refusal) => {
            tracing::info!(execution = %key, reason = refusal.as_str(), "dispatch refused");
            if let Refusal::OlderAttemptRuns(older) = &refusal {
                // It no longer counts and is in the way. The dispatcher offers the newer one again.
                let shell = Arc::clone(shell);
                let older = older.clone();
                tokio::spawn(async move {
                    let grace = shell.stop_grace;
                    end(&shell, &older, StopCause::Terminated, grace).await;
                });
            }
            DispatchReply { accepted: false, reason: Some(refusal.as_str().to_owned()) }
        }
    }
}

fn terminate<W: Worker>(
    shell: &Arc<Shell<W>>,
    terminations: &Arc<Semaphore>,
    message: Message,
    request: TerminateRequest,
) {
    let permit = Arc::clone(terminations).try_acquire_owned();
    let shell = Arc::clone(shell);
    tokio::spawn(async move {
        let key = Key::new(request.execution_id, request.attempt);
        let state = match permit {
            Ok(_permit) => {
                let grace = Duration::from_millis(request.grace_ms).min(GRACE_MAX);
                end(&shell, &key, StopCause::of_terminate(&request.reason), grace).await
            }
            Err(_) => TerminateState::StillRunning,
        };
        tracing::info!(execution = %key, reason = %request.reason.escape_debug(), ?state, "terminate");
        shell.bus.reply(&message, json(&TerminateReply { state })).await;
    });
}

/// Ends one attempt: asks, waits for the grace, kills, waits for the death. Every wait is bounded.
async fn end<W: Worker>(shell: &Shell<W>, key: &Key, cause: StopCause, grace: Duration) -> TerminateState {
    let live = {
        let mut inner = shell.lock();
        match inner.book.terminate(key, cause) {
            Termination::NotRunning => return TerminateState::NotRunning,
            Termination::Stop => inner.live.get(key).cloned(),
        }
    };
    let Some(live) = live else { return TerminateState::NotRunning };
    live.stop.raise(Urgency::Asked);
    let dead = match death(&live, grace).await {
        Some(outcome) => Some(outcome),
        None => {
            live.stop.raise(Urgency::Kill);
            death(&live, KILL_CONFIRM_BOUND).await
        }
    };
    match dead {
        // It ended by itself in time. Whoever asks next should find its report on the stream.
        Some(Outcome::Completed) => {
            let mut life = live.life.clone();
            let _ =
                timeout(COMPLETION_HEAD_START, life.wait_for(|l| matches!(l, Life::Acknowledged(_)))).await;
            TerminateState::NotRunning
        }
        Some(_) => TerminateState::Terminated,
        None => TerminateState::StillRunning,
    }
}

async fn death(live: &Live, within: Duration) -> Option<Outcome> {
    let mut life = live.life.clone();
    let waited = timeout(within, life.wait_for(|l| *l != Life::Alive)).await;
    match waited {
        Ok(Ok(life)) => match *life {
            Life::Dead(outcome) | Life::Acknowledged(outcome) => Some(outcome),
            Life::Alive => None,
        },
        Ok(Err(_)) | Err(_) => None,
    }
}
