//! A scripted agent: speaks the wire contract with plain JSON, and misbehaves on request.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::StreamExt;
use rollcall_nats::Bus;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// What it does with a dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OnDispatch {
    /// Takes it and holds it until the test says more.
    Hold,
    /// Takes it and reports `completed` with this result at once.
    Complete,
    /// Refuses with this reason.
    Refuse(String),
    /// Does not answer, and does not take it.
    Silent,
    /// Takes it, lists it, and does not answer.
    TakeSilently,
}

/// What it does with a terminate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnTerminate {
    /// Ends it, says so, and reports it.
    Confirm,
    /// Says `still_running`.
    Refuse,
    /// Does not answer.
    Silent,
    /// Finishes the work at that very moment: reports `completed` and says `not_running`.
    Finish,
}

#[derive(Debug)]
struct Script {
    on_dispatch: OnDispatch,
    on_terminate: OnTerminate,
    beats: bool,
    state: &'static str,
    held: BTreeMap<String, (u32, Value)>,
    seq: u64,
    dispatched: Vec<(String, u32)>,
    terminated: Vec<(String, u32, String)>,
    goodbyes: Vec<Value>,
    inputs: BTreeMap<String, Value>,
    moving: BTreeSet<String>,
}

/// A running scripted agent. It vanishes without a word when dropped.
pub struct ScriptedAgent {
    /// Its agent id.
    pub id: String,
    /// Its instance id.
    pub instance: String,
    capacity: u32,
    extra: Value,
    bus: Bus,
    script: Arc<Mutex<Script>>,
    gone: CancellationToken,
}

fn locked(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().expect("no test panics while it scripts an agent")
}

impl ScriptedAgent {
    /// An agent that beats twice a second, names an interval of a second, and holds what it gets: a hiccup of the test's
    /// own machine is not a silence.
    pub async fn start(bus: &Bus, id: &str, capacity: u32) -> Self {
        Self::start_with(bus, id, capacity, json!({})).await
    }

    /// The same, with further heartbeat fields.
    ///
    /// # Panics
    /// When the bus takes no subscription.
    pub async fn start_with(bus: &Bus, id: &str, capacity: u32, extra: Value) -> Self {
        let agent = Self {
            id: id.to_owned(),
            instance: uuid::Uuid::new_v4().to_string(),
            capacity,
            extra,
            bus: bus.clone(),
            script: Arc::new(Mutex::new(Script {
                on_dispatch: OnDispatch::Hold,
                on_terminate: OnTerminate::Confirm,
                beats: true,
                state: "ready",
                held: BTreeMap::new(),
                seq: 0,
                dispatched: Vec::new(),
                terminated: Vec::new(),
                goodbyes: Vec::new(),
                inputs: BTreeMap::new(),
                moving: BTreeSet::new(),
            })),
            gone: CancellationToken::new(),
        };
        agent.listen().await;
        agent.beat_along();
        agent
    }

    async fn listen(&self) {
        let subject = format!("rollcall.agent.{}.{}.*", self.id, self.instance);
        let mut requests = self.bus.subscribe(subject).await.expect("a subscription");
        // The test's own connection may be on its way back from a story's outage.
        crate::until("the subscription to be with the server", Duration::from_secs(20), || self.bus.flush())
            .await;
        let (bus, script, gone) = (self.bus.clone(), Arc::clone(&self.script), self.gone.clone());
        let (id, instance) = (self.id.clone(), self.instance.clone());
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    message = requests.next() => message,
                    () = gone.cancelled() => return,
                };
                let Some(message) = message else { return };
                let verb = message.subject.rsplit('.').next().unwrap_or_default().to_owned();
                let body: Value = serde_json::from_slice(&message.payload).unwrap_or(Value::Null);
                let (answer, report) = respond(&script, &instance, &verb, &body);
                if let Some((execution, report)) = report {
                    let subject = format!("rollcall.report.{id}.{execution}");
                    let reports = rollcall_nats::Reports::new(&bus);
                    reports
                        .publish(&subject, Bytes::from(report.to_string()))
                        .await
                        .expect("the stream takes reports");
                    locked(&script).held.remove(&execution);
                }
                if let Some(answer) = answer {
                    bus.reply(&message, Bytes::from(answer.to_string())).await;
                }
            }
        });
    }

    fn beat_along(&self) {
        let interval = self.extra["interval_ms"].as_u64().unwrap_or(1000);
        let (bus, subject) = (self.bus.clone(), format!("rollcall.heartbeat.{}", self.id));
        let (script, gone) = (Arc::clone(&self.script), self.gone.clone());
        let (instance, capacity, extra) = (self.instance.clone(), self.capacity, self.extra.clone());
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(interval / 2));
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = gone.cancelled() => return,
                }
                let beat = {
                    let mut script = locked(&script);
                    if !script.beats {
                        continue;
                    }
                    beat_of(&mut script, &instance, capacity, &extra)
                };
                // Not connected for a moment: the next one will do.
                let _ = bus.publish(subject.clone(), Bytes::from(beat.to_string())).await;
            }
        });
    }

    /// Sends one heartbeat now as a request and returns the answer.
    ///
    /// # Panics
    /// When nobody answers.
    pub async fn beat(&self) -> Value {
        let beat = beat_of(&mut locked(&self.script), &self.instance, self.capacity, &self.extra);
        let reply = self
            .bus
            .request(
                format!("rollcall.heartbeat.{}", self.id),
                Bytes::from(beat.to_string()),
                Duration::from_secs(10),
            )
            .await
            .expect("the prober answers");
        serde_json::from_slice(&reply.payload).expect("an answer is JSON")
    }

    /// What it does with dispatches from now on.
    pub fn on_dispatch(&self, what: OnDispatch) -> &Self {
        locked(&self.script).on_dispatch = what;
        self
    }

    /// What it does with terminates from now on.
    pub fn on_terminate(&self, what: OnTerminate) -> &Self {
        locked(&self.script).on_terminate = what;
        self
    }

    /// Whether it beats from now on.
    pub fn beats(&self, beats: bool) {
        locked(&self.script).beats = beats;
    }

    /// What it says of its own state from now on.
    pub fn says(&self, state: &'static str) {
        locked(&self.script).state = state;
    }

    /// Forgets an execution without a word.
    pub fn forget(&self, execution: &str) {
        locked(&self.script).held.remove(execution);
    }

    /// Claims an execution that nobody gave it.
    pub fn claim(&self, execution: &str, attempt: u32) {
        locked(&self.script).held.insert(execution.to_owned(), (attempt, Value::Null));
    }

    /// Whether an execution's progress rises with each heartbeat from now on. What moved once keeps the progress it had.
    pub fn moves(&self, execution: &str, moves: bool) {
        let mut script = locked(&self.script);
        if moves {
            script.moving.insert(execution.to_owned());
        } else {
            script.moving.remove(execution);
        }
    }

    /// What it holds.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        locked(&self.script).held.keys().cloned().collect()
    }

    /// Dispatches it was sent, repetitions too.
    #[must_use]
    pub fn dispatched(&self) -> Vec<(String, u32)> {
        locked(&self.script).dispatched.clone()
    }

    /// Terminates it was sent: execution, attempt, reason.
    #[must_use]
    pub fn terminated(&self) -> Vec<(String, u32, String)> {
        locked(&self.script).terminated.clone()
    }

    /// Goodbyes it was sent.
    #[must_use]
    pub fn goodbyes(&self) -> Vec<Value> {
        locked(&self.script).goodbyes.clone()
    }

    /// The whole dispatch request of an execution.
    #[must_use]
    pub fn request(&self, execution: &str) -> Option<Value> {
        locked(&self.script).inputs.get(execution).cloned()
    }

    /// Reports an outcome and stops listing the execution once the stream has it.
    pub async fn report(&self, execution: &str, attempt: u32, outcome: &str, more: Value) {
        self.report_and_list(execution, attempt, outcome, more).await;
        self.forget(execution);
    }

    /// Reports an outcome and goes on listing the execution.
    ///
    /// # Panics
    /// When the stream does not take it.
    pub async fn report_and_list(&self, execution: &str, attempt: u32, outcome: &str, more: Value) {
        let mut body = json!({"instance_id": self.instance, "attempt": attempt, "outcome": outcome});
        if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
            body.extend(more.clone());
        }
        let subject = format!("rollcall.report.{}.{execution}", self.id);
        rollcall_nats::Reports::new(&self.bus)
            .publish(&subject, Bytes::from(body.to_string()))
            .await
            .expect("the stream takes reports");
    }

    /// Vanishes: no heartbeat, no answer. Returns when the server knows that nobody listens any more.
    pub async fn vanish(&self) {
        self.gone.cancel();
        let begun = Instant::now();
        let subject = format!("rollcall.agent.{}.{}.ping", self.id, self.instance);
        crate::until("the agent's subscription to be gone", Duration::from_secs(10), || async {
            match self
                .bus
                .request(subject.clone(), Bytes::from_static(b"{}"), Duration::from_millis(500))
                .await
            {
                Err(rollcall_nats::RequestError::NoResponders) => Ok(()),
                other => Err(format!("{:?} after {:?}", other.is_ok(), begun.elapsed())),
            }
        })
        .await;
    }

    /// Waits until it was sent this execution.
    pub async fn given(&self, execution: &str) {
        crate::until(&format!("{} to be given {execution}", self.id), Duration::from_secs(20), || async {
            let dispatched = self.dispatched();
            if dispatched.iter().any(|(id, _)| id == execution) { Ok(()) } else { Err(dispatched) }
        })
        .await;
    }
}

impl Drop for ScriptedAgent {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

fn claims(script: &Script) -> Vec<Value> {
    script
        .held
        .iter()
        .map(|(id, (attempt, progress))| match progress {
            Value::Null => json!({"id": id, "attempt": attempt}),
            progress => json!({"id": id, "attempt": attempt, "progress": progress}),
        })
        .collect()
}

fn beat_of(script: &mut Script, instance: &str, capacity: u32, extra: &Value) -> Value {
    script.seq += 1;
    for (execution, (_, progress)) in &mut script.held {
        if script.moving.contains(execution) {
            *progress = json!(script.seq);
        }
    }
    let mut beat = json!({
        "instance_id": instance, "seq": script.seq, "state": script.state, "capacity": capacity,
        "executions": claims(script), "interval_ms": 1000,
    });
    if let (Some(beat), Some(extra)) = (beat.as_object_mut(), extra.as_object()) {
        beat.extend(extra.clone());
    }
    beat
}

type Report = (String, Value);

fn respond(
    script: &Mutex<Script>,
    instance: &str,
    verb: &str,
    body: &Value,
) -> (Option<Value>, Option<Report>) {
    let mut script = locked(script);
    let execution = body["execution_id"].as_str().unwrap_or_default().to_owned();
    let attempt = u32::try_from(body["attempt"].as_u64().unwrap_or(0)).unwrap_or(0);
    let report = |outcome: &str, result: Value| {
        (
            execution.clone(),
            json!({"instance_id": instance, "attempt": attempt, "outcome": outcome, "result": result}),
        )
    };
    match verb {
        "dispatch" => {
            script.dispatched.push((execution.clone(), attempt));
            script.inputs.insert(execution.clone(), body.clone());
            let accepted = json!({"accepted": true});
            match script.on_dispatch.clone() {
                OnDispatch::Refuse(reason) => (Some(json!({"accepted": false, "reason": reason})), None),
                OnDispatch::Silent => (None, None),
                OnDispatch::TakeSilently => {
                    script.held.insert(execution, (attempt, Value::Null));
                    (None, None)
                }
                OnDispatch::Hold => {
                    script.held.insert(execution, (attempt, Value::Null));
                    (Some(accepted), None)
                }
                OnDispatch::Complete => {
                    let done = report("completed", json!({"echo": body["input"]}));
                    script.held.insert(execution, (attempt, Value::Null));
                    (Some(accepted), Some(done))
                }
            }
        }
        "terminate" => {
            let reason = body["reason"].as_str().unwrap_or_default().to_owned();
            script.terminated.push((execution.clone(), attempt, reason));
            let holds = script.held.get(&execution).is_some_and(|(held, _)| *held == attempt);
            match script.on_terminate {
                _ if !holds => (Some(json!({"state": "not_running"})), None),
                OnTerminate::Refuse => (Some(json!({"state": "still_running"})), None),
                OnTerminate::Silent => (None, None),
                OnTerminate::Confirm => {
                    (Some(json!({"state": "terminated"})), Some(report("terminated", Value::Null)))
                }
                OnTerminate::Finish => {
                    (Some(json!({"state": "not_running"})), Some(report("completed", json!("just in time"))))
                }
            }
        }
        "executions" => {
            let held = claims(&script);
            (Some(json!({"instance_id": instance, "seq": script.seq, "executions": held})), None)
        }
        "ping" => (Some(json!({"instance_id": instance, "state": script.state})), None),
        "goodbye" => {
            script.goodbyes.push(body.clone());
            (Some(json!({"ok": true})), None)
        }
        _ => (None, None),
    }
}
