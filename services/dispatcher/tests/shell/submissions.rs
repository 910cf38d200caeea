//! Submissions that race with others of the same id: there is one hold for all of them.

use futures_util::StreamExt;
use rollcall_capacity::{Ask, Capacity as _, Hold, Priority, RedisCapacity, Stamp};
use rollcall_core::{AgentId, Pool, event::ExecutionEvent};
use serde_json::{Value, json};

use crate::harness::{Fleet, PATIENCE, wall};

fn external(execution: &str, agent: &str, input: usize) -> Value {
    json!({"execution_id": execution, "agent_id": agent, "input": input, "delivery": "external"})
}

/// Submits `raced`, which finds nothing in the log and is held up in Redis until `winner`, which went to another dispatcher, is
/// in the log. What it is answered.
async fn lose(fleet: &Fleet, raced: &Value, winner: impl Future<Output = ()>) -> Value {
    let mut reads = fleet.bus.subscribe("$JS.API.STREAM.MSG.GET.>".to_owned()).await.unwrap();
    fleet.bus.flush().await.unwrap();
    fleet.redis_client("PAUSE 60000 WRITE").await;
    let subject = format!("execution.{}", raced["execution_id"].as_str().unwrap());
    let wins = async {
        loop {
            let read = tokio::time::timeout(PATIENCE, reads.next()).await.expect("the log is asked").unwrap();
            if String::from_utf8_lossy(&read.payload).contains(&subject) {
                break;
            }
        }
        winner.await;
        fleet.redis_client("UNPAUSE").await;
    };
    let (answer, ()) = tokio::join!(fleet.api("submit", raced), wins);
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_a_race_to_another_pool_gives_back_what_it_reserved() {
    let fleet = Fleet::start().await;
    let [a, b] = ["a", "b"].map(|name| AgentId::new(name).unwrap());
    for id in [&a, &b] {
        fleet.registers_in(&Pool::new(id.as_str()).unwrap(), 8, id, "i-1").await;
        fleet.connected(id, "i-1").await;
    }
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let redis = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.unwrap();
    let answer = lose(&fleet, &external("x", "a", 1), fleet.submitted("x", &b)).await;
    assert_eq!(answer["error"]["code"], "already_exists", "{answer}");
    // Whoever was answered has given back, and nobody audits.
    assert_eq!(redis.inspect("a", "a", 9).await.unwrap().held, []);
    // And whoever won has something to find there.
    let held = redis.inspect("b", "b", 9).await.unwrap().held;
    assert_eq!(held.iter().map(|slot| &slot.hold).collect::<Vec<_>>(), [&Hold::new("x", 1)]);
    dispatcher.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_a_race_leaves_the_winner_what_it_reserved() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, "i-1").await;
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let redis = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.unwrap();
    // The winner went to another dispatcher, which has not come further than this.
    let ask = Ask { priority: Priority::default(), queue_depth: 10, external: true };
    let a_moment_ago = u64::try_from(wall().as_millis()).unwrap() - 1_000;
    redis.admit_to_agent("default", "a", &Hold::new("x", 1), ask, Stamp::new(a_moment_ago, 0)).await.unwrap();
    let answer = lose(&fleet, &external("x", "a", 1), fleet.submitted("x", &id)).await;
    assert_eq!(answer["error"]["code"], "already_exists", "{answer}");
    let held = redis.inspect("default", "a", 9).await.unwrap().held;
    assert_eq!((held.len(), &held[0].hold, held[0].granted_at_ms), (1, &Hold::new("x", 1), a_moment_ago));
    dispatcher.stop().await;
}

/// What nobody in the dispatcher needs is somebody else's bound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bound_of_a_submission_is_in_the_log() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, "i-1").await;
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let asked = json!({"execution_id": "x", "agent_id": "a", "input": 1, "delivery": "external", "timeout_ms": 61_001,
        "priority": 3, "queue_ttl_ms": 61_002, "on_loss": "requeue", "max_attempts": 7, "stall_timeout_ms": 61_003,
        "lost_after_ms": 61_004, "labels": {"team": "blue"}});
    let answer = fleet.api("submit", &asked).await;
    assert_eq!(answer["state"], "running", "{answer}");
    let Some(ExecutionEvent::Submitted(submitted)) = fleet.history("x").await.into_iter().next() else {
        panic!()
    };
    let submitted = serde_json::to_value(submitted).unwrap();
    for (field, value) in asked.as_object().unwrap() {
        if field != "input" {
            assert_eq!(submitted[field], *value, "{field}: {submitted}");
        }
    }
    dispatcher.stop().await;
}
