//! A hundred thousand in slots and queues: no script may take long for it.

use std::time::Duration;

use rollcall_capacity::testing::RedisServer;
use rollcall_capacity::{
    Capacity, GrantedSlot, Hold, Load, Priority, Queue, REBUILD_BATCH, RedisCapacity, Requeue, Stamp,
};

use crate::support::*;

const MANY: usize = 100_000;
/// Agents beside the big one.
const FLEET: usize = 1_000;
/// Times each operation is tried.
const TRIES: usize = 12;
const LIMIT: Duration = Duration::from_millis(10);

/// Processor time that the server's one thread has spent. Unlike a clock it does not count what else the machine does.
fn spent(server: &mut redis::Connection) -> Duration {
    let info: String = redis::cmd("INFO").arg("cpu").query(server).unwrap();
    let seconds = |name: &str| -> f64 {
        let rest = info.split(name).nth(1).unwrap();
        rest.lines().next().unwrap().trim().parse().unwrap()
    };
    Duration::from_secs_f64(seconds("used_cpu_user_main_thread:") + seconds("used_cpu_sys_main_thread:"))
}

async fn fill(c: &RedisCapacity) {
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let priority = Priority::default();
    let mut items = vec![Load::Agent { agent: "big".into(), setting: setting(MANY as u32, true, 1) }];
    for i in 0..FLEET {
        items.push(Load::Agent { agent: format!("f{i}"), setting: setting(0, true, 1) });
    }
    for i in 0..MANY {
        items.push(Load::Slot {
            agent: "big".into(),
            hold: hold(&format!("slot{i}")),
            granted_at_ms: i as u64,
        });
        let queue = if i % 2 == 0 { Queue::Pool } else { Queue::Agent("big".into()) };
        items.push(Load::Queued { queue, hold: hold(&format!("wait{i}")), priority, order: i as i64 });
    }
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
}

#[tokio::test]
async fn no_script_is_slow_with_a_hundred_thousand() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    let mut raw = raw(&server.url());
    fill(&c).await;
    let each = spent(&mut raw) / (2 * MANY / REBUILD_BATCH) as u32;
    assert!(each < LIMIT, "one batch of a rebuild takes {each:?}");

    let stamp = |i: usize| Stamp::new(1_000_000 + i as u64, i as u64);
    let name = |kind: &str, i: usize| hold(&format!("{kind}{i}"));
    let deep = ask(5, u32::MAX);
    let own = || Queue::Agent("big".into());
    macro_rules! quick {
        ($what:literal, |$i:ident| $call:expr) => {
            let before = spent(&mut raw);
            for $i in 0..TRIES {
                $call.await.unwrap();
            }
            let each = (spent(&mut raw) - before) / TRIES as u32;
            assert!(each < LIMIT, "{} takes {each:?}", $what);
        };
    }
    quick!("admit_to_agent", |i| c.admit_to_agent(POOL, "big", &name("new", i), deep, stamp(i)));
    quick!("admit_to_agent again", |i| c.admit_to_agent(
        POOL,
        "big",
        &name("wait", 50_001 + 2 * i),
        deep,
        stamp(i)
    ));
    quick!("admit_to_pool", |i| c.admit_to_pool(POOL, &name("newp", i), deep, stamp(i)));
    quick!("confirm_queued", |i| c.confirm_queued(POOL, &name("new", i), stamp(i)));
    quick!("settle a slot", |i| c.settle(POOL, &name("slot", 70_000 + i), stamp(i)));
    quick!("settle a place", |i| c.settle(POOL, &name("wait", 70_000 + i), stamp(i)));
    quick!("requeue", |i| c.requeue(
        POOL,
        &Requeue {
            old: name("slot", 80_000 + i),
            new: Hold::new(format!("slot{}", 80_000 + i), 2),
            queue: if i % 2 == 0 { Queue::Pool } else { own() },
            priority: Priority::new(9).unwrap(),
            hold_back: (i % 3 == 0).then(|| "big".to_owned()),
            granted_at_ms: None,
            granted_by_ms: None,
        },
        stamp(i)
    ));
    quick!("reopen", |i| c.reopen(POOL, "big", stamp(i)));
    quick!("relocate", |i| {
        let slot = GrantedSlot { hold: name("nobody", i), agent: "big".to_owned(), granted_at_ms: 5 };
        let c = &c;
        async move { c.relocate(POOL, &slot, "other", 5, stamp(i)).await }
    });
    quick!("adopt", |i| c.adopt(POOL, "big", &name("wait", 60_001 + 2 * i), 5, stamp(i)));
    // Room for many more than one batch.
    let larger = |i: usize| setting((MANY * 2 + i) as u32, true, 2 + i as u64);
    quick!("set_agent", |i| c.set_agent(POOL, "big", larger(i), stamp(i)));
    quick!("promote", |i| c.promote(POOL, "big", stamp(i)));
    quick!("inspect", |_i| c.inspect(POOL, "big", 200));
    quick!("inspect_pool", |_i| c.inspect_pool(POOL, 200));
    quick!("unconfirmed", |_i| c.unconfirmed(POOL, 1 << 40, 200));
    quick!("waiting_with_free", |_i| c.waiting_with_free(POOL));
    quick!("scan", |_i| c.scan(POOL, None));
    quick!("meta", |_i| c.meta(POOL));
    quick!("remove_agent", |_i| c.remove_agent(POOL, "big", 999, at(1)));
    quick!("rebuild_begin", |i| c.rebuild_begin(POOL, i as u64));
}

#[tokio::test]
async fn long_lists_come_whole_page_by_page() {
    let server = RedisServer::start();
    let c = connect(&server.url()).await;
    let epoch = c.rebuild_begin(POOL, 1).await.unwrap();
    let count = 1_500;
    let mut items = Vec::new();
    for i in 0..count {
        let queue = if i % 2 == 0 { Queue::Pool } else { Queue::Agent("a".into()) };
        items.push(Load::Queued {
            queue,
            hold: hold(&format!("w{i}")),
            priority: Priority::default(),
            order: i,
        });
        items.push(Load::Slot { agent: "a".into(), hold: hold(&format!("s{i}")), granted_at_ms: i as u64 });
        items.push(Load::Agent { agent: format!("b{i}"), setting: setting(1, true, 1) });
    }
    c.rebuild_load(POOL, &epoch, &items).await.unwrap();
    c.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();

    let view = c.inspect(POOL, "a", 10_000).await.unwrap();
    assert_eq!((view.held.len(), view.held_count), (1_500, 1_500));
    assert_eq!((view.queue.len(), view.queue_len), (750, 750));
    assert!(view.queue.iter().map(|queued| queued.position).eq(1..=750));
    assert_eq!(c.inspect(POOL, "a", 600).await.unwrap().held, view.held[..600]);
    assert_eq!(c.inspect_pool(POOL, 700).await.unwrap().queue.len(), 700);
    assert_eq!(c.agents(POOL).await.unwrap().len(), 1_501);
    assert_eq!(c.waiting_with_free(POOL).await.unwrap().len(), 1_500);
    let mut seen = std::collections::BTreeSet::new();
    let mut from = None;
    loop {
        let page = c.scan(POOL, from).await.unwrap();
        seen.extend(page.holds.into_iter().map(|placed| placed.hold));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(seen.len(), 3_000);
}
