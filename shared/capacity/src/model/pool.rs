//! One pool of the model: the rules, written as plainly as possible. Free agents and positions are searched for, not indexed.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Admission, AgentSetting, AgentView, Ask, Confirmation, Epoch, Filled, Grant, GrantedSlot, HeldSlot, Hold,
    Load, Meta, Outcome, PAGE, PROMOTE_BATCH, Place, Placed, PoolState, PoolView, Queue, QueuedHold, Removed,
    Requeue, Requeued, ScanCursor, ScanPage, Settled, Stamp, Unconfirmed,
};

/// Where a hold stands in a queue. Equal ones are told apart by the member's text, as Redis does.
type Rank = (u8, i64, String);

#[derive(Debug, Clone, Default)]
struct Agent {
    setting: Option<AgentSetting>,
    held_back: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum At {
    Slot { agent: String, granted_at_ms: u64 },
    Waits { queue: Queue, rank: Rank },
}

/// The queue in which something stands: what needs no dispatch waits among the others of its pool.
fn line(queue: &Queue) -> Queue {
    if *queue == Queue::External { Queue::Pool } else { queue.clone() }
}

#[derive(Debug, Clone)]
pub(super) struct Pool {
    pub(super) epoch: Epoch,
    pub(super) state: PoolState,
    pub(super) version: u64,
    log_seq: u64,
    since_ms: u64,
    tail: i64,
    head: i64,
    agents: BTreeMap<String, Agent>,
    places: BTreeMap<Hold, At>,
    slots: BTreeMap<String, BTreeSet<(u64, String)>>,
    queues: BTreeMap<Queue, BTreeMap<Rank, Hold>>,
    unconfirmed: BTreeMap<Hold, u64>,
}

impl Pool {
    pub(super) fn rebuilding(epoch: Epoch, now_ms: u64) -> Self {
        Self {
            epoch,
            state: PoolState::Rebuilding,
            version: 1,
            log_seq: 0,
            since_ms: now_ms,
            tail: 0,
            head: -1,
            agents: BTreeMap::new(),
            places: BTreeMap::new(),
            slots: BTreeMap::new(),
            queues: BTreeMap::new(),
            unconfirmed: BTreeMap::new(),
        }
    }

    /// Counts a change, and notes how far the log is reflected.
    pub(super) fn finish(&mut self, mut changed: bool, stamp: Stamp) {
        if stamp.log_seq > self.log_seq {
            self.log_seq = stamp.log_seq;
            changed = true;
        }
        self.version += u64::from(changed);
    }

    pub(super) fn meta(&self) -> Meta {
        Meta {
            epoch: self.epoch.clone(),
            state: self.state,
            log_seq: self.log_seq,
            version: self.version,
            since_ms: self.since_ms,
        }
    }

    // ---- the parts

    fn held(&self, agent: &str) -> u64 {
        self.slots.get(agent).map_or(0, |slots| slots.len() as u64)
    }

    fn has_room(&self, agent: &str) -> bool {
        self.agents.get(agent).is_some_and(|known| {
            !known.held_back
                && known
                    .setting
                    .is_some_and(|setting| setting.open && self.held(agent) < u64::from(setting.capacity))
        })
    }

    fn is_crowded(&self, agent: &str) -> bool {
        let setting = self.agents.get(agent).and_then(|known| known.setting);
        setting.is_some_and(|setting| self.held(agent) > u64::from(setting.capacity))
    }

    fn is_external_only(&self, agent: &str) -> bool {
        self.agents.get(agent).and_then(|known| known.setting).is_some_and(|setting| setting.external_only)
    }

    /// The agent that something in the pool's queue goes to.
    fn free_for(&self, queue: &Queue) -> Option<String> {
        let external = (*queue == Queue::External).then(|| self.least_loaded(true)).flatten();
        external.or_else(|| self.least_loaded(false))
    }

    fn least_loaded(&self, external_only: bool) -> Option<String> {
        let load = |agent: &String| {
            let capacity = self.agents[agent].setting.map_or(1, |setting| u64::from(setting.capacity));
            self.held(agent) * 1_000_000 / capacity
        };
        let free = self
            .agents
            .keys()
            .filter(|agent| self.has_room(agent) && self.is_external_only(agent) == external_only);
        free.min_by_key(|agent| (load(agent), (*agent).clone())).cloned()
    }

    fn waiting(&self, queue: &Queue) -> usize {
        self.queues.get(&line(queue)).map_or(0, BTreeMap::len)
    }

    /// The first of a queue that this agent may be given.
    fn head(&self, queue: &Queue, agent: &str) -> Option<&Hold> {
        let external =
            |hold: &&Hold| matches!(self.places.get(*hold), Some(At::Waits { queue: Queue::External, .. }));
        let any = *queue != Queue::Pool || !self.is_external_only(agent);
        self.queues.get(queue)?.values().find(|hold| any || external(hold))
    }

    fn enqueue(&mut self, hold: &Hold, queue: Queue, priority: u8, order: i64) {
        let rank = (priority, order, hold.member());
        if let Queue::Agent(agent) = &queue {
            self.agents.entry(agent.clone()).or_default();
        }
        self.queues.entry(line(&queue)).or_default().insert(rank.clone(), hold.clone());
        self.places.insert(hold.clone(), At::Waits { queue, rank });
    }

    fn place(&mut self, hold: &Hold, agent: &str, granted_at_ms: u64) {
        self.slots.entry(agent.to_owned()).or_default().insert((granted_at_ms, hold.member()));
        self.places.insert(hold.clone(), At::Slot { agent: agent.to_owned(), granted_at_ms });
    }

    /// Takes a hold out of wherever it is.
    fn withdraw(&mut self, hold: &Hold) -> Option<At> {
        let at = self.places.remove(hold)?;
        self.unconfirmed.remove(hold);
        match &at {
            At::Slot { agent, granted_at_ms } => {
                if let Some(slots) = self.slots.get_mut(agent) {
                    slots.remove(&(*granted_at_ms, hold.member()));
                }
            }
            At::Waits { queue, rank } => {
                if let Some(queue) = self.queues.get_mut(&line(queue)) {
                    queue.remove(rank);
                }
            }
        }
        Some(at)
    }

    fn grant(&mut self, hold: &Hold, agent: &str, now_ms: u64) -> Grant {
        assert!(self.has_room(agent), "a grant needs room");
        self.place(hold, agent, now_ms);
        self.unconfirmed.insert(hold.clone(), now_ms);
        Grant { hold: hold.clone(), agent: agent.to_owned(), epoch: self.epoch.clone() }
    }

    /// Promotes up to `limit` from the queues, the first one first, into the agent's free slots.
    fn promote_from(
        &mut self,
        queues: &[Queue],
        agent: &str,
        limit: usize,
        now_ms: u64,
        out: &mut Vec<Grant>,
    ) -> usize {
        let mut done = 0;
        for queue in queues {
            while done < limit && self.has_room(agent) {
                let Some(hold) = self.head(queue, agent).cloned() else { break };
                self.withdraw(&hold);
                out.push(self.grant(&hold, agent, now_ms));
                done += 1;
            }
        }
        done
    }

    fn fill(&mut self, agent: &str, limit: usize, now_ms: u64, out: &mut Vec<Grant>) -> usize {
        self.promote_from(&[Queue::Agent(agent.to_owned()), Queue::Pool], agent, limit, now_ms, out)
    }

    fn fill_pool(&mut self, limit: usize, now_ms: u64, out: &mut Vec<Grant>) {
        let full = out.len() + limit;
        for external_only in [true, false] {
            while out.len() < full {
                let Some(agent) = self.least_loaded(external_only) else { break };
                if self.head(&Queue::Pool, &agent).is_none() {
                    break;
                }
                self.fill(&agent, 1, now_ms, out);
            }
        }
    }

    fn filled(&mut self, agent: &str, now_ms: u64) -> Filled {
        let mut promoted = Vec::new();
        self.fill(agent, PROMOTE_BATCH, now_ms, &mut promoted);
        Filled { applied: true, promoted, more: self.has_room(agent) && self.has_waiting(agent) }
    }

    /// Whether something waits that this agent may be given.
    fn has_waiting(&self, agent: &str) -> bool {
        self.head(&Queue::Agent(agent.to_owned()), agent).or_else(|| self.head(&Queue::Pool, agent)).is_some()
    }

    fn position(&self, queue: &Queue, rank: &Rank) -> u64 {
        self.queues.get(&line(queue)).map_or(0, |queue| queue.range(..rank).count() as u64) + 1
    }

    // ---- the operations: what they answer, and whether they changed anything

    pub(super) fn admit(&mut self, queue: Queue, hold: &Hold, ask: Ask, now_ms: u64) -> (Admission, bool) {
        let admission = |outcome, promoted| Admission { outcome, as_asked: true, promoted };
        let promoted = Vec::new();
        match self.places.get(hold) {
            Some(At::Slot { agent, .. }) => {
                let grant = Grant { hold: hold.clone(), agent: agent.clone(), epoch: self.epoch.clone() };
                let as_asked = match &queue {
                    Queue::Agent(named) => named == agent,
                    Queue::Pool => !self.is_external_only(agent),
                    Queue::External => true,
                };
                let outcome = Outcome::Granted { grant, already: true };
                return (Admission { outcome, as_asked, promoted }, false);
            }
            Some(At::Waits { queue: there, rank }) => {
                let as_asked = *there == queue && rank.0 == ask.priority.get();
                let outcome = Outcome::Queued { position: self.position(there, rank), already: true };
                return (Admission { outcome, as_asked, promoted }, false);
            }
            None => {}
        }
        let depth = ask.queue_depth as usize;
        let room = match &queue {
            Queue::Agent(agent) => self.has_room(agent),
            Queue::Pool | Queue::External => self.free_for(&queue).is_some(),
        };
        if !room && self.waiting(&queue) >= depth {
            return (admission(Outcome::Full, promoted), false);
        }
        self.enqueue(hold, queue.clone(), ask.priority.get(), self.tail);
        self.tail += 1;
        let mut promoted = Vec::new();
        match &queue {
            Queue::Agent(agent) => {
                let own = [Queue::Agent(agent.clone())];
                self.promote_from(&own, agent, PROMOTE_BATCH, now_ms, &mut promoted);
            }
            Queue::Pool | Queue::External => self.fill_pool(PROMOTE_BATCH, now_ms, &mut promoted),
        }
        if let Some(own) = promoted.iter().position(|grant| grant.hold == *hold) {
            let grant = promoted.remove(own);
            return (admission(Outcome::Granted { grant, already: false }, promoted), true);
        }
        if self.waiting(&queue) > depth {
            self.withdraw(hold);
            let changed = !promoted.is_empty();
            return (admission(Outcome::Full, promoted), changed);
        }
        self.unconfirmed.insert(hold.clone(), now_ms);
        let position = match self.places.get(hold) {
            Some(At::Waits { queue, rank }) => self.position(queue, rank),
            _ => unreachable!("it was put into a queue and not promoted"),
        };
        (admission(Outcome::Queued { position, already: false }, promoted), true)
    }

    pub(super) fn confirm(&mut self, grant: &Grant, now_ms: u64) -> (Confirmation, bool) {
        match self.places.get(&grant.hold) {
            Some(At::Slot { agent, .. }) if *agent == grant.agent => {
                let removed = self.unconfirmed.remove(&grant.hold).is_some();
                let confirmed = if self.is_crowded(&grant.agent) {
                    Confirmation::Crowded
                } else {
                    Confirmation::Confirmed { reclaimed: false }
                };
                return (confirmed, removed);
            }
            Some(At::Slot { .. }) => return (Confirmation::Lost, false),
            _ => {}
        }
        if grant.epoch == self.epoch || !self.has_room(&grant.agent) {
            return (Confirmation::Lost, false);
        }
        self.withdraw(&grant.hold);
        self.place(&grant.hold, &grant.agent, now_ms);
        (Confirmation::Confirmed { reclaimed: true }, true)
    }

    pub(super) fn confirm_queued(&mut self, hold: &Hold) -> (bool, bool) {
        match self.places.get(hold) {
            Some(At::Waits { .. }) => (true, self.unconfirmed.remove(hold).is_some()),
            _ => (false, false),
        }
    }

    pub(super) fn settle(&mut self, hold: &Hold, now_ms: u64) -> (Settled, bool) {
        let mut settled = Settled::default();
        match self.withdraw(hold) {
            Some(At::Slot { agent, .. }) => {
                settled.released = true;
                self.fill(&agent, 1, now_ms, &mut settled.promoted);
            }
            Some(At::Waits { .. }) => settled.dequeued = true,
            None => {}
        }
        let changed = settled.released || settled.dequeued;
        (settled, changed)
    }

    pub(super) fn reclaim(&mut self, hold: &Hold, now_ms: u64) -> (Settled, bool) {
        if self.unconfirmed.contains_key(hold) {
            self.settle(hold, now_ms)
        } else {
            (Settled::default(), false)
        }
    }

    pub(super) fn requeue(&mut self, requeue: &Requeue, now_ms: u64) -> (Requeued, bool) {
        let Requeue { old, new, queue, priority, hold_back, granted_at_ms: meant, granted_by_ms: last } =
            requeue;
        let mut done = Requeued::default();
        if old == new {
            let keeps = match self.places.get(old) {
                None => false,
                Some(At::Waits { .. }) => true,
                Some(At::Slot { agent, granted_at_ms }) => {
                    (hold_back.is_none() && meant.is_none())
                        || hold_back.as_ref().is_some_and(|refuser| refuser != agent)
                        || meant.is_some_and(|meant| meant != *granted_at_ms)
                        || last.is_some_and(|last| last < *granted_at_ms)
                }
            };
            if keeps {
                return (done, false);
            }
        }
        let was = self.withdraw(old);
        done.dequeued = matches!(was, Some(At::Waits { .. }));
        done.queued = !self.places.contains_key(new);
        if was.is_none() && !done.queued {
            return (done, false);
        }
        if done.queued {
            if let Some(refuser) = hold_back {
                self.agents.entry(refuser.clone()).or_default().held_back = true;
            }
            self.enqueue(new, queue.clone(), priority.get(), self.head);
            self.head -= 1;
        }
        if let Some(At::Slot { agent, .. }) = was {
            done.released = true;
            self.fill(&agent, 1, now_ms, &mut done.promoted);
        }
        if done.queued && matches!(self.places.get(new), Some(At::Waits { .. })) {
            match queue {
                Queue::Agent(agent) => {
                    self.fill(agent, 1, now_ms, &mut done.promoted);
                }
                Queue::Pool | Queue::External => self.fill_pool(1, now_ms, &mut done.promoted),
            }
        }
        (done, true)
    }

    pub(super) fn adopt(&mut self, agent: &str, hold: &Hold, granted_at_ms: u64) -> (bool, bool) {
        if matches!(self.places.get(hold), Some(At::Slot { .. })) {
            return (false, false);
        }
        self.withdraw(hold);
        self.agents.entry(agent.to_owned()).or_default();
        self.place(hold, agent, granted_at_ms);
        (true, true)
    }

    pub(super) fn relocate(&mut self, found: &GrantedSlot, agent: &str, since_ms: u64) -> (bool, bool) {
        let still = At::Slot { agent: found.agent.clone(), granted_at_ms: found.granted_at_ms };
        if found.agent == agent || self.places.get(&found.hold) != Some(&still) {
            return (false, false);
        }
        self.withdraw(&found.hold);
        self.agents.entry(agent.to_owned()).or_default();
        self.place(&found.hold, agent, since_ms);
        (true, true)
    }

    fn is_older(&self, agent: &str, setting_seq: u64) -> bool {
        let stored = self.agents.get(agent).and_then(|known| known.setting);
        stored.is_some_and(|stored| setting_seq < stored.setting_seq)
    }

    pub(super) fn set_agent(&mut self, agent: &str, setting: AgentSetting, now_ms: u64) -> (Filled, bool) {
        if self.is_older(agent, setting.setting_seq) {
            return (Filled::default(), false);
        }
        let known = self.agents.entry(agent.to_owned()).or_default();
        let changed = known.setting.replace(setting) != Some(setting);
        let filled = self.filled(agent, now_ms);
        let changed = changed || !filled.promoted.is_empty();
        (filled, changed)
    }

    pub(super) fn reopen(&mut self, agent: &str, now_ms: u64) -> (Filled, bool) {
        match self.agents.get_mut(agent) {
            Some(known) if known.held_back => known.held_back = false,
            _ => return (Filled::default(), false),
        }
        (self.filled(agent, now_ms), true)
    }

    pub(super) fn promote(&mut self, agent: &str, now_ms: u64) -> (Filled, bool) {
        let filled = self.filled(agent, now_ms);
        let changed = !filled.promoted.is_empty();
        (filled, changed)
    }

    pub(super) fn remove_agent(&mut self, agent: &str, setting_seq: u64) -> (Removed, bool) {
        if self.is_older(agent, setting_seq) {
            return (Removed::default(), false);
        }
        let closed = AgentSetting { capacity: 0, open: false, external_only: false, setting_seq };
        let known = self.agents.entry(agent.to_owned()).or_default();
        let mut changed = known.setting.replace(closed) != Some(closed);
        known.held_back &= !changed;
        let queued = self.queue_page(&Queue::Agent(agent.to_owned()), PAGE);
        let held = self.held_page(agent, PAGE - queued.len());
        let taken = queued.iter().map(|queued| &queued.hold).chain(held.iter().map(|held| &held.hold));
        for hold in taken {
            self.withdraw(hold);
            changed = true;
        }
        let more = self.held(agent) > 0 || self.waiting(&Queue::Agent(agent.to_owned())) > 0;
        (Removed { applied: true, queued, held, more }, changed)
    }

    // ---- looking

    fn queue_page(&self, queue: &Queue, limit: usize) -> Vec<QueuedHold> {
        let Some(queue) = self.queues.get(&line(queue)) else { return Vec::new() };
        let entry = |(position, (rank, hold)): (u64, (&Rank, &Hold))| QueuedHold {
            hold: hold.clone(),
            priority: crate::Priority::new(rank.0).unwrap_or_default(),
            position,
        };
        (1..).zip(queue).map(entry).take(limit).collect()
    }

    fn held_page(&self, agent: &str, limit: usize) -> Vec<HeldSlot> {
        let Some(slots) = self.slots.get(agent) else { return Vec::new() };
        let entry = |(granted_at_ms, member): &(u64, String)| {
            Some(HeldSlot { hold: Hold::from_member(member)?, granted_at_ms: *granted_at_ms })
        };
        slots.iter().filter_map(entry).take(limit).collect()
    }

    pub(super) fn inspect(&self, agent: &str, limit: usize) -> AgentView {
        let known = self.agents.get(agent).cloned().unwrap_or_default();
        let queue = Queue::Agent(agent.to_owned());
        AgentView {
            setting: known.setting,
            held_back: known.held_back,
            held_count: self.held(agent),
            held: self.held_page(agent, limit),
            queue_len: self.waiting(&queue) as u64,
            queue: self.queue_page(&queue, limit),
        }
    }

    pub(super) fn inspect_pool(&self, limit: usize) -> PoolView {
        PoolView {
            free_agents: self.agents.keys().filter(|agent| self.has_room(agent)).count() as u64,
            queue_len: self.waiting(&Queue::Pool) as u64,
            queue: self.queue_page(&Queue::Pool, limit),
        }
    }

    fn placed(&self, hold: &Hold) -> Option<Placed> {
        let place = match self.places.get(hold)? {
            At::Slot { agent, granted_at_ms } => {
                Place::Slot { agent: agent.clone(), granted_at_ms: *granted_at_ms }
            }
            At::Waits { queue, .. } => Place::Waiting(queue.clone()),
        };
        Some(Placed { hold: hold.clone(), place })
    }

    pub(super) fn scan(&self, from: ScanCursor) -> ScanPage {
        let from = from.0 as usize;
        let page = self.places.keys().skip(from).take(PAGE);
        let more = self.places.len() > from + PAGE;
        ScanPage {
            holds: page.filter_map(|hold| self.placed(hold)).collect(),
            next: more.then_some(ScanCursor((from + PAGE) as u64)),
        }
    }

    pub(super) fn unconfirmed(&self, before_ms: u64, limit: usize) -> Vec<Unconfirmed> {
        let mut found: Vec<_> = self.unconfirmed.iter().filter(|(_, since)| **since < before_ms).collect();
        found.sort_by_key(|(hold, since)| (**since, hold.member()));
        let entry = |(hold, since_ms): (&Hold, &u64)| {
            Some(Unconfirmed { placed: self.placed(hold)?, since_ms: *since_ms, epoch: self.epoch.clone() })
        };
        found.into_iter().filter_map(entry).take(limit.min(PAGE)).collect()
    }

    pub(super) fn waiting_with_free(&self) -> Vec<String> {
        let idle = |agent: &&String| self.has_room(agent) && self.has_waiting(agent);
        self.agents.keys().filter(idle).cloned().collect()
    }

    pub(super) fn agents(&self) -> Vec<String> {
        self.agents.keys().cloned().collect()
    }

    // ---- rebuilding

    pub(super) fn load(&mut self, item: &Load) {
        match item {
            Load::Agent { agent, setting } => {
                self.agents.entry(agent.clone()).or_default().setting = Some(*setting);
            }
            Load::Slot { agent, hold, granted_at_ms } => {
                self.agents.entry(agent.clone()).or_default();
                if !self.places.contains_key(hold) {
                    self.place(hold, agent, *granted_at_ms);
                }
            }
            Load::Queued { queue, hold, priority, order } => {
                if let Queue::Agent(agent) = queue {
                    self.agents.entry(agent.clone()).or_default();
                }
                if !self.places.contains_key(hold) {
                    self.enqueue(hold, queue.clone(), priority.get(), *order);
                    self.tail = self.tail.max(order + 1);
                    self.head = self.head.min(order - 1);
                }
            }
        }
    }

    pub(super) fn commit(&mut self, stamp: Stamp) {
        if self.state == PoolState::Rebuilding {
            self.state = PoolState::Ready;
            self.log_seq = stamp.log_seq;
            self.since_ms = stamp.now_ms;
            self.version += 1;
        }
    }
}
