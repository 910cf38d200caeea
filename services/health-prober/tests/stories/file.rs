//! Agents that never beat: all that is known of them is a file and a probe.

use rollcall_core::agent::Status;
use serde_json::json;
use tempfile::TempDir;

use crate::stage::{Endpoint, Prober, Stage};

/// A stage with an endpoint on loopback, which only an operator may name, and a file to describe it in.
struct Office {
    stage: Stage,
    endpoint: Endpoint,
    folder: TempDir,
}

impl Office {
    async fn open() -> Self {
        Self {
            stage: Stage::open().await,
            endpoint: Endpoint::start().await,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn write(&self, text: &str) {
        std::fs::write(self.folder.path().join("agents.toml"), text).unwrap();
    }

    fn row(&self, id: &str) -> String {
        let url = self.endpoint.url();
        format!(
            "[[agents]]\nagent_id = \"{id}\"\ncapacity = 1\ncontrol = {{ kind = \"http\", url = \"{url}\" }}\n"
        )
    }

    async fn prober(&self) -> Prober {
        let path = self.folder.path().join("agents.toml");
        let settings = [
            ("ROLLCALL_AGENTS_FILE", path.to_str().unwrap()),
            ("ROLLCALL_PROBE_INTERVAL_MS", "1000"),
            ("ROLLCALL_PROBE_TIMEOUT_MS", "500"),
            ("ROLLCALL_ALLOW_CIDRS", ""),
        ];
        self.stage.prober_with(&settings).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_before_stays_over_a_restart_with_a_broken_file() {
    let office = Office::open().await;
    office.write(&office.row("f1"));
    let prober = office.prober().await;
    office.stage.until("f1", "agent.connected").await;
    prober.stop().await;
    office.write("nonsense");
    let prober = office.prober().await;
    office.endpoint.answer("503 Service Unavailable");
    let event = office.stage.until("f1", "agent.error").await;
    assert_eq!(event["data"]["reason"], "status", "it was probed where the operator said");
    office.endpoint.answer("200 OK");
    office.stage.until_status("f1", Status::Connected).await;
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_the_file_that_was_given_up_comes_back_when_it_answers() {
    let office = Office::open().await;
    office.write(&office.row("f1"));
    let prober = office.prober().await;
    office.stage.until("f1", "agent.connected").await;
    let instance = office.stage.agent("f1").await["instance_id"].clone();
    office.endpoint.answer("503 Service Unavailable");
    office.stage.until("f1", "agent.error").await;
    office.stage.api("forget", json!({"agent_id": "f1"})).await;
    office.stage.until_status("f1", Status::Gone).await;
    let asked = office.endpoint.requests();
    office.stage.until_view("f1", |_| office.endpoint.requests() > asked + 1).await;
    assert_eq!(office.stage.agent("f1").await["status"], "gone", "it does not answer yet");
    office.endpoint.answer("200 OK");
    office.stage.until_status("f1", Status::Connected).await;
    assert_ne!(office.stage.agent("f1").await["instance_id"], instance, "only as a new instance");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_the_file_that_can_not_be_probed_gets_no_work() {
    let office = Office::open().await;
    let named = |url: &str| {
        format!(
            "[[agents]]\nagent_id = \"f1\"\ncapacity = 1\nprobe = {{ kind = \"acp\", url = \"{url}\" }}\n"
        )
    };
    office.write(&named("acp://"));
    let prober = office.prober().await;
    let event = office.stage.until("f1", "agent.disconnected").await;
    assert_eq!(event["data"]["reason"], "not_probed");
    office
        .stage
        .until_view("f1", |view| {
            view["probe"]["last_result"].as_str().is_some_and(|r| r.contains("placeholder"))
        })
        .await;
    // Well again with a place to ask.
    office.write(&named(&office.endpoint.url()));
    office.stage.until_status("f1", Status::Connected).await;
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_endpoint_that_nobody_speaks_is_shown_as_that() {
    let office = Office::open().await;
    office.write("");
    let prober = office.prober().await;
    let mut beat = crate::stage::beat("i1", 1);
    beat["control"] = json!({"kind": "ssh", "url": "ssh://10.0.0.7"});
    assert_eq!(office.stage.beat("a1", beat).await["status"], "connected");
    let view = office.stage.agent("a1").await;
    assert_eq!(view["control"], json!({"kind": "ssh", "url": "ssh://10.0.0.7", "driven": false}));
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_wrong_takes_nobody_away_and_holds_nobody_up() {
    let office = Office::open().await;
    let wrong = |id: &str| office.row(id).replace("kind = \"http\"", "kind = \"htttp\"");
    office.write(&(office.row("f1") + &office.row("f2")));
    let prober = office.prober().await;
    for id in ["f1", "f2"] {
        office.stage.until(id, "agent.connected").await;
    }
    office.write(&(wrong("f1") + &office.row("f3")));
    office.stage.until("f3", "agent.connected").await;
    office.stage.until("f2", "agent.gone").await;
    // The same for one that starts with it.
    prober.stop().await;
    let prober = office.prober().await;
    office.write(&(wrong("f1") + &office.row("f3") + &office.row("f4")));
    office.stage.until("f4", "agent.connected").await;
    // Whose row this is nobody can tell: it may be that of f3.
    office.write(&(wrong("f1") + &office.row("f.3") + &office.row("f4") + &office.row("f5")));
    office.stage.until("f5", "agent.connected").await;
    for id in ["f1", "f3"] {
        assert_eq!(office.stage.types(id).await, ["agent.registered", "agent.connected"], "{id}");
    }
    // What is not there any more is: now it is known.
    office.write(&(wrong("f1") + &office.row("f4") + &office.row("f5")));
    office.stage.until("f3", "agent.gone").await;
    office.endpoint.answer("503 Service Unavailable");
    office.stage.until("f1", "agent.error").await;
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_on_stdio_is_taken_and_not_probed() {
    let office = Office::open().await;
    let stdio = "[[agents]]\nagent_id = \"f1\"\ncapacity = 1\nprobe = { kind = \"stdio\" }\n";
    office.write(&(stdio.to_owned() + &office.row("f2")));
    let prober = office.prober().await;
    office.stage.until("f2", "agent.connected").await;
    assert_eq!(office.stage.until("f1", "agent.disconnected").await["data"]["reason"], "not_probed");
    office
        .stage
        .until_view("f1", |view| view["probe"]["last_result"].as_str().is_some_and(|r| r.contains("stdio")))
        .await;
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_whose_row_is_wrong_now_goes_by_the_one_before() {
    let office = Office::open().await;
    office.write(&office.row("f1"));
    let prober = office.prober().await;
    office.stage.until("f1", "agent.connected").await;
    office.write(&(office.row("f1").replace("capacity = 1", "capacity = -1") + &office.row("f2")));
    office.stage.until("f2", "agent.connected").await;
    office.stage.api("forget", json!({"agent_id": "f1"})).await;
    office.stage.until_status("f1", Status::Connected).await;
    prober.stop().await;
}
