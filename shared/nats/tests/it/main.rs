//! Against a real nats-server (see `rollcall_nats::testing`).

// The lint's exception for tests knows only functions marked as such.
#![allow(clippy::unwrap_used)]

mod api;
mod bus;
mod log;
mod streams;
mod tail;
mod work;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use rollcall_nats::testing::NatsServer;
use rollcall_nats::{Append, Bus, EventLog, ensure_streams};

/// Everything a test waits for comes within this time or never.
const DEADLINE: Duration = Duration::from_secs(30);

async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(DEADLINE, what).await.expect("it comes within the deadline")
}

/// Waits for the connect with this number: right after a restart the old connection may still look alive.
async fn reconnected(bus: &Bus, epoch: u64) {
    soon(bus.link().wait_for(|link| link.connected && link.epoch >= epoch)).await.unwrap();
}

/// A server with the three streams, and a bus on it.
async fn fleet() -> (NatsServer, Bus, EventLog) {
    let server = NatsServer::start().unwrap();
    let bus = server.bus("t").await;
    ensure_streams(&bus).await.unwrap();
    let log = EventLog::new(&bus);
    (server, bus, log)
}

/// A small CloudEvent with this id.
fn event(id: &str) -> Bytes {
    Bytes::from(format!(r#"{{"specversion":"1.0","id":"{id}","source":"/t","type":"t","data":{{}}}}"#))
}

/// Appends and returns the sequence.
async fn put(log: &EventLog, subject: &str, id: &str, expected: u64) -> u64 {
    match soon(log.append(subject, id, event(id), expected)).await.unwrap() {
        Append::Appended { seq } => seq,
        Append::Conflict { winner_seq } => panic!("conflict with {winner_seq:?}"),
    }
}
