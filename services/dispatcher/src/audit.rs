//! The auditor: Redis against the log, in both directions. At the start it is what admission waits for; later it
//! finds what crashes, lost answers and defects left behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use rollcall_capacity::{Capacity, Confirmation, Error as CapacityError, GrantedSlot, Hold, Place};
use rollcall_core::{
    AgentId, ExecutionId, Pool, Timestamp,
    event::SystemEventKind,
    execution::{Attempt, Execution, State},
};

use crate::{
    decide::{self, Misplaced, Unfinished},
    effect::Leaves,
    ledger::DecideError,
    moves,
    rebuild::RebuildError,
    shell::Dispatcher,
};

/// How old an admission or promotion without confirmation must be before the auditor finishes it. Longer than the
/// way from the grant to its event takes.
const FINISH_AFTER: Duration = Duration::from_secs(3);
/// How old a reservation whose submission is not in the log must be before it is taken back. Longer than an
/// append goes on trying (15 s).
const RECLAIM_AFTER: Duration = Duration::from_secs(20);
/// Why an execution was put back whose slot nobody put to use.
const LAUNCH_LOST: &str = "launch_lost";
/// Why a pool was built anew in which things were that can't be.
pub(crate) const CONTRADICTED: &str = "redis contradicted itself";
/// Unconfirmed ones looked at in one pass.
const UNCONFIRMED_MAX: usize = 256;

/// Where something holds or waits: on an agent's slot, or (`None`) in a queue.
type Seen = Option<String>;

/// What one audit found and repaired.
#[derive(Debug, Default, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Findings {
    /// Slots or places of nothing that is open.
    pub leaked: usize,
    /// Open executions that had no slot or place.
    pub missing: usize,
    /// Executions that were in another place than the log says.
    pub elsewhere: usize,
    /// Promotions that nobody had carried out.
    pub unconfirmed: usize,
    /// Slots that were free while work waited.
    pub idle: usize,
    /// Slots and queue places that contradicted the pool's index: it was built anew.
    pub torn: usize,
    /// Agents that have changed pools and were still here.
    pub moved: usize,
}

impl Findings {
    const fn kinds(&self) -> [(&'static str, usize); 7] {
        [
            ("leaked", self.leaked),
            ("missing", self.missing),
            ("elsewhere", self.elsewhere),
            ("unconfirmed", self.unconfirmed),
            ("idle", self.idle),
            ("torn", self.torn),
            ("moved", self.moved),
        ]
    }
}

impl Dispatcher {
    /// Audits every pool.
    pub(crate) async fn audit(self: &Arc<Self>) -> Result<(), RebuildError> {
        let last = self.ledger.current().await?;
        let mut pools = self.ledger.read(crate::state::Projection::pools);
        // What Redis knows and the log does not is audited too.
        pools.extend(self.capacity.pools().await?.iter().filter_map(|p| Pool::new(p).ok()));
        // One that can't be read or reached keeps nobody from the others.
        let mut first_error = Ok(());
        // First: a pool that an agent came to may not fill it before the other one has let go of it.
        for pool in &pools {
            let mut findings = Findings::default();
            let moved = self.audit_moved(pool).await.map(|moved| findings.moved = moved);
            let moved = self.mend_torn(pool, &mut findings, moved).await;
            self.tell(pool, &findings).await;
            first_error = first_error.and(moved);
        }
        let let_go = first_error.is_ok();
        for pool in pools {
            let mut findings = Findings::default();
            // What was repaired until something failed is told all the same.
            let audited = self.audit_pool(&pool, last, let_go, &mut findings).await;
            let audited = self.mend_torn(&pool, &mut findings, audited).await;
            self.tell(&pool, &findings).await;
            first_error = first_error.and(audited);
        }
        first_error
    }

    /// A pool in which a look found what nobody of us writes there is built anew.
    async fn mend_torn(
        self: &Arc<Self>,
        pool: &Pool,
        findings: &mut Findings,
        looked: Result<(), RebuildError>,
    ) -> Result<(), RebuildError> {
        match looked {
            Err(RebuildError::Capacity(error @ CapacityError::Reply { .. })) => {
                tracing::warn!(%pool, %error, "what is in redis can't be read");
                findings.torn += 1;
                self.rebuild_anyway(pool, CONTRADICTED).await
            }
            looked => looked,
        }
    }

    /// Counts what was repaired, and has the log say so.
    async fn tell(&self, pool: &Pool, findings: &Findings) {
        if *findings == Findings::default() {
            return;
        }
        tracing::warn!(%pool, ?findings, "capacity repaired");
        for (kind, count) in findings.kinds() {
            metrics::counter!("rollcall_audit_findings_total", "kind" => kind).increment(count as u64);
        }
        let facts =
            serde_json::json!({"pool": pool, "cause": "redis disagreed with the log", "findings": findings});
        self.ledger.system(SystemEventKind::SlotLeakRepaired, facts).await;
    }

    /// What Redis holds came from a log that is gone: it is built anew from the one there is.
    async fn log_regressed(
        self: &Arc<Self>,
        pool: &Pool,
        in_redis: u64,
        in_log: u64,
    ) -> Result<(), RebuildError> {
        tracing::error!(%pool, in_redis, in_log, "redis is ahead of the log");
        let facts = serde_json::json!({"pool": pool, "cause": "redis reflects more than the log holds",
            "redis_log_seq": in_redis, "log_seq": in_log});
        self.ledger.system(SystemEventKind::LogRegressed, facts).await;
        self.rebuild_anyway(pool, "the log went back in time").await
    }

    /// `last`: how far the log went when this began. `let_go`: no agent is in two pools; else none is told of, and so offered
    /// work in the one that it came to.
    async fn audit_pool(
        self: &Arc<Self>,
        pool: &Pool,
        last: u64,
        let_go: bool,
        findings: &mut Findings,
    ) -> Result<(), RebuildError> {
        if let Some(meta) = self.capacity.meta(pool.as_str()).await?
            && meta.log_seq > last
        {
            // Work goes on while this looks: only a log that ends before what was read from Redis is a regression.
            let now = self.ledger.current().await?;
            if meta.log_seq > now {
                return self.log_regressed(pool, meta.log_seq, now).await;
            }
        }
        let found = match self.scan(pool).await {
            Err(error) if error.wants_rebuild() => {
                self.rebuild(pool).await?;
                self.scan(pool).await?
            }
            other => other?,
        };
        self.note_pool(pool);
        let first = self.contradictions(pool, &found).await?;
        if !first.is_empty() {
            let second = self.contradictions(pool, &self.scan(pool).await?).await?;
            findings.torn = first.intersection(&second).count();
        }
        if findings.torn > 0 {
            self.rebuild_anyway(pool, CONTRADICTED).await?;
            return Ok(());
        }
        if let_go {
            self.audit_agents(pool).await;
        }
        for (hold, place) in &found {
            self.audit_hold(pool, hold, place, findings).await?;
        }
        let missing: Vec<(ExecutionId, u32)> = self.ledger.read(|projection| {
            decide::missing(pool, projection, &found).iter().map(|e| (e.id().clone(), e.attempt)).collect()
        });
        for (id, attempt) in missing {
            self.audit_missing(pool, &id, attempt, findings).await?;
        }
        self.finish_unconfirmed(pool, findings).await?;
        findings.idle += self.fill(pool).await;
        Ok(())
    }

    async fn scan(&self, pool: &Pool) -> Result<BTreeMap<Hold, Place>, CapacityError> {
        let mut found = BTreeMap::new();
        let mut from = None;
        loop {
            let page = self.capacity.scan(pool.as_str(), from).await?;
            found.extend(page.holds.into_iter().map(|placed| (placed.hold, placed.place)));
            match page.next {
                Some(next) => from = Some(next),
                None => return Ok(found),
            }
        }
    }

    /// Where slots and queues differ from the index: somebody else wrote to our keys, or a part of them was lost. A look
    /// can also hit a change under way, but two looks never see the same one.
    async fn contradictions(
        &self,
        pool: &Pool,
        indexed: &BTreeMap<Hold, Place>,
    ) -> Result<BTreeSet<(Hold, Option<Seen>, Option<Seen>)>, CapacityError> {
        let mut real: BTreeMap<Hold, Seen> = BTreeMap::new();
        for agent in self.capacity.agents(pool.as_str()).await? {
            let view = self.capacity.inspect(pool.as_str(), &agent, usize::MAX).await?;
            real.extend(view.held.into_iter().map(|slot| (slot.hold, Some(agent.clone()))));
            real.extend(view.queue.into_iter().map(|waiting| (waiting.hold, None)));
        }
        let shared = self.capacity.inspect_pool(pool.as_str(), usize::MAX).await?;
        real.extend(shared.queue.into_iter().map(|waiting| (waiting.hold, None)));
        let indexed: BTreeMap<Hold, Seen> = indexed
            .iter()
            .map(|(hold, place)| match place {
                Place::Slot { agent, .. } => (hold.clone(), Some(agent.clone())),
                Place::Waiting(_) => (hold.clone(), None),
            })
            .collect();
        Ok(real
            .keys()
            .chain(indexed.keys())
            .filter(|hold| real.get(*hold) != indexed.get(*hold))
            .map(|hold| (hold.clone(), real.get(hold).cloned(), indexed.get(hold).cloned()))
            .collect())
    }

    /// Settings that got lost, and agents that nobody waits for to offer them work again.
    async fn audit_agents(self: &Arc<Self>, pool: &Pool) {
        let agents: Vec<AgentId> = self.ledger.read(|projection| {
            projection.agents().filter(|a| a.pool() == *pool).map(|a| a.id.clone()).collect()
        });
        for id in agents {
            let turn = self.turn_of(&id);
            let _one_at_a_time = turn.lock().await;
            let Some(agent) = self.ledger.agent(&id).filter(|agent| agent.pool() == *pool) else { continue };
            let Ok(view) = self.capacity.inspect(pool.as_str(), id.as_str(), 0).await else { continue };
            let behind = view.setting.is_none_or(|s| s.setting_seq < agent.seq);
            if behind && (moves::is_member(view.setting) || self.settle_in(&id, pool).await) {
                self.tell_of(&agent).await;
            }
            if view.held_back {
                self.spawn_reopen(id);
            }
        }
    }

    async fn audit_hold(
        self: &Arc<Self>,
        pool: &Pool,
        hold: &Hold,
        place: &Place,
        findings: &mut Findings,
    ) -> Result<(), RebuildError> {
        let Ok(id) = ExecutionId::new(&hold.execution_id) else { return Ok(()) };
        let known = self.ledger.execution(&id);
        if decide::misplaced(known.as_ref(), hold, place).is_none() {
            return Ok(());
        }
        // Only what the log itself says now is a reason to touch anything.
        let fresh = self.ledger.fresh_execution(&id).await?;
        let Some(wrong) = decide::misplaced(fresh.as_ref(), hold, place) else { return Ok(()) };
        match wrong {
            Misplaced::Promoted => {
                if let (Some(execution), Place::Slot { granted_at_ms, .. }) = (&fresh, place) {
                    self.relaunch(execution, hold, *granted_at_ms, findings).await;
                }
            }
            Misplaced::WrongQueue => {
                let settled = self
                    .in_redis(pool, "settle", || self.capacity.settle(pool.as_str(), hold, self.stamp()))
                    .await;
                if let Some(settled) = settled {
                    // It may have got a slot since it was found, which the next one has now.
                    self.spawn_launches(pool, settled.promoted);
                    if settled.dequeued || settled.released {
                        findings.elsewhere +=
                            usize::from(self.place_waiting(id.as_str()).await == Some(true));
                    }
                }
            }
            // Reserved, not submitted yet: reclaimed with the unconfirmed ones when it is due.
            Misplaced::Leaked if fresh.is_none() => {}
            Misplaced::Leaked => {
                if let Some(settled) = self
                    .in_redis(pool, "settle", || self.capacity.settle(pool.as_str(), hold, self.stamp()))
                    .await
                {
                    findings.leaked += usize::from(settled.released || settled.dequeued);
                    self.spawn_launches(pool, settled.promoted);
                }
            }
            Misplaced::Elsewhere { .. } if unanswered(fresh.as_ref()).is_some() => {
                findings.elsewhere += usize::from(self.claim_unanswered(pool, fresh.as_ref()).await);
            }
            Misplaced::Elsewhere { agent, since_ms } => {
                let moved = match place {
                    // The log was asked after this was found: a slot that is the same one still can't be its next.
                    Place::Slot { agent: on, granted_at_ms } => {
                        let (hold, granted_at_ms) = (hold.clone(), *granted_at_ms);
                        let found = GrantedSlot { hold, agent: on.clone(), granted_at_ms };
                        self.in_redis(pool, "relocate", || {
                            self.capacity.relocate(
                                pool.as_str(),
                                &found,
                                agent.as_str(),
                                since_ms,
                                self.stamp(),
                            )
                        })
                        .await
                            == Some(true)
                    }
                    Place::Waiting(_) => self.adopt(pool, hold, &agent, since_ms).await,
                };
                findings.elsewhere += usize::from(moved);
            }
        }
        Ok(())
    }

    /// A slot of what waits: unconfirmed, `finish_unconfirmed` carries it out when it is due. Here, whoever confirmed it
    /// has died before the log said anything, or the log says that it was put back and Redis was never told.
    async fn relaunch(
        self: &Arc<Self>,
        execution: &Execution,
        hold: &Hold,
        granted_at_ms: u64,
        findings: &mut Findings,
    ) {
        let since = granted_at_ms.max(decide::millis(execution.state_since));
        if since >= before(self.ledger.now(), RECLAIM_AFTER) {
            return;
        }
        match self.put_back(execution.id(), hold.attempt, LAUNCH_LOST).await {
            Ok(change) => {
                findings.unconfirmed += 1;
                tracing::warn!(execution_id = %execution.id(), "it had a slot and nobody launched it");
                self.requeue(&change.after, hold.clone(), hold.clone(), Leaves::Granted(granted_at_ms)).await;
            }
            Err(DecideError::Refused(_)) => {}
            Err(error) => {
                tracing::warn!(execution_id = %execution.id(), %error, "left to the next audit");
            }
        }
    }

    /// A dispatch that its agent has not answered gets the slot that the log gives it only where there is room: perhaps
    /// it was never put to its agent, and its slot is somebody else's by now. Whoever takes it up finds out.
    async fn claim_unanswered(self: &Arc<Self>, pool: &Pool, execution: Option<&Execution>) -> bool {
        let Some((execution, held)) = unanswered(execution) else { return false };
        let claimed = self.claim_by_log(pool, decide::hold(execution, held.number), &held.agent_id).await;
        claimed == Some(Confirmation::Confirmed { reclaimed: true })
    }

    async fn audit_missing(
        self: &Arc<Self>,
        pool: &Pool,
        id: &ExecutionId,
        attempt: u32,
        findings: &mut Findings,
    ) -> Result<(), RebuildError> {
        let Some(execution) = self.ledger.fresh_execution(id).await? else { return Ok(()) };
        if execution.attempt != attempt || execution.state.is_terminal() {
            return Ok(());
        }
        let hold = decide::hold(&execution, attempt);
        match execution.holder() {
            Some(_) if unanswered(Some(&execution)).is_some() => {
                findings.missing += usize::from(self.claim_unanswered(pool, Some(&execution)).await);
            }
            Some(held) => {
                let since_ms = decide::millis(held.dispatched_at);
                findings.missing += usize::from(self.adopt(pool, &hold, &held.agent_id, since_ms).await);
            }
            None if execution.state == State::Queued => {
                // Its effect may be on its way: only what has waited for a while is missing.
                if self.ledger.now().since_ms(execution.state_since) < FINISH_AFTER.as_millis() as u64 {
                    return Ok(());
                }
                findings.missing += usize::from(self.place_waiting(id.as_str()).await == Some(true));
            }
            None => {}
        }
        Ok(())
    }

    /// Carries out promotions that nobody carried out, and takes back reservations that came to nothing.
    async fn finish_unconfirmed(
        self: &Arc<Self>,
        pool: &Pool,
        findings: &mut Findings,
    ) -> Result<(), RebuildError> {
        let now = self.ledger.now();
        let before = before(now, FINISH_AFTER);
        let unconfirmed = match self.capacity.unconfirmed(pool.as_str(), before, UNCONFIRMED_MAX).await {
            Err(error) if error.wants_rebuild() => return Ok(()),
            other => other?,
        };
        for item in unconfirmed {
            let Ok(id) = ExecutionId::new(&item.placed.hold.execution_id) else { continue };
            let fresh = self.ledger.fresh_execution(&id).await?;
            let hold = &item.placed.hold;
            let grant = item.grant();
            let expired = item.since_ms < self::before(now, RECLAIM_AFTER);
            match (decide::unfinished(fresh.as_ref(), hold, grant.is_some(), expired), grant) {
                (Unfinished::Launch, Some(grant)) => {
                    findings.unconfirmed += 1;
                    self.spawn_launches(pool, vec![grant]);
                }
                (Unfinished::Confirm, Some(grant)) => {
                    let _ = self.capacity.confirm(pool.as_str(), &grant, self.stamp()).await;
                }
                (Unfinished::Confirm, None) => {
                    let _ = self.capacity.confirm_queued(pool.as_str(), hold, self.stamp()).await;
                }
                (Unfinished::Leave | Unfinished::Launch, _) => {}
                // Its submission may have landed since it was looked for: what was confirmed stays.
                (Unfinished::Settle, _) if fresh.is_none() => {
                    findings.leaked += usize::from(self.give_back(pool, hold).await);
                }
                (Unfinished::Settle, _) => {
                    if let Some(settled) = self
                        .in_redis(pool, "settle", || self.capacity.settle(pool.as_str(), hold, self.stamp()))
                        .await
                    {
                        findings.leaked += usize::from(settled.released || settled.dequeued);
                        self.spawn_launches(pool, settled.promoted);
                    }
                }
            }
        }
        Ok(())
    }

    /// The quick part of the audit: what an agent has not answered, and, while anything waits, a queue beside a free slot and
    /// a promotion nobody carried out.
    pub(crate) async fn quick_audit(self: &Arc<Self>) -> Result<(), RebuildError> {
        self.take_up();
        if !self.ledger.read(crate::state::Projection::anything_waits) {
            return Ok(());
        }
        let pools = self.ledger.read(|p| {
            p.open()
                .filter(|e| e.state == State::Queued)
                .map(|e| p.pool_of(e))
                .collect::<std::collections::BTreeSet<_>>()
        });
        let mut first_error = Ok(());
        for pool in pools {
            let mut findings = Findings::default();
            let finished = self.finish_unconfirmed(&pool, &mut findings).await;
            let finished = self.mend_torn(&pool, &mut findings, finished).await;
            if finished.is_ok() {
                findings.idle += self.fill(&pool).await;
            }
            self.tell(&pool, &findings).await;
            first_error = first_error.and(finished);
        }
        first_error
    }
}

/// A dispatched attempt whose agent has not answered.
fn unanswered(execution: Option<&Execution>) -> Option<(&Execution, &Attempt)> {
    let execution = execution.filter(|e| e.state == State::Dispatching)?;
    Some((execution, execution.holder()?))
}

fn before(now: Timestamp, age: Duration) -> u64 {
    decide::millis(now).saturating_sub(age.as_millis() as u64)
}

#[cfg(test)]
mod repairs;

#[cfg(test)]
mod tests {
    use rollcall_capacity::{Ask, Priority, Queue};
    use rollcall_core::wire::Delivery;

    use super::*;
    use crate::fixture::Fixture;

    /// Pools `p` and `q`; in the second one external work runs whose slot is gone.
    async fn two_pools() -> Fixture {
        let fixture = Fixture::new().await;
        fixture.agent("a", "p", 1).await;
        fixture.agent("b", "q", 1).await;
        fixture.follows().await;
        fixture.dispatcher.audit().await.unwrap();
        fixture.submitted("x", Some("b"), "q", Delivery::External).await;
        fixture.granted("x", "b").await;
        fixture
    }

    async fn has_its_slot(fixture: &Fixture) -> bool {
        let view = fixture.dispatcher.capacity.inspect("q", "b", 9).await.unwrap();
        view.held.iter().any(|slot| slot.hold == Hold::new("x", 1))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pool_that_cannot_be_read_is_built_anew_and_the_others_are_audited() {
        let fixture = two_pools().await;
        fixture.redis("ZADD rollcall:{p}:slots:a 1 nonsense").await;
        fixture.dispatcher.audit().await.unwrap();
        assert!(has_its_slot(&fixture).await);
        assert_eq!(fixture.held("p", "a").await, []);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pool_that_cannot_be_had_keeps_nobody_from_the_others() {
        let fixture = two_pools().await;
        fixture.redis("DEL rollcall:{p}:meta").await;
        fixture.redis("SET rollcall:{p}:meta nonsense").await;
        fixture.dispatcher.audit().await.unwrap_err();
        assert!(has_its_slot(&fixture).await);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_got_a_slot_out_of_the_wrong_queue_leaves_it_to_the_next_and_waits_in_its_own() {
        let fixture = Fixture::new().await;
        let dispatcher = &fixture.dispatcher;
        for agent in ["a", "b"] {
            fixture.agent(agent, "p", 1).await;
        }
        fixture.follows().await;
        dispatcher.audit().await.unwrap();
        // By the log x waits for b, whose only slot is taken.
        for (id, agent) in [("on-b", "b"), ("x", "b"), ("next", "a")] {
            fixture.submitted(id, Some(agent), "p", Delivery::External).await;
        }
        fixture.granted("on-b", "b").await;
        let hold = |id: &str| Hold::new(id, 1);
        let ask = Ask { priority: Priority::default(), queue_depth: 9, external: true };
        let (redis, stamp) = (&dispatcher.capacity, dispatcher.stamp());
        redis.adopt("p", "b", &hold("on-b"), 1, stamp).await.unwrap();
        // It was found waiting for a, and has got a slot there when that is mended.
        redis.admit_to_agent("p", "a", &hold("x"), ask, stamp).await.unwrap();
        redis.admit_to_agent("p", "a", &hold("next"), ask, stamp).await.unwrap();
        let found = Place::Waiting(Queue::Agent("a".to_owned()));
        let pool = Pool::new("p").unwrap();
        let mut findings = Findings::default();
        dispatcher.audit_hold(&pool, &hold("x"), &found, &mut findings).await.unwrap();
        assert_eq!(findings.elsewhere, 1);
        let queue = redis.inspect("p", "b", 9).await.unwrap().queue;
        assert_eq!(queue.iter().map(|waiting| &waiting.hold).collect::<Vec<_>>(), [&hold("x")]);
        dispatcher.finish().await;
        let next = dispatcher.ledger.execution(&ExecutionId::new("next").unwrap()).unwrap();
        assert_eq!(next.state, State::Running, "what got its slot is launched");
    }
}
