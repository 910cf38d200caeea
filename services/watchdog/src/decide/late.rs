//! Work whose time is up: ended by its agent, and lost once that is confirmed.

use rollcall_core::{
    Timestamp,
    event::{RecoveryReason, TerminateOutcome},
    execution::State,
};

use super::{Alarm, Case, Ground, Judgement, Look, REPORT_RECHECK_MS, Verdict, say};
use crate::{
    facts::{Asked, Edge, Listing, Waiting},
    matrix::Row,
};

impl Case<'_> {
    /// Its deadline passed, its progress stood still, or its cancellation was never confirmed.
    pub(super) fn out_of_time(&self, alarm: &mut Alarm) -> Option<Judgement> {
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
        let (Some(stall), Listing::Listed { named_at, .. }) = (facts.stall(), facts.listing) else {
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
        // Only what a heartbeat says after the time was up shows that nothing moved in all of it.
        if named_at.is_none_or(|at| at < due_at) {
            alarm.next = alarm.next.min(self.now.plus_ms(facts.channel.interval_ms.max(1)));
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
}
