//! What is known about one execution at the moment it is judged: plain values, gathered by
//! [`crate::state::World::facts`] and completed by the looks that the judgement asks for.

use rollcall_core::{Timestamp, agent::Parting, event::RecoveryReason, execution::State, wire::Outcome};

/// Unlisted in so many lists in a row is proof (PROTOCOL.md: "twice in a row").
pub const UNLISTED_TIMES: u32 = 2;

/// Durations that bound a judgement, all in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Absence is no evidence for so long after a dispatch.
    pub dispatch_grace_ms: u64,
    /// From disconnected to lost, where the execution names nothing else.
    pub lost_after_ms: u64,
    /// The safety net under every deferral.
    pub stale_after_ms: u64,
    /// Time an agent gets between asking work to end and killing it.
    pub terminate_grace_ms: u64,
    /// Heartbeats in a row that must be missing before a channel is silent.
    pub failure_threshold: u32,
    /// Interval of agents that name none.
    pub interval_ms: u64,
}

/// Where the holding instance stands, by the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is the instance that counts, and not silent.
    Alive,
    /// It is the instance that counts, and every channel is bad since then.
    Silent {
        /// Since when the log says so.
        since: Timestamp,
    },
    /// A newer instance registered then.
    Superseded {
        /// When.
        since: Timestamp,
    },
    /// It said goodbye or was forgotten.
    Gone {
        /// When.
        since: Timestamp,
        /// On whose word.
        by: Parting,
    },
}

/// The holding instance's heartbeats as this watchdog itself received them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channel {
    /// The last one, since our sight began.
    pub last_at: Option<Timestamp>,
    /// Its interval, in milliseconds.
    pub interval_ms: u64,
    /// It said `gone`, by its heartbeat or the log: what it listed no longer vouches for anything.
    pub said_gone: bool,
    /// It answered before where it is asked now, so that "no responders" means something (PROTOCOL.md 3: on that subject).
    pub answered: bool,
    /// It is driven over HTTP: there its registry can be asked, whatever became of its heartbeats.
    pub driven: bool,
    /// Answers of its registry that are less far apart are one word, in milliseconds; 0: it has answered none yet.
    pub spacing_ms: u64,
}

impl Channel {
    /// How far apart its words are to be expected, in milliseconds: two within half of that are one. A registry is asked
    /// less often than its agent beats.
    #[must_use]
    pub fn word_ms(&self) -> u64 {
        self.interval_ms.max(self.spacing_ms.saturating_mul(2))
    }
}

/// Whether the holding instance lists the execution (this attempt).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// No list of it since our sight began.
    Unknown,
    /// The latest list names it.
    Listed {
        /// When that list came.
        at: Timestamp,
        /// When its progress rose last (or was first seen) in our present sight; `None`: it names no progress.
        rose_at: Option<Timestamp>,
        /// The same, however often we had to begin anew since.
        stands_since: Option<Timestamp>,
        /// When progress was named last, by this list, or by a heartbeat where a registry is the list; `None`: not in our
        /// present sight.
        named_at: Option<Timestamp>,
    },
    /// The latest lists do not.
    Unlisted {
        /// When the first of them came.
        since: Timestamp,
        /// When the first list without it came since it was last listed, however often we had to count anew since.
        first: Timestamp,
        /// How many in a row, counting only those beyond the dispatch grace.
        times: u32,
    },
}

/// What waits for the dispatcher on the execution's report subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// Nobody looked.
    Unasked,
    /// Nothing of this attempt.
    Nothing,
    /// A final word of the agent that the dispatcher has yet to apply.
    Withholds(Outcome),
    /// The agent's word that it is dead, for whoever asked for that.
    Confirms(Outcome),
}

/// What the holding instance itself said when it was asked just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// Nobody asked.
    Unasked,
    /// It answers and lists the execution.
    Lists,
    /// It answers and does not.
    ListsNot {
        /// In so many answers in a row.
        times: u32,
    },
    /// The server says that nobody listens there.
    NoResponders,
    /// No answer in time.
    NoAnswer,
    /// We could not ask: says nothing about the agent.
    Void,
}

/// What the holding instance said to being asked to end what may still begin there, so that a dispatch which is under way to
/// it, or an orchestrator that is late, begins nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// Nobody asked.
    Unasked,
    /// It does not run, and will not: whoever was asked to end something never begins it afterwards.
    NotRunning,
    /// It had just begun, and is dead.
    Ended,
    /// No answer, or none that makes sense.
    NoAnswer,
}

/// What became of asking the agent to end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Nobody asked.
    No,
    /// The work is dead.
    Confirmed,
    /// It was not running there. Finished work whose report is not acknowledged yet isn't either, and is still held.
    NotRunning {
        /// Since when it says so.
        since: Timestamp,
        /// When to ask again, as long as it is held all the same.
        next_at: Timestamp,
    },
    /// Still running, refused, or no answer.
    Unconfirmed {
        /// When to ask again.
        next_at: Timestamp,
    },
}

/// The facts of one execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its state by the log.
    pub state: State,
    /// Its agent accepted it (or it is delivered externally).
    pub started: bool,
    /// Its agent accepted it from the dispatcher, which asks no more then. What is delivered externally its orchestrator may
    /// start at any time, and again.
    pub accepted: bool,
    /// When the present attempt was dispatched.
    pub dispatched_at: Timestamp,
    /// When its time is up.
    pub deadline: Timestamp,
    /// When somebody asked for its end.
    pub cancelled_at: Option<Timestamp>,
    /// How long its progress may stand still.
    pub stall_timeout_ms: Option<u64>,
    /// How long its agent may be disconnected, where it says so itself.
    pub lost_after_ms: Option<u64>,
    /// The holding instance, by the log.
    pub standing: Standing,
    /// The holding instance, by its heartbeats.
    pub channel: Channel,
    /// Whether it lists the execution.
    pub listing: Listing,
    /// Until when the holding instance itself spoke for it, by a list or an answer, also before our sight began.
    pub vouched_at: Option<Timestamp>,
    /// Silence and absence count from here: our start, the end of our last blindness, the end of the last
    /// suspension. `None`: we are blind now.
    pub sight_since: Option<Timestamp>,
    /// The mass-failure breaker is open.
    pub suspended: bool,
    /// What became of asking for its end.
    pub asked: Asked,
    /// Why that was asked for.
    pub asked_for: Option<RecoveryReason>,
    /// What waits on the bus.
    pub waiting: Waiting,
    /// What its instance says.
    pub edge: Edge,
    /// What its instance promises of what may still begin there.
    pub promise: Promise,
    /// A message of our own came back through the bus just now, and all that came before it was read.
    pub canary: bool,
    /// When the rate limit lets an agent-lost recovery through; `None`: not asked for a place yet.
    pub turn_at: Option<Timestamp>,
}

impl Facts {
    /// When the instance's heartbeats are silent to the threshold: failure k falls at (k + 0.5) intervals, counted
    /// from the last one or from when we began to see. `None` while we are blind.
    #[must_use]
    pub fn silent_at(&self, limits: &Limits) -> Option<Timestamp> {
        let from = self.heard_from()?;
        let interval = self.channel.interval_ms;
        Some(from.plus_ms(interval.saturating_mul(u64::from(limits.failure_threshold)) + interval / 2))
    }

    /// From when the instance's silence counts: its last heartbeat, or when we began to see. One that we have not heard at all
    /// was not silent when it was given this: the heartbeat that registered it came before we knew it. `None` while we are
    /// blind.
    #[must_use]
    pub fn heard_from(&self) -> Option<Timestamp> {
        Some(self.sight_since?.max(self.channel.last_at.unwrap_or(self.dispatched_at)))
    }

    /// Whether its instance's own heartbeats speak for it: a list that names it, from a channel that is not silent.
    #[must_use]
    pub fn is_vouched(&self, limits: &Limits, now: Timestamp) -> bool {
        matches!(self.listing, Listing::Listed { .. })
            && !self.channel.said_gone
            && self.silent_at(limits).is_none_or(|at| now < at)
    }

    /// The end of the dispatch grace.
    #[must_use]
    pub fn grace_until(&self, limits: &Limits) -> Timestamp {
        self.dispatched_at.plus_ms(limits.dispatch_grace_ms)
    }

    /// Since when nobody has spoken for it, of a ground that the log has `since`: what vouches ends every deferral.
    #[must_use]
    pub fn unvouched_since(&self, since: Timestamp) -> Timestamp {
        self.vouched_at.map_or(since, |at| at.max(since))
    }

    /// When it has stood still for too long, by lists that we received. `None`: it may, or names no progress.
    #[must_use]
    pub fn stall(&self) -> Option<Stall> {
        let timeout = self.stall_timeout_ms?;
        let sight = self.sight_since?;
        match self.listing {
            Listing::Listed { rose_at: Some(rose), stands_since: Some(stands), .. } => Some(Stall {
                ripe_at: rose.max(sight).plus_ms(timeout),
                fell_due_at: stands.plus_ms(timeout),
            }),
            _ => None,
        }
    }
}

/// Progress that stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// When that has lasted too long in our present sight.
    pub ripe_at: Timestamp,
    /// When it had at first: from here the safety net counts.
    pub fell_due_at: Timestamp,
}
