//! A dispatcher that is told to stop: first nothing more is taken, then what is under way is settled.

use futures_util::StreamExt;
use rollcall_core::{AgentId, event::ExecutionEvent};
use rollcall_nats::RequestError;
use serde_json::json;

use crate::harness::{Fleet, PATIENCE};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_is_written_down_and_answered_before_it_ends() {
    let fleet = Fleet::start().await;
    let id = AgentId::new("a").unwrap();
    fleet.agent(&id, "i-1").await;
    let dispatcher = fleet.dispatcher_in(fleet.context()).await;
    let mut reads = fleet.bus.subscribe("$JS.API.STREAM.MSG.GET.>".to_owned()).await.unwrap();
    fleet.bus.flush().await.unwrap();
    // It is taken, and held up in Redis until the dispatcher has been told.
    fleet.redis_client("PAUSE 60000 WRITE").await;
    let stopped = async {
        loop {
            let read = tokio::time::timeout(PATIENCE, reads.next()).await.expect("the log is asked").unwrap();
            if String::from_utf8_lossy(&read.payload).contains("execution.x") {
                break;
            }
        }
        dispatcher.tell_to_stop();
        let release = fleet.subjects.api("release");
        fleet
            .until("nothing more is taken", async || {
                let refused = fleet.bus.request(release.clone(), "{}".into(), PATIENCE).await;
                matches!(refused, Err(RequestError::NoResponders))
            })
            .await;
        fleet.redis_client("UNPAUSE").await;
        dispatcher.stop().await;
    };
    let request = json!({"execution_id": "x", "agent_id": "a", "input": 0, "delivery": "external"});
    let (answer, ()) = tokio::join!(fleet.api("submit", &request), stopped);
    assert_eq!(answer["state"], "running", "{answer}");
    let history = fleet.history("x").await;
    assert!(matches!(history.last(), Some(ExecutionEvent::Dispatched(_))), "{history:?}");
}
