//! Self-suspicion: when our own eyes can be trusted. Pure.
//!
//! We are blind from the start, and from everything after which messages may be missing or late, until all of this
//! holds: the connection is up, the log was read to its end, and a message of our own that was sent after the trouble
//! came back, with every heartbeat that came before it read. Sight then begins anew, and with it every clock that
//! counts silence or absence.

use crate::Timestamp;

/// Why we are blind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Void {
    /// Just started.
    Started,
    /// The connection was cut or made again.
    BusCut,
    /// Heartbeats were dropped because they were not read in time.
    Dropped,
    /// Our event loop stood still.
    Stalled,
    /// The wall clock jumped.
    ClockJump,
    /// What is known of the log is old: it was not read to its end in time.
    TailLag,
    /// Our own message did not come back in time.
    CanaryLost,
    /// Many agents' heartbeats have holes in their sequence at once: see [`crate::gaps`].
    Gaps,
}

impl Void {
    /// Its name in reports and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::BusCut => "bus_cut",
            Self::Dropped => "heartbeats_dropped",
            Self::Stalled => "loop_stalled",
            Self::ClockJump => "clock_jump",
            Self::TailLag => "log_behind",
            Self::CanaryLost => "canary_lost",
            Self::Gaps => "heartbeat_gaps",
        }
    }
}

/// Whether we see, and since when.
#[derive(Debug, Clone)]
pub struct Sight {
    since: Option<Timestamp>,
    trouble: Void,
    /// Counts troubles: a canary sent before the last one proves nothing.
    epoch: u64,
    connected: bool,
    caught_up: bool,
}

impl Default for Sight {
    fn default() -> Self {
        Self { since: None, trouble: Void::Started, epoch: 0, connected: false, caught_up: false }
    }
}

impl Sight {
    /// Since when we see; `None` while blind.
    #[must_use]
    pub const fn since(&self) -> Option<Timestamp> {
        self.since
    }

    /// What made us blind last.
    #[must_use]
    pub const fn trouble(&self) -> Void {
        self.trouble
    }

    /// To be remembered when a canary is sent.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Something happened that makes evidence void.
    pub const fn void(&mut self, trouble: Void) {
        self.since = None;
        self.trouble = trouble;
        self.epoch += 1;
    }

    /// Whether there is a connection.
    #[must_use]
    pub const fn connected(&self) -> bool {
        self.connected
    }

    /// The connection as it is now. Losing it blinds.
    pub const fn set_connected(&mut self, connected: bool) {
        if self.connected && !connected {
            self.void(Void::BusCut);
        }
        self.connected = connected;
    }

    /// Whether the log was read to its end. Falling behind blinds.
    pub const fn set_caught_up(&mut self, caught_up: bool) {
        if self.caught_up && !caught_up {
            self.void(Void::TailLag);
        }
        self.caught_up = caught_up;
    }

    /// Whether the log was read to its end.
    #[must_use]
    pub const fn caught_up(&self) -> bool {
        self.caught_up
    }

    /// A canary that was sent in `epoch` came back and everything before it was read. True if sight begins with it.
    pub const fn proven(&mut self, epoch: u64, now: Timestamp) -> bool {
        if self.since.is_some() || epoch != self.epoch || !self.connected || !self.caught_up {
            return false;
        }
        self.since = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_canary_sent_after_the_trouble_on_a_live_and_read_log_opens_the_eyes() {
        let now = Timestamp::from_millis(7);
        let mut sight = Sight::default();
        let first = sight.epoch();
        assert!(!sight.proven(first, now), "not connected, log not read");
        sight.set_connected(true);
        assert!(!sight.proven(first, now), "log not read");
        sight.set_caught_up(true);
        assert!(sight.proven(first, now));
        assert_eq!(sight.since(), Some(now));
        for trouble in
            [Void::Dropped, Void::Stalled, Void::ClockJump, Void::CanaryLost, Void::Gaps, Void::BusCut]
        {
            let before = sight.epoch();
            sight.void(trouble);
            assert_eq!((sight.since(), sight.trouble()), (None, trouble));
            assert!(!sight.proven(before, now), "sent before the trouble");
            assert!(sight.proven(sight.epoch(), now));
        }
        let before = sight.epoch();
        sight.set_connected(false);
        sight.set_connected(true);
        assert!(!sight.proven(before, now));
        assert!(sight.proven(sight.epoch(), now));
        sight.set_caught_up(false);
        assert!(!sight.proven(sight.epoch(), now));
        assert_eq!(sight.trouble(), Void::TailLag);
    }
}
