//! The hard cases of judging agents and executions.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use e2e::{
    Fleet, OnDispatch, OnTerminate, ScriptedAgent,
    fleet::{Options, SOON, kinds},
    lasts, until,
};
use rollcall_core::Timestamp;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

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
async fn a_superseded_attempts_success_is_recorded_and_counts_for_nothing() {
    let fleet = Fleet::start().await;
    let old = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a", "on_loss": "requeue"})).await);
    fleet.state(&work, "running", SOON).await;
    old.vanish().await;
    let new = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    new.given(&work).await;
    until("the second attempt to run", SOON, || async {
        let view = fleet.execution(&work).await.map_err(|e| format!("{e:?}"))?;
        if view["state"] == "running" && view["attempt"] == 2 { Ok(()) } else { Err(view.to_string()) }
    })
    .await;
    old.report(&work, 1, "completed", json!({"result": "old"})).await;
    let late = fleet.event(&work, "execution.late_result", SOON).await;
    assert_eq!(
        (&late["data"]["attempt"], &late["data"]["outcome"]),
        (&json!(1), &json!("completed")),
        "{late}"
    );
    let view = fleet.execution(&work).await.unwrap();
    assert_eq!((&view["state"], &view["attempt"]), (&json!("running"), &json!(2)), "{view}");
    new.report(&work, 2, "completed", json!({"result": "new"})).await;
    let view = fleet.state(&work, "completed", SOON).await;
    assert_eq!((&view["result"], &view["attempt"]), (&json!("new"), &json!(2)), "{view}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_stands_still_is_ended_and_work_that_moves_is_not() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    let still = id(&fleet.submit(json!({"agent_id": "a", "stall_timeout_ms": 3000})).await);
    let moving = id(&fleet.submit(json!({"agent_id": "a", "stall_timeout_ms": 3000})).await);
    fleet.state(&moving, "running", SOON).await;
    agent.moves(&still, true);
    agent.moves(&moving, true);
    // It moves for longer than the stall timeout, and is left alone.
    lasts("both run", Duration::from_secs(5), || async {
        let views = [fleet.execution(&still).await, fleet.execution(&moving).await];
        let run = views.iter().all(|v| v.as_ref().is_ok_and(|v| v["state"] == "running"));
        if run { Ok(()) } else { Err(views) }
    })
    .await;
    agent.moves(&still, false);
    let facts = recovered(&fleet, &still).await;
    assert_eq!(
        (&facts["reason"], &facts["action"], &facts["terminate"]),
        (&json!("stalled"), &json!("failed"), &json!("confirmed")),
        "{facts}"
    );
    assert_eq!(agent.terminated()[0], (still.clone(), 1, "stalled".to_owned()));
    assert_eq!(fleet.execution(&moving).await.unwrap()["state"], "running");
    assert_eq!(agent.held(), [moving]);
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatch_that_nobody_took_is_recovered() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::Silent);
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let facts = recovered(&fleet, &work).await;
    assert_eq!((&facts["reason"], &facts["action"]), (&json!("dispatch_lost"), &json!("failed")), "{facts}");
    assert!(!kinds(&fleet.history(&work).await).contains(&"execution.started".to_owned()));
    assert!(agent.dispatched().iter().all(|(_, attempt)| *attempt == 1), "only ever the same attempt");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_drains_undrains_says_goodbye_and_forgets() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let view = fleet.api("drain", json!({"agent_id": "a", "reason": "new kernel"})).await.unwrap();
    assert_eq!(
        (&view["status"], &view["draining"]["by"]),
        (&json!("draining"), &json!("operator")),
        "{view}"
    );
    assert_eq!(view["draining"]["reason"], "new kernel");
    let waits = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(waits["state"], "queued", "{waits}");
    // Its heartbeats are well, and change nothing: the wish is not about health.
    for _ in 0..3 {
        assert_eq!(agent.beat().await["status"], "draining");
    }
    assert!(agent.dispatched().is_empty());
    let view = fleet.api("undrain", json!({"agent_id": "a"})).await.unwrap();
    assert_eq!((&view["status"], &view["draining"]), (&json!("connected"), &Value::Null), "{view}");
    agent.given(&id(&waits)).await;
    let sent = json!({"agent_id": "a", "deadline_ms": 1234, "in_flight": "return"});
    let answer = fleet.api("goodbye", sent).await.unwrap();
    assert_eq!((&answer["sent"], &answer["answered"]), (&json!(true), &json!(true)), "{answer}");
    let goodbye = &agent.goodbyes()[0];
    assert_eq!(
        (&goodbye["reason"], &goodbye["deadline_ms"], &goodbye["in_flight"]),
        (&json!("operator"), &json!(1234), &json!("return"))
    );
    agent.report(&id(&waits), 1, "completed", json!({"result": 1})).await;
    fleet.state(&id(&waits), "completed", SOON).await;
    agent.vanish().await;
    fleet.status("a", "error", SOON).await;
    let view = fleet.api("forget", json!({"agent_id": "a", "reason": "sold"})).await.unwrap();
    assert_eq!((&view["status"], &view["reason"]), (&json!("gone"), &json!("sold")), "{view}");
    for verb in ["drain", "undrain", "goodbye", "forget"] {
        let refused = fleet.api(verb, json!({"agent_id": "nobody"})).await.unwrap_err();
        assert_eq!(refused.code, "unknown_agent", "{verb}");
    }
    // Only a new instance comes back.
    let _next = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_forgotten_and_lives_keeps_its_work_until_it_is_away() {
    let mut fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    fleet.state(&work, "running", SOON).await;
    fleet.api("forget", json!({"agent_id": "a", "reason": "mistaken"})).await.unwrap();
    // The next watchdog has never heard of it, and finds it gone in the log.
    fleet.service("watchdog").kill();
    fleet.service("watchdog").start_again();
    fleet.ready().await;
    let explained = async |row: &str| {
        let said = fleet.api("explain", json!({"execution_id": work})).await.map_err(|e| format!("{e:?}"))?;
        if said["row"] == row { Ok(said) } else { Err(said.to_string()) }
    };
    until("it to be heard", SOON, || explained("gone_vouched")).await;
    lasts("it is left its work", Duration::from_secs(4), || async {
        let found = fleet.events_of("execution.recovered").await;
        if found.is_empty() { Ok(()) } else { Err(found) }
    })
    .await;
    agent.vanish().await;
    let lost = recovered(&fleet, &work).await;
    assert_eq!(lost["reason"], "agent_gone");
    assert_eq!(lost["evidence"]["instance"]["by"], "dismissed", "{lost}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_told_that_an_agent_drains_sees_it_get_no_work() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    // Nobody is told of the drain by the log for a while.
    let paused = fleet.pause_tails(Duration::from_secs(3)).await;
    assert!(paused >= 4, "every service follows the log: {paused}");
    fleet.api("drain", json!({"agent_id": "a"})).await.unwrap();
    let named = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!((&named["state"], &named["position"]), (&json!("queued"), &json!(1)), "{named}");
    let pooled = fleet.submit(json!({"pool": "default"})).await;
    assert_eq!((&pooled["state"], &pooled["position"]), (&json!("queued"), &json!(1)), "{pooled}");
    for reply in [&named, &pooled] {
        let history = kinds(&fleet.history(&id(reply)).await);
        assert_eq!(history, ["execution.submitted", "execution.queued"]);
    }
    assert_eq!(agent.dispatched(), []);
    fleet.api("undrain", json!({"agent_id": "a"})).await.unwrap();
    for reply in [named, pooled] {
        agent.given(&id(&reply)).await;
        agent.report(&id(&reply), 1, "completed", json!({"result": 1})).await;
        fleet.state(&id(&reply), "completed", SOON).await;
    }
    fleet.audit().await;
}

/// How often an agent fell silent, by its events.
fn falls(history: &[Value]) -> usize {
    let silent = |status: &Value| matches!(status.as_str(), Some("disconnected" | "error"));
    let fell = |event: &&Value| {
        let to = event["type"].as_str().unwrap_or_default().trim_start_matches("rollcall.agent.");
        silent(&json!(to)) && !silent(&event["data"]["previous"])
    };
    history.iter().filter(fell).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_comes_and_goes_is_marked_once() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    for fall in 1..=5 {
        agent.beats(false);
        until(&format!("fall {fall}"), SOON, || async {
            let view = fleet.api("agent", json!({"agent_id": "a"})).await.map_err(|e| format!("{e:?}"))?;
            let fallen = matches!(view["status"].as_str(), Some("disconnected" | "error"));
            if fallen { Ok(()) } else { Err(view.to_string()) }
        })
        .await;
        agent.beats(true);
        let view = fleet.status("a", "connected", SOON).await;
        // On a busy machine there may have been one more, by itself.
        let falls = falls(&fleet.agent_history("a").await);
        assert!(falls >= fall);
        assert_eq!(view["flapping"], falls >= 4, "after {falls} falls: {view}");
    }
    let history = kinds(&fleet.agent_history("a").await);
    assert_eq!(history.iter().filter(|k| *k == "agent.flapping").count(), 1, "{history:?}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_loses_work_gets_no_more_until_an_operator_says_so() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 6).await;
    fleet.status("a", "connected", SOON).await;
    let mut all = Vec::new();
    for _ in 0..5 {
        all.push(id(&fleet.submit(json!({"agent_id": "a"})).await));
    }
    for execution in &all {
        fleet.state(execution, "running", SOON).await;
        agent.forget(execution);
    }
    for execution in &all {
        assert_eq!(recovered(&fleet, execution).await["reason"], "orphaned");
    }
    fleet.agent_event("a", "agent.quarantined", SOON).await;
    let view = fleet.api("agent", json!({"agent_id": "a"})).await.unwrap();
    assert!(view["quarantined"].as_str().is_some_and(|q| q.contains('5')), "{view}");
    assert_eq!(view["status"], "connected", "that is no matter of health");
    let waits = until("a submission to wait", SOON, || async {
        let reply = fleet.submit(json!({"agent_id": "a"})).await;
        if reply["state"] == "queued" { Ok(reply) } else { Err(reply.to_string()) }
    })
    .await;
    fleet.api("undrain", json!({"agent_id": "a", "reason": "new disk"})).await.unwrap();
    fleet.agent_event("a", "agent.released", SOON).await;
    agent.given(&id(&waits)).await;
    fleet.state(&id(&waits), "running", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_why_in_words() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_terminate(OnTerminate::Refuse);
    let runs = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let work = id(&fleet.submit(json!({"agent_id": "a", "timeout_ms": 1000})).await);
    let waits = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let explained = |execution: String, row: &'static str| {
        let fleet = &fleet;
        async move {
            let said = until(&format!("{execution} to be explained as {row}"), SOON, || async {
                match fleet.api("explain", json!({"execution_id": execution})).await {
                    Ok(said) if said["row"] == row => Ok(said),
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
            for words in ["situation", "decision"] {
                assert!(said[words].as_str().is_some_and(|w| w.contains(' ')), "{words}: {said}");
            }
            assert!(said["evidence"].is_object(), "{said}");
            said
        }
    };
    let open = explained(runs, "healthy").await;
    assert_eq!((&open["state"], &open["agent_id"]), (&json!("running"), &json!("a")));
    explained(waits.clone(), "queued").await;
    let deferred = explained(work.clone(), "terminate_refused").await;
    assert!(deferred["trouble"]["terminate_asked"].as_u64().is_some_and(|n| n >= 1), "{deferred}");
    agent.on_terminate(OnTerminate::Confirm);
    assert_eq!(recovered(&fleet, &work).await["reason"], "timed_out");
    let ended = explained(work, "ended").await;
    assert_eq!(ended["evidence"]["recovered"], "timed_out", "{ended}");
    let recovery = &ended["recoveries"][0];
    assert_eq!((&recovery["attempt"], &recovery["reason"]), (&json!(1), &json!("timed_out")), "{ended}");
    assert!(recovery["evidence"]["deadline"].is_string(), "what it was decided on: {ended}");
    let unknown = fleet.api("explain", json!({"execution_id": "nothing"})).await.unwrap_err();
    assert_eq!(unknown.code, "not_found");
    fleet.audit().await;
}

/// A registry as in PROTOCOL.md 2.4 that runs nothing, and how often it was asked.
async fn empty_registry() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port on loopback");
    let url = format!("http://{}", listener.local_addr().expect("a bound listener"));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut caller, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let length = caller.read(&mut request).await.unwrap_or(0);
            if request[..length].starts_with(b"GET /api/executions/running") {
                count.fetch_add(1, Ordering::Relaxed);
            }
            let body = r#"{"executions": []}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            // Whoever hung up needs no answer.
            let _ = caller.write_all(answer.as_bytes()).await;
        }
    });
    (url, asked)
}

/// No cycle runs by itself here: what happens is what was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_asks_nobody_and_does_nothing() {
    let options = Options::default()
        .env("ROLLCALL_CYCLE_INTERVAL_MS", 3_600_000)
        .env("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8");
    let fleet = Fleet::start_with(options).await;
    let (url, asked) = empty_registry().await;
    let control = json!({"control": {"kind": "http", "url": url}});
    let agent = ScriptedAgent::start_with(&fleet.bus, "a", 1, control).await;
    fleet.status("a", "connected", SOON).await;
    let work = id(&fleet.submit(json!({"agent_id": "a"})).await);
    agent.given(&work).await;
    let started = fleet.event(&work, "execution.started", SOON).await;
    until("the dispatch grace to be over", SOON, || async {
        let now = rollcall_core::Clock::now(&rollcall_core::time::SystemClock::new()).as_millis();
        if now > time_of(&started) + 2500 { Ok(()) } else { Err(now) }
    })
    .await;
    let before = asked.load(Ordering::Relaxed);
    for _ in 0..5 {
        let report = fleet.api("watchdog.run", json!({"dry_run": true})).await.unwrap();
        assert_eq!(
            (&report["dry_run"], &report["registries"]["asked"]),
            (&json!(true), &json!(0)),
            "{report}"
        );
    }
    assert_eq!(asked.load(Ordering::Relaxed), before, "a dry run asks nobody");
    assert_eq!(fleet.execution(&work).await.unwrap()["state"], "running");
    let report = fleet.api("watchdog.run", json!({})).await.unwrap();
    assert_eq!((&report["dry_run"], &report["registries"]["asked"]), (&json!(false), &json!(1)), "{report}");
    assert_eq!(asked.load(Ordering::Relaxed), before + 1);
    for _ in 0..5 {
        fleet.api("watchdog.run", json!({"dry_run": true})).await.unwrap();
    }
    let said = fleet.api("explain", json!({"execution_id": work})).await.unwrap();
    assert_eq!(said["row"], "unlisted_once", "{said}");
    assert_eq!(fleet.execution(&work).await.unwrap()["state"], "running");
    // A second answer without it settles it, once the first is old enough that they are not one word.
    until("it to be recovered", SOON, || async {
        fleet.api("watchdog.run", json!({})).await.map_err(|e| format!("{e:?}"))?;
        let history = kinds(&fleet.history(&work).await);
        if history.contains(&"execution.recovered".to_owned()) { Ok(()) } else { Err(format!("{history:?}")) }
    })
    .await;
    assert_eq!(recovered(&fleet, &work).await["reason"], "orphaned");
    fleet.audit().await;
}
