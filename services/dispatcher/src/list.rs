//! Lists of executions, page by page.

use rollcall_core::{
    ExecutionId,
    execution::Execution,
    wire::{ExecutionView, ExecutionsRequest},
};
use serde::Serialize;

use crate::state::Projection;

/// Most bytes of the rows of one answer: what NATS carries in a message (1 MiB), less room for the rest of it.
const PAGE_BYTES_MAX: usize = 768 * 1024;

/// The answer to `executions`.
#[derive(Debug, Serialize)]
pub struct Page {
    /// Rows, in the order of their ids.
    pub executions: Vec<ExecutionView>,
    /// Pass it as `after` for the rest.
    pub next: Option<ExecutionId>,
    /// Ended executions are missing: the oldest of them are in the log only.
    pub forgotten: bool,
}

/// A page of at most `limit` rows.
#[must_use]
pub fn page(projection: &Projection, wanted: &ExecutionsRequest, limit: usize) -> Page {
    let ids = projection.ids(wanted.state);
    let mut rows = ids
        .iter()
        .filter(|id| wanted.after.as_ref().is_none_or(|after| *id > after))
        .filter_map(|id| projection.execution(id))
        .filter(|e| wanted.state.is_none_or(|state| e.state == state))
        .map(Execution::view)
        .filter(|view| wanted.agent_id.is_none() || view.agent_id == wanted.agent_id)
        .peekable();
    let (mut executions, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next_if(|row| {
        bytes += serde_json::to_vec(row).map_or(0, |json| json.len() + 1);
        // However long a row is, it is shown: the next page begins after it.
        executions.len() < limit && (bytes <= PAGE_BYTES_MAX || executions.is_empty())
    }) {
        executions.push(row);
    }
    let next = executions
        .last()
        .filter(|_| rows.peek().is_some())
        .map(|last: &ExecutionView| last.execution_id.clone());
    Page { executions, next, forgotten: projection.has_forgotten() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rollcall_core::{
        Pool, Timestamp,
        event::{PayloadRef, Submitted},
        wire::Delivery,
    };

    use super::*;

    fn submitted(name: &str, label: &str) -> Submitted {
        Submitted {
            execution_id: ExecutionId::new(name).unwrap(),
            attempt: 1,
            agent_id: None,
            pool: Pool::default(),
            input: PayloadRef { bytes: 0, sha256: String::new(), seq: 0, attempt: 1 },
            timeout_ms: None,
            priority: 5,
            queue_ttl_ms: 1_000,
            on_loss: rollcall_core::wire::OnLoss::Fail,
            max_attempts: 1,
            stall_timeout_ms: None,
            lost_after_ms: None,
            delivery: Delivery::Push,
            labels: BTreeMap::from([("long".to_owned(), label.to_owned())]),
            request_sha256: String::new(),
        }
    }

    #[test]
    fn a_page_ends_at_its_limit_or_at_what_a_message_carries() {
        let mut projection = Projection::default();
        let long = "x".repeat(PAGE_BYTES_MAX / 2);
        let t0 = Timestamp::from_millis(1);
        for (seq, name, label) in
            [(1, "a", "short"), (2, "b", &long), (3, "c", &long), (4, "d", &long), (5, "e", "short")]
        {
            projection.apply_execution(seq, &submitted(name, label).into(), t0).unwrap();
        }
        let read = |after: Option<&str>, limit: usize| {
            let after = after.map(|id| ExecutionId::new(id).unwrap());
            let page = page(&projection, &ExecutionsRequest { after, ..ExecutionsRequest::default() }, limit);
            let names: Vec<String> =
                page.executions.iter().map(|row| row.execution_id.as_str().to_owned()).collect();
            (names.join(""), page.next.map(|id| id.as_str().to_owned()))
        };
        let next = |id: &str| Some(id.to_owned());
        assert_eq!(read(None, 1), ("a".to_owned(), next("a")));
        assert_eq!(read(None, 100), ("ab".to_owned(), next("b")), "one more is too much for a message");
        assert_eq!(read(Some("b"), 100), ("c".to_owned(), next("c")));
        assert_eq!(read(Some("c"), 100), ("de".to_owned(), None));
        assert_eq!(read(Some("c"), 2), ("de".to_owned(), None), "nothing is left");
        assert_eq!(read(Some("e"), 2), (String::new(), None));
    }
}
