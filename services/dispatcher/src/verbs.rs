//! The API: each verb reads its request, decides, and answers with where things stand.

use std::{future::Future, sync::Arc};

use bytes::Bytes;
use rollcall_capacity::Capacity;
use rollcall_core::{
    Pool,
    execution::{Execution, ReportFacts, Standing},
    subject::PayloadKind,
    wire::{
        ApiError, CancelRequest, CapacityRequest, ErrorCode, ExecutionReply, ExecutionRequest, ExecutionView,
        ExecutionsRequest, LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX, ReleaseRequest, read_object,
    },
};
use rollcall_nats::{ApiHandle, ApiOptions, ApiServer, SubscribeError};
use serde::Serialize;

use crate::{ledger::DecideError, list, payload::store_error, shell::Dispatcher};

/// Requests answered at once. A submission may wait for its agent for two seconds.
const IN_FLIGHT_MAX: usize = 2048;
/// Reason of a cancellation that names none.
const NO_REASON: &str = "cancelled by request";

fn written<T: Serialize>(answer: &T) -> Result<Bytes, ApiError> {
    serde_json::to_vec(answer)
        .map(Bytes::from)
        .map_err(|e| ApiError::unavailable(format!("the answer could not be written: {e}")))
}

impl Dispatcher {
    /// Starts answering.
    pub(crate) async fn serve(self: &Arc<Self>) -> Result<ApiHandle, SubscribeError> {
        let mut options = ApiOptions::new("rollcall-dispatcher", env!("CARGO_PKG_VERSION"));
        options.description = "admits, dispatches and settles executions".to_owned();
        options.max_in_flight = IN_FLIGHT_MAX;
        ApiServer::new(&self.bus, options)
            .verb(
                "submit",
                self.answering(|d, body| async move { written(&Box::pin(d.submit(&body)).await?) }),
            )
            .verb("cancel", self.answering(|d, body| async move { written(&d.cancel_verb(&body).await?) }))
            .verb("retry", self.answering(|d, body| async move { written(&d.retry_verb(&body).await?) }))
            .verb("release", self.answering(|d, body| async move { written(&d.release_verb(&body).await?) }))
            .verb(
                "execution",
                self.answering(|d, body| async move { written(&d.execution_verb(&body).await?) }),
            )
            .verb(
                "executions",
                self.answering(|d, body| async move { written(&d.executions_verb(&body).await?) }),
            )
            .verb(
                "capacity",
                self.answering(|d, body| async move { written(&d.capacity_verb(&body).await?) }),
            )
            .start()
            .await
    }

    /// A handler that waits for the start-up reconcile first, and puts errors the API's way.
    fn answering<F, Fut>(
        self: &Arc<Self>,
        verb: F,
    ) -> impl Fn(
        rollcall_nats::ApiRequest,
    ) -> futures_util::future::BoxFuture<'static, Result<Bytes, rollcall_nats::ApiError>>
    + Send
    + Sync
    + 'static
    where
        F: Fn(Arc<Self>, Bytes) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Bytes, ApiError>> + Send + 'static,
    {
        let dispatcher = Arc::clone(self);
        move |request| {
            let dispatcher = Arc::clone(&dispatcher);
            let ready = dispatcher.is_ready();
            let answer = verb(dispatcher, request.payload);
            Box::pin(async move {
                if !ready {
                    return Err(ApiError::not_ready("the dispatcher is reconciling with the log").into());
                }
                answer.await.map_err(Into::into)
            })
        }
    }

    async fn known(&self, id: &rollcall_core::ExecutionId) -> Result<Execution, ApiError> {
        self.fresh(id)
            .await?
            .ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("there is no execution {id}")))
    }

    async fn cancel_verb(self: &Arc<Self>, body: &[u8]) -> Result<ExecutionReply, ApiError> {
        let request: CancelRequest = read_object("cancel", body)?;
        let reason = request.reason.filter(|r| !r.is_empty()).unwrap_or_else(|| NO_REASON.to_owned());
        let known = self.known(&request.execution_id).await?;
        use rollcall_core::execution::State;
        if matches!(known.state, State::Cancelling | State::Cancelled) {
            return Ok(self.reply_for(&known).await);
        }
        let change = match self.ledger.decide(&request.execution_id, |e| e.cancel(&reason, "api")).await {
            Ok(change) => change,
            Err(refused @ DecideError::Refused(_)) => {
                // Somebody cancelled it at the same time: that is what this one wanted.
                let now = self.known(&request.execution_id).await?;
                return match now.state {
                    State::Cancelling | State::Cancelled => Ok(self.reply_for(&now).await),
                    _ => Err(refused.into()),
                };
            }
            Err(error) => return Err(error.into()),
        };
        self.carry_out(&change).await;
        Ok(self.reply_for(&change.after).await)
    }

    async fn retry_verb(self: &Arc<Self>, body: &[u8]) -> Result<ExecutionReply, ApiError> {
        let request: ExecutionRequest = read_object("retry", body)?;
        self.known(&request.execution_id).await?;
        let change = self.ledger.decide(&request.execution_id, |e| e.retry("api")).await?;
        self.carry_out(&change).await;
        let now = self.ledger.execution(&request.execution_id).unwrap_or(change.after);
        Ok(self.reply_for(&now).await)
    }

    async fn release_verb(self: &Arc<Self>, body: &[u8]) -> Result<ExecutionReply, ApiError> {
        let request: ReleaseRequest = read_object("release", body)?;
        let id = request.execution_id.clone();
        let known = self.known(&id).await?;
        if !known.is_external() {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("execution {id} has delivery push: its agent reports"),
            ));
        }
        let Some(attempt) = known.attempt_numbered(request.attempt).cloned() else {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("attempt {} of execution {id} was never granted", request.attempt),
            ));
        };
        match known.standing(&attempt.agent_id, request.attempt, request.outcome) {
            Standing::Duplicate => return Ok(self.reply_for(&known).await),
            Standing::Refused(why) => return Err(ApiError::new(ErrorCode::Conflict, why)),
            _ => {}
        }
        let result = match request.result {
            Some(raw) => {
                let bytes = Bytes::from(String::from(Box::<str>::from(raw)));
                let stored = self.store(&id, PayloadKind::Result, request.attempt, bytes).await;
                Some(stored.map_err(|e| store_error(&e))?)
            }
            None => None,
        };
        let facts = ReportFacts {
            agent_id: attempt.agent_id,
            instance_id: attempt.instance_id,
            attempt: request.attempt,
            outcome: request.outcome,
            result,
            checkpoint: None,
            error: request.error,
        };
        self.wait_for_who_asked(&known, request.attempt, request.outcome).await;
        let refused = |e: &Execution| rollcall_core::execution::Refusal::State(e.state.as_str());
        let change =
            match self.ledger.decide(&id, |e| e.report(facts.clone()).ok_or_else(|| refused(e))).await {
                Ok(change) => change,
                // Somebody released it with the same outcome at the same time.
                Err(DecideError::Refused(_)) => return Ok(self.reply_for(&self.known(&id).await?).await),
                Err(error) => return Err(error.into()),
            };
        self.carry_out(&change).await;
        let before = change.before.as_ref();
        if before.is_some_and(|b| b.state == change.after.state && b.attempt == change.after.attempt) {
            // Recorded as a late result and applied to nothing: whoever released it is told why.
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "attempt {} no longer counts: the execution is {} in attempt {}",
                    request.attempt,
                    change.after.state.as_str(),
                    change.after.attempt
                ),
            ));
        }
        Ok(self.reply_for(&change.after).await)
    }

    async fn execution_verb(self: &Arc<Self>, body: &[u8]) -> Result<ExecutionView, ApiError> {
        let request: ExecutionRequest = read_object("execution", body)?;
        let known = self.known(&request.execution_id).await?;
        let mut view = known.view();
        view.position = self.position_of(&known).await;
        if let Some(stored) = &known.result {
            let bytes = self.stored(stored).await.map_err(ApiError::unavailable)?;
            let raw = serde_json::from_slice(&bytes)
                .map_err(|e| ApiError::unavailable(format!("the stored result is no JSON: {e}")))?;
            view.result = Some(raw);
        }
        Ok(view)
    }

    async fn executions_verb(self: &Arc<Self>, body: &[u8]) -> Result<list::Page, ApiError> {
        let request: ExecutionsRequest =
            if body.is_empty() { ExecutionsRequest::default() } else { read_object("executions", body)? };
        let limit = request.limit.unwrap_or(LIST_LIMIT_DEFAULT);
        if limit == 0 || limit > LIST_LIMIT_MAX {
            return Err(ApiError::bad_request(format!(
                "executions: limit is {limit}, not within 1..{LIST_LIMIT_MAX}"
            )));
        }
        self.ledger.current().await.map_err(|e| ApiError::unavailable(e.to_string()))?;
        Ok(self.ledger.read(|projection| list::page(projection, &request, limit)))
    }

    async fn capacity_verb(self: &Arc<Self>, body: &[u8]) -> Result<serde_json::Value, ApiError> {
        let request: CapacityRequest = read_object("capacity", body)?;
        match (&request.agent_id, &request.pool) {
            (Some(agent_id), None) => self.agent_capacity(agent_id).await,
            (None, Some(pool)) => self.pool_capacity(pool).await,
            _ => Err(ApiError::bad_request("capacity: name an agent_id or a pool")),
        }
    }

    async fn agent_capacity(
        self: &Arc<Self>,
        id: &rollcall_core::AgentId,
    ) -> Result<serde_json::Value, ApiError> {
        let fresh = self.ledger.fresh_agent(id).await.map_err(|e| ApiError::unavailable(e.to_string()))?;
        let Some(agent) = fresh else {
            return Err(ApiError::new(ErrorCode::UnknownAgent, format!("agent {id} was never heard of")));
        };
        let pool = agent.pool();
        let view = self
            .inspected(&pool, || self.capacity.inspect(pool.as_str(), id.as_str(), LIST_LIMIT_MAX))
            .await?;
        let held: Vec<_> = view
            .held
            .iter()
            .map(|slot| serde_json::json!({"execution_id": slot.hold.execution_id, "attempt": slot.hold.attempt,
                "granted_at": rollcall_core::Timestamp::from_millis(i64::try_from(slot.granted_at_ms).unwrap_or(i64::MAX))}))
            .collect();
        Ok(serde_json::json!({
            "agent_id": id, "pool": pool, "capacity": agent.capacity(), "open": agent.takes_work() && !view.held_back,
            "held": held, "held_count": view.held_count,
            "free": u64::from(agent.capacity()).saturating_sub(view.held_count), "queue": queue_rows(&view.queue), "queued": view.queue_len,
        }))
    }

    async fn pool_capacity(self: &Arc<Self>, pool: &Pool) -> Result<serde_json::Value, ApiError> {
        self.ledger.current().await.map_err(|e| ApiError::unavailable(e.to_string()))?;
        if !self.ledger.read(|projection| projection.pools().contains(pool)) {
            // Nothing is kept for a pool that nobody is in and nothing waits for, so Redis is not asked, which would begin it.
            return Ok(serde_json::json!({
                "pool": pool, "capacity": 0, "held_count": 0, "agents": [],
                "queue": [], "queued": 0, "free_agents": 0,
            }));
        }
        let agents: Vec<(String, u32)> = self.ledger.read(|projection| {
            projection
                .agents()
                .filter(|a| a.pool() == *pool)
                .map(|a| (a.id.as_str().to_owned(), a.capacity()))
                .collect()
        });
        let queue =
            self.inspected(pool, || self.capacity.inspect_pool(pool.as_str(), LIST_LIMIT_MAX)).await?;
        let (mut held, mut capacity, mut rows) = (0, 0, Vec::new());
        for (agent, slots) in &agents {
            let view = self.inspected(pool, || self.capacity.inspect(pool.as_str(), agent, 0)).await?;
            held += view.held_count;
            capacity += u64::from(*slots);
            rows.push(serde_json::json!({"agent_id": agent, "capacity": slots, "held_count": view.held_count, "queued": view.queue_len}));
        }
        Ok(serde_json::json!({
            "pool": pool, "capacity": capacity, "held_count": held, "agents": rows,
            "queue": queue_rows(&queue.queue), "queued": queue.queue_len, "free_agents": queue.free_agents,
        }))
    }

    async fn inspected<T, F, Fut>(self: &Arc<Self>, pool: &Pool, look: F) -> Result<T, ApiError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = rollcall_capacity::Result<T>>,
    {
        match look().await {
            Err(error) if error.wants_rebuild() => {
                self.rebuild(pool).await.map_err(|e| ApiError::not_ready(e.to_string()))?;
                look().await.map_err(|e| ApiError::unavailable(e.to_string()))
            }
            other => other.map_err(|e| ApiError::unavailable(e.to_string())),
        }
    }
}

fn queue_rows(queue: &[rollcall_capacity::QueuedHold]) -> Vec<serde_json::Value> {
    queue
        .iter()
        .map(|waiting| {
            serde_json::json!({"execution_id": waiting.hold.execution_id, "attempt": waiting.hold.attempt,
            "priority": waiting.priority.get(), "position": waiting.position})
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rollcall_capacity::{Ask, Hold, Priority, Queue, Requeue};
    use rollcall_core::{
        AgentId, ExecutionId, InstanceId,
        event::{RecoveryReason, TerminateOutcome},
        execution::Loss,
        wire::Delivery,
    };
    use serde_json::json;

    use super::*;
    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_holds_and_what_waits_for_an_agent_is_told_in_its_order() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 2).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        let (redis, stamp) = (&dispatcher.capacity, dispatcher.stamp());
        let told = async || dispatcher.capacity_verb(br#"{"agent_id": "a"}"#).await.unwrap();
        assert_eq!(
            told().await,
            json!({"agent_id": "a", "pool": "p", "capacity": 2, "open": true, "held": [], "held_count": 0,
                "free": 2, "queue": [], "queued": 0})
        );
        redis.adopt("p", "a", &Hold::new("x", 3), 1_000, stamp).await.unwrap();
        assert_eq!(told().await["free"], 1);
        redis.adopt("p", "a", &Hold::new("over", 1), 2_000, stamp).await.unwrap();
        for (id, priority) in [("last", 9), ("first", 1)] {
            let ask = Ask { priority: Priority::new(priority).unwrap(), queue_depth: 9, external: true };
            redis.admit_to_agent("p", "a", &Hold::new(id, 1), ask, stamp).await.unwrap();
        }
        let now = told().await;
        assert_eq!(
            now["held"],
            json!([{"execution_id": "x", "attempt": 3, "granted_at": "1970-01-01T00:00:01.000Z"},
                {"execution_id": "over", "attempt": 1, "granted_at": "1970-01-01T00:00:02.000Z"}])
        );
        assert_eq!((&now["held_count"], &now["free"], &now["queued"]), (&json!(2), &json!(0), &json!(2)));
        assert_eq!(
            now["queue"],
            json!([{"execution_id": "first", "attempt": 1, "priority": 1, "position": 1},
                {"execution_id": "last", "attempt": 1, "priority": 9, "position": 2}])
        );
        // It refused one: it is offered nothing for now, with a slot free.
        let refused = Requeue {
            old: Hold::new("over", 1),
            new: Hold::new("over", 1),
            queue: Queue::Agent("a".to_owned()),
            priority: Priority::default(),
            hold_back: Some("a".to_owned()),
            granted_at_ms: None,
            granted_by_ms: None,
        };
        redis.requeue("p", &refused, stamp).await.unwrap();
        let now = told().await;
        assert_eq!((&now["open"], &now["free"], &now["queued"]), (&json!(false), &json!(1), &json!(3)));
        let unknown = dispatcher.capacity_verb(br#"{"agent_id": "b"}"#).await.unwrap_err();
        assert_eq!(unknown.code, ErrorCode::UnknownAgent);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_release_as_terminated_waits_for_the_verdict_that_asked_for_it() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        fixture.submitted("x", Some("a"), "p", Delivery::External).await;
        let (id, agent) = (ExecutionId::new("x").unwrap(), AgentId::new("a").unwrap());
        let (instance, now) = (InstanceId::new("i-1").unwrap(), dispatcher.ledger.now());
        // Out of time at once: the watchdog has its agent end it, and its orchestrator sees that first.
        dispatcher.ledger.decide(&id, |e| e.dispatch(1, &agent, &instance, 1, now)).await.unwrap();
        let body = br#"{"execution_id": "x", "attempt": 1, "outcome": "terminated"}"#;
        let mut release = std::pin::pin!(dispatcher.release_verb(body));
        tokio::time::timeout(Duration::from_millis(700), &mut release).await.unwrap_err();
        let loss = Loss {
            attempt: 1,
            reason: RecoveryReason::TimedOut,
            terminate: TerminateOutcome::Confirmed,
            detected_after_ms: 1,
            evidence: serde_json::Value::Null,
            message: String::new(),
            returned: false,
            checkpoint: None,
        };
        let recovered = |e: &Execution| e.lose(loss.clone());
        fixture.another().decide(&id, recovered).await.unwrap();
        let told = release.await.unwrap_err();
        assert_eq!(
            (told.code, told.message.contains("no longer counts")),
            (ErrorCode::Conflict, true),
            "{told:?}"
        );
        let ended = dispatcher.ledger.fresh_execution(&id).await.unwrap().unwrap();
        assert_eq!(ended.attempt_numbered(1).unwrap().recovered, Some(RecoveryReason::TimedOut));
    }
}
