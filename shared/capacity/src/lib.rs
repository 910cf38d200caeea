//! Capacity slots and queues of Rollcall in Redis.
//!
//! A slot or a place in a queue belongs to a [`Hold`]: one attempt of one execution. Every change is one Lua script
//! (`src/lua/`, one file per operation), so it happens whole or not at all, whoever else is at it. [`ModelCapacity`] is
//! the same in memory; it is the oracle of the tests and good for tests of others.
//!
//! # What is promised
//! - No grant and no promotion unless the agent is open, not held back, and holds less than its capacity at that moment.
//!   What runs already is recorded as a fact ([`Capacity::adopt`], [`Load::Slot`], a lowered capacity), so *held* may exceed
//!   the capacity; it shrinks by attrition.
//! - Releasing what does not hold releases nothing; settling promotes at most one, and only if it freed a slot.
//! - Every operation may be repeated. What a lost answer had granted shows up in [`Capacity::unconfirmed`].
//! - No script's time grows with the slots in use or the length of a queue (beyond a logarithm); what returns or loads many
//!   works in batches.
//!
//! # Redis can be lost
//! Redis holds nothing that the log can't rebuild. Each pool carries an epoch (which life of the data), a version (rises with
//! every change), and the log sequence it reflects. A handle remembers per pool the epoch and the highest version it has
//! seen and gives them to every script:
//! - nothing there, or a rebuild under way: [`Error::NotReady`]. A new pool starts like that too.
//! - same epoch but a lower version, or an epoch from before the known one: [`Error::MovedBack`], until somebody rebuilds.
//! - a later epoch that is ready (another process rebuilt): adopted inside the call, which is then done there once more.
//!   The caller does not see it, because every operation is judged by what is there, and [`Capacity::confirm`] carries
//!   the epoch of its grant and re-claims or loses the slot.
//! - at first use: whatever is ready is adopted. Compare [`Meta::log_seq`] and audit at start.
//!
//! So a dispatcher does: on [`Error::wants_rebuild`] run a rebuild (or wait for the one under way, see [`Meta::since_ms`], and
//! begin its own if that takes too long: the later one wins), and repeat the effect. Epochs sort by the clocks of who began them; after a
//! wipe, one that began with a clock behind looks like old data to those who knew a later one, which costs another rebuild. A version can't show that another
//! handle's changes were lost if ours were not; the log can: what it says that a pool has reflected
//! ([`RedisCapacity::expect`]) is the least that every script accepts.
//!
//! # Rebuild
//! [`Capacity::rebuild_begin`], *then* read the log to its end (so that no effect which was applied before the wipe is missing),
//! [`Capacity::rebuild_load`] in any number of calls, [`Capacity::rebuild_commit`], then
//! [`Capacity::promote`] for each of [`Capacity::waiting_with_free`]. Nothing is granted before the commit.
//!
//! # Keys
//! `<prefix>:{<pool>}:` and `slots:<agent>`, `queue:<agent>`, `queue` (the contract), `meta`, `where` (hold to place),
//! `free` (open agents with a free slot, least loaded first), `free_external` (those of them that no dispatch reaches),
//! `external` (what in `queue` they may be given), `unconfirmed`, `agents` (all that have keys), `agent:<agent>` (setting). All share the pool's hash tag, so a pool lives on one node of a cluster. `<prefix>:pools` lists
//! the pools that were ever begun; it is a convenience and takes part in no script.

mod error;
mod keys;
mod known;
mod model;
mod redis_backed;
#[cfg(feature = "testing")]
pub mod testing;
mod types;

use std::future::Future;

pub use error::Error;
pub use model::{ModelCapacity, ModelSnapshot};
pub use redis_backed::{CONNECT_TIMEOUT, HOT_CONNECTIONS, RESPONSE_TIMEOUT, RedisCapacity, Timeouts};
pub use types::{
    Admission, AgentSetting, AgentView, Ask, Confirmation, Epoch, Filled, Grant, GrantedSlot, HeldSlot, Hold,
    Load, MAX_EXACT, MAX_ORDER, Meta, Outcome, Place, Placed, PoolState, PoolView, Priority, Queue,
    QueuedHold, Removed, Requeue, Requeued, ScanCursor, ScanPage, Settled, Stamp, Unconfirmed,
};

/// Most promotions in one script.
pub const PROMOTE_BATCH: usize = 64;
/// Most members that one script returns or takes out; longer lists are fetched in pages.
pub const PAGE: usize = 256;
/// Most things that one script of a rebuild loads or wipes.
pub const REBUILD_BATCH: usize = 256;

/// The answer of every operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Slots and queues of pools of agents. See the crate's page for what is promised and for the errors, which are
/// the same for all: `Unavailable`, `NotReady`, `MovedBack`, `Stale` (rare), `Reply`, `OutOfRange`.
pub trait Capacity: Send + Sync + 'static {
    /// A slot of this agent for the hold, or a place in the agent's queue.
    ///
    /// A hold that has a place keeps it (`already`). Who waits in the agent's queue with a better place is served first.
    /// Granted or queued, it is unconfirmed until [`confirm`](Self::confirm) or [`confirm_queued`](Self::confirm_queued);
    /// when the submission comes to nothing, [`reclaim`](Self::reclaim) gives it back.
    fn admit_to_agent(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        ask: Ask,
        stamp: Stamp,
    ) -> impl Future<Output = Result<Admission>> + Send;

    /// A slot of the least loaded (held over capacity) open agent, or a place in the pool's queue. Otherwise the same.
    /// Work that needs no dispatch ([`Ask::external`]) goes first to agents that take nothing else.
    fn admit_to_pool(
        &self,
        pool: &str,
        hold: &Hold,
        ask: Ask,
        stamp: Stamp,
    ) -> impl Future<Output = Result<Admission>> + Send;

    /// The grant is in the log now. If Redis was rebuilt since the grant and does not know of it, the slot is taken again,
    /// if the agent has one free (from the queue too, if the rebuild put the hold there); otherwise it is lost.
    /// In the grant's own epoch a hold that lost its slot (settled, reclaimed) is [`Confirmation::Lost`]. A slot that is one too
    /// many is [`Confirmation::Crowded`].
    fn confirm(
        &self,
        pool: &str,
        grant: &Grant,
        stamp: Stamp,
    ) -> impl Future<Output = Result<Confirmation>> + Send;

    /// The submission of a hold that waits is in the log now. `true`: it waits in a queue. `false`: it does not (it was
    /// promoted meanwhile, or is gone), and nothing changed.
    fn confirm_queued(
        &self,
        pool: &str,
        hold: &Hold,
        stamp: Stamp,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// The attempt is over: its slot goes to the next in the queue, or it leaves the queue. Anything else changes nothing.
    fn settle(&self, pool: &str, hold: &Hold, stamp: Stamp) -> impl Future<Output = Result<Settled>> + Send;

    /// A reservation came to nothing: [`settle`](Self::settle), but only while it is unconfirmed. What a submission in the log
    /// has been told that it holds stays.
    fn reclaim(&self, pool: &str, hold: &Hold, stamp: Stamp) -> impl Future<Output = Result<Settled>> + Send;

    /// The old hold goes, the new one waits at the head of its priority (or runs at once, if a slot is free).
    /// A new one that has a place already keeps it, and then only the old one is taken away. With both the same it places
    /// a hold that has no place, or takes back the very slot that [`Requeue`] names.
    fn requeue(
        &self,
        pool: &str,
        requeue: &Requeue,
        stamp: Stamp,
    ) -> impl Future<Output = Result<Requeued>> + Send;

    /// Records that the hold runs on this agent, because the log says so, whatever the capacity (a repair, or an agent
    /// that moved here with its work). From a queue it moves to the slot. `false`: it had a slot, and nothing changed.
    fn adopt(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        granted_at_ms: u64,
        stamp: Stamp,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Moves a hold from the slot in which it was `found` to one of `agent`, where it runs since `since_ms` by the log,
    /// whatever the capacity (a repair). Only if it still has that very slot. The slot that it leaves is given to nobody
    /// yet. `false`: it has another place by now, or none, and nothing changed.
    fn relocate(
        &self,
        pool: &str,
        found: &GrantedSlot,
        agent: &str,
        since_ms: u64,
        stamp: Stamp,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// What the log says of an agent now; free slots are given to its queue, then to the pool's.
    fn set_agent(
        &self,
        pool: &str,
        agent: &str,
        setting: AgentSetting,
        stamp: Stamp,
    ) -> impl Future<Output = Result<Filled>> + Send;

    /// Ends a hold-back; free slots are given to its queue, then to the pool's. Not held back: nothing happens.
    fn reopen(&self, pool: &str, agent: &str, stamp: Stamp) -> impl Future<Output = Result<Filled>> + Send;

    /// The agent left the pool by the event `setting_seq`: closes it, and takes out what it has, at most [`PAGE`] a call.
    fn remove_agent(
        &self,
        pool: &str,
        agent: &str,
        setting_seq: u64,
        stamp: Stamp,
    ) -> impl Future<Output = Result<Removed>> + Send;

    /// Gives the agent's free slots to its queue, then to the pool's: a repair, the end of a rebuild, or the rest of a batch.
    fn promote(&self, pool: &str, agent: &str, stamp: Stamp) -> impl Future<Output = Result<Filled>> + Send;

    /// One agent, with at most `limit` slots and places. Longer than [`PAGE`] it is not of one moment.
    fn inspect(
        &self,
        pool: &str,
        agent: &str,
        limit: usize,
    ) -> impl Future<Output = Result<AgentView>> + Send;

    /// The pool's queue, with at most `limit` places. Longer than [`PAGE`] it is not of one moment.
    fn inspect_pool(&self, pool: &str, limit: usize) -> impl Future<Output = Result<PoolView>> + Send;

    /// All slots and places of a pool, page by page, starting with `None`.
    fn scan(&self, pool: &str, from: Option<ScanCursor>) -> impl Future<Output = Result<ScanPage>> + Send;

    /// What was admitted or promoted before `before_ms` (exclusive) and never confirmed, oldest first, at most `limit`
    /// (capped at [`PAGE`]).
    fn unconfirmed(
        &self,
        pool: &str,
        before_ms: u64,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<Unconfirmed>>> + Send;

    /// Open agents with a free slot although work waits that could take it, sorted: each is a case for [`promote`](Self::promote).
    fn waiting_with_free(&self, pool: &str) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// All agents of the pool that have a setting, a slot or a queue (also those that moved away), sorted.
    fn agents(&self, pool: &str) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Starts a new life of the pool: wipes it and refuses everything until the commit. The later of two wins.
    fn rebuild_begin(&self, pool: &str, now_ms: u64) -> impl Future<Output = Result<Epoch>> + Send;

    /// Loads some of the pool, in batches inside. [`Error::Stale`]: another rebuild began; [`Error::NotReady`]: wiped meanwhile.
    fn rebuild_load(
        &self,
        pool: &str,
        epoch: &Epoch,
        items: &[Load],
    ) -> impl Future<Output = Result<()>> + Send;

    /// The pool is complete as of `stamp.log_seq` and usable. Repeating it is fine. Errors as in `rebuild_load`.
    fn rebuild_commit(
        &self,
        pool: &str,
        epoch: &Epoch,
        stamp: Stamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// The pool's record as it is now; `None`: never begun, or wiped.
    fn meta(&self, pool: &str) -> impl Future<Output = Result<Option<Meta>>> + Send;

    /// The pools that were ever begun (since the last wipe), sorted.
    fn pools(&self) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Answers when Redis does.
    fn ping(&self) -> impl Future<Output = Result<()>> + Send;
}
