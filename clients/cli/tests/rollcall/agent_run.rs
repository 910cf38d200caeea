//! `rollcall agent run`

use std::{path::Path, sync::Arc};

use nix::sys::signal::Signal;
use rollcall_core::subject::AgentVerb;
use serde_json::{Value, json};

use crate::fleet::{AgentProcess, Stage, is_alive, output, pids, rollcall, text, until, within};

async fn agent(script: &str) -> AgentProcess {
    AgentProcess::start(&Arc::new(Stage::start().await), &["--grace-ms", "200"], script).await
}

/// A shell that starts a deaf shell that starts a deaf sleeper: three processes, whose ids it writes to `file`.
fn deaf_tree(file: &Path) -> String {
    let file = file.display();
    format!(
        "trap '' TERM; sh -c 'trap \"\" TERM; sleep 1000 & echo $! >>{file}; echo $$ >>{file}; wait' & \
         echo $$ >>{file}; wait"
    )
}

#[tokio::test]
async fn input_comes_in_on_stdin_and_the_result_out_on_stdout() {
    let agent = agent(
        r#"read -r input
           case $input in
             '"json"') printf '{"agent": "%s", "execution": "%s", "attempt": %s, "checkpoint": %s, "deadline": "%s"}\n' \
                "$ROLLCALL_AGENT_ID" "$ROLLCALL_EXECUTION_ID" "$ROLLCALL_ATTEMPT" "$ROLLCALL_CHECKPOINT" "$ROLLCALL_DEADLINE" ;;
             '"text"') echo hello; echo world ;;
             '"nothing"') ;;
             '"fail"') echo half a result; echo why >&2; exit 3 ;;
             '"signal"') kill -9 $$ ;;
             '"large"') head -c 600000 /dev/zero | tr '\0' x ;;
             '"binary"') printf '\377' ;;
             '"secrets"') env | grep -c '^ROLLCALL_\(NATS\|REDIS\)' ;;
           esac"#,
    )
    .await;
    let result = agent.run("json", json!("json")).await;
    assert_eq!(result["outcome"], "completed");
    assert_eq!(
        result["result"],
        json!({"agent": "a1", "execution": "json", "attempt": 1, "checkpoint": {"step": 3}, "deadline": "2026-11-22T03:04:05.678Z"})
    );
    assert_eq!(agent.run("text", json!("text")).await["result"], "hello\nworld");
    assert_eq!(agent.run("nothing", json!("nothing")).await["result"], Value::Null);
    let failed = agent.run("fail", json!("fail")).await;
    assert_eq!((&failed["outcome"], &failed["result"]), (&json!("failed"), &Value::Null));
    assert_eq!(
        failed["error"],
        json!({"code": "exit_3", "message": "the command exited with status 3: why"})
    );
    let killed = agent.run("signal", json!("signal")).await;
    assert_eq!(killed["error"], json!({"code": "signal_9", "message": "the command was killed by SIGKILL"}));
    let large = agent.run("large", json!("large")).await;
    assert_eq!((&large["outcome"], &large["error"]["code"]), (&json!("failed"), &json!("too_large")));
    assert!(large["error"]["message"].as_str().unwrap().contains("600000"));
    assert_eq!(agent.run("binary", json!("binary")).await["error"]["code"], "not_text");
    assert_eq!(agent.run("secrets", json!("secrets")).await["error"]["code"], "exit_1", "grep finds none");
}

#[tokio::test]
async fn a_command_need_not_read_its_input() {
    let agent = agent("exec <&-; echo done").await;
    // More than a pipe holds.
    assert_eq!(agent.run("x", json!("x".repeat(300_000))).await["result"], "done");
}

#[tokio::test]
async fn a_command_that_can_not_be_run_is_a_failure() {
    let stage = Arc::new(Stage::start().await);
    let mut process = AgentProcess::start(&stage, &[], "exec /does/not/exist").await;
    let report = process.run("x", json!(null)).await;
    assert_eq!(report["error"]["code"], "exit_127", "{report}");
    process.signal(Signal::SIGTERM);
    assert_eq!(process.exit_status().await, Some(0));
}

#[tokio::test]
async fn terminated_means_that_the_whole_process_tree_is_dead() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let agent = agent(&deaf_tree(&file)).await;
    agent.dispatch("x", json!(null)).await;
    let tree = pids(&file, 3).await;
    assert!(tree.iter().all(|pid| is_alive(*pid)), "{tree:?}");
    assert_eq!(agent.terminate("x", 100).await, "terminated");
    // No waiting here: dead means dead, and reaped, when it was said.
    assert!(tree.iter().all(|pid| !is_alive(*pid)), "{tree:?}");
    assert_eq!(agent.report("x").await["outcome"], "terminated");
}

#[tokio::test]
async fn the_grace_is_for_the_whole_group() {
    let folder = tempfile::tempdir().unwrap();
    let (ready, cleaned) = (folder.path().join("ready"), folder.path().join("cleaned"));
    // The shell in front dies at once on SIGTERM; the one behind it takes its time to clean up.
    let script = format!(
        "sh -c 'trap \"sleep 0.3; echo yes >{}; exit\" TERM; echo 1 >{}; while :; do sleep 0.05; done' & wait",
        cleaned.display(),
        ready.display()
    );
    let agent = agent(&script).await;
    agent.dispatch("x", json!(null)).await;
    pids(&ready, 1).await;
    assert_eq!(agent.terminate("x", 20_000).await, "terminated");
    assert_eq!(std::fs::read_to_string(cleaned).unwrap(), "yes\n");
}

#[tokio::test]
async fn what_a_command_leaves_behind_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let agent = agent(&format!("sleep 1000 & echo $! >{}; echo result", file.display())).await;
    assert_eq!(agent.run("x", json!(null)).await["result"], "result");
    assert!(!is_alive(pids(&file, 1).await[0]));
}

#[tokio::test]
async fn a_process_that_left_the_group_does_not_keep_the_execution_open() {
    let agent = agent("setsid sleep 5 & echo result").await;
    assert_eq!(agent.run("x", json!(null)).await["result"], "result");
}

#[tokio::test]
async fn kill_9_of_the_agent_takes_its_commands_along() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let mut agent = agent(&deaf_tree(&file)).await;
    agent.dispatch("x", json!(null)).await;
    let tree = pids(&file, 3).await;
    agent.signal(Signal::SIGKILL);
    assert_eq!(agent.exit_status().await, None);
    // Whoever reaps orphans here may be slow: a zombie is dead enough.
    until("the death of the tree", || tree.iter().all(|pid| !runs(*pid))).await;
}

fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).is_some_and(|state| state != 'Z')
}

#[tokio::test]
async fn progress_is_counted_in_lines() {
    let mut agent = agent("echo 1; echo 2 >&2; echo 3; sleep 1000").await;
    agent.dispatch("x", json!(null)).await;
    agent.beat(|beat| beat["executions"][0]["progress"] == 3.0).await;
    assert_eq!(agent.terminate("x", 5_000).await, "terminated");
}

#[tokio::test]
async fn sigterm_under_load_finishes_or_returns_everything() {
    let stage = Arc::new(Stage::start().await);
    let options = ["--grace-ms", "200", "--drain-ms", "4000"];
    let script =
        r#"read -r n; case $n in 1) sleep 0.2; echo '"quick"';; *) echo '{"step": 7}'; sleep 1000;; esac"#;
    let mut agent = AgentProcess::start(&stage, &options, script).await;
    for i in 0..4 {
        agent.dispatch(&format!("x{i}"), json!(i % 2)).await;
    }
    agent
        .beat(|beat| {
            let progress: f64 =
                beat["executions"].as_array().unwrap().iter().filter_map(|c| c["progress"].as_f64()).sum();
            progress >= 2.0
        })
        .await;
    agent.signal(Signal::SIGTERM);
    agent.beat(|beat| beat["state"] == "draining" && beat["reason"] == "sigterm").await;
    for i in 0..4 {
        let report = agent.report(&format!("x{i}")).await;
        match i % 2 {
            1 => assert_eq!((&report["outcome"], &report["result"]), (&json!("completed"), &json!("quick"))),
            _ => assert_eq!(
                (&report["outcome"], &report["checkpoint"]),
                (&json!("returned"), &json!({"step": 7}))
            ),
        }
    }
    let gone = agent.beat(|beat| beat["state"] == "gone").await;
    assert_eq!(gone["executions"], json!([]));
    assert_eq!(agent.exit_status().await, Some(0));
}

#[tokio::test]
async fn a_second_signal_hands_back_now_and_a_third_exits_at_once_and_kills() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let stage = Arc::new(Stage::start().await);
    let options = ["--grace-ms", "3600000", "--drain-ms", "3600000"];
    let mut agent = AgentProcess::start(&stage, &options, &deaf_tree(&file)).await;
    agent.dispatch("x", json!(null)).await;
    let tree = pids(&file, 3).await;
    agent.signal(Signal::SIGTERM);
    agent.beat(|beat| beat["state"] == "draining").await;
    agent.signal(Signal::SIGINT);
    agent.signal(Signal::SIGTERM);
    // Two pending signals of one kind are one: the third has to be another, or come later.
    let status = loop {
        tokio::select! {
            status = agent.child.wait() => break status.unwrap().code(),
            () = tokio::time::sleep(std::time::Duration::from_millis(50)) => agent.signal(Signal::SIGTERM),
        }
    };
    // 128 and the number of whichever of the two was looked at last.
    assert!(matches!(status, Some(130 | 143)), "{status:?}");
    until("the death of the tree", || tree.iter().all(|pid| !runs(*pid))).await;
}

#[tokio::test]
async fn goodbyes_decide_the_exit_status() {
    for (reason, status) in [("restart", 75), ("superseded", 0), ("operator", 0), ("activity_timeout", 75)] {
        let mut agent = agent("sleep 1000").await;
        agent.dispatch("x", json!(null)).await;
        let goodbye = json!({"reason": reason, "deadline_ms": 0, "in_flight": "return"});
        assert_eq!(agent.ask(AgentVerb::Goodbye, goodbye).await, json!({"ok": true}));
        assert_eq!(agent.report("x").await["outcome"], "returned");
        assert_eq!(agent.exit_status().await, Some(status), "{reason}");
    }
}

#[tokio::test]
async fn bad_settings_and_arguments_are_named() {
    let run = |options: &'static [&'static str], name: &'static str, value: &'static str| async move {
        let mut command = rollcall();
        command.args(["agent", "run"]).args(options).args(["--", "true"]).env(name, value);
        let output = output(&mut command).await;
        (output.status.code(), text(&output.stderr))
    };
    let (status, error) = run(&["--id", "a.b"], "X", "").await;
    assert!(status == Some(2) && error.contains("agent_id"), "{error}");
    let (status, error) = run(&["--id", "a", "--interval-ms", "5"], "X", "").await;
    assert!(status == Some(2) && error.contains("interval_ms is 5"), "{error}");
    let (status, error) = run(&["--id", "a"], "ROLLCALL_FAILURE_THRESHOLD", "many").await;
    assert!(status == Some(64) && error.contains("ROLLCALL_FAILURE_THRESHOLD"), "{error}");
    let (status, error) = run(&["--id", "a"], "ROLLCALL_NATS_URL", "http://x").await;
    assert!(status == Some(64) && error.contains("http://x"), "{error}");
}

#[tokio::test]
async fn the_instance_is_in_the_log_at_the_start_and_in_everything_that_is_said() {
    let stage = Arc::new(Stage::start().await);
    let mut agent = AgentProcess::start_logging(&stage, "echo 1").await;
    let logged = within("the line about its start", async {
        loop {
            let line = agent.log_line().await;
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "agent starts" {
                return line["instance"].as_str().unwrap().to_owned();
            }
        }
    })
    .await;
    let beat = agent.beat(|_| true).await;
    let ping = agent.ask(AgentVerb::Ping, json!({})).await;
    let list = agent.ask(AgentVerb::Executions, json!({})).await;
    let report = agent.run("x", json!(null)).await;
    for said in [&beat, &ping, &list, &report] {
        assert_eq!(said["instance_id"], logged.as_str(), "{said}");
    }
    assert_eq!(logged.parse::<uuid::Uuid>().unwrap().get_version_num(), 7);
}

#[tokio::test]
async fn a_signal_while_waiting_for_nats_ends_it() {
    let stage = Stage::start().await;
    let mut server = stage.server;
    server.stop().unwrap();
    let mut command = rollcall();
    command.args(["agent", "run", "--id", "a1", "--", "true"]).env("ROLLCALL_NATS_URL", server.url());
    let mut child = command.spawn().unwrap();
    let mut log = tokio::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    tokio::io::AsyncBufReadExt::read_line(&mut log, &mut line).await.unwrap();
    assert!(line.contains("waiting for nats"), "{line}");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(crate::fleet::within("the exit", child.wait()).await.unwrap().code(), Some(0));
}
