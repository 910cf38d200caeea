//! The life of an agent: start, serve, shut down.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rollcall_core::{
    ids::{AgentId, InstanceId},
    subject::Subjects,
};
use rollcall_nats::{Bus, BusOptions, ConnectError, SubscribeError};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    AgentBuilder, AgentHandle, Worker,
    builder::{Profile, WorkRuntime},
    control::Control,
    heartbeat,
    requests::{self, KILL_CONFIRM_BOUND},
    shell::Shell,
    shutdown::{Exit, Phase, Trigger},
    worker::Urgency,
};

/// How long reports may still wait for their acknowledgement after the drain deadline (PROTOCOL.md 2, Shutdown, step 4).
pub const REPORTS_BOUND: Duration = Duration::from_secs(15);

/// Why an agent did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No bus, and no waiting will bring one.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No subscription to requests.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    /// The system does not hand over signals.
    #[error("signals can't be received")]
    Signals(#[source] std::io::Error),
}

/// `options` as an agent uses them: named after it, and with an inbox of its own (`_INBOX_<agent>`) when it connects as
/// somebody, because an agent's account may subscribe to nothing else (deploy/nats.conf).
#[must_use]
pub fn bus_options(mut options: BusOptions, agent: &AgentId, subjects: &Subjects) -> BusOptions {
    if options.connection_name.is_empty() {
        options.connection_name = format!("agent {agent}");
    }
    if options.inbox_prefix.is_none() && (options.creds.is_some() || options.user.is_some()) {
        options.inbox_prefix = Some(format!("_INBOX_{agent}"));
    }
    options.prefix = subjects.prefix().to_string();
    options
}

/// An agent that was put together and waits to be started.
#[derive(Debug)]
pub struct Agent<W> {
    pub(crate) subjects: Subjects,
    pub(crate) profile: Arc<Profile>,
    pub(crate) interval: Duration,
    pub(crate) stop_grace: Duration,
    pub(crate) control: Arc<Control>,
    pub(crate) work: WorkRuntime,
    pub(crate) worker: Arc<W>,
}

impl Agent<()> {
    /// Begins to describe the agent `id`.
    pub fn builder(id: impl Into<String>) -> AgentBuilder {
        AgentBuilder::new(id)
    }
}

impl<W> Agent<W> {
    /// This process start.
    #[must_use]
    pub fn instance_id(&self) -> &InstanceId {
        &self.profile.instance
    }

    /// To end it from outside.
    #[must_use]
    pub fn handle(&self) -> AgentHandle {
        AgentHandle(Arc::clone(&self.control))
    }
}

impl<W: Worker> Agent<W> {
    /// Receives signals, connects (waiting for a server that is not up yet), and runs.
    /// The caller exits with [`Exit::status`].
    ///
    /// # Errors
    /// What no waiting heals, see [`RunError`].
    pub async fn start(self, options: BusOptions) -> Result<Exit, RunError> {
        self.handle().on_signals().map_err(RunError::Signals)?;
        let control = Arc::clone(&self.control);
        let options = bus_options(options, &self.profile.id, &self.subjects);
        let unusable = CancellationToken::new();
        let connecting = Bus::connect(options, unusable.clone());
        let bus = tokio::select! {
            bus = connecting => bus?,
            // Nothing was taken yet: nothing to drain.
            () = control.reached(Phase::Drain) => return Ok(control.plan().exit(true)),
        };
        let watched = Arc::clone(&control);
        tokio::spawn(async move {
            unusable.cancelled().await;
            watched.trigger(&Trigger::Program("unsupported_server".to_owned()));
        });
        // The connection is not drained at the end: the answer to `gone` came after everything that was sent before.
        self.run(bus).await
    }

    /// Runs on a connection that is there, until something triggers the shutdown and it is through.
    ///
    /// # Errors
    /// [`RunError::Subscribe`].
    pub async fn run(self, bus: Bus) -> Result<Exit, RunError> {
        let over = CancellationToken::new();
        let _over = over.clone().drop_guard();
        let shell = Arc::new(Shell::new(
            bus.clone(),
            self.subjects,
            Arc::clone(&self.profile),
            Arc::clone(&self.control),
            self.worker,
            self.work.handle.clone(),
            self.stop_grace,
            over.clone(),
        ));
        // Reachable first, known second: the first heartbeat may be answered with a dispatch.
        let subject = shell.subjects.agent_requests(&self.profile.id, &self.profile.instance);
        let requests = bus.subscribe(subject).await?;
        tracing::info!(
            agent = %self.profile.id, instance = %self.profile.instance, pool = %self.profile.pool,
            capacity = self.profile.capacity, interval_ms = self.profile.interval_ms, "agent starts"
        );
        let mut tasks = JoinSet::new();
        let beating = over.child_token();
        tasks.spawn(heartbeat::beat(Arc::clone(&shell), self.interval, beating.clone()));
        tasks.spawn(requests::answer(Arc::clone(&shell), requests));
        let exit = tokio::select! {
            exit = shut_down(&shell, beating) => exit,
            () = shell.control.reached(Phase::Exit) => {
                shell.worker.exit_at_once();
                tracing::warn!("exits at once");
                shell.control.plan().exit(false)
            }
        };
        if exit.stay_down {
            tracing::warn!(woken_by = %exit.woken_by, status = exit.status, "agent ended: do not restart");
        } else {
            tracing::info!(woken_by = %exit.woken_by, status = exit.status, clean = exit.clean, "agent ended");
        }
        Ok(exit)
    }
}

/// PROTOCOL.md 2, "Shutdown, agent side". Waits for the first trigger, then runs once.
async fn shut_down<W: Worker>(shell: &Shell<W>, beating: CancellationToken) -> Exit {
    let control = &shell.control;
    control.reached(Phase::Drain).await;
    if !control.takes_routine() {
        // Somebody else runs it already; they return its exit.
        std::future::pending::<()>().await;
    }
    let plan = control.plan();
    let until = plan.drain_until.unwrap_or_else(Instant::now);
    let woken_by = plan.woken_by.as_ref().map(Trigger::reason);
    // 1: nothing more is accepted, and everybody hears so.
    let running = {
        let mut inner = shell.lock();
        inner.book.close();
        inner.book.running()
    };
    shell.beat_now.notify_one();
    tracing::info!(
        woken_by,
        running,
        drain_ms = until.saturating_duration_since(Instant::now()).as_millis() as u64,
        "draining"
    );
    // 2: what runs may finish.
    finish_running(shell).await;
    // 3: what is left is cancelled and handed back.
    let left = return_running(shell).await;
    // 4: every report is acknowledged.
    let unacked = await_reports(shell).await;
    // 5: the last heartbeat, nothing after it.
    beating.cancel();
    heartbeat::say_gone(shell).await;
    control.plan().exit(left == 0 && unacked == 0)
}

async fn finish_running<W>(shell: &Shell<W>) {
    let control = &shell.control;
    let deadline = async {
        loop {
            // The deadline may come nearer while we wait; it is looked at again whenever the plan changes.
            let Some(until) = control.plan().drain_until else { return };
            tokio::select! {
                () = tokio::time::sleep_until(until.into()) => return,
                () = control.nearer_than(until) => {}
            }
        }
    };
    tokio::select! {
        () = shell.until(|inner| inner.book.running() == 0) => {}
        () = deadline => tracing::info!("drain deadline reached"),
        () = control.reached(Phase::Return) => tracing::info!("drain cut short"),
    }
}

/// Returns how many would not die.
async fn return_running<W: Worker>(shell: &Shell<W>) -> usize {
    let stops: Vec<_> = {
        let mut inner = shell.lock();
        let stopped = inner.book.return_all();
        if !stopped.is_empty() {
            tracing::info!(executions = stopped.len(), "handing back what still runs");
        }
        inner.live.values().map(|live| live.stop.clone()).collect()
    };
    let none_runs = || shell.until(|inner| inner.book.running() == 0);
    stops.iter().for_each(|stop| stop.raise(Urgency::Asked));
    tokio::select! {
        () = none_runs() => return 0,
        () = tokio::time::sleep(shell.stop_grace) => {}
        () = shell.control.reached(Phase::Abort) => {}
    }
    stops.iter().for_each(|stop| stop.raise(Urgency::Kill));
    if timeout(KILL_CONFIRM_BOUND, none_runs()).await.is_ok() {
        return 0;
    }
    let left = shell.lock().book.running();
    tracing::error!(executions = left, "work that would not die is left behind");
    shell.worker.exit_at_once();
    left
}

/// Returns how many reports were not acknowledged in time.
async fn await_reports<W>(shell: &Shell<W>) -> usize {
    let until =
        shell.control.plan().drain_until.unwrap_or_else(Instant::now).max(Instant::now()) + REPORTS_BOUND;
    let all = shell.until(|inner| inner.book.unacked() == 0);
    if tokio::time::timeout_at(until.into(), all).await.is_ok() {
        return 0;
    }
    let inner = shell.lock();
    let lost: Vec<_> = inner.book.claims().map(ToString::to_string).collect();
    tracing::error!(executions = ?lost, "reports were not acknowledged in time");
    inner.book.unacked()
}
