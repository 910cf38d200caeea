//! `rollcall simulate`: a fleet of light agents in one process, every fault there is, and an account of what became of each.

mod agent;
mod kind;
mod plan;
mod submitter;
mod summary;
mod truth;
mod watcher;

use std::{
    collections::HashSet,
    io::{IsTerminal, stderr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rollcall_core::{ids::AgentId, subject::Subjects, time::SystemClock};
use rollcall_nats::{Bus, EventLog};
use rollcall_service::Settings;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{
    agent::{Front, SimAgent, World},
    kind::Rate,
    plan::{CAPACITY, Plan},
    submitter::Submitter,
    summary::Counters,
    truth::Truth,
};
use crate::{connection::Fleet, exit, failure::Failure, output::Output};

/// How long a connection to NATS may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long all agents may take to be connected, by the log's word, besides two heartbeat intervals.
const WARM_UP_BOUND: Duration = Duration::from_secs(60);
/// What is added to the time that recoveries may need by the settings, before open faults count as missed.
const SETTLE_MARGIN: Duration = Duration::from_secs(60);
/// How often the progress is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How long the agents may take to say goodbye at the end.
const FAREWELL_BOUND: Duration = Duration::from_secs(10);
/// Submissions a second for each agent, when nothing else is said.
const SUBMISSIONS_PER_AGENT: f64 = 0.02;

/// What `rollcall simulate` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
The simulator needs a running fleet, may publish as any agent, and reads the log (the operator's user, or a bus without
accounts). It must run with the same ROLLCALL_* settings as the services, which say how long recoveries may take.

Faults (--rate KIND=SHARE of the submissions, 0 leaves one out):
  hung stalling orphaning refusing-terminate double-reporting late-reporting        in one execution
  silent crashing restarting returning flapping slow clock-skewed                  in an agent, with all it holds

NOTICED is the time from the fault to its recovery, which includes what the settings ask for (grace, lost_after);
DETECTED is the services' own detected_after_ms. Exit status 1 if a fault was missed or recovered for another reason,
if anything was recovered wrongly, doubled, ended as it should not, or did not end.")]
pub(crate) struct SimulateArgs {
    /// How many agents.
    #[arg(long, default_value_t = 100)]
    agents: usize,
    /// How long work is handed in and faults are played; what is open then is waited for.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Everything that chance decides comes from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Share of the submissions that get this fault; may be repeated.
    #[arg(long = "rate", value_name = "KIND=SHARE")]
    rates: Vec<Rate>,
    /// Submissions a second [default: 0.02 for each agent].
    #[arg(long)]
    submit_per_second: Option<f64>,
    /// Time between the heartbeats of an agent [default: ROLLCALL_HEARTBEAT_INTERVAL_MS].
    #[arg(long)]
    interval_ms: Option<u64>,
    /// How long to wait for what is still open in the end [default: what the settings allow for, and a minute].
    #[arg(long)]
    settle_ms: Option<u64>,
    /// Connections that the agents share.
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Part of the agents' names, so that runs can be told apart [default: from the time].
    #[arg(long)]
    tag: Option<String>,
}

/// Runs; exit status 1 if anything differs from what it should be.
pub(crate) async fn run(args: SimulateArgs, settings: &Settings, output: Output) -> Result<u8, Failure> {
    check(&args)?;
    let tag = args.tag.clone().unwrap_or_else(tag_of_now);
    let mut plan = Plan::new(args.agents, &tag, args.seed, &args.rates).map_err(Failure::usage)?;
    let fleet = Fleet::connect(settings, CONNECT_WITHIN).await?;
    let interval = args.interval_ms.map_or(settings.heartbeat_interval, Duration::from_millis);
    let world = Arc::new(World {
        subjects: Subjects::new(fleet.subjects.prefix().clone()),
        interval,
        capacity: CAPACITY,
        truth: Truth::default().into(),
        clock: SystemClock::new(),
        over: CancellationToken::new(),
        heartbeats: AtomicU64::new(0),
        dispatches: AtomicU64::new(0),
    });
    let fronts: Arc<Vec<Arc<Front>>> = Arc::new(plan.agents().iter().map(|_| Arc::default()).collect());
    let log = EventLog::new(&fleet.bus);
    let from = log
        .last_seq()
        .await
        .map_err(|error| Failure::unavailable(format!("the log can't be read: {error}")))?;
    let watcher = watcher::Watcher::new(log.tail(from, [fleet.subjects.all_events().as_str()]), &plan);
    let connected = watcher.connected();
    let submitter = Arc::new(Submitter::new(fleet.clone(), Arc::clone(&world), Arc::clone(&fronts), &tag));
    let watching = tokio::spawn(watcher.watch(Arc::clone(&world), Arc::clone(&submitter)));
    let mut agents = start_agents(&args, settings, &plan, &world, &fronts, &fleet.bus).await?;

    let started = Instant::now();
    let bar = progress_bar();
    let ids: HashSet<AgentId> = plan.agents().iter().map(|agent| agent.id.clone()).collect();
    warm_up(&bar, connected, ids.len(), interval).await?;
    play(&args, &bar, &mut plan, &world, &fronts, &submitter).await;
    settle(&args, settings, &bar, &world, &submitter).await;
    bar.finish_and_clear();

    world.over.cancel();
    let farewell = async { while agents.join_next().await.is_some() {} };
    if tokio::time::timeout(FAREWELL_BOUND, farewell).await.is_err() {
        tracing::warn!("not all agents could say goodbye");
    }
    let unreadable =
        watching.await.map_err(|error| Failure::failed(format!("the log's reader ended: {error}")))?;
    let unreadable =
        unreadable.map_err(|error| Failure::unavailable(format!("the log can't be read: {error}")))?;
    let mut truth = world.truth();
    truth.close();
    let counters = Counters {
        agents: args.agents,
        seed: args.seed,
        seconds: started.elapsed().as_secs_f64(),
        submitted: submitter.submitted(),
        refused: submitter.refused(),
        heartbeats: world.heartbeats.load(Ordering::Relaxed),
        dispatches: world.dispatches.load(Ordering::Relaxed),
        unreadable,
    };
    summary::write(&truth, &counters, output)?;
    Ok(if truth.is_as_it_should_be() { exit::OK } else { exit::FAILED })
}

fn check(args: &SimulateArgs) -> Result<(), Failure> {
    let positive = |name: &str, value: f64| {
        if value.is_finite() && value > 0.0 {
            Ok(())
        } else {
            Err(Failure::usage(format!("--{name} must be above 0")))
        }
    };
    positive("minutes", args.minutes)?;
    positive("submit-per-second", args.submit_per_second.unwrap_or(1.0))?;
    if args.connections == 0 {
        return Err(Failure::usage("--connections must be above 0"));
    }
    Ok(())
}

/// Short, and another one every second.
fn tag_of_now() -> String {
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("{seconds:x}")
}

async fn start_agents(
    args: &SimulateArgs,
    settings: &Settings,
    plan: &Plan,
    world: &Arc<World>,
    fronts: &[Arc<Front>],
    first: &Bus,
) -> Result<JoinSet<()>, Failure> {
    let mut buses = vec![first.clone()];
    for _ in 1..args.connections {
        buses.push(Fleet::connect(settings, CONNECT_WITHIN).await?.bus);
    }
    let mut agents = JoinSet::new();
    for (index, planned) in plan.agents().iter().enumerate() {
        let bus = buses[index % buses.len()].clone();
        let agent = SimAgent::new(planned, bus, Arc::clone(world), Arc::clone(&fronts[index]));
        agents.spawn(async move {
            if let Err(error) = agent.live().await {
                tracing::error!(%error, "a simulated agent ended");
            }
        });
    }
    Ok(agents)
}

fn progress_bar() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {elapsed_precise} {bar:30} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

/// Waits until the log says that every agent is connected.
async fn warm_up(
    bar: &ProgressBar,
    mut connected: tokio::sync::watch::Receiver<usize>,
    agents: usize,
    interval: Duration,
) -> Result<(), Failure> {
    bar.set_length(agents as u64);
    let bound = WARM_UP_BOUND + interval * 2;
    let all = async {
        loop {
            let count = *connected.borrow_and_update();
            bar.set_position(count as u64);
            bar.set_message(format!("{count} of {agents} agents connected"));
            if count >= agents {
                return true;
            }
            if connected.changed().await.is_err() {
                return false;
            }
        }
    };
    match tokio::time::timeout(bound, all).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::unavailable("the log can't be read")),
        Err(_) => Err(Failure::unavailable(format!(
            "only {} of {agents} agents are connected after {bound:?}: is the health-prober running?",
            *connected.borrow()
        ))),
    }
}

/// Hands work in for as long as the run lasts, or until Ctrl-C.
async fn play(
    args: &SimulateArgs,
    bar: &ProgressBar,
    plan: &mut Plan,
    world: &Arc<World>,
    fronts: &[Arc<Front>],
    submitter: &Arc<Submitter>,
) {
    #[expect(clippy::cast_precision_loss, reason = "a count of agents")]
    let per_second = args.submit_per_second.unwrap_or((args.agents as f64 * SUBMISSIONS_PER_AGENT).max(0.5));
    let until = Instant::now() + Duration::from_secs_f64(args.minutes * 60.0);
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / per_second));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut looks = tokio::time::interval(LOOK_INTERVAL);
    bar.set_length((args.minutes * 60_000.0) as u64);
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(until) => return,
            _ = tokio::signal::ctrl_c() => return,
            _ = ticks.tick() => {
                let is_free = |agent: usize| {
                    let front = &fronts[agent];
                    front.is_up.load(Ordering::Acquire) && front.load.load(Ordering::Acquire) < CAPACITY
                };
                let work = plan.next(is_free);
                let agent = plan.agents()[work.agent].id.clone();
                submitter.submit(work, agent).await;
            }
            _ = looks.tick() => {
                let left = until.saturating_duration_since(Instant::now()).as_millis() as u64;
                bar.set_position(bar.length().unwrap_or_default().saturating_sub(left));
                say(bar, world);
            }
        }
    }
}

fn say(bar: &ProgressBar, world: &World) {
    let truth = world.truth();
    let ((works, _), (injected, recovered)) = (truth.open(), truth.progress());
    bar.set_message(format!(
        "{} completed, {works} open, {recovered} of {injected} faults recovered",
        truth.completed
    ));
}

/// Waits for what is open, as long as the settings allow for, or until Ctrl-C.
async fn settle(
    args: &SimulateArgs,
    settings: &Settings,
    bar: &ProgressBar,
    world: &Arc<World>,
    submitter: &Submitter,
) {
    let allowed =
        settings.lost_after.max(settings.dispatch_grace) + settings.heartbeat_interval * 4 + SETTLE_MARGIN;
    let until = Instant::now() + args.settle_ms.map_or(allowed, Duration::from_millis);
    loop {
        say(bar, world);
        let (works, fates) = world.truth().open();
        if works == 0 && fates == 0 && submitter.is_idle() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep_until(until) => return,
            _ = tokio::signal::ctrl_c() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}
