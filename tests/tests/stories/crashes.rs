//! What happens when parts of the system itself fail, under load.

use std::time::Duration;

use e2e::{
    Fleet, ScriptedAgent,
    fleet::{Options, SOON, kinds},
    lasts,
    load::{LOAD, Load},
    until,
};
use rollcall_capacity::testing::RedisServer;
use serde_json::{Value, json};

async fn killed_under_load(service: &str) {
    let mut load = Load::start(Options::default()).await;
    load.submit(LOAD / 3).await;
    load.fleet.service(service).kill();
    load.fleet.service(service).start_again();
    load.submit(LOAD / 3).await;
    load.fleet.crash(service).await;
    load.submit(LOAD / 3).await;
    load.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dispatcher_killed_under_load() {
    killed_under_load("dispatcher").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_health_prober_killed_under_load() {
    killed_under_load("health-prober").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_killed_under_load() {
    killed_under_load("watchdog").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_notifier_killed_under_load() {
    killed_under_load("notifier").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_everything() {
    let options = Options::default()
        .replicas("dispatcher", 2)
        .replicas("watchdog", 2)
        .replicas("health-prober", 2)
        .replicas("notifier", 2);
    let mut load = Load::start(options).await;
    load.submit(LOAD).await;
    load.ends_well().await;
    let history = kinds(&load.fleet.agent_history("a").await);
    assert_eq!(history.iter().filter(|k| *k == "agent.registered").count(), 1, "{history:?}");
    assert!(history.windows(2).all(|w| w[0] != w[1]), "two probers write each transition once: {history:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_flushed_under_load() {
    let mut load = Load::start(Options::default()).await;
    load.submit(LOAD / 2).await;
    flush(&load.fleet.redis).await;
    load.submit(LOAD / 2).await;
    load.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_restarted_empty_under_load() {
    let mut load = Load::start(Options::default()).await;
    load.submit(LOAD / 2).await;
    load.fleet.redis.kill();
    load.fleet.redis.restart();
    load.submit(LOAD / 2).await;
    load.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_restarted_under_load() {
    let mut load = Load::start(Options::default()).await;
    load.submit(LOAD / 2).await;
    load.fleet.nats.restart().expect("it restarts");
    load.submit(LOAD / 2).await;
    load.ends_well().await;
    for execution in &load.submitted {
        for event in load.fleet.history(execution).await {
            assert_ne!(
                event["type"], "rollcall.execution.recovered",
                "our deafness condemns nobody: {event}"
            );
        }
    }
}

/// Whoever decides was away for longer than every timeout; the fleet is healthy.
#[tokio::test(flavor = "multi_thread")]
async fn a_watchdog_that_was_away_recovers_nothing() {
    who_was_away_condemns_nobody(&["watchdog"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prober_that_was_away_condemns_nobody() {
    who_was_away_condemns_nobody(&["health-prober"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watchdog_and_a_prober_that_were_away_condemn_nobody() {
    who_was_away_condemns_nobody(&["watchdog", "health-prober"]).await;
}

async fn who_was_away_condemns_nobody(away: &[&str]) {
    let options =
        Options::default().env("ROLLCALL_STALE_AFTER_MS", 5_000).env("ROLLCALL_FORGET_AFTER_MS", 5_000);
    let mut fleet = Fleet::start_with(options).await;
    let _agent = ScriptedAgent::start(&fleet.bus, "a", 4).await;
    fleet.status("a", "connected", SOON).await;
    let mut all = Vec::new();
    for _ in 0..4 {
        all.push(
            fleet.submit(json!({"agent_id": "a"})).await["execution_id"]
                .as_str()
                .expect("it has an id")
                .to_owned(),
        );
    }
    for name in away {
        fleet.service(name).kill();
    }
    until("longer than every timeout", SOON, || async {
        let view = fleet.execution(&all[0]).await.map_err(|e| format!("{e:?}"))?;
        let since = rollcall_core::Timestamp::parse(view["dispatched_at"].as_str().unwrap_or_default())
            .map_err(|e| e.to_string())?;
        let now = rollcall_core::Clock::now(&rollcall_core::time::SystemClock::new());
        if now.since_ms(since) > 6000 { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    for name in away {
        fleet.service(name).start_again();
    }
    fleet.ready().await;
    until("it to see", SOON, || async {
        let sees = fleet.metric("watchdog", "rollcall_watchdog_sees").await?;
        if sees == Some(1.0) { Ok(()) } else { Err(format!("{sees:?}")) }
    })
    .await;
    // Longer than every threshold from there on: whatever it would conclude, it has concluded.
    lasts("nothing is recovered", Duration::from_secs(6), || async {
        let mut found = fleet.events_of("execution.recovered").await;
        for verdict in ["agent.disconnected", "agent.error", "agent.gone"] {
            found.extend(fleet.events_of(verdict).await);
        }
        if found.is_empty() { Ok(()) } else { Err(found) }
    })
    .await;
    for execution in &all {
        assert_eq!(fleet.execution(execution).await.expect("it is known")["state"], "running");
    }
    fleet.audit().await;
}

/// Somebody else wrote to our keys: the auditor finds it, and believes the log.
#[tokio::test(flavor = "multi_thread")]
async fn redis_that_contradicts_itself_is_built_anew() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    redis(&fleet.redis, "ZADD rollcall:{default}:slots:a 1 ghost:1").await;
    let waits = fleet.submit(json!({"agent_id": "a"})).await;
    let work = waits["execution_id"].as_str().expect("an id").to_owned();
    // The ghost holds the only slot until the auditor comes by.
    agent.given(&work).await;
    fleet.state(&work, "running", SOON).await;
    // And the other way round: its slot is forgotten, so the next would be one too many.
    redis(&fleet.redis, "DEL rollcall:{default}:slots:a").await;
    fleet.audit().await;
    let next = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(next["state"], "queued");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_redis_got_wrong_is_repaired_and_told() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    let _idle = ScriptedAgent::start(&fleet.bus, "b", 1).await;
    fleet.status("a", "connected", SOON).await;
    fleet.status("b", "connected", SOON).await;
    let submit = || async {
        let reply = fleet.submit(json!({"agent_id": "a"})).await;
        reply["execution_id"].as_str().expect("an id").to_owned()
    };
    let ended = submit().await;
    agent.given(&ended).await;
    agent.report(&ended, 1, "completed", json!({"result": 1})).await;
    fleet.state(&ended, "completed", SOON).await;
    fleet.holds_nothing("a").await;

    // A slot of what has ended.
    let before = repairs(&fleet, "leaked").await;
    at_once(&fleet.redis, &slot("b", &ended)).await;
    told(&fleet, "leaked", before).await;

    // What runs, in no slot.
    let runs = submit().await;
    agent.given(&runs).await;
    fleet.state(&runs, "running", SOON).await;
    let before = repairs(&fleet, "missing").await;
    at_once(&fleet.redis, &forget("a", &runs)).await;
    told(&fleet, "missing", before).await;
    let waits = submit().await;
    assert_eq!(fleet.execution(&waits).await.unwrap()["state"], "queued", "the slot is taken again");

    // What runs on one agent, in a slot of another.
    let before = repairs(&fleet, "elsewhere").await;
    at_once(&fleet.redis, &[forget("a", &runs), slot("b", &runs)].concat()).await;
    told(&fleet, "elsewhere", before).await;

    // A promotion that nobody carried out.
    let before = repairs(&fleet, "unconfirmed").await;
    let promoted = [
        call("ZREM", ":queue:a", &format!("'{waits}:1'")),
        call("HSET", ":agent:a", "'capacity', 2"),
        slot("a", &waits),
        call("ZADD", ":unconfirmed", &format!("1, '{waits}:1'")),
    ];
    at_once(&fleet.redis, &promoted.concat()).await;
    told(&fleet, "unconfirmed", before).await;
    agent.given(&waits).await;

    // A queue beside a free slot.
    let next = submit().await;
    assert_eq!(fleet.execution(&next).await.unwrap()["state"], "queued");
    let before = repairs(&fleet, "idle").await;
    let room = [call("HSET", ":agent:a", "'capacity', 3"), call("ZADD", ":free", "0, 'a'")];
    at_once(&fleet.redis, &room.concat()).await;
    told(&fleet, "idle", before).await;
    agent.given(&next).await;
}

/// How many repairs of this kind the log tells of.
pub(crate) async fn repairs(fleet: &Fleet, kind: &str) -> usize {
    of_kind(fleet, kind).await.len()
}

async fn of_kind(fleet: &Fleet, kind: &str) -> Vec<Value> {
    let mut events = fleet.events_of("system.slot_leak_repaired").await;
    events.retain(|e| e["data"]["findings"][kind].as_u64().is_some_and(|count| count > 0));
    events
}

/// One more repair of this kind than `before` is in the log, and they are in the metrics.
pub(crate) async fn told(fleet: &Fleet, kind: &str, before: usize) {
    let event = until(&format!("a repair: {kind}"), SOON, || async {
        let events = of_kind(fleet, kind).await;
        events.get(before).cloned().ok_or(events)
    })
    .await;
    assert_eq!(event["data"]["pool"], "default", "{event}");
    let address = fleet.admin_address("dispatcher").expect("the dispatcher's admin address");
    let metrics =
        reqwest::get(format!("http://{address}/metrics")).await.expect("metrics").text().await.expect("text");
    let counted = format!("rollcall_audit_findings_total{{kind=\"{kind}\"}} ");
    let line = metrics.lines().find(|line| line.starts_with(&counted)).unwrap_or_else(|| panic!("{metrics}"));
    assert!(!line.ends_with(" 0"), "{line}");
}

/// One call of a script, on a key of the default pool.
fn call(command: &str, key: &str, rest: &str) -> String {
    format!("redis.call('{command}', 'rollcall:{{default}}{key}', {rest}) ")
}

/// Gives a first attempt a slot.
fn slot(agent: &str, execution: &str) -> String {
    call("ZADD", &format!(":slots:{agent}"), &format!("1, '{execution}:1'"))
        + &call("HSET", ":where", &format!("'{execution}:1', 's{agent}'"))
}

/// Takes the slot of a first attempt away.
fn forget(agent: &str, execution: &str) -> String {
    call("ZREM", &format!(":slots:{agent}"), &format!("'{execution}:1'"))
        + &call("HDEL", ":where", &format!("'{execution}:1'"))
}

/// All of it in one step, behind the dispatcher's back: an audit in between would find something else.
async fn at_once(server: &RedisServer, script: &str) {
    redis(server, &format!("EVAL \"{script} return 1\" 0")).await;
}

async fn flush(server: &RedisServer) {
    redis(server, "FLUSHALL").await;
}

/// One inline command.
pub(crate) async fn redis(server: &RedisServer, command: &str) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let url = server.url();
    let path = url.trim_start_matches("redis+unix://").trim_start_matches("unix://").to_owned();
    let mut socket = tokio::net::UnixStream::connect(&path).await.expect("redis listens");
    socket.write_all(format!("{command}\r\n").as_bytes()).await.expect("redis takes commands");
    let mut answer = [0; 1];
    socket.read_exact(&mut answer).await.expect("redis answers");
    assert!(matches!(answer[0], b'+' | b':'), "{command}: {answer:?}");
}
