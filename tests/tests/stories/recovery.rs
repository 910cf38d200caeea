//! What happens when work gets stuck.

use std::time::{Duration, Instant};

use e2e::{
    Fleet, OnDispatch, OnTerminate, ScriptedAgent, Standstill,
    fleet::{Options, SOON, kinds},
    sse::Sse,
    until,
};
use rollcall_core::Timestamp;
use serde_json::{Value, json};

/// Issue 2: with heartbeats of a second, a recovery is on the SSE stream within this.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);
/// A deadline has a timer of its own. Whatever looks around now and then finds it later than this.
const TIMER_MS: i64 = 900;

fn id(reply: &Value) -> String {
    reply["execution_id"].as_str().expect("an execution id").to_owned()
}

fn time_of(event: &Value) -> i64 {
    Timestamp::parse(event["time"].as_str().expect("a time")).expect("RFC 3339").as_millis()
}

async fn recovered(fleet: &Fleet, execution: &str) -> Value {
    fleet.event(execution, "execution.recovered", SOON).await["data"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_with_running_and_queued_work() {
    let fleet = Fleet::start().await;
    let sse = Sse::open(&fleet.http_address().expect("an address"), "type=execution.recovered").await;
    let mut process = fleet.program(
        "agent-run",
        "rollcall",
        &["agent", "run", "--id", "a", "--capacity", "1", "--", "sh", "-c", "while :; do read _ || :; done"],
    );
    fleet.status("a", "connected", SOON).await;
    let running = id(&fleet.submit(json!({"agent_id": "a", "input": 1})).await);
    let queued = id(&fleet.submit(json!({"agent_id": "a", "input": 2})).await);
    fleet.state(&running, "running", SOON).await;
    let (machine, killed) = (Standstill::watch(), Instant::now());
    process.kill();
    let frame = sse.event("execution.recovered", &running, SOON).await;
    let noticed = frame.at - killed;
    assert!(noticed < NOTICED_WITHIN + machine.lost(), "noticed after {noticed:?}");
    let event = &frame.data["data"];
    assert_eq!((&event["reason"], &event["action"]), (&json!("agent_lost"), &json!("failed")), "{event}");
    assert_eq!(fleet.execution(&queued).await.unwrap()["state"], "queued", "its queue holds");
    let replacement = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    replacement.given(&queued).await;
    fleet.state(&queued, "running", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execution_dropped_by_a_live_agent() {
    let fleet = Fleet::start().await;
    let sse = Sse::open(&fleet.http_address().expect("an address"), "type=execution.recovered").await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    let dropped = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let kept = id(&fleet.submit(json!({"agent_id": "a"})).await);
    // Inside the dispatch grace absence is no evidence: let it pass first.
    let started = fleet.event(&dropped, "execution.started", SOON).await;
    until("the dispatch grace to be over", SOON, || async {
        let now = rollcall_core::Clock::now(&rollcall_core::time::SystemClock::new()).as_millis();
        if now > time_of(&started) + 2500 { Ok(()) } else { Err(now) }
    })
    .await;
    let (machine, forgotten) = (Standstill::watch(), Instant::now());
    agent.forget(&dropped);
    let frame = sse.event("execution.recovered", &dropped, SOON).await;
    let noticed = frame.at - forgotten;
    assert!(noticed < NOTICED_WITHIN + machine.lost(), "noticed after {noticed:?}");
    assert_eq!(frame.data["data"]["reason"], "orphaned");
    assert_eq!(fleet.execution(&kept).await.unwrap()["state"], "running");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_execution_is_terminated_and_recovered() {
    // No cycle comes by that could notice it.
    let fleet = Fleet::start_with(Options::default().env("ROLLCALL_CYCLE_INTERVAL_MS", 3_600_000)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let hung = id(&fleet.submit(json!({"agent_id": "a", "timeout_ms": 1500})).await);
    let next = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let event = fleet.event(&hung, "execution.recovered", SOON).await;
    let facts = &event["data"];
    assert_eq!(
        (&facts["reason"], &facts["action"], &facts["terminate"]),
        (&json!("timed_out"), &json!("failed"), &json!("confirmed")),
        "{facts}"
    );
    let dispatched = fleet.event(&hung, "execution.dispatched", SOON).await;
    let deadline = Timestamp::parse(dispatched["data"]["deadline"].as_str().unwrap()).unwrap();
    let late = time_of(&event) - deadline.as_millis();
    assert!((0..TIMER_MS).contains(&late), "noticed {late} ms after its deadline");
    assert_eq!(agent.terminated()[0].2, "timed_out");
    agent.given(&next).await;
    assert!(
        !kinds(&fleet.history(&hung).await).contains(&"execution.failed".to_owned()),
        "no failed follows"
    );
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_terminate_keeps_the_slot_until_the_safety_net() {
    let fleet = Fleet::start_with(Options::default().env("ROLLCALL_STALE_AFTER_MS", 6000)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_terminate(OnTerminate::Refuse);
    let stuck = id(&fleet.submit(json!({"agent_id": "a", "timeout_ms": 1000})).await);
    let next = id(&fleet.submit(json!({"agent_id": "a"})).await);
    until("it to be asked again", SOON, || async {
        let asked = agent.terminated().len();
        if asked >= 2 { Ok(()) } else { Err(asked) }
    })
    .await;
    assert_eq!(fleet.execution(&stuck).await.unwrap()["state"], "running", "the slot is kept while it lives");
    assert_eq!(fleet.execution(&next).await.unwrap()["state"], "queued");
    let facts = recovered(&fleet, &stuck).await;
    assert_eq!((&facts["reason"], &facts["terminate"]), (&json!("stale"), &json!("failed")), "{facts}");
    agent.given(&next).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_restarted_with_a_new_instance() {
    let fleet = Fleet::start().await;
    let old = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let lost = id(&fleet.submit(json!({"agent_id": "a", "on_loss": "requeue", "input": {"k": 1}})).await);
    fleet.state(&lost, "running", SOON).await;
    old.vanish().await;
    let new = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    let facts = recovered(&fleet, &lost).await;
    assert_eq!(
        (&facts["reason"], &facts["action"], &facts["next_attempt"]),
        (&json!("agent_restarted"), &json!("requeued"), &json!(2)),
        "{facts}"
    );
    new.given(&lost).await;
    fleet.state(&lost, "running", SOON).await;
    let request = new.request(&lost).unwrap();
    assert_eq!((&request["attempt"], &request["input"]), (&json!(2), &json!({"k": 1})));
    fleet.agent_event("a", "agent.superseded", SOON).await;
    // The old attempt's report counts for nothing, and is kept.
    old.report(&lost, 1, "failed", json!({"error": {"code": "late", "message": "too late"}})).await;
    fleet.event(&lost, "execution.late_result", SOON).await;
    assert_eq!(fleet.execution(&lost).await.unwrap()["state"], "running");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_instance_that_lives_vouches_for_its_work() {
    let fleet = Fleet::start().await;
    let old = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    fleet.state(&work, "running", SOON).await;
    let _new = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    until("the old one to be told goodbye", SOON, || async {
        let goodbyes = old.goodbyes();
        if goodbyes.iter().any(|g| g["reason"] == "superseded") { Ok(()) } else { Err(goodbyes) }
    })
    .await;
    // It goes on beating, which the watchdog reads; then it finishes.
    for _ in 0..4 {
        old.beat().await;
    }
    assert_eq!(fleet.execution(&work).await.unwrap()["state"], "running");
    old.report(&work, 1, "completed", json!({"result": "done"})).await;
    fleet.state(&work, "completed", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_says_goodbye_with_work_in_its_hands() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    let abandoned = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let returned = id(&fleet.submit(json!({"agent_id": "a", "on_loss": "requeue", "max_attempts": 1})).await);
    fleet.state(&abandoned, "running", SOON).await;
    fleet.state(&returned, "running", SOON).await;
    agent.says("draining");
    agent.beat().await;
    fleet.status("a", "draining", SOON).await;
    agent.report(&returned, 1, "returned", json!({"checkpoint": {"page": 3}})).await;
    let facts = recovered(&fleet, &returned).await;
    assert_eq!((&facts["reason"], &facts["action"]), (&json!("agent_gone"), &json!("requeued")), "{facts}");
    agent.says("gone");
    assert_eq!(agent.beat().await["status"], "gone");
    agent.vanish().await;
    let facts = recovered(&fleet, &abandoned).await;
    assert_eq!((&facts["reason"], &facts["action"]), (&json!("agent_gone"), &json!("failed")), "{facts}");
    let next = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    next.given(&returned).await;
    let request = next.request(&returned).unwrap();
    assert_eq!((&request["attempt"], &request["checkpoint"]), (&json!(2), &json!({"page": 3})));
    fleet.audit().await;
}

/// The race guard of the whole system: whoever is first in the log wins, and the slot is released once.
#[tokio::test(flavor = "multi_thread")]
async fn completion_races_recovery() {
    let fleet = Fleet::start_with(Options::default().replicas("watchdog", 2).replicas("dispatcher", 2)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 4).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_terminate(OnTerminate::Finish);
    let mut all = Vec::new();
    for _ in 0..12 {
        all.push(id(&fleet.submit(json!({"agent_id": "a", "timeout_ms": 700})).await));
    }
    for execution in &all {
        let view = until(&format!("the end of {execution}"), SOON, || async {
            let view = fleet.execution(execution).await.map_err(|e| format!("{e:?}"))?;
            if view["state"] == "completed" { Ok(view) } else { Err(view.to_string()) }
        })
        .await;
        assert_eq!(view["result"], "just in time", "finished work is never thrown away");
        let ends = kinds(&fleet.history(execution).await)
            .iter()
            .filter(|k| {
                matches!(k.as_str(), "execution.completed" | "execution.recovered" | "execution.failed")
            })
            .count();
        assert!((1..=2).contains(&ends), "{:?}", kinds(&fleet.history(execution).await));
    }
    fleet.audit().await;
}

/// Whoever asks about an execution reads further than the dispatcher's tail has come. What the watchdog did is carried out
/// all the same, and no audit has to find it.
#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_is_read_before_the_tail_delivers_it_is_carried_out() {
    let fleet = Fleet::start_with(Options::default().env("ROLLCALL_AUDIT_INTERVAL_MS", 3_600_000)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    let with = |on_loss: &str| json!({"agent_id": "a", "timeout_ms": 4000, "on_loss": on_loss});
    let fails = id(&fleet.submit(with("fail")).await);
    let again = id(&fleet.submit(with("requeue")).await);
    agent.given(&fails).await;
    agent.given(&again).await;
    agent.on_dispatch(OnDispatch::Complete);
    let followers = fleet.pause_tails(Duration::from_secs(10)).await;
    assert!(followers >= 3, "{followers}");
    // Read from the log itself while the tail stands still.
    fleet.event(&fails, "execution.recovered", SOON).await;
    fleet.event(&again, "execution.recovered", SOON).await;
    fleet.state(&fails, "failed", SOON).await;
    fleet.state(&again, "completed", SOON).await;
    fleet.holds_nothing("a").await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_success_of_a_failed_execution_is_accepted() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    fleet.state(&work, "running", SOON).await;
    agent.vanish().await;
    assert_eq!(recovered(&fleet, &work).await["reason"], "agent_lost");
    agent.report(&work, 1, "completed", json!({"result": "after all"})).await;
    let view = fleet.state(&work, "completed", SOON).await;
    assert_eq!((&view["late"], &view["result"]), (&json!(true), &json!("after all")));
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_waiting_on_the_bus_withholds_the_verdict() {
    let mut fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a", "timeout_ms": 15_000})).await);
    fleet.state(&work, "running", SOON).await;
    // Nobody applies reports now.
    fleet.service("dispatcher").freeze().await;
    agent.report(&work, 1, "completed", json!({"result": 1})).await;
    agent.vanish().await;
    // The agent is silent for long enough: every reason to recover, but for the report.
    until("the watchdog to hold its verdict back", SOON, || async {
        let seen = fleet.api("explain", json!({"execution_id": work})).await.map_err(|e| format!("{e:?}"))?;
        if seen["row"] == "withheld" { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
    assert!(!kinds(&fleet.history(&work).await).contains(&"execution.recovered".to_owned()));
    fleet.service("dispatcher").thaw();
    fleet.state(&work, "completed", SOON).await;
    assert!(!kinds(&fleet.history(&work).await).contains(&"execution.recovered".to_owned()));
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_execution_is_requeued_until_it_is_quarantined() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let poison = id(&fleet
        .submit(json!({"agent_id": "a", "on_loss": "requeue", "max_attempts": 2, "timeout_ms": 300}))
        .await);
    fleet.state(&poison, "quarantined", SOON).await;
    let actions: Vec<Value> = fleet
        .history(&poison)
        .await
        .iter()
        .filter(|e| e["type"] == "rollcall.execution.recovered")
        .map(|e| e["data"]["action"].clone())
        .collect();
    assert_eq!(actions, ["requeued", "quarantined"]);
    agent.on_dispatch(OnDispatch::Complete);
    let retried = fleet.api("retry", json!({"execution_id": poison})).await.unwrap();
    assert_eq!(retried["attempt"], 3);
    fleet.state(&poison, "completed", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_is_terminated() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    agent.report_and_list(&work, 1, "failed", json!({"error": {"code": "x", "message": "gave up"}})).await;
    fleet.state(&work, "failed", SOON).await;
    until("the zombie to be terminated", SOON, || async {
        let terminated = agent.terminated();
        if terminated.iter().any(|(e, _, _)| *e == work) { Ok(()) } else { Err(terminated) }
    })
    .await;
    assert_eq!(fleet.execution(&work).await.unwrap()["state"], "failed");
    let status = fleet.api("watchdog.status", json!({})).await.expect("it tells");
    assert!(status["totals"]["zombies"].as_u64() >= Some(1), "{status}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_end_under_load_loses_nothing() {
    let fleet = Fleet::start().await;
    let mut process = fleet.program(
        "agent-run",
        "rollcall",
        &[
            "agent",
            "run",
            "--id",
            "a",
            "--capacity",
            "4",
            "--drain-ms",
            "1000",
            "--",
            "sh",
            "-c",
            "read n; [ \"$n\" = 0 ] && exec tail -f /dev/null; echo \"$n\"",
        ],
    );
    fleet.status("a", "connected", SOON).await;
    let mut all = Vec::new();
    for n in 0..20 {
        // Two that never end by themselves, and eighteen that do.
        let input = if n < 2 { 0 } else { n };
        all.push(id(&fleet.submit(json!({"agent_id": "a", "input": input, "on_loss": "requeue"})).await));
    }
    fleet.state(&all[0], "running", SOON).await;
    let code = process.terminate(Duration::from_secs(25)).await;
    assert_eq!(code, Some(0), "{}", process.output());
    fleet.status("a", "gone", SOON).await;
    until("what was in its hands to be settled", SOON, || async {
        let mut open = Vec::new();
        for execution in &all {
            let view = fleet.execution(execution).await.map_err(|e| vec![format!("{e:?}")])?;
            if !matches!(view["state"].as_str(), Some("completed" | "queued")) {
                open.push(view.to_string());
            }
        }
        if open.is_empty() { Ok(()) } else { Err(open) }
    })
    .await;
    for execution in &all {
        for event in fleet.history(execution).await {
            let silent = event["type"] == "rollcall.execution.recovered" && event["data"]["returned"] != true;
            assert!(!silent, "nothing but what was returned is recovered: {event}");
        }
    }
    // Whoever comes next finishes the rest.
    let next = ScriptedAgent::start(&fleet.bus, "a", 4).await;
    next.on_dispatch(OnDispatch::Complete);
    next.beat().await;
    for execution in &all {
        fleet.state(execution, "completed", SOON).await;
    }
    fleet.audit().await;
}
