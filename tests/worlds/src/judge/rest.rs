//! What a world has to come to once nothing goes wrong any more.

use rollcall_capacity::Capacity;
use rollcall_core::{
    AgentId, Timestamp,
    agent::{Agent, Status},
    event::EventBody,
};

use crate::{
    exec::at_once,
    stage::{POOL, Stage},
};

/// What is not as it has to be, and the invariant that says so. Nothing is excused: not for capacity that was lost, moved
/// back or changed, nor for whatever an instance was told before.
pub(crate) fn restless(stage: &Stage) -> Option<(u8, String)> {
    instances(stage).or_else(|| capacity(stage))
}

/// An agent as the log has it.
fn logged(stage: &Stage, id: &AgentId) -> Agent {
    let mut agent = Agent::unknown(id.clone());
    for entry in stage.log.borrow().history(&stage.subjects.agent_event(id)) {
        if let EventBody::Agent(event) = &entry.event.body {
            let time: Timestamp = entry.event.time;
            agent.evolve(entry.seq, event, time);
        }
    }
    agent
}

/// Everybody who lives is the one that counts and is said to be well, or to drain as somebody wants; and holds nothing, as
/// everything has ended.
fn instances(stage: &Stage) -> Option<(u8, String)> {
    let instances = stage.instances.borrow();
    for instance in instances.iter().filter(|instance| instance.alive) {
        let id = &instance.id;
        if let Some(key) = instance.claims_left().next() {
            return Some((8, format!("{id} still holds {key}, which has ended")));
        }
        let agent = logged(stage, &instance.agent);
        if agent.instance_id.as_ref() != Some(id) || agent.is_past(id) {
            return Some((8, format!("{id} lives and does not count, and has not left")));
        }
        let drained = agent.operator_drain.is_some() || agent.instance_drain.is_some();
        match agent.status {
            Some(Status::Connected) if !drained => {}
            Some(Status::Draining) if drained => {}
            status => {
                let what = format!("{id} lives and is {status:?} by the log, drained: {drained}");
                return Some((8, what));
            }
        }
    }
    None
}

/// Capacity holds nothing, and knows of every agent what the log says.
fn capacity(stage: &Stage) -> Option<(u8, String)> {
    let capacity = stage.capacity.handle();
    let unconfirmed = at_once(capacity.unconfirmed(POOL, u64::MAX >> 11, 1));
    let idle = at_once(capacity.waiting_with_free(POOL));
    match (unconfirmed, idle) {
        (Ok(unconfirmed), Ok(idle)) if unconfirmed.is_empty() && idle.is_empty() => {}
        found => return Some((4, format!("in capacity: {found:?}"))),
    }
    for id in at_once(capacity.agents(POOL)).unwrap_or_default() {
        let (Ok(agent), Ok(view)) = (AgentId::new(&id), at_once(capacity.inspect(POOL, &id, 1))) else {
            return Some((4, format!("{id} in capacity is nobody")));
        };
        let said = dispatcher::decide::setting(&logged(stage, &agent));
        let known = view.setting.map(|known| (known.capacity, known.open));
        if known != Some((said.capacity, said.open)) || view.held_count > 0 || view.queue_len > 0 {
            return Some((4, format!("{id} is {view:?} in capacity, and {said:?} by the log")));
        }
    }
    None
}
