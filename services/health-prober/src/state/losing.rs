//! Work that an agent loses, and when that is too much.
//!
//! Each loss counts against the instance that had it. What one and the same end of an instance took counts once against
//! those that come after it, however much it held: a host that loses its power takes everything with it, and its successor
//! has done nothing wrong. One instance after another that ends and takes work with it is quarantined all the same.

use rollcall_core::event::RecoveryReason;
use rollcall_core::{AgentId, InstanceId, Timestamp};

use super::{Known, remember};

/// Losses within [`LOSS_WINDOW_MS`] that quarantine an agent (PROTOCOL.md 5).
pub const LOSSES_MAX: usize = 5;
/// Ten minutes (PROTOCOL.md 5); also how long without a loss lifts a quarantine.
pub const LOSS_WINDOW_MS: u64 = 600_000;

/// An agent lost an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// The agent.
    pub agent_id: AgentId,
    /// The instance that held it.
    pub instance_id: InstanceId,
    /// How.
    pub reason: RecoveryReason,
    /// It was handed back.
    pub returned: bool,
    /// With `agent_lost`: since when the instance was silent, if the event says so.
    pub silent_since: Option<Timestamp>,
    /// When it was recovered.
    pub time: Timestamp,
}

/// A loss that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Counted {
    /// The last of them.
    pub(super) at: Timestamp,
    /// How many, of one incident.
    times: u32,
    /// What its instance's end or silence took with it; boxed, since most losses have none.
    incident: Option<Box<Incident>>,
}

/// An instance ended, or was silent for too long.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Incident {
    instance_id: InstanceId,
    /// It is over with the instance: whatever this one still lost was lost by that.
    is_end: bool,
    silent_since: Option<Timestamp>,
}

impl Incident {
    fn of(loss: &Loss) -> Option<Self> {
        let is_end = match loss.reason {
            RecoveryReason::AgentRestarted | RecoveryReason::AgentGone => true,
            RecoveryReason::AgentLost => false,
            RecoveryReason::Orphaned
            | RecoveryReason::TimedOut
            | RecoveryReason::Stalled
            | RecoveryReason::DispatchLost
            | RecoveryReason::Stale => return None,
        };
        let silent_since = loss.silent_since.filter(|_| !is_end);
        Some(Self { instance_id: loss.instance_id.clone(), is_end, silent_since })
    }

    /// Another loss of the same incident: a silence often turns out to have been the end. One instance may be silent more
    /// than once, and each time counts.
    fn includes(&self, other: &Self) -> bool {
        self.instance_id == other.instance_id
            && (self.is_end || other.is_end || self.silent_since == other.silent_since)
    }
}

impl Known {
    /// It lost work. Timeouts are the work's fault, and work handed back is not lost.
    pub fn lose(&mut self, loss: &Loss) {
        let troubles = self.troubles();
        if loss.reason == RecoveryReason::TimedOut
            || loss.returned
            || loss.time <= troubles.quarantine_changed_at
        {
            return;
        }
        let incident = Incident::of(loss).map(Box::new);
        let known = |counted: &Counted| match (&counted.incident, &incident) {
            (Some(counted), Some(incident)) => counted.includes(incident),
            _ => false,
        };
        match troubles.losses.iter().position(known) {
            Some(place) => {
                let counted = &mut troubles.losses[place];
                counted.at = counted.at.max(loss.time);
                counted.times = counted.times.saturating_add(1);
            }
            None => remember(&mut troubles.losses, Counted { at: loss.time, times: 1, incident }, LOSSES_MAX),
        }
    }

    /// The current instance is another one than all those that were quarantined for what they lost, and they did not lose it
    /// again and again.
    #[must_use]
    pub fn is_forgiven(&self) -> bool {
        let Some(troubles) = self.troubles.as_deref() else { return true };
        let registered_at = self.agent.registered_at.unwrap_or_default();
        registered_at > troubles.quarantine_changed_at && troubles.losses.len() < LOSSES_MAX
    }

    /// Losses within the window that ends now.
    #[must_use]
    pub fn losses(&self, now: Timestamp) -> usize {
        let all = self.troubles.as_deref().map_or(&[][..], |troubles| &troubles.losses);
        let recent = all.iter().filter(|loss| self.age_ms(loss.at, now) < LOSS_WINDOW_MS);
        recent.map(|loss| self.weight(loss)).sum()
    }

    /// What one incident counts: all that it took against the instance that had it, once against its successors.
    fn weight(&self, counted: &Counted) -> usize {
        let own = |incident: &Incident| self.agent.instance_id.as_ref() == Some(&incident.instance_id);
        if counted.incident.as_deref().is_some_and(own) { counted.times as usize } else { 1 }
    }

    /// When good behaviour lifts a quarantine.
    #[must_use]
    pub fn release_due(&self) -> Timestamp {
        let Some(troubles) = self.troubles.as_deref() else {
            return self.old_at(Timestamp::default(), LOSS_WINDOW_MS);
        };
        let last = troubles.losses.iter().map(|loss| loss.at).max().unwrap_or_default();
        self.old_at(last.max(troubles.quarantine_changed_at), LOSS_WINDOW_MS)
    }
}
