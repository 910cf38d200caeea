//! Admission: reserve in Redis, store the input, write `submitted`, then launch or wait.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_capacity::{Admission, AgentSetting, Ask, Capacity, Hold, Outcome, Priority};
use rollcall_core::{
    ExecutionId, Pool,
    agent::Agent,
    event::Submitted,
    execution::Execution,
    subject::PayloadKind,
    wire::{
        ApiError, Delivery, ErrorCode, ExecutionReply, MAX_ATTEMPTS_DEFAULT, PRIORITY_DEFAULT, SubmitRequest,
    },
};
use rollcall_nats::AppendError;
use uuid::Uuid;

use crate::{decide, ledger::DecideError, payload, shell::Dispatcher};

/// What a full queue tells its caller to wait before trying again, in milliseconds.
const QUEUE_FULL_RETRY_MS: u64 = 5000;

/// How long a submission waits for Redis to hear of an agent.
const SEE_AGENT_MAX: Duration = Duration::from_secs(1);

impl Dispatcher {
    /// `submit`
    pub(crate) async fn submit(self: &Arc<Self>, bytes: &[u8]) -> Result<ExecutionReply, ApiError> {
        let request = SubmitRequest::read(bytes)?;
        let request_sha256 = fingerprint(&request)?;
        let id = match &request.execution_id {
            Some(id) => {
                if let Some(known) = self.fresh(id).await? {
                    return self.same_or_refused(&known, &request_sha256).await;
                }
                id.clone()
            }
            None => ExecutionId::new(&Uuid::now_v7().to_string())?,
        };
        let pool = self.pool_for(&request).await?;
        let hold = Hold::new(id.as_str(), 1);
        let mut admission = self.admit(&pool, &request, &hold).await?;
        if !admission.as_asked {
            // Reserved for another request with this id, of which nothing is in the log: that one came to nothing, or races
            // with this one and will find its reservation gone.
            self.give_back(&pool, &hold).await;
            admission = self.admit(&pool, &request, &hold).await?;
        }
        self.spawn_launches(&pool, admission.promoted.clone());
        if admission.outcome == Outcome::Full {
            let of =
                request.agent_id.as_ref().map_or_else(|| format!("pool {pool}"), |a| format!("agent {a}"));
            return Err(ApiError::retry_after(
                ErrorCode::QueueFull,
                format!("the queue of {of} is full ({} waiting)", self.settings.queue_depth),
                QUEUE_FULL_RETRY_MS,
            ));
        }
        let written = self.write_submission(&id, &pool, &request, &request_sha256).await;
        let execution = match written {
            Ok(Some(execution)) => execution,
            Ok(None) => return self.lost_the_race(&id, &pool, &hold, &request_sha256).await,
            Err(Unwritten { error, in_doubt }) => {
                // Nothing is in the log, so the reservation goes back at once. Where that is in doubt it stays
                // reserved, and the audit finds out.
                if !in_doubt {
                    self.give_back(&pool, &hold).await;
                }
                return Err(error);
            }
        };
        metrics::counter!("rollcall_submitted_total").increment(1);
        self.proceed(&pool, execution, admission).await
    }

    /// A written submission goes where its admission said.
    async fn proceed(
        self: &Arc<Self>,
        pool: &Pool,
        execution: Execution,
        admission: Admission,
    ) -> Result<ExecutionReply, ApiError> {
        let id = execution.id().clone();
        match admission.outcome {
            Outcome::Granted { grant, .. } => self.launch(pool, grant).await,
            Outcome::Queued { position, .. } => {
                match self.ledger.decide(&id, |e| e.queue(position, None)).await {
                    // Promoted, or even ended, in the meantime: all the better.
                    Ok(_) | Err(DecideError::Refused(_)) => {}
                    Err(error) => return Err(error.into()),
                }
                let hold = decide::hold(&execution, execution.attempt);
                let waits = self
                    .in_redis(pool, "confirm_queued", || {
                        self.capacity.confirm_queued(pool.as_str(), &hold, self.stamp())
                    })
                    .await;
                if waits == Some(false) {
                    self.find_place(pool, &execution).await;
                }
                let now = self.ledger.execution(&id).unwrap_or(execution);
                let mut reply = self.reply_for(&now).await;
                if now.state == rollcall_core::execution::State::Queued {
                    reply.position = reply.position.or(Some(position));
                }
                return Ok(reply);
            }
            Outcome::Full => {}
        }
        let now = self.ledger.execution(&id).unwrap_or(execution);
        Ok(self.reply_for(&now).await)
    }

    /// A submission that was promoted before it was in the log: its slot waits for it.
    async fn find_place(self: &Arc<Self>, pool: &Pool, execution: &Execution) {
        let hold = decide::hold(execution, execution.attempt);
        let ask = Ask {
            priority: decide::priority_of(execution),
            queue_depth: u32::MAX,
            external: execution.is_external(),
        };
        let admitted = self
            .in_redis(pool, "admit", || async {
                match &execution.request.agent_id {
                    Some(agent) => {
                        self.capacity
                            .admit_to_agent(pool.as_str(), agent.as_str(), &hold, ask, self.stamp())
                            .await
                    }
                    None => self.capacity.admit_to_pool(pool.as_str(), &hold, ask, self.stamp()).await,
                }
            })
            .await;
        let Some(admitted) = admitted else { return };
        self.spawn_launches(pool, admitted.promoted);
        if let Outcome::Granted { grant, .. } = admitted.outcome {
            self.launch(pool, grant).await;
        }
    }

    pub(crate) async fn fresh(&self, id: &ExecutionId) -> Result<Option<Execution>, ApiError> {
        self.ledger.fresh_execution(id).await.map_err(|e| ApiError::unavailable(e.to_string()))
    }

    /// The same request again is answered with what became of the first; another one is refused.
    async fn same_or_refused(&self, known: &Execution, sha256: &str) -> Result<ExecutionReply, ApiError> {
        if known.request.request_sha256 == sha256 {
            Ok(self.reply_for(known).await)
        } else {
            Err(ApiError::new(
                ErrorCode::AlreadyExists,
                format!("execution {} exists and was submitted with another body", known.id()),
            ))
        }
    }

    async fn pool_for(self: &Arc<Self>, request: &SubmitRequest) -> Result<Pool, ApiError> {
        let Some(agent_id) = &request.agent_id else { return Ok(request.pool.clone().unwrap_or_default()) };
        let agent = match self.ledger.agent(agent_id) {
            Some(agent) => Some(agent),
            None => {
                let fresh = self.ledger.fresh_agent(agent_id).await;
                fresh.map_err(|e| ApiError::unavailable(e.to_string()))?
            }
        };
        let Some(agent) = agent else {
            return Err(ApiError::new(
                ErrorCode::UnknownAgent,
                format!("agent {agent_id} was never heard of"),
            ));
        };
        if agent.is_from_file() && request.delivery != Some(Delivery::External) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "agent {agent_id} is described in the agents file and has no NATS: nothing can be dispatched \
                     to it. Submit with \"delivery\": \"external\" and start the work there yourself"
                ),
            ));
        }
        self.see_that_redis_knows(&agent).await;
        Ok(agent.pool())
    }

    /// An agent that has just been told that it is connected is given work, and does not see it queued because Redis, or our
    /// fold of the log, has yet to hear of that.
    async fn see_that_redis_knows(self: &Arc<Self>, agent: &Agent) {
        let knows = |agent: &Agent| {
            let setting = decide::setting(agent);
            let told = self.applied(&agent.id).and_then(|(_, told)| told);
            told.is_some_and(|told| AgentSetting { setting_seq: told.setting_seq, ..setting } == told)
        };
        if agent.takes_work() && knows(agent) {
            return;
        }
        let see = async {
            if let Ok(Some(fresh)) = self.ledger.fresh_agent(&agent.id).await
                && fresh.takes_work()
                && self.ledger.current().await.is_ok()
            {
                self.apply_agent(&agent.id).await;
            }
        };
        // Whatever goes wrong or takes long here, it waits for a moment in the queue.
        _ = tokio::time::timeout(SEE_AGENT_MAX, see).await;
    }

    async fn admit(
        self: &Arc<Self>,
        pool: &Pool,
        request: &SubmitRequest,
        hold: &Hold,
    ) -> Result<Admission, ApiError> {
        let ask = Ask {
            priority: Priority::new(request.priority.unwrap_or(PRIORITY_DEFAULT)).unwrap_or_default(),
            queue_depth: self.settings.queue_depth,
            external: request.delivery == Some(Delivery::External),
        };
        // A pool that is new, or was lost with its Redis, is built from the log first; then it is tried again, once.
        for last in [false, true] {
            let admitted = match &request.agent_id {
                Some(agent) => {
                    self.capacity.admit_to_agent(pool.as_str(), agent.as_str(), hold, ask, self.stamp()).await
                }
                None => self.capacity.admit_to_pool(pool.as_str(), hold, ask, self.stamp()).await,
            };
            match admitted {
                Ok(admission) => return Ok(admission),
                Err(error) if error.wants_rebuild() && !last => {
                    self.rebuild(pool).await.map_err(|e| ApiError::not_ready(e.to_string()))?;
                }
                Err(error) if error.wants_rebuild() => return Err(ApiError::not_ready(error.to_string())),
                Err(error) => {
                    // Whether Redis did it is unknown: unconfirmed, it will be reclaimed.
                    return Err(ApiError::unavailable(error.to_string()));
                }
            }
        }
        Err(ApiError::not_ready(format!("capacity of pool {pool} is being rebuilt")))
    }

    /// Stores the input and writes the submission. `None`: the id was taken in the meantime.
    async fn write_submission(
        &self,
        id: &ExecutionId,
        pool: &Pool,
        request: &SubmitRequest,
        request_sha256: &str,
    ) -> Result<Option<Execution>, Unwritten> {
        let input = request.input.as_ref().map_or("null", |raw| raw.get());
        let stored = self
            .store(id, PayloadKind::Input, 1, Bytes::copy_from_slice(input.as_bytes()))
            .await
            .map_err(|e| Unwritten { error: payload::store_error(&e), in_doubt: false })?;
        let submitted = Submitted {
            execution_id: id.clone(),
            attempt: 1,
            agent_id: request.agent_id.clone(),
            pool: pool.clone(),
            input: stored,
            timeout_ms: request.timeout_ms,
            priority: request.priority.unwrap_or(PRIORITY_DEFAULT),
            queue_ttl_ms: request.queue_ttl_ms.unwrap_or(self.settings.queue_ttl_ms),
            on_loss: request.on_loss.unwrap_or_default(),
            max_attempts: request.max_attempts.unwrap_or(MAX_ATTEMPTS_DEFAULT),
            stall_timeout_ms: request.stall_timeout_ms,
            lost_after_ms: request.lost_after_ms,
            delivery: request.delivery.unwrap_or_default(),
            labels: request.labels.clone(),
            request_sha256: request_sha256.to_owned(),
        };
        self.ledger.submit(submitted.into()).await.map_err(Unwritten::from)
    }

    /// Somebody submitted the same id at the same time and was first.
    async fn lost_the_race(
        self: &Arc<Self>,
        id: &ExecutionId,
        pool: &Pool,
        hold: &Hold,
        sha256: &str,
    ) -> Result<ExecutionReply, ApiError> {
        let winner = self.fresh(id).await?.ok_or_else(|| {
            ApiError::unavailable(format!("execution {id} was taken and can't be read yet"))
        })?;
        // There is one hold for both: in the winner's pool it is the winner's, whatever this request asked for.
        let wants = winner.attempt == hold.attempt && !winner.state.is_terminal();
        let there = self.ledger.read(|p| p.pool_of(&winner)) == *pool;
        if !(wants && there) {
            self.give_back(pool, hold).await;
            if wants {
                self.place_waiting(id.as_str()).await;
            }
        }
        self.same_or_refused(&winner, sha256).await
    }

    /// Gives up a reservation. One that has been confirmed meanwhile is in use by another submission of the same id.
    pub(crate) async fn give_back(self: &Arc<Self>, pool: &Pool, hold: &Hold) -> bool {
        let settled =
            self.in_redis(pool, "reclaim", || self.capacity.reclaim(pool.as_str(), hold, self.stamp())).await;
        let Some(settled) = settled else { return false };
        self.spawn_launches(pool, settled.promoted);
        settled.released || settled.dequeued
    }
}

/// Why a submission was not written.
struct Unwritten {
    error: ApiError,
    /// It may be in the log all the same.
    in_doubt: bool,
}

impl From<AppendError> for Unwritten {
    fn from(error: AppendError) -> Self {
        let in_doubt = matches!(error, AppendError::Unavailable(_) | AppendError::Other(_));
        Self { error: DecideError::Append(error).into(), in_doubt }
    }
}

/// What makes a repeated submission the same: the request as it was understood, the input byte for byte.
fn fingerprint(request: &SubmitRequest) -> Result<String, ApiError> {
    let text = serde_json::to_vec(request).map_err(|e| ApiError::bad_json("submit", &e))?;
    Ok(payload::sha256_hex(&text))
}

#[cfg(test)]
mod tests {
    use rollcall_core::{AgentId, execution::State};

    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_agent_that_redis_has_yet_to_hear_of_is_given_work_at_once() {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 2).await;
        fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        let id = AgentId::new("a").unwrap();
        dispatcher.apply_agent(&id).await;
        let submit = async |execution: &str| {
            let body = format!(
                r#"{{"execution_id": "{execution}", "agent_id": "a", "input": 1, "delivery": "external"}}"#
            );
            dispatcher.submit(body.as_bytes()).await.unwrap().state
        };
        assert_eq!(submit("x").await, State::Running);
        // As it was before it was connected, and nobody has told Redis anything else.
        fixture.redis("HSET rollcall:{p}:agent:a open 0 setting_seq 0").await;
        dispatcher.doubt_applied(&id);
        assert_eq!(submit("y").await, State::Running);
    }
}
