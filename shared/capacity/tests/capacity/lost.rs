//! Redis loses its data, its scripts, or its life; or somebody else rebuilds it.

use rollcall_capacity::testing::RedisServer;
use rollcall_capacity::{
    Capacity, Confirmation, Error, GrantedSlot, Hold, Load, MAX_ORDER, ModelCapacity, Outcome, PoolState,
    Priority, Queue, RedisCapacity, Requeue, Stamp,
};

use crate::support::*;

fn not_ready<T>(answer: Result<T, Error>) -> bool {
    matches!(answer, Err(Error::NotReady { pool }) if pool == POOL)
}

async fn admit(c: &RedisCapacity, name: &str) -> Result<rollcall_capacity::Admission, Error> {
    c.admit_to_agent(POOL, "a", &hold(name), ask(5, 9), at(2)).await
}

#[tokio::test]
async fn a_new_pool_is_not_ready() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    assert!(not_ready(admit(&c, "x").await));
    assert!(not_ready(c.inspect(POOL, "a", 9).await));
    assert_eq!(c.meta(POOL).await.unwrap(), None);
    let epoch = c.rebuild_begin(POOL, 5).await.unwrap();
    assert!(not_ready(admit(&c, "x").await));
    let meta = c.meta(POOL).await.unwrap().unwrap();
    assert_eq!((meta.state, meta.since_ms, &meta.epoch), (PoolState::Rebuilding, 5, &epoch));
    c.rebuild_commit(POOL, &epoch, Stamp::new(6, 77)).await.unwrap();
    assert_eq!(position(&admit(&c, "x").await.unwrap()), 1);
    let meta = c.meta(POOL).await.unwrap().unwrap();
    assert_eq!((meta.state, meta.log_seq), (PoolState::Ready, 77));
    assert_eq!(c.pools().await.unwrap(), [POOL]);
}

#[tokio::test]
async fn flushall_is_noticed() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 1).await;
    admit(&c, "x").await.unwrap();
    redis::cmd("FLUSHALL").exec(&mut raw(&server.url())).unwrap();
    assert!(not_ready(admit(&c, "y").await));
    assert!(not_ready(c.settle(POOL, &hold("x"), at(3)).await));
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut raw(&server.url())).unwrap();
    assert_eq!(keys, Vec::<String>::new(), "nothing was written into an empty redis");
    with_agent(&c, "a", 1).await;
    granted(&admit(&c, "y").await.unwrap());
}

/// Another process's changes were lost, and this one's were not: its versions can't show it.
#[tokio::test]
async fn data_behind_what_the_log_shows_has_moved_back() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 2).await;
    let model = ModelCapacity::new();
    with_agent(&model, "a", 2).await;
    let moved_back =
        |answer: Result<(), Error>| matches!(answer, Err(Error::MovedBack { pool }) if pool == POOL);
    let seq = c.meta(POOL).await.unwrap().unwrap().log_seq;
    assert_eq!(model.meta(POOL).await.unwrap().unwrap().log_seq, seq);
    c.expect(POOL, seq);
    model.expect(POOL, seq);
    admit(&c, "x").await.unwrap();
    model.admit_to_agent(POOL, "a", &hold("x"), ask(5, 9), at(2)).await.unwrap();
    c.expect(POOL, seq + 100);
    // What was known before is no less certain.
    c.expect(POOL, seq + 1);
    model.expect(POOL, seq + 100);
    assert!(moved_back(admit(&c, "y").await.map(|_| ())));
    assert!(moved_back(c.waiting_with_free(POOL).await.map(|_| ())));
    assert!(moved_back(model.waiting_with_free(POOL).await.map(|_| ())));
    let epoch = c.rebuild_begin(POOL, 9).await.unwrap();
    c.rebuild_commit(POOL, &epoch, Stamp::new(9, seq + 100)).await.unwrap();
    assert_eq!(position(&admit(&c, "y").await.unwrap()), 1);
    c.expect(POOL, seq + 200);
    c.expect_nothing();
    assert_eq!(position(&admit(&c, "z").await.unwrap()), 2);
}

#[tokio::test]
async fn forgotten_scripts_are_loaded_again() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 1).await;
    admit(&c, "x").await.unwrap();
    redis::cmd("SCRIPT").arg("FLUSH").exec(&mut raw(&server.url())).unwrap();
    assert!(c.settle(POOL, &hold("x"), at(3)).await.unwrap().released);
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held_count, 0);
}

#[tokio::test]
async fn a_restarted_redis_is_found_again_and_not_ready() {
    let mut server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 1).await;
    c.inspect(POOL, "a", 9).await.unwrap();
    server.kill();
    assert!(matches!(admit(&c, "x").await, Err(Error::Unavailable(_))));
    assert!(matches!(c.inspect(POOL, "a", 9).await, Err(Error::Unavailable(_))));
    assert!(c.ping().await.is_err());
    server.restart();
    // Each connection learns of its end by one failed call; then all is as with an empty server.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !not_ready(admit(&c, "x").await) || !not_ready(c.inspect(POOL, "a", 9).await) {
        assert!(std::time::Instant::now() < deadline, "did not come back");
    }
    with_agent(&c, "a", 1).await;
    granted(&admit(&c, "x").await.unwrap());
}

#[tokio::test]
async fn a_handle_can_be_made_before_redis_is_there() {
    let mut server = RedisServer::start();
    server.kill();
    let c = connect(&server.url()).await;
    assert!(matches!(c.ping().await, Err(Error::Unavailable(_))));
    assert!(matches!(RedisCapacity::connect("not a url", PREFIX).await, Err(Error::Url(_))));
}

#[tokio::test]
async fn data_that_went_backwards_is_refused_until_rebuilt() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 2).await;
    let mut raw = raw(&server.url());
    let meta_key = "rollcall:{p}:meta";
    let old: Vec<u8> = redis::cmd("DUMP").arg(meta_key).query(&mut raw).unwrap();
    admit(&c, "x").await.unwrap();
    redis::cmd("RESTORE").arg(meta_key).arg(0).arg(&old).arg("REPLACE").exec(&mut raw).unwrap();
    for _ in 0..2 {
        assert!(matches!(admit(&c, "y").await, Err(Error::MovedBack { .. })));
        assert!(matches!(c.inspect(POOL, "a", 9).await, Err(Error::MovedBack { .. })));
    }
    // Nor is the data of an earlier life taken for a rebuild by somebody else.
    with_agent(&c, "a", 2).await;
    redis::cmd("RESTORE").arg(meta_key).arg(0).arg(&old).arg("REPLACE").exec(&mut raw).unwrap();
    assert!(matches!(admit(&c, "y").await, Err(Error::MovedBack { .. })));
    with_agent(&c, "a", 2).await;
    granted(&admit(&c, "y").await.unwrap());
}

#[tokio::test]
async fn the_later_of_two_rebuilds_wins() {
    let server = RedisServer::start();
    let (one, two) = (connect(&server.url()).await, connect(&server.url()).await);
    let first = one.rebuild_begin(POOL, 9).await.unwrap();
    let slot = |name: &str| Load::Slot { agent: "a".into(), hold: hold(name), granted_at_ms: 1 };
    one.rebuild_load(POOL, &first, &[slot("of-one")]).await.unwrap();
    // Even with a clock that is behind.
    let second = two.rebuild_begin(POOL, 3).await.unwrap();
    assert!(second > first);
    let stale = |answer| matches!(answer, Err(Error::Stale { epoch, .. }) if epoch == second);
    assert!(stale(one.rebuild_load(POOL, &first, &[slot("late")]).await));
    assert!(stale(one.rebuild_commit(POOL, &first, at(4)).await));
    two.rebuild_load(POOL, &second, &[slot("of-two")]).await.unwrap();
    two.rebuild_commit(POOL, &second, at(4)).await.unwrap();
    two.rebuild_commit(POOL, &second, at(5)).await.unwrap();
    assert!(stale(two.rebuild_load(POOL, &second, &[slot("late")]).await), "committed already");
    let held = one.inspect(POOL, "a", 9).await.unwrap().held;
    assert_eq!(held.iter().map(|slot| slot.hold.execution_id.as_str()).collect::<Vec<_>>(), ["of-two"]);
}

#[tokio::test]
async fn a_rebuild_by_another_is_followed_and_grants_are_claimed_again() {
    let server = RedisServer::start();
    let (one, two) = (connect(&server.url()).await, connect(&server.url()).await);
    with_agent(&one, "a", 2).await;
    let mut grants = Vec::new();
    for name in ["kept", "freed", "w"] {
        let admission = admit(&one, name).await.unwrap();
        if let Outcome::Granted { grant, .. } = admission.outcome {
            grants.push(grant);
        }
    }
    assert_eq!(grants.len(), 2);

    // The other one rebuilds from a log in which neither of them is, but "w" is, as running.
    let epoch = two.rebuild_begin(POOL, 5).await.unwrap();
    assert!(not_ready(one.confirm(POOL, &grants[0], at(5)).await));
    let items = [
        Load::Agent { agent: "a".into(), setting: setting(2, true, 1) },
        Load::Slot { agent: "a".into(), hold: hold("w"), granted_at_ms: 1 },
    ];
    two.rebuild_load(POOL, &epoch, &items).await.unwrap();
    two.rebuild_commit(POOL, &epoch, at(5)).await.unwrap();

    // One slot is free: the first to confirm has it, the second has lost its own. Held never exceeds the capacity.
    let claim = |nth: usize| one.confirm(POOL, &grants[nth], at(6));
    assert_eq!(claim(0).await.unwrap(), Confirmation::Confirmed { reclaimed: true });
    assert_eq!(claim(1).await.unwrap(), Confirmation::Lost);
    assert_eq!(claim(0).await.unwrap(), Confirmation::Confirmed { reclaimed: false });
    assert_eq!(one.inspect(POOL, "a", 9).await.unwrap().held_count, 2);
    assert!(one.unconfirmed(POOL, 99, 9).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_grant_that_a_rebuild_found_on_another_agent_is_lost() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 1).await;
    let admission = admit(&c, "x").await.unwrap();
    let epoch = c.rebuild_begin(POOL, 5).await.unwrap();
    let items = [
        Load::Agent { agent: "a".into(), setting: setting(1, true, 1) },
        Load::Slot { agent: "b".into(), hold: hold("x"), granted_at_ms: 1 },
    ];
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(5)).await.unwrap();
    // It runs there: taking a's free slot as well would give one hold two.
    assert_eq!(c.confirm(POOL, granted(&admission), at(6)).await.unwrap(), Confirmation::Lost);
    assert_eq!(c.inspect(POOL, "a", 9).await.unwrap().held_count, 0);
    assert_eq!(c.inspect(POOL, "b", 9).await.unwrap().held_count, 1);
}

#[tokio::test]
async fn a_rebuild_wipes_what_was_and_what_lies_under_its_names() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    ready(&c).await;
    let agents = 300; // more than one batch
    for i in 0..agents {
        c.set_agent(POOL, &format!("old{i}"), setting(1, true, 1), at(1)).await.unwrap();
    }
    c.admit_to_pool(POOL, &hold("x"), ask(5, 9), at(2)).await.unwrap();
    // A leftover that no registry knows of.
    let mut raw = raw(&server.url());
    redis::cmd("ZADD").arg("rollcall:{p}:slots:a").arg(1).arg("ghost:1").exec(&mut raw).unwrap();
    let epoch = c.rebuild_begin(POOL, 3).await.unwrap();
    let items = [Load::Agent { agent: "a".into(), setting: setting(1, true, 1) }];
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(3)).await.unwrap();
    assert_eq!(c.agents(POOL).await.unwrap(), ["a"]);
    let mut keys: Vec<String> = redis::cmd("KEYS").arg("rollcall:{p}:*").query(&mut raw).unwrap();
    keys.sort();
    assert_eq!(
        keys,
        ["rollcall:{p}:agent:a", "rollcall:{p}:agents", "rollcall:{p}:free", "rollcall:{p}:meta"]
    );
    granted(&admit(&c, "x").await.unwrap());
}

#[tokio::test]
async fn loaded_orders_are_exact_to_the_last() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let queued = |name: &str, priority, order| Load::Queued {
        queue: Queue::Agent("q".into()),
        hold: hold(name),
        priority: Priority::new(priority).unwrap(),
        order,
    };
    // Neighbours at both ends of every priority; a score that lost its last bit would confuse them. The names run the other
    // way, so that equal scores would show too.
    let mut expected = Vec::new();
    let mut items = Vec::new();
    for priority in 0..=9 {
        for (i, order) in [-MAX_ORDER, 1 - MAX_ORDER, 0, MAX_ORDER - 1, MAX_ORDER].into_iter().enumerate() {
            let name = format!("{}", 99 - (priority as usize * 5 + i));
            items.push(queued(&name, priority, order));
            expected.push(name);
        }
    }
    items.reverse();
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    let beyond = c.rebuild_load(POOL, &epoch, &[queued("beyond", 0, MAX_ORDER + 1)]).await;
    assert!(matches!(beyond, Err(Error::OutOfRange { what: "order", .. })));
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
    assert_eq!(queue_names(&c, "q").await, expected);
    let view = c.inspect(POOL, "q", 99).await.unwrap();
    assert_eq!((view.queue[4].priority.get(), view.queue[5].priority.get()), (0, 1));
}

/// A hold ends with its settling and with nothing else: no key has a time to live, whatever was done to it.
#[tokio::test]
async fn nothing_in_redis_expires_by_itself() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let items = [
        Load::Agent { agent: "a".into(), setting: setting(3, true, 1) },
        Load::Slot { agent: "a".into(), hold: hold("loaded"), granted_at_ms: 1 },
        Load::Queued { queue: Queue::Pool, hold: hold("waits"), priority: Priority::default(), order: 1 },
    ];
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
    c.promote(POOL, "a", at(2)).await.unwrap();
    let admission = admit(&c, "x").await.unwrap();
    c.confirm(POOL, granted(&admission), at(3)).await.unwrap();
    admit(&c, "y").await.unwrap();
    c.confirm_queued(POOL, &hold("y"), at(3)).await.unwrap();
    let back = Requeue {
        old: hold("x"),
        new: Hold::new("x", 2),
        queue: Queue::Agent("a".into()),
        priority: Priority::default(),
        hold_back: Some("a".into()),
        granted_at_ms: None,
        granted_by_ms: None,
    };
    c.requeue(POOL, &back, at(4)).await.unwrap();
    c.reopen(POOL, "a", at(5)).await.unwrap();
    c.settle(POOL, &hold("loaded"), at(6)).await.unwrap();
    c.adopt(POOL, "b", &hold("found"), 6, at(6)).await.unwrap();
    let found = GrantedSlot { hold: hold("found"), agent: "b".to_owned(), granted_at_ms: 6 };
    assert!(c.relocate(POOL, &found, "a", 6, at(6)).await.unwrap());
    assert!(c.relocate(POOL, &GrantedSlot { agent: "a".to_owned(), ..found }, "b", 6, at(6)).await.unwrap());
    c.admit_to_pool(POOL, &hold("any"), ask(5, 9), at(7)).await.unwrap();
    c.set_agent(POOL, "b", setting(1, true, 2), at(8)).await.unwrap();
    c.remove_agent(POOL, "b", 9, at(9)).await.unwrap();
    for name in ["z1", "z2", "z3"] {
        admit(&c, name).await.unwrap();
    }
    let mut raw = raw(&server.url());
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut raw).unwrap();
    for kind in
        ["meta", "where", "agents", "unconfirmed", "slots:a", "queue:a", "queue", "agent:a", "agent:b"]
    {
        assert!(keys.contains(&format!("rollcall:{{p}}:{kind}")), "{kind} is not among {keys:?}");
    }
    for key in keys {
        let ttl: i64 = redis::cmd("TTL").arg(&key).query(&mut raw).unwrap();
        assert_eq!(ttl, -1, "{key} goes away by itself");
    }
}

#[tokio::test]
async fn foreign_keys_make_clear_errors() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 1).await;
    let mut raw = raw(&server.url());
    redis::cmd("ZADD").arg("rollcall:{p}:slots:a").arg(1).arg("not a hold").exec(&mut raw).unwrap();
    let error = c.inspect(POOL, "a", 9).await.unwrap_err();
    assert_eq!(error.to_string(), r#"malformed reply of inspect: "not a hold" is no hold"#);
    assert_eq!(Hold::from_member("x:1"), Some(hold("x")));
    assert_eq!(Hold::from_member(":1"), None);
}

#[tokio::test]
async fn a_hold_that_only_the_index_knows_frees_nothing() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    with_agent(&c, "a", 1).await;
    for name in ["x", "y"] {
        admit(&c, name).await.unwrap();
    }
    // Somebody's hand took it out of the set: room is there, but it is not this settling that made it.
    let mut raw = raw(&server.url());
    redis::cmd("ZREM").arg("rollcall:{p}:slots:a").arg("x:1").exec(&mut raw).unwrap();
    let settled = c.settle(POOL, &hold("x"), at(3)).await.unwrap();
    assert!(!settled.released && settled.promoted.is_empty(), "{settled:?}");
}
