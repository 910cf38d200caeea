use rollcall_core::{
    AgentId, ExecutionId, InstanceId,
    agent::Status,
    event::{
        AgentEvent, ExecutionEvent, PayloadRef, Profile, RecoveryReason, StatusChanged, Submitted,
        TerminateOutcome,
    },
    execution::Loss,
    wire::{Delivery, OnLoss},
};

use super::*;
use crate::state::{Logged, TakeUpAges};

const T0: Timestamp = Timestamp::from_millis(1_000_000);

fn submitted(agent: Option<&str>) -> ExecutionEvent {
    Submitted {
        execution_id: ExecutionId::new("x").unwrap(),
        attempt: 1,
        agent_id: agent.map(|a| AgentId::new(a).unwrap()),
        pool: Pool::new("p").unwrap(),
        input: PayloadRef { bytes: 4, sha256: String::new(), seq: 1, attempt: 1 },
        timeout_ms: None,
        priority: 3,
        queue_ttl_ms: 1000,
        on_loss: OnLoss::Requeue,
        max_attempts: 3,
        stall_timeout_ms: None,
        lost_after_ms: None,
        delivery: Delivery::Push,
        labels: Default::default(),
        request_sha256: String::new(),
    }
    .into()
}

fn profile(agent: &str, pool: &str, capacity: u32) -> Profile {
    crate::fixture::profile(agent, "i", pool, capacity)
}

fn status(agent: &str, status: Status, by: Option<&str>) -> AgentEvent {
    AgentEvent::status(
        status,
        StatusChanged {
            agent_id: AgentId::new(agent).unwrap(),
            instance_id: None,
            previous: None,
            reason: "test".to_owned(),
            since: T0,
            evidence: serde_json::Value::Null,
            by: by.map(str::to_owned),
            code: None,
            message: None,
            deadline: None,
            undrained: false,
        },
    )
}

/// A projection that is driven by decisions, as the log is.
struct World {
    projection: Projection,
    seq: u64,
    log: Vec<(u64, ExecutionEvent)>,
}

impl World {
    fn new(agent: Option<&str>) -> Self {
        let mut world = Self { projection: Projection::default(), seq: 0, log: Vec::new() };
        world.tell(&submitted(agent));
        world
    }

    fn tell(&mut self, event: &ExecutionEvent) -> Change {
        self.seq += 1;
        self.log.push((self.seq, event.clone()));
        self.projection.apply_execution(self.seq, event, T0).unwrap().expect("news")
    }

    fn x(&self) -> Execution {
        self.projection.execution(&ExecutionId::new("x").unwrap()).unwrap().clone()
    }

    fn run_on(&mut self, agent: &str) {
        let x = self.x();
        let (agent, instance) = (AgentId::new(agent).unwrap(), InstanceId::new("i").unwrap());
        self.tell(&x.dispatch(x.attempt, &agent, &instance, 100, T0).unwrap());
        self.tell(&self.x().start(x.attempt).unwrap());
    }

    fn lose(&mut self) -> Change {
        self.recover(false)
    }

    fn hand_back(&mut self) -> Change {
        self.recover(true)
    }

    fn recover(&mut self, returned: bool) -> Change {
        let loss = Loss {
            attempt: self.x().attempt,
            reason: RecoveryReason::AgentLost,
            terminate: TerminateOutcome::NotAttempted,
            detected_after_ms: 1,
            evidence: serde_json::Value::Null,
            message: String::new(),
            returned,
            checkpoint: None,
        };
        self.tell(&self.x().lose(loss).unwrap())
    }
}

/// Reads the whole log into `behind`, whose tail has delivered it as far as `delivered`. Only recoveries are others' events.
fn read_ahead(behind: &mut Projection, log: &[(u64, ExecutionEvent)], delivered: u64) -> Vec<Effect> {
    let history = log.iter().map(|(seq, event)| Logged {
        seq: *seq,
        event,
        time: T0,
        foreign: matches!(event, ExecutionEvent::Recovered(_)),
    });
    let (folded, changes) = behind.catch_up(history, log.last().unwrap().0, delivered);
    assert_eq!(folded.as_ref(), behind.execution(&ExecutionId::new("x").unwrap()));
    changes.iter().flat_map(effects).collect()
}

#[test]
fn a_read_that_overtakes_the_tail_hands_out_what_others_did_once() {
    let mut world = World::new(Some("a"));
    world.run_on("a");
    let mut behind = Projection::default();
    for (seq, event) in &world.log {
        behind.apply_execution(*seq, event, T0).unwrap();
    }
    let delivered = world.seq;
    world.lose();
    world.run_on("a");
    world.lose();
    let requeue =
        |old, new| Effect::Requeue { old: Hold::new("x", old), new: Hold::new("x", new), hold_back: None };
    assert_eq!(
        read_ahead(&mut behind, &world.log, delivered),
        [requeue(1, 2), requeue(2, 3)],
        "both recoveries, in their order, and nothing of what a dispatcher wrote"
    );
    assert_eq!(read_ahead(&mut behind, &world.log, delivered), [], "the second reader finds them folded");
    for (seq, event) in &world.log {
        assert!(behind.apply_execution(*seq, event, T0).unwrap().is_none(), "and so does the tail");
    }
}

#[test]
fn of_an_execution_that_is_not_in_memory_only_what_the_tail_has_not_delivered_is_handed_out() {
    let mut world = World::new(Some("a"));
    world.run_on("a");
    world.lose();
    let first_loss = world.seq;
    world.run_on("a");
    world.lose();
    let second = Effect::Requeue { old: Hold::new("x", 2), new: Hold::new("x", 3), hold_back: None };
    assert_eq!(read_ahead(&mut Projection::default(), &world.log, first_loss), [second]);
    assert_eq!(read_ahead(&mut Projection::default(), &world.log, world.seq), []);
}

#[test]
fn what_does_not_wait_any_more_gets_no_place() {
    let mut world = World::new(Some("a"));
    world.run_on("a");
    let requeue = effects(&world.lose()).pop().unwrap();
    let waiting = world.x();
    assert_eq!(still_due(requeue.clone(), Some(&waiting)), requeue);
    let released = Effect::Settle(Hold::new("x", 1));
    world.run_on("a");
    assert_eq!(
        still_due(requeue.clone(), Some(&world.x())),
        requeue,
        "its slot keeps it from a second place"
    );
    world.lose();
    assert_eq!(still_due(requeue.clone(), Some(&world.x())), released, "a later attempt counts");
    let cancelled = world.x().cancel("enough", "test").unwrap();
    world.tell(&cancelled);
    assert!(world.x().state.is_terminal());
    assert_eq!(still_due(requeue.clone(), Some(&world.x())), released, "it has ended");
    assert_eq!(still_due(requeue, None), released, "it ended so long ago that it is forgotten");
}

#[test]
fn an_end_gives_its_slot_back() {
    let mut world = World::new(None);
    world.run_on("a");
    let facts = rollcall_core::execution::ReportFacts {
        agent_id: AgentId::new("a").unwrap(),
        instance_id: InstanceId::new("i").unwrap(),
        attempt: 1,
        outcome: rollcall_core::wire::Outcome::Completed,
        result: None,
        checkpoint: None,
        error: None,
    };
    let change = world.tell(&world.x().report(facts).unwrap());
    assert_eq!(effects(&change), [Effect::Settle(Hold::new("x", 1))]);
}

#[test]
fn a_loss_that_requeues_moves_the_hold_to_the_next_attempt() {
    let mut world = World::new(Some("a"));
    world.run_on("a");
    let change = world.lose();
    assert_eq!(
        effects(&change),
        [Effect::Requeue { old: Hold::new("x", 1), new: Hold::new("x", 2), hold_back: None }]
    );
    assert_eq!(queue_of(&change.after), Queue::Agent("a".to_owned()));
}

#[test]
fn a_late_completion_takes_the_next_attempt_out_of_its_queue() {
    let mut world = World::new(None);
    world.run_on("a");
    world.lose();
    let facts = rollcall_core::execution::ReportFacts {
        agent_id: AgentId::new("a").unwrap(),
        instance_id: InstanceId::new("i").unwrap(),
        attempt: 1,
        outcome: rollcall_core::wire::Outcome::Completed,
        result: None,
        checkpoint: None,
        error: None,
    };
    let change = world.tell(&world.x().report(facts).unwrap());
    assert_eq!(effects(&change), [Effect::Settle(Hold::new("x", 2)), Effect::Settle(Hold::new("x", 1))]);
}

#[test]
fn a_refused_dispatch_holds_its_agent_back() {
    let mut world = World::new(None);
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i").unwrap());
    world.tell(&world.x().dispatch(1, &agent, &instance, 100, T0).unwrap());
    let change = world.tell(&world.x().queue(1, Some("draining".to_owned())).unwrap());
    assert_eq!(
        effects(&change),
        [Effect::Requeue { old: Hold::new("x", 1), new: Hold::new("x", 1), hold_back: Some("a".to_owned()) }]
    );
}

#[test]
fn who_hands_work_back_again_and_again_is_held_back() {
    let mut world = World::new(None);
    let hold_back = |world: &mut World, agent: &str| {
        world.run_on(agent);
        let change = world.hand_back();
        let [Effect::Requeue { hold_back, .. }] = &effects(&change)[..] else { panic!("{change:?}") };
        hold_back.clone()
    };
    assert_eq!(hold_back(&mut world, "a"), None, "once it may");
    assert_eq!(hold_back(&mut world, "b"), None, "so may another one");
    assert_eq!(hold_back(&mut world, "b"), Some("b".to_owned()));
    assert_eq!(hold_back(&mut world, "a"), None);
    world.run_on("a");
    let [Effect::Requeue { hold_back, .. }] = &effects(&world.lose())[..] else { panic!() };
    assert_eq!(*hold_back, None, "a loss is bounded by what it counts");
}

#[test]
fn steps_that_move_no_slot_do_nothing() {
    let mut world = World::new(None);
    let queued = world.tell(&world.x().queue(1, None).unwrap());
    assert_eq!(effects(&queued), []);
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i").unwrap());
    let dispatched = world.tell(&world.x().dispatch(1, &agent, &instance, 100, T0).unwrap());
    assert_eq!(effects(&dispatched), []);
    let started = world.tell(&world.x().start(1).unwrap());
    assert_eq!(effects(&started), []);
    let cancelling = world.tell(&world.x().cancel("no", "test").unwrap());
    assert_eq!(effects(&cancelling), [Effect::Terminate]);
}

#[test]
fn redis_is_compared_with_the_log() {
    let mut world = World::new(None);
    let first = Hold::new("x", 1);
    let slot = |agent: &str| Place::Slot { agent: agent.to_owned(), granted_at_ms: 0 };
    let waiting = Place::Waiting(Queue::Pool);
    assert_eq!(misplaced(Some(&world.x()), &first, &waiting), None);
    assert_eq!(misplaced(Some(&world.x()), &first, &slot("a")), Some(Misplaced::Promoted));
    let queue_of_a = Place::Waiting(Queue::Agent("a".to_owned()));
    assert_eq!(misplaced(Some(&world.x()), &first, &queue_of_a), Some(Misplaced::WrongQueue));
    assert_eq!(misplaced(None, &first, &waiting), Some(Misplaced::Leaked));
    world.run_on("a");
    assert_eq!(misplaced(Some(&world.x()), &first, &slot("a")), None);
    let elsewhere = Some(Misplaced::Elsewhere { agent: AgentId::new("a").unwrap(), since_ms: 1_000_000 });
    assert_eq!(misplaced(Some(&world.x()), &first, &slot("b")), elsewhere);
    assert_eq!(misplaced(Some(&world.x()), &first, &waiting), elsewhere);
    world.lose();
    assert_eq!(misplaced(Some(&world.x()), &first, &slot("a")), Some(Misplaced::Leaked));
    assert_eq!(misplaced(Some(&world.x()), &Hold::new("x", 2), &waiting), None);
    // The attempt that it ended with holds nothing either.
    let x = world.x();
    world.tell(&x.expire(x.expires_at().unwrap()).unwrap());
    assert!(world.x().state.is_terminal() && world.x().attempt == 2);
    for place in [&slot("a"), &waiting] {
        assert_eq!(misplaced(Some(&world.x()), &Hold::new("x", 2), place), Some(Misplaced::Leaked));
    }
}

#[test]
fn what_nobody_confirmed_is_judged_by_the_log_as_it_is_now() {
    let mut world = World::new(None);
    let first = Hold::new("x", 1);
    let judge = |execution: Option<&Execution>, in_slot| {
        let verdicts = [false, true].map(|expired| unfinished(execution, &first, in_slot, expired));
        if execution.is_some() {
            assert_eq!(verdicts[0], verdicts[1], "what is in the log has no age");
        }
        verdicts
    };
    // Its submission may be on its way, for a while.
    for in_slot in [false, true] {
        assert_eq!(judge(None, in_slot), [Unfinished::Leave, Unfinished::Settle]);
    }
    let x = world.x();
    assert_eq!(judge(Some(&x), true)[0], Unfinished::Launch);
    assert_eq!(judge(Some(&x), false)[0], Unfinished::Confirm);
    world.run_on("a");
    let x = world.x();
    assert_eq!(judge(Some(&x), true)[0], Unfinished::Confirm);
    // Found in a queue, promoted and dispatched before the log was asked.
    assert_eq!(judge(Some(&x), false)[0], Unfinished::Leave);
    world.lose();
    let x = world.x();
    for in_slot in [false, true] {
        assert_eq!(judge(Some(&x), in_slot)[0], Unfinished::Settle, "the next attempt waits");
    }
}

#[test]
fn why_an_agent_takes_no_work_is_said() {
    let mut world = World::new(None);
    let agent = |world: &World| world.projection.agent(&AgentId::new("a").unwrap()).cloned().unwrap();
    world.projection.apply_agent(100, &AgentEvent::Registered(profile("a", "p", 4)), T0);
    world.projection.apply_agent(101, &status("a", Status::Connected, None), T0);
    assert_eq!(closed(&agent(&world)), None);
    world.projection.apply_agent(102, &status("a", Status::Disconnected, None), T0);
    assert_eq!(closed(&agent(&world)), Some("disconnected"));
    world.projection.apply_agent(103, &status("a", Status::Connected, None), T0);
    world.projection.apply_agent(104, &status("a", Status::Draining, Some("operator")), T0);
    assert_eq!(closed(&agent(&world)), Some("draining"));
    // A drain outlasts a fall.
    world.projection.apply_agent(105, &status("a", Status::Error, None), T0);
    assert_eq!(closed(&agent(&world)), Some("draining"));
}

#[test]
fn a_rebuild_loads_settings_slots_and_queues_of_its_pool_only() {
    let mut world = World::new(None);
    world.projection.apply_agent(100, &AgentEvent::Registered(profile("a", "p", 4)), T0);
    world.projection.apply_agent(101, &status("a", Status::Connected, None), T0);
    world.projection.apply_agent(102, &AgentEvent::Registered(profile("b", "other", 4)), T0);
    let pool = Pool::new("p").unwrap();
    let agent = Load::Agent {
        agent: "a".to_owned(),
        setting: AgentSetting { capacity: 4, open: true, external_only: false, setting_seq: 101 },
    };
    let waits = Load::Queued {
        queue: Queue::Pool,
        hold: Hold::new("x", 1),
        priority: Priority::new(3).unwrap(),
        order: 1,
    };
    let members = BTreeSet::from([AgentId::new("a").unwrap()]);
    assert_eq!(load_of(&pool, &members, &world.projection), [agent.clone(), waits.clone()]);
    assert_eq!(
        load_of(&pool, &BTreeSet::new(), &world.projection),
        [waits],
        "another pool may still have it"
    );
    world.run_on("a");
    let runs = Load::Slot { agent: "a".to_owned(), hold: Hold::new("x", 1), granted_at_ms: 1_000_000 };
    assert_eq!(load_of(&pool, &members, &world.projection), [agent, runs]);
    let change = world.lose();
    let Load::Queued { order, .. } = place_of_load(&change.after) else { panic!("it waits") };
    assert!(order < 0, "what was put back goes before what came later");
    assert_eq!(missing(&pool, &world.projection, &BTreeMap::new()).len(), 1);
}

#[test]
fn an_agent_that_drains_is_closed_whoever_wants_it() {
    for by in ["operator", "instance"] {
        let mut projection = Projection::default();
        projection.apply_agent(1, &AgentEvent::Registered(profile("a", "p", 4)), T0);
        projection.apply_agent(2, &status("a", Status::Connected, None), T0);
        let a = AgentId::new("a").unwrap();
        assert!(setting(projection.agent(&a).unwrap()).open);
        projection.apply_agent(3, &status("a", Status::Draining, Some(by)), T0);
        assert!(!setting(projection.agent(&a).unwrap()).open);
        // Healthy again is not: may work again.
        projection.apply_agent(4, &status("a", Status::Connected, None), T0);
        assert!(!setting(projection.agent(&a).unwrap()).open);
    }
}

#[test]
fn an_agent_without_nats_is_offered_only_what_needs_no_dispatch() {
    let a = AgentId::new("a").unwrap();
    let known = |instance: &str| {
        let mut projection = Projection::default();
        let instance_id = InstanceId::new(instance).unwrap();
        let profile = Profile { instance_id, ..profile("a", "p", 4) };
        projection.apply_agent(1, &AgentEvent::Registered(profile), T0);
        projection.agent(&a).unwrap().clone()
    };
    let (beating, of_file) = (known("i"), known("file-1"));
    assert!(setting(&of_file).external_only && !setting(&beating).external_only);
    let waiting = |named: Option<&str>, delivery: Delivery| {
        let ExecutionEvent::Submitted(request) = submitted(named) else { panic!("it is submitted") };
        Execution::submitted(Submitted { delivery, ..request }, 1, T0)
    };
    let (push, external) = (waiting(None, Delivery::Push), waiting(None, Delivery::External));
    assert_eq!((queue_of(&push), queue_of(&external)), (Queue::Pool, Queue::External));
    assert!(is_out_of_reach(&push, &of_file) && !is_out_of_reach(&push, &beating));
    assert!(!is_out_of_reach(&external, &of_file));
    // Named, it has nowhere else to go: its dispatch fails instead of waiting for ever.
    let named = waiting(Some("a"), Delivery::Push);
    assert_eq!(queue_of(&named), Queue::Agent("a".to_owned()));
    assert!(!is_out_of_reach(&named, &of_file));
}

/// Work for agent `a`, submitted in this order.
fn submitted_for_a(names: &[&str]) -> (Projection, u64) {
    let mut projection = Projection::default();
    let mut seq = 0;
    for name in names {
        let ExecutionEvent::Submitted(mut request) = submitted(Some("a")) else { unreachable!() };
        request.execution_id = ExecutionId::new(name).unwrap();
        seq += 1;
        projection.apply_execution(seq, &request.into(), T0).unwrap();
    }
    (projection, seq)
}

fn known(projection: &Projection, name: &str) -> Execution {
    projection.execution(&ExecutionId::new(name).unwrap()).unwrap().clone()
}

#[test]
fn what_an_agent_has_is_named_last_first() {
    // Neither the order of the ids nor that of their places says anything.
    let (mut projection, mut seq) = submitted_for_a(&["c", "a", "d", "b"]);
    let mut tell = |projection: &mut Projection, event: ExecutionEvent| {
        seq += 1;
        projection.apply_execution(seq, &event, T0).unwrap();
    };
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i").unwrap());
    let runs = known(&projection, "c").dispatch(1, &agent, &instance, 100, T0).unwrap();
    tell(&mut projection, runs);
    let back = known(&projection, "b").queue(1, Some("refused".to_owned())).unwrap();
    tell(&mut projection, back);
    let has = belongings(&agent, &projection);
    assert_eq!(has.held, [(Hold::new("c", 1), 1_000_000)]);
    let names: Vec<&str> = has.waiting.iter().map(ExecutionId::as_str).collect();
    assert_eq!(names, ["d", "a", "b"], "what was put back is the first");
    assert_eq!(belongings(&AgentId::new("b").unwrap(), &projection), Belongings::default());

    projection.apply_agent(100, &AgentEvent::Registered(profile("a", "p", 4)), T0);
    let missing = missing(&Pool::new("p").unwrap(), &projection, &BTreeMap::new());
    let names: Vec<&str> = missing.iter().map(|e| e.id().as_str()).collect();
    assert_eq!(names, ["c", "d", "a", "b"], "what waits is placed at the head, one by one");
}

#[test]
fn who_waits_for_an_answer_is_known_by_how_long() {
    let (mut projection, seq) = submitted_for_a(&["x", "y"]);
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i").unwrap());
    let at = T0.plus_ms(50);
    let asked = known(&projection, "x").dispatch(1, &agent, &instance, 100, at).unwrap();
    projection.apply_execution(seq + 1, &asked, at).unwrap();
    let unanswered_each = |projection: &Projection, now_ms: u64, dispatch_ms: u64, cancel_ms: u64| {
        let ages = TakeUpAges { dispatch_ms, cancel_ms };
        let found = projection.unanswered(T0.plus_ms(now_ms), ages);
        found
            .into_iter()
            .map(|(id, state, held)| (id.as_str().to_owned(), state, held.number))
            .collect::<Vec<_>>()
    };
    let unanswered = |projection: &Projection, now_ms: u64, age_ms: u64| {
        unanswered_each(projection, now_ms, age_ms, age_ms)
    };
    assert_eq!(unanswered(&projection, 149, 100), []);
    assert_eq!(unanswered_each(&projection, 150, 100, 9_000).len(), 1, "whatever time work has to end");
    assert_eq!(unanswered_each(&projection, 150, 9_000, 100), []);
    assert_eq!(unanswered(&projection, 150, 100), [("x".to_owned(), State::Dispatching, 1)]);
    let started = known(&projection, "x").start(1).unwrap();
    projection.apply_execution(seq + 2, &started, at).unwrap();
    assert_eq!(unanswered(&projection, 150, 0), []);
    let wish = known(&projection, "x").cancel("enough", "api").unwrap();
    projection.apply_execution(seq + 3, &wish, at.plus_ms(10)).unwrap();
    assert_eq!(unanswered(&projection, 159, 100), []);
    assert_eq!(unanswered(&projection, 160, 100), [("x".to_owned(), State::Cancelling, 1)]);
    assert_eq!(unanswered_each(&projection, 160, 100, 101), []);
    assert_eq!(unanswered_each(&projection, 160, 9_000, 100).len(), 1);
}

#[test]
fn an_agent_that_accepted_shows_how_far_redis_has_come() {
    let (mut projection, seq) = submitted_for_a(&["x", "y"]);
    projection.apply_agent(100, &AgentEvent::Registered(profile("a", "p", 4)), T0);
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i").unwrap());
    for (place, name) in (1..).zip(["x", "y"]) {
        let asked = known(&projection, name).dispatch(1, &agent, &instance, 100, T0).unwrap();
        projection.apply_execution(seq + place, &asked, T0).unwrap();
    }
    assert!(
        projection.reflected().is_empty(),
        "whoever dispatched them may have died before it looked again"
    );
    for (place, name) in (10..).zip(["y", "x"]) {
        let started = known(&projection, name).start(1).unwrap();
        projection.apply_execution(seq + place, &started, T0).unwrap();
        assert_eq!(projection.reflected().get("p"), Some(&(seq + 2)), "the dispatch of y");
        // Where it goes after it was asked has nothing to do with that.
        projection.apply_agent(101, &AgentEvent::Registered(profile("a", "q", 4)), T0);
        assert_eq!(projection.reflected().get("q"), None);
    }
}

#[test]
fn an_answer_to_one_dispatch_says_nothing_about_the_next_one_of_the_same_attempt() {
    let ExecutionEvent::Submitted(request) = submitted(None) else { unreachable!("as it is made") };
    let mut execution = Execution::submitted(request, 1, T0);
    let (one, two) = (AgentId::new("a").unwrap(), AgentId::new("b").unwrap());
    let instance = InstanceId::new("i").unwrap();
    let dispatched = execution.dispatch(1, &one, &instance, 900, T0).unwrap();
    execution.evolve(2, &dispatched, T0).unwrap();
    let first = execution.current().unwrap().clone();
    assert!(is_in_dispatch(&execution, &first));
    // Two dispatchers asked the same agent; the one that was refused first has put it back and given it to another.
    let back = execution.queue(1, Some("draining".to_owned())).unwrap();
    execution.evolve(3, &back, T0).unwrap();
    assert!(!is_in_dispatch(&execution, &first));
    let again = execution.dispatch(1, &two, &instance, 900, T0).unwrap();
    execution.evolve(4, &again, T0).unwrap();
    assert!(
        !is_in_dispatch(&execution, &first),
        "the second refusal of the first agent is no word of the other"
    );
    let second = execution.current().unwrap().clone();
    assert!(is_in_dispatch(&execution, &second));
}

#[test]
fn who_accepts_or_refuses_for_good_speaks_only_of_its_own_dispatch() {
    // To another agent, and to the same one at another time.
    for (next, later_ms) in [("b", 0), ("a", 7)] {
        let ExecutionEvent::Submitted(request) = submitted(None) else { unreachable!("as it is made") };
        let mut execution = Execution::submitted(request, 1, T0);
        let instance = InstanceId::new("i").unwrap();
        let mut seq = 1;
        let mut tell = |execution: &mut Execution, event: &ExecutionEvent, at: Timestamp| {
            seq += 1;
            execution.evolve(seq, event, at).unwrap();
        };
        let dispatched = execution.dispatch(1, &AgentId::new("a").unwrap(), &instance, 900, T0).unwrap();
        tell(&mut execution, &dispatched, T0);
        let first = execution.current().unwrap().clone();
        let back = execution.queue(1, Some("slot_lost".to_owned())).unwrap();
        tell(&mut execution, &back, T0);
        let again = execution.dispatch(1, &AgentId::new(next).unwrap(), &instance, 900, T0).unwrap();
        tell(&mut execution, &again, T0.plus_ms(later_ms));
        let second = execution.current().unwrap().clone();
        let wish = execution.cancel("enough", "api").unwrap();
        for cancelled in [false, true] {
            if cancelled {
                tell(&mut execution, &wish, T0);
            }
            assert!(accepted(&execution, &first).is_err(), "{next} {cancelled}");
            assert!(unfit(&execution, &first, "unsupported").is_err(), "{next} {cancelled}");
            assert!(accepted(&execution, &second).is_ok(), "{next} {cancelled}");
            assert!(unfit(&execution, &second, "unsupported").is_ok(), "{next} {cancelled}");
        }
    }
}

#[test]
fn a_refusal_is_for_now_for_ever_or_not_ours_to_judge() {
    let back = |reason: &str| Answer::Back(reason.to_owned());
    for reason in ["draining", "at_capacity", "busy with something else", "Terminated", "refused"] {
        assert_eq!(refused(Some(reason)), back(reason), "{reason}");
    }
    assert_eq!(refused(None), back("refused"));
    assert_eq!(refused(Some("unsupported")), Answer::Unfit("unsupported".to_owned()));
    assert_eq!(refused(Some("terminated")), Answer::Unknown, "it may have run there");
    assert_eq!(refused(Some(&"\u{e4}".repeat(1_000))), back(&"\u{e4}".repeat(200)), "it goes into the log");
}
