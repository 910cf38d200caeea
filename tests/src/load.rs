//! A fleet under load.

use std::time::Duration;

use serde_json::json;

use crate::{
    Fleet, OnDispatch, ScriptedAgent,
    fleet::{Options, SOON},
    until,
};

/// Executions of one load.
pub const LOAD: usize = 60;
/// How long the last of them may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// A fleet under load: two agents that complete everything they are given.
pub struct Load {
    /// The fleet.
    pub fleet: Fleet,
    /// Its agents, `a` and `b`.
    pub agents: Vec<ScriptedAgent>,
    /// What was taken.
    pub submitted: Vec<String>,
}

impl Load {
    /// Starts the fleet and its agents.
    pub async fn start(options: Options) -> Self {
        let fleet = Fleet::start_with(options.env("ROLLCALL_QUEUE_DEPTH", 1000)).await;
        let mut agents = Vec::new();
        for name in ["a", "b"] {
            let agent = ScriptedAgent::start_with(&fleet.bus, name, 2, json!({"interval_ms": 2000})).await;
            agent.on_dispatch(OnDispatch::Complete);
            fleet.status(name, "connected", SOON).await;
            agents.push(agent);
        }
        Self { fleet, agents, submitted: Vec::new() }
    }

    /// Submits a part of the load; every submission is repeated until it is answered.
    ///
    /// # Panics
    /// When one is refused.
    pub async fn submit(&mut self, count: usize) {
        let more = submissions(&self.fleet, count).await;
        self.submitted.extend(more);
    }

    /// Everything that was taken ends well, whatever happened, and the invariants hold.
    ///
    /// # Panics
    /// When it does not.
    pub async fn ends_well(&self) {
        for execution in &self.submitted {
            self.fleet.state(execution, "completed", ENDS_WITHIN).await;
        }
        self.fleet.audit().await;
        for agent in &self.agents {
            until(&format!("{} to know that its reports are there", agent.id), SOON, || async {
                if agent.held().is_empty() { Ok(()) } else { Err(agent.held()) }
            })
            .await;
        }
    }

    /// Nobody was suspected and nothing was recovered, in the whole log.
    ///
    /// # Panics
    /// When somebody was, or something.
    pub async fn condemned_nobody(&self) {
        for kind in ["execution.recovered", "agent.error", "agent.disconnected", "agent.gone"] {
            let found = self.fleet.events_of(kind).await;
            assert!(found.is_empty(), "{kind}: {found:?}");
        }
    }
}

/// Submits so many, half of them to agent `a`, and returns their ids.
///
/// # Panics
/// When one is refused.
pub async fn submissions(fleet: &Fleet, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    for n in 0..count {
        let mut body = if n % 2 == 0 { json!({"pool": "default"}) } else { json!({"agent_id": "a"}) };
        body["on_loss"] = json!("requeue");
        body["max_attempts"] = json!(10);
        body["input"] = json!(n);
        let reply = fleet.submit(body).await;
        taken.push(reply["execution_id"].as_str().expect("an id").to_owned());
    }
    taken
}
