//! Bad input: each with the contract's error, and the services go on.

use std::{process::Command, time::Duration};

use bytes::Bytes;
use e2e::{Fleet, ScriptedAgent, fleet::Options, fleet::SOON, process::binary, until};
use serde_json::{Value, json};

async fn beat(fleet: &Fleet, agent: &str, body: Vec<u8>) -> Value {
    let reply = fleet
        .bus
        .request(format!("rollcall.heartbeat.{agent}"), Bytes::from(body), Duration::from_secs(10))
        .await
        .expect("the prober answers");
    serde_json::from_slice(&reply.payload).expect("an answer is JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_that_are_none() {
    let fleet = Fleet::start().await;
    let good = json!({"instance_id": "i-1", "seq": 1, "state": "ready", "capacity": 1, "executions": [], "surprise": {"a": [1]}});
    assert_eq!(beat(&fleet, "good", good.to_string().into_bytes()).await["status"], "connected");
    for (body, code) in [
        ("{".to_owned(), "bad_request"),
        ("\u{0}\u{1b}[31m".to_owned(), "bad_request"),
        ("[1,2]".to_owned(), "bad_request"),
        (json!({"instance_id": "i 1", "seq": 1, "state": "ready", "capacity": 1, "executions": []}).to_string(), "invalid_id"),
        (json!({"instance_id": "i-1", "seq": "one", "state": "ready", "capacity": 1, "executions": []}).to_string(), "bad_request"),
        (json!({"instance_id": "i-1", "seq": 1, "state": "ready", "capacity": 5000, "executions": []}).to_string(), "bad_request"),
        (json!({"instance_id": "i-1", "seq": 1, "state": "ready", "capacity": 1, "executions": [], "pad": "x".repeat(70_000)}).to_string(), "too_large"),
    ] {
        let answer = beat(&fleet, "bad", body.clone().into_bytes()).await;
        assert_eq!(answer["error"]["code"], code, "{} -> {answer}", body.chars().take(80).collect::<String>());
    }
    let unknown = fleet.api("agent", json!({"agent_id": "bad"})).await.unwrap_err();
    assert_eq!((unknown.code.as_str(), unknown.headers), ("unknown_agent", true));
    // The services go on.
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let reply = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(reply["state"], "running");
    agent.report(reply["execution_id"].as_str().unwrap(), 1, "completed", json!({})).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn submissions_that_are_refused_leave_nothing() {
    let fleet = Fleet::start_with(Options::default().env("ROLLCALL_QUEUE_DEPTH", 1)).await;
    let _agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    for (body, code) in [
        (json!({"agent_id": "a", "execution_id": "a.b"}), "invalid_id"),
        (json!({"agent_id": "*"}), "invalid_id"),
        (json!({}), "bad_request"),
        (json!({"agent_id": "a", "pool": "p"}), "bad_request"),
        (json!({"agent_id": "a", "priority": 10}), "bad_request"),
        (json!({"agent_id": "a", "timeout_ms": "soon"}), "bad_request"),
        (json!({"agent_id": "a", "timeout_ms": 0}), "bad_request"),
        (json!({"agent_id": "a", "on_loss": "panic"}), "bad_request"),
        (json!({"agent_id": "nobody"}), "unknown_agent"),
        (json!({"agent_id": "a", "input": "x".repeat(530_000)}), "too_large"),
    ] {
        let error = fleet
            .api("submit", body.clone())
            .await
            .expect_err(&body.to_string()[..body.to_string().len().min(80)]);
        assert_eq!((error.code.as_str(), error.headers), (code, true), "{error:?}");
    }
    for verb in ["submit", "executions", "agents", "explain", "watchdog.status", "watchdog.run"] {
        let error = fleet.api_bytes(verb, b"{\"agent_id\":".to_vec()).await.expect_err(verb);
        assert_eq!(error.code, "bad_request", "{verb}");
    }
    for verb in ["execution", "cancel", "retry"] {
        let error = fleet.api(verb, json!({"execution_id": "no-such"})).await.unwrap_err();
        assert_eq!((error.code.as_str(), error.headers), ("not_found", true), "{verb}");
    }
    fleet.submit(json!({"agent_id": "a"})).await;
    fleet.submit(json!({"agent_id": "a"})).await;
    let full = fleet.api("submit", json!({"agent_id": "a", "execution_id": "one-more"})).await.unwrap_err();
    assert_eq!(full.code, "queue_full");
    assert!(fleet.history("one-more").await.is_empty(), "a refused submit leaves no event");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_that_do_not_count() {
    // An unasked `terminated` waits 3 s for who asked for it, and its agent lists the work no more: the ordinary grace is
    // longer than that, the stories' is not, and the watchdog would call it lost meanwhile.
    let fleet = Fleet::start_with(Options::default().env("ROLLCALL_DISPATCH_GRACE_MS", "15000")).await;
    let holder = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    let other = ScriptedAgent::start(&fleet.bus, "b", 1).await;
    fleet.status("a", "connected", SOON).await;
    fleet.status("b", "connected", SOON).await;
    let reply = fleet.submit(json!({"agent_id": "a"})).await;
    let work = reply["execution_id"].as_str().unwrap().to_owned();
    fleet.state(&work, "running", SOON).await;
    other.report(&work, 1, "completed", json!({"result": "stolen"})).await;
    holder.report_and_list(&work, 7, "completed", json!({"result": "from the future"})).await;
    let reports = rollcall_nats::Reports::new(&fleet.bus);
    for nonsense in ["{", "{}", "{\"instance_id\":\"i\",\"attempt\":1,\"outcome\":\"won\"}"] {
        reports.publish(&format!("rollcall.report.a.{work}"), Bytes::from(nonsense)).await.unwrap();
    }
    reports.publish("rollcall.report.a.unheard-of", Bytes::from("{}")).await.unwrap();
    // Everything before it was taken in when this one is, once the queue is empty.
    until("the queue of reports to be empty", SOON, || async {
        match reports.last("rollcall.report.a.unheard-of").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(fleet.execution(&work).await.unwrap()["state"], "running");
    // An unasked `terminated` is a failure, and a second report of the same is the first.
    holder.report(&work, 1, "terminated", json!({})).await;
    let view = fleet.state(&work, "failed", SOON).await;
    assert_eq!(view["failure"]["code"], "terminated");
    fleet.audit().await;
}

/// Who it is from and what it is about says its subject: a payload that says otherwise is invalid.
#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_names_another_agent_or_execution_changes_nothing() {
    let fleet = Fleet::start().await;
    let holder = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let reply = fleet.submit(json!({"agent_id": "a"})).await;
    let work = reply["execution_id"].as_str().unwrap();
    fleet.state(work, "running", SOON).await;
    let subject = format!("rollcall.report.a.{work}");
    for (field, other) in [("agent_id", "b"), ("execution_id", "another")] {
        holder.report_and_list(work, 1, "completed", json!({field: other, "result": "theirs"})).await;
        let reports = rollcall_nats::Reports::new(&fleet.bus);
        until("the report to be taken in", SOON, || async {
            match reports.last(&subject).await {
                Ok(None) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        assert_eq!(fleet.execution(work).await.unwrap()["state"], "running", "{field}");
    }
    holder
        .report(work, 1, "completed", json!({"agent_id": "a", "execution_id": work, "result": "its own"}))
        .await;
    assert_eq!(fleet.state(work, "completed", SOON).await["result"], "its own");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_the_log_that_is_no_event_is_skipped() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let reply = fleet.submit(json!({"agent_id": "a"})).await;
    let work = reply["execution_id"].as_str().unwrap().to_owned();
    fleet.state(&work, "running", SOON).await;
    // As whoever may write into the log by accident would: straight to its subject.
    let reports = rollcall_nats::Reports::new(&fleet.bus);
    reports.publish(&format!("rollcall.event.execution.{work}"), Bytes::from("+ACK nonsense")).await.unwrap();
    agent.report(&work, 1, "completed", json!({"result": 1})).await;
    fleet.state(&work, "completed", SOON).await;
    until("the alarm", SOON, || async {
        let page = fleet
            .log
            .read_range(0, 1000, &["rollcall.event.system.dispatcher"])
            .await
            .map_err(|e| e.to_string())?;
        let found =
            page.entries.iter().any(|e| String::from_utf8_lossy(&e.bytes).contains("system.invalid_entry"));
        if found { Ok(()) } else { Err(format!("{} system events", page.entries.len())) }
    })
    .await;
}

#[test]
fn bad_settings_stop_every_program_before_it_connects() {
    for program in ["health-prober", "dispatcher", "watchdog", "notifier"] {
        let output = Command::new(binary(program))
            .env_clear()
            .env("ROLLCALL_FAILURE_THRESHOLD", "0")
            .env("ROLLCALL_BREAKER_FRACTION", "lots")
            .env("ROLLCALL_PREFIX", "a.b")
            .output()
            .expect("it starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{program}: {text}");
        for name in ["ROLLCALL_FAILURE_THRESHOLD", "ROLLCALL_BREAKER_FRACTION", "ROLLCALL_PREFIX"] {
            assert!(text.contains(name), "{program} does not name {name}: {text}");
        }
    }
}
