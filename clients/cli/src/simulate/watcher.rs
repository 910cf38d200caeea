//! Reads the log and holds it against the truth.

use std::{collections::HashSet, sync::Arc};

use rollcall_core::{
    event::{AgentEvent, Event, EventBody},
    ids::AgentId,
};
use rollcall_nats::{Tail, TailError};
use tokio::sync::watch;

use super::{agent::World, plan::Plan, submitter::Submitter};

/// Entries read at once.
const BATCH_MAX: usize = 1000;

pub(crate) struct Watcher {
    tail: Tail,
    ours: HashSet<AgentId>,
    connected: HashSet<AgentId>,
    count: watch::Sender<usize>,
    unreadable: u64,
}

impl Watcher {
    pub(crate) fn new(tail: Tail, plan: &Plan) -> Self {
        let ours = plan.agents().iter().map(|agent| agent.id.clone()).collect();
        Self { tail, ours, connected: HashSet::new(), count: watch::Sender::new(0), unreadable: 0 }
    }

    /// How many of our agents were connected so far.
    pub(crate) fn connected(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    /// Reads until the run is over; returns how many entries were no events.
    pub(crate) async fn watch(
        mut self,
        world: Arc<World>,
        submitter: Arc<Submitter>,
    ) -> Result<u64, TailError> {
        loop {
            let batch = tokio::select! {
                () = world.over.cancelled() => return Ok(self.unreadable),
                batch = self.tail.next_batch(BATCH_MAX) => batch?,
            };
            for entry in batch.entries {
                match Event::decode(&entry.bytes) {
                    Ok(event) => self.told(&event, &world, &submitter),
                    Err(error) => {
                        self.unreadable += 1;
                        tracing::warn!(seq = entry.seq, %error, "an entry of the log is no event");
                    }
                }
            }
        }
    }

    fn told(&mut self, event: &Event, world: &World, submitter: &Submitter) {
        match &event.body {
            EventBody::Execution(body) => {
                let mut truth = world.truth();
                truth.told(body, event.time);
                let id = body.execution_id();
                let is_over = truth.has_ended(id);
                drop(truth);
                if is_over {
                    submitter.ended(id);
                }
            }
            EventBody::Agent(AgentEvent::Connected(change)) => {
                if self.ours.contains(&change.agent_id) && self.connected.insert(change.agent_id.clone()) {
                    self.count.send_replace(self.connected.len());
                }
            }
            EventBody::Agent(AgentEvent::Quarantined(mark)) if self.ours.contains(&mark.agent_id) => {
                tracing::warn!(agent = %mark.agent_id, reason = %mark.reason, "a simulated agent is quarantined");
            }
            EventBody::Agent(_) | EventBody::System(_) => {}
        }
    }
}
