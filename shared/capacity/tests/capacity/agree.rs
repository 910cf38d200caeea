//! Random operations, on Redis and on the model: every answer and everything that can be seen must agree.

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use redis::Commands;
use rollcall_capacity::testing::RedisServer;
use rollcall_capacity::{
    AgentSetting, Ask, Capacity, Epoch, Grant, GrantedSlot, Hold, Load, ModelCapacity, ModelSnapshot,
    Outcome, Priority, Queue, RedisCapacity, Requeue, Result, Stamp,
};

use crate::support::*;

const CASES: u32 = 120;
const STEPS: usize = 70;
const AGENTS: [&str; 3] = ["a", "b", "c"];

#[derive(Debug, Clone)]
enum Step {
    AdmitAgent {
        agent: usize,
        hold: Hold,
        priority: u8,
        depth: u32,
    },
    AdmitPool {
        hold: Hold,
        priority: u8,
        depth: u32,
        external: bool,
    },
    /// One of the grants seen so far, by its place from the newest.
    Confirm {
        nth: usize,
    },
    ConfirmQueued {
        hold: Hold,
    },
    Settle {
        hold: Hold,
    },
    Reclaim {
        hold: Hold,
    },
    Requeue {
        old: Hold,
        new: Option<Hold>,
        queue: Queue,
        priority: u8,
        hold_back: Option<usize>,
        granted_at_ms: Option<u64>,
        granted_by_ms: Option<u64>,
    },
    Adopt {
        agent: usize,
        hold: Hold,
    },
    Relocate {
        from: usize,
        to: usize,
        hold: Hold,
        granted_at_ms: u64,
    },
    SetAgent {
        agent: usize,
        capacity: u32,
        open: bool,
        seq: u64,
        external_only: bool,
    },
    Reopen {
        agent: usize,
    },
    RemoveAgent {
        agent: usize,
        seq: u64,
    },
    Promote {
        agent: usize,
    },
    Flush,
    Snapshot,
    Restore,
    Begin,
    /// Load into one of the epochs begun so far, by its place from the newest.
    Load {
        nth: usize,
        items: Vec<Load>,
    },
    Commit {
        nth: usize,
    },
    /// All three at once.
    Rebuild {
        items: Vec<Load>,
    },
}

fn any_hold() -> impl Strategy<Value = Hold> {
    (0..7u8, 1..3u32).prop_map(|(name, attempt)| Hold::new(format!("e{name}"), attempt))
}

fn any_queue() -> impl Strategy<Value = Queue> {
    prop_oneof![
        3 => (0..AGENTS.len()).prop_map(|agent| Queue::Agent(AGENTS[agent].into())),
        1 => Just(Queue::Pool),
        1 => Just(Queue::External),
    ]
}

fn any_load() -> impl Strategy<Value = Load> {
    let agent = || (0..AGENTS.len()).prop_map(|agent| AGENTS[agent].to_owned());
    prop_oneof![
        (agent(), 0..4u32, any::<bool>(), 0..9u64, any::<bool>()).prop_map(
            |(agent, capacity, open, seq, external_only)| Load::Agent {
                agent,
                setting: AgentSetting { external_only, ..setting(capacity, open, seq) }
            }
        ),
        (agent(), any_hold(), 0..9u64).prop_map(|(agent, hold, granted_at_ms)| Load::Slot {
            agent,
            hold,
            granted_at_ms
        }),
        (any_queue(), any_hold(), 0..3u8, -5..5i64).prop_map(|(queue, hold, priority, order)| Load::Queued {
            queue,
            hold,
            priority: Priority::new(priority).unwrap(),
            order
        }),
    ]
}

fn any_loads() -> impl Strategy<Value = Vec<Load>> {
    proptest::collection::vec(any_load(), 0..12)
}

fn any_step() -> impl Strategy<Value = Step> {
    let agent = || 0..AGENTS.len();
    prop_oneof![
        9 => (agent(), any_hold(), 0..3u8, 0..4u32)
            .prop_map(|(agent, hold, priority, depth)| Step::AdmitAgent { agent, hold, priority, depth }),
        9 => (any_hold(), 0..3u8, 0..4u32, any::<bool>())
            .prop_map(|(hold, priority, depth, external)| Step::AdmitPool { hold, priority, depth, external }),
        9 => (0..5usize).prop_map(|nth| Step::Confirm { nth }),
        2 => any_hold().prop_map(|hold| Step::ConfirmQueued { hold }),
        9 => any_hold().prop_map(|hold| Step::Settle { hold }),
        4 => any_hold().prop_map(|hold| Step::Reclaim { hold }),
        8 => (any_hold(), proptest::option::of(any_hold()), any_queue(), 0..3u8,
            proptest::option::of(agent()), proptest::option::weighted(0.3, 0..9u64),
            proptest::option::weighted(0.3, 0..9u64))
            .prop_map(|(old, new, queue, priority, hold_back, granted_at_ms, granted_by_ms)| {
                Step::Requeue { old, new, queue, priority, hold_back, granted_at_ms, granted_by_ms }
            }),
        2 => (agent(), any_hold()).prop_map(|(agent, hold)| Step::Adopt { agent, hold }),
        3 => (agent(), agent(), any_hold(), 0..9u64)
            .prop_map(|(from, to, hold, granted_at_ms)| Step::Relocate { from, to, hold, granted_at_ms }),
        9 => (agent(), 0..4u32, prop::bool::weighted(0.8), 0..30u64, prop::bool::weighted(0.3)).prop_map(
            |(agent, capacity, open, seq, external_only)| Step::SetAgent { agent, capacity, open, seq, external_only }
        ),
        4 => agent().prop_map(|agent| Step::Reopen { agent }),
        1 => (agent(), 0..30u64).prop_map(|(agent, seq)| Step::RemoveAgent { agent, seq }),
        2 => agent().prop_map(|agent| Step::Promote { agent }),
        1 => Just(Step::Flush),
        1 => Just(Step::Snapshot),
        1 => Just(Step::Restore),
        1 => Just(Step::Begin),
        1 => (0..2usize, any_loads()).prop_map(|(nth, items)| Step::Load { nth, items }),
        2 => (0..2usize).prop_map(|nth| Step::Commit { nth }),
        6 => any_loads().prop_map(|items| Step::Rebuild { items }),
    ]
}

/// One step by one of two handles, so that each sees the other's rebuilds; how far clock and log go on before it. The clock always
/// does: epochs of one millisecond are in random order, and the two sides' would differ.
type Move = (Step, usize, u64, u64);

fn any_moves() -> impl Strategy<Value = Vec<Move>> {
    proptest::collection::vec((any_step(), 0..2usize, 1..3u64, 0..3u64), 1..STEPS)
}

/// One of the two sides, with what a test remembers of it.
struct Side<C> {
    handles: [C; 2],
    grants: Vec<Grant>,
    epochs: Vec<Epoch>,
}

impl<C: Capacity> Side<C> {
    fn new(handles: [C; 2]) -> Self {
        Self { handles, grants: Vec::new(), epochs: Vec::new() }
    }

    /// An answer in a form that both sides share: epochs, which are random, by number.
    fn show<T: std::fmt::Debug>(&self, answer: &Result<T>) -> String {
        let mut text = format!("{answer:?}");
        for (number, epoch) in self.epochs.iter().enumerate() {
            text = text.replace(epoch.as_str(), &format!("#{number}"));
        }
        text
    }

    fn nth<T: Clone>(seen: &[T], nth: usize) -> Option<T> {
        seen.iter().rev().nth(nth).cloned()
    }

    async fn apply(&mut self, (step, handle, ..): &Move, stamp: Stamp) -> String {
        let c = &self.handles[*handle];
        match step {
            Step::AdmitAgent { agent, hold, priority, depth } => {
                let answer =
                    c.admit_to_agent(POOL, AGENTS[*agent], hold, ask(*priority, *depth), stamp).await;
                self.admitted(answer)
            }
            Step::AdmitPool { hold, priority, depth, external } => {
                let ask = Ask { external: *external, ..ask(*priority, *depth) };
                let answer = c.admit_to_pool(POOL, hold, ask, stamp).await;
                self.admitted(answer)
            }
            Step::Confirm { nth } => match Self::nth(&self.grants, *nth) {
                Some(grant) => self.show(&c.confirm(POOL, &grant, stamp).await),
                None => String::new(),
            },
            Step::ConfirmQueued { hold } => self.show(&c.confirm_queued(POOL, hold, stamp).await),
            Step::Settle { hold } => {
                let answer = c.settle(POOL, hold, stamp).await;
                self.promoted(answer, |settled| &settled.promoted)
            }
            Step::Reclaim { hold } => {
                let answer = c.reclaim(POOL, hold, stamp).await;
                self.promoted(answer, |settled| &settled.promoted)
            }
            Step::Requeue { old, new, queue: to, priority, hold_back, granted_at_ms, granted_by_ms } => {
                let requeue = Requeue {
                    old: old.clone(),
                    new: new.as_ref().unwrap_or(old).clone(),
                    queue: to.clone(),
                    priority: Priority::new(*priority).unwrap(),
                    hold_back: hold_back.map(|agent| AGENTS[agent].to_owned()),
                    granted_at_ms: *granted_at_ms,
                    granted_by_ms: *granted_by_ms,
                };
                let answer = c.requeue(POOL, &requeue, stamp).await;
                self.promoted(answer, |requeued| &requeued.promoted)
            }
            Step::Adopt { agent, hold } => self.show(&c.adopt(POOL, AGENTS[*agent], hold, 3, stamp).await),
            Step::Relocate { from, to, hold, granted_at_ms } => {
                let found = GrantedSlot {
                    hold: hold.clone(),
                    agent: AGENTS[*from].to_owned(),
                    granted_at_ms: *granted_at_ms,
                };
                self.show(&c.relocate(POOL, &found, AGENTS[*to], 4, stamp).await)
            }
            Step::SetAgent { agent, capacity, open, seq, external_only } => {
                let setting =
                    AgentSetting { external_only: *external_only, ..setting(*capacity, *open, *seq) };
                let answer = c.set_agent(POOL, AGENTS[*agent], setting, stamp).await;
                self.promoted(answer, |filled| &filled.promoted)
            }
            Step::Reopen { agent } => {
                let answer = c.reopen(POOL, AGENTS[*agent], stamp).await;
                self.promoted(answer, |filled| &filled.promoted)
            }
            Step::RemoveAgent { agent, seq } => {
                self.show(&c.remove_agent(POOL, AGENTS[*agent], *seq, stamp).await)
            }
            Step::Promote { agent } => {
                let answer = c.promote(POOL, AGENTS[*agent], stamp).await;
                self.promoted(answer, |filled| &filled.promoted)
            }
            Step::Begin => {
                let epoch = c.rebuild_begin(POOL, stamp.now_ms).await.unwrap();
                self.epochs.push(epoch);
                String::new()
            }
            Step::Load { nth, items } => match Self::nth(&self.epochs, *nth) {
                Some(epoch) => self.show(&c.rebuild_load(POOL, &epoch, items).await),
                None => String::new(),
            },
            Step::Commit { nth } => match Self::nth(&self.epochs, *nth) {
                Some(epoch) => self.show(&c.rebuild_commit(POOL, &epoch, stamp).await),
                None => String::new(),
            },
            Step::Rebuild { items } => {
                let epoch = c.rebuild_begin(POOL, stamp.now_ms).await.unwrap();
                c.rebuild_load(POOL, &epoch, items).await.unwrap();
                c.rebuild_commit(POOL, &epoch, stamp).await.unwrap();
                self.epochs.push(epoch);
                String::new()
            }
            Step::Flush | Step::Snapshot | Step::Restore => String::new(),
        }
    }

    fn admitted(&mut self, answer: Result<rollcall_capacity::Admission>) -> String {
        if let Ok(admission) = &answer {
            self.grants.extend(admission.promoted.iter().cloned());
            if let Outcome::Granted { grant, .. } = &admission.outcome {
                self.grants.push(grant.clone());
            }
        }
        self.show(&answer)
    }

    fn promoted<T: std::fmt::Debug>(
        &mut self,
        answer: Result<T>,
        grants: impl Fn(&T) -> &Vec<Grant>,
    ) -> String {
        if let Ok(answer) = &answer {
            self.grants.extend(grants(answer).iter().cloned());
        }
        self.show(&answer)
    }

    /// All that one handle can see.
    async fn all(&self, handle: usize) -> String {
        let c = &self.handles[handle];
        let mut seen = vec![
            self.show(&c.meta(POOL).await),
            self.show(&c.agents(POOL).await),
            self.show(&c.inspect_pool(POOL, 99).await),
            self.show(&c.waiting_with_free(POOL).await),
            self.show(&c.unconfirmed(POOL, 1 << 40, 99).await),
        ];
        for agent in AGENTS {
            seen.push(self.show(&c.inspect(POOL, agent, 99).await));
        }
        let mut holds = c.scan(POOL, None).await.map(|page| page.holds);
        if let Ok(holds) = &mut holds {
            holds.sort_by(|one, other| one.hold.cmp(&other.hold));
            holds.dedup();
        }
        seen.push(self.show(&holds));
        seen.join("\n")
    }
}

type Dump = Vec<(String, Vec<u8>)>;

/// All keys of a server, to bring back later: what a failover to a replica that lagged does.
fn dump(server: &mut redis::Connection) -> Dump {
    let keys: Vec<String> = server.keys("*").unwrap();
    keys.into_iter().map(|key| (key.clone(), redis::cmd("DUMP").arg(key).query(server).unwrap())).collect()
}

fn restore(server: &mut redis::Connection, dump: &Dump) {
    redis::cmd("FLUSHALL").exec(server).unwrap();
    for (key, value) in dump {
        redis::cmd("RESTORE").arg(key).arg(0).arg(value).exec(server).unwrap();
    }
}

/// What the cases have met, all together.
#[derive(Debug, Default)]
struct Seen {
    steps: usize,
    refused: usize,
    promoted: usize,
}

impl Seen {
    fn note(&mut self, answer: &str) {
        self.steps += 1;
        self.refused += usize::from(answer.starts_with("Err"));
        self.promoted += usize::from(answer.contains("promoted: [Grant"));
    }
}

async fn agree(url: &str, moves: Vec<Move>, seen: &RefCell<Seen>) -> Result<(), TestCaseError> {
    let mut server = raw(url);
    redis::cmd("FLUSHALL").exec(&mut server).unwrap();
    let one = ModelCapacity::new();
    let two = one.handle();
    let mut model = Side::new([one, two]);
    let mut redis: Side<RedisCapacity> = Side::new([connect(url).await, connect(url).await]);
    let mut kept: Option<(ModelSnapshot, Dump)> = None;
    let (mut now_ms, mut log_seq) = (100, 0);

    for first in [Step::Begin, Step::Commit { nth: 0 }] {
        let first = (first, 0, 0, 0);
        model.apply(&first, at(now_ms)).await;
        redis.apply(&first, at(now_ms)).await;
    }
    for (number, step) in moves.iter().enumerate() {
        now_ms += step.2;
        log_seq += step.3;
        let stamp = Stamp::new(now_ms, log_seq);
        match &step.0 {
            Step::Flush => {
                model.handles[0].flush();
                redis::cmd("FLUSHALL").exec(&mut server).unwrap();
            }
            Step::Snapshot => kept = Some((model.handles[0].snapshot(), dump(&mut server))),
            Step::Restore => {
                if let Some((snapshot, keys)) = &kept {
                    model.handles[0].restore(snapshot.clone());
                    restore(&mut server, keys);
                }
            }
            _ => {}
        }
        let (expected, got) = (model.apply(step, stamp).await, redis.apply(step, stamp).await);
        seen.borrow_mut().note(&got);
        prop_assert_eq!(expected, got, "answers of step {}: {:?}", number, step);
        let (expected, got) = (model.all(step.1).await, redis.all(step.1).await);
        prop_assert_eq!(expected, got, "state after step {}: {:?}", number, step);
    }
    Ok(())
}

#[test]
fn redis_agrees_with_the_model() {
    let server = RedisServer::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config =
        Config { cases: CASES, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let url = server.url();
    let seen = RefCell::new(Seen::default());
    TestRunner::new(config)
        .run(&any_moves(), |moves| runtime.block_on(agree(&url, moves, &seen)))
        .unwrap_or_else(|error| panic!("{error}"));
    // Agreement on refusals alone would say nothing. (Reclaiming and going backwards are rarer: see lost.rs.)
    let Seen { steps, refused, promoted } = *seen.borrow();
    assert!(refused * 2 < steps, "{refused} of {steps} steps were refused");
    assert!(promoted > 40, "only {promoted} of {steps} steps promoted");
}
