//! Instances that are gone, replaced or silent: what has to be known before their work is lost.

use rollcall_core::{
    Timestamp,
    agent::Parting,
    event::{RecoveryReason, TerminateOutcome},
};

use super::{Alarm, Case, DISPATCH_SETTLE_MS, Ground, Judgement, Look, Verdict, say};
use crate::{
    facts::{Edge, Listing, Standing, UNLISTED_TIMES},
    matrix::Row,
};

impl Case<'_> {
    /// The instance said goodbye, or was forgotten without one.
    pub(super) fn gone(&self, since: Timestamp, by: Parting, alarm: &mut Alarm) -> Option<Judgement> {
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
        match by {
            Parting::Goodbye => Some(self.conclude(&ground, TerminateOutcome::NotAttempted)),
            // It may live: somebody believes that it does not, or its probe failed for long.
            Parting::Dismissed => self.once_away(&ground, (Row::GoneVouched, Row::GoneUnsure), alarm),
            // That was silence, and goes the way of silence.
            Parting::Forgotten => self
                .once_away(&ground, (Row::GoneVouched, Row::GoneUnsure), alarm)
                .map(|concluded| self.in_turn(concluded)),
        }
    }

    /// A newer instance registered. The old one's work is lost once the old one is confirmed away.
    pub(super) fn superseded(&self, since: Timestamp, alarm: &mut Alarm) -> Option<Judgement> {
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
        // An operator's word counts as far as the instance itself does not speak against it: by an answer, or by a
        // heartbeat that is not overdue. A registry that fails once says little.
        let is_dismissed =
            matches!(facts.standing, Standing::Gone { by: Parting::Dismissed, .. }) && !facts.channel.driven;
        let is_away = self.is_away() || (is_dismissed && self.is_quiet());
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
                Some(self.let_go(ground))
            }
            Edge::ListsNot { .. } => {
                alarm.at(self.next_word(), unsure);
                None
            }
            Edge::Void => {
                alarm.at(self.next_word(), Row::Blind);
                None
            }
            Edge::NoResponders | Edge::NoAnswer if is_away && !facts.canary => {
                Some(say(ground.row, Verdict::Look(Look::Canary)))
            }
            // Silence alone condemns nobody while the breaker is open.
            Edge::NoResponders | Edge::NoAnswer
                if is_away && facts.suspended && !self.is_proven_away() && !is_dismissed =>
            {
                if self.now < stale_at {
                    alarm.at(self.next_word().min(stale_at), Row::Suspended);
                    return None;
                }
                let stale = Ground { row: Row::Stale, reason: RecoveryReason::Stale, ..*ground };
                Some(self.conclude(&stale, TerminateOutcome::NotAttempted))
            }
            Edge::NoResponders | Edge::NoAnswer if is_away => {
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

    /// The log says that every channel of its agent is bad.
    pub(super) fn silent(&self, since: Timestamp, alarm: &mut Alarm) -> Option<Judgement> {
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
        Some(self.let_go(&self.absence(since, since)))
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
        let refused = facts.edge == Edge::NoResponders && facts.channel.answered && self.is_quiet();
        refused || (facts.sight_since.is_some() && self.is_unlisted())
    }

    /// A heartbeat is overdue, as far as we could hear it.
    fn is_quiet(&self) -> bool {
        self.quiet_at().is_some_and(|at| at <= self.now)
    }

    /// When the instance has been quiet for one and a half intervals, as far as we could hear it: a heartbeat is overdue.
    fn quiet_at(&self) -> Option<Timestamp> {
        let interval = self.facts.channel.interval_ms;
        Some(self.facts.heard_from()?.plus_ms(interval + interval / 2))
    }

    fn is_unlisted(&self) -> bool {
        matches!(self.facts.listing, Listing::Unlisted { times, .. } if times >= UNLISTED_TIMES)
    }
}
