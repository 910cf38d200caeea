//! Short forms for the tests.

use std::time::Duration;

use rollcall_capacity::{
    Admission, AgentSetting, Ask, Capacity, Epoch, Grant, Hold, Outcome, Priority, RedisCapacity, Stamp,
    Timeouts,
};

pub(crate) const POOL: &str = "p";
const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const PREFIX: &str = "rollcall";

pub(crate) async fn connect(url: &str) -> RedisCapacity {
    // A machine that other tests keep busy may stand still for longer than a service would wait.
    let timeouts = Timeouts { response: PATIENCE, connect: PATIENCE };
    RedisCapacity::connect_with(url, PREFIX, timeouts).await.unwrap()
}

/// A plain connection, to do what no handle does.
pub(crate) fn raw(url: &str) -> redis::Connection {
    redis::Client::open(url).unwrap().get_connection().unwrap()
}

pub(crate) fn hold(name: &str) -> Hold {
    Hold::new(name, 1)
}

pub(crate) fn at(now_ms: u64) -> Stamp {
    Stamp::new(now_ms, 0)
}

pub(crate) fn ask(priority: u8, queue_depth: u32) -> Ask {
    Ask { priority: Priority::new(priority).unwrap(), queue_depth, external: false }
}

pub(crate) fn setting(capacity: u32, open: bool, setting_seq: u64) -> AgentSetting {
    AgentSetting { capacity, open, external_only: false, setting_seq }
}

/// An empty pool that is ready.
pub(crate) async fn ready<C: Capacity>(capacity: &C) -> Epoch {
    let epoch = capacity.rebuild_begin(POOL, 1).await.unwrap();
    capacity.rebuild_commit(POOL, &epoch, at(1)).await.unwrap();
    epoch
}

/// A ready pool with one open agent.
pub(crate) async fn with_agent<C: Capacity>(capacity: &C, agent: &str, slots: u32) {
    ready(capacity).await;
    capacity.set_agent(POOL, agent, setting(slots, true, 1), at(1)).await.unwrap();
}

pub(crate) fn granted(admission: &Admission) -> &Grant {
    match &admission.outcome {
        Outcome::Granted { grant, .. } => grant,
        other => panic!("expected a grant, got {other:?}"),
    }
}

pub(crate) fn position(admission: &Admission) -> u64 {
    match &admission.outcome {
        Outcome::Queued { position, .. } => *position,
        other => panic!("expected a place, got {other:?}"),
    }
}

/// Names of who was promoted, in order.
pub(crate) fn names(grants: &[Grant]) -> Vec<&str> {
    grants.iter().map(|grant| grant.hold.execution_id.as_str()).collect()
}

pub(crate) async fn queue_names<C: Capacity>(capacity: &C, agent: &str) -> Vec<String> {
    let view = capacity.inspect(POOL, agent, 1000).await.unwrap();
    view.queue.into_iter().map(|queued| queued.hold.execution_id).collect()
}
