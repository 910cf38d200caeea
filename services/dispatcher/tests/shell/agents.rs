//! What Redis is told of agents.

use rollcall_capacity::{Capacity as _, RedisCapacity};
use rollcall_core::AgentId;

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
