//! The detector: evidence of one or more channels becomes an agent's health. Pure, without a clock.
//!
//! A channel rises and falls by counting: one failure makes it bad, and once bad it takes the success threshold to be
//! good again. An agent is silent when *every* channel is bad; how often in a row that was so is the smallest count of
//! its channels. `Void` counts for nothing in either direction.

use rollcall_core::agent::Status;
use serde::{Deserialize, Serialize};

/// What was seen on a channel, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// As it should be.
    Good,
    /// Answered, and late.
    Slow,
    /// Wrong, and how.
    Bad(Cause),
    /// Expected, and did not come.
    Absent,
    /// We could not have seen it: our link was cut, we stalled, our clock jumped, we just started.
    Void,
}

/// How a channel is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A heartbeat was due and did not come.
    MissedHeartbeat,
    /// Nobody listens where this instance answered before.
    NoResponders,
    /// The name does not resolve.
    Dns,
    /// The connection was refused.
    Refused,
    /// The connection broke.
    Reset,
    /// No answer in time.
    Timeout,
    /// Answered with a status that means trouble.
    Status,
    /// The TLS handshake failed.
    Tls,
    /// Answered with something else than its protocol says.
    Protocol,
    /// Answered 401 or 403.
    Auth,
    /// Somebody else answered.
    Identity,
    /// Its only channel is a probe that is not made.
    NotProbed,
}

impl Cause {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MissedHeartbeat => "missed_heartbeat",
            Self::NoResponders => "no_responders",
            Self::Dns => "dns",
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
            Self::Status => "status",
            Self::Tls => "tls",
            Self::Protocol => "protocol",
            Self::Auth => "auth",
            Self::Identity => "identity",
            Self::NotProbed => "not_probed",
        }
    }

    /// The code of `agent.error`.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Auth => "auth",
            Self::Tls => "tls",
            Self::Protocol => "protocol",
            Self::Identity => "identity",
            Self::MissedHeartbeat
            | Self::NoResponders
            | Self::Dns
            | Self::Refused
            | Self::Reset
            | Self::Timeout
            | Self::Status
            | Self::NotProbed => "unreachable",
        }
    }

    const fn is_unreachable(self) -> bool {
        !matches!(self, Self::Auth | Self::Tls | Self::Protocol | Self::Identity)
    }

    /// Refusing us is an answer that the next try won't change: it is not counted up to the threshold.
    const fn is_certain(self) -> bool {
        matches!(self, Self::Auth)
    }
}

/// How a channel stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// Nothing was seen yet that counts.
    #[default]
    Unknown,
    /// Good.
    Good,
    /// Good, and late.
    Slow,
    /// Bad, or on the way back from it.
    Bad,
}

/// One channel's counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Channel {
    /// How it stands.
    pub grade: Grade,
    /// Failures in a row.
    pub fails: u32,
    /// Successes in a row.
    pub goods: u32,
    /// How it is bad.
    pub cause: Option<Cause>,
}

impl Channel {
    /// A channel that was bad when we started: it takes the success threshold to be good again.
    #[must_use]
    pub const fn bad() -> Self {
        Self { grade: Grade::Bad, fails: 0, goods: 0, cause: None }
    }

    /// Counts one piece of evidence; `successes` in a row lead out of bad.
    pub fn take(&mut self, evidence: Evidence, successes: u32) {
        match evidence {
            Evidence::Good => self.succeed(Grade::Good, successes),
            Evidence::Slow => self.succeed(Grade::Slow, successes),
            Evidence::Bad(cause) => self.fail_to(self.fails.saturating_add(1), cause),
            Evidence::Absent => self.fail_to(self.fails.saturating_add(1), Cause::MissedHeartbeat),
            // The clock starts again: failures before it don't add up with failures after it.
            Evidence::Void => self.fails = 0,
        }
    }

    fn succeed(&mut self, grade: Grade, successes: u32) {
        self.fails = 0;
        self.goods = self.goods.saturating_add(1);
        if self.grade != Grade::Bad || self.goods >= successes {
            self.grade = grade;
            self.cause = None;
        }
    }

    /// Another prober saw it like this. Only the grade is taken over: failures of several would add up.
    pub const fn agree(&mut self, grade: Grade) {
        match grade {
            Grade::Unknown => {}
            Grade::Good | Grade::Slow => *self = Self { grade, fails: 0, goods: self.goods, cause: None },
            Grade::Bad if matches!(self.grade, Grade::Bad) => {}
            Grade::Bad => *self = Self::bad(),
        }
    }

    /// At least `fails` failures in a row now.
    pub fn fail_to(&mut self, fails: u32, cause: Cause) {
        if fails > self.fails {
            self.fails = fails;
            self.goods = 0;
            self.grade = Grade::Bad;
            self.cause = Some(cause);
        }
    }
}

/// All channels of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Channels {
    /// Its heartbeat, if it beats.
    pub beat: Option<Channel>,
    /// Its late heartbeat's edge ping was answered: the process is there.
    pub vouched: bool,
    /// Its active probe, if it has one.
    pub probe: Option<Channel>,
}

/// What the channels say together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Every channel good.
    Connected,
    /// One of several bad, or slow.
    Degraded(&'static str),
    /// Every channel bad, below the threshold.
    Disconnected(Cause),
    /// Every channel bad, at the threshold.
    Error(Cause),
}

impl Health {
    /// The status it amounts to, draining apart.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Self::Connected => Status::Connected,
            Self::Degraded(_) => Status::Degraded,
            Self::Disconnected(_) => Status::Disconnected,
            Self::Error(_) => Status::Error,
        }
    }

    /// The `reason` of its event.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Connected => "good",
            Self::Degraded(reason) => reason,
            Self::Disconnected(cause) | Self::Error(cause) => cause.as_str(),
        }
    }
}

/// Of two causes the one that tells more: who is reached and wrong is not unreachable. Else the later one, the probe's.
const fn telling(first: Cause, later: Cause) -> Cause {
    match (first.is_unreachable(), later.is_unreachable()) {
        (false, true) => first,
        (true, _) | (false, false) => later,
    }
}

/// What the channels say, given the status so far. `None`: nothing that changes it.
///
/// - A silent agent rises only by a channel that has met its success threshold; an answered ping alone never raises.
/// - Whether an agent that beats is silent is not known before its heartbeat was heard or missed, whatever its probe says:
///   so it is for an interval and a half after every start of ours.
/// - `error` does not fall back to `disconnected` because failures started to be counted anew.
#[must_use]
pub fn judge(channels: &Channels, failure_threshold: u32, status: Option<Status>) -> Option<Health> {
    let known = [channels.beat, channels.probe].into_iter().flatten().filter(|c| c.grade != Grade::Unknown);
    let mut fewest: Option<(u32, Cause)> = None;
    let (mut any, mut all_bad, mut worst_reason) = (false, true, None);
    for (index, channel) in known.enumerate() {
        any = true;
        match channel.grade {
            Grade::Bad => {
                let cause = channel.cause.unwrap_or(Cause::MissedHeartbeat);
                let fails = if channel.cause.is_some_and(Cause::is_certain) && channel.fails > 0 {
                    channel.fails.max(failure_threshold)
                } else {
                    channel.fails
                };
                fewest = Some(
                    fewest.map_or((fails, cause), |(least, other)| (fails.min(least), telling(other, cause))),
                );
                worst_reason =
                    Some(if index == 0 && channels.beat.is_some() { "heartbeat_bad" } else { "probe_bad" });
            }
            Grade::Slow => {
                all_bad = false;
                worst_reason = worst_reason.or(Some("slow"));
            }
            Grade::Good | Grade::Unknown => all_bad = false,
        }
    }
    if !any {
        return None;
    }
    if !all_bad {
        return Some(worst_reason.map_or(Health::Connected, Health::Degraded));
    }
    if channels.beat.is_some_and(|beat| beat.grade == Grade::Unknown) {
        return None;
    }
    let (fails, cause) = fewest?;
    let was_silent = status.is_some_and(Status::is_silent);
    if fails >= failure_threshold {
        // Whoever answers a ping and does not beat is there and wrong.
        let cause = if channels.vouched && cause.is_unreachable() { Cause::Protocol } else { cause };
        return Some(Health::Error(cause));
    }
    match status {
        _ if fails == 0 => None,
        Some(Status::Error | Status::Gone) => None,
        _ if channels.vouched && !was_silent => Some(Health::Degraded("heartbeat_late")),
        _ => Some(Health::Disconnected(cause)),
    }
}

#[cfg(test)]
mod tests;
