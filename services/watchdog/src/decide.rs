//! The judgement: a total, pure function from what is known about an execution to what is to be done about it now.
//!
//! Grounds are looked at in a fixed order: what is proven first (its agent is gone, or runs as a new instance), then
//! silence, then absence from the lists, then its time, then its progress. A ground that is not ripe only says when
//! to look again. What a ground still needs before it counts (a look at the instance, at the report subject, through
//! the bus) is asked for with [`Verdict::Look`], and the execution is judged again with the answer: the order of the
//! looks is decided here as well, the shell only carries them out.

use rollcall_core::{
    Timestamp,
    event::{RecoveryReason, TerminateOutcome},
    execution::State,
};

use crate::{
    facts::{Asked, Edge, Facts, Limits, Listing, Standing, UNLISTED_TIMES, Waiting},
    matrix::Row,
};

/// How soon a verdict that a waiting report withholds is looked at again. The report's own event usually comes first.
pub const REPORT_RECHECK_MS: u64 = 1_000;

/// How long the dispatcher gets to learn what became of a dispatch whose instance turned out to be away: one that
/// nobody took goes back to its queue, and must not count as a loss. Above the 2 s in which an agent has to answer
/// (PROTOCOL.md 4); never more than the dispatch grace.
pub const DISPATCH_SETTLE_MS: u64 = 3_000;

/// A piece of evidence that has to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Prove that we see: a message of our own through the bus, and everything before it read.
    Canary,
    /// Ask the instance what it holds.
    Instance,
    /// The last message on the execution's report subject.
    Report,
    /// A place in the rate limit of agent-lost recoveries.
    Turn,
}

/// A loss that is established.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// Why.
    pub reason: RecoveryReason,
    /// How its death was made certain.
    pub terminate: TerminateOutcome,
    /// When it became true; `detected_after_ms` counts from here.
    pub true_at: Timestamp,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, until something new is heard.
    Leave,
    /// Nothing; look again then at the latest.
    WaitUntil(Timestamp),
    /// Nothing; look again when sight or trust in silence is back, at the latest then.
    Postpone(Timestamp),
    /// Fetch this and judge again.
    Look(Look),
    /// Ask the agent to end it, for this reason, and judge again with what became of it.
    Terminate(RecoveryReason),
    /// It is lost.
    Recover(Finding),
}

impl Verdict {
    /// Whether there is something to do now.
    #[must_use]
    pub const fn is_work(&self) -> bool {
        matches!(self, Self::Look(_) | Self::Terminate(_) | Self::Recover(_))
    }
}

/// A verdict and the row of the matrix that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// The row.
    pub row: Row,
    /// The verdict.
    pub verdict: Verdict,
}

const fn say(row: Row, verdict: Verdict) -> Judgement {
    Judgement { row, verdict }
}

/// A reason to recover that is ripe.
struct Ground {
    row: Row,
    reason: RecoveryReason,
    true_at: Timestamp,
    /// From here the safety net counts.
    fell_due_at: Timestamp,
}

/// The instants at which an unripe ground may ripen; the earliest is when to look again.
struct Alarm {
    next: Timestamp,
    row: Option<Row>,
}

impl Alarm {
    fn at(&mut self, when: Timestamp, row: Row) {
        self.next = self.next.min(when);
        self.note(row);
    }

    /// Names the row without an instant: what changes it comes as an event or a heartbeat.
    fn note(&mut self, row: Row) {
        self.row.get_or_insert(row);
    }
}

/// Judges one execution.
#[must_use]
pub fn judge(facts: &Facts, limits: &Limits, now: Timestamp) -> Judgement {
    if facts.state.is_terminal() {
        return say(Row::Ended, Verdict::Leave);
    }
    if !facts.state.holds_slot() {
        return say(Row::Queued, Verdict::Leave);
    }
    let case = Case { facts, limits, now };
    let mut alarm = Alarm { next: Timestamp::from_millis(i64::MAX), row: None };
    let ripe = match facts.standing {
        Standing::Gone { since } => case.gone(since, &mut alarm),
        Standing::Superseded { since } => case.superseded(since, &mut alarm),
        Standing::Silent { since } => case.silent(since, &mut alarm),
        Standing::Alive => None,
    };
    ripe.or_else(|| case.absent(&mut alarm))
        .or_else(|| case.out_of_time(&mut alarm))
        .unwrap_or_else(|| case.healthy(&alarm))
}

struct Case<'a> {
    facts: &'a Facts,
    limits: &'a Limits,
    now: Timestamp,
}

impl Case<'_> {
    fn stale_at(&self, fell_due_at: Timestamp) -> Timestamp {
        fell_due_at.plus_ms(self.limits.stale_after_ms)
    }

    /// One interval of the agent from now: when its next word may be expected.
    fn next_word(&self) -> Timestamp {
        self.now.plus_ms(self.facts.channel.interval_ms.max(1))
    }

    /// A ripe ground becomes a recovery unless a report that waits on the bus withholds it.
    fn conclude(&self, ground: &Ground, terminate: TerminateOutcome) -> Judgement {
        let stale_at = self.stale_at(ground.fell_due_at);
        let (row, reason) = match self.facts.waiting {
            Waiting::Unasked => return say(ground.row, Verdict::Look(Look::Report)),
            _ if !self.is_withheld(ground.reason) => (ground.row, ground.reason),
            _ if self.now < stale_at => {
                let again = self.now.plus_ms(REPORT_RECHECK_MS).min(stale_at);
                return say(Row::Withheld, Verdict::WaitUntil(again));
            }
            _ => (Row::Stale, RecoveryReason::Stale),
        };
        let terminate = match self.facts.waiting {
            // The agent's own word that it is dead.
            Waiting::Confirms(_) => TerminateOutcome::Confirmed,
            _ => terminate,
        };
        let true_at = if reason == RecoveryReason::Stale { ground.fell_due_at } else { ground.true_at };
        say(row, Verdict::Recover(Finding { reason, terminate, true_at }))
    }

    /// Whether a report waits that is the dispatcher's to apply. The word that it is dead is evidence for whoever asks for its
    /// death: us or another watchdog once it is out of time, or somebody who cancelled it. Else it is its agent's own end
    /// of it, a failure.
    const fn is_withheld(&self, reason: RecoveryReason) -> bool {
        let asked = matches!(reason, RecoveryReason::TimedOut | RecoveryReason::Stalled)
            || !matches!(self.facts.asked, Asked::No)
            || self.facts.cancelled_at.is_some();
        match self.facts.waiting {
            Waiting::Withholds(_) => true,
            Waiting::Confirms(_) => !asked,
            Waiting::Unasked | Waiting::Nothing => false,
        }
    }

    /// The instance said goodbye, or was silent for so long that it was forgotten.
    fn gone(&self, since: Timestamp, alarm: &mut Alarm) -> Option<Judgement> {
        // Forgotten by the prober and still heard by us, with this execution on its list: it works on it.
        if self.facts.is_vouched(self.limits, self.now) {
            self.wake_when_silent(alarm, Row::GoneVouched);
            return None;
        }
        if self.is_unsettled(alarm) {
            return None;
        }
        let gone_at = self.facts.unvouched_since(since);
        let ground = Ground {
            row: Row::AgentGone,
            reason: RecoveryReason::AgentGone,
            true_at: gone_at,
            fell_due_at: gone_at,
        };
        // It did not say goodbye itself: an operator took it away, or it was given up for its silence or its probe. It may
        // live, and our own ears may tell nothing of it: it is asked, or its registry is.
        if !self.facts.channel.said_gone {
            return self.once_away(&ground, (Row::GoneVouched, Row::AgentGone), alarm);
        }
        Some(self.conclude(&ground, TerminateOutcome::NotAttempted))
    }

    /// Dispatched a moment ago and not started: the dispatcher is still finding out.
    fn is_unsettled(&self, alarm: &mut Alarm) -> bool {
        let settle_ms = DISPATCH_SETTLE_MS.min(self.limits.dispatch_grace_ms);
        let settled_at = self.facts.dispatched_at.plus_ms(settle_ms);
        let unsettled = !self.facts.started && self.now < settled_at;
        if unsettled {
            alarm.at(settled_at, Row::InGrace);
        }
        unsettled
    }

    fn wake_when_silent(&self, alarm: &mut Alarm, row: Row) {
        alarm.at(self.silent_at_or_next_word(), row);
    }

    /// A newer instance registered. The old one's work is lost once the old one is confirmed away.
    fn superseded(&self, since: Timestamp, alarm: &mut Alarm) -> Option<Judgement> {
        let facts = self.facts;
        // Its list vouches while its heartbeats come. Once one is overdue it is asked, so that a process that is away
        // is known before it is silent to the threshold.
        let quiet_at = self.quiet_at().filter(|at| *at > self.now);
        if let Some(quiet_at) = quiet_at.filter(|_| facts.is_vouched(self.limits, self.now)) {
            alarm.at(quiet_at, Row::SupersededVouched);
            return None;
        }
        if self.is_unsettled(alarm) {
            return None;
        }
        let away_at = facts.unvouched_since(since);
        let ground = Ground {
            row: Row::AgentRestarted,
            reason: RecoveryReason::AgentRestarted,
            true_at: away_at,
            fell_due_at: away_at,
        };
        self.once_away(&ground, (Row::SupersededVouched, Row::SupersededUnsure), alarm)
    }

    /// Concludes once the instance, asked, does not hold it or is away; until then the row says whether it is known
    /// to work on it.
    fn once_away(
        &self,
        ground: &Ground,
        (vouched, unsure): (Row, Row),
        alarm: &mut Alarm,
    ) -> Option<Judgement> {
        let facts = self.facts;
        let stale_at = self.stale_at(ground.fell_due_at);
        match facts.edge {
            Edge::Unasked => Some(say(ground.row, Verdict::Look(Look::Instance))),
            Edge::Lists => {
                alarm.at(self.next_word(), vouched);
                None
            }
            Edge::ListsNot { .. } if self.now < facts.grace_until(self.limits) => {
                alarm.at(facts.grace_until(self.limits), Row::InGrace);
                None
            }
            Edge::ListsNot { times } if times >= UNLISTED_TIMES || self.is_unlisted() => {
                Some(self.conclude(ground, TerminateOutcome::NotRunning))
            }
            Edge::ListsNot { .. } => {
                alarm.at(self.next_word(), unsure);
                None
            }
            Edge::Void => {
                alarm.at(self.next_word(), Row::Blind);
                None
            }
            Edge::NoResponders | Edge::NoAnswer if self.is_away() && !facts.canary => {
                Some(say(ground.row, Verdict::Look(Look::Canary)))
            }
            // Silence alone condemns nobody while the breaker is open.
            Edge::NoResponders | Edge::NoAnswer
                if self.is_away() && facts.suspended && !self.is_proven_away() =>
            {
                if self.now < stale_at {
                    alarm.at(self.next_word().min(stale_at), Row::Suspended);
                    return None;
                }
                let stale = Ground { row: Row::Stale, reason: RecoveryReason::Stale, ..*ground };
                Some(self.conclude(&stale, TerminateOutcome::NotAttempted))
            }
            Edge::NoResponders | Edge::NoAnswer if self.is_away() => {
                Some(self.conclude(ground, TerminateOutcome::NotAttempted))
            }
            Edge::NoResponders | Edge::NoAnswer => {
                let quiet_at = self.quiet_at().filter(|at| *at > self.now);
                let again = quiet_at.unwrap_or_else(|| self.next_word());
                alarm.at(self.silent_at_or_next_word().min(again), unsure);
                None
            }
        }
    }

    fn silent_at_or_next_word(&self) -> Timestamp {
        // Blind: whoever regains sight judges again.
        self.facts.silent_at(self.limits).filter(|at| *at > self.now).unwrap_or_else(|| self.next_word())
    }

    /// Whether an instance that did not answer just now is away, by proof or by silence.
    fn is_away(&self) -> bool {
        self.is_proven_away() || self.facts.silent_at(self.limits).is_some_and(|at| at <= self.now)
    }

    /// Whether more than silence says that an instance that did not answer just now does not have it any more.
    fn is_proven_away(&self) -> bool {
        let facts = self.facts;
        // "No responders" of a process that used to answer, and whose heartbeat is overdue as well: a connection that
        // is just being made again must not look like a death.
        let overdue = self.quiet_at().is_some_and(|at| at <= self.now);
        let refused = facts.edge == Edge::NoResponders && facts.channel.answered && overdue;
        refused || (facts.sight_since.is_some() && self.is_unlisted())
    }

    /// When the instance has been quiet for one and a half intervals, as far as we could hear it: a heartbeat is overdue.
    fn quiet_at(&self) -> Option<Timestamp> {
        let interval = self.facts.channel.interval_ms;
        Some(self.facts.heard_from()?.plus_ms(interval + interval / 2))
    }

    fn is_unlisted(&self) -> bool {
        matches!(self.facts.listing, Listing::Unlisted { times, .. } if times >= UNLISTED_TIMES)
    }

    fn wait(&self, row: Row, until: Timestamp) -> Judgement {
        say(row, Verdict::WaitUntil(until.max(self.now.plus_ms(1))))
    }

    /// The log says that every channel of its agent is bad.
    fn silent(&self, since: Timestamp, alarm: &mut Alarm) -> Option<Judgement> {
        let facts = self.facts;
        let lost_after_ms = facts.lost_after_ms.unwrap_or(self.limits.lost_after_ms);
        let true_at = since.plus_ms(lost_after_ms);
        let fell_due_at = facts.unvouched_since(since).plus_ms(lost_after_ms);
        let (Some(sight), Some(silent_at)) = (facts.sight_since, facts.silent_at(self.limits)) else {
            // Blind. Nothing that is silence counts, nothing else is held up.
            alarm.at(self.next_word(), Row::Blind);
            return None;
        };
        // Every clock started again when our sight did. What was put off for as long as the safety net takes waits
        // only until we hear nothing ourselves.
        let ripe_at = since.max(sight).plus_ms(lost_after_ms).max(silent_at);
        let stale_at = self.stale_at(fell_due_at).max(silent_at);
        let is_ripe = self.now >= ripe_at && !facts.suspended;
        if !is_ripe && self.now < stale_at {
            match self.now < ripe_at {
                true => alarm.at(ripe_at.min(stale_at), Row::AgentSilent),
                false => alarm.at(stale_at, Row::Suspended),
            }
            return None;
        }
        let (row, reason) = match is_ripe {
            true => (Row::AgentLost, RecoveryReason::AgentLost),
            false => (Row::Stale, RecoveryReason::Stale),
        };
        let ground = Ground { row, reason, true_at, fell_due_at };
        if !facts.canary {
            return Some(say(row, Verdict::Look(Look::Canary)));
        }
        match facts.edge {
            Edge::Unasked => Some(say(row, Verdict::Look(Look::Instance))),
            Edge::Void => {
                alarm.at(self.next_word(), Row::Blind);
                None
            }
            Edge::Lists => {
                alarm.at(self.next_word(), Row::SilentAnswers);
                None
            }
            Edge::ListsNot { times } => self.silent_and_empty(fell_due_at, times, alarm),
            Edge::NoResponders | Edge::NoAnswer => {
                let concluded = self.conclude(&ground, TerminateOutcome::NotAttempted);
                Some(self.in_turn(concluded))
            }
        }
    }

    /// No heartbeats, but it answers, and does not list the execution.
    fn silent_and_empty(&self, fell_due_at: Timestamp, times: u32, alarm: &mut Alarm) -> Option<Judgement> {
        let grace_until = self.facts.grace_until(self.limits);
        if self.now < grace_until {
            alarm.at(grace_until, Row::InGrace);
            return None;
        }
        if times < UNLISTED_TIMES {
            alarm.at(self.next_word(), Row::UnlistedOnce);
            return None;
        }
        let since = fell_due_at.max(grace_until);
        let ground = self.absence(since, since);
        Some(self.conclude(&ground, TerminateOutcome::NotRunning))
    }

    /// Recoveries for silence go through the rate limit, last of all.
    fn in_turn(&self, concluded: Judgement) -> Judgement {
        if !matches!(concluded.verdict, Verdict::Recover(_)) {
            return concluded;
        }
        match self.facts.turn_at {
            None => say(Row::AgentLost, Verdict::Look(Look::Turn)),
            Some(at) if self.now < at => say(Row::RateLimited, Verdict::WaitUntil(at)),
            Some(_) => concluded,
        }
    }

    /// What its absence from the lists means, `since` when. After its end was asked for it is the answer to that,
    /// whatever became of the agent's own.
    fn absence(&self, since: Timestamp, fell_due_at: Timestamp) -> Ground {
        let facts = self.facts;
        let (row, reason) = match facts.asked {
            Asked::No if facts.started => (Row::Orphaned, RecoveryReason::Orphaned),
            Asked::No => (Row::DispatchLost, RecoveryReason::DispatchLost),
            _ if self.now >= facts.deadline => {
                let (row, reason) = (Row::TimedOut, RecoveryReason::TimedOut);
                return Ground { row, reason, true_at: facts.deadline, fell_due_at: facts.deadline };
            }
            _ => (Row::Stalled, RecoveryReason::Stalled),
        };
        Ground { row, reason, true_at: since, fell_due_at }
    }

    /// Its agent beats and does not list it.
    fn absent(&self, alarm: &mut Alarm) -> Option<Judgement> {
        let facts = self.facts;
        let Listing::Unlisted { since, times, first } = facts.listing else { return None };
        let grace_until = facts.grace_until(self.limits);
        let stale_at = self.stale_at(first);
        // Lists that were never two in a row, each time because we had to count anew: the safety net takes one.
        let is_ripe = times >= UNLISTED_TIMES;
        if self.now < grace_until || !(is_ripe || (times > 0 && self.now >= stale_at)) {
            alarm.note(if self.now < grace_until { Row::InGrace } else { Row::UnlistedOnce });
            alarm.next = alarm.next.min(stale_at.max(self.next_word()));
            return None;
        }
        // Lists that came while we could not trust our eyes prove nothing; they are counted anew with our sight.
        if facts.sight_since.is_none() {
            alarm.at(self.next_word(), Row::Blind);
            return None;
        }
        let (row, reason) = (Row::Stale, RecoveryReason::Stale);
        let ground = match is_ripe {
            true => self.absence(since, first),
            false => Ground { row, reason, true_at: first, fell_due_at: first },
        };
        let row = ground.row;
        if !facts.canary {
            return Some(say(row, Verdict::Look(Look::Canary)));
        }
        match facts.edge {
            Edge::Unasked => Some(say(row, Verdict::Look(Look::Instance))),
            Edge::Lists => {
                alarm.at(self.next_word(), Row::UnlistedAnswers);
                None
            }
            Edge::Void => {
                alarm.at(self.next_word(), Row::Blind);
                None
            }
            Edge::ListsNot { .. } => Some(self.conclude(&ground, TerminateOutcome::NotRunning)),
            Edge::NoResponders | Edge::NoAnswer => {
                Some(self.conclude(&ground, TerminateOutcome::NotAttempted))
            }
        }
    }

    /// Its deadline passed, its progress stood still, or its cancellation was never confirmed.
    fn out_of_time(&self, alarm: &mut Alarm) -> Option<Judgement> {
        let facts = self.facts;
        if facts.state == State::Cancelling {
            return self.cancelling(alarm);
        }
        if self.now >= facts.deadline {
            let ground = Ground {
                row: Row::TimedOut,
                reason: RecoveryReason::TimedOut,
                true_at: facts.deadline,
                fell_due_at: facts.deadline,
            };
            return Some(self.end_it(&ground, alarm));
        }
        alarm.next = alarm.next.min(facts.deadline);
        let timeout = facts.stall_timeout_ms?;
        let (Some(stall), Listing::Listed { at, .. }) = (facts.stall(), facts.listing) else {
            // Its progress is not known yet (again): nothing wakes us when it is, so look when it could be due.
            alarm.next = alarm.next.min(self.now.plus_ms(timeout));
            if facts.asked != Asked::No {
                alarm.note(Row::TerminateRefused);
            }
            return None;
        };
        // What was asked to end and has not moved since is due whenever our clocks began; the safety net likewise.
        let due_at = match facts.asked {
            Asked::No => stall.ripe_at.min(self.stale_at(stall.fell_due_at)),
            _ => stall.fell_due_at,
        };
        if self.now < due_at {
            alarm.next = alarm.next.min(due_at);
            return None;
        }
        // Only a list that came after the time was up shows that nothing moved in all of it.
        if at < due_at {
            alarm.next = alarm.next.min(self.next_word());
            return None;
        }
        let ground = Ground {
            row: Row::Stalled,
            reason: RecoveryReason::Stalled,
            true_at: due_at,
            fell_due_at: stall.fell_due_at,
        };
        Some(self.end_it(&ground, alarm))
    }

    /// Asks its agent to end it; only its death frees the slot, or the safety net.
    fn end_it(&self, ground: &Ground, alarm: &Alarm) -> Judgement {
        let stale_at = self.stale_at(ground.fell_due_at);
        match (self.facts.asked, self.facts.waiting) {
            // Before its report is looked for: what is off the list was reported, and then that is seen.
            (Asked::NotRunning { .. }, Waiting::Unasked) if self.facts.edge == Edge::Unasked => {
                say(ground.row, Verdict::Look(Look::Instance))
            }
            // What finished in time, or says so itself, needs no ending.
            (_, Waiting::Unasked) => say(ground.row, Verdict::Look(Look::Report)),
            (_, Waiting::Withholds(_)) => self.conclude(ground, TerminateOutcome::NotAttempted),
            (_, Waiting::Confirms(_)) | (Asked::Confirmed, _) => {
                self.conclude(ground, TerminateOutcome::Confirmed)
            }
            (Asked::NotRunning { since, .. }, _)
                if self.is_let_go() || self.now >= self.reported_by(since) =>
            {
                self.conclude(ground, TerminateOutcome::NotRunning)
            }
            // Finished, and its report not acknowledged: it is held until it is, for as long as that may take.
            (Asked::NotRunning { since, next_at }, _) if self.now < next_at => {
                let again = self.next_word().min(next_at).min(self.reported_by(since));
                self.wait(Row::Withheld, again.min(alarm.next))
            }
            // The answer may be lost and the work dead all the same: then its report says so.
            (Asked::Unconfirmed { next_at }, _) if self.now < next_at.min(stale_at) => {
                let again = self.now.plus_ms(REPORT_RECHECK_MS).min(next_at).min(stale_at);
                self.wait(Row::TerminateRefused, again.min(alarm.next))
            }
            (Asked::Unconfirmed { .. }, _) if self.now >= stale_at => {
                let stale = Ground {
                    row: Row::Stale,
                    reason: RecoveryReason::Stale,
                    true_at: ground.fell_due_at,
                    fell_due_at: ground.fell_due_at,
                };
                self.conclude(&stale, TerminateOutcome::Failed)
            }
            (Asked::No | Asked::NotRunning { .. } | Asked::Unconfirmed { .. }, _) => {
                say(ground.row, Verdict::Terminate(ground.reason))
            }
        }
    }

    /// By when the report of work that is said not to run since then is on the bus, if there is one: a bus that takes
    /// heartbeats and no report for longer takes no verdict either. The same time as absence gets after a dispatch.
    const fn reported_by(&self, since: Timestamp) -> Timestamp {
        since.plus_ms(self.limits.dispatch_grace_ms)
    }

    /// Whether its instance says that it does not hold it: the newest word counts, its own answer before its lists.
    const fn is_let_go(&self) -> bool {
        match self.facts.edge {
            Edge::ListsNot { .. } => true,
            Edge::Lists => false,
            _ => matches!(self.facts.listing, Listing::Unlisted { .. }),
        }
    }

    /// The dispatcher asks for its death again and again; the watchdog holds the net.
    fn cancelling(&self, alarm: &mut Alarm) -> Option<Judgement> {
        let fell_due_at = self.facts.cancelled_at.unwrap_or(self.facts.deadline);
        let stale_at = self.stale_at(fell_due_at);
        if self.now < stale_at {
            alarm.at(stale_at, Row::Cancelling);
            return None;
        }
        let ground =
            Ground { row: Row::Stale, reason: RecoveryReason::Stale, true_at: fell_due_at, fell_due_at };
        Some(self.conclude(&ground, TerminateOutcome::Failed))
    }

    fn healthy(&self, alarm: &Alarm) -> Judgement {
        let row = alarm.row.unwrap_or(match self.facts.listing {
            Listing::Listed { .. } => Row::Healthy,
            Listing::Unlisted { .. } => Row::UnlistedOnce,
            Listing::Unknown if self.now < self.facts.grace_until(self.limits) => Row::InGrace,
            Listing::Unknown => Row::Unheard,
        });
        let until = alarm.next.max(self.now.plus_ms(1));
        let verdict = match row {
            Row::Blind | Row::Suspended => Verdict::Postpone(until),
            _ => Verdict::WaitUntil(until),
        };
        say(row, verdict)
    }
}
