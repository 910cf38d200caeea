//! What the operations take and give. Ids are plain strings: they are checked once, at the edge of the program.

use std::fmt;
use std::sync::Arc;

use crate::Error;

/// Times and sequences above this lose exactness in a double, which is what Lua and sorted sets count in.
pub const MAX_EXACT: u64 = (1 << 53) - 1;

/// The right to one slot, or a place in a queue: one attempt of one execution. Nothing else releases it.
///
/// Its form in Redis is `<execution_id>:<attempt>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hold {
    /// The execution.
    pub execution_id: String,
    /// The attempt, from 1.
    pub attempt: u32,
}

impl Hold {
    /// A hold of this attempt.
    pub fn new(execution_id: impl Into<String>, attempt: u32) -> Self {
        Self { execution_id: execution_id.into(), attempt }
    }

    /// The member form `<execution_id>:<attempt>`.
    pub fn member(&self) -> String {
        format!("{}:{}", self.execution_id, self.attempt)
    }

    /// Reads the member form back; `None` when it is not one.
    pub fn from_member(member: &str) -> Option<Self> {
        let (execution_id, attempt) = member.rsplit_once(':')?;
        if execution_id.is_empty() {
            return None;
        }
        Some(Self { execution_id: execution_id.to_owned(), attempt: attempt.parse().ok()? })
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.execution_id, self.attempt)
    }
}

/// One life of a pool's data in Redis, from a rebuild to the next. Later ones sort after earlier ones, so that
/// data from before a rebuild is known when a failover brings it back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(Arc<str>);

impl Epoch {
    /// A new epoch of this moment that sorts after `last`: 12 hex digits of milliseconds, `-`, 16 random ones.
    pub(crate) fn after(last: Option<&Epoch>, now_ms: u64) -> Self {
        let floor = last.map_or(0, |epoch| epoch.millis().saturating_add(1));
        let millis = now_ms.max(floor);
        Self(format!("{millis:012x}-{:016x}", rand::random::<u64>()).into())
    }

    /// As read from Redis.
    pub(crate) fn read(text: &str) -> Self {
        Self(text.into())
    }

    /// No life of any pool, before all of them: who confirms a grant of it asks for the slot that the log gives it, as if
    /// Redis had been rebuilt since.
    pub fn before_all() -> Self {
        Self::read("0")
    }

    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn millis(&self) -> u64 {
        let head = self.0.split('-').next().unwrap_or_default();
        u64::from_str_radix(head, 16).unwrap_or(0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Priority in a queue: 0 first to 9 last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u8);

impl Priority {
    /// The lowest one.
    pub const LAST: u8 = 9;

    /// `None` above 9.
    pub fn new(priority: u8) -> Option<Self> {
        (priority <= Self::LAST).then_some(Self(priority))
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    /// 5, the contract's default.
    fn default() -> Self {
        Self(5)
    }
}

/// When the caller acts, and how far it has read the log. Both at most [`MAX_EXACT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The caller's clock, milliseconds since 1970. Becomes *granted at* of what is granted.
    pub now_ms: u64,
    /// The stream sequence of the event whose effect this is, or the highest one the caller has applied.
    /// Redis keeps the highest ever given.
    pub log_seq: u64,
}

impl Stamp {
    /// Both numbers.
    pub fn new(now_ms: u64, log_seq: u64) -> Self {
        Self { now_ms, log_seq }
    }

    pub(crate) fn check(self) -> Result<Self, Error> {
        exact("now_ms", self.now_ms)?;
        exact("log_seq", self.log_seq)?;
        Ok(self)
    }
}

/// Refuses a number that a double can't carry.
pub(crate) fn exact(what: &'static str, value: u64) -> Result<u64, Error> {
    if value > MAX_EXACT { Err(Error::OutOfRange { what, value }) } else { Ok(value) }
}

/// How a new submission wants to wait when no slot is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Its priority.
    pub priority: Priority,
    /// How many may wait in that queue; one more is refused. 0: never queue.
    pub queue_depth: u32,
    /// In the pool's queue it may go to [`AgentSetting::external_only`] agents too.
    pub external: bool,
}

/// Where work waits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Queue {
    /// In the queue of one agent.
    Agent(String),
    /// In the pool's queue, for any of its agents that a dispatch reaches.
    Pool,
    /// In the pool's queue too, for any of its agents: nothing has to be dispatched.
    External,
}

/// A slot given to a hold. It counts from this moment, and stays *unconfirmed* until [`Capacity::confirm`].
///
/// [`Capacity::confirm`]: crate::Capacity::confirm
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Who has it.
    pub hold: Hold,
    /// On which agent.
    pub agent: String,
    /// The epoch it was given in; `confirm` needs it to notice a rebuild in between.
    pub epoch: Epoch,
}

/// The answer to an admission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// What became of the hold itself.
    pub outcome: Outcome,
    /// `false`: it had a place before this call, and that is on another agent, in another queue or of another priority
    /// than asked for now.
    pub as_asked: bool,
    /// Others that waited ahead of it and got free slots in the same step: dispatch them too.
    pub promoted: Vec<Grant>,
}

/// What became of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It has a slot. With `already` it had it before this call (and may be confirmed).
    Granted {
        /// The slot.
        grant: Grant,
        /// A repetition: nothing changed.
        already: bool,
    },
    /// It waits (agents that are unknown, closed, held back or full queue).
    Queued {
        /// Where, counted from 1; no two have the same at one moment.
        position: u64,
        /// A repetition: nothing changed.
        already: bool,
    },
    /// The queue is at its depth: nothing was recorded for this hold.
    Full,
}

/// What a confirmation found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// The hold has this slot, and it no longer counts as unconfirmed.
    Confirmed {
        /// Redis was rebuilt since the grant without knowing of it, and the slot was taken anew just now.
        reclaimed: bool,
    },
    /// The hold has this slot, and its agent has more of them than its capacity: a rebuild took what the log says for granted,
    /// or the capacity was lowered. What was put to the agent is there; what was not must not be.
    Crowded,
    /// The hold does not have this slot and can't have it: nothing changed. It must not run there.
    Lost,
}

/// What a settling did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settled {
    /// This very hold had a slot; it is free now, or already the promoted one's.
    pub released: bool,
    /// This very hold waited in a queue; it does not any more.
    pub dequeued: bool,
    /// At most one, and only if a slot was freed: who got it. Own queue of the agent first, then the pool's.
    pub promoted: Vec<Grant>,
}

/// A requeue: the old hold goes, the new one waits at the head of its priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requeue {
    /// Loses its slot or its place, if it has one.
    pub old: Hold,
    /// Waits. The next attempt; or the same hold again, when a dispatch was refused.
    pub new: Hold,
    /// In which queue. Its depth does not matter.
    pub queue: Queue,
    /// With which priority.
    pub priority: Priority,
    /// The agent that refused: it is offered nothing until [`Capacity::reopen`]. When old and new are the same, the hold
    /// leaves a slot of this agent only.
    ///
    /// [`Capacity::reopen`]: crate::Capacity::reopen
    pub hold_back: Option<String>,
    /// When the slot was granted that is to be taken back, milliseconds since 1970: when old and new are the same, the
    /// hold leaves no slot that it got at another moment. With neither this nor `hold_back` it keeps whatever place it has.
    pub granted_at_ms: Option<u64>,
    /// The last moment at which the slot can have been granted that is to be taken back, milliseconds since 1970: when old and
    /// new are the same, the hold keeps a slot that it got later. For who knows when the slot became unwanted.
    pub granted_by_ms: Option<u64>,
}

/// What a requeue did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Requeued {
    /// The old hold had a slot, which is free now or the promoted one's.
    pub released: bool,
    /// The old hold waited in a queue; it does not any more.
    pub dequeued: bool,
    /// The new hold was put into the queue (and perhaps promoted at once). `false`: it already had a place.
    pub queued: bool,
    /// At most two: one into the freed slot, one into another free slot that the new hold could take.
    pub promoted: Vec<Grant>,
}

/// What the log says of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentSetting {
    /// How many it can hold at once.
    pub capacity: u32,
    /// Takes work now: connected or degraded. Otherwise its queue holds.
    pub open: bool,
    /// Takes no work of its pool that has to be dispatched.
    pub external_only: bool,
    /// Log sequence of the event that says so. An older one than the stored is ignored. At most [`MAX_EXACT`].
    pub setting_seq: u64,
}

/// Promotions of an operation that works in bounded batches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filled {
    /// `false`: an older setting than the stored one, ignored; or nothing to reopen.
    pub applied: bool,
    /// Who got slots, at most [`PROMOTE_BATCH`](crate::PROMOTE_BATCH).
    pub promoted: Vec<Grant>,
    /// Free slots and waiting work are left: call [`Capacity::promote`](crate::Capacity::promote) until this is `false`.
    pub more: bool,
}

/// A batch of what a removed agent had. Taken out of Redis: place it in the new pool (`adopt`, `admit_to_agent`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// `false`: an older setting than the stored one, ignored.
    pub applied: bool,
    /// What waited in its queue, in order.
    pub queued: Vec<QueuedHold>,
    /// What held its slots, oldest first.
    pub held: Vec<HeldSlot>,
    /// Call again for the rest.
    pub more: bool,
}

/// A slot in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldSlot {
    /// Who holds it.
    pub hold: Hold,
    /// Since when, milliseconds since 1970.
    pub granted_at_ms: u64,
}

/// A place in a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedHold {
    /// Who waits.
    pub hold: Hold,
    /// Its priority.
    pub priority: Priority,
    /// From 1.
    pub position: u64,
}

/// Everything about one agent of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentView {
    /// `None`: no setting known, so it only queues.
    pub setting: Option<AgentSetting>,
    /// Refused a dispatch and has not been reopened.
    pub held_back: bool,
    /// How many hold slots; more than the capacity after that was lowered.
    pub held_count: u64,
    /// The slots, oldest first, up to the limit asked for.
    pub held: Vec<HeldSlot>,
    /// How many wait in its own queue.
    pub queue_len: u64,
    /// The head of its own queue, up to the limit asked for.
    pub queue: Vec<QueuedHold>,
}

/// The pool-wide queue.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolView {
    /// How many agents are open with a free slot.
    pub free_agents: u64,
    /// How many wait for any agent.
    pub queue_len: u64,
    /// The head of the queue, up to the limit asked for.
    pub queue: Vec<QueuedHold>,
}

/// Where a hold is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Has a slot.
    Slot {
        /// On this agent.
        agent: String,
        /// Since when, milliseconds since 1970.
        granted_at_ms: u64,
    },
    /// Waits.
    Waiting(Queue),
}

/// A slot that was found, as precisely as a slot can be named: the same hold granted anew is another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantedSlot {
    /// Whose.
    pub hold: Hold,
    /// On this agent.
    pub agent: String,
    /// Since when, milliseconds since 1970.
    pub granted_at_ms: u64,
}

/// A hold and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Who.
    pub hold: Hold,
    /// Where.
    pub place: Place,
}

/// A page of a scan: what has a place during the whole scan comes at least once, and can come twice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScanPage {
    /// Some of the holds.
    pub holds: Vec<Placed>,
    /// Give this to the next call; `None` at the end.
    pub next: Option<ScanCursor>,
}

/// Where a scan goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScanCursor(pub(crate) u64);

/// An admission or promotion that nobody has confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unconfirmed {
    /// Who and where.
    pub placed: Placed,
    /// Since when, milliseconds since 1970.
    pub since_ms: u64,
    /// The epoch it is in: with it, a slot can be confirmed as a [`Grant`].
    pub epoch: Epoch,
}

impl Unconfirmed {
    /// The grant, if it is one (and not a place in a queue).
    pub fn grant(&self) -> Option<Grant> {
        match &self.placed.place {
            Place::Slot { agent, .. } => Some(Grant {
                hold: self.placed.hold.clone(),
                agent: agent.clone(),
                epoch: self.epoch.clone(),
            }),
            Place::Waiting(_) => None,
        }
    }
}

/// One thing that a rebuild loads. In any order; a hold that comes twice keeps its first place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Load {
    /// An agent's setting.
    Agent {
        /// Which.
        agent: String,
        /// What the log says of it.
        setting: AgentSetting,
    },
    /// Work that runs: it counts whatever the capacity is.
    Slot {
        /// Where it runs.
        agent: String,
        /// What runs.
        hold: Hold,
        /// Since when, milliseconds since 1970.
        granted_at_ms: u64,
    },
    /// Work that waits.
    Queued {
        /// Where.
        queue: Queue,
        /// What waits.
        hold: Hold,
        /// Its priority.
        priority: Priority,
        /// Its order inside the priority: lower is earlier. The sequence of the event that queued it; minus the
        /// sequence of the event for what was requeued to the head. Magnitude below 2^48, see [`MAX_ORDER`].
        order: i64,
    },
}

/// Bound of the order inside one priority: 2^48 arrivals and 2^48 requeues per epoch. With ten priorities the whole
/// score stays below 10 * 2^49 < 2^53, so every score is an integer that a double carries exactly.
pub const MAX_ORDER: i64 = (1 << 48) - 1;

/// A pool's own record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Which life of the data.
    pub epoch: Epoch,
    /// Whether it may be used.
    pub state: PoolState,
    /// The highest log sequence that was given with a change.
    pub log_seq: u64,
    /// Rises with every change.
    pub version: u64,
    /// When the state began, milliseconds since 1970, by the clock of who changed it: how long a rebuild has been going on.
    pub since_ms: u64,
}

/// Whether a pool's data may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolState {
    /// Complete.
    Ready,
    /// Someone loads it from the log.
    Rebuilding,
}
