//! What the auditor does about each thing that it finds, and what it leaves alone.

use rollcall_capacity::{Ask, Priority, Queue, RedisCapacity};
use rollcall_core::{AgentId, InstanceId, wire::Delivery};

use super::*;
use crate::fixture::Fixture;

fn pool() -> Pool {
    Pool::new("p").unwrap()
}

fn id(execution: &str) -> ExecutionId {
    ExecutionId::new(execution).unwrap()
}

fn first(execution: &str) -> Hold {
    Hold::new(execution, 1)
}

fn slot(agent: &str) -> Place {
    Place::Slot { agent: agent.to_owned(), granted_at_ms: 1 }
}

fn queue_of(agent: &str) -> Place {
    Place::Waiting(Queue::Agent(agent.to_owned()))
}

/// As the tests submit it.
fn ask() -> Ask {
    Ask { priority: Priority::new(5).unwrap(), queue_depth: 9, external: true }
}

/// Agents `a` and `b`, each with one slot, in a pool that is as the log says.
async fn fleet() -> (Fixture, crate::fixture::Following) {
    let fixture = Fixture::new().await;
    for agent in ["a", "b"] {
        fixture.agent(agent, "p", 1).await;
    }
    let following = fixture.follows().await;
    fixture.dispatcher.audit().await.unwrap();
    (fixture, following)
}

impl Fixture {
    fn capacity(&self) -> &RedisCapacity {
        &self.dispatcher.capacity
    }

    /// It waits for this agent by the log.
    async fn waits_for(&self, execution: &str, agent: &str) {
        self.submitted(execution, Some(agent), "p", Delivery::External).await;
    }

    /// It runs on this agent by the log.
    async fn runs_on(&self, execution: &str, agent: &str) {
        self.waits_for(execution, agent).await;
        self.granted(execution, agent).await;
    }

    /// It has a slot of this agent in Redis.
    async fn has_slot(&self, hold: &Hold, agent: &str) {
        self.capacity().adopt("p", agent, hold, 1, self.dispatcher.stamp()).await.unwrap();
    }

    /// It waits for this agent in Redis, whose slots are taken.
    async fn has_place(&self, execution: &str, agent: &str) {
        let stamp = self.dispatcher.stamp();
        let admitted = self.capacity().admit_to_agent("p", agent, &first(execution), ask(), stamp).await;
        assert!(matches!(admitted.unwrap().outcome, rollcall_capacity::Outcome::Queued { .. }));
    }

    async fn queued(&self, agent: &str) -> Vec<Hold> {
        let view = self.capacity().inspect("p", agent, 9).await.unwrap();
        view.queue.into_iter().map(|waiting| waiting.hold).collect()
    }

    async fn unconfirmed(&self) -> usize {
        self.capacity().unconfirmed("p", u64::MAX >> 12, 9).await.unwrap().len()
    }

    fn state(&self, execution: &str) -> State {
        self.dispatcher.ledger.execution(&id(execution)).unwrap().state
    }

    fn passes(&self, time: Duration) {
        self.clock.shift(i64::try_from(time.as_millis()).unwrap());
    }

    /// What one look at a hold finds.
    async fn looks_at(&self, hold: &Hold, found: &Place) -> Findings {
        let mut findings = Findings::default();
        self.dispatcher.audit_hold(&pool(), hold, found, &mut findings).await.unwrap();
        findings
    }

    /// What one look for something that has no place finds.
    async fn misses(&self, execution: &str, attempt: u32) -> Findings {
        let mut findings = Findings::default();
        let dispatcher = &self.dispatcher;
        dispatcher.audit_missing(&pool(), &id(execution), attempt, &mut findings).await.unwrap();
        findings
    }

    /// What one look at what nobody has confirmed finds.
    async fn finishes(&self) -> Findings {
        let mut findings = Findings::default();
        self.dispatcher.finish_unconfirmed(&pool(), &mut findings).await.unwrap();
        findings
    }
}

/// Something expired, and was submitted again: its second attempt runs on `a`. None of that but the end of the first one is
/// folded here.
async fn ahead_of_the_fold() -> Fixture {
    let (fixture, following) = fleet().await;
    fixture.waits_for("x", "a").await;
    let ledger = &fixture.dispatcher.ledger;
    ledger.decide(&id("x"), |e| e.expire(ledger.now().plus_ms(90_000_000))).await.unwrap();
    fixture.falls_behind(following).await;
    let another = fixture.another();
    another.decide(&id("x"), |e| e.retry("api")).await.unwrap();
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i-1").unwrap());
    another.decide(&id("x"), |e| e.dispatch(2, &agent, &instance, 60_000, another.now())).await.unwrap();
    assert!(fixture.state("x").is_terminal());
    fixture
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slot_of_what_has_ended_goes_to_the_next() {
    let (fixture, _) = fleet().await;
    fixture.waits_for("ended", "a").await;
    fixture.has_slot(&first("ended"), "a").await;
    fixture.waits_for("next", "a").await;
    fixture.has_place("next", "a").await;
    fixture.dispatcher.ledger.decide(&id("ended"), |e| e.cancel("", "api")).await.unwrap();
    let found = fixture.looks_at(&first("ended"), &slot("a")).await;
    assert_eq!(found, Findings { leaked: 1, ..Findings::default() });
    fixture.dispatcher.finish().await;
    assert_eq!(fixture.held("p", "a").await, [first("next")]);
    assert_eq!(fixture.state("next"), State::Running, "it is launched");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_away_that_the_log_gives_and_the_fold_does_not_yet() {
    let fixture = ahead_of_the_fold().await;
    let second = Hold::new("x", 2);
    fixture.has_slot(&second, "a").await;
    assert_eq!(fixture.looks_at(&second, &slot("a")).await, Findings::default());
    assert_eq!(fixture.held("p", "a").await, [second]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_has_had_its_turn_gets_no_slot() {
    let fixture = ahead_of_the_fold().await;
    assert_eq!(fixture.misses("x", 1).await, Findings::default());
    assert_eq!(fixture.held("p", "a").await, []);
    // And the one whose turn it is does.
    assert_eq!(fixture.misses("x", 2).await, Findings { missing: 1, ..Findings::default() });
    assert_eq!(fixture.held("p", "a").await, [Hold::new("x", 2)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_is_kept_until_its_submission_would_be_in_the_log() {
    let (fixture, _) = fleet().await;
    let stamp = fixture.dispatcher.stamp();
    fixture.capacity().admit_to_agent("p", "a", &first("x"), ask(), stamp).await.unwrap();
    assert_eq!(fixture.looks_at(&first("x"), &slot("a")).await, Findings::default());
    fixture.passes(RECLAIM_AFTER / 2);
    assert_eq!(fixture.finishes().await, Findings::default());
    assert_eq!(fixture.held("p", "a").await, [first("x")]);
    fixture.passes(RECLAIM_AFTER);
    assert_eq!(fixture.finishes().await, Findings { leaked: 1, ..Findings::default() });
    assert_eq!(fixture.held("p", "a").await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_nobody_put_to_use_is_given_anew_when_nobody_can_be_about_to() {
    let (fixture, _) = fleet().await;
    fixture.waits_for("x", "a").await;
    fixture.has_slot(&first("x"), "a").await;
    assert_eq!(fixture.looks_at(&first("x"), &slot("a")).await, Findings::default());
    fixture.passes(RECLAIM_AFTER * 2);
    let found = fixture.looks_at(&first("x"), &slot("a")).await;
    assert_eq!(found, Findings { unconfirmed: 1, ..Findings::default() });
    fixture.dispatcher.finish().await;
    assert_eq!(fixture.state("x"), State::Running, "it was launched again");
    assert_eq!(fixture.held("p", "a").await, [first("x")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_has_its_slot_where_it_runs() {
    let (fixture, _) = fleet().await;
    let elsewhere = Findings { elsewhere: 1, ..Findings::default() };
    fixture.runs_on("x", "a").await;
    fixture.has_slot(&first("x"), "b").await;
    assert_eq!(fixture.looks_at(&first("x"), &slot("b")).await, elsewhere);
    assert_eq!((fixture.held("p", "a").await, fixture.held("p", "b").await), (vec![first("x")], vec![]));
    // Found in a queue, where nobody will call for it.
    fixture.runs_on("y", "a").await;
    fixture.has_place("y", "a").await;
    assert_eq!(fixture.looks_at(&first("y"), &queue_of("a")).await, elsewhere);
    assert_eq!(fixture.held("p", "a").await.len(), 2, "the log gives it, whatever the room");
    assert_eq!(fixture.queued("a").await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dispatch_without_an_answer_gets_a_slot_only_where_there_is_room() {
    let (fixture, _) = fleet().await;
    fixture.runs_on("runs", "a").await;
    fixture.has_slot(&first("runs"), "a").await;
    fixture.submitted("x", Some("a"), "p", Delivery::Push).await;
    fixture.granted("x", "a").await;
    assert_eq!(fixture.state("x"), State::Dispatching);
    assert_eq!(fixture.misses("x", 1).await, Findings::default());
    assert_eq!(fixture.held("p", "a").await, [first("runs")], "perhaps it was never put to its agent");
    fixture.has_place("x", "a").await;
    assert_eq!(fixture.looks_at(&first("x"), &queue_of("a")).await, Findings::default());
    assert_eq!(fixture.held("p", "a").await, [first("runs")], "however it is found");
    // There is room.
    let stamp = fixture.dispatcher.stamp();
    for hold in ["x", "runs"] {
        fixture.capacity().settle("p", &first(hold), stamp).await.unwrap();
    }
    assert_eq!(fixture.misses("x", 1).await, Findings { missing: 1, ..Findings::default() });
    assert_eq!(fixture.held("p", "a").await, [first("x")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_and_has_no_place_gets_one_when_it_is_not_just_being_placed() {
    let (fixture, _) = fleet().await;
    fixture.runs_on("runs", "a").await;
    fixture.has_slot(&first("runs"), "a").await;
    fixture.waits_for("x", "a").await;
    assert_eq!(fixture.misses("x", 1).await, Findings::default());
    assert_eq!(fixture.queued("a").await, []);
    fixture.passes(FINISH_AFTER * 2);
    assert_eq!(fixture.misses("x", 1).await, Findings { missing: 1, ..Findings::default() });
    assert_eq!(fixture.queued("a").await, [first("x")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_confirmed_is_finished_as_the_log_says() {
    let (fixture, _) = fleet().await;
    let admit = async |execution: &str, agent: &str| {
        let stamp = fixture.dispatcher.stamp();
        fixture.capacity().admit_to_agent("p", agent, &first(execution), ask(), stamp).await.unwrap();
    };
    // It was granted, and its dispatcher died.
    fixture.waits_for("x", "a").await;
    admit("x", "a").await;
    // It was dispatched, and Redis was not told.
    fixture.runs_on("y", "b").await;
    admit("y", "b").await;
    // It was to wait, and Redis was not told.
    fixture.waits_for("z", "b").await;
    admit("z", "b").await;
    // It was over before that.
    fixture.waits_for("over", "b").await;
    fixture.dispatcher.ledger.decide(&id("over"), |e| e.cancel("", "api")).await.unwrap();
    admit("over", "b").await;
    assert_eq!(fixture.finishes().await, Findings::default(), "somebody may be about to");
    assert_eq!(fixture.unconfirmed().await, 4);
    fixture.passes(FINISH_AFTER * 2);
    assert_eq!(fixture.finishes().await, Findings { unconfirmed: 1, leaked: 1, ..Findings::default() });
    fixture.dispatcher.finish().await;
    assert_eq!(fixture.state("x"), State::Running);
    assert_eq!(fixture.unconfirmed().await, 0);
    assert_eq!(
        (fixture.held("p", "b").await, fixture.queued("b").await),
        (vec![first("y")], vec![first("z")])
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_read_while_something_waits_is_built_anew_within_a_second() {
    let (fixture, _) = fleet().await;
    fixture.waits_for("x", "a").await;
    fixture.redis("ZADD rollcall:{p}:unconfirmed 1 nonsense").await;
    fixture.dispatcher.quick_audit().await.unwrap();
    fixture.dispatcher.finish().await;
    assert_eq!(fixture.unconfirmed().await, 0);
    assert_eq!(fixture.state("x"), State::Running, "its pool goes on");
}
