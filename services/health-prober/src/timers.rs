//! One timer per agent, in one heap. A heartbeat does not touch it: when a timer goes off, its owner says when it is
//! really due and is armed again, so the cost is that of what is due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rollcall_core::Timestamp;

use crate::state::{Index, Work};

/// The timers of the fleet.
#[derive(Debug, Default)]
pub struct Timers {
    heap: BinaryHeap<Reverse<(Timestamp, Index)>>,
}

impl Timers {
    /// Has the agent's timer go off at `at`, or earlier if it is armed for earlier.
    pub fn arm(&mut self, index: Index, work: &mut Work, at: Timestamp) {
        if work.armed.is_none_or(|armed| at < armed) {
            // An entry that was armed for later is recognised as stale when it comes up.
            work.armed = Some(at);
            self.heap.push(Reverse((at, index)));
        }
    }

    /// The next entry that is due, stale or not: compare it with [`Work::armed`].
    pub fn pop_due(&mut self, now: Timestamp) -> Option<(Timestamp, Index)> {
        match self.heap.peek() {
            Some(Reverse((at, _))) if *at <= now => self.heap.pop().map(|Reverse(due)| due),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_off_at_the_earliest_time_it_was_armed_for_and_once() {
        let at = Timestamp::from_millis;
        let (mut timers, mut work) = (Timers::default(), Work::default());
        timers.arm(7, &mut work, at(50));
        timers.arm(7, &mut work, at(20));
        timers.arm(7, &mut work, at(90));
        assert_eq!(timers.pop_due(at(19)), None);
        assert_eq!(timers.pop_due(at(20)), Some((at(20), 7)));
        assert_eq!(work.armed, Some(at(20)));
        work.armed = None;
        timers.arm(7, &mut work, at(60));
        let (stale, _) = timers.pop_due(at(70)).unwrap();
        assert_ne!(work.armed, Some(stale));
        assert_eq!(timers.pop_due(at(70)), Some((at(60), 7)));
        assert_eq!(timers.pop_due(at(1000)), None);
    }
}
