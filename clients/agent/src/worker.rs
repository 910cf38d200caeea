//! What a program implements to be an agent: [`Worker`].

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rollcall_core::{
    ids::{AgentId, ExecutionId},
    time::Timestamp,
    wire::ErrorBody,
};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::watch;

/// Does the work. One value serves all executions; `run` is called once per attempt.
///
/// # Death
/// When an execution is terminated, its slot is given to somebody else as soon as this agent says that the work is dead.
/// So the end of `run`'s future must mean just that:
/// - With [`Death::Abort`] (the default) the library drops the future when its grace is over, and waits until it is
///   gone. Right for work that *is* the future. What it spawned elsewhere (threads, processes) would live on.
/// - With [`Death::Own`] the library never drops the future; `run` watches [`Stop::killed`] and returns once it has
///   made sure itself that nothing is left (a process group killed, reaped, and gone).
pub trait Worker: Send + Sync + 'static {
    /// How the work dies when it does not stop by itself.
    const DEATH: Death = Death::Abort;

    /// Runs one attempt to its end.
    fn run(&self, execution: Execution) -> impl Future<Output = Finish> + Send;

    /// The process is about to exit at once (third signal): end what would outlive it. Must not block.
    fn exit_at_once(&self) {}
}

/// How work dies that does not stop when asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// The library drops its future.
    Abort,
    /// The future ends by itself, and then the work is dead.
    Own,
}

/// How an attempt ended, by the worker's word.
#[derive(Debug, Clone)]
pub enum Finish {
    /// Done; the result is any JSON, `None` is `null`.
    Completed(Option<Box<RawValue>>),
    /// Not done.
    Failed(ErrorBody),
    /// Handed back of its own accord, with what the next attempt may go on from.
    Returned(Option<Box<RawValue>>),
    /// Ended because [`Stop`] said so. The checkpoint travels when the execution is returned.
    Stopped(Option<Box<RawValue>>),
}

impl Finish {
    /// Done, with `result` as JSON; a failure with the code `bad_result` if it can't be written as JSON.
    #[must_use]
    pub fn completed<T: Serialize>(result: &T) -> Self {
        match serde_json::value::to_raw_value(result) {
            Ok(raw) => Self::Completed(Some(raw)),
            Err(error) => Self::failed("bad_result", error.to_string()),
        }
    }

    /// Not done: a word for programs and a sentence for people.
    #[must_use]
    pub fn failed(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Failed(ErrorBody { code: code.into(), message: message.into() })
    }
}

/// One attempt, as the worker gets it.
#[derive(Debug, Clone)]
pub struct Execution {
    /// The execution.
    pub id: ExecutionId,
    /// Its attempt, from 1.
    pub attempt: u32,
    /// The agent that runs it.
    pub agent_id: AgentId,
    /// What the submitter handed in: any JSON, its bytes untouched.
    pub input: Box<RawValue>,
    /// Where an earlier attempt had got to.
    pub checkpoint: Option<Box<RawValue>>,
    /// Time it may run, in milliseconds from its dispatch.
    pub timeout_ms: u64,
    /// When its time is up, by the fleet's clock. The watchdog sees to it; the worker need not.
    pub deadline: Timestamp,
    /// To say that it advances.
    pub progress: Progress,
    /// To hear that it is to end.
    pub stop: Stop,
}

impl Execution {
    /// Reads the input as `T`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn input<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.input.get())
    }
}

/// A number that rises as work advances; listed in every heartbeat from the first time that it is set. Work that never sets it
/// does not stand still, however long it is quiet. Cheap to set, cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Progress(
    /// One more than it is; 0: it was never set.
    Arc<AtomicU64>,
);

impl Progress {
    /// Raises it to `value`; a lower one changes nothing.
    pub fn set(&self, value: u64) {
        self.0.fetch_max(value.saturating_add(1), Ordering::Relaxed);
    }

    /// Raises it by `steps`.
    pub fn add(&self, steps: u64) {
        let raise = |held: u64| Some(held.max(1).saturating_add(steps));
        // The closure always has a next value: this can't fail.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, raise);
    }

    /// What it is; `None`: it was never set.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        self.0.load(Ordering::Relaxed).checked_sub(1)
    }
}

/// How urgently work is to end; rises only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    None,
    Asked,
    Kill,
}

/// Tells the work that it is to end.
#[derive(Debug, Clone)]
pub struct Stop(watch::Receiver<Urgency>);

/// The other end of [`Stop`].
#[derive(Debug, Clone)]
pub(crate) struct StopSender(watch::Sender<Urgency>);

pub(crate) fn stop_pair() -> (StopSender, Stop) {
    let (sender, receiver) = watch::channel(Urgency::None);
    (StopSender(sender), Stop(receiver))
}

impl StopSender {
    pub(crate) fn raise(&self, to: Urgency) {
        self.0.send_if_modified(|urgency| {
            let rises = to > *urgency;
            *urgency = (*urgency).max(to);
            rises
        });
    }
}

impl Stop {
    /// It was asked to end.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        *self.0.borrow() >= Urgency::Asked
    }

    /// Waits until it is asked to end. With [`Death::Abort`] it has its grace to do so.
    pub async fn asked(&self) {
        self.at_least(Urgency::Asked).await;
    }

    /// Waits until its grace is over: it must die now.
    pub async fn killed(&self) {
        self.at_least(Urgency::Kill).await;
    }

    async fn at_least(&self, urgency: Urgency) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|now| *now >= urgency).await.is_err() {
            // The agent is gone without a word (it only drops the sender after the work ended): never asked.
            std::future::pending::<()>().await;
        }
    }
}

/// A worker from a function, which dies by being dropped.
pub struct FnWorker<F>(F);

/// Makes a worker of an asynchronous function.
///
/// ```
/// use rollcall_agent::{Execution, Finish, worker_fn};
/// let worker = worker_fn(|execution: Execution| async move {
///     match execution.input::<String>() {
///         Ok(name) => Finish::completed(&format!("hello {name}")),
///         Err(error) => Finish::failed("bad_input", error.to_string()),
///     }
/// });
/// # let _ = worker;
/// ```
pub const fn worker_fn<F, Fut>(function: F) -> FnWorker<F>
where
    F: Fn(Execution) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Finish> + Send,
{
    FnWorker(function)
}

impl<F, Fut> Worker for FnWorker<F>
where
    F: Fn(Execution) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Finish> + Send,
{
    fn run(&self, execution: Execution) -> impl Future<Output = Finish> + Send {
        (self.0)(execution)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_only_rises() {
        let progress = Progress::default();
        assert_eq!(progress.get(), None);
        progress.set(5);
        progress.set(3);
        assert_eq!(progress.get(), Some(5));
        progress.add(2);
        assert_eq!(progress.get(), Some(7));
        progress.set(u64::MAX);
        progress.add(1);
        assert_eq!(progress.get(), Some(u64::MAX - 1));
        let other = Progress::default();
        other.add(0);
        assert_eq!(other.get(), Some(0), "it was set, and has not moved yet");
    }

    #[tokio::test]
    async fn a_stop_rises_and_never_falls() {
        let (sender, stop) = stop_pair();
        assert!(!stop.is_asked());
        sender.raise(Urgency::Kill);
        sender.raise(Urgency::Asked);
        assert!(stop.is_asked());
        stop.asked().await;
        stop.killed().await;
    }
}
