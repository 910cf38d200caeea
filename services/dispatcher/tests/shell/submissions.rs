//! Submissions that race with others of the same id: there is one hold for all of them.

use futures_util::{StreamExt, future::join_all};
use rollcall_capacity::{Ask, Capacity as _, Hold, Priority, RedisCapacity, Stamp};
use rollcall_core::{AgentId, Pool};
use serde_json::{Value, json};

use crate::harness::{Fleet, PATIENCE, wall};

/// Enough for some of them to meet in the middle.
const ROUNDS: usize = 20;

fn external(execution: &str, agent: &str, input: usize) -> Value {
    json!({"execution_id": execution, "agent_id": agent, "input": input, "delivery": "external"})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_a_race_to_another_pool_gives_back_what_it_reserved() {
    let fleet = Fleet::start().await;
    for name in ["a", "b"] {
        let id = AgentId::new(name).unwrap();
        fleet.registers_in(&Pool::new(name).unwrap(), 1024, &id, "i-1").await;
        fleet.connected(&id, "i-1").await;
    }
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let redis = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.unwrap();
    let mut won = [0, 0];
    for round in 0..ROUNDS {
        let id = format!("race{round}");
        let raced = ["a", "b"].map(|agent| external(&id, agent, 0));
        let answers = join_all(raced.iter().map(|body| fleet.api("submit", body))).await;
        let winner = answers.iter().position(|answer| answer["state"] == "running").unwrap();
        assert_eq!(answers[1 - winner]["error"]["code"], "already_exists", "{answers:?}");
        won[winner] += 1;
    }
    // Whoever was answered has given back, and nobody audits.
    for (name, won) in ["a", "b"].into_iter().zip(won) {
        assert_eq!(redis.inspect(name, name, 0).await.unwrap().held_count, won, "{name}");
    }
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
    let mut reads = fleet.bus.subscribe("$JS.API.STREAM.MSG.GET.>".to_owned()).await.unwrap();
    fleet.bus.flush().await.unwrap();
    // The loser finds nothing in the log, and is held up in Redis until the winner is there.
    fleet.redis_client("PAUSE 60000 WRITE").await;
    let raced = external("x", "a", 1);
    let winner = async {
        loop {
            let read = tokio::time::timeout(PATIENCE, reads.next()).await.expect("the log is asked").unwrap();
            if String::from_utf8_lossy(&read.payload).contains("execution.x") {
                break;
            }
        }
        fleet.submitted("x", &id).await;
        fleet.redis_client("UNPAUSE").await;
    };
    let (answer, ()) = tokio::join!(fleet.api("submit", &raced), winner);
    assert_eq!(answer["error"]["code"], "already_exists", "{answer}");
    let held = redis.inspect("default", "a", 9).await.unwrap().held;
    assert_eq!((held.len(), &held[0].hold, held[0].granted_at_ms), (1, &Hold::new("x", 1), a_moment_ago));
    dispatcher.stop().await;
}
