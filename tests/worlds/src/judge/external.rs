//! Work with external delivery: the event is the grant. It is never put to its agent by us, given once, and not taken back.

use std::collections::BTreeSet;

use rollcall_core::{ExecutionId, event::ExecutionEvent};

use super::{Verdict, broken};
use crate::{stage::Stage, truth::Truth};

/// An audit finds a slot that capacity does not know of after this: its interval, and a cut.
const UNSEEN_MS: u64 = 30_000;

pub(super) fn external(stage: &Stage) -> Verdict {
    if let Some((at, agent, id, attempt)) =
        stage.truth.borrow().asked.iter().find(|(_, _, id, _)| stage.is_external(id))
    {
        return Err(broken(
            1,
            format!("at {at} ms {agent} is asked to take {id}:{attempt}, which is external"),
        ));
    }
    let mut granted: BTreeSet<(&ExecutionId, u32)> = BTreeSet::new();
    let log = stage.log.borrow();
    for entry in log.entries() {
        match entry.execution() {
            Some(ExecutionEvent::Dispatched(held)) if stage.is_external(&held.execution_id) => {
                let (id, attempt) = (&held.execution_id, held.attempt);
                if !granted.insert((id, attempt)) {
                    return Err(broken(1, format!("{id}:{attempt} is external and was granted twice")));
                }
            }
            Some(ExecutionEvent::Queued(back)) if granted.contains(&(&back.execution_id, back.attempt)) => {
                let (id, attempt) = (&back.execution_id, back.attempt);
                return Err(broken(1, format!("{id}:{attempt} is external and was taken back")));
            }
            _ => {}
        }
    }
    Ok(())
}

impl Truth {
    /// A grant to an orchestrator that capacity knows nothing of at that moment, for one of two reasons that PROTOCOL.md and
    /// OPERATIONS.md name: capacity was lost between the slot and the event that is the grant, and somebody else got that
    /// slot; or it went back behind the event, which nobody tells whoever did nothing there meanwhile, until an audit.
    pub(super) fn overlooks(&self, id: &ExecutionId, attempt: u32, at: u64) -> bool {
        let Some((from, until)) = self.granted.get(&(id.clone(), attempt)) else { return false };
        let until = until.unwrap_or(from + UNSEEN_MS);
        let mut lost = self.moved_back.iter().chain(&self.wiped);
        lost.any(|lost| (*from..=until).contains(lost))
            || self.moved_back.iter().any(|back| (*from..=at).contains(back) && at - back < UNSEEN_MS)
    }
}
