//! Waiting for one agent's heartbeats: after a refusal, and when nobody knows what became of a dispatch. Only the
//! agents concerned are listened to.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rollcall_capacity::Capacity;
use rollcall_core::{
    AgentId, ExecutionId, Timestamp,
    execution::{Attempt, State},
    wire::{AgentState, Heartbeat},
};
use tokio::time::{Instant, timeout_at};

use crate::{
    decide::{self, Answer},
    launch::DISPATCH_ANSWER_TIMEOUT,
    shell::Dispatcher,
    state::TakeUpAges,
};

/// What the ordinary way of a dispatch or a cancellation may take beyond its agent's time to answer.
const TAKE_UP_MARGIN: Duration = Duration::from_secs(3);
/// The least of that, for fleets whose dispatch grace leaves no more: writing down what was answered, or that nothing was.
const TAKE_UP_MARGIN_MIN: Duration = Duration::from_millis(500);
/// How often such a wait looks at the log's fold when no heartbeat comes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Who is being waited for, so that one wait serves everybody.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    reopening: Mutex<HashSet<AgentId>>,
    /// A dispatch is known by when it was made: one attempt can be dispatched again, to another agent.
    unknown: Mutex<HashSet<(ExecutionId, u32, Timestamp)>>,
    cancelling: Mutex<HashSet<(ExecutionId, u32)>>,
}

impl Waits {
    /// Whether this is the only wait for the end of this attempt; if so, it has begun.
    pub(crate) fn begin_cancel(&self, id: &ExecutionId, attempt: u32) -> bool {
        locked(&self.cancelling).insert((id.clone(), attempt))
    }

    /// Whether this is the only wait for the answer to this dispatch; if so, it has begun.
    fn begin_unknown(&self, id: &ExecutionId, held: &Attempt) -> bool {
        locked(&self.unknown).insert((id.clone(), held.number, held.dispatched_at))
    }

    /// It is over.
    fn end_unknown(&self, id: &ExecutionId, held: &Attempt) {
        locked(&self.unknown).remove(&(id.clone(), held.number, held.dispatched_at));
    }

    /// It is over.
    pub(crate) fn end_cancel(&self, id: &ExecutionId, attempt: u32) {
        locked(&self.cancelling).remove(&(id.clone(), attempt));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The sets are changed by single calls: a panic can't have left them half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dispatcher {
    /// Offers an agent work again after its next heartbeat.
    pub(crate) fn spawn_reopen(self: &Arc<Self>, agent: AgentId) {
        if !locked(&self.waits.reopening).insert(agent.clone()) {
            return;
        }
        let dispatcher = Arc::clone(self);
        self.spawn(async move {
            dispatcher.wait_to_reopen(&agent).await;
            locked(&dispatcher.waits.reopening).remove(&agent);
            let Some(known) = dispatcher.ledger.agent(&agent) else { return };
            let pool = known.pool();
            let filled = dispatcher
                .in_redis(&pool, "reopen", || {
                    dispatcher.capacity.reopen(pool.as_str(), agent.as_str(), dispatcher.stamp())
                })
                .await;
            if let Some(filled) = filled {
                dispatcher.spawn_launches(&pool, filled.promoted);
                if filled.more {
                    dispatcher.promote(&pool, agent.as_str()).await;
                }
            }
        });
    }

    /// Until the agent's current instance beats and takes work, or is replaced. One of the agents file never beats and
    /// refuses nothing: what went back from it did so because it was closed, so it waits until it takes work.
    async fn wait_to_reopen(&self, agent: &AgentId) {
        let instance = self.ledger.agent(agent).and_then(|a| a.instance_id);
        let Ok(mut beats) = self.bus.subscribe(self.subjects.heartbeat(agent)).await else { return };
        while !self.cancel.is_cancelled() {
            let until = Instant::now() + LOOK_AGAIN;
            if let Ok(Some(message)) = timeout_at(until, futures_next(&mut beats)).await
                && let Ok(beat) = Heartbeat::read(agent.as_str(), &message.payload)
                && instance.as_ref().is_none_or(|i| *beat.instance_id == *i.as_str())
                && matches!(beat.state, AgentState::Ready | AgentState::Busy)
            {
                return;
            }
            let known = self.ledger.agent(agent);
            if known.as_ref().is_some_and(|a| a.is_from_file() && a.takes_work()) {
                return;
            }
            // A new instance has refused nothing.
            if known.and_then(|a| a.instance_id) != instance {
                return;
            }
        }
    }

    /// How old a dispatch or a cancellation must be before whoever looks takes it up, whoever began it.
    pub(crate) fn take_up_ages(&self) -> TakeUpAges {
        take_up_ages(self.settings.dispatch_grace, self.terminate_timeout())
    }

    /// Takes up dispatches and cancellations that are old enough, as their dispatcher may have died: agents take a repeated
    /// request for the same one.
    pub(crate) fn take_up(self: &Arc<Self>) {
        let now = self.ledger.now();
        for (id, state, held) in self.ledger.read(|p| p.unanswered(now, self.take_up_ages())) {
            match state {
                State::Cancelling => self.spawn_cancel(id, held.number),
                _ => self.spawn_settle_unknown(id, held),
            }
        }
    }

    /// Settles a dispatch that was not answered, by the agent's heartbeats. The same dispatch may be sent again to the
    /// same instance: it runs once. It ends at the latest when the watchdog calls it lost.
    pub(crate) fn spawn_settle_unknown(self: &Arc<Self>, id: ExecutionId, held: Attempt) {
        if !self.waits.begin_unknown(&id, &held) {
            return;
        }
        let dispatcher = Arc::clone(self);
        self.spawn(async move {
            dispatcher.settle_unknown(&id, &held).await;
            dispatcher.waits.end_unknown(&id, &held);
        });
    }

    async fn settle_unknown(self: &Arc<Self>, id: &ExecutionId, held: &Attempt) {
        let Ok(mut beats) = self.bus.subscribe(self.subjects.heartbeat(&held.agent_id)).await else { return };
        while !self.cancel.is_cancelled() {
            let until = Instant::now() + LOOK_AGAIN;
            let message = timeout_at(until, futures_next(&mut beats)).await.ok().flatten();
            let Some(execution) = self.ledger.execution(id) else { return };
            if !decide::is_in_dispatch(&execution, held) {
                return;
            }
            let Some(message) = message else { continue };
            let Ok(beat) = Heartbeat::read(held.agent_id.as_str(), &message.payload) else { continue };
            if *beat.instance_id != *held.instance_id.as_str() {
                continue;
            }
            let listed = beat.executions.iter().any(|c| *c.id == *id.as_str() && c.attempt == held.number);
            let answer = if listed { Answer::Accepted } else { self.ask_again(execution, held).await };
            if answer == Answer::Unknown {
                continue;
            }
            if let Err(error) = self.answered(id, held, answer).await {
                tracing::warn!(execution_id = %id, %error, "could not write down what became of a dispatch");
                continue;
            }
            return;
        }
    }
}

/// Each is what its ordinary way takes at most. A dispatch does not wait for what work is given to end, nor, if that can be, beyond a
/// quarter of the grace after which the watchdog calls it lost: the rest is for a dispatcher to start, to hear its agent, and
/// to ask.
fn take_up_ages(dispatch_grace: Duration, terminate_timeout: Duration) -> TakeUpAges {
    let margin = (dispatch_grace / 4).saturating_sub(DISPATCH_ANSWER_TIMEOUT);
    let margin = margin.clamp(TAKE_UP_MARGIN_MIN, TAKE_UP_MARGIN);
    let ms = |age: Duration| u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    TakeUpAges {
        dispatch_ms: ms(DISPATCH_ANSWER_TIMEOUT + margin),
        cancel_ms: ms(terminate_timeout + TAKE_UP_MARGIN),
    }
}

/// The next message of a subscription.
async fn futures_next(beats: &mut rollcall_nats::Subscriber) -> Option<rollcall_nats::Message> {
    use futures_util::StreamExt as _;
    beats.next().await
}

#[cfg(test)]
mod tests {
    use rollcall_core::InstanceId;

    use super::*;

    #[test]
    fn a_dispatch_is_taken_up_long_before_it_is_called_lost() {
        let after = |grace_ms| take_up_ages(Duration::from_millis(grace_ms), Duration::from_secs(12));
        assert_eq!(after(60_000), TakeUpAges { dispatch_ms: 5_000, cancel_ms: 15_000 });
        assert_eq!(after(12_000), TakeUpAges { dispatch_ms: 3_000, cancel_ms: 15_000 });
        // Never while its agent may still answer whoever asked.
        assert_eq!(after(2_000), TakeUpAges { dispatch_ms: 2_500, cancel_ms: 15_000 });
    }

    #[test]
    fn each_dispatch_of_an_attempt_has_its_own_wait() {
        let waits = Waits::default();
        let id = ExecutionId::new("x").unwrap();
        let attempt = |agent: &str, at_ms: i64| Attempt {
            number: 1,
            agent_id: AgentId::new(agent).unwrap(),
            instance_id: InstanceId::new("i").unwrap(),
            dispatched_at: Timestamp::from_millis(at_ms),
            started_at: None,
            deadline: Timestamp::from_millis(at_ms + 1),
            timeout_ms: 1,
            reports: Vec::new(),
            recovered: None,
        };
        let (first, second) = (attempt("a", 1), attempt("b", 2));
        assert!(waits.begin_unknown(&id, &first));
        assert!(!waits.begin_unknown(&id, &first), "one wait serves everybody");
        assert!(waits.begin_unknown(&id, &second), "it waits for another agent");
        waits.end_unknown(&id, &first);
        assert!(!waits.begin_unknown(&id, &second), "the end of one is not the end of the other");
    }
}
