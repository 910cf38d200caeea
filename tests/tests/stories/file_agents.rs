//! Agents without NATS: described in a file that the whole fleet is given, driven over HTTP (PROTOCOL.md 2.4).

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use e2e::{
    Fleet, ScriptedAgent,
    fleet::{Options, SOON},
    until,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::crashes::redis;

/// What such an agent is: a list, and a way to end what is on it.
#[derive(Default)]
struct Work {
    running: BTreeSet<String>,
    terminated: Vec<String>,
}

struct HttpAgent {
    url: String,
    work: Arc<Mutex<Work>>,
}

impl HttpAgent {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let work = Arc::new(Mutex::new(Work::default()));
        let served = Arc::clone(&work);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&served)));
            }
        });
        Self { url, work }
    }

    fn work(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().expect("no test panics with it")
    }

    /// An orchestrator starts something on it.
    fn starts(&self, id: &str) {
        self.work().running.insert(id.to_owned());
    }

    fn forgets(&self, id: &str) {
        self.work().running.remove(id);
    }

    fn row(&self, id: &str, capacity: u32) -> String {
        format!(
            "[[agents]]\nagent_id = \"{id}\"\ncapacity = {capacity}\ncontrol = {{ kind = \"http\", url = \"{}\" }}\n",
            self.url
        )
    }
}

async fn serve(mut stream: TcpStream, work: Arc<Mutex<Work>>) {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk).await {
            Ok(read) if read > 0 => request.extend_from_slice(&chunk[..read]),
            _ => return,
        }
    }
    let line = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned();
    let body = {
        let mut work = work.lock().expect("no test panics with it");
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["POST", path, _] => {
                let id =
                    path.trim_start_matches("/api/executions/").trim_end_matches("/terminate").to_owned();
                work.running.remove(&id);
                work.terminated.push(id);
                json!({})
            }
            _ => {
                let list: Vec<Value> = work.running.iter().map(|id| json!({"execution_id": id})).collect();
                json!({"executions": list})
            }
        }
    }
    .to_string();
    let answer =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    let _ = stream.write_all(answer.as_bytes()).await;
}

/// The file, and a fleet that has it.
struct Office {
    fleet: Fleet,
    path: PathBuf,
    _folder: TempDir,
}

impl Office {
    async fn open(text: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("agents.toml");
        std::fs::write(&path, text).expect("a file");
        let options = Options::default()
            .env("ROLLCALL_AGENTS_FILE", path.display())
            .env("ROLLCALL_PROBE_INTERVAL_MS", 1000)
            .env("ROLLCALL_PROBE_TIMEOUT_MS", 500);
        Self { fleet: Fleet::start_with(options).await, path, _folder: folder }
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.path, text).expect("a file");
    }

    /// Work that an orchestrator starts by itself, granted to `agent`.
    async fn granted(&self, to: Value, agent: &str) -> String {
        let mut request = json!({"delivery": "external"});
        request.as_object_mut().expect("an object").extend(to.as_object().expect("an object").clone());
        let reply = self.fleet.submit(request).await;
        assert_eq!((&reply["state"], &reply["agent_id"]), (&json!("running"), &json!(agent)), "{reply}");
        reply["execution_id"].as_str().expect("an execution id").to_owned()
    }

    async fn row(&self, id: &str, row: &str) {
        until(&format!("{id} to be in row {row}"), SOON, || async {
            let told = self.fleet.api("explain", json!({"execution_id": id})).await;
            let told = told.map_err(|e| format!("{e:?}"))?;
            if told["row"] == row { Ok(()) } else { Err(told.to_string()) }
        })
        .await;
    }

    async fn recovered(&self, id: &str) -> (String, String) {
        let event = self.fleet.event(id, "execution.recovered", SOON).await;
        let said = |field: &str| event["data"][field].as_str().unwrap_or_default().to_owned();
        (said("reason"), said("terminate"))
    }
}

fn outcome(reason: &str, terminate: &str) -> (String, String) {
    (reason.to_owned(), terminate.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_the_file_is_granted_work_watched_and_removed() {
    let agent = HttpAgent::start().await;
    let office = Office::open(&agent.row("legacy-1", 2)).await;
    let fleet = &office.fleet;
    fleet.status("legacy-1", "connected", SOON).await;

    // Nothing can be dispatched to it: named, that is refused; of its pool it is left out.
    let refused = fleet.api("submit", json!({"agent_id": "legacy-1"})).await.expect_err("it has no NATS");
    assert_eq!(refused.code, "conflict");
    assert!(refused.message.contains("external"), "{}", refused.message);
    let push = fleet.submit(json!({"pool": "default"})).await;
    assert_eq!(push["state"], "queued", "{push}");

    // It takes what its orchestrator starts, whatever waits for others; its registry vouches for it.
    let kept = office.granted(json!({"pool": "default"}), "legacy-1").await;
    let dropped = office.granted(json!({"agent_id": "legacy-1"}), "legacy-1").await;
    agent.starts(&kept);
    agent.starts(&dropped);
    office.row(&kept, "healthy").await;
    office.row(&dropped, "healthy").await;
    agent.forgets(&dropped);
    assert_eq!(office.recovered(&dropped).await, outcome("orphaned", "not_running"));

    let late = office.granted(json!({"agent_id": "legacy-1", "timeout_ms": 3000}), "legacy-1").await;
    agent.starts(&late);
    assert_eq!(office.recovered(&late).await, outcome("timed_out", "confirmed"));
    assert_eq!(agent.work().terminated, [late]);

    // One that went back to its queue, when its agent drained say, is offered again although nobody beats.
    redis(
        &fleet.redis,
        "EVAL \"redis.call('ZREM', 'rollcall:{default}:free_external', 'legacy-1') \
         return redis.call('HSET', 'rollcall:{default}:agent:legacy-1', 'held_back', '1')\" 0",
    )
    .await;
    let waits = fleet.submit(json!({"agent_id": "legacy-1", "delivery": "external"})).await;
    let waits = waits["execution_id"].as_str().expect("an execution id");
    fleet.state(waits, "running", SOON).await;
    let done = json!({"execution_id": waits, "attempt": 1, "outcome": "completed", "result": 1});
    fleet.api("release", done).await.expect("it is released");
    fleet.state(waits, "completed", SOON).await;

    // Its row goes: what it works on is left alone as long as it is on its list.
    office.write("");
    let gone = fleet.status("legacy-1", "gone", SOON).await;
    assert_eq!(gone["reason"], "removed from the agents file");
    office.row(&kept, "gone_vouched").await;
    agent.forgets(&kept);
    assert_eq!(office.recovered(&kept).await, outcome("agent_gone", "not_running"));
    assert_eq!(agent.work().terminated.len(), 1, "nothing of what ended by itself was ended again");

    // The row comes back, as another instance; the push still waits for somebody with NATS.
    office.write(&agent.row("legacy-1", 1));
    fleet.status("legacy-1", "connected", SOON).await;
    let again = office.granted(json!({"pool": "default"}), "legacy-1").await;
    let done = json!({"execution_id": again, "attempt": 1, "outcome": "completed", "result": 1});
    fleet.api("release", done).await.expect("it is released");
    let push = push["execution_id"].as_str().expect("an execution id");
    assert_eq!(fleet.execution(push).await.expect("it is there")["state"], "queued");
    let beating = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    beating.given(push).await;
    fleet.state(push, "running", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_an_agent_that_has_no_nats_any_more_fails_and_says_why() {
    let office = Office::open("").await;
    let fleet = &office.fleet;
    let beating = ScriptedAgent::start(&fleet.bus, "moved", 1).await;
    fleet.status("moved", "connected", SOON).await;
    let runs = fleet.submit(json!({"agent_id": "moved"})).await;
    assert_eq!(runs["state"], "running", "{runs}");
    let waits = fleet.submit(json!({"agent_id": "moved"})).await;
    assert_eq!(waits["state"], "queued", "{waits}");
    beating.vanish().await;
    fleet.api("forget", json!({"agent_id": "moved"})).await.expect("it is forgotten");
    let agent = HttpAgent::start().await;
    office.write(&agent.row("moved", 1));
    fleet.status("moved", "connected", SOON).await;
    let failed = fleet.state(waits["execution_id"].as_str().expect("an execution id"), "failed", SOON).await;
    assert_eq!(failed["failure"]["code"], "unsupported", "{failed}");
    fleet.audit().await;
}
