//! One execution from its acceptance to its acknowledged report.

use std::{any::Any, sync::Arc};

use rollcall_core::{time::Clock, wire::DispatchRequest};
use tokio::sync::watch;

use crate::{
    Execution, Finish, Worker, report,
    shell::{Life, Live, Shell},
    state::{Admission, Key},
    worker::{Death, Progress, Stop, stop_pair},
};

/// Decides about a dispatch and starts what is taken.
pub(crate) fn admit<W: Worker>(shell: &Arc<Shell<W>>, request: DispatchRequest) -> Admission {
    let key = Key::new(request.execution_id.clone(), request.attempt);
    let (stop_sender, stop) = stop_pair();
    let (life_sender, life) = watch::channel(Life::Alive);
    let progress = Progress::default();
    {
        let mut inner = shell.lock();
        let admission = inner.book.dispatch(&key);
        if admission != Admission::Start {
            return admission;
        }
        inner.live.insert(key.clone(), Live { stop: stop_sender, life, progress: progress.clone() });
    }
    tracing::info!(execution = %key, timeout_ms = request.timeout_ms, "accepted");
    let execution = Execution {
        id: request.execution_id,
        attempt: request.attempt,
        agent_id: shell.profile.id.clone(),
        input: request.input,
        checkpoint: request.checkpoint,
        timeout_ms: request.timeout_ms,
        deadline: request.deadline,
        progress,
        stop: stop.clone(),
    };
    tokio::spawn(live_and_report(Arc::clone(shell), key, execution, stop, life_sender));
    shell.changed();
    Admission::Start
}

async fn live_and_report<W: Worker>(
    shell: Arc<Shell<W>>,
    key: Key,
    execution: Execution,
    stop: Stop,
    life: watch::Sender<Life>,
) {
    let finish = run(&shell, execution, &stop).await;
    let (ending, payload) = report::of_finish(finish);
    let Some(outcome) = shell.lock().book.finish(&key, ending) else {
        tracing::error!(execution = %key, "ended although it was not running");
        return;
    };
    life.send_replace(Life::Dead(outcome));
    shell.changed();
    tracing::info!(execution = %key, outcome = outcome.as_str(), "ended");
    let bytes = report::encode(&shell.profile.instance, &key, outcome, payload, shell.clock.now());
    let subject = shell.subjects.report(&shell.profile.id, &key.execution_id);
    tokio::select! {
        () = shell.over.cancelled() => return,
        () = report::publish_until_acknowledged(&shell.bus, &subject, &key, bytes) => {}
    }
    {
        let mut inner = shell.lock();
        inner.book.acknowledged(&key);
        inner.live.remove(&key);
    }
    life.send_replace(Life::Acknowledged(outcome));
    shell.changed();
}

/// The work, up to its death.
async fn run<W: Worker>(shell: &Shell<W>, execution: Execution, stop: &Stop) -> Finish {
    let worker = Arc::clone(&shell.worker);
    let mut task = shell.work.spawn(async move { worker.run(execution).await });
    let joined = tokio::select! {
        joined = &mut task => joined,
        () = stop.killed(), if W::DEATH == Death::Abort => {
            task.abort();
            // The join is the proof: it comes when the future is dropped, or when it ended all the same.
            task.await
        }
    };
    match joined {
        Ok(finish) => finish,
        Err(error) if error.is_cancelled() => Finish::Stopped(None),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => Finish::failed("panic", panic_text(panic.as_ref())),
            Err(error) => Finish::failed("panic", error.to_string()),
        },
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "panic without a message".to_owned())
}
