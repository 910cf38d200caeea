//! The dispatcher's moving parts: what it is made of, how it starts, and its loops.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rollcall_capacity::{AgentSetting, RedisCapacity};
use rollcall_control::Registries;
use rollcall_core::{AgentId, ExecutionId, Pool, event::SystemEventKind, subject::Subjects};
use rollcall_nats::{Bus, Entry, Payloads, Reports, TailError, WorkConsumer, WorkOptions};
use rollcall_service::LoopBeat;
use tokio::sync::{Notify, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    alarms::Alarms,
    config::Config,
    ledger::{DecideError, ForeignChanges, Ingested, Ledger},
    rebuild::RebuildError,
    watch::Waits,
};

/// Launches that talk to the bus at once. Each may wait two seconds for its agent.
const LAUNCHES_MAX: usize = 1024;
/// Reports that are applied at once.
const REPORTS_MAX: usize = 256;
/// A report that somebody took and did not settle in this time is taken by somebody else: whoever took it may have died, and its
/// slot waits. Applying one takes milliseconds; taking it twice is harmless.
const REPORT_ACK_WAIT: Duration = Duration::from_secs(5);
/// Events folded between two looks at the shutdown signal.
const TAIL_BATCH: usize = 1000;
/// How often waiting work is looked at: a queue beside a free slot for longer than a second is an alarm.
const QUICK_AUDIT_INTERVAL: Duration = Duration::from_secs(1);
/// How often queued work is looked at for its time to live.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(250);
/// Executions expired in one look.
const EXPIRY_BATCH: usize = 256;
/// Changes of others that are carried out at once. While Redis is slow the rest waits as what was read, not as a task each.
const CARRIED_OUT_MAX: usize = 64;
/// Pause before something is tried again that needs a server which does not answer.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// One dispatcher process.
pub(crate) struct Dispatcher {
    pub(crate) ledger: Ledger,
    pub(crate) capacity: RedisCapacity,
    pub(crate) payloads: Payloads,
    pub(crate) reports: Reports,
    pub(crate) bus: Bus,
    pub(crate) subjects: Subjects,
    pub(crate) registries: Registries,
    pub(crate) settings: Config,
    pub(crate) launches: Semaphore,
    carrying_out: Arc<Semaphore>,
    pub(crate) waits: Waits,
    pub(crate) alarms: Alarms,
    pub(crate) rebuilding: tokio::sync::Mutex<()>,
    pub(crate) cancel: CancellationToken,
    applied: Mutex<HashMap<AgentId, (Pool, Option<AgentSetting>)>>,
    /// One at a time tells Redis of an agent.
    turns: Mutex<HashMap<AgentId, Arc<tokio::sync::Mutex<()>>>>,
    audited: AtomicBool,
    pools: Mutex<HashSet<Pool>>,
    audit_wanted: Notify,
    ready: AtomicBool,
    tasks: TaskTracker,
}

/// What a dispatcher is made of.
pub(crate) struct Parts {
    pub(crate) ledger: Ledger,
    pub(crate) capacity: RedisCapacity,
    pub(crate) bus: Bus,
    pub(crate) subjects: Subjects,
    pub(crate) settings: Config,
    pub(crate) cancel: CancellationToken,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The maps are changed by single calls: a panic can't have left them half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dispatcher {
    pub(crate) fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            payloads: Payloads::new(&parts.bus),
            reports: Reports::new(&parts.bus),
            ledger: parts.ledger,
            capacity: parts.capacity,
            bus: parts.bus,
            subjects: parts.subjects,
            registries: Registries::new(&parts.settings.allow_cidrs),
            settings: parts.settings,
            launches: Semaphore::new(LAUNCHES_MAX),
            carrying_out: Arc::new(Semaphore::new(CARRIED_OUT_MAX)),
            waits: Waits::default(),
            alarms: Alarms::default(),
            rebuilding: tokio::sync::Mutex::new(()),
            cancel: parts.cancel,
            applied: Mutex::default(),
            turns: Mutex::default(),
            audited: AtomicBool::new(false),
            pools: Mutex::default(),
            audit_wanted: Notify::new(),
            ready: AtomicBool::new(false),
            tasks: TaskTracker::new(),
        })
    }

    /// Runs something that outlives its caller; the drain waits for it.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Whether the start-up reconcile is done.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Has the auditor look soon.
    pub(crate) fn ask_for_audit(&self) {
        self.audit_wanted.notify_one();
    }

    /// In which pool Redis was told of an agent last, and what; `None` as setting: only its pool is certain.
    pub(crate) fn applied(&self, id: &AgentId) -> Option<(Pool, Option<AgentSetting>)> {
        locked(&self.applied).get(id).cloned()
    }

    /// Notes what Redis was told of an agent.
    pub(crate) fn note_applied(&self, id: &AgentId, pool: &Pool, setting: AgentSetting) {
        locked(&self.applied).insert(id.clone(), (pool.clone(), Some(setting)));
    }

    /// What Redis was told of an agent may not be what it has any more.
    pub(crate) fn doubt_applied(&self, id: &AgentId) {
        if let Some((_, setting)) = locked(&self.applied).get_mut(id) {
            *setting = None;
        }
    }

    /// Whose turn it is to tell Redis of an agent.
    pub(crate) fn turn_of(&self, id: &AgentId) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(locked(&self.turns).entry(id.clone()).or_default())
    }

    /// Notes that a pool was seen ready. `true`: it had been before.
    pub(crate) fn note_pool(&self, pool: &Pool) -> bool {
        !locked(&self.pools).insert(pool.clone())
    }

    /// Carries out what others decided, for as long as the process runs.
    pub(crate) async fn carry_out_foreign(self: Arc<Self>, mut changes: ForeignChanges) {
        loop {
            let met = tokio::select! {
                met = changes.recv() => met,
                () = self.cancel.cancelled() => return,
            };
            let Some(met) = met else { return };
            let Ok(permit) = Arc::clone(&self.carrying_out).acquire_owned().await else { return };
            let dispatcher = Arc::clone(&self);
            self.spawn(async move {
                let _permit = permit;
                for change in &met {
                    dispatcher.carry_out(change).await;
                }
            });
        }
    }

    /// Folds the log for as long as the process runs.
    pub(crate) async fn follow(self: Arc<Self>, replayed: CancellationToken) -> Result<(), TailError> {
        let all = self.subjects.all_events();
        let mut tail = self.ledger.log().tail(0, [all.as_str()]);
        loop {
            let batch = tokio::select! {
                batch = tail.next_batch(TAIL_BATCH) => batch?,
                () = self.cancel.cancelled() => return Ok(()),
            };
            for entry in &batch.entries {
                self.fold(entry).await;
            }
            for (pool, log_seq) in self.ledger.read(|p| p.reflected().clone()) {
                self.capacity.expect(pool.as_str(), log_seq);
            }
            if batch.caught_up && !self.ledger.go_live() {
                replayed.cancel();
            }
        }
    }

    async fn fold(self: &Arc<Self>, entry: &Entry) {
        let live = self.ledger.is_live();
        match self.ledger.ingest(entry) {
            // Before the audit nobody knows where Redis has it.
            Ingested::Agent(id) if live && self.audited.load(Ordering::Acquire) => {
                let dispatcher = Arc::clone(self);
                self.spawn(async move { dispatcher.apply_agent(&id).await });
            }
            Ingested::Unknown(id) => {
                if !self.read_history(&id, entry.seq).await {
                    return;
                }
            }
            Ingested::Invalid(why) => self.invalid_entry(entry, why, live),
            Ingested::Agent(_) | Ingested::Nothing => {}
        }
        self.ledger.passed(entry.seq);
    }

    /// Reads what happened to an execution of which an entry came and nothing is in memory. `false`: the process ends.
    async fn read_history(&self, id: &ExecutionId, seq: u64) -> bool {
        while let Err(error) = self.ledger.load_execution(id, seq.saturating_sub(1)).await {
            tracing::warn!(execution_id = %id, %error, "can't read an execution's history");
            tokio::select! {
                () = tokio::time::sleep(TRY_AGAIN) => {}
                () = self.cancel.cancelled() => return false,
            }
        }
        true
    }

    fn invalid_entry(self: &Arc<Self>, entry: &Entry, why: String, live: bool) {
        let subject = entry.subject.escape_default().to_string();
        let seq = entry.seq;
        metrics::counter!("rollcall_invalid_entries_total").increment(1);
        tracing::warn!(seq, subject, why, "an entry of the log is no valid event; skipped");
        // What was there before this process was alarmed by the one that saw it come.
        if live && self.alarms.may_speak(&subject, self.ledger.now()) {
            let dispatcher = Arc::clone(self);
            self.spawn(async move {
                dispatcher
                    .ledger
                    .system(
                        SystemEventKind::InvalidEntry,
                        serde_json::json!({"seq": seq, "subject": subject, "cause": why}),
                    )
                    .await;
            });
        }
    }

    /// What must be done before anything is admitted: Redis agrees with the log, and what the last process left
    /// half done is taken up.
    pub(crate) async fn reconcile(self: &Arc<Self>) -> Result<(), RebuildError> {
        let pools: Vec<(AgentId, Pool)> =
            self.ledger.read(|p| p.agents().map(|a| (a.id.clone(), a.pool())).collect());
        self.audit().await?;
        // Whoever changed pools since then is moved from the pool that the audit found right.
        for (id, pool) in pools {
            locked(&self.applied).entry(id).or_insert((pool, None));
        }
        self.audited.store(true, Ordering::Release);
        let agents: Vec<AgentId> = self.ledger.read(|p| p.agents().map(|a| a.id.clone()).collect());
        for id in agents {
            self.apply_agent(&id).await;
        }
        // What is younger, a living replica may be asking at this moment; the quick audit takes it up when it is due.
        self.take_up();
        self.ready.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes in reports until the shutdown.
    pub(crate) async fn take_reports(self: Arc<Self>) {
        let options = || WorkOptions {
            max_ack_pending: REPORTS_MAX * 4,
            ack_wait: REPORT_ACK_WAIT,
            ..WorkOptions::default()
        };
        let mut consumer: WorkConsumer = self.reports.work("dispatcher", options());
        let permits = Arc::new(Semaphore::new(REPORTS_MAX));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let delivery = tokio::select! {
                delivery = consumer.next() => delivery,
                () = self.cancel.cancelled() => break,
            };
            match delivery {
                Ok(delivery) => {
                    let dispatcher = Arc::clone(&self);
                    self.spawn(async move {
                        dispatcher.take_report(delivery).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "can't take in reports");
                    tokio::time::sleep(TRY_AGAIN).await;
                    consumer = self.reports.work("dispatcher", options());
                }
            }
        }
        consumer.stop().await;
    }

    /// Ends what has waited too long.
    pub(crate) async fn expire_queued(self: Arc<Self>, alive: LoopBeat) {
        let mut ticks = tokio::time::interval(EXPIRY_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.cancel.cancelled() => return,
            }
            alive.beat();
            let now = self.ledger.now();
            for id in self.ledger.read(|p| p.expired(now, EXPIRY_BATCH)) {
                alive.beat();
                match self.ledger.decide(&id, |e| e.expire(now)).await {
                    Ok(change) => self.carry_out(&change).await,
                    Err(DecideError::Refused(_)) => {}
                    Err(error) => {
                        tracing::warn!(execution_id = %id, %error, "could not expire");
                        break;
                    }
                }
            }
        }
    }

    /// Audits at intervals, and when somebody asks for it.
    pub(crate) async fn audit_at_intervals(self: Arc<Self>) {
        let mut full = tokio::time::interval(self.settings.audit_interval);
        let mut quick = tokio::time::interval(QUICK_AUDIT_INTERVAL);
        for ticks in [&mut full, &mut quick] {
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            ticks.reset();
        }
        loop {
            let result = tokio::select! {
                _ = full.tick() => self.audit().await,
                _ = quick.tick() => self.quick_audit().await,
                () = self.audit_wanted.notified() => {
                    // Whoever asked ran into a server that did not answer: give it a moment.
                    tokio::time::sleep(TRY_AGAIN).await;
                    self.audit().await
                }
                () = self.cancel.cancelled() => return,
            };
            if let Err(error) = result {
                metrics::counter!("rollcall_audits_failed_total").increment(1);
                tracing::warn!(%error, "audit not possible now");
            }
        }
    }

    /// Lets what is under way finish.
    pub(crate) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use rollcall_core::{event::Queued, wire::Delivery};
    use rollcall_nats::ensure_streams;

    use super::*;
    use crate::fixture::Fixture;

    /// Far above what a failing read takes, so that only one that is tried again is not over by then.
    const OVER: Duration = Duration::from_millis(300);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_fold_is_not_past_an_execution_whose_history_it_could_not_read() {
        let fixture = Fixture::new().await;
        let dispatcher = &fixture.dispatcher;
        let id = ExecutionId::new("x").unwrap();
        fixture.submitted("x", None, "p", Delivery::Push).await;
        let (execution_id, reason) = (id.clone(), Some("refused".to_owned()));
        let back = Queued { execution_id, attempt: 1, agent_id: None, position: 1, reason };
        fixture.happens("x", back.into()).await;
        let subject = dispatcher.subjects.execution_event(&id);
        let entry = dispatcher.ledger.log().last(&subject).await.unwrap().unwrap();
        fixture.bus.request("$JS.API.STREAM.DELETE.ROLLCALL_EVENTS", "".into(), OVER * 10).await.unwrap();
        let folding = Arc::clone(dispatcher);
        let seq = entry.seq;
        let mut folding = tokio::spawn(async move { folding.fold(&entry).await });
        tokio::time::timeout(OVER, &mut folding).await.expect_err("it is tried again");
        assert_eq!(dispatcher.ledger.position(), 0);
        ensure_streams(&fixture.bus).await.unwrap();
        fixture.submitted("x", None, "p", Delivery::Push).await;
        folding.await.unwrap();
        assert!(dispatcher.ledger.execution(&id).is_some());
        assert_eq!(dispatcher.ledger.position(), seq);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_invalid_entry_is_alarmed_by_who_sees_it_come_and_once_for_each_subject() {
        let fixture = Fixture::new().await;
        let dispatcher = &fixture.dispatcher;
        for id in ["x", "y"] {
            fixture.submitted(id, None, "p", Delivery::Push).await;
        }
        let invalid = async |id: &str| {
            let subject = dispatcher.subjects.execution_event(&ExecutionId::new(id).unwrap());
            let whole = dispatcher.ledger.log().last(&subject).await.unwrap().unwrap();
            Entry { bytes: "nonsense".into(), ..whole }
        };
        let alarms = async || {
            dispatcher.finish().await;
            let told = dispatcher.ledger.log().history(&dispatcher.subjects.system_event("dispatcher")).await;
            let seq_of = |entry: &Entry| -> u64 {
                let event: serde_json::Value = serde_json::from_slice(&entry.bytes).unwrap();
                assert_eq!(event["type"], "rollcall.system.invalid_entry");
                assert!(event["data"]["cause"].is_string(), "{event}");
                event["data"]["seq"].as_u64().unwrap()
            };
            told.unwrap().iter().map(seq_of).collect::<Vec<_>>()
        };
        let (x, y) = (invalid("x").await, invalid("y").await);
        dispatcher.fold(&x).await;
        assert!(alarms().await.is_empty(), "it was there before");
        dispatcher.ledger.go_live();
        for entry in [&x, &x, &y] {
            dispatcher.fold(entry).await;
            alarms().await;
        }
        assert_eq!(alarms().await, [x.seq, y.seq]);
        assert_eq!(dispatcher.ledger.position(), y.seq, "it counts as folded");
    }
}
