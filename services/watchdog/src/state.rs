//! Everything the watchdog knows: the open executions and agents by the log, the lists of the agents by their
//! heartbeats, what was asked and found out about those that are in trouble, and when to look at which again.
//! Synchronous; the shell feeds it and carries out what it says.

use std::collections::{HashMap, HashSet, VecDeque};

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp,
    agent::Agent,
    event::RecoveryReason,
    execution::Execution,
    gaps::{Gaps, Steps},
};

use crate::{
    breaker::{Breaker, BreakerLimits, RateLimit},
    claims::Claims,
    decide::Judgement,
    due::Due,
    facts::{Asked, Edge, Facts, Limits, Promise, Waiting},
    matrix::Row,
    sight::{Sight, Void},
};

mod apply;
mod brakes;
mod ended;
mod facts;
mod hear;
mod plan;

pub use apply::{Applied, Invalid};
pub use ended::{ENDED_KEPT_MAX, Ended, EndedNote};

/// First pause before an agent that did not confirm an end is asked again; it doubles.
pub const TERMINATE_RETRY_MIN_MS: u64 = 1_000;
/// Longest such pause.
pub const TERMINATE_RETRY_MAX_MS: u64 = 60_000;
/// Instances of one agent whose lists are kept: the one that counts and superseded ones that go on.
pub const INSTANCES_MAX: usize = 8;

/// Evidence that was fetched for one judgement and is thrown away after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Looks {
    /// See [`Facts::canary`].
    pub canary: bool,
    /// See [`Facts::waiting`].
    pub waiting: Waiting,
    /// See [`Facts::edge`].
    pub edge: Edge,
    /// Whether the work was known to have started when its instance was asked: what was said before says nothing after.
    pub of_started: bool,
    /// See [`Facts::promise`].
    pub promise: Promise,
}

impl Default for Looks {
    fn default() -> Self {
        Self {
            canary: false,
            waiting: Waiting::Unasked,
            edge: Edge::Unasked,
            of_started: false,
            promise: Promise::Unasked,
        }
    }
}

/// What is kept about an execution that is not simply healthy.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// The attempt it is about.
    pub attempt: u32,
    /// The row it was last judged to be in.
    pub row: Row,
    /// What was decided with everything looked up, and on what, while it stands.
    pub decided: Option<(Judgement, Facts)>,
    /// Since when it is in trouble.
    pub since: Timestamp,
    /// What became of asking for its end.
    pub asked: Asked,
    /// Why, the last time.
    pub asked_for: Option<RecoveryReason>,
    /// How often that was asked.
    pub asked_times: u32,
    /// Direct answers in a row that did not list it, and when the last one was counted.
    pub empty_answers: Option<(u32, Timestamp)>,
    /// When its instance listed it last when asked.
    pub vouched_at: Option<Timestamp>,
    /// Its turn in the rate limit.
    pub turn_at: Option<Timestamp>,
    /// Somebody works on it.
    pub in_flight: bool,
    /// Something happened to it meanwhile.
    changed: bool,
    /// What went wrong last.
    pub last_error: Option<String>,
}

/// One agent: the log's view and our own.
#[derive(Debug)]
pub struct AgentEntry {
    /// By the log.
    pub agent: Agent,
    /// Open executions that it holds a slot for.
    pub held: HashSet<ExecutionId>,
    /// Its instances' lists.
    pub claims: Vec<Claims>,
    /// How its heartbeats are numbered.
    pub steps: Steps,
}

impl AgentEntry {
    fn new(id: AgentId) -> Self {
        Self { agent: Agent::unknown(id), held: HashSet::new(), claims: Vec::new(), steps: Steps::default() }
    }

    /// An instance that is replaced by `next` goes on at the interval it registered with, whatever `next` says.
    fn keep_interval(&mut self, next: &InstanceId, default_ms: u64) {
        let Some(old) = self.agent.instance_id.clone().filter(|old| old != next) else { return };
        let registered = self.agent.profile.as_ref().and_then(|p| p.interval_ms).unwrap_or(default_ms);
        if let Some(claims) = self.claims_mut(old.as_str()) {
            claims.interval_ms.get_or_insert(registered);
        }
    }

    /// The lists of this instance.
    #[must_use]
    pub fn claims_of(&self, instance: &str) -> Option<&Claims> {
        self.claims.iter().find(|c| c.instance.as_str() == instance)
    }

    /// The same, to note what was learned.
    pub fn claims_mut(&mut self, instance: &str) -> Option<&mut Claims> {
        self.claims.iter_mut().find(|c| c.instance.as_str() == instance)
    }
}

/// Counts since the start, and since the last cycle's report.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Heartbeats that counted.
    pub beats: u64,
    /// Heartbeats that did not: malformed, replayed, or of an agent the log does not know.
    pub beats_ignored: u64,
    /// Recoveries by us.
    pub recovered: u64,
    /// Steps of recoveries that failed: terminate not confirmed, log or agent not reachable.
    pub failed: u64,
    /// Appends that lost to another event.
    pub conflicts: u64,
    /// Zombies that were asked to end.
    pub zombies: u64,
    /// Recovered, then listed again or completed: false positives.
    pub heard_again: u64,
    /// Entries of the log that are no valid events.
    pub invalid: u64,
}

/// The settings as the pure part needs them.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Durations.
    pub limits: Limits,
    /// The mass-failure breaker.
    pub breaker: BreakerLimits,
    /// Agent-lost recoveries per second.
    pub recovery_rate: u32,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    /// Settings.
    pub config: Config,
    /// Whether our eyes can be trusted.
    pub sight: Sight,
    /// When to look at what.
    pub due: Due,
    /// Executions that have not ended.
    pub executions: HashMap<ExecutionId, Execution>,
    /// Those that ended, the latest of them.
    pub ended: Ended,
    /// Agents.
    pub agents: HashMap<AgentId, AgentEntry>,
    /// Executions that are not simply healthy.
    pub troubles: HashMap<ExecutionId, Trouble>,
    /// Counts.
    pub counters: Counters,
    /// Instances whose lists name what they should not, to be looked into.
    pub zombies_due: HashSet<(AgentId, InstanceId)>,
    /// Of which instances somebody looks into the claims just now.
    zombies_under_way: HashSet<(AgentId, InstanceId)>,
    /// Instances that got work and were never asked anything.
    pub greetings_due: VecDeque<(AgentId, InstanceId)>,
    /// Ended executions that were started again: their history has to be read.
    pub histories_due: Vec<ExecutionId>,
    /// Sequence of the last event about this service, ours or another replica's.
    pub system_seq: u64,
    /// The log says that silence is suspended.
    pub log_suspended: bool,
    /// Since when.
    pub suspended_at: Option<Timestamp>,
    breaker: Breaker,
    tripped: bool,
    breaker_dirty: bool,
    limiter: RateLimit,
    /// Silence counts from here at the earliest, even if our sight is older: the last suspension ended then.
    resumed_at: Timestamp,
    postponed: HashSet<ExecutionId>,
    /// Attempts that were counted as false positives.
    heard_again: HashSet<(ExecutionId, u32)>,
    in_grace: VecDeque<(Timestamp, ExecutionId)>,
    gaps: Gaps,
    /// We went blind: the sentry has to be told.
    pub blinded: bool,
    /// Something is due now: the scheduler has to be told.
    pub woken: bool,
}

impl World {
    /// Knows nothing, sees nothing.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            sight: Sight::default(),
            due: Due::default(),
            executions: HashMap::new(),
            ended: Ended::default(),
            agents: HashMap::new(),
            troubles: HashMap::new(),
            counters: Counters::default(),
            zombies_due: HashSet::new(),
            zombies_under_way: HashSet::new(),
            greetings_due: VecDeque::new(),
            histories_due: Vec::new(),
            system_seq: 0,
            log_suspended: false,
            suspended_at: None,
            breaker: Breaker::default(),
            tripped: false,
            breaker_dirty: false,
            limiter: RateLimit::new(config.recovery_rate),
            resumed_at: Timestamp::default(),
            postponed: HashSet::new(),
            heard_again: HashSet::new(),
            in_grace: VecDeque::new(),
            gaps: Gaps::default(),
            blinded: false,
            woken: false,
        }
    }

    /// Something made evidence void.
    pub fn void(&mut self, trouble: Void) {
        if self.sight.since().is_some() {
            metrics::counter!("rollcall_evidence_void_total").increment(1);
        }
        self.sight.void(trouble);
        self.blinded = true;
    }

    /// Our clock was set to another time: what was planned or measured with it starts at its new one.
    pub fn rebase(&mut self, now: Timestamp) {
        self.void(Void::ClockJump);
        self.limiter = RateLimit::new(self.config.recovery_rate);
        self.resumed_at = self.resumed_at.min(now);
        for trouble in self.troubles.values_mut() {
            trouble.since = trouble.since.min(now);
            trouble.empty_answers = None;
            trouble.vouched_at = trouble.vouched_at.map(|at| at.min(now));
            match &mut trouble.asked {
                Asked::Unconfirmed { next_at } => *next_at = (*next_at).min(now),
                Asked::NotRunning { since, next_at } => {
                    (*since, *next_at) = ((*since).min(now), (*next_at).min(now));
                }
                Asked::No | Asked::Confirmed => {}
            }
        }
        for entry in self.agents.values_mut() {
            entry.claims.iter_mut().for_each(|claims| claims.rebase(now));
        }
        self.settle_all(now);
    }

    /// A canary sent in `epoch` came back and all before it was read. If sight begins with it, every clock does.
    pub fn proven(&mut self, epoch: u64, now: Timestamp) -> bool {
        if !self.sight.proven(epoch, now) {
            return false;
        }
        for entry in self.agents.values_mut() {
            entry.claims.iter_mut().for_each(Claims::void);
            entry.steps.forget();
        }
        self.gaps.restart(now);
        self.settle_postponed(now);
        true
    }
}
impl Trouble {
    const fn new(attempt: u32, row: Row, since: Timestamp) -> Self {
        Self {
            attempt,
            row,
            decided: None,
            since,
            asked: Asked::No,
            asked_for: None,
            asked_times: 0,
            empty_answers: None,
            vouched_at: None,
            turn_at: None,
            in_flight: false,
            changed: false,
            last_error: None,
        }
    }
}
