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
    facts::{Asked, Facts, Limits, Listing, Promise, Standing, Waiting},
    matrix::Row,
};

mod absent;
mod away;
mod late;

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
    /// Ask the instance to end what may still begin there, for this reason, so that it does not.
    Promise(RecoveryReason),
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
        let row = if facts.state == State::Expired { Row::QueueExpired } else { Row::Ended };
        return say(row, Verdict::Leave);
    }
    if !facts.state.holds_slot() {
        return say(Row::Queued, Verdict::Leave);
    }
    let case = Case { facts, limits, now };
    let mut alarm = Alarm { next: Timestamp::from_millis(i64::MAX), row: None };
    let ripe = match facts.standing {
        Standing::Gone { since, by } => case.gone(since, by, &mut alarm),
        Standing::Superseded { since } => case.superseded(since, &mut alarm),
        Standing::Silent { since } => case.silent(since, &mut alarm),
        Standing::Alive => None,
    };
    let judged = ripe
        .or_else(|| case.absent(&mut alarm))
        .or_else(|| case.out_of_time(&mut alarm))
        .unwrap_or_else(|| case.healthy(&alarm));
    match judged.verdict {
        // Whatever it is lost by, it ends as somebody wanted it to.
        Verdict::Recover(_) if facts.state == State::Cancelling => say(Row::CancelledLost, judged.verdict),
        _ => judged,
    }
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

    /// When the agent's next word may be expected.
    fn next_word(&self) -> Timestamp {
        self.now.plus_ms(self.facts.channel.word_ms().max(1))
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
            || !matches!(self.facts.promise, Promise::Unasked)
            || self.facts.cancelled_at.is_some();
        match self.facts.waiting {
            Waiting::Withholds(_) => true,
            Waiting::Confirms(_) => !asked,
            Waiting::Unasked | Waiting::Nothing => false,
        }
    }

    fn wait(&self, row: Row, until: Timestamp) -> Judgement {
        say(row, Verdict::WaitUntil(until.max(self.now.plus_ms(1))))
    }

    /// Recoveries for silence go through the rate limit, last of all.
    fn in_turn(&self, concluded: Judgement) -> Judgement {
        if !matches!(concluded.verdict, Verdict::Recover(_)) {
            return concluded;
        }
        match self.facts.turn_at {
            None => say(concluded.row, Verdict::Look(Look::Turn)),
            Some(at) if self.now < at => say(Row::RateLimited, Verdict::WaitUntil(at)),
            Some(_) => concluded,
        }
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
