//! An agent with a user of its own, on a server with the accounts that are deployed (`deploy/nats.conf`).

use std::path::Path;

use nix::sys::signal::Signal;
use rollcall_core::subject::AgentVerb;
use rollcall_nats::{Bus, BusOptions, testing::NatsServer};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::fleet::{AgentProcess, Stage, output, rollcall, text};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// Password by the lines of an env file.
fn password(file: &Path) -> String {
    let lines = std::fs::read_to_string(file).unwrap();
    let line = lines.lines().find_map(|line| line.strip_prefix("ROLLCALL_NATS_PASSWORD="));
    line.unwrap().to_owned()
}

/// `deploy/nats.conf` with what it includes in its place: the server looks for that only beside the file.
fn configuration(folder: &Path) -> String {
    let whole = std::fs::read_to_string(repository().join("deploy/nats.conf")).unwrap();
    let line = |line: &str| match line.trim().strip_prefix("include ./credentials/") {
        Some(name) => std::fs::read_to_string(folder.join(name)).unwrap(),
        None => format!("{line}\n"),
    };
    whole.lines().map(line).collect()
}

#[tokio::test]
async fn an_agent_does_all_it_has_to_with_the_rights_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("credentials");
    let script = repository().join("scripts/credentials");
    let made = output(Command::new(script).arg("--dir").arg(&dir).stderr(std::process::Stdio::piped())).await;
    assert!(made.status.success(), "{}", text(&made.stderr));
    let mut command = rollcall();
    command.args(["agent", "credentials", "a1", "-o", "json", "--dir"]).arg(&dir);
    let issued: Value = serde_json::from_slice(&output(&mut command).await.stdout).unwrap();
    let mut script = Command::new(repository().join("scripts/credentials"));
    let again = output(script.arg("--dir").arg(&dir).args(["agent", "a1", "a2"])).await;
    assert!(again.status.success(), "the script reads what we wrote: {}", text(&again.stderr));
    assert_eq!(password(&dir.join("agents/a1.env")), issued["password"], "and leaves it alone");

    let server = NatsServer::start_with(Some(&configuration(&dir.join("nats")))).unwrap();
    let options = BusOptions {
        url: server.url(),
        user: Some("operator".to_owned()),
        password: Some(password(&dir.join("operator.env"))),
        prefix: "rollcall".to_owned(),
        connection_name: "test".to_owned(),
        ..BusOptions::default()
    };
    let bus = Bus::connect(options, CancellationToken::new()).await.unwrap();
    let stage = Stage::on(server, bus).await;

    let user =
        [("ROLLCALL_NATS_USER", "a1"), ("ROLLCALL_NATS_PASSWORD", issued["password"].as_str().unwrap())];
    let script = "read -r x; env | grep -c PASSWORD; exit 0";
    let mut agent = AgentProcess::start_as(&stage.into(), &user, &[], script).await;
    assert_eq!(agent.run("x", json!(1)).await["result"], 0, "it ran, and knows no password");
    agent.dispatch("y", json!(null)).await;
    assert_eq!(agent.ask(AgentVerb::Ping, json!({})).await["instance_id"], agent.instance.as_str());
    agent.report("y").await;
    agent.signal(Signal::SIGTERM);
    agent.beat(|beat| beat["state"] == "gone").await;
    assert_eq!(agent.exit_status().await, Some(0));
}
