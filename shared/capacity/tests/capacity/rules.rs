//! Each rule by itself, on the model and on Redis alike.

use rollcall_capacity::testing::RedisServer;
use rollcall_capacity::{
    AgentSetting, Ask, Capacity, Confirmation, Epoch, Error, Grant, GrantedSlot, Hold, Load, MAX_EXACT,
    ModelCapacity, Outcome, PAGE, PROMOTE_BATCH, Place, Priority, Queue, Requeue, Stamp,
};

use crate::support::*;

macro_rules! on_both {
    ($($rule:ident),* $(,)?) => {
        mod on_the_model {
            $(#[tokio::test] async fn $rule() { super::$rule(rollcall_capacity::ModelCapacity::new()).await; })*
        }
        mod on_redis {
            $(#[tokio::test] async fn $rule() {
                let server = super::RedisServer::start();
                super::$rule(crate::support::connect(&server.url()).await).await;
            })*
        }
    };
}

on_both!(
    nothing_is_granted_at_capacity,
    a_repeated_admission_changes_nothing,
    a_queue_has_a_depth,
    priority_then_arrival_then_requeues_first,
    closed_and_unknown_agents_queue,
    settling_what_does_not_hold_changes_nothing,
    settling_promotes_one_own_queue_first,
    only_what_nobody_confirmed_is_reclaimed,
    another_place_than_asked_for_is_said_to_be_one,
    a_lowered_capacity_is_reached_by_attrition,
    the_least_loaded_agent_gets_pool_work,
    an_agent_that_no_dispatch_reaches_gets_only_what_needs_none,
    opening_promotes_in_batches,
    an_older_setting_is_ignored,
    a_refused_dispatch_goes_back_and_holds_back,
    a_repeated_requeue_changes_nothing,
    a_requeue_takes_another_free_agent,
    requeued_as_it_is_a_hold_leaves_only_the_slot_that_is_meant,
    a_refusal_takes_back_no_slot_that_was_granted_after_it,
    what_the_log_gives_is_claimed_where_there_is_room,
    one_slot_too_many_is_said_to_be_that,
    who_waits_ahead_is_served_first,
    one_release_promotes_one,
    unconfirmed_until_confirmed,
    a_promotion_is_not_confirmed_as_queued,
    a_settled_grant_can_not_be_confirmed,
    adopting_records_what_runs,
    only_the_slot_that_was_found_is_relocated,
    a_removed_agent_gives_up_all_it_has,
    numbers_that_lose_exactness_are_refused,
    versions_count_changes_only,
);

async fn nothing_is_granted_at_capacity<C: Capacity>(c: C) {
    with_agent(&c, "a", 2).await;
    for name in ["x", "y"] {
        granted(&c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await.unwrap());
    }
    assert_eq!(position(&c.admit_to_agent(POOL, "a", &hold("z"), ask(5, 9), at(2)).await.unwrap()), 1);
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("w"), ask(5, 9), at(2)).await.unwrap()), 1);
    assert!(c.promote(POOL, "a", at(3)).await.unwrap().promoted.is_empty());
    let view = c.inspect(POOL, "a", 10).await.unwrap();
    assert_eq!((view.held_count, view.queue_len), (2, 1));
}

async fn a_repeated_admission_changes_nothing<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    let before = c.meta(POOL).await.unwrap();
    let again = c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(3)).await.unwrap();
    assert!(matches!(again.outcome, Outcome::Granted { already: true, .. }));
    let again = c.admit_to_pool(POOL, &hold("y"), ask(5, 9), at(3)).await.unwrap();
    assert_eq!(again.outcome, Outcome::Queued { position: 1, already: true });
    assert_eq!(c.meta(POOL).await.unwrap(), before);
}

async fn another_place_than_asked_for_is_said_to_be_one<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    for name in ["x", "y", "p"] {
        c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await.unwrap();
    }
    c.settle(POOL, &hold("p"), at(2)).await.unwrap();
    c.admit_to_pool(POOL, &hold("p"), ask(5, 9), at(2)).await.unwrap();
    let to_agent = async |name: &str, agent: &str, priority| {
        c.admit_to_agent(POOL, agent, &hold(name), ask(priority, 9), at(3)).await.unwrap().as_asked
    };
    let to_pool = async |name: &str, priority| {
        c.admit_to_pool(POOL, &hold(name), ask(priority, 9), at(3)).await.unwrap().as_asked
    };
    assert!(to_agent("new", "b", 5).await);
    // A slot has no priority, and whoever asked for any agent has asked for this one too.
    assert!(to_agent("x", "a", 3).await && to_pool("x", 5).await);
    assert!(!to_agent("x", "b", 5).await);
    assert!(to_agent("y", "a", 5).await);
    assert!(!to_agent("y", "a", 4).await && !to_agent("y", "b", 5).await && !to_pool("y", 5).await);
    assert!(to_pool("p", 5).await);
    assert!(!to_pool("p", 4).await && !to_agent("p", "a", 5).await);
    // What needs no dispatch is other work.
    let external = Ask { external: true, ..ask(5, 9) };
    let only = AgentSetting { external_only: true, ..setting(1, true, 1) };
    c.set_agent(POOL, "file", only, at(4)).await.unwrap();
    let as_external =
        async |name: &str| c.admit_to_pool(POOL, &hold(name), external, at(4)).await.unwrap().as_asked;
    assert!(!as_external("p").await && as_external("x").await);
    assert!(as_external("e").await && as_external("e").await && !to_pool("e", 5).await);
    assert!(as_external("f").await && as_external("f").await && !to_pool("f", 5).await);
}

async fn only_what_nobody_confirmed_is_reclaimed<C: Capacity>(c: C) {
    with_agent(&c, "a", 2).await;
    let mut grants = Vec::new();
    for name in ["x", "y"] {
        let admission = c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await.unwrap();
        grants.push(granted(&admission).clone());
    }
    for name in ["z", "w", "v"] {
        c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await.unwrap();
    }
    c.confirm(POOL, &grants[0], at(3)).await.unwrap();
    assert!(c.confirm_queued(POOL, &hold("z"), at(3)).await.unwrap());
    let before = c.meta(POOL).await.unwrap();
    for name in ["x", "z", "nobody"] {
        assert_eq!(c.reclaim(POOL, &hold(name), at(4)).await.unwrap(), Default::default(), "{name}");
    }
    assert_eq!(c.meta(POOL).await.unwrap(), before);
    assert!(c.reclaim(POOL, &hold("w"), at(4)).await.unwrap().dequeued);
    let freed = c.reclaim(POOL, &hold("y"), at(4)).await.unwrap();
    assert!(freed.released);
    assert_eq!(names(&freed.promoted), ["z"]);
    assert_eq!(queue_names(&c, "a").await, ["v"]);
}

async fn a_queue_has_a_depth<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    for (name, depth) in [("x", 0), ("y", 2), ("z", 2)] {
        c.admit_to_agent(POOL, "a", &hold(name), ask(5, depth), at(2)).await.unwrap();
    }
    let full = c.admit_to_agent(POOL, "a", &hold("w"), ask(0, 2), at(2)).await.unwrap();
    assert_eq!(full.outcome, Outcome::Full);
    assert!(!c.settle(POOL, &hold("w"), at(2)).await.unwrap().dequeued, "nothing was recorded");
    let full = c.admit_to_pool(POOL, &hold("w"), ask(0, 0), at(2)).await.unwrap();
    assert_eq!(full.outcome, Outcome::Full);
    // The pool's queue is another one.
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("w"), ask(0, 1), at(2)).await.unwrap()), 1);
}

async fn priority_then_arrival_then_requeues_first<C: Capacity>(c: C) {
    ready(&c).await;
    for (name, priority) in [("c", 5), ("e", 9), ("d", 5), ("a", 0)] {
        c.admit_to_agent(POOL, "q", &hold(name), ask(priority, 9), at(2)).await.unwrap();
    }
    let back = |name: &str, priority| Requeue {
        old: hold(name),
        new: hold(name),
        queue: Queue::Agent("q".into()),
        priority: Priority::new(priority).unwrap(),
        hold_back: None,
        granted_at_ms: None,
        granted_by_ms: None,
    };
    c.requeue(POOL, &back("b2", 5), at(3)).await.unwrap();
    c.requeue(POOL, &back("b1", 5), at(3)).await.unwrap();
    assert_eq!(queue_names(&c, "q").await, ["a", "b1", "b2", "c", "d", "e"]);
    let view = c.inspect(POOL, "q", 3).await.unwrap();
    assert_eq!(
        view.queue.iter().map(|q| (q.priority.get(), q.position)).collect::<Vec<_>>(),
        [(0, 1), (5, 2), (5, 3)]
    );
}

async fn closed_and_unknown_agents_queue<C: Capacity>(c: C) {
    with_agent(&c, "shut", 3).await;
    c.set_agent(POOL, "shut", setting(3, false, 2), at(1)).await.unwrap();
    for agent in ["shut", "stranger"] {
        let admission = c.admit_to_agent(POOL, agent, &hold(agent), ask(5, 9), at(2)).await.unwrap();
        assert_eq!(position(&admission), 1);
        assert!(c.promote(POOL, agent, at(2)).await.unwrap().promoted.is_empty());
    }
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("any"), ask(5, 9), at(2)).await.unwrap()), 1);
    let opened = c.set_agent(POOL, "shut", setting(3, true, 3), at(4)).await.unwrap();
    assert_eq!(names(&opened.promoted), ["shut", "any"]);
    assert_eq!(c.agents(POOL).await.unwrap(), ["shut", "stranger"]);
}

async fn settling_what_does_not_hold_changes_nothing<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    for name in ["x", "y", "z"] {
        c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await.unwrap();
    }
    let before = (c.meta(POOL).await.unwrap(), c.inspect(POOL, "a", 9).await.unwrap());
    for stranger in [Hold::new("x", 2), Hold::new("x", 11), hold("nobody")] {
        assert_eq!(c.settle(POOL, &stranger, at(3)).await.unwrap(), Default::default());
    }
    assert_eq!((c.meta(POOL).await.unwrap(), c.inspect(POOL, "a", 9).await.unwrap()), before);

    assert_eq!(names(&c.settle(POOL, &hold("x"), at(4)).await.unwrap().promoted), ["y"]);
    // The replayed release of the same hold frees nothing and promotes nobody.
    assert_eq!(c.settle(POOL, &hold("x"), at(5)).await.unwrap(), Default::default());
    let gone = c.settle(POOL, &hold("z"), at(6)).await.unwrap();
    assert!(gone.dequeued && !gone.released && gone.promoted.is_empty());
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held_count, 1);
}

async fn settling_promotes_one_own_queue_first<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_pool(POOL, &hold("any"), ask(0, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("own"), ask(9, 9), at(3)).await.unwrap();
    assert_eq!(names(&c.settle(POOL, &hold("x"), at(4)).await.unwrap().promoted), ["own"]);
    let promoted = c.settle(POOL, &hold("own"), at(5)).await.unwrap().promoted;
    assert_eq!((names(&promoted), promoted[0].agent.as_str()), (vec!["any"], "a"));
    // A closed agent gets nothing for what it gives back.
    c.set_agent(POOL, "a", setting(1, false, 2), at(5)).await.unwrap();
    assert!(c.settle(POOL, &hold("any"), at(6)).await.unwrap().promoted.is_empty());
}

async fn a_lowered_capacity_is_reached_by_attrition<C: Capacity>(c: C) {
    with_agent(&c, "a", 3).await;
    for name in ["x", "y", "z", "w"] {
        c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await.unwrap();
    }
    c.set_agent(POOL, "a", setting(1, true, 2), at(3)).await.unwrap();
    for name in ["x", "y"] {
        let settled = c.settle(POOL, &hold(name), at(4)).await.unwrap();
        assert!(settled.released && settled.promoted.is_empty(), "held is still at capacity");
    }
    assert_eq!(names(&c.settle(POOL, &hold("z"), at(5)).await.unwrap().promoted), ["w"]);
}

async fn the_least_loaded_agent_gets_pool_work<C: Capacity>(c: C) {
    with_agent(&c, "big", 4).await;
    c.set_agent(POOL, "small", setting(2, true, 1), at(1)).await.unwrap();
    let mut got = Vec::new();
    for i in 0..7 {
        let admission = c.admit_to_pool(POOL, &hold(&format!("x{i}")), ask(5, 9), at(2)).await.unwrap();
        match admission.outcome {
            Outcome::Granted { grant, .. } => got.push(grant.agent),
            other => assert_eq!(other, Outcome::Queued { position: 1, already: false }),
        }
    }
    assert_eq!(got, ["big", "small", "big", "big", "small", "big"]);
    assert_eq!(c.inspect_pool(POOL, 9).await.unwrap().free_agents, 0);
}

async fn an_agent_that_no_dispatch_reaches_gets_only_what_needs_none<C: Capacity>(c: C) {
    let only = |slots, seq| AgentSetting { external_only: true, ..setting(slots, true, seq) };
    let external = Ask { external: true, ..ask(5, 9) };
    with_agent(&c, "dispatched", 1).await;
    c.set_agent(POOL, "file", only(2, 1), at(1)).await.unwrap();
    // It goes first for what only it and all others can take, and is left out for the rest.
    let first = c.admit_to_pool(POOL, &hold("e1"), external, at(2)).await.unwrap();
    assert_eq!(granted(&first).agent, "file");
    let push = c.admit_to_pool(POOL, &hold("p1"), ask(5, 9), at(2)).await.unwrap();
    assert_eq!(granted(&push).agent, "dispatched");
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("p2"), ask(5, 9), at(2)).await.unwrap()), 1);
    assert!(c.waiting_with_free(POOL).await.unwrap().is_empty(), "what waits is not for it");
    assert!(c.promote(POOL, "file", at(3)).await.unwrap().promoted.is_empty());
    // What it can take passes what it can't, wherever that stands.
    let second = c.admit_to_pool(POOL, &hold("e2"), external, at(4)).await.unwrap();
    assert_eq!(granted(&second).agent, "file");
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("e3"), external, at(4)).await.unwrap()), 2);
    let freed = c.settle(POOL, &hold("e1"), at(5)).await.unwrap();
    assert_eq!((names(&freed.promoted), freed.promoted[0].agent.as_str()), (vec!["e3"], "file"));
    // One by one the rest goes where a dispatch reaches; put back it stays what it is.
    let freed = c.settle(POOL, &hold("p1"), at(6)).await.unwrap();
    assert_eq!((names(&freed.promoted), freed.promoted[0].agent.as_str()), (vec!["p2"], "dispatched"));
    let back = Requeue { hold_back: None, granted_at_ms: Some(5), ..refused("e3", "file", Queue::External) };
    assert_eq!(names(&c.requeue(POOL, &back, at(7)).await.unwrap().promoted), ["e3"]);
    // Named, it has a queue as everybody.
    assert_eq!(position(&c.admit_to_agent(POOL, "file", &hold("own"), ask(5, 9), at(8)).await.unwrap()), 1);
    // Dispatches reach it now: it takes everything.
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("p3"), ask(5, 9), at(8)).await.unwrap()), 1);
    let filled = c.set_agent(POOL, "file", setting(4, true, 2), at(9)).await.unwrap();
    assert_eq!(names(&filled.promoted), ["own", "p3"]);
}

async fn opening_promotes_in_batches<C: Capacity>(c: C) {
    with_agent(&c, "a", 0).await;
    let many = PROMOTE_BATCH + 10;
    for i in 0..many {
        c.admit_to_agent(POOL, "a", &hold(&format!("x{i:03}")), ask(5, 999), at(2)).await.unwrap();
    }
    let first = c.set_agent(POOL, "a", setting(1000, true, 2), at(3)).await.unwrap();
    assert_eq!((first.promoted.len(), first.more), (PROMOTE_BATCH, true));
    assert_eq!(c.waiting_with_free(POOL).await.unwrap(), ["a"]);
    let rest = c.promote(POOL, "a", at(4)).await.unwrap();
    assert_eq!((rest.promoted.len(), rest.more), (10, false));
    assert!(c.waiting_with_free(POOL).await.unwrap().is_empty());
    assert_eq!(c.inspect(POOL, "a", 5).await.unwrap().held_count, many as u64);
}

async fn an_older_setting_is_ignored<C: Capacity>(c: C) {
    with_agent(&c, "a", 0).await;
    c.set_agent(POOL, "a", setting(1, false, 7), at(1)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(1)).await.unwrap();
    let old = c.set_agent(POOL, "a", setting(9, true, 6), at(2)).await.unwrap();
    assert_eq!(old, Default::default());
    let view = c.inspect(POOL, "a", 9).await.unwrap();
    assert_eq!((view.setting, view.held_count), (Some(setting(1, false, 7)), 0));
}

fn refused(name: &str, agent: &str, queue: Queue) -> Requeue {
    Requeue {
        old: hold(name),
        new: hold(name),
        queue,
        priority: Priority::default(),
        hold_back: Some(agent.into()),
        granted_at_ms: None,
        granted_by_ms: None,
    }
}

async fn a_refused_dispatch_goes_back_and_holds_back<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    let back = refused("x", "a", Queue::Agent("a".into()));
    let done = c.requeue(POOL, &back, at(3)).await.unwrap();
    assert!(done.released && done.queued && done.promoted.is_empty(), "{done:?}");
    assert_eq!(queue_names(&c, "a").await, ["x", "y"]);
    assert!(c.inspect(POOL, "a", 9).await.unwrap().held_back);
    // Not offered again, by no way.
    assert!(c.promote(POOL, "a", at(4)).await.unwrap().promoted.is_empty());
    assert!(c.set_agent(POOL, "a", setting(2, true, 2), at(4)).await.unwrap().promoted.is_empty());
    assert_eq!(position(&c.admit_to_agent(POOL, "a", &hold("z"), ask(5, 9), at(4)).await.unwrap()), 3);
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("w"), ask(5, 9), at(4)).await.unwrap()), 1);
    assert!(c.waiting_with_free(POOL).await.unwrap().is_empty());
    let opened = c.reopen(POOL, "a", at(5)).await.unwrap();
    assert_eq!(names(&opened.promoted), ["x", "y"]);
    assert_eq!(c.reopen(POOL, "a", at(6)).await.unwrap(), Default::default());
}

async fn a_repeated_requeue_changes_nothing<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.set_agent(POOL, "b", setting(1, true, 1), at(1)).await.unwrap();
    let first = c.admit_to_pool(POOL, &hold("x"), ask(5, 9), at(2)).await.unwrap();
    assert_eq!(granted(&first).agent, "a");
    // Refused by a, it is promoted to b at once; the repetition must not take it away from there.
    let back = refused("x", "a", Queue::Pool);
    let done = c.requeue(POOL, &back, at(3)).await.unwrap();
    assert_eq!(done.promoted[0].agent, "b");
    let before = c.meta(POOL).await.unwrap();
    assert_eq!(c.requeue(POOL, &back, at(4)).await.unwrap(), Default::default());
    assert_eq!(c.meta(POOL).await.unwrap(), before);

    let next = Requeue { old: hold("x"), new: Hold::new("x", 2), hold_back: None, ..back };
    let done = c.requeue(POOL, &next, at(5)).await.unwrap();
    assert!(done.released && done.queued);
    assert_eq!((done.promoted[0].agent.as_str(), done.promoted[0].hold.attempt), ("b", 2));
    let before = c.meta(POOL).await.unwrap();
    assert_eq!(c.requeue(POOL, &next, at(6)).await.unwrap(), Default::default());
    assert_eq!(c.meta(POOL).await.unwrap(), before);
}

async fn a_requeue_takes_another_free_agent<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("own"), ask(5, 9), at(2)).await.unwrap();
    c.set_agent(POOL, "b", setting(1, true, 1), at(1)).await.unwrap();
    let lost = Requeue {
        old: hold("x"),
        new: Hold::new("x", 2),
        queue: Queue::Pool,
        priority: Priority::default(),
        hold_back: None,
        granted_at_ms: None,
        granted_by_ms: None,
    };
    let done = c.requeue(POOL, &lost, at(3)).await.unwrap();
    let got: Vec<_> = done.promoted.iter().map(|g| (g.hold.to_string(), g.agent.clone())).collect();
    assert_eq!(got, [("own:1".to_owned(), "a".to_owned()), ("x:2".to_owned(), "b".to_owned())]);
}

async fn requeued_as_it_is_a_hold_leaves_only_the_slot_that_is_meant<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    let place = |granted_at_ms| Requeue {
        hold_back: None,
        granted_at_ms,
        ..refused("x", "a", Queue::Agent("a".into()))
    };
    // Somebody who takes it for lost, and somebody who saw an earlier slot of it.
    assert_eq!(c.requeue(POOL, &place(None), at(3)).await.unwrap(), Default::default());
    assert_eq!(c.requeue(POOL, &place(Some(1)), at(3)).await.unwrap(), Default::default());
    let wrong_moment = Requeue { granted_at_ms: Some(1), ..refused("x", "a", Queue::Pool) };
    assert_eq!(c.requeue(POOL, &wrong_moment, at(3)).await.unwrap(), Default::default());
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held[0].hold, hold("x"));

    // It leaves the slot that is meant, and is served again as the head of its queue.
    let done = c.requeue(POOL, &place(Some(2)), at(4)).await.unwrap();
    assert!(done.released && done.queued, "{done:?}");
    assert_eq!(names(&done.promoted), ["x"]);
    // The slot that it has now is another one.
    assert_eq!(c.requeue(POOL, &place(Some(2)), at(5)).await.unwrap(), Default::default());
    assert!(matches!(
        c.requeue(POOL, &place(Some(MAX_EXACT + 1)), at(5)).await,
        Err(Error::OutOfRange { what: "granted_at_ms", .. })
    ));
}

async fn a_refusal_takes_back_no_slot_that_was_granted_after_it<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(5)).await.unwrap();
    let refused_at = |ms| Requeue { granted_by_ms: Some(ms), ..refused("x", "a", Queue::Agent("a".into())) };
    assert_eq!(c.requeue(POOL, &refused_at(4), at(6)).await.unwrap(), Default::default());
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held[0].hold, hold("x"));
    let done = c.requeue(POOL, &refused_at(5), at(7)).await.unwrap();
    assert!(done.released && done.queued, "{done:?}");
    assert!(matches!(
        c.requeue(POOL, &refused_at(MAX_EXACT + 1), at(8)).await,
        Err(Error::OutOfRange { what: "granted_by_ms", .. })
    ));
}

async fn what_the_log_gives_is_claimed_where_there_is_room<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    let waits = c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    assert_eq!(position(&waits), 1);
    let claim = |name: &str| Grant { hold: hold(name), agent: "a".into(), epoch: Epoch::before_all() };
    assert_eq!(c.confirm(POOL, &claim("y"), at(3)).await.unwrap(), Confirmation::Lost);
    assert_eq!(c.confirm(POOL, &claim("z"), at(3)).await.unwrap(), Confirmation::Lost);
    let has = c.confirm(POOL, &claim("x"), at(3)).await.unwrap();
    assert_eq!(has, Confirmation::Confirmed { reclaimed: false });
    assert_eq!(queue_names(&c, "a").await, ["y"]);
    c.set_agent(POOL, "a", setting(2, false, 2), at(4)).await.unwrap();
    assert_eq!(c.confirm(POOL, &claim("y"), at(4)).await.unwrap(), Confirmation::Lost, "it is closed");
    c.settle(POOL, &hold("y"), at(5)).await.unwrap();
    c.set_agent(POOL, "a", setting(2, true, 3), at(5)).await.unwrap();
    let taken = c.confirm(POOL, &claim("z"), at(6)).await.unwrap();
    assert_eq!(taken, Confirmation::Confirmed { reclaimed: true });
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held_count, 2);
}

async fn one_slot_too_many_is_said_to_be_that<C: Capacity>(c: C) {
    // Twice rebuilt, from a log in which one got the slot of the other and both were dispatched in the end.
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let slot = |name: &str| Load::Slot { agent: "a".into(), hold: hold(name), granted_at_ms: 1 };
    let items = [Load::Agent { agent: "a".into(), setting: setting(1, true, 1) }, slot("x"), slot("y")];
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
    let claim = |name: &str| Grant { hold: hold(name), agent: "a".into(), epoch: Epoch::before_all() };
    assert_eq!(c.confirm(POOL, &claim("x"), at(2)).await.unwrap(), Confirmation::Crowded);
    assert_eq!(c.confirm(POOL, &claim("y"), at(2)).await.unwrap(), Confirmation::Crowded);
    c.settle(POOL, &hold("y"), at(3)).await.unwrap();
    let alone = c.confirm(POOL, &claim("x"), at(4)).await.unwrap();
    assert_eq!(alone, Confirmation::Confirmed { reclaimed: false });
    // A capacity that is lowered below what is held is the same.
    c.set_agent(POOL, "a", setting(0, true, 2), at(5)).await.unwrap();
    assert_eq!(c.confirm(POOL, &claim("x"), at(5)).await.unwrap(), Confirmation::Crowded);
}

async fn who_waits_ahead_is_served_first<C: Capacity>(c: C) {
    // A rebuild may leave free slots beside waiting work, until its promotions have run.
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let queued = |name: &str, queue, order| rollcall_capacity::Load::Queued {
        queue,
        hold: hold(name),
        priority: Priority::default(),
        order,
    };
    let own = || Queue::Agent("a".into());
    let items = [
        rollcall_capacity::Load::Agent { agent: "a".into(), setting: setting(2, true, 1) },
        queued("second", own(), 2),
        queued("first", own(), -7),
        queued("any", Queue::Pool, 1),
    ];
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
    let admission = c.admit_to_agent(POOL, "a", &hold("new"), ask(5, 9), at(2)).await.unwrap();
    assert_eq!(names(&admission.promoted), ["first", "second"]);
    assert_eq!(position(&admission), 1);
    c.settle(POOL, &hold("first"), at(3)).await.unwrap();
    c.set_agent(POOL, "b", setting(3, true, 1), at(3)).await.unwrap();
    // Priority 0 goes ahead of those who wait.
    let admission = c.admit_to_pool(POOL, &hold("urgent"), ask(0, 9), at(4)).await.unwrap();
    assert_eq!(granted(&admission).agent, "b");
}

async fn one_release_promotes_one<C: Capacity>(c: C) {
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let mut items = vec![
        rollcall_capacity::Load::Agent { agent: "a".into(), setting: setting(9, true, 1) },
        rollcall_capacity::Load::Slot { agent: "a".into(), hold: hold("x"), granted_at_ms: 1 },
    ];
    for order in 0..4 {
        items.push(rollcall_capacity::Load::Queued {
            queue: if order < 2 { Queue::Agent("a".into()) } else { Queue::Pool },
            hold: hold(&format!("w{order}")),
            priority: Priority::default(),
            order,
        });
    }
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
    // Nine are free and four wait, but a release is answered by one promotion; the others are for `promote`.
    assert_eq!(names(&c.settle(POOL, &hold("x"), at(2)).await.unwrap().promoted), ["w0"]);
    assert_eq!(names(&c.promote(POOL, "a", at(3)).await.unwrap().promoted), ["w1", "w2", "w3"]);
}

async fn unconfirmed_until_confirmed<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    let x = c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(10)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(11)).await.unwrap();
    assert!(c.unconfirmed(POOL, 10, 9).await.unwrap().is_empty());
    let both = c.unconfirmed(POOL, 12, 9).await.unwrap();
    assert_eq!(
        both.iter().map(|u| (u.placed.hold.execution_id.as_str(), u.since_ms)).collect::<Vec<_>>(),
        [("x", 10), ("y", 11)]
    );
    assert_eq!(both[0].grant().as_ref(), Some(granted(&x)));
    assert_eq!(both[1].grant(), None);
    let confirmed = c.confirm(POOL, granted(&x), at(12)).await.unwrap();
    assert_eq!(confirmed, Confirmation::Confirmed { reclaimed: false });
    assert!(c.confirm_queued(POOL, &hold("y"), at(12)).await.unwrap());
    assert!(c.unconfirmed(POOL, 99, 9).await.unwrap().is_empty());
    // Promoted, it has to be confirmed anew.
    c.settle(POOL, &hold("x"), at(20)).await.unwrap();
    let promoted = c.unconfirmed(POOL, 99, 9).await.unwrap();
    assert_eq!(promoted[0].placed.place, Place::Slot { agent: "a".into(), granted_at_ms: 20 });
}

async fn a_promotion_is_not_confirmed_as_queued<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    c.settle(POOL, &hold("x"), at(3)).await.unwrap();
    assert!(!c.confirm_queued(POOL, &hold("y"), at(4)).await.unwrap());
    assert_eq!(c.unconfirmed(POOL, 99, 9).await.unwrap().len(), 1);
}

async fn a_settled_grant_can_not_be_confirmed<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    let x = c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.settle(POOL, &hold("x"), at(3)).await.unwrap();
    assert_eq!(c.confirm(POOL, granted(&x), at(4)).await.unwrap(), Confirmation::Lost);
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held_count, 0);
}

async fn adopting_records_what_runs<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    assert!(c.adopt(POOL, "a", &hold("y"), 7, at(3)).await.unwrap());
    assert!(!c.adopt(POOL, "b", &hold("y"), 8, at(3)).await.unwrap());
    let view = c.inspect(POOL, "a", 9).await.unwrap();
    assert_eq!((view.held_count, view.queue_len), (2, 0));
    assert!(c.settle(POOL, &hold("y"), at(4)).await.unwrap().released);
}

async fn only_the_slot_that_was_found_is_relocated<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    c.set_agent(POOL, "b", setting(1, true, 1), at(1)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.admit_to_agent(POOL, "a", &hold("y"), ask(5, 9), at(2)).await.unwrap();
    let granted_at_ms = c.inspect(POOL, "a", 9).await.unwrap().held[0].granted_at_ms;
    let found = GrantedSlot { hold: hold("x"), agent: "a".to_owned(), granted_at_ms };
    let wrong = [
        ("a", found.clone()),
        ("b", GrantedSlot { granted_at_ms: granted_at_ms + 1, ..found.clone() }),
        ("a", GrantedSlot { agent: "b".to_owned(), ..found.clone() }),
        ("b", GrantedSlot { hold: hold("y"), ..found.clone() }),
        ("b", GrantedSlot { hold: hold("z"), ..found.clone() }),
    ];
    for (to, slot) in &wrong {
        assert!(!c.relocate(POOL, slot, to, 7, at(3)).await.unwrap(), "{slot:?} to {to}");
    }
    assert!(c.relocate(POOL, &found, "b", 7, at(3)).await.unwrap());
    let (a, b) = (c.inspect(POOL, "a", 9).await.unwrap(), c.inspect(POOL, "b", 9).await.unwrap());
    assert_eq!((a.held_count, a.queue_len, b.held_count), (0, 1, 1));
    assert_eq!((&b.held[0].hold, b.held[0].granted_at_ms), (&hold("x"), 7));
    assert!(!c.relocate(POOL, &found, "b", 7, at(4)).await.unwrap(), "once");
    assert_eq!(c.waiting_with_free(POOL).await.unwrap(), ["a"], "what it left can be given away");
    // Full it was, and full it stays.
    assert_eq!(position(&c.admit_to_agent(POOL, "b", &hold("w"), ask(5, 9), at(5)).await.unwrap()), 1);
    assert!(c.settle(POOL, &hold("x"), at(6)).await.unwrap().released);
}

async fn a_removed_agent_gives_up_all_it_has<C: Capacity>(c: C) {
    with_agent(&c, "a", 2).await;
    let many = PAGE + 3;
    for i in 0..many {
        c.admit_to_agent(POOL, "a", &hold(&format!("x{i:03}")), ask(5, 999), at(2)).await.unwrap();
    }
    assert!(!c.remove_agent(POOL, "a", 0, at(3)).await.unwrap().applied, "older than its setting");
    let first = c.remove_agent(POOL, "a", 5, at(3)).await.unwrap();
    assert_eq!((first.queued.len(), first.held.len(), first.more), (PAGE, 0, true));
    assert_eq!(first.queued[0].hold, hold("x002"));
    let rest = c.remove_agent(POOL, "a", 5, at(3)).await.unwrap();
    assert_eq!((rest.queued.len(), rest.held.len(), rest.more), (1, 2, false));
    assert_eq!((rest.held[0].granted_at_ms, &rest.held[0].hold), (2, &hold("x000")));
    // What was known before can't bring it back.
    assert!(!c.set_agent(POOL, "a", setting(2, true, 4), at(4)).await.unwrap().applied);
    assert_eq!(position(&c.admit_to_pool(POOL, &hold("any"), ask(5, 9), at(4)).await.unwrap()), 1);
    assert!(c.unconfirmed(POOL, 4, 999).await.unwrap().is_empty());
}

async fn numbers_that_lose_exactness_are_refused<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    let late = Stamp::new(MAX_EXACT + 1, 0);
    assert!(matches!(c.settle(POOL, &hold("x"), late).await, Err(Error::OutOfRange { what: "now_ms", .. })));
    let seq = c.set_agent(POOL, "a", setting(1, true, MAX_EXACT + 1), at(1)).await;
    assert!(matches!(seq, Err(Error::OutOfRange { what: "setting_seq", .. })));
    // The largest ones come back as they are.
    let largest = Stamp::new(MAX_EXACT, MAX_EXACT);
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), largest).await.unwrap();
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held[0].granted_at_ms, MAX_EXACT);
    assert_eq!(c.meta(POOL).await.unwrap().unwrap().log_seq, MAX_EXACT);
}

async fn versions_count_changes_only<C: Capacity>(c: C) {
    with_agent(&c, "a", 1).await;
    let version = async || c.meta(POOL).await.unwrap().unwrap().version;
    let before = version().await;
    c.settle(POOL, &hold("x"), at(2)).await.unwrap();
    c.inspect(POOL, "a", 9).await.unwrap();
    c.reopen(POOL, "a", at(2)).await.unwrap();
    c.set_agent(POOL, "a", setting(1, true, 1), at(2)).await.unwrap();
    assert_eq!(version().await, before);
    c.settle(POOL, &hold("x"), Stamp::new(2, 9)).await.unwrap();
    assert_eq!(version().await, before + 1, "the log went on");
    c.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    assert_eq!(version().await, before + 2);
}

/// The model is its own handle to shared data.
#[tokio::test]
async fn handles_of_a_model_share_data() {
    let one = ModelCapacity::new();
    with_agent(&one, "a", 1).await;
    let two = one.handle();
    granted(&two.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap());
    assert!(one.settle(POOL, &hold("x"), at(3)).await.unwrap().released);
}
