//! Three views of the same rules: single cases, random commands (what services do) and random events (what
//! somebody who should not could write).

mod cases;
mod commands;
mod rogue;

use std::collections::HashSet;

use super::*;
use crate::samples;

const START: Timestamp = Timestamp::from_millis(1_700_000_000_000);
const TTL_MS: u64 = 1_000;

fn request(on_loss: OnLoss, max_attempts: u32, delivery: Delivery) -> Submitted {
    Submitted { on_loss, max_attempts, delivery, queue_ttl_ms: TTL_MS, ..samples::submitted() }
}

fn agent(n: u8) -> AgentId {
    AgentId::new(&format!("agent-{n}")).unwrap()
}

fn instance(n: u8) -> InstanceId {
    InstanceId::new(&format!("instance-{n}")).unwrap()
}

/// What has to hold of two neighbouring states, whoever wrote the event between them. `last_begun` is the last
/// attempt that was dispatched and not refused, and whether it was recovered: kept by the tests themselves.
fn check_step(
    before: &Execution,
    event: &ExecutionEvent,
    after: &Execution,
    last_begun: Option<(u32, bool)>,
) -> Result<(), String> {
    let is_late = matches!(event, ExecutionEvent::Completed(done) if done.late);
    let late_ok = |number: u32| last_begun == Some((number, true));
    if before.state.is_terminal() && before.state != after.state {
        let allowed = match event {
            ExecutionEvent::Retried(_) => {
                matches!(before.state, State::Failed | State::Expired | State::Quarantined)
                    && after.state == State::Queued
            }
            ExecutionEvent::Completed(done) => {
                is_late
                    && late_ok(done.attempt)
                    && matches!(before.state, State::Failed | State::Expired | State::Quarantined)
            }
            _ => false,
        };
        if !allowed {
            return Err(format!("{} left {:?} for {:?}", event.short_type(), before.state, after.state));
        }
    }
    if before.state == State::Cancelled && after.state != State::Cancelled {
        return Err("cancelled is not sticky".to_owned());
    }
    if before.state == State::Cancelling
        && !matches!(after.state, State::Cancelling | State::Cancelled | State::Completed)
    {
        return Err(format!("a cancellation was forgotten: {:?}", after.state));
    }
    if after.attempt < before.attempt && !(is_late && late_ok(after.attempt)) {
        return Err(format!("attempt fell from {} to {}", before.attempt, after.attempt));
    }
    if after.attempt > before.attempt + 1 {
        return Err(format!("attempt jumped from {} to {}", before.attempt, after.attempt));
    }
    if after.attempts.len() > ATTEMPTS_KEPT_MAX {
        return Err("attempts are not bounded".to_owned());
    }
    for attempt in &after.attempts {
        if attempt.reports.iter().collect::<HashSet<_>>().len() != attempt.reports.len() {
            return Err(format!("an outcome was noted twice: {:?}", attempt.reports));
        }
    }
    if after.state.holds_slot() != after.holder().is_some() {
        return Err(format!("{:?} and its holder disagree", after.state));
    }
    Ok(())
}

/// The last attempt that was begun and whether it was recovered, told by the accepted events alone.
#[derive(Default)]
struct Begun(Vec<(u32, bool)>);

impl Begun {
    fn last(&self) -> Option<(u32, bool)> {
        self.0.last().copied()
    }

    /// Notes an event that was accepted in `state`.
    fn note(&mut self, event: &ExecutionEvent, state: State) {
        match event {
            ExecutionEvent::Dispatched(dispatched) => self.0.push((dispatched.attempt, false)),
            ExecutionEvent::Queued(_) if state == State::Dispatching => {
                self.0.pop();
            }
            ExecutionEvent::Recovered(_) => {
                if let Some(last) = self.0.last_mut() {
                    last.1 = true;
                }
            }
            _ => {}
        }
    }
}

/// The execution without what a report that no longer counts may add to it.
fn without_notes(execution: &Execution) -> Execution {
    let mut bare = execution.clone();
    bare.seq = 0;
    for attempt in &mut bare.attempts {
        attempt.reports.clear();
    }
    bare
}
