//! The operator's commands.

use std::{process::Stdio, sync::Arc, sync::Mutex};

use rollcall_core::{
    Timestamp,
    event::{AgentEvent, Event, Marked},
};
use rollcall_nats::{Append, EventLog};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::fleet::{Stage, output, text};

fn refused(code: &str) -> Value {
    json!({"error": {"code": code, "message": "because"}})
}

fn view(state: &str) -> Value {
    json!({"execution_id": "x", "state": state, "attempt": 1, "pool": "default", "priority": 5, "on_loss": "fail",
        "losses": 0, "submitted_at": "2026-11-22T03:04:05.678Z", "seq": 3})
}

#[tokio::test]
async fn submit_sends_what_it_was_told_and_shows_the_answer() {
    let stage = Stage::start().await;
    let seen = Arc::new(Mutex::new(Value::Null));
    let asked = Arc::clone(&seen);
    stage
        .serve("submit", move |question| {
            *asked.lock().unwrap() = question;
            json!({"execution_id": "x", "state": "queued", "agent_id": "a", "attempt": 1, "position": 2})
        })
        .await;
    let arguments = [
        "submit",
        "--agent",
        "a",
        "--input",
        "-",
        "--id",
        "x",
        "--timeout-ms",
        "5",
        "--priority",
        "9",
        "--queue-ttl-ms",
        "6",
        "--on-loss",
        "requeue",
        "--max-attempts",
        "2",
        "--stall-timeout-ms",
        "7",
        "--delivery",
        "external",
        "--label",
        "k=v",
        "-o",
        "json",
    ];
    let mut child = stage.rollcall(&arguments).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b" {\"n\": 1} \n").await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["position"], 2);
    assert_eq!(
        *seen.lock().unwrap(),
        json!({"execution_id": "x", "agent_id": "a", "input": {"n": 1}, "timeout_ms": 5, "priority": 9,
            "queue_ttl_ms": 6, "on_loss": "requeue", "max_attempts": 2, "stall_timeout_ms": 7,
            "delivery": "external", "labels": {"k": "v"}})
    );
}

#[tokio::test]
async fn refusals_have_a_status_each_and_go_to_stderr() {
    let stage = Stage::start().await;
    let next = Arc::new(Mutex::new(String::new()));
    let code = Arc::clone(&next);
    stage.serve("cancel", move |_| refused(&code.lock().unwrap())).await;
    for (code, status) in [
        ("not_found", 3),
        ("unknown_agent", 3),
        ("conflict", 1),
        ("not_ready", 69),
        ("queue_full", 75),
        ("forbidden", 77),
    ] {
        *next.lock().unwrap() = code.to_owned();
        let output = output(&mut stage.rollcall(&["cancel", "x"])).await;
        assert_eq!(output.status.code(), Some(status), "{code}");
        assert!(output.stdout.is_empty());
        assert!(text(&output.stderr).contains(&format!("{code}: because")), "{}", text(&output.stderr));
    }
    let output = output(&mut stage.rollcall(&["retry", "x"])).await;
    assert_eq!(output.status.code(), Some(69), "nobody answers");
}

#[tokio::test]
async fn wait_exits_by_the_end() {
    let stage = Stage::start().await;
    stage.serve("submit", |_| json!({"execution_id": "x", "state": "running", "attempt": 1})).await;
    let answers = Arc::new(Mutex::new(Vec::new()));
    let left = Arc::clone(&answers);
    stage.serve("execution", move |_| left.lock().unwrap().pop().unwrap()).await;
    for (state, status) in
        [("completed", 0), ("failed", 1), ("cancelled", 4), ("expired", 5), ("quarantined", 6)]
    {
        *answers.lock().unwrap() = vec![view(state), refused("not_ready"), view("running")];
        let output = output(&mut stage.rollcall(&["submit", "--pool", "p", "--wait", "-o", "json"])).await;
        assert_eq!(output.status.code(), Some(status), "{state}: {}", text(&output.stderr));
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["state"], state);
    }
}

#[tokio::test]
async fn lists_are_tables_for_people_and_lines_for_programs() {
    let stage = Stage::start().await;
    stage
        .serve("agents", |_| {
            json!({"agents": [
                {"agent_id": "a1", "status": "connected", "capacity": 4, "executions": 1, "last_heartbeat_age_ms": 900},
                {"agent_id": "a2", "status": "error", "failure": {"code": "auth"}, "capacity": 2, "flapping": true}]})
        })
        .await;
    let table = text(&output(&mut stage.rollcall(&["agents"])).await.stdout);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(lines[0].starts_with("AGENT") && lines[1].contains("0.9 s"), "{table}");
    assert!(lines[2].contains("error(auth)") && lines[2].contains("flapping"), "{table}");
    assert!(!table.contains('\u{1b}'), "no colours into a pipe");
    let lines = text(&output(&mut stage.rollcall(&["agents", "-o", "jsonl"])).await.stdout);
    let ids: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["agent_id"].clone()).collect();
    assert_eq!(ids, ["a1", "a2"]);
    let all = output(&mut stage.rollcall(&["agents", "-o", "json"])).await.stdout;
    assert_eq!(serde_json::from_slice::<Value>(&all).unwrap().as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn executions_are_read_page_by_page_up_to_the_limit() {
    let stage = Stage::start().await;
    stage
        .serve("executions", |question| {
            assert_eq!(question["state"], "queued");
            let limit = usize::try_from(question["limit"].as_u64().unwrap()).unwrap().min(2);
            let from = question["after"].as_str().map_or(0, |after| after[1..].parse::<usize>().unwrap() + 1);
            let rows: Vec<_> =
                (from..(from + limit).min(5)).map(|i| json!({"execution_id": format!("x{i}")})).collect();
            let next = (from + limit < 5).then(|| format!("x{}", from + limit - 1));
            json!({"executions": rows, "next": next})
        })
        .await;
    for (limit, expected) in [("100", 5), ("3", 3), ("2", 2)] {
        let arguments = ["executions", "--state", "queued", "--limit", limit, "-o", "jsonl"];
        let output = output(&mut stage.rollcall(&arguments)).await;
        assert_eq!(text(&output.stdout).lines().count(), expected, "{}", text(&output.stderr));
    }
}

async fn append(stage: &Stage, agent: &str, seq: u64) -> u64 {
    let id = agent.parse().unwrap();
    let subject = stage.subjects.agent_event(&id);
    let marked = Marked { agent_id: id, instance_id: None, reason: "test".into(), count: Some(4), by: None };
    let event = Event {
        id: uuid_of(seq),
        source: "/rollcall/test/1".into(),
        subject: agent.into(),
        time: Timestamp::from_millis(0),
        body: AgentEvent::Flapping(marked).into(),
    };
    let log = EventLog::new(&stage.bus);
    match log.append(&subject, &event.id.to_string(), event.encode().into(), 0).await.unwrap() {
        Append::Appended { seq } => seq,
        other => panic!("{other:?}"),
    }
}

fn uuid_of(seq: u64) -> uuid::Uuid {
    uuid::Uuid::from_u128(u128::from(seq) + 1)
}

#[tokio::test]
async fn events_come_from_the_log_as_they_are() {
    let stage = Stage::start().await;
    for (i, agent) in ["a", "b", "c"].into_iter().enumerate() {
        append(&stage, agent, i as u64).await;
    }
    let lines =
        text(&output(&mut stage.rollcall(&["events", "-o", "jsonl", "--type", "agent.*"])).await.stdout);
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.iter().map(|e| e["seq"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(events[1]["event"]["subject"], "b");
    let lines = text(&output(&mut stage.rollcall(&["events", "--agent", "c", "--after", "1"])).await.stdout);
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.contains("agent.flapping") && lines.contains("reason=test"), "{lines}");

    // Follow: what is there after 2, and then what comes.
    let mut command = stage.rollcall(&["events", "--follow", "--after", "2", "--limit", "2", "-o", "jsonl"]);
    let following = tokio::spawn(async move { output(&mut command).await });
    append(&stage, "d", 9).await;
    let followed = following.await.unwrap();
    assert_eq!(followed.status.code(), Some(0));
    assert_eq!(text(&followed.stdout).lines().count(), 2);
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_it_quietly() {
    let stage = Stage::start().await;
    stage
        .serve("agents", |_| {
            let agents: Vec<_> =
                (0..2000).map(|i| json!({"agent_id": format!("a{i}"), "padding": "x".repeat(100)})).collect();
            json!({ "agents": agents })
        })
        .await;
    let mut child = stage.rollcall(&["agents", "-o", "jsonl"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
}

#[tokio::test]
async fn an_execution_comes_with_its_history() {
    let stage = Stage::start().await;
    stage.serve("execution", |_| view("running")).await;
    let output = output(&mut stage.rollcall(&["execution", "x", "-o", "json"])).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&answer["execution"]["state"], &answer["history"]), (&json!("running"), &json!([])));
}

#[tokio::test]
async fn every_verb_asks_its_own_question() {
    let stage = Stage::start().await;
    let cases: [(&[&str], &str, Value); 11] = [
        (&["cancel", "x", "--reason", "r"], "cancel", json!({"execution_id": "x", "reason": "r"})),
        (&["retry", "x"], "retry", json!({"execution_id": "x"})),
        (&["explain", "x"], "explain", json!({"execution_id": "x"})),
        (&["agent", "show", "a"], "agent", json!({"agent_id": "a"})),
        (
            &["drain", "a", "--reason", "r", "--deadline-ms", "5"],
            "drain",
            json!({"agent_id": "a", "reason": "r", "deadline_ms": 5}),
        ),
        (
            &["drain", "a", "--deadline-ms", "5", "--in-flight", "abort"],
            "drain",
            json!({"agent_id": "a", "deadline_ms": 5, "in_flight": "abort"}),
        ),
        (&["undrain", "a"], "undrain", json!({"agent_id": "a"})),
        (
            &["goodbye", "a", "--in-flight", "return"],
            "goodbye",
            json!({"agent_id": "a", "in_flight": "return"}),
        ),
        (&["forget", "a"], "forget", json!({"agent_id": "a"})),
        (&["capacity", "--pool", "p"], "capacity", json!({"pool": "p"})),
        (&["watchdog", "run", "--dry-run"], "watchdog.run", json!({"dry_run": true})),
    ];
    for (arguments, verb, question) in cases {
        stage.serve(verb, |question| json!({ "asked": question })).await;
        let output = output(stage.rollcall(arguments).args(["-o", "json"])).await;
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["asked"], question);
    }
}

#[tokio::test]
async fn no_server_is_69_and_a_bad_argument_2() {
    let stage = Stage::start().await;
    let mut server = stage.server;
    server.stop().unwrap();
    let mut command = crate::fleet::rollcall();
    command.args(["agents", "--nats-url", &server.url(), "--answer-within-ms", "200"]);
    let unreachable = output(&mut command).await;
    assert_eq!(unreachable.status.code(), Some(69), "{}", text(&unreachable.stderr));
    let mut command = crate::fleet::rollcall();
    assert_eq!(output(command.args(["submit", "--agent", "a.b"])).await.status.code(), Some(2));
}

#[tokio::test]
async fn an_option_goes_before_the_environment() {
    let stage = Stage::start().await;
    stage.serve("agents", |_| json!({"agents": []})).await;
    let mut command = crate::fleet::rollcall();
    // The environment of a command that `agent run` runs: no setting, and no warning either.
    command.env("ROLLCALL_NATS_URL", "nats://127.0.0.1:1").env("ROLLCALL_ATTEMPT", "1");
    let output = output(command.args(["agents", "--nats-url", &stage.server.url()])).await;
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}
