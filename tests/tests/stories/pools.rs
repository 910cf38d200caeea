//! Agents that change pools: what they have comes along in its order, and nobody gives them more than they can hold.

use e2e::{
    Fleet, ScriptedAgent,
    fleet::{Options, SOON},
    until,
};
use rollcall_capacity::{Capacity as _, PoolState, RedisCapacity};
use serde_json::{Value, json};

/// Whether the dispatchers see it happen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dispatchers {
    Live,
    Away,
}

async fn submit(fleet: &Fleet, body: Value) -> String {
    fleet.submit(body).await["execution_id"].as_str().expect("an execution id").to_owned()
}

fn ids(rows: &Value) -> Vec<String> {
    let rows = rows.as_array().expect("a list").iter();
    rows.map(|row| row["execution_id"].as_str().expect("an id").to_owned()).collect()
}

/// A fleet whose pool `new` has been in use: a pool that is new would be built from the log.
async fn fleet_with_pools(dispatchers: usize) -> Fleet {
    let fleet = Fleet::start_with(Options::default().replicas("dispatcher", dispatchers)).await;
    let waits = submit(&fleet, json!({"pool": "new"})).await;
    fleet.api("cancel", json!({"execution_id": waits})).await.expect("it waits, and can be cancelled");
    fleet.state(&waits, "cancelled", SOON).await;
    let redis = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.expect("redis is there");
    let meta = redis.meta("new").await.expect("it can be asked").expect("the pool is there");
    assert_eq!(meta.state, PoolState::Ready, "whoever comes to it is added to what it has");
    fleet
}

/// A process of agent `a` in this pool, with one slot.
async fn process(fleet: &Fleet, pool: &str) -> ScriptedAgent {
    let agent = ScriptedAgent::start_with(&fleet.bus, "a", 1, json!({"pool": pool})).await;
    until(&format!("a to be in pool {pool} by the log"), SOON, || async {
        let history = fleet.agent_history("a").await;
        let last = history.iter().rev().find(|e| e["type"] == "rollcall.agent.registered").cloned();
        last.filter(|e| e["data"]["pool"] == pool).ok_or(history)
    })
    .await;
    fleet.status("a", "connected", SOON).await;
    agent
}

/// Starts a new process of agent `a` in pool `new`, while the dispatchers are live or away.
async fn comes_back_in_another_pool(fleet: &mut Fleet, dispatchers: Dispatchers) -> ScriptedAgent {
    let names: Vec<String> = fleet.services.keys().filter(|n| n.starts_with("dispatcher")).cloned().collect();
    if dispatchers == Dispatchers::Away {
        names.iter().for_each(|name| fleet.service(name).kill());
    }
    let new = process(fleet, "new").await;
    if dispatchers == Dispatchers::Away {
        names.iter().for_each(|name| fleet.service(name).start_again());
        fleet.ready().await;
    }
    new
}

/// Waits until agent `a` holds and waits for just this.
async fn has(fleet: &Fleet, held: &str, waiting: &[String]) {
    until(&format!("a to hold {held} and then {waiting:?}"), SOON, || async {
        let view = fleet.api("capacity", json!({"agent_id": "a"})).await.map_err(|e| format!("{e:?}"))?;
        let as_it_should = view["pool"] == "new"
            && ids(&view["held"]) == [held.to_owned()]
            && ids(&view["queue"]) == waiting;
        if as_it_should { Ok(()) } else { Err(view.to_string()) }
    })
    .await;
}

async fn takes_along_what_it_has(replicas: usize, dispatchers: Dispatchers) {
    let mut fleet = fleet_with_pools(replicas).await;
    let old = process(&fleet, "old").await;
    let runs = submit(&fleet, json!({"agent_id": "a"})).await;
    old.given(&runs).await;
    fleet.state(&runs, "running", SOON).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(submit(&fleet, json!({"agent_id": "a"})).await);
    }
    // The old process goes on with its work, and lists it.
    let new = comes_back_in_another_pool(&mut fleet, dispatchers).await;
    has(&fleet, &runs, &waiting).await;
    let stays = submit(&fleet, json!({"pool": "old"})).await;
    let joins = submit(&fleet, json!({"pool": "new"})).await;
    old.report(&runs, 1, "completed", json!({"result": 1})).await;
    let mut next = waiting.clone();
    next.push(joins);
    for (done, execution) in next.iter().enumerate() {
        new.given(execution).await;
        fleet.state(execution, "running", SOON).await;
        has(&fleet, execution, waiting.get(done + 1..).unwrap_or_default()).await;
        new.report(execution, 1, "completed", json!({"result": 1})).await;
    }
    let given: Vec<String> = new.dispatched().into_iter().map(|(id, _)| id).collect();
    assert_eq!(given, next, "in their order, each once");
    fleet.state(&stays, "queued", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_changes_its_pool_takes_along_what_it_has() {
    takes_along_what_it_has(1, Dispatchers::Live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_changed_its_pool_while_nobody_looked_takes_along_what_it_has() {
    takes_along_what_it_has(1, Dispatchers::Away).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_dispatchers_move_an_agent_once() {
    takes_along_what_it_has(2, Dispatchers::Live).await;
}

/// Nobody told the old pool that the agent left.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_an_agent_has_left_gives_it_nothing() {
    let mut fleet = fleet_with_pools(1).await;
    let old = process(&fleet, "old").await;
    old.vanish().await;
    let new = comes_back_in_another_pool(&mut fleet, Dispatchers::Away).await;
    let stays = submit(&fleet, json!({"pool": "old"})).await;
    let comes = submit(&fleet, json!({"pool": "new"})).await;
    new.given(&comes).await;
    fleet.state(&comes, "running", SOON).await;
    assert_eq!(fleet.execution(&stays).await.expect("it is known")["state"], "queued");
    assert_eq!(new.dispatched().len(), 1, "{:?}", new.dispatched());
    fleet.audit().await;
}
