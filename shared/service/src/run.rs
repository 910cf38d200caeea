//! The common main: arguments, settings, telemetry, admin pages, signals, the service itself, drain, exit code.

use std::future::Future;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Command;
use rollcall_core::time::SystemClock;
use rollcall_nats::{Bus, ConnectError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::admin::{self, AdminState};
use crate::health::{LoopBeat, Loops, Readiness};
use crate::lag::{LoopHealth, watch_loop};
use crate::settings::{Loaded, Settings, help_table};
use crate::{exit, healthcheck, panics, telemetry};

/// How long a service may take to end after a signal; under the 10 s that container engines wait before they kill.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(8);
/// Condition of [`Context::connect_bus`].
pub const NATS_CONDITION: &str = "nats";
/// Condition that stops holding when the process was told to end.
const RUNNING_CONDITION: &str = "running";

/// What a program is.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Its name: the binary, the service in events, the key of its default admin address.
    pub name: &'static str,
    /// One sentence for `--help`.
    pub about: &'static str,
    /// Its version: `env!("CARGO_PKG_VERSION")`.
    pub version: &'static str,
    /// Conditions that must hold before it is ready (see [`Readiness::set`]).
    pub conditions: &'static [&'static str],
}

/// What a running service gets. Cloning is cheap.
#[derive(Clone)]
pub struct Context {
    /// What it is.
    pub program: Program,
    /// New for every start.
    pub instance_id: Uuid,
    /// All settings, checked.
    pub settings: Arc<Settings>,
    /// Cancelled when it must end: drain and return within [`DRAIN_TIMEOUT`].
    pub shutdown: CancellationToken,
    /// What `/readyz` says.
    pub readiness: Readiness,
    /// The time; see [`Context::set_clock`].
    pub clock: Arc<SystemClock>,
    loops: Loops,
    pub(crate) loop_health: watch::Receiver<LoopHealth>,
}

impl Context {
    /// A context outside of [`run_main`], for tests of a service's `run`. Needs a runtime.
    pub fn for_tests(program: Program, settings: Settings) -> Self {
        let shutdown = CancellationToken::new();
        Self::new(program, settings, shutdown)
    }

    fn new(program: Program, settings: Settings, shutdown: CancellationToken) -> Self {
        let readiness = Readiness::new(program.conditions);
        readiness.set(RUNNING_CONDITION, true);
        Self {
            program,
            instance_id: Uuid::new_v4(),
            settings: Arc::new(settings),
            loop_health: watch_loop(shutdown.clone()),
            shutdown,
            readiness,
            clock: Arc::new(SystemClock::new()),
            loops: Loops::default(),
        }
    }

    /// `/rollcall/<name>/<instance>`: the `source` of this process's events.
    pub fn event_source(&self) -> String {
        format!("/rollcall/{}/{}", self.program.name, self.instance_id)
    }

    /// Stalls of the event loop and jumps of the wall clock so far.
    pub fn loop_health(&self) -> watch::Receiver<LoopHealth> {
        self.loop_health.clone()
    }

    /// Registers a loop without which this service is wedged: it must beat once per `limit`, or `/healthz` says so.
    pub fn register_loop(&self, name: &'static str, limit: Duration) -> LoopBeat {
        self.loops.register(name, limit)
    }

    /// Connects to NATS and keeps the readiness condition `nats` true while connected.
    ///
    /// # Errors
    /// What no waiting can heal; [`ConnectError::Cancelled`] when the shutdown came first.
    pub async fn connect_bus(&self) -> Result<Bus, ConnectError> {
        self.readiness.set(NATS_CONDITION, false);
        let options = self.settings.bus_options(self.program.name);
        let bus = Bus::connect(options, self.shutdown.clone()).await?;
        let (mut link, readiness) = (bus.link(), self.readiness.clone());
        tokio::spawn(async move {
            loop {
                let connected = link.borrow_and_update().connected;
                readiness.set(NATS_CONDITION, connected);
                if link.changed().await.is_err() {
                    readiness.set(NATS_CONDITION, false);
                    return;
                }
            }
        });
        Ok(bus)
    }
}

/// The whole of a service's `main`: returns when `run` has ended, or did not in time after a signal.
///
/// `run` returns when `Context::shutdown` is cancelled, or earlier with an error. Exit codes are in [`exit`].
pub fn run_main<F, Fut>(program: Program, run: F) -> ExitCode
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let arguments = match command(&program).try_get_matches() {
        Ok(arguments) => arguments,
        Err(error) => {
            // --help and --version are "errors" that go to stdout. Nothing can be done about a closed stdout.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::OK });
        }
    };
    let loaded = match Settings::load(program.name) {
        Ok(loaded) => loaded,
        Err(error) => {
            eprintln!("{}: {error}", program.name);
            return ExitCode::from(exit::USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{}: no runtime: {error}", program.name);
            return ExitCode::from(exit::FAILURE);
        }
    };
    if arguments.subcommand_name() == Some(HEALTHCHECK) {
        return runtime.block_on(run_healthcheck(&program, &loaded.settings));
    }
    let code = runtime.block_on(async { Box::pin(serve(program, loaded, run)).await });
    // Whatever still runs has had its time.
    runtime.shutdown_background();
    ExitCode::from(code)
}

const HEALTHCHECK: &str = "healthcheck";

fn command(program: &Program) -> Command {
    Command::new(program.name)
        .about(program.about)
        .version(program.version)
        .after_help(help_table(program.name))
        .subcommand(
            Command::new(HEALTHCHECK).about("Asks the running program whether it is ready: exits 0 or 1"),
        )
}

async fn run_healthcheck(program: &Program, settings: &Settings) -> ExitCode {
    match healthcheck::ask(settings.admin_addr).await {
        Ok(()) => ExitCode::from(exit::OK),
        Err(error) => {
            eprintln!("{}: {:#}", program.name, anyhow::Error::from(error));
            ExitCode::from(exit::FAILURE)
        }
    }
}

async fn serve<F, Fut>(program: Program, loaded: Loaded, run: F) -> u8
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let Loaded { settings, warnings } = loaded;
    if let Err(error) = telemetry::init_logs(&settings.log, settings.log_format) {
        eprintln!("{}: {error}", program.name);
        return exit::FAILURE;
    }
    panics::install();
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let shutdown = CancellationToken::new();
    // First of all: a signal that comes before its handler kills without a drain.
    if let Err(error) = watch_signals(shutdown.clone()) {
        return failed(&anyhow::Error::from(error).context("signals can't be handled"));
    }
    let admin_addr = settings.admin_addr;
    let context = Context::new(program, settings, shutdown.clone());
    tracing::info!(service = program.name, version = program.version, instance_id = %context.instance_id, "starting");
    let started = async {
        let metrics = telemetry::init_metrics()?;
        let state = AdminState {
            readiness: context.readiness.clone(),
            loops: context.loops.clone(),
            metrics: Some(metrics),
        };
        let listener = admin::bind(admin_addr).await?;
        tracing::info!(address = %listener.local_addr()?, "admin pages");
        anyhow::Ok((listener, state))
    };
    let (listener, state) = match started.await {
        Ok(started) => started,
        Err(error) => return failed(&error),
    };
    let admin_stop = CancellationToken::new();
    let pages = tokio::spawn(admin::serve(listener, state, admin_stop.clone()));
    let code = run_to_end(tokio::spawn(run(context.clone())), &context).await;
    admin_stop.cancel();
    // The pages end at once unless somebody keeps a connection; that is not waited for.
    pages.abort();
    code
}

async fn run_to_end(mut service: JoinHandle<anyhow::Result<()>>, context: &Context) -> u8 {
    let ended = tokio::select! {
        ended = &mut service => Some(ended),
        () = context.shutdown.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            context.readiness.set(RUNNING_CONDITION, false);
            match tokio::time::timeout(DRAIN_TIMEOUT, service).await {
                Ok(ended) => ended,
                Err(_) => {
                    tracing::error!(
                        after_ms = DRAIN_TIMEOUT.as_millis() as u64,
                        "drain took too long, ending anyway"
                    );
                    return exit::FAILURE;
                }
            }
        }
    };
    match ended {
        Ok(Ok(())) => {
            tracing::info!("ended");
            exit::OK
        }
        // Told to end while still waiting for NATS: that is an orderly end.
        Ok(Err(error)) if matches!(error.downcast_ref(), Some(ConnectError::Cancelled)) => exit::OK,
        Ok(Err(error)) => failed(&error),
        // The panic hook has logged it and normally ended the process already.
        Err(_) => exit::PANIC,
    }
}

fn failed(error: &anyhow::Error) -> u8 {
    tracing::error!("ending: {error:#}");
    exit::FAILURE
}

/// The first SIGTERM or SIGINT asks for a drain, the second ends the process.
fn watch_signals(shutdown: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if shutdown.is_cancelled() {
                tracing::error!(signal = name, "second signal, ending at once");
                std::process::exit(i32::from(exit::FAILURE));
            }
            tracing::info!(signal = name, "draining");
            shutdown.cancel();
        }
    });
    Ok(())
}
