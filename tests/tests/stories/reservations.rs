//! Submissions that reserve and come to nothing, or race with others of the same id.

use bytes::Bytes;
use e2e::{
    Fleet, ScriptedAgent,
    fleet::{Options, SOON},
    until,
};
use futures_util::future::join_all;
use rollcall_capacity::{Ask, Capacity, Hold, Priority, RedisCapacity, Stamp};
use serde_json::{Value, json};

/// Nobody audits by himself within a story.
const NEVER_MS: u64 = 3_600_000;

async fn unaudited() -> Fleet {
    Fleet::start_with(Options::default().env("ROLLCALL_AUDIT_INTERVAL_MS", NEVER_MS)).await
}

/// The payload stream takes at most so many bytes from now on (-1: as many as there are).
async fn payloads_take(fleet: &Fleet, bytes: i64) {
    let ask = |verb: &str, body: Value| {
        let subject = format!("$JS.API.STREAM.{verb}.ROLLCALL_PAYLOADS");
        async move {
            let reply = fleet.bus.request(subject, Bytes::from(body.to_string()), SOON).await;
            serde_json::from_slice::<Value>(&reply.expect("the server answers").payload).expect("JSON")
        }
    };
    let mut config = ask("INFO", json!({})).await["config"].clone();
    config["max_bytes"] = json!(bytes);
    let updated = ask("UPDATE", config).await;
    assert_eq!(updated["config"]["max_bytes"], bytes, "{updated}");
}

/// What a dispatcher leaves that dies between the reservation and the submission.
async fn reserve(fleet: &Fleet, agent: &str, execution: &str) {
    let capacity = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.expect("an address");
    let ask = Ask { priority: Priority::default(), queue_depth: 10, external: false };
    let now = rollcall_core::Clock::now(&rollcall_core::time::SystemClock::new()).as_millis();
    let stamp = Stamp::new(u64::try_from(now).expect("after 1970"), 0);
    let hold = Hold::new(execution, 1);
    capacity.admit_to_agent("default", agent, &hold, ask, stamp).await.expect("an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_submissions_of_one_id_take_one_slot() {
    const AGENTS: usize = 6;
    let fleet = unaudited().await;
    let mut agents = Vec::new();
    for n in 0..AGENTS {
        agents.push(ScriptedAgent::start(&fleet.bus, &format!("a{n}"), 1).await);
    }
    for n in 0..AGENTS {
        fleet.status(&format!("a{n}"), "connected", SOON).await;
    }
    for n in 0..AGENTS {
        let agent = format!("a{n}");
        // Three bodies, each twice, and two others that wait for what any loser might set free.
        let raced =
            (0..6).map(|i| json!({"execution_id": format!("race{n}"), "agent_id": agent, "input": i / 2}));
        let others = (0..2).map(|i| json!({"execution_id": format!("other{n}-{i}"), "agent_id": agent}));
        let answers = join_all(raced.chain(others).map(|body| fleet.api("submit", body))).await;
        let winner = fleet.execution(&format!("race{n}")).await.expect("one of them won");
        let (taken, refused): (Vec<_>, Vec<_>) = answers[..6].iter().partition(|answer| answer.is_ok());
        assert_eq!((taken.len(), refused.len()), (2, 4), "{winner}: {answers:?}");
        for answer in refused {
            assert_eq!(answer.as_ref().expect_err("refused").code, "already_exists", "{answer:?}");
        }
        assert!(answers[6..].iter().all(Result::is_ok), "{answers:?}");
    }
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_that_came_to_nothing_does_not_decide_where_the_next_one_runs() {
    let fleet = unaudited().await;
    let a = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    let b = ScriptedAgent::start(&fleet.bus, "b", 2).await;
    fleet.status("a", "connected", SOON).await;
    fleet.status("b", "connected", SOON).await;
    // Its pool is there.
    fleet.holds_nothing("a").await;
    reserve(&fleet, "a", "slot").await;
    reserve(&fleet, "a", "place").await;
    for execution in ["slot", "place"] {
        let reply = fleet.submit(json!({"execution_id": execution, "agent_id": "b"})).await;
        assert_eq!((&reply["state"], &reply["agent_id"]), (&json!("running"), &json!("b")), "{reply}");
        b.given(execution).await;
    }
    assert!(a.dispatched().is_empty(), "{:?}", a.dispatched());
    fleet.holds_nothing("a").await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_that_is_known_to_have_failed_gives_its_slot_back() {
    let fleet = unaudited().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    payloads_take(&fleet, 1).await;
    for execution in ["one", "two"] {
        let refused = fleet.api("submit", json!({"execution_id": execution, "agent_id": "a"})).await;
        assert_eq!(refused.expect_err("nothing can be stored").code, "unavailable");
        fleet.holds_nothing("a").await;
    }
    payloads_take(&fleet, -1).await;
    let reply = fleet.submit(json!({"execution_id": "two", "agent_id": "a"})).await;
    assert_eq!(reply["state"], "running", "{reply}");
    agent.given("two").await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_about_a_pool_does_not_make_one() {
    let fleet = Fleet::start().await;
    let nowhere = fleet.api("capacity", json!({"pool": "nowhere"})).await.expect("an answer");
    assert_eq!((&nowhere["capacity"], &nowhere["held_count"]), (&json!(0), &json!(0)), "{nowhere}");
    assert_eq!((&nowhere["queue"], &nowhere["agents"]), (&json!([]), &json!([])), "{nowhere}");
    let unknown = fleet.api("capacity", json!({"agent_id": "nobody"})).await;
    assert_eq!(unknown.expect_err("nobody is there").code, "unknown_agent");
    let capacity = RedisCapacity::connect(&fleet.redis.url(), "rollcall").await.expect("an address");
    let pools = capacity.pools().await.expect("an answer");
    assert!(!pools.contains(&"nowhere".to_owned()), "{pools:?}");
    // Work that waits for agents yet to come makes it one.
    fleet.submit(json!({"execution_id": "early", "pool": "nowhere"})).await;
    let waits = fleet.api("capacity", json!({"pool": "nowhere"})).await.expect("an answer");
    assert_eq!(waits["queue"][0]["execution_id"], "early", "{waits}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_who_cancels_at_the_same_time_is_answered_the_same() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 4).await;
    fleet.status("a", "connected", SOON).await;
    for n in 0..4 {
        let id = format!("x{n}");
        fleet.submit(json!({"execution_id": id, "agent_id": "a"})).await;
        agent.given(&id).await;
        let cancel = || fleet.api("cancel", json!({"execution_id": id, "reason": "enough"}));
        for answer in join_all((0..8).map(|_| cancel())).await {
            let state = answer.as_ref().map_or("", |reply| reply["state"].as_str().unwrap_or_default());
            assert!(matches!(state, "cancelling" | "cancelled"), "{answer:?}");
        }
        fleet.state(&id, "cancelled", SOON).await;
    }
    fleet.audit().await;
}

/// Work of a pool waits in that pool again, and its slot was taken along by its agent to another one.
#[tokio::test(flavor = "multi_thread")]
async fn pool_work_of_an_agent_that_moved_to_another_pool_gives_its_slot_back() {
    let fleet = unaudited().await;
    let old = ScriptedAgent::start_with(&fleet.bus, "a", 1, json!({"pool": "p1"})).await;
    fleet.status("a", "connected", SOON).await;
    fleet.submit(json!({"execution_id": "x", "pool": "p1", "on_loss": "requeue"})).await;
    old.given("x").await;
    // Its heartbeats go on: nobody misses the work before the move is over.
    let new = ScriptedAgent::start_with(&fleet.bus, "a", 1, json!({"pool": "p2"})).await;
    fleet.agent_event("a", "agent.superseded", SOON).await;
    until("the slot to have moved", SOON, || async {
        let view = fleet.api("capacity", json!({"agent_id": "a"})).await.map_err(|e| format!("{e:?}"))?;
        if view["pool"] == "p2" && view["held_count"] == 1 { Ok(()) } else { Err(view.to_string()) }
    })
    .await;
    old.vanish().await;
    fleet.event("x", "execution.recovered", SOON).await;
    fleet.holds_nothing("a").await;
    let next = fleet.submit(json!({"execution_id": "y", "agent_id": "a"})).await;
    assert_eq!(next["state"], "running", "{next}");
    new.given("y").await;
    fleet.audit().await;
}
