//! What happens on a good day.

use std::time::Duration;

use e2e::{Fleet, OnDispatch, OnTerminate, ScriptedAgent, fleet::SOON, fleet::kinds, sse::Sse, until};
use serde_json::{Value, json};

fn id(reply: &Value) -> String {
    reply["execution_id"].as_str().expect("an execution id").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_limit_is_its_own_else_its_agents_else_the_default() {
    let fleet = Fleet::start().await;
    let patient = ScriptedAgent::start_with(&fleet.bus, "patient", 2, json!({"timeout_ms": 70_000})).await;
    let plain = ScriptedAgent::start(&fleet.bus, "plain", 1).await;
    for (agent, asked, limit) in [
        (&patient, json!({"agent_id": "patient", "timeout_ms": 50_000}), 50_000),
        (&patient, json!({"agent_id": "patient"}), 70_000),
        (&plain, json!({"agent_id": "plain"}), 600_000),
    ] {
        fleet.status(asked["agent_id"].as_str().expect("an id"), "connected", SOON).await;
        let execution = id(&fleet.submit(asked).await);
        agent.given(&execution).await;
        assert_eq!(agent.request(&execution).expect("it was dispatched")["timeout_ms"], limit);
        let dispatched = fleet.event(&execution, "execution.dispatched", SOON).await;
        assert_eq!(dispatched["data"]["timeout_ms"], limit);
        agent.report(&execution, 1, "completed", json!({})).await;
        fleet.state(&execution, "completed", SOON).await;
    }
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn work_is_submitted_dispatched_and_completed() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::Hold);
    let reply = fleet.submit(json!({"agent_id": "a", "input": {"n": 7}, "labels": {"team": "x"}})).await;
    let execution = id(&reply);
    assert_eq!(
        (&reply["state"], &reply["agent_id"], &reply["attempt"]),
        (&json!("running"), &json!("a"), &json!(1))
    );
    let request = agent.request(&execution).expect("it was dispatched");
    assert_eq!(request["input"], json!({"n": 7}));
    assert_eq!(request["attempt"], 1);
    assert_eq!(request["timeout_ms"], 600_000);
    agent.report(&execution, 1, "completed", json!({"result": {"answer": 42}})).await;
    let view = fleet.state(&execution, "completed", SOON).await;
    assert_eq!(view["result"], json!({"answer": 42}));
    assert_eq!(
        kinds(&fleet.history(&execution).await),
        ["execution.submitted", "execution.dispatched", "execution.started", "execution.completed"]
    );
    // Events carry no payloads: dashboards see events.
    let log = serde_json::to_string(&fleet.history(&execution).await).unwrap();
    assert!(!log.contains("42") || !log.contains("answer"), "{log}");
    fleet.audit().await;
}

/// The answer has the fields, down to those of its rows, of the example in docs/PROTOCOL.md that has a field `by`.
fn like_the_example(answer: &Value, by: &str) {
    fn shape(value: &Value) -> Value {
        match value {
            Value::Object(fields) => {
                fields.iter().map(|(name, value)| (name.clone(), shape(value))).collect()
            }
            Value::Array(rows) => rows.first().map(shape).into_iter().collect(),
            _ => Value::Null,
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/PROTOCOL.md");
    let text = std::fs::read_to_string(path).expect(path);
    let mut examples = text.split("```json\n").skip(1).filter_map(|rest| {
        serde_json::from_str::<Value>(rest.split("```").next()?)
            .ok()
            .filter(|example| example.get(by).is_some())
    });
    assert_eq!(shape(answer), shape(&examples.next().expect("there is an example")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_served_by_priority_and_then_in_order() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let first = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let mut waiting = Vec::new();
    for (priority, position) in [(5, 1), (5, 2), (9, 3), (0, 1)] {
        let reply = fleet.submit(json!({"agent_id": "a", "priority": priority})).await;
        assert_eq!((&reply["state"], &reply["position"]), (&json!("queued"), &json!(position)), "{reply}");
        waiting.push(id(&reply));
    }
    let capacity = fleet.api("capacity", json!({"agent_id": "a"})).await.unwrap();
    assert_eq!((&capacity["capacity"], &capacity["held_count"]), (&json!(1), &json!(1)));
    like_the_example(&capacity, "held");
    like_the_example(&fleet.api("capacity", json!({"pool": "default"})).await.unwrap(), "free_agents");
    let positions: Vec<&Value> =
        capacity["queue"].as_array().unwrap().iter().map(|q| &q["position"]).collect();
    assert_eq!(positions, [1, 2, 3, 4]);
    let mut running = first;
    for next in [&waiting[3], &waiting[0], &waiting[1], &waiting[2]] {
        agent.report(&running, 1, "completed", json!({"result": null})).await;
        agent.given(next).await;
        running.clone_from(next);
    }
    agent.report(&running, 1, "failed", json!({"error": {"code": "boom", "message": "it broke"}})).await;
    let view = fleet.state(&running, "failed", SOON).await;
    assert_eq!(view["failure"]["code"], "boom");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_uses_any_free_agent_and_queues_without_one() {
    let fleet = Fleet::start().await;
    let early = fleet.submit(json!({"pool": "gpu", "input": 1})).await;
    assert_eq!((&early["state"], &early["position"]), (&json!("queued"), &json!(1)));
    let pool = json!({"pool": "gpu"});
    let one = ScriptedAgent::start_with(&fleet.bus, "one", 1, pool.clone()).await;
    let two = ScriptedAgent::start_with(&fleet.bus, "two", 1, pool).await;
    fleet.status("one", "connected", SOON).await;
    fleet.status("two", "connected", SOON).await;
    fleet.state(&id(&early), "running", SOON).await;
    let second = fleet.submit(json!({"pool": "gpu", "input": 2})).await;
    fleet.state(&id(&second), "running", SOON).await;
    assert_eq!((one.held().len(), two.held().len()), (1, 1));
    let third = fleet.submit(json!({"pool": "gpu", "input": 3})).await;
    assert_eq!(third["state"], "queued");
    let freed = one.held()[0].clone();
    one.report(&freed, 1, "completed", json!({})).await;
    one.given(&id(&third)).await;
    let view = fleet.state(&id(&third), "running", SOON).await;
    assert_eq!(view["agent_id"], "one");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_submission_twice_is_one_execution() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 4).await;
    fleet.status("a", "connected", SOON).await;
    let body = json!({"execution_id": "job-1", "agent_id": "a", "input": {"x": 1}});
    let first = fleet.submit(body.clone()).await;
    let again = fleet.submit(body).await;
    assert_eq!((&first["state"], &again["state"]), (&json!("running"), &json!("running")));
    let other =
        fleet.api("submit", json!({"execution_id": "job-1", "agent_id": "a", "input": {"x": 2}})).await;
    assert_eq!(other.unwrap_err().code, "already_exists");
    assert_eq!(agent.dispatched(), [("job-1".to_owned(), 1)]);
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_dispatch_waits_at_the_head_for_the_next_heartbeat() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start_with(&fleet.bus, "a", 2, json!({"interval_ms": 60_000})).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::Refuse("at_capacity".into()));
    let refused = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!((&refused["state"], &refused["attempt"]), (&json!("queued"), &json!(1)), "{refused}");
    let behind = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!((&behind["state"], &behind["position"]), (&json!("queued"), &json!(2)), "held back: {behind}");
    let offered = agent.dispatched().len();
    agent.on_dispatch(OnDispatch::Hold);
    agent.beat().await;
    fleet.state(&id(&refused), "running", SOON).await;
    fleet.state(&id(&behind), "running", SOON).await;
    assert_eq!(
        agent.dispatched()[offered],
        (id(&refused), 1),
        "the refused one is at the head, same attempt"
    );
    let kinds = kinds(&fleet.history(&id(&refused)).await);
    assert_eq!(kinds[..3], ["execution.submitted", "execution.dispatched", "execution.queued"]);
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn work_an_agent_cannot_do_fails_with_its_reason() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::Refuse("unsupported".into()));
    let reply = fleet.submit(json!({"agent_id": "a"})).await;
    let view = fleet.state(&id(&reply), "failed", SOON).await;
    assert_eq!(view["failure"]["code"], "unsupported");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unanswered_dispatch_is_settled_by_heartbeats() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 2).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::TakeSilently);
    let taken = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(taken["state"], "dispatching", "{taken}");
    fleet.state(&id(&taken), "running", SOON).await;
    agent.on_dispatch(OnDispatch::Silent);
    let lost = fleet.submit(json!({"agent_id": "a"})).await;
    assert_eq!(lost["state"], "dispatching", "{lost}");
    agent.on_dispatch(OnDispatch::Hold);
    fleet.state(&id(&lost), "running", SOON).await;
    let of_lost: Vec<_> = agent.dispatched().into_iter().filter(|(e, _)| *e == id(&lost)).collect();
    assert!(of_lost.len() >= 2 && of_lost.iter().all(|(_, attempt)| *attempt == 1), "{of_lost:?}");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_waits_for_confirmed_death() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let running = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let queued = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let reply = fleet.api("cancel", json!({"execution_id": queued, "reason": "not needed"})).await.unwrap();
    assert_eq!(reply["state"], "cancelled");
    agent.on_terminate(OnTerminate::Refuse);
    let reply =
        fleet.api("cancel", json!({"execution_id": running, "reason": "changed my mind"})).await.unwrap();
    assert_eq!(reply["state"], "cancelling");
    until("the agent to be asked twice", SOON, || async {
        let asked = agent.terminated().len();
        if asked >= 2 { Ok(()) } else { Err(asked) }
    })
    .await;
    assert_eq!(
        fleet.execution(&running).await.unwrap()["state"],
        "cancelling",
        "the slot is kept while it lives"
    );
    let capacity = fleet.api("capacity", json!({"agent_id": "a"})).await.unwrap();
    assert_eq!(capacity["held_count"], 1);
    agent.on_terminate(OnTerminate::Confirm);
    fleet.state(&running, "cancelled", SOON).await;
    let again = fleet.api("cancel", json!({"execution_id": running})).await.unwrap();
    assert_eq!(again["state"], "cancelled");
    agent.report(&running, 1, "completed", json!({"result": 1})).await;
    fleet.event(&running, "execution.late_result", SOON).await;
    assert_eq!(fleet.execution(&running).await.unwrap()["state"], "cancelled", "cancelled is sticky");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn external_work_is_granted_and_released() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let first = fleet.submit(json!({"agent_id": "a", "delivery": "external"})).await;
    assert_eq!((&first["state"], &first["agent_id"]), (&json!("running"), &json!("a")));
    agent.claim(&id(&first), 1);
    let second = fleet.submit(json!({"agent_id": "a", "delivery": "external"})).await;
    assert_eq!(second["state"], "queued");
    let wrong =
        fleet.api("release", json!({"execution_id": id(&first), "attempt": 2, "outcome": "completed"})).await;
    assert_eq!(wrong.unwrap_err().code, "conflict");
    let body = json!({"execution_id": id(&first), "attempt": 1, "outcome": "completed", "result": [1]});
    let released = fleet.api("release", body.clone()).await.unwrap();
    assert_eq!(released["state"], "completed");
    assert_eq!(fleet.api("release", body).await.unwrap()["state"], "completed", "again is the same");
    agent.forget(&id(&first));
    fleet.event(&id(&second), "execution.dispatched", SOON).await;
    assert!(agent.dispatched().is_empty(), "nobody asks an agent for external work");
    agent.claim(&id(&second), 1);
    let failed = json!({"execution_id": id(&second), "attempt": 1, "outcome": "failed", "error": {"code": "x", "message": "y"}});
    assert_eq!(fleet.api("release", failed).await.unwrap()["state"], "failed");
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_too_long_expires_and_can_be_retried() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let running = id(&fleet.submit(json!({"agent_id": "a"})).await);
    let waiting = id(&fleet.submit(json!({"agent_id": "a", "queue_ttl_ms": 300})).await);
    fleet.state(&waiting, "expired", SOON).await;
    let retried = fleet.api("retry", json!({"execution_id": waiting})).await.unwrap();
    assert_eq!((&retried["state"], &retried["attempt"]), (&json!("queued"), &json!(2)));
    agent.report(&running, 1, "completed", json!({})).await;
    let not_again = fleet.state(&running, "completed", SOON).await;
    assert_eq!(not_again["state"], "completed");
    assert_eq!(fleet.api("retry", json!({"execution_id": running})).await.unwrap_err().code, "conflict");
    until("the retried one to run or expire again", SOON, || async {
        let view = fleet.execution(&waiting).await.unwrap();
        if view["state"] == "running" || view["state"] == "expired" { Ok(()) } else { Err(view) }
    })
    .await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_that_come_back_miss_nothing() {
    let fleet = Fleet::start().await;
    let address = fleet.http_address().expect("the notifier logs its address");
    let live = Sse::open(&address, "").await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 4).await;
    fleet.status("a", "connected", SOON).await;
    agent.on_dispatch(OnDispatch::Complete);
    let mut all = Vec::new();
    for _ in 0..5 {
        all.push(id(&fleet.submit(json!({"agent_id": "a"})).await));
    }
    for execution in &all {
        live.event("execution.completed", execution, SOON).await;
    }
    let seen = live.frames();
    let middle = seen[seen.len() / 2].id;
    let resumed = Sse::open(&address, &format!("after={middle}")).await;
    let last = seen.last().unwrap().id;
    until("the rest", SOON, || async {
        let frames = resumed.frames();
        if frames.last().is_some_and(|f| f.id >= last) { Ok(()) } else { Err(frames.len()) }
    })
    .await;
    let expected: Vec<(u64, Value)> =
        live.frames().iter().filter(|f| f.id > middle).map(|f| (f.id, f.data.clone())).collect();
    let got: Vec<(u64, Value)> = resumed.frames().iter().map(|f| (f.id, f.data.clone())).collect();
    assert_eq!(got, expected[..got.len().min(expected.len())]);
    assert!(got.windows(2).all(|w| w[0].0 < w[1].0));
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_of_an_agent_is_said_and_logged_once_however_many_watch_it() {
    let fleet = Fleet::start_with(e2e::fleet::Options::default().replicas("health-prober", 2)).await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    // It answers pings and is not heard: late for each of them at its own moment, and in the end it is an error.
    agent.beats(false);
    fleet.status("a", "error", SOON).await;
    agent.beats(true);
    fleet.status("a", "connected", SOON).await;
    let written = kinds(&fleet.agent_history("a").await);
    let times = |kind: &str| written.iter().filter(|written| *written == kind).count();
    assert_eq!((times("agent.error"), times("agent.connected")), (1, 2), "{written:?}");
    assert!(times("agent.degraded") <= 1 && times("agent.disconnected") <= 1, "{written:?}");
    let logged = until("both logs to be written", SOON, || async {
        let mut logged = Vec::new();
        for prober in ["health-prober", "health-prober-2"] {
            for line in fleet.services[prober].output().lines() {
                let line: Value = serde_json::from_str(line).unwrap_or_default();
                if line["message"] == "agent status changed" && line["agent_id"] == "a" {
                    logged.push(format!("agent.{}", line["status"].as_str().unwrap_or_default()));
                }
            }
        }
        if logged.len() >= written.len() - 1 { Ok(logged) } else { Err(logged) }
    })
    .await;
    let sorted = |mut all: Vec<String>| {
        all.sort();
        all
    };
    assert_eq!(sorted(logged), sorted(written[1..].to_vec()));
    fleet.audit().await;
}

/// An agent that is driven over HTTP: what it is asked, and an answer that makes every terminate succeed.
async fn control_endpoint() -> (String, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let Ok(read) = socket.read(&mut request).await else { continue };
            let line =
                String::from_utf8_lossy(&request[..read]).lines().next().unwrap_or_default().to_owned();
            let body =
                if line.starts_with("GET") { r#"{"executions":[{"execution_id":"driven"}]}"# } else { "{}" };
            seen.lock().expect("no panic while pushing").push(line);
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    });
    (url, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_driven_over_http_is_cancelled_over_http() {
    let fleet =
        Fleet::start_with(e2e::fleet::Options::default().env("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8")).await;
    let (url, asked) = control_endpoint().await;
    let extra = json!({"control": {"kind": "http", "url": url}});
    let _agent = ScriptedAgent::start_with(&fleet.bus, "a", 1, extra).await;
    fleet.status("a", "connected", SOON).await;
    fleet.submit(json!({"execution_id": "driven", "agent_id": "a", "delivery": "external"})).await;
    let reply = fleet.api("cancel", json!({"execution_id": "driven"})).await.unwrap();
    assert_eq!(reply["state"], "cancelling");
    fleet.state("driven", "cancelled", SOON).await;
    let asked = asked.lock().expect("no panic while pushing").clone();
    assert!(asked.iter().any(|line| line.starts_with("POST /api/executions/driven/terminate ")), "{asked:?}");
    fleet.audit().await;
}

/// A command as an agent: its own process, its own process group, its result from its stdout.
#[tokio::test(flavor = "multi_thread")]
async fn any_command_is_an_agent() {
    let fleet = Fleet::start().await;
    let mut agent = fleet.program(
        "agent-run",
        "rollcall",
        &[
            "agent",
            "run",
            "--id",
            "shell",
            "--capacity",
            "2",
            "--",
            "sh",
            "-c",
            "read line; echo \"{\\\"got\\\": $line}\"",
        ],
    );
    fleet.status("shell", "connected", SOON).await;
    let reply = fleet.submit(json!({"agent_id": "shell", "input": 5})).await;
    let view = fleet.state(&id(&reply), "completed", SOON).await;
    assert_eq!(view["result"], json!({"got": 5}));
    assert_eq!(agent.terminate(Duration::from_secs(20)).await, Some(0), "{}", agent.output());
    fleet.status("shell", "gone", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn executions_are_listed_by_state_and_agent_page_by_page() {
    let fleet = Fleet::start().await;
    let a = ScriptedAgent::start(&fleet.bus, "a", 3).await;
    let _b = ScriptedAgent::start(&fleet.bus, "b", 1).await;
    fleet.status("a", "connected", SOON).await;
    fleet.status("b", "connected", SOON).await;
    for (name, agent) in [("e1", "a"), ("e2", "b"), ("e3", "a"), ("e4", "b"), ("e5", "a")] {
        fleet.submit(json!({"execution_id": name, "agent_id": agent})).await;
    }
    for running in ["e1", "e2", "e3", "e5"] {
        fleet.state(running, "running", SOON).await;
    }
    a.report("e3", 1, "completed", json!({})).await;
    fleet.state("e3", "completed", SOON).await;
    let list = async |query: Value| {
        let page = fleet.api("executions", query).await.expect("a list");
        assert_eq!(page["forgotten"], false);
        let rows = page["executions"].as_array().expect("rows").iter();
        let names: Vec<String> =
            rows.map(|row| row["execution_id"].as_str().expect("an id").to_owned()).collect();
        (names.join(" "), page["next"].clone())
    };
    let whole = |names: &str| (names.to_owned(), Value::Null);
    assert_eq!(list(json!({})).await, whole("e1 e2 e3 e4 e5"));
    assert_eq!(list(json!({"agent_id": "a"})).await, whole("e1 e3 e5"));
    assert_eq!(list(json!({"state": "running"})).await, whole("e1 e2 e5"));
    assert_eq!(list(json!({"state": "queued"})).await, whole("e4"));
    assert_eq!(list(json!({"state": "completed"})).await, whole("e3"));
    assert_eq!(list(json!({"state": "running", "agent_id": "a"})).await, whole("e1 e5"));
    assert_eq!(list(json!({"limit": 2})).await, ("e1 e2".to_owned(), json!("e2")));
    assert_eq!(list(json!({"limit": 2, "after": "e2"})).await, ("e3 e4".to_owned(), json!("e4")));
    assert_eq!(list(json!({"limit": 2, "after": "e4"})).await, whole("e5"));
    for limit in [0, 1001] {
        let refused = fleet.api("executions", json!({"limit": limit})).await.expect_err("no such limit");
        assert_eq!(refused.code, "bad_request");
    }
    fleet.audit().await;
}
