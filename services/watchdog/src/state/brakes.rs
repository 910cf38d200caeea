//! The brakes: the breaker and the rate limit.

use rollcall_core::{ExecutionId, Timestamp};

use super::World;
use crate::breaker::Count;

impl World {
    /// Takes a place in the rate limit for an execution, once per loss.
    pub fn take_turn(&mut self, id: &ExecutionId, now: Timestamp) {
        if self.troubles.get(id).is_none_or(|t| t.turn_at.is_none()) {
            let at = self.limiter.reserve(now);
            if let Some(trouble) = self.troubles.get_mut(id) {
                trouble.turn_at = Some(at);
            }
        }
    }

    /// Another watchdog recovered this for silence, just now: it took the place that comes next in our line as well, so that
    /// all of them together keep to the rate. Whoever had that place gets the one that this waited for.
    pub(crate) fn yield_turn(&mut self, id: &ExecutionId, now: Timestamp) {
        let given_up = match self.troubles.get(id).and_then(|trouble| trouble.turn_at) {
            // It was its turn here too.
            Some(at) if at <= now => return,
            Some(at) => at,
            None => self.limiter.reserve(now),
        };
        let waiting = self.troubles.iter_mut().filter(|(other, _)| *other != id);
        let next = waiting.filter_map(|(_, trouble)| trouble.turn_at.as_mut()).filter(|at| **at > now).min();
        if let Some(next) = next {
            *next = (*next).max(given_up);
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

    pub(super) fn resume(&mut self, now: Timestamp) {
        self.tripped = false;
        self.breaker.resumed();
        self.resumed_at = now;
        self.settle_postponed(now);
    }
}
