//! Work that the lists of a living instance leave out.

use rollcall_core::{
    Timestamp,
    event::{RecoveryReason, TerminateOutcome},
};

use super::{Alarm, Case, Ground, Judgement, Look, Verdict, say};
use crate::{
    facts::{Asked, Edge, Listing, Promise, UNLISTED_TIMES, Waiting},
    matrix::Row,
};

impl Case<'_> {
    /// Its agent beats and does not list it.
    pub(super) fn absent(&self, alarm: &mut Alarm) -> Option<Judgement> {
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
            Edge::ListsNot { .. } => Some(self.let_go(&ground)),
            Edge::NoResponders | Edge::NoAnswer => {
                Some(self.conclude(&ground, TerminateOutcome::NotAttempted))
            }
        }
    }

    /// What its absence from the lists means, `since` when. After its end was asked for it is the answer to that,
    /// whatever became of the agent's own.
    pub(super) fn absence(&self, since: Timestamp, fell_due_at: Timestamp) -> Ground {
        let facts = self.facts;
        let (row, reason) = match facts.asked {
            Asked::No if facts.started => (Row::Orphaned, RecoveryReason::Orphaned),
            Asked::No => (Row::DispatchLost, RecoveryReason::DispatchLost),
            _ if self.now >= facts.deadline => {
                let (row, reason) = (Row::TimedOut, RecoveryReason::TimedOut);
                return Ground { row, reason, true_at: facts.deadline, fell_due_at: facts.deadline };
            }
            _ if facts.asked_for == Some(RecoveryReason::Stalled) => (Row::Stalled, RecoveryReason::Stalled),
            // Its end was asked for by a clock that was ahead: nothing but its absence is known against it.
            _ if facts.started => (Row::Orphaned, RecoveryReason::Orphaned),
            _ => (Row::DispatchLost, RecoveryReason::DispatchLost),
        };
        Ground { row, reason, true_at: since, fell_due_at }
    }

    /// Its instance, asked, does not hold it. A dispatch that it never answered, or the orchestrator of work that is delivered
    /// externally, may still be on its way to it, and would begin an attempt that no longer counts: so it is asked to end that
    /// first. Over HTTP there is nobody to promise it: a registry knows no attempts.
    pub(super) fn let_go(&self, ground: &Ground) -> Judgement {
        let facts = self.facts;
        let may_begin = !facts.accepted
            && !facts.channel.driven
            && matches!(facts.asked, Asked::No | Asked::Unconfirmed { .. });
        match facts.promise {
            // Its report is looked for first: what was reported begins no more.
            Promise::Unasked if may_begin && facts.waiting == Waiting::Nothing => {
                say(ground.row, Verdict::Look(Look::Promise(ground.reason)))
            }
            Promise::Ended => self.conclude(ground, TerminateOutcome::Confirmed),
            Promise::NoAnswer => self.conclude(ground, TerminateOutcome::Failed),
            Promise::Unasked | Promise::NotRunning => self.conclude(ground, TerminateOutcome::NotRunning),
        }
    }
}
