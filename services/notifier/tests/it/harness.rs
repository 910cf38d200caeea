//! A private server, a log to append to, a notifier, and clients that wait on conditions.

use std::{collections::HashMap, ffi::OsString, net::SocketAddr, time::Duration};

use bytes::Bytes;
use notifier::shared::Limits;
use rollcall_core::event::{Event, EventBody};
use rollcall_nats::{Append, Bus, EventLog, ensure_streams, testing::NatsServer};
use rollcall_service::{Context, Settings};
use tokio::task::JoinHandle;

use crate::samples::FLEET;

/// Nothing here takes this long unless it is broken.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Fails the test with `what` when it takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {DEADLINE:?}: {what}"),
    }
}

/// A log that only this test writes to.
pub(crate) struct Log {
    pub(crate) server: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) log: EventLog,
    last: HashMap<String, u64>,
    /// Everything appended, valid or not.
    pub(crate) entries: Vec<(u64, Bytes)>,
}

impl Log {
    pub(crate) async fn start() -> Self {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        ensure_streams(&bus).await.unwrap();
        let log = EventLog::new(&bus);
        Self { server, bus, log, last: HashMap::new(), entries: Vec::new() }
    }

    pub(crate) async fn append(&mut self, event: &Event) -> u64 {
        let subject = match &event.body {
            EventBody::Agent(body) => FLEET.agent_event(body.agent_id()),
            EventBody::Execution(body) => FLEET.execution_event(body.execution_id()),
            EventBody::System(_) => FLEET.system_event(&event.subject),
        };
        self.append_bytes(&subject, &event.id.to_string(), event.encode().into()).await
    }

    pub(crate) async fn append_all(&mut self, events: &[Event]) -> u64 {
        let mut seq = 0;
        for event in events {
            seq = self.append(event).await;
        }
        seq
    }

    pub(crate) async fn append_bytes(&mut self, subject: &str, id: &str, bytes: Bytes) -> u64 {
        let last = self.last.entry(subject.to_owned()).or_default();
        let appended = self.log.append(subject, id, bytes.clone(), *last).await.unwrap();
        let Append::Appended { seq } = appended else { panic!("{subject}: {appended:?}") };
        *last = seq;
        self.entries.push((seq, bytes));
        seq
    }

    pub(crate) async fn notifier(&self) -> Notifier {
        self.notifier_with(Limits::default()).await
    }

    pub(crate) async fn notifier_with(&self, limits: Limits) -> Notifier {
        let notifier = self.notifier_unready(limits).await;
        notifier.ready().await;
        notifier
    }

    /// One that may still be waiting for its server.
    pub(crate) async fn notifier_unready(&self, limits: Limits) -> Notifier {
        Notifier::start(&self.server.url(), limits).await
    }
}

/// A notifier in this process.
pub(crate) struct Notifier {
    pub(crate) addr: SocketAddr,
    context: Context,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Notifier {
    async fn start(nats_url: &str, limits: Limits) -> Self {
        let environment = [("ROLLCALL_NATS_URL", nats_url), ("ROLLCALL_HTTP_ADDR", "127.0.0.1:0")];
        let environment = environment.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let settings = Settings::load_from("notifier", environment).unwrap().settings;
        let context = Context::for_tests(notifier::PROGRAM, settings);
        let (listening, listens) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(notifier::run_with(context.clone(), limits, |addr| {
            let _ = listening.send(addr);
        }));
        let addr = within("notifier listens", listens).await.unwrap();
        Self { addr, context, task }
    }

    pub(crate) async fn ready(&self) {
        within("notifier is ready", self.context.readiness.ready()).await;
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub(crate) fn shut_down(&self) {
        self.context.shutdown.cancel();
    }

    pub(crate) async fn stop(self) {
        self.shut_down();
        within("notifier ends", self.task).await.unwrap().unwrap();
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        within(path, reqwest::get(self.url(path))).await.unwrap()
    }

    pub(crate) async fn json(&self, path: &str) -> serde_json::Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), 200, "{path}");
        response.json().await.unwrap()
    }

    /// Asks until the read model has come to `seq`.
    pub(crate) async fn caught_up(&self, seq: u64) {
        within("the read model catches up", async {
            while self.json("/api/summary").await["log"]["seq"].as_u64().unwrap() < seq {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    pub(crate) async fn sse(&self, query: &str) -> Sse {
        self.sse_after(query, None).await
    }

    pub(crate) async fn sse_after(&self, query: &str, last_event_id: Option<u64>) -> Sse {
        let mut request = reqwest::Client::new().get(self.url(&format!("/events{query}")));
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id.to_string());
        }
        let response = within("SSE answers", request.send()).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut sse = Sse { response, buffer: Vec::new() };
        let greeting = sse.block().await;
        // Any other comment would be the one that comes after 15 s.
        let at_once =
            matches!(&greeting, Some(Block::Comment(text)) if text.starts_with(": rollcall\nretry: "));
        assert!(at_once, "{greeting:?}");
        sse
    }
}

/// One block of a stream of server-sent events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Block {
    Comment(String),
    Event { id: u64, kind: String, data: String },
}

/// A client of server-sent events.
pub(crate) struct Sse {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Sse {
    /// The next block; `None` when the stream ended.
    pub(crate) async fn block(&mut self) -> Option<Block> {
        within("the next SSE block", self.any_block()).await
    }

    async fn any_block(&mut self) -> Option<Block> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Some(parse(std::str::from_utf8(&block).unwrap()));
            }
            let chunk = self.response.chunk().await.unwrap()?;
            self.buffer.extend_from_slice(&chunk);
        }
    }

    /// The next event: sequence, type, data. `None` when the stream ended. Comments don't extend the deadline.
    pub(crate) async fn try_event(&mut self) -> Option<(u64, String, String)> {
        within("the next SSE event", async {
            loop {
                if let Block::Event { id, kind, data } = self.any_block().await? {
                    return Some((id, kind, data));
                }
            }
        })
        .await
    }

    pub(crate) async fn event(&mut self) -> (u64, String, String) {
        self.try_event().await.expect("the stream goes on")
    }

    pub(crate) async fn seqs(&mut self, count: usize) -> Vec<u64> {
        let mut seqs = Vec::new();
        while seqs.len() < count {
            seqs.push(self.event().await.0);
        }
        seqs
    }
}

fn parse(block: &str) -> Block {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
    match field("data: ") {
        None => Block::Comment(block.to_owned()),
        Some(data) => Block::Event {
            id: field("id: ").unwrap().parse().unwrap(),
            kind: field("event: ").unwrap().to_owned(),
            data: data.to_owned(),
        },
    }
}

/// Connects to a stream, resuming after `last`.
pub(crate) async fn connect(url: &str, last: u64) -> Sse {
    let request = reqwest::Client::new().get(url).header("Last-Event-ID", last.to_string());
    let response = within("SSE answers", request.send()).await.unwrap();
    assert_eq!(response.status(), 200);
    Sse { response, buffer: Vec::new() }
}
