//! How what active probes bring is counted.

use rollcall_core::Timestamp;

use super::{Known, ProbeSeen};
use crate::detector::{Channel, Evidence, Grade};

/// Who listens on the subject of a `nats` probe, as far as is known. "No responders" is evidence only about somebody who
/// answered there before, and not within one interval of a reconnect on either side (PROTOCOL.md 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Listening {
    /// It answered there before.
    answered: bool,
    /// Since when nobody was found there, without an answer in between.
    nobody_since: Option<Timestamp>,
}

/// What it means that nobody listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nobody {
    /// It is away.
    Counts,
    /// It, or we, may be connecting again.
    TooSoon,
    /// It may never have listened there.
    NeverAnswered,
}

impl Listening {
    /// As the log knows it: it answered once where it is probed now if it does not beat and was well by that very probe.
    /// That it was well by another probe, before its row was changed, says nothing about this one.
    #[must_use]
    pub fn of(known: &Known) -> Self {
        Self { answered: known.probe_answered(), nobody_since: None }
    }

    /// It answered.
    pub const fn answered(&mut self) {
        *self = Self { answered: true, nobody_since: None };
    }

    /// Nobody listens there. Our own reconnect is known. Theirs is not: that it does not listen must have lasted for an
    /// interval, by our own probes or by its silence, which began at `silent_since`; `None`: it does not beat.
    pub fn nobody(
        &mut self,
        now: Timestamp,
        interval_ms: u64,
        silent_since: Option<Timestamp>,
        reconnected_at: Option<Timestamp>,
    ) -> Nobody {
        let since = *self.nobody_since.get_or_insert(now);
        let away_since = silent_since.map_or(since, |silent| silent.min(since));
        let is_past = |at: Timestamp| now.since_ms(at) > interval_ms;
        if !self.answered {
            Nobody::NeverAnswered
        } else if is_past(away_since) && reconnected_at.is_none_or(is_past) {
            Nobody::Counts
        } else {
            Nobody::TooSoon
        }
    }

    /// The clock was set.
    pub fn rebase(&mut self, now: Timestamp) {
        self.nobody_since = self.nobody_since.map(|_| now);
    }
}

impl ProbeSeen {
    /// Counts one piece of evidence. A silent agent of whose probe nothing was known yet needs the success threshold, too.
    pub fn count(&mut self, evidence: Evidence, successes: u32, silent: bool) {
        let good = matches!(evidence, Evidence::Good | Evidence::Slow);
        if silent && good && self.channel.grade == Grade::Unknown {
            self.channel = Channel::bad();
        }
        self.channel.take(evidence, successes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rollcall_control::Trust;
    use rollcall_core::wire::Endpoint;

    const INTERVAL_MS: u64 = 5000;

    fn at(ms: u64) -> Timestamp {
        Timestamp::default().plus_ms(1_000_000 + ms)
    }

    #[test]
    fn nobody_counts_only_where_somebody_was() {
        let mut listening = Listening::default();
        for ms in [0, 60_000, 120_000] {
            assert_eq!(listening.nobody(at(ms), INTERVAL_MS, Some(at(0)), None), Nobody::NeverAnswered);
        }
        listening.answered();
        assert_eq!(listening.nobody(at(130_000), INTERVAL_MS, Some(at(0)), None), Nobody::Counts);
    }

    #[test]
    fn nobody_does_not_count_within_an_interval_of_our_reconnect() {
        let mut listening = Listening::default();
        listening.answered();
        let mut after =
            |ms: u64| listening.nobody(at(60_000 + ms), INTERVAL_MS, Some(at(0)), Some(at(60_000)));
        assert_eq!(after(100), Nobody::TooSoon);
        assert_eq!(after(5000), Nobody::TooSoon);
        assert_eq!(after(5001), Nobody::Counts);
    }

    #[test]
    fn nobody_does_not_count_while_the_agent_may_be_connecting_again() {
        let mut listening = Listening::default();
        listening.answered();
        // It beats on: heard a second before each probe.
        let mut beating = |ms: u64| listening.nobody(at(ms), INTERVAL_MS, Some(at(ms - 1000)), None);
        assert_eq!(beating(10_000), Nobody::TooSoon);
        assert_eq!(beating(15_000), Nobody::TooSoon);
        assert_eq!(beating(15_001), Nobody::Counts, "it beats and has not listened for an interval");
        listening.answered();
        assert_eq!(listening.nobody(at(20_000), INTERVAL_MS, Some(at(19_000)), None), Nobody::TooSoon);
        // Without heartbeats only probes tell.
        listening.answered();
        assert_eq!(listening.nobody(at(30_000), INTERVAL_MS, None, None), Nobody::TooSoon);
        assert_eq!(listening.nobody(at(35_001), INTERVAL_MS, None, None), Nobody::Counts);
        // The clock was set back.
        listening.rebase(at(1000));
        assert_eq!(listening.nobody(at(1000), INTERVAL_MS, None, None), Nobody::TooSoon);
        assert_eq!(listening.nobody(at(6001), INTERVAL_MS, None, None), Nobody::Counts);
    }

    #[test]
    fn the_first_answer_of_a_silent_agent_is_one_success_and_no_more() {
        let mut seen = ProbeSeen {
            endpoint: Endpoint { kind: "nats".to_owned(), url: String::new() },
            instance_id: "i".parse().unwrap(),
            trust: Trust::Agent,
            generation: 1,
            channel: Channel::default(),
            listening: Listening::default(),
            result: String::new(),
            checked_at: None,
            latency_ms: None,
        };
        seen.count(Evidence::Void, 2, true);
        assert_eq!(seen.channel.grade, Grade::Unknown, "it is no channel yet");
        seen.count(Evidence::Good, 2, true);
        assert_eq!(seen.channel.grade, Grade::Bad);
        seen.count(Evidence::Good, 2, true);
        assert_eq!(seen.channel.grade, Grade::Good);
        seen.channel = Channel::default();
        seen.count(Evidence::Good, 2, false);
        assert_eq!(seen.channel.grade, Grade::Good, "who is not silent connects at once");
    }
}
