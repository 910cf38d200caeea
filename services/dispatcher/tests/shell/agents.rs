//! What Redis is told of agents.

use rollcall_capacity::{Capacity as _, Hold, RedisCapacity, Stamp};
use rollcall_core::{AgentId, Pool, event::ExecutionEvent};
use serde_json::json;

use crate::harness::Fleet;

/// An agent of the agents file, as its instance is named.
const OF_FILE: &str = "file-1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn that_an_agent_can_be_dispatched_to_is_told_when_nothing_else_of_it_changes() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, OF_FILE).await;
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let redis = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.unwrap();
    let setting = async || redis.inspect("default", "a", 0).await.unwrap().setting.unwrap();
    let before = setting().await;
    assert!(before.external_only && before.open, "{before:?}");
    // It is given a program that beats, with the same room, and taken back into the file.
    for (instance, external_only) in [("i-1", false), ("file-2", true)] {
        fleet.registers(&id, instance).await;
        fleet
            .until("Redis knows who can be dispatched to", async || {
                setting().await.external_only == external_only
            })
            .await;
        let now = setting().await;
        assert_eq!((now.capacity, now.open), (before.capacity, before.open), "nothing else changes");
    }
    dispatcher.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_offers_an_agent_work_only_when_all_that_it_has_is_there() {
    let id = AgentId::new("a").unwrap();
    let [old, new] = ["old", "new"].map(|name| Pool::new(name).unwrap());
    // Another dispatcher may have been first at the pool that it left: what is found there says nothing.
    for taken_by_another in [false, true] {
        let fleet = Fleet::start().await;
        fleet.registers_in(&old, 1, &id, "i-1").await;
        fleet.connected(&id, "i-1").await;
        let dispatcher = fleet.dispatcher_in(fleet.context()).await;
        let redis = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.unwrap();
        let has = json!({"execution_id": "x", "agent_id": "a", "input": {}, "delivery": "external"});
        assert_eq!(fleet.api("submit", &has).await["state"], "running");
        let waits = json!({"execution_id": "y", "pool": "new", "input": {}, "delivery": "external"});
        assert_eq!(fleet.api("submit", &waits).await["state"], "queued");
        if taken_by_another {
            let seq = fleet.log.last_seq_of(&fleet.subjects.agent_event(&id)).await.unwrap() + 1;
            let removed = redis.remove_agent("old", "a", seq, Stamp::new(1, 0)).await.unwrap();
            assert_eq!(removed.held.len(), 1);
        }
        fleet.registers_in(&new, 1, &id, "i-2").await;
        let view = async || redis.inspect("new", "a", 9).await.unwrap();
        fleet
            .until("it is there with what it has", async || {
                let view = view().await;
                view.setting.is_some_and(|setting| setting.open)
                    && view.held.iter().any(|slot| slot.hold == Hold::new("x", 1))
            })
            .await;
        assert_eq!(view().await.held_count, 1, "taken by another: {taken_by_another}");
        let dispatched = |event: &ExecutionEvent| matches!(event, ExecutionEvent::Dispatched(_));
        assert!(!fleet.history("y").await.iter().any(dispatched), "its only slot is taken");
        dispatcher.stop().await;
    }
}
