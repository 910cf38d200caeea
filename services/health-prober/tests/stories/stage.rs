//! A private NATS, probers on it, and agents made of single messages.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use rollcall_core::agent::Status;
use rollcall_core::subject::{AgentVerb, Subjects};
use rollcall_core::time::{Clock, SystemClock};
use rollcall_core::wire::Goodbye;
use rollcall_nats::testing::NatsServer;
use rollcall_nats::{Bus, EventLog};
use rollcall_service::{Context, Settings};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long anything may take that is not itself about time. A busy machine that holds the prober up has it begin every clock
/// again.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// How long a request may take before the link itself is in doubt.
const LINK: Duration = Duration::from_secs(1);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A heartbeat of one-second agents.
pub(crate) fn beat(instance: &str, seq: u64) -> Value {
    json!({ "instance_id": instance, "seq": seq, "state": "ready", "capacity": 2, "executions": [], "interval_ms": 1000 })
}

pub(crate) struct Stage {
    pub(crate) server: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) log: EventLog,
    pub(crate) subjects: Subjects,
}

/// A running prober.
pub(crate) struct Prober {
    shutdown: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Prober {
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// Somebody who answers requests to an instance.
pub(crate) struct Answering {
    asked: mpsc::UnboundedReceiver<Vec<u8>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    bus: Bus,
}

impl Answering {
    /// Waits until somebody has asked.
    pub(crate) async fn asked(&mut self) {
        tokio::time::timeout(DEADLINE, self.asked.recv()).await.expect("nobody asked").unwrap();
    }
}

/// Goodbyes that an instance hears.
pub(crate) struct Goodbyes(Answering);

impl Goodbyes {
    pub(crate) async fn next(&mut self) -> Goodbye {
        let bytes =
            tokio::time::timeout(DEADLINE, self.0.asked.recv()).await.expect("no goodbye in time").unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }
}

impl Stage {
    pub(crate) async fn open() -> Self {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        rollcall_nats::ensure_streams(&bus).await.unwrap();
        let log = EventLog::new(&bus);
        Self { server, log, bus, subjects: Subjects::default() }
    }

    pub(crate) async fn prober(&self) -> Prober {
        self.prober_with(&[]).await
    }

    /// Starts a prober with these settings and waits until it is ready.
    pub(crate) async fn prober_with(&self, settings: &[(&str, &str)]) -> Prober {
        self.prober_on(SystemClock::new(), settings).await
    }

    /// The same, with this clock.
    pub(crate) async fn prober_on(
        &self,
        clock: impl Into<Arc<SystemClock>>,
        settings: &[(&str, &str)],
    ) -> Prober {
        let url = self.server.url();
        let mut environment =
            vec![("ROLLCALL_NATS_URL", url.as_str()), ("ROLLCALL_HEARTBEAT_INTERVAL_MS", "1000")];
        environment.extend(settings);
        let environment = environment.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let settings = Settings::load_from("health-prober", environment).unwrap().settings;
        let mut context = Context::for_tests(health_prober::PROGRAM, settings);
        context.clock = clock.into();
        let (shutdown, readiness) = (context.shutdown.clone(), context.readiness.clone());
        let task = tokio::spawn(health_prober::run(context));
        tokio::time::timeout(DEADLINE, readiness.ready()).await.expect("the prober is not ready");
        Prober { shutdown, task }
    }

    /// Sends a heartbeat as a request.
    pub(crate) async fn beat(&self, agent: &str, beat: Value) -> Value {
        self.beat_raw(agent, beat.to_string().into_bytes()).await
    }

    pub(crate) async fn beat_raw(&self, agent: &str, body: Vec<u8>) -> Value {
        let subject = self.subjects.heartbeat(&agent.parse().unwrap());
        let answer = self.bus.request(subject, body.into(), DEADLINE).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }

    /// Beats until the answer is as wanted.
    pub(crate) async fn beat_until(
        &self,
        agent: &str,
        instance: &str,
        first_seq: u64,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let end = Instant::now() + DEADLINE;
        let subject = self.subjects.heartbeat(&agent.parse().unwrap());
        for seq in first_seq.. {
            let body = beat(instance, seq).to_string().into_bytes();
            if let Ok(answer) = self.bus.request(subject.clone(), body.into(), Duration::from_secs(1)).await {
                let answer = serde_json::from_slice(&answer.payload).unwrap();
                if wanted(&answer) {
                    return answer;
                }
            }
            assert!(Instant::now() < end, "no answer as wanted");
            tokio::time::sleep(LOOK).await;
        }
        unreachable!("sequence numbers don't run out")
    }

    pub(crate) async fn publish_beat(&self, agent: &str, beat: Value) {
        let subject = self.subjects.heartbeat(&agent.parse().unwrap());
        self.bus.publish(subject, beat.to_string().into_bytes().into()).await.unwrap();
    }

    /// Publishes a heartbeat with a reply subject of the sender's choice, by speaking the protocol itself.
    /// What so many probers answer to one heartbeat.
    pub(crate) async fn all_replies(&self, agent: &str, seq: u64, probers: usize) -> Vec<Value> {
        let inbox = format!("_INBOX.all.{seq}");
        let mut answers = self.bus.subscribe(inbox.clone()).await.unwrap();
        self.bus.flush().await.unwrap();
        self.publish_with_reply(agent, beat("i1", seq), &inbox).await;
        let mut replies = Vec::new();
        while replies.len() < probers {
            let answer = tokio::time::timeout(DEADLINE, answers.next()).await.expect("each answers").unwrap();
            replies.push(serde_json::from_slice(&answer.payload).unwrap());
        }
        replies
    }

    pub(crate) async fn publish_with_reply(&self, agent: &str, beat: Value, reply: &str) {
        let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", self.server.port())).await.unwrap();
        let body = beat.to_string();
        let lines = format!(
            "CONNECT {{\"verbose\":false}}\r\nPUB rollcall.heartbeat.{agent} {reply} {}\r\n{body}\r\nPING\r\n",
            body.len()
        );
        socket.write_all(lines.as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("PONG") {
            let mut chunk = [0; 4096];
            let read = socket.read(&mut chunk).await.unwrap();
            assert!(read > 0, "closed");
            seen.extend_from_slice(&chunk[..read]);
        }
    }

    /// Waits until the agent is seen as wanted.
    pub(crate) async fn until_view(&self, agent: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + DEADLINE;
        loop {
            let view = self.agent(agent).await;
            if wanted(&view) {
                return view;
            }
            assert!(Instant::now() < end, "{agent} is not as wanted: {view}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until the list of agents is as wanted, on a link that may be on its way back.
    pub(crate) async fn until_agents(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + DEADLINE;
        loop {
            let answer = self.bus.request(self.subjects.api("agents"), "{}".into(), LINK).await;
            let answer = answer.map(|answer| serde_json::from_slice::<Value>(&answer.payload).unwrap());
            if let Ok(answer) = &answer
                && wanted(answer)
            {
                return answer.clone();
            }
            assert!(Instant::now() < end, "the agents are not as wanted: {answer:?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Writes into the log that the agent lost an execution.
    pub(crate) async fn lose(&self, agent: &str, number: u32, reason: &str) {
        self.lose_of(agent, "i1", number, reason).await;
    }

    /// The same, of an instance by name.
    pub(crate) async fn lose_of(&self, agent: &str, instance: &str, number: u32, reason: &str) {
        let (execution, id) = (format!("e{number}"), uuid::Uuid::now_v7().to_string());
        let event = json!({
            "specversion": "1.0", "id": id, "source": "/rollcall/watchdog/test", "subject": execution,
            "type": "rollcall.execution.recovered", "time": rollcall_core::time::SystemClock::new().now(),
            "datacontenttype": "application/json",
            "data": {
                "execution_id": execution, "attempt": 1, "agent_id": agent, "instance_id": instance,
                "reason": reason, "action": "failed", "next_attempt": null, "terminate": "not_attempted",
                "detected_after_ms": 1, "evidence": {}, "message": "m",
            },
        });
        let subject = self.subjects.execution_event(&execution.parse().unwrap());
        let appended =
            self.log.append(&subject, &id, event.to_string().into_bytes().into(), 0).await.unwrap();
        assert!(matches!(appended, rollcall_nats::Append::Appended { .. }));
    }

    /// Beats four times a second until dropped.
    pub(crate) fn keep_beating(&self, agent: &str, instance: &str) -> DropGuard {
        self.keep_beating_with(agent, instance, json!({}))
    }

    /// As [`Stage::keep_beating`], with more fields.
    pub(crate) fn keep_beating_with(&self, agent: &str, instance: &str, more: Value) -> DropGuard {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (bus, subject, instance) =
            (self.bus.clone(), self.subjects.heartbeat(&agent.parse().unwrap()), instance.to_owned());
        tokio::spawn(async move {
            for seq in 1.. {
                let mut body = beat(&instance, seq);
                for (name, value) in more.as_object().unwrap() {
                    body[name] = value.clone();
                }
                let body = body.to_string().into_bytes();
                let _ = bus.publish(subject.clone(), body.into()).await;
                tokio::select! {
                    () = stopped.cancelled() => return,
                    () = tokio::time::sleep(Duration::from_millis(250)) => {}
                }
            }
        });
        stop.drop_guard()
    }

    /// Hears and confirms goodbyes to an instance.
    pub(crate) async fn goodbyes(&self, agent: &str, instance: &str) -> Goodbyes {
        Goodbyes(self.answering(agent, instance, AgentVerb::Goodbye, json!({ "ok": true })).await)
    }

    pub(crate) async fn answer_pings(&self, agent: &str, instance: &str) -> Answering {
        let answer = json!({ "instance_id": instance, "state": "ready" });
        self.answering(agent, instance, AgentVerb::Ping, answer).await
    }

    async fn answering(&self, agent: &str, instance: &str, verb: AgentVerb, answer: Value) -> Answering {
        let subject = self.subjects.agent_request(&agent.parse().unwrap(), &instance.parse().unwrap(), verb);
        let mut requests = self.bus.subscribe(subject).await.unwrap();
        self.bus.flush().await.unwrap();
        let (sender, asked) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let (bus, stopped) = (self.bus.clone(), stop.clone());
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stopped.cancelled() => return,
                    Some(request) = requests.next() => {
                        let _ = sender.send(request.payload.to_vec());
                        bus.reply(&request, answer.to_string().into_bytes().into()).await;
                    }
                }
            }
        });
        Answering { asked, stop, task, bus: self.bus.clone() }
    }

    pub(crate) async fn api(&self, verb: &str, body: Value) -> Value {
        let subject = self.subjects.api(verb);
        let answer = self.bus.request(subject, body.to_string().into_bytes().into(), DEADLINE).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }

    pub(crate) async fn agent(&self, agent: &str) -> Value {
        self.api("agent", json!({ "agent_id": agent })).await
    }

    /// Everything in the log about an agent.
    pub(crate) async fn events(&self, agent: &str) -> Vec<Value> {
        let subject = self.subjects.agent_event(&agent.parse().unwrap());
        let entries = self.log.history(&subject).await.unwrap();
        entries.iter().map(|entry| serde_json::from_slice(&entry.bytes).unwrap()).collect()
    }

    /// Short types of everything in the log about an agent.
    pub(crate) async fn types(&self, agent: &str) -> Vec<String> {
        let kind = |event: &Value| event["type"].as_str().unwrap().trim_start_matches("rollcall.").to_owned();
        self.events(agent).await.iter().map(kind).collect()
    }

    /// Waits for an event of this type and returns the last one.
    pub(crate) async fn until(&self, agent: &str, short_type: &str) -> Value {
        let end = Instant::now() + DEADLINE;
        let wanted = format!("rollcall.{short_type}");
        loop {
            let events = self.events(agent).await;
            if let Some(event) = events.iter().rev().find(|event| event["type"] == wanted) {
                return event.clone();
            }
            assert!(Instant::now() < end, "no {short_type} of {agent}, only {:?}", self.types(agent).await);
            tokio::time::sleep(LOOK).await;
        }
    }

    pub(crate) async fn until_status(&self, agent: &str, status: Status) {
        let end = Instant::now() + DEADLINE;
        loop {
            let last = self.types(agent).await.pop();
            if last.as_deref() == Some(&format!("agent.{}", status.as_str())) {
                return;
            }
            assert!(Instant::now() < end, "{agent} is not {}, its last is {last:?}", status.as_str());
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Answering {
    /// Ends as a killed process does: nobody listens any more.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
        self.bus.flush().await.unwrap();
    }
}

/// An HTTP endpoint that answers as it is told.
pub(crate) struct Endpoint {
    port: u16,
    status: Arc<Mutex<String>>,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

impl Endpoint {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Self {
            port: listener.local_addr().unwrap().port(),
            status: Arc::new(Mutex::new("200 OK".to_owned())),
            connections: Arc::default(),
            requests: Arc::default(),
        };
        let (status, connections) = (Arc::clone(&endpoint.status), Arc::clone(&endpoint.connections));
        let requests = Arc::clone(&endpoint.requests);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (status, requests) = (Arc::clone(&status), Arc::clone(&requests));
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    // A request of a probe fits one segment.
                    while stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                        requests.fetch_add(1, Ordering::SeqCst);
                        let answer =
                            format!("HTTP/1.1 {}\r\nContent-Length: 2\r\n\r\n{{}}", status.lock().unwrap());
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        endpoint
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn answer(&self, status: &str) {
        status.clone_into(&mut self.status.lock().unwrap());
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}
