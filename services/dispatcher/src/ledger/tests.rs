//! What entries of the log turn out to be, and whom that concerns.

use rollcall_core::{
    InstanceId,
    event::{CancelRequested, Retried},
    wire::Delivery,
};

use super::*;
use crate::fixture::Fixture;

fn x() -> ExecutionId {
    ExecutionId::new("x").unwrap()
}

/// The last entry about an execution.
async fn last(fixture: &Fixture) -> Entry {
    let ledger = &fixture.dispatcher.ledger;
    ledger.log().last(&ledger.subjects.execution_event(&x())).await.unwrap().unwrap()
}

/// A dispatcher that folds what a test gives it; `x` waits by the log and the fold.
async fn waiting() -> Fixture {
    let fixture = Fixture::new().await;
    fixture.submitted("x", None, "p", Delivery::Push).await;
    let folded = fixture.dispatcher.ledger.ingest(&last(&fixture).await);
    assert!(matches!(folded, Ingested::Nothing), "{folded:?}");
    fixture
}

/// Somebody who is no dispatcher has it cancelled.
fn cancelled() -> ExecutionEvent {
    CancelRequested {
        execution_id: x(),
        attempt: 1,
        agent_id: None,
        reason: String::new(),
        by: "test".to_owned(),
    }
    .into()
}

#[tokio::test]
async fn what_others_change_is_handed_out_once_and_what_dispatchers_change_is_not() {
    let mut fixture = waiting().await;
    assert!(fixture.foreign.try_recv().is_err(), "what was there before the start, the start sees to");
    fixture.dispatcher.ledger.go_live();
    let another = fixture.another();
    let (agent, instance) = (AgentId::new("a").unwrap(), InstanceId::new("i-1").unwrap());
    another.decide(&x(), |e| e.dispatch(1, &agent, &instance, 60_000, another.now())).await.unwrap();
    fixture.dispatcher.ledger.ingest(&last(&fixture).await);
    assert!(fixture.foreign.try_recv().is_err(), "whoever wrote it carries it out");
    let log = EventLog::new(&fixture.bus);
    let event = Event {
        id: Uuid::now_v7(),
        source: "/rollcall/watchdog/1".to_owned(),
        subject: "x".to_owned(),
        time: another.now(),
        body: cancelled().into(),
    };
    let entry = last(&fixture).await;
    log.append(&entry.subject, "1", event.encode().into(), entry.seq).await.unwrap();
    let entry = last(&fixture).await;
    for _ in 0..2 {
        fixture.dispatcher.ledger.ingest(&entry);
    }
    let changes = fixture.foreign.try_recv().expect("somebody has to end it");
    assert_eq!(changes.iter().map(|change| change.after.seq).collect::<Vec<_>>(), [entry.seq]);
    assert!(fixture.foreign.try_recv().is_err(), "once");
}

#[tokio::test]
async fn an_event_of_what_is_not_in_memory_says_so_and_one_that_was_folded_does_not() {
    let fixture = waiting().await;
    let behind = fixture.another();
    let retried = Retried { execution_id: x(), attempt: 2, by: "test".to_owned() };
    fixture.happens("x", retried.into()).await;
    let entry = last(&fixture).await;
    let found = behind.ingest(&entry);
    assert!(matches!(&found, Ingested::Unknown(id) if *id == x()), "{found:?}");
    behind.load_execution(&x(), 0).await.unwrap();
    let found = behind.ingest(&entry);
    assert!(matches!(found, Ingested::Nothing), "{found:?}");
}

#[tokio::test]
async fn news_of_an_agent_are_news_once() {
    let fixture = Fixture::new().await;
    fixture.agent("a", "p", 1).await;
    let ledger = &fixture.dispatcher.ledger;
    let id = AgentId::new("a").unwrap();
    let entry = ledger.log().last(&ledger.subjects.agent_event(&id)).await.unwrap().unwrap();
    let found = ledger.ingest(&entry);
    assert!(matches!(&found, Ingested::Agent(agent) if *agent == id), "{found:?}");
    let found = ledger.ingest(&entry);
    assert!(matches!(found, Ingested::Nothing), "{found:?}");
}

#[tokio::test]
async fn what_is_no_event_of_its_subject_or_can_not_follow_is_invalid() {
    let fixture = waiting().await;
    let ledger = &fixture.dispatcher.ledger;
    let is_invalid = |entry: &Entry, why: &str| match ledger.ingest(entry) {
        Ingested::Invalid(said) => assert!(said.contains(why), "{said}"),
        other => panic!("{why}: {other:?}"),
    };
    let whole = last(&fixture).await;
    let at = |subject: &str| Entry { seq: whole.seq + 1, subject: subject.into(), ..whole.clone() };
    is_invalid(&Entry { bytes: "+ACK nonsense".into(), ..whole.clone() }, "");
    is_invalid(&at("elsewhere.x"), "not a subject of the log");
    is_invalid(&at("rollcall.event.agent.x"), "another family's");
    is_invalid(&at("rollcall.event.execution.y"), "about something else");
    // It names another one than the event is about.
    let bytes = String::from_utf8(whole.bytes.to_vec()).unwrap();
    let bytes = bytes.replace(r#""subject":"x""#, r#""subject":"y""#);
    let bytes = bytes::Bytes::from(bytes);
    is_invalid(&Entry { bytes: bytes.clone(), ..at(&whole.subject) }, "about something else");
    // Its event is about another one than it names.
    is_invalid(&Entry { bytes, ..at("rollcall.event.execution.y") }, "about something else");
    // What waits can't be retried.
    fixture.happens("x", Retried { execution_id: x(), attempt: 2, by: "test".to_owned() }.into()).await;
    is_invalid(&last(&fixture).await, "");
    let known = ledger.execution(&x()).unwrap();
    assert_eq!((known.state, known.attempt), (rollcall_core::execution::State::Queued, 1));
}
