//! Everything the watchdog knows: the open executions and agents by the log, the lists of the agents by their
//! heartbeats, what was asked and found out about those that are in trouble, and when to look at which again.
//! Synchronous; the shell feeds it and carries out what it says.

use std::collections::{HashMap, HashSet, VecDeque};

use rollcall_core::{
    AgentId, ExecutionId, InstanceId, Timestamp,
    agent::{Agent, Status},
    execution::Execution,
    gaps::{Gaps, Steps},
    wire::{INTERVAL_MS, TerminateState},
};

use crate::{
    breaker::{Breaker, BreakerLimits, Count, RateLimit},
    claims::Claims,
    decide::{Judgement, Verdict, judge},
    due::Due,
    facts::{Asked, Channel, Edge, Facts, Limits, Listing, Standing, Waiting},
    matrix::Row,
    sight::{Sight, Void},
};

mod apply;
mod ended;
mod hear;

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
}

impl Default for Looks {
    fn default() -> Self {
        Self { canary: false, waiting: Waiting::Unasked, edge: Edge::Unasked }
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

    /// The facts about an execution, with what was looked up for this judgement. `None`: not open.
    #[must_use]
    pub fn facts(&self, id: &ExecutionId, looks: &Looks) -> Option<Facts> {
        let execution = self.executions.get(id)?;
        let trouble = self.troubles.get(id).filter(|t| t.attempt == execution.attempt);
        let sight_since = self.sight.since().map(|since| since.max(self.resumed_at));
        let mut facts = Facts {
            state: execution.state,
            started: execution.is_external(),
            dispatched_at: Timestamp::default(),
            deadline: Timestamp::default(),
            cancelled_at: execution.cancel.as_ref().map(|c| c.at),
            stall_timeout_ms: execution.request.stall_timeout_ms,
            lost_after_ms: execution.request.lost_after_ms,
            standing: Standing::Alive,
            channel: Channel {
                last_at: None,
                interval_ms: self.config.limits.interval_ms,
                said_gone: false,
                answered: false,
                driven: false,
            },
            listing: Listing::Unknown,
            vouched_at: trouble.and_then(|t| t.vouched_at),
            sight_since,
            suspended: self.is_suspended(),
            asked: trouble.map_or(Asked::No, |t| t.asked),
            waiting: looks.waiting,
            edge: looks.edge,
            canary: looks.canary,
            turn_at: trouble.and_then(|t| t.turn_at),
        };
        let Some(held) = execution.holder() else { return Some(facts) };
        facts.started |= held.started_at.is_some();
        facts.dispatched_at = held.dispatched_at;
        facts.deadline = held.deadline;
        if let Some(entry) = self.agents.get(&held.agent_id) {
            let claims = entry.claims_of(held.instance_id.as_str());
            facts.standing = standing(&entry.agent, &held.instance_id, claims);
            facts.channel.interval_ms = self.interval_of(entry, &held.instance_id, claims);
            facts.channel.driven = entry.agent.control().is_some();
            if let Some(claims) = claims {
                facts.channel.last_at = claims.last_at;
                facts.channel.said_gone = claims.said_gone;
                facts.channel.answered = claims.answered;
                facts.listing = claims.listing(id, held.number);
                facts.vouched_at = facts.vouched_at.max(claims.vouched_at(id, held.number));
            }
            let is_current = entry.agent.instance_id.as_ref() == Some(&held.instance_id);
            facts.channel.said_gone |= is_current && entry.agent.departed;
        }
        Some(facts)
    }

    /// The interval of an instance, in milliseconds. One that does not count any more and was not heard yet had one
    /// of its own: what its successor says is nothing about it.
    fn interval_of(&self, entry: &AgentEntry, instance: &InstanceId, claims: Option<&Claims>) -> u64 {
        let named = claims.and_then(|c| c.interval_ms);
        let is_current = entry.agent.instance_id.as_ref().is_none_or(|current| current == instance);
        let registered = entry.agent.profile.as_ref().filter(|_| is_current).and_then(|p| p.interval_ms);
        let is_known = is_current || claims.is_some_and(|c| c.seq != 0);
        let silent_on_it = if is_known { self.config.limits.interval_ms } else { *INTERVAL_MS.end() };
        named.or(registered).unwrap_or(silent_on_it)
    }

    /// Judges an execution on what is known now and what was looked up. `None`: not open.
    #[must_use]
    pub fn judge(&self, id: &ExecutionId, looks: &Looks, now: Timestamp) -> Option<(Judgement, Facts)> {
        let facts = self.facts(id, looks)?;
        Some((judge(&facts, &self.config.limits, now), facts))
    }

    /// Judges an execution after something changed, and plans when to look again. Nothing is planned before the log
    /// was read to its end, and for one that somebody works on: it is settled when that work is done.
    pub fn settle(&mut self, id: &ExecutionId, now: Timestamp) {
        if !self.sight.caught_up() {
            return;
        }
        if let Some(trouble) = self.troubles.get_mut(id).filter(|t| t.in_flight) {
            trouble.changed = true;
            return;
        }
        let Some((judgement, _)) = self.judge(id, &Looks::default(), now) else {
            self.forget(id);
            return;
        };
        self.note(id, judgement.row, now);
        self.plan(id, judgement.verdict, now);
    }

    fn plan(&mut self, id: &ExecutionId, verdict: Verdict, now: Timestamp) {
        let at = match verdict {
            Verdict::Leave => return self.due.remove(id),
            Verdict::WaitUntil(at) => at,
            Verdict::Postpone(at) => {
                self.postponed.insert(id.clone());
                at
            }
            Verdict::Look(_) | Verdict::Terminate(_) | Verdict::Recover(_) => now,
        };
        self.plan_at(id, at);
    }

    fn plan_at(&mut self, id: &ExecutionId, at: Timestamp) {
        self.woken |= self.due.next().is_none_or(|next| at < next);
        self.due.set(id, at);
    }

    fn note(&mut self, id: &ExecutionId, row: Row, now: Timestamp) {
        let Some(execution) = self.executions.get(id) else { return };
        let attempt = execution.attempt;
        if self.troubles.get(id).is_some_and(|t| t.attempt != attempt) {
            self.troubles.remove(id);
        }
        match self.troubles.get_mut(id) {
            Some(trouble) => {
                trouble.row = row;
                trouble.decided = None;
                // A turn that could not be taken when it came is over, or all that passed while we were blind, or
                // suspended, or their agents answered, would be recovered at once.
                if !matches!(row, Row::AgentLost | Row::RateLimited) {
                    trouble.turn_at = None;
                }
            }
            None if is_plain(row) => return,
            None => {
                self.troubles.insert(id.clone(), Trouble::new(attempt, row, now));
            }
        }
        if is_plain(row) && self.troubles.get(id).is_some_and(|t| !t.in_flight) {
            self.troubles.remove(id);
        }
    }

    fn forget(&mut self, id: &ExecutionId) {
        self.due.remove(id);
        self.troubles.remove(id);
        self.postponed.remove(id);
    }

    /// Takes the first due execution that needs work; the others that were due are planned anew. It stays taken
    /// until [`World::landed`]. Comes with the attempt that is to be worked on.
    pub fn take_due(&mut self, now: Timestamp) -> Option<(ExecutionId, u32)> {
        while let Some(id) = self.due.pop(now) {
            self.postponed.remove(&id);
            let Some((judgement, _)) = self.judge(&id, &Looks::default(), now) else { continue };
            self.note(&id, judgement.row, now);
            if !judgement.verdict.is_work() {
                self.plan(&id, judgement.verdict, now);
                continue;
            }
            if let Some(execution) = self.executions.get(&id) {
                let attempt = execution.attempt;
                let trouble = self
                    .troubles
                    .entry(id.clone())
                    .or_insert_with(|| Trouble::new(attempt, judgement.row, now));
                trouble.in_flight = true;
                trouble.changed = false;
                return Some((id, attempt));
            }
        }
        None
    }

    /// The work on an execution is over, with this judgement on everything that was looked up, and with that (`None`:
    /// it ended, or the work failed). `retry_at`: not again before.
    pub fn landed(
        &mut self,
        (id, attempt): (&ExecutionId, u32),
        judged: Option<(Judgement, Facts)>,
        retry_at: Option<Timestamp>,
        now: Timestamp,
    ) {
        let mut changed = true;
        // The next attempt's work is not ours to end.
        if let Some(trouble) = self.troubles.get_mut(id).filter(|t| t.attempt == attempt) {
            trouble.in_flight = false;
            changed = std::mem::take(&mut trouble.changed);
            // Its turn is over: those that failed together wait in line again.
            if retry_at.is_some() {
                trouble.turn_at = None;
            }
        }
        match judged.filter(|(j, _)| !changed && !j.verdict.is_work() && self.executions.contains_key(id)) {
            // Judged without what was looked up it would only be looked up again at once.
            Some((judgement, facts)) => {
                self.note(id, judgement.row, now);
                self.plan(id, judgement.verdict, now);
                if let Some(trouble) = self.troubles.get_mut(id) {
                    trouble.decided = Some((judgement, facts));
                }
            }
            None => self.settle(id, now),
        }
        if let Some(at) = retry_at
            && self.due.of(id).is_some_and(|planned| planned < at)
        {
            self.plan_at(id, at);
        }
    }

    /// How an execution is judged, for people: what was decided with everything looked up, and on what, while that
    /// stands.
    #[must_use]
    pub fn standing_judgement(&self, id: &ExecutionId, now: Timestamp) -> Option<(Judgement, Facts)> {
        let (judgement, facts) = self.judge(id, &Looks::default(), now)?;
        let decided = self.troubles.get(id).and_then(|t| t.decided.clone());
        Some(decided.filter(|_| judgement.verdict.is_work()).unwrap_or((judgement, facts)))
    }

    /// Judges again all that waited for sight or trust in silence.
    pub fn settle_postponed(&mut self, now: Timestamp) {
        for id in std::mem::take(&mut self.postponed) {
            self.settle(&id, now);
        }
    }

    /// Something made evidence void.
    pub fn void(&mut self, trouble: Void) {
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
            if let Asked::Unconfirmed { next_at } = &mut trouble.asked {
                *next_at = (*next_at).min(now);
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

    /// Everything is judged: for the first time, when the log was read to its end, or anew.
    pub fn settle_all(&mut self, now: Timestamp) {
        let ids: Vec<ExecutionId> = self.executions.keys().cloned().collect();
        for id in ids {
            self.settle(&id, now);
        }
    }

    fn settle_held(&mut self, agent: &AgentId, now: Timestamp) {
        let held: Vec<ExecutionId> =
            self.agents.get(agent).map(|e| e.held.iter().cloned().collect()).unwrap_or_default();
        for id in held {
            self.settle(&id, now);
        }
    }

    /// Takes a place in the rate limit for an execution, once per loss.
    pub fn take_turn(&mut self, id: &ExecutionId, now: Timestamp) {
        if self.troubles.get(id).is_none_or(|t| t.turn_at.is_none()) {
            let at = self.limiter.reserve(now);
            if let Some(trouble) = self.troubles.get_mut(id) {
                trouble.turn_at = Some(at);
            }
        }
    }

    /// How long a newcomer waits in the line of the rate limit.
    #[must_use]
    pub fn rate_backlog_ms(&self, now: Timestamp) -> u64 {
        self.limiter.backlog_ms(now)
    }

    /// Whether silence condemns nobody now.
    #[must_use]
    pub const fn is_suspended(&self) -> bool {
        self.log_suspended || self.tripped
    }

    /// The breaker's own view, apart from what the log says.
    #[must_use]
    pub const fn is_tripped(&self) -> bool {
        self.tripped
    }

    /// How many agents are silent, of how many.
    #[must_use]
    pub fn silence(&self, now: Timestamp) -> Count {
        self.breaker.count(&self.config.breaker, now)
    }

    /// Looks at the breaker if an agent's status changed: after every batch of events, before anything is judged on it.
    pub fn after_batch(&mut self, now: Timestamp) {
        if self.breaker_dirty && self.sight.caught_up() {
            self.check_breaker(now);
            self.woken |= self.tripped != self.log_suspended;
        }
    }

    /// Looks at the breaker.
    pub fn check_breaker(&mut self, now: Timestamp) {
        self.breaker_dirty = false;
        let was = self.is_suspended();
        self.tripped = self.breaker.holds(was, &self.config.breaker, now);
        // A suspension that is in nobody's log yet ends the same way as one that is.
        if was && !self.is_suspended() {
            self.resume(now);
        }
    }

    /// Whether recovery stays suspended because all agents that count are silent.
    #[must_use]
    pub fn nobody_is_heard(&self) -> bool {
        self.breaker.nobody_is_heard()
    }

    fn resume(&mut self, now: Timestamp) {
        self.tripped = false;
        self.breaker.resumed();
        self.resumed_at = now;
        self.settle_postponed(now);
    }

    /// Notes what an agent answered to a request to end an execution. `None`: nothing that makes sense.
    pub fn note_asked(&mut self, id: &ExecutionId, answer: Option<TerminateState>, now: Timestamp) {
        let Some(trouble) = self.troubles.get_mut(id) else { return };
        let pause = TERMINATE_RETRY_MIN_MS.saturating_mul(1 << trouble.asked_times.min(16));
        trouble.asked_times = trouble.asked_times.saturating_add(1);
        let next_at = now.plus_ms(pause.min(TERMINATE_RETRY_MAX_MS));
        trouble.asked = match answer {
            Some(TerminateState::Terminated) => Asked::Confirmed,
            Some(TerminateState::NotRunning) => match trouble.asked {
                Asked::NotRunning { since, .. } => Asked::NotRunning { since, next_at },
                _ => Asked::NotRunning { since: now, next_at },
            },
            Some(TerminateState::StillRunning) | None => Asked::Unconfirmed { next_at },
        };
    }

    /// Notes that an instance answered without the execution; returns how many such answers there were in a row. Two
    /// within half an interval are one.
    pub fn note_empty_answer(&mut self, id: &ExecutionId, interval_ms: u64, now: Timestamp) -> u32 {
        let Some(trouble) = self.troubles.get_mut(id) else { return 1 };
        let (times, last) = trouble.empty_answers.unwrap_or((0, Timestamp::default()));
        if times == 0 || now.since_ms(last) >= interval_ms / 2 {
            trouble.empty_answers = Some((times.saturating_add(1), now));
            return times.saturating_add(1);
        }
        times
    }

    /// Notes that an instance listed the execution when asked.
    pub fn note_full_answer(&mut self, id: &ExecutionId, now: Timestamp) {
        if let Some(trouble) = self.troubles.get_mut(id) {
            trouble.empty_answers = None;
            trouble.vouched_at = Some(now);
        }
    }

    /// Executions that were dispatched within the grace, have not ended, and are asked for.
    pub fn count_in_grace(&self, now: Timestamp, wanted: impl Fn(&ExecutionId) -> bool) -> usize {
        let grace = self.config.limits.dispatch_grace_ms;
        let held = |at, id: &ExecutionId| {
            self.executions.get(id).and_then(Execution::holder).is_some_and(|held| held.dispatched_at == at)
        };
        let in_grace = self.in_grace.iter().filter(|(at, _)| at.plus_ms(grace) > now);
        in_grace.filter(|(at, id)| held(*at, id) && wanted(id)).count()
    }

    /// Forgets those whose grace is over.
    pub fn drop_past_grace(&mut self, now: Timestamp) {
        let grace = self.config.limits.dispatch_grace_ms;
        while self.in_grace.front().is_some_and(|(at, _)| at.plus_ms(grace) <= now) {
            self.in_grace.pop_front();
        }
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

const fn is_plain(row: Row) -> bool {
    matches!(row, Row::Healthy | Row::InGrace | Row::Unheard | Row::Ended | Row::Queued)
}

/// Where the holding instance stands, by the log.
fn standing(agent: &Agent, instance: &InstanceId, claims: Option<&Claims>) -> Standing {
    let is_current = agent.instance_id.as_ref().is_none_or(|current| current == instance);
    if is_current {
        return match agent.status {
            Some(Status::Gone) => Standing::Gone { since: agent.since },
            Some(status) if status.is_silent() => {
                Standing::Silent { since: agent.silent_since.unwrap_or(agent.since) }
            }
            _ => Standing::Alive,
        };
    }
    if !agent.is_past(instance) {
        // Never registered: nothing is known of it, its deadline bounds the wait.
        return Standing::Alive;
    }
    let since = agent.registered_at.unwrap_or(agent.since);
    match claims {
        Some(claims) if claims.said_gone => Standing::Gone { since },
        _ => Standing::Superseded { since },
    }
}
