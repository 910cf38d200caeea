//! The loop: heartbeats, the log, timers and requests come in; one agent at a time is decided about; effects go out and
//! come back. One task owns all state, so nothing is locked and nothing is decided on stale knowledge.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use rollcall_core::agent::Status;
use rollcall_core::sight::Void;
use rollcall_core::time::{Clock, SystemClock};
use rollcall_core::wire::Goodbye;
use rollcall_core::{AgentId, InstanceId, Timestamp};
use rollcall_nats::{Batch, Subscriber, Tail, TailError};
use rollcall_service::{Context, LoopHealth};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::agents_file::{FileAgent, FileRead};
use crate::api::Ask;
use crate::config::{Config, Policy};
use crate::decide::Wish;
use crate::effect::{Appended, Reach};
use crate::entry::{self, Read};
use crate::probe::scheduler::{Report, Scheduler};
use crate::state::{Entry, Fleet, Index, Loss, PingOutcome};
use crate::timers::Timers;

mod hearing;
mod intake;
mod probing;
mod requests;
mod steps;
mod timing;

pub(crate) use hearing::SightView;

/// Inputs from tasks that may wait; each task is bounded by permits of its own, so this is never the narrow place.
pub(crate) const INPUTS: usize = 1024;
/// Events folded between two looks at anything else.
const TAIL_BATCH: usize = 1000;
/// Batches of events that may wait for the loop.
const TAIL_BATCHES: usize = 4;
/// Heartbeats read between two looks at anything else.
const BEAT_BATCH: usize = 4096;
/// How often timers are looked at.
const TICK: Duration = Duration::from_millis(50);
/// A tick that comes this late is a stall.
const STALL: Duration = Duration::from_millis(250);
/// A stall from this length on voids all evidence. After a shorter one nothing is judged for as long as it lasted, so
/// that what waited in buffers is heard first.
const STALL_VOID: Duration = Duration::from_secs(5);
/// A machine that stalls all the time must not keep us from judging for ever.
const HOLD_MAX_MS: u64 = 5000;
/// How often gauges are set.
const GAUGES_INTERVAL_TICKS: u32 = 20;

/// What comes back to the loop.
#[derive(Debug)]
pub(crate) enum Input {
    /// An append has ended.
    Appended { index: Index, step: Box<steps::Step>, outcome: Appended },
    /// A ping has ended. `k`: the failure it was about, 0: an introduction. `from`: the silence it was sent in.
    Pinged { index: Index, instance: InstanceId, k: u32, from: Timestamp, outcome: PingOutcome },
    /// A goodbye was answered, or not.
    Parted { index: Index, instance: InstanceId, heard: bool },
    /// A request of the API.
    Ask(Ask),
    /// An agent lost work.
    Lost(Loss),
    /// Everything that agents have lost within the time that counts was said.
    LossesRead,
    /// A message of our own is back, or lost.
    Canary(hearing::Canary),
    /// A probe has ended.
    Probed(Report),
    /// The agents file was read.
    File(FileRead),
}

/// A wish with who waits for it.
pub(crate) type Wished =
    (Wish, oneshot::Sender<Result<crate::view::AgentView, rollcall_core::wire::ApiError>>);

/// What few agents have at a time.
#[derive(Debug, Default)]
struct Cold {
    /// Reply subjects of heartbeats that wait for a decision to be in the log.
    waiters: Vec<(String, InstanceId)>,
    wishes: VecDeque<Wished>,
    /// A goodbye that is repeated in answers.
    goodbye: Option<Unheard>,
}

/// A goodbye that its instance has not confirmed.
#[derive(Debug)]
struct Unheard {
    instance: InstanceId,
    goodbye: Goodbye,
    /// How long it is repeated.
    until: Timestamp,
    /// Only as long as its work stands still.
    while_still: bool,
}

impl Cold {
    fn is_empty(&self) -> bool {
        self.waiters.is_empty() && self.wishes.is_empty() && self.goodbye.is_none()
    }
}

/// Counters that are incremented on the hot path.
struct Counters {
    beats: metrics::Counter,
    replays: metrics::Counter,
    past: metrics::Counter,
}

/// The loop's state.
pub(crate) struct Shell {
    fleet: Fleet,
    timers: Timers,
    policy: Policy,
    clock: Arc<SystemClock>,
    reach: Reach,
    inputs: mpsc::Sender<Input>,
    cold: HashMap<Index, Cold>,
    /// Agents that wait for room to append.
    backlog: VecDeque<Index>,
    appends: usize,
    pings: usize,
    goodbyes: usize,
    /// The log has been read; decisions are allowed.
    ready: bool,
    /// What agents lost before this start is known: a quarantine may be lifted.
    losses_read: bool,
    /// Nothing is judged before: buffers are being read after a stall.
    judge_after: Timestamp,
    /// Since when nothing is judged.
    held_since: Option<Timestamp>,
    hearing: hearing::Hearing,
    /// Stalls and clock jumps that were acted upon.
    disturbances: LoopHealth,
    scheduler: Scheduler,
    probe_timeout: Duration,
    /// The agents file as it was read last, or earlier where a row of it is wrong now.
    file: HashMap<AgentId, FileAgent>,
    /// Read before the log was.
    file_waiting: Option<FileRead>,
    invalid: intake::Sources,
    replayed: intake::Sources,
    counters: Counters,
}

/// Everything the loop listens to.
pub(crate) struct Ears {
    pub(crate) beats: Subscriber,
    pub(crate) log: mpsc::Receiver<Result<Batch, TailError>>,
    pub(crate) inputs: mpsc::Receiver<Input>,
    pub(crate) link: watch::Receiver<rollcall_nats::Link>,
    pub(crate) drops: watch::Receiver<u64>,
    pub(crate) health: watch::Receiver<LoopHealth>,
}

/// Why the loop ended without being told to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoopError {
    /// The log can't be followed.
    #[error(transparent)]
    Tail(#[from] TailError),
    /// The connection was closed for good.
    #[error("the connection to nats was closed")]
    Closed,
}

/// Follows the log in a task of its own, since opening it takes round trips that the loop must not interrupt.
pub(crate) fn follow(mut tail: Tail) -> mpsc::Receiver<Result<Batch, TailError>> {
    let (sender, receiver) = mpsc::channel(TAIL_BATCHES);
    tokio::spawn(async move {
        loop {
            let batch = tail.next_batch(TAIL_BATCH).await;
            let ended = batch.is_err();
            if sender.send(batch).await.is_err() || ended {
                return;
            }
        }
    });
    receiver
}

impl Shell {
    pub(crate) fn new(
        config: &Config,
        scheduler: Scheduler,
        reach: Reach,
        inputs: mpsc::Sender<Input>,
        clock: Arc<SystemClock>,
    ) -> Self {
        Self {
            fleet: Fleet::default(),
            timers: Timers::default(),
            policy: config.policy.clone(),
            clock,
            reach,
            inputs,
            cold: HashMap::new(),
            backlog: VecDeque::new(),
            appends: 0,
            pings: 0,
            goodbyes: 0,
            ready: false,
            losses_read: false,
            judge_after: Timestamp::default(),
            held_since: None,
            hearing: hearing::Hearing::default(),
            disturbances: LoopHealth::default(),
            scheduler,
            probe_timeout: config.probe_timeout,
            file: HashMap::new(),
            file_waiting: None,
            invalid: intake::Sources::default(),
            replayed: intake::Sources::default(),
            counters: Counters {
                beats: metrics::counter!("rollcall_heartbeats_total"),
                replays: metrics::counter!("rollcall_heartbeats_replayed_total"),
                past: metrics::counter!("rollcall_heartbeats_past_total"),
            },
        }
    }

    /// Turns until the shutdown, then until requests are `drained` and what is in flight has come back, or `grace` is over.
    pub(crate) async fn run(
        mut self,
        mut ears: Ears,
        context: &Context,
        drained: &CancellationToken,
        grace: Duration,
    ) -> Result<(), LoopError> {
        let beat = context.register_loop("shell", Duration::from_secs(10));
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_tick = Instant::now();
        let mut ticks: u32 = 0;
        let mut last_link = *ears.link.borrow_and_update();
        self.link_is(last_link);
        let mut end: Option<Instant> = None;
        loop {
            let idle = self.appends == 0 && self.backlog.is_empty() && drained.is_cancelled();
            if end.is_some_and(|end| idle || Instant::now() >= end) {
                return Ok(());
            }
            tokio::select! {
                () = context.shutdown.cancelled(), if end.is_none() => {
                    end = Some(Instant::now() + grace);
                }
                message = ears.beats.next() => {
                    let Some(message) = message else { return Err(LoopError::Closed) };
                    self.hear(&message);
                    self.hear_waiting(&mut ears.beats, BEAT_BATCH);
                }
                batch = ears.log.recv() => {
                    let Some(batch) = batch else { return Err(LoopError::Closed) };
                    self.fold(&batch?, context);
                }
                Some(input) = ears.inputs.recv() => self.take(input, &mut ears.beats),
                changed = ears.link.changed() => {
                    if changed.is_err() {
                        return Err(LoopError::Closed);
                    }
                    let link = *ears.link.borrow_and_update();
                    self.link_changed(last_link, link);
                    last_link = link;
                }
                Ok(()) = ears.drops.changed() => {
                    ears.drops.borrow_and_update();
                    self.void(Void::Dropped);
                }
                Ok(()) = ears.health.changed() => {
                    let health = *ears.health.borrow_and_update();
                    self.disturbed(health);
                }
                _ = tick.tick() => {
                    beat.beat();
                    let late = last_tick.elapsed().saturating_sub(TICK);
                    last_tick = Instant::now();
                    self.stalled(late);
                    self.hear_all(&mut ears.beats);
                    self.go_off();
                    self.canary_if_due();
                    ticks = ticks.wrapping_add(1);
                    if ticks.is_multiple_of(GAUGES_INTERVAL_TICKS) {
                        self.gauge();
                    }
                }
            }
        }
    }

    /// Takes in what is buffered already, at most `most`. `true`: nothing is left.
    fn hear_waiting(&mut self, beats: &mut Subscriber, most: usize) -> bool {
        for _ in 0..most {
            // Unconstrained: the runtime's budget would pretend that nothing is there.
            match tokio::task::unconstrained(beats.next()).now_or_never() {
                Some(Some(message)) => self.hear(&message),
                _ => return true,
            }
        }
        false
    }

    fn fold(&mut self, batch: &Batch, context: &Context) {
        for entry in &batch.entries {
            self.fold_entry(entry);
        }
        if batch.caught_up && !self.ready {
            self.start();
            context.readiness.set("replay", true);
        }
    }

    /// Folds one entry of the log; in the projection it becomes visible at once.
    fn fold_entry(&mut self, entry: &rollcall_nats::Entry) {
        match entry::read(&self.reach.subjects, &self.reach.source, entry) {
            Read::Foreign => {}
            Read::Invalid(id, why) => {
                metrics::counter!("rollcall_invalid_entries_total").increment(1);
                tracing::warn!(agent_id = %id, seq = entry.seq, why, "an entry of the log is no event and is skipped");
                if let Some(index) = self.place(&id)
                    && let Some(agent) = self.fleet.get_mut(index)
                {
                    agent.known.skip(entry.seq);
                }
            }
            Read::Event(id, event, time, ours) => {
                // Another's clock may be ahead: nobody is heard in the future.
                let time = time.min(self.clock.now());
                if let Some(index) = self.place(&id)
                    && self.fleet.apply(index, entry.seq, &event, time, ours)
                    && self.ready
                {
                    self.sync_probe(index);
                    self.reconcile(index);
                    self.rearm(index);
                }
            }
        }
    }

    fn place(&mut self, id: &AgentId) -> Option<Index> {
        match self.fleet.find_or_add(id) {
            Ok(index) => Some(index),
            Err(full) => {
                tracing::error!(agent_id = %id, %full, "agent is not followed");
                None
            }
        }
    }

    /// The log has been read: from now on there are verdicts, and every clock starts here.
    fn start(&mut self) {
        self.ready = true;
        let now = self.clock.now();
        self.fleet.restart_clocks(now);
        tracing::info!(agents = self.fleet.len(), "the log is read, every clock starts now");
        self.listen_up();
        for index in 0..Index::try_from(self.fleet.len()).unwrap_or(Index::MAX) {
            self.sync_probe(index);
            self.rearm(index);
        }
        if let Some(read) = self.file_waiting.take() {
            self.file_read(read);
        }
    }

    fn take(&mut self, input: Input, beats: &mut Subscriber) {
        match input {
            Input::Canary(canary) => self.canary_ended(canary, beats),
            Input::Appended { index, step, outcome } => self.appended(index, *step, outcome),
            Input::Pinged { index, instance, k, from, outcome } => {
                self.pings -= 1;
                self.pinged(index, &instance, k, from, outcome);
            }
            Input::Parted { index, instance, heard } => {
                self.goodbyes -= 1;
                self.parted(index, &instance, heard);
            }
            Input::Ask(ask) => self.answer(ask),
            Input::Probed(report) => self.probed(report),
            Input::File(read) => self.file_read(read),
            Input::Lost(loss) => self.lost(loss),
            Input::LossesRead => self.all_losses_read(),
        }
    }

    /// It may come before the agent's own events, while the log is being read.
    fn lost(&mut self, loss: Loss) {
        if let Some(index) = self.place(&loss.agent_id)
            && let Some(entry) = self.fleet.get_mut(index)
        {
            let time = loss.time.min(self.clock.now());
            entry.known.lose(&Loss { time, ..loss });
            self.reconcile(index);
            self.rearm(index);
        }
    }

    /// Quarantines may end from now on.
    fn all_losses_read(&mut self) {
        self.losses_read = true;
        let quarantined = |entry: &Entry| entry.known.agent.quarantined.is_some();
        let waiting: Vec<Index> =
            self.fleet.iter().filter(|(_, entry)| quarantined(entry)).map(|(index, _)| index).collect();
        for index in waiting {
            self.reconcile(index);
            self.rearm(index);
        }
    }

    fn gauge(&mut self) {
        for status in Status::ALL {
            #[expect(clippy::cast_precision_loss, reason = "a gauge")]
            metrics::gauge!("rollcall_agents", "status" => status.as_str())
                .set(self.fleet.count(status) as f64);
        }
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("rollcall_appends_waiting").set(self.backlog.len() as f64);
        let holes = std::mem::take(&mut self.fleet.holes);
        if holes > 0 {
            metrics::counter!("rollcall_heartbeat_gaps_total").increment(holes);
        }
    }

    /// Publishes an answer without ever waiting for room.
    fn publish(&self, reply: &str, body: Vec<u8>) {
        let sent = self.reach.bus.reply_to(Some(reply), None, body.into());
        if sent.now_or_never().is_none() {
            metrics::counter!("rollcall_heartbeat_replies_dropped_total").increment(1);
        }
    }
}

#[cfg(test)]
mod tests;
