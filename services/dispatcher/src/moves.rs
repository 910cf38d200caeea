//! Agents that change pools. A pool offers an agent work only when everything that the log gives the agent is there and
//! the pool that it left has let go of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rollcall_capacity::{AgentSetting, Capacity, Error as CapacityError};
use rollcall_core::{AgentId, ExecutionId, Pool, agent::Agent};

use crate::{audit::CONTRADICTED, decide, rebuild::RebuildError, shell::Dispatcher};

impl Dispatcher {
    /// Moves an agent to the pool where it is by the log, if it has left `from`, and offers it work there. `false`: it has not,
    /// or a server does not answer.
    pub(crate) async fn bring_over(self: &Arc<Self>, id: &AgentId, from: &Pool) -> bool {
        if self.ledger.current().await.is_err() {
            return false;
        }
        let turn = self.turn_of(id);
        let _one_at_a_time = turn.lock().await;
        let Some(agent) = self.ledger.agent(id).filter(|agent| agent.pool() != *from) else { return false };
        if !self.move_agent(&agent, from).await {
            return false;
        }
        self.note_applied(id, &agent.pool(), decide::setting(&agent));
        self.tell_of(&agent).await;
        true
    }

    /// Takes an agent's slots and queue along to its new pool, which does not offer it work yet. `false`: not all of it, and
    /// the audit was asked to look. Whoever has the turn of this agent may do so.
    pub(crate) async fn move_agent(self: &Arc<Self>, agent: &Agent, old_pool: &Pool) -> bool {
        let id = agent.id.as_str();
        tracing::info!(agent_id = id, from = %old_pool, to = %agent.pool(), "agent moves to another pool");
        // A move that is not finished has closed it in a pool where it may be again.
        self.doubt_applied(&agent.id);
        let mut had = BTreeSet::new();
        loop {
            let removed = self
                .in_redis(old_pool, "remove_agent", || {
                    self.capacity.remove_agent(old_pool.as_str(), id, agent.seq, self.stamp())
                })
                .await;
            let Some(removed) = removed else { return false };
            if !removed.applied {
                tracing::info!(agent_id = id, from = %old_pool, "its old pool knows of it what is not folded here yet");
                self.ask_for_audit();
                return false;
            }
            had.extend(removed.held.into_iter().map(|slot| slot.hold.execution_id));
            if !removed.more {
                break;
            }
        }
        if !self.settle_in(&agent.id, &agent.pool()).await {
            return false;
        }
        // Work for any agent of the old pool that had got a slot and not been dispatched goes on waiting there.
        let left: Vec<ExecutionId> = self.ledger.read(|p| {
            let waits = had.iter().filter_map(|id| p.execution(&ExecutionId::new(id).ok()?));
            decide::last_first(waits.filter(|e| e.holder().is_none()))
        });
        self.place_all(&left).await
    }

    /// Gives everything that an agent has by the log its slot or its place in the pool. Another dispatcher may have taken it
    /// out of the old pool, so what was found there says nothing. `false`: not all of it, or it is in another pool by now.
    pub(crate) async fn settle_in(self: &Arc<Self>, id: &AgentId, pool: &Pool) -> bool {
        // What was put to the agent is in the log by now: slots are confirmed after that (see `confirm_again`).
        if let Err(error) = self.ledger.current().await {
            tracing::warn!(agent_id = %id, %error, "what it has is left to the audit");
            self.ask_for_audit();
            return false;
        }
        let has = self.ledger.read(|projection| {
            let here = projection.agent(id).is_some_and(|agent| agent.pool() == *pool);
            here.then(|| decide::belongings(id, projection))
        });
        let Some(has) = has else {
            tracing::info!(agent_id = %id, %pool, "it has gone on meanwhile");
            self.ask_for_audit();
            return false;
        };
        for (hold, since_ms) in has.held {
            let adopted = self
                .in_redis(pool, "adopt", || {
                    self.capacity.adopt(pool.as_str(), id.as_str(), &hold, since_ms, self.stamp())
                })
                .await;
            if adopted.is_none() {
                return false;
            }
        }
        self.place_all(&has.waiting).await
    }

    /// Places what waits, the last one first: each goes to the head.
    async fn place_all(self: &Arc<Self>, last_first: &[ExecutionId]) -> bool {
        for id in last_first {
            if self.place_waiting(id.as_str()).await.is_none() {
                return false;
            }
        }
        true
    }

    /// Moves the agents that a pool still has and that are in another one by the log: nobody saw them go, or could tell Redis.
    /// Returns how many.
    pub(crate) async fn audit_moved(self: &Arc<Self>, pool: &Pool) -> Result<usize, RebuildError> {
        let there = match self.capacity.agents(pool.as_str()).await {
            // It will be built from what the log says now.
            Err(error) if error.wants_rebuild() => return Ok(0),
            other => other?,
        };
        let mut moved = 0;
        for id in there.iter().filter_map(|id| AgentId::new(id).ok()) {
            if self.ledger.agent(&id).is_none_or(|agent| agent.pool() == *pool) {
                continue;
            }
            let view = self.capacity.inspect(pool.as_str(), id.as_str(), 0).await?;
            if view.held_count > 0 || view.queue_len > 0 || view.setting.is_some_and(|s| s.open) {
                moved += usize::from(self.bring_over(&id, pool).await);
            }
        }
        Ok(moved)
    }

    /// Has every other pool let go of the agents that are in this one by the log, before it is built anew and offers them
    /// work. Returns the agents that it may offer work to.
    pub(crate) async fn call_in(self: &Arc<Self>, pool: &Pool) -> Result<BTreeSet<AgentId>, RebuildError> {
        self.ledger.current().await?;
        let here: BTreeMap<AgentId, u64> = self
            .ledger
            .read(|p| p.agents().filter(|a| a.pool() == *pool).map(|a| (a.id.clone(), a.seq)).collect());
        for other in self.capacity.pools().await?.iter().filter(|other| *other != pool.as_str()) {
            let there = match self.capacity.agents(other).await {
                Err(error) if error.wants_rebuild() => continue,
                // Nobody knows whom it would offer work to.
                Err(CapacityError::Reply { .. }) => {
                    self.build_other(other).await?;
                    continue;
                }
                there => there?,
            };
            for (id, seq) in there.iter().filter_map(|id| here.get_key_value(id.as_str())) {
                match self.let_go(other, id, *seq).await {
                    Err(error) if error.wants_rebuild() => break,
                    Err(CapacityError::Reply { .. }) => {
                        self.build_other(other).await?;
                        break;
                    }
                    // The log knows where it belongs.
                    Ok(true) => self.ask_for_audit(),
                    done => _ = done?,
                }
            }
        }
        Ok(here.into_keys().collect())
    }

    /// Builds another pool within the building of one, which is not ready meanwhile: so neither is begun within itself.
    async fn build_other(self: &Arc<Self>, other: &str) -> Result<(), RebuildError> {
        match Pool::new(other) {
            Ok(other) => Box::pin(self.build(&other, CONTRADICTED)).await,
            Err(_) => Ok(()),
        }
    }

    /// Whether the agent had anything there.
    async fn let_go(&self, pool: &str, id: &AgentId, seq: u64) -> Result<bool, CapacityError> {
        let mut had = false;
        loop {
            let removed = self.capacity.remove_agent(pool, id.as_str(), seq, self.stamp()).await?;
            had |= !removed.held.is_empty() || !removed.queued.is_empty();
            if !removed.more {
                return Ok(had);
            }
        }
    }
}

/// Whether a pool has an agent, by its setting there: one that left has a mark that offers nothing.
pub(crate) fn is_member(setting: Option<AgentSetting>) -> bool {
    setting.is_some_and(|setting| setting.open || setting.capacity > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    /// Far above what building two pools takes.
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

    /// Whether a pool would offer an agent work.
    async fn offers(fixture: &Fixture, pool: &str) -> bool {
        let view = fixture.dispatcher.capacity.inspect(pool, "a", 0).await.unwrap();
        view.setting.is_some_and(|setting| setting.open)
    }

    /// Agent `a` has gone from pool `old` to pool `new`, and Redis has been told of `old` alone.
    async fn gone() -> (Fixture, AgentId) {
        let fixture = Fixture::new().await;
        let id = AgentId::new("a").unwrap();
        fixture.agent("a", "old", 1).await;
        fixture.agent("b", "new", 1).await;
        fixture.follows().await;
        fixture.dispatcher.audit().await.unwrap();
        fixture.dispatcher.apply_agent(&id).await;
        assert!(offers(&fixture, "old").await);
        fixture.agent("a", "new", 1).await;
        (fixture, id)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_agent_that_its_old_pool_knows_better_is_not_offered_elsewhere() {
        let (fixture, id) = gone().await;
        let dispatcher = &fixture.dispatcher;
        // It came back, and another dispatcher has told Redis of that.
        let came_back = AgentSetting {
            capacity: 1,
            open: true,
            external_only: false,
            setting_seq: dispatcher.ledger.position() + 100,
        };
        dispatcher.capacity.set_agent("old", "a", came_back, dispatcher.stamp()).await.unwrap();
        dispatcher.apply_agent(&id).await;
        assert!(offers(&fixture, "old").await);
        assert!(!offers(&fixture, "new").await, "it would be offered work twice");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_agent_is_moved_to_where_it_is_when_its_turn_comes() {
        let (fixture, id) = gone().await;
        let dispatcher = &fixture.dispatcher;
        let behind = dispatcher.ledger.agent(&id).unwrap();
        let new = Pool::new("new").unwrap();
        assert!(dispatcher.settle_in(&id, &new).await);
        fixture.agent("a", "old", 1).await;
        let old = Pool::new("old").unwrap();
        assert!(!dispatcher.move_agent(&behind, &old).await, "it is not there any more");
        assert!(!dispatcher.settle_in(&id, &new).await);
        dispatcher.apply_agent(&id).await;
        assert!(offers(&fixture, "old").await && !offers(&fixture, "new").await);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_agent_that_has_come_back_by_the_log_is_not_taken_out_for_what_was_folded_before() {
        let fixture = Fixture::new().await;
        let id = AgentId::new("a").unwrap();
        fixture.agent("a", "old", 1).await;
        let following = fixture.follows().await;
        let dispatcher = &fixture.dispatcher;
        dispatcher.audit().await.unwrap();
        dispatcher.apply_agent(&id).await;
        fixture.agent("a", "new", 1).await;
        fixture.falls_behind(following).await;
        let subject = dispatcher.subjects.agent_event(&id);
        let seen = dispatcher.ledger.position();
        let another = fixture.another();
        fixture.agent("a", "old", 1).await;
        // It has read the fold, in which the agent has gone, and waits for what the log says by now.
        let mut applying = std::pin::pin!(dispatcher.apply_agent(&id));
        assert!(futures_util::poll!(&mut applying).is_pending());
        for entry in another.log().history(&subject).await.unwrap() {
            if entry.seq > seen {
                dispatcher.ledger.ingest(&entry);
                dispatcher.ledger.passed(entry.seq);
            }
        }
        applying.await;
        assert!(offers(&fixture, "old").await);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_agent_is_offered_work_where_it_came_to_while_the_pool_that_it_left_can_not_be_had() {
        let (fixture, _) = gone().await;
        fixture.redis("DEL rollcall:{old}:meta").await;
        fixture.redis("SET rollcall:{old}:meta nonsense").await;
        fixture.dispatcher.audit().await.unwrap_err();
        assert!(!offers(&fixture, "new").await, "the other one may offer it work as well");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pool_that_can_not_be_read_lets_go_when_another_one_is_built() {
        // What of it can't be read: who is there, or what one has there.
        for nonsense in [r#"ZADD rollcall:{old}:agents 0 "\xff""#, "ZADD rollcall:{old}:slots:a 1 nonsense"] {
            let (fixture, _) = gone().await;
            // Another one has gone the same way.
            let other = AgentId::new("c").unwrap();
            fixture.agent("c", "old", 1).await;
            fixture.dispatcher.apply_agent(&other).await;
            fixture.agent("c", "new", 1).await;
            fixture.redis(nonsense).await;
            let new = Pool::new("new").unwrap();
            let built = fixture.dispatcher.rebuild_anyway(&new, "test");
            tokio::time::timeout(PATIENCE, built).await.expect("it does not wait for itself").unwrap();
            for id in ["a", "c"] {
                let there = fixture.dispatcher.capacity.inspect("old", id, 9).await.unwrap();
                assert!(there.held.is_empty() && !is_member(there.setting), "{id}: {nonsense}");
            }
            assert!(offers(&fixture, "new").await, "{nonsense}");
        }
    }
}
