//! Probes over a real NATS.

use futures_util::StreamExt;
use rollcall_nats::testing::NatsServer;
use serde_json::{Value, json};

use super::*;

const PING: &str = "rollcall.agent.a.i.ping";

fn on(bus: &Bus) -> Prober {
    let mut prober = prober();
    prober.bus = Some((bus.clone(), Subjects::default()));
    prober
}

/// Answers whatever is asked on this subject until it is dropped.
struct Listener(tokio::task::JoinHandle<()>);

impl Listener {
    async fn start(bus: &Bus, subject: &str, answer: impl Into<Vec<u8>>) -> Self {
        let (mut requests, bus, answer) = (bus.subscribe(subject).await.unwrap(), bus.clone(), answer.into());
        bus.flush().await.unwrap();
        Self(tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                bus.reply(&request, answer.clone().into()).await;
            }
        }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn pong(instance: &str) -> String {
    json!({ "instance_id": instance, "state": "ready" }).to_string()
}

fn service(name: &str) -> Value {
    json!({ "type": "io.nats.micro.v1.ping_response", "name": name, "id": "1", "version": "1.0.0" })
}

#[tokio::test]
async fn who_answers_the_ping_of_its_instance_is_good() {
    let server = NatsServer::start().unwrap();
    let bus = server.bus("rollcall").await;
    for (answer, wanted) in [
        (pong("i"), None),
        (pong("another"), Some(Cause::Identity)),
        ("{}".to_owned(), Some(Cause::Protocol)),
        ("what?".to_owned(), Some(Cause::Protocol)),
    ] {
        let _listener = Listener::start(&server.bus("rollcall").await, PING, answer.clone()).await;
        for url in ["", "nats://", " "] {
            let found = probe(&on(&bus), "nats", url).await;
            assert_eq!(cause(&found), wanted, "{answer}: {found:?}");
            assert_eq!(found == Found::Good, wanted.is_none(), "{answer}: {found:?}");
        }
    }
}

#[tokio::test]
async fn a_service_is_asked_by_its_name_and_nothing_else_is() {
    let server = NatsServer::start().unwrap();
    let bus = server.bus("rollcall").await;
    for (answer, wanted) in [
        (service("translator").to_string(), None),
        (service("another").to_string(), Some(Cause::Identity)),
        ("what?".to_owned(), Some(Cause::Protocol)),
    ] {
        let agents = server.bus("rollcall").await;
        let _listener = Listener::start(&agents, "$SRV.PING.translator", answer.clone()).await;
        for url in ["translator", "nats://translator", "nats://translator/"] {
            let found = probe(&on(&bus), "nats", url).await;
            assert_eq!(cause(&found), wanted, "{answer}: {found:?}");
            assert_eq!(found == Found::Good, wanted.is_none(), "{answer}: {found:?}");
        }
    }
    // It names a service, and no subject that we would publish on.
    let _listener = Listener::start(&server.bus("rollcall").await, ">", "{}").await;
    for url in ["$SRV.PING", "translator.*", "rollcall.api.drain", "nats://a.b", "a b", ">"] {
        let found = probe(&on(&bus), "nats", url).await;
        assert!(matches!(&found, Found::Skipped(why) if why.contains("no name")), "{url}: {found:?}");
    }
}

#[tokio::test]
async fn nobody_there_no_answer_and_no_link_are_told_apart() {
    let mut server = NatsServer::start().unwrap();
    let bus = server.bus("rollcall").await;
    for url in ["", "translator"] {
        let found = probe(&on(&bus), "nats", url).await;
        assert_eq!(cause(&found), Some(Cause::NoResponders), "{found:?}");
    }
    let silent = server.bus("rollcall").await;
    let _silent = silent.subscribe(PING).await.unwrap();
    silent.flush().await.unwrap();
    let mut brief = on(&bus);
    brief.timeout = Duration::from_millis(300);
    let found = probe(&brief, "nats", "").await;
    assert_eq!(cause(&found), Some(Cause::Timeout), "{found:?}");
    // Our own link: whether it is away already, or goes while the answer is awaited.
    let target = target("nats", "");
    let (waiting, prober) = (target.clone(), on(&bus));
    let awaited = tokio::spawn(async move { prober.probe(&waiting, &mut Warm::default()).await.0 });
    tokio::task::yield_now().await;
    server.stop().unwrap();
    let found = awaited.await.unwrap();
    assert!(matches!(found, Found::Void(_)), "{found:?}");
    let found = on(&bus).probe(&target, &mut Warm::default()).await.0;
    assert!(matches!(found, Found::Void(_)), "{found:?}");
}
