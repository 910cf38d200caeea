//! An agent against a scripted fleet: a plain NATS client that dispatches, terminates and listens, on a real server.

#![expect(clippy::unwrap_used, reason = "a test that can not go on has failed")]

use std::{
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use rollcall_agent::{
    Agent, AgentBuilder, AgentHandle, Execution, Exit, Finish, Signal, Trigger, Worker, worker_fn,
};
use rollcall_core::{
    ids::{AgentId, ExecutionId, InstanceId},
    subject::{AgentVerb, Subjects},
};
use rollcall_nats::{Bus, Reports, ensure_streams, testing::NatsServer};
use serde_json::{Value, json, value::to_raw_value};
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::JoinHandle,
};

const DEADLINE: Duration = Duration::from_secs(20);
const LONGER_THAN_AN_INTERVAL: Duration = Duration::from_millis(1_200);

/// Everything heard of one agent, and the means to ask it.
struct Fleet {
    server: NatsServer,
    bus: Bus,
    subjects: Subjects,
    agent: AgentId,
    instance: InstanceId,
    beats: watch::Receiver<Vec<Value>>,
    handle: AgentHandle,
    running: JoinHandle<Exit>,
}

/// What the fleet answers to a heartbeat that asks; null: nothing.
type Answer = Arc<Mutex<Value>>;

fn nothing_due() -> Answer {
    Arc::new(Mutex::new(
        json!({"status": "connected", "interval_ms": 1000, "server_time": "2026-11-22T03:04:05.678Z"}),
    ))
}

impl Fleet {
    async fn start<W: Worker>(agent: AgentBuilder, worker: W) -> Self {
        let fleet = Self::start_without_streams(agent, worker, nothing_due()).await;
        ensure_streams(&fleet.bus).await.unwrap();
        fleet
    }

    async fn start_without_streams<W: Worker>(agent: AgentBuilder, worker: W, answer: Answer) -> Self {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        let agent = agent.interval(Duration::from_secs(1)).build(worker).unwrap();
        let instance = agent.instance_id().clone();
        let id = AgentId::new("a1").unwrap();
        let subjects = Subjects::default();
        let beats = listen(&bus, subjects.heartbeat(&id), answer).await;
        let handle = agent.handle();
        let own_bus = server.bus("rollcall").await;
        let running = tokio::spawn(async move { agent.run(own_bus).await.unwrap() });
        let mut fleet = Self { server, bus, subjects, agent: id, instance, beats, handle, running };
        fleet.beat(|beat| beat["state"] == "ready" || beat["state"] == "busy").await;
        fleet
    }

    async fn ask(&self, verb: AgentVerb, body: Value) -> Value {
        let subject = self.subjects.agent_request(&self.agent, &self.instance, verb);
        let reply = self.bus.request(subject, body.to_string().into(), DEADLINE).await.unwrap();
        serde_json::from_slice(&reply.payload).unwrap()
    }

    async fn dispatch(&self, id: &str, attempt: u32, input: Value) -> Value {
        let body = json!({"execution_id": id, "attempt": attempt, "timeout_ms": 60_000,
            "deadline": "2026-11-22T03:04:05.678Z", "input": input});
        self.ask(AgentVerb::Dispatch, body).await
    }

    async fn terminate(&self, id: &str, reason: &str, grace_ms: u64) -> Value {
        let body = json!({"execution_id": id, "attempt": 1, "reason": reason, "grace_ms": grace_ms});
        self.ask(AgentVerb::Terminate, body).await["state"].clone()
    }

    async fn held(&self) -> Vec<String> {
        let reply = self.ask(AgentVerb::Executions, json!({})).await;
        assert_eq!(reply["instance_id"], self.instance.as_str());
        ids(&reply)
    }

    /// Waits for a heartbeat that comes from now on.
    async fn next_beat(&mut self, is: impl Fn(&Value) -> bool) -> Value {
        let from = self.beats.borrow().len();
        self.beat_from(from, is).await
    }

    /// Waits for a heartbeat, heard already or to come.
    async fn beat(&mut self, is: impl Fn(&Value) -> bool) -> Value {
        self.beat_from(0, is).await
    }

    async fn beat_from(&mut self, from: usize, is: impl Fn(&Value) -> bool) -> Value {
        let found = self.beats.wait_for(|beats| beats.iter().skip(from).any(&is));
        let beats = within("a heartbeat", found).await.unwrap();
        beats.iter().skip(from).find(|beat| is(beat)).unwrap().clone()
    }

    async fn report(&self, id: &str) -> Value {
        let subject = self.subjects.report(&self.agent, &ExecutionId::new(id).unwrap());
        within("a report", async {
            loop {
                if let Ok(Some(entry)) = Reports::new(&self.bus).last(&subject).await {
                    return serde_json::from_slice(&entry.bytes).unwrap();
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }

    async fn until_held(&self, expected: &[&str]) {
        within("the claims", async {
            while self.held().await != expected {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    async fn exit(self) -> Exit {
        within("the exit", self.running).await.unwrap()
    }
}

fn ids(reply: &Value) -> Vec<String> {
    let claims = reply["executions"].as_array().unwrap();
    claims.iter().map(|claim| claim["id"].as_str().unwrap().to_owned()).collect()
}

async fn listen(bus: &Bus, subject: String, answer: Answer) -> watch::Receiver<Vec<Value>> {
    let mut messages = bus.subscribe(subject).await.unwrap();
    bus.flush().await.unwrap();
    let (sender, receiver) = watch::channel(Vec::new());
    let bus = bus.clone();
    tokio::spawn(async move {
        while let Some(message) = messages.next().await {
            let mut beat: Value = serde_json::from_slice(&message.payload).unwrap();
            beat["asked"] = message.reply.is_some().into();
            let answer = answer.lock().unwrap().clone();
            if answer.is_null() {
                sender.send_modify(|beats| beats.push(beat));
                continue;
            }
            let is_gone = beat["state"] == "gone";
            sender.send_modify(|beats| beats.push(beat));
            if is_gone {
                // Time for one more heartbeat, if there were any after the last.
                if let Ok(Some(after)) = tokio::time::timeout(LONGER_THAN_AN_INTERVAL, messages.next()).await
                {
                    let after = serde_json::from_slice(&after.payload).unwrap();
                    sender.send_modify(|beats| beats.push(after));
                }
            }
            bus.reply(&message, answer.to_string().into()).await;
        }
    });
    receiver
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come within {DEADLINE:?}"))
}

fn agent(capacity: u32) -> AgentBuilder {
    Agent::builder("a1").capacity(capacity).stop_grace(Duration::from_millis(200))
}

/// Runs until it is stopped, then says how far it had got.
fn until_stopped() -> impl Worker {
    worker_fn(|execution: Execution| async move {
        execution.stop.asked().await;
        Finish::Stopped(Some(to_raw_value(&json!({"was": execution.id})).unwrap()))
    })
}

/// Counts how much work is alive: up when it starts, down when its future is gone.
#[derive(Clone, Default)]
struct Alive(Arc<AtomicUsize>);
struct One(Arc<AtomicUsize>);
impl Alive {
    fn one(&self) -> One {
        self.0.fetch_add(1, Ordering::SeqCst);
        One(Arc::clone(&self.0))
    }
    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}
impl Drop for One {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn dispatched_twice_runs_once_and_is_reported() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let go = Arc::new(Notify::new());
    let gone = Arc::clone(&go);
    let fleet = Fleet::start(
        agent(2),
        worker_fn(move |execution: Execution| {
            counted.fetch_add(1, Ordering::SeqCst);
            let go = Arc::clone(&gone);
            async move {
                go.notified().await;
                Finish::completed(&json!({"doubled": execution.input::<u32>().unwrap() * 2}))
            }
        }),
    )
    .await;
    assert_eq!(fleet.dispatch("x", 1, json!(21)).await, json!({"accepted": true}));
    assert_eq!(fleet.dispatch("x", 1, json!(21)).await, json!({"accepted": true}));
    assert_eq!(fleet.held().await, ["x"]);
    go.notify_one();
    let report = fleet.report("x").await;
    assert_eq!(report["outcome"], "completed");
    assert_eq!(report["result"], json!({"doubled": 42}));
    assert_eq!((&report["attempt"], &report["instance_id"]), (&json!(1), &json!(fleet.instance)));
    fleet.until_held(&[]).await;
    assert_eq!(
        fleet.dispatch("x", 1, json!(21)).await,
        json!({"accepted": true}),
        "a repetition after the end"
    );
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn what_is_full_or_unreadable_is_refused() {
    let fleet = Fleet::start(agent(1), until_stopped()).await;
    fleet.dispatch("x", 1, json!(null)).await;
    assert_eq!(
        fleet.dispatch("y", 1, json!(null)).await,
        json!({"accepted": false, "reason": "at_capacity"})
    );
    for (verb, body) in [
        (AgentVerb::Dispatch, json!({"execution_id": "z"})),
        (AgentVerb::Dispatch, json!([])),
        // Its fields in their order.
        (AgentVerb::Terminate, json!(["x", 1, "r", 0])),
        (AgentVerb::Terminate, json!({"execution_id": "x", "attempt": -1})),
        (AgentVerb::Goodbye, json!({"reason": "boredom"})),
    ] {
        assert_eq!(fleet.ask(verb, body).await["error"]["code"], "bad_request");
    }
    let wild = json!({"execution_id": "*", "attempt": 1, "reason": "r", "grace_ms": 0});
    assert_eq!(fleet.ask(AgentVerb::Terminate, wild).await["error"]["code"], "invalid_id");
    assert_eq!(fleet.held().await, ["x"], "nothing changed");
    assert_eq!(
        fleet.ask(AgentVerb::Ping, json!({})).await,
        json!({"instance_id": fleet.instance, "state": "busy"})
    );
}

#[tokio::test]
async fn terminated_means_that_the_work_is_dead() {
    let alive = Alive::default();
    let started = alive.clone();
    let fleet = Fleet::start(
        agent(2),
        worker_fn(move |_| {
            let one = started.one();
            async move {
                let _one = one;
                // Deaf to `stop`: it has to be killed.
                std::future::pending::<Finish>().await
            }
        }),
    )
    .await;
    fleet.dispatch("x", 1, json!(null)).await;
    fleet.dispatch("y", 1, json!(null)).await;
    within("the start of the work", async {
        while alive.count() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(fleet.terminate("x", "timed_out", 10).await, "terminated");
    assert_eq!(alive.count(), 1, "dead when it was said");
    assert_eq!(fleet.report("x").await["outcome"], "terminated");
    assert_eq!(fleet.terminate("y", "cancelled", 0).await, "terminated");
    assert_eq!(alive.count(), 0);
    assert_eq!(fleet.report("y").await["outcome"], "cancelled");
    fleet.until_held(&[]).await;
    assert_eq!(fleet.terminate("x", "timed_out", 0).await, "not_running");
}

#[tokio::test]
async fn an_attempt_terminated_before_its_dispatch_never_runs() {
    let fleet = Fleet::start(agent(1), until_stopped()).await;
    assert_eq!(fleet.terminate("x", "cancelled", 0).await, "not_running");
    assert_eq!(fleet.dispatch("x", 1, json!(null)).await, json!({"accepted": false, "reason": "terminated"}));
    assert_eq!(fleet.dispatch("x", 2, json!(null)).await, json!({"accepted": true}));
}

#[tokio::test]
async fn an_older_attempt_that_still_runs_makes_way() {
    let fleet = Fleet::start(agent(2), until_stopped()).await;
    fleet.dispatch("x", 1, json!(null)).await;
    assert_eq!(
        fleet.dispatch("x", 2, json!(null)).await,
        json!({"accepted": false, "reason": "older_attempt_runs"})
    );
    assert_eq!(fleet.report("x").await["outcome"], "terminated");
    fleet.until_held(&[]).await;
    assert_eq!(fleet.dispatch("x", 2, json!(null)).await, json!({"accepted": true}));
    assert_eq!(fleet.dispatch("x", 1, json!(null)).await["accepted"], true, "it ran: a repetition");
}

#[tokio::test]
async fn work_that_blocks_is_still_running_and_does_not_hold_up_the_heartbeat() {
    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Mutex::new(blocked);
    let started = Arc::new(Notify::new());
    let begun = Arc::clone(&started);
    let mut fleet = Fleet::start(
        agent(1),
        worker_fn(move |_| {
            begun.notify_one();
            // Blocks its thread: can't be dropped before it comes back.
            let _ = blocked.lock().unwrap().recv();
            std::future::pending::<Finish>()
        }),
    )
    .await;
    fleet.dispatch("x", 1, json!(null)).await;
    within("the start of the work", started.notified()).await;
    assert_eq!(fleet.terminate("x", "timed_out", 10).await, "still_running");
    let beat = fleet.next_beat(|beat| ids(beat) == ["x"]).await;
    assert_eq!(beat["state"], "busy");
    release.send(()).unwrap();
    assert_eq!(fleet.report("x").await["outcome"], "terminated");
    assert_eq!(fleet.terminate("x", "timed_out", 10).await, "not_running");
}

#[tokio::test]
async fn a_completion_that_wins_against_its_termination_is_on_the_stream_first() {
    let fleet = Fleet::start_without_streams(
        agent(1),
        worker_fn(|execution: Execution| async move {
            execution.stop.asked().await;
            Finish::completed(&"just in time")
        }),
        nothing_due(),
    )
    .await;
    fleet.dispatch("x", 1, json!(null)).await;
    // The streams come into being only now, so the report is a little later than the end of the work.
    let reply = async {
        let reply = fleet.terminate("x", "timed_out", 5_000).await;
        let subject = fleet.subjects.report(&fleet.agent, &ExecutionId::new("x").unwrap());
        (reply, Reports::new(&fleet.bus).last(&subject).await)
    };
    let ((reply, report), streams) = tokio::join!(reply, ensure_streams(&fleet.bus));
    streams.unwrap();
    assert_eq!(reply, "not_running");
    let entry = report.unwrap().expect("it waits on the stream already");
    assert!(String::from_utf8_lossy(&entry.bytes).contains("just in time"));
}

#[tokio::test]
async fn a_panic_is_a_failure_and_the_agent_goes_on() {
    let fleet = Fleet::start(agent(1), worker_fn(|_| async { panic!("boom {}", 7) })).await;
    fleet.dispatch("x", 1, json!(null)).await;
    let report = fleet.report("x").await;
    assert_eq!(report["error"], json!({"code": "panic", "message": "boom 7"}));
    fleet.until_held(&[]).await;
}

#[tokio::test]
async fn a_report_is_sent_until_it_is_acknowledged_and_listed_as_long() {
    // No streams yet: nobody acknowledges.
    let worker = worker_fn(|_| async { Finish::completed(&1) });
    let mut fleet = Fleet::start_without_streams(agent(1), worker, nothing_due()).await;
    fleet.dispatch("x", 1, json!(null)).await;
    for _ in 0..2 {
        let beat = fleet.next_beat(|_| true).await;
        assert_eq!(ids(&beat), ["x"], "listed until acknowledged");
        assert!(beat["executions"][0].get("progress").is_none(), "over: it can't stand still");
        assert_eq!(beat["state"], "ready", "and no slot in use");
    }
    assert_eq!(fleet.dispatch("y", 1, json!(null)).await, json!({"accepted": true}));
    ensure_streams(&fleet.bus).await.unwrap();
    fleet.until_held(&[]).await;
    assert_eq!(fleet.report("x").await["result"], 1);
    assert_eq!(fleet.report("y").await["result"], 1);
}

#[tokio::test]
async fn the_same_instance_goes_on_after_a_restart_of_nats_and_reports_what_ended_meanwhile() {
    let go = Arc::new(Notify::new());
    let gone = Arc::clone(&go);
    let mut fleet = Fleet::start(
        agent(1),
        worker_fn(move |_| {
            let go = Arc::clone(&gone);
            async move {
                go.notified().await;
                Finish::completed(&"while you were away")
            }
        }),
    )
    .await;
    fleet.dispatch("x", 1, json!(null)).await;
    let last = fleet.next_beat(|_| true).await;
    fleet.server.stop().unwrap();
    go.notify_one();
    fleet.server.start_again().unwrap();
    within("the connection", fleet.bus.connected()).await;
    let beat = fleet.next_beat(|_| true).await;
    assert_eq!(beat["instance_id"], last["instance_id"]);
    assert!(beat["seq"].as_u64() > last["seq"].as_u64());
    assert_eq!(fleet.report("x").await["result"], "while you were away");
    fleet.until_held(&[]).await;
}

#[tokio::test]
async fn a_signal_under_load_lets_finish_what_finishes_and_returns_the_rest() {
    let go = Arc::new(Semaphore::new(0));
    let gone = Arc::clone(&go);
    let fleet = Fleet::start(
        agent(8).drain(Duration::from_secs(1)).stop_grace(DEADLINE),
        worker_fn(move |execution: Execution| {
            let go = Arc::clone(&gone);
            async move {
                if execution.input::<bool>().unwrap() {
                    go.acquire().await.unwrap().forget();
                    return Finish::completed(&"finished");
                }
                execution.stop.asked().await;
                Finish::Stopped(Some(to_raw_value(&execution.attempt).unwrap()))
            }
        }),
    )
    .await;
    for i in 0..8 {
        assert_eq!(fleet.dispatch(&format!("x{i}"), 1, json!(i % 2 == 0)).await["accepted"], true);
    }
    fleet.handle.trigger(&Trigger::Signal(Signal::Term));
    let mut fleet = fleet;
    fleet.beat(|beat| beat["state"] == "draining" && beat["reason"] == "sigterm").await;
    assert_eq!(fleet.dispatch("y", 1, json!(true)).await, json!({"accepted": false, "reason": "draining"}));
    go.add_permits(4);
    for i in 0..8 {
        let report = fleet.report(&format!("x{i}")).await;
        if i % 2 == 0 {
            assert_eq!((&report["outcome"], &report["result"]), (&json!("completed"), &json!("finished")));
        } else {
            assert_eq!((&report["outcome"], &report["checkpoint"]), (&json!("returned"), &json!(1)));
        }
    }
    let gone = fleet.beat(|beat| beat["state"] == "gone").await;
    assert_eq!((ids(&gone), &gone["asked"]), (vec![], &json!(true)));
    let beats = fleet.beats.clone();
    let exit = fleet.exit().await;
    assert_eq!((exit.status, exit.clean, exit.woken_by.as_str()), (0, true, "sigterm"));
    let beats = beats.borrow();
    let after = beats.iter().skip_while(|beat| beat["state"] != "gone").count();
    assert_eq!(after, 1, "nothing after gone");
    let first = beats.iter().position(|beat| beat["state"] == "draining").unwrap();
    assert!(beats[first..].iter().all(|beat| beat["state"] != "ready" && beat["state"] != "busy"));
}

#[tokio::test]
async fn a_second_signal_returns_now_and_a_third_exits_at_once() {
    let term = Trigger::Signal(Signal::Term);
    let fleet = Fleet::start(agent(2).drain(Duration::from_secs(3600)), until_stopped()).await;
    fleet.dispatch("x", 1, json!(null)).await;
    fleet.handle.trigger(&term);
    let mut fleet = fleet;
    let beat = fleet.next_beat(|beat| beat["state"] == "draining").await;
    assert_eq!(ids(&beat), ["x"], "it may finish");
    assert_eq!(beat["asked"], true);
    let beat = fleet.next_beat(|beat| beat["state"] == "draining").await;
    assert_eq!(beat["asked"], true, "each of them");
    fleet.handle.trigger(&term);
    let report = fleet.report("x").await;
    assert_eq!((&report["outcome"], &report["checkpoint"]), (&json!("returned"), &json!({"was": "x"})));
    assert_eq!(fleet.exit().await.status, 0);

    let stuck = worker_fn(|_| std::future::pending::<Finish>());
    let fleet = Fleet::start(agent(1).stop_grace(Duration::from_secs(3600)), stuck).await;
    fleet.dispatch("x", 1, json!(null)).await;
    for _ in 0..3 {
        fleet.handle.trigger(&term);
    }
    let exit = fleet.exit().await;
    assert_eq!((exit.status, exit.clean), (143, false));
}

#[tokio::test]
async fn goodbyes_say_how_to_exit() {
    for (reason, in_flight, status, stay_down) in [
        ("restart", "finish", 75, false),
        ("activity_timeout", "return", 75, false),
        ("superseded", "return", 0, true),
        ("operator", "abort", 0, true),
        ("drain", "return", 0, false),
        ("unknown", "return", 0, false),
        ("of_a_later_version", "return", 0, false),
    ] {
        // A grace of an hour: only an abort, or work that stops when asked, ends in time.
        let fleet = if in_flight == "abort" {
            let deaf = worker_fn(|_| std::future::pending::<Finish>());
            Fleet::start(agent(1).stop_grace(Duration::from_secs(3600)), deaf).await
        } else {
            Fleet::start(agent(1).stop_grace(Duration::from_secs(3600)), until_stopped()).await
        };
        fleet.dispatch("x", 1, json!(null)).await;
        let mut goodbye = json!({"reason": reason, "deadline_ms": 50, "in_flight": in_flight});
        if reason == "unknown" {
            // That is what one is that names none.
            goodbye.as_object_mut().unwrap().remove("reason");
        }
        assert_eq!(fleet.ask(AgentVerb::Goodbye, goodbye).await, json!({"ok": true}));
        assert_eq!(fleet.report("x").await["outcome"], "returned", "{reason}");
        let mut fleet = fleet;
        let reason = if reason == "of_a_later_version" { "unknown" } else { reason };
        assert_eq!(fleet.beat(|beat| beat["state"] == "gone").await["reason"], reason);
        let exit = fleet.exit().await;
        assert_eq!((exit.status, exit.stay_down, exit.woken_by.as_str()), (status, stay_down, reason));
    }
}

#[tokio::test]
async fn a_goodbye_in_the_reply_to_a_heartbeat_is_heard() {
    for (status, reason, woken_by) in
        [("superseded", "superseded", "superseded"), ("connected", "of_a_later_version", "unknown")]
    {
        let goodbye = json!({"reason": reason, "deadline_ms": 0, "in_flight": "return"});
        let answer = json!({"status": status, "interval_ms": 5000,
            "server_time": "2026-11-22T03:04:05.678Z", "goodbye": goodbye});
        let answer: Answer = Arc::new(Mutex::new(answer));
        let fleet = Fleet::start_without_streams(agent(1), until_stopped(), answer).await;
        let exit = fleet.exit().await;
        let stay_down = reason == "superseded";
        assert_eq!((exit.status, exit.stay_down, exit.woken_by.as_str()), (0, stay_down, woken_by));
    }
}

#[tokio::test]
async fn a_farewell_that_is_refused_is_said_again_until_it_is_taken() {
    let answer = nothing_due();
    let mut fleet = Fleet::start_without_streams(agent(1), until_stopped(), Arc::clone(&answer)).await;
    *answer.lock().unwrap() = json!({"error": {"code": "not_ready", "message": "the log is being read"}});
    fleet.handle.trigger(&Trigger::Signal(Signal::Term));
    let gone = |beats: &Vec<Value>| beats.iter().filter(|beat| beat["state"] == "gone").count();
    within("it said again", fleet.beats.wait_for(|beats| gone(beats) >= 2)).await.unwrap();
    *answer.lock().unwrap() = nothing_due().lock().unwrap().clone();
    assert_eq!(fleet.exit().await.status, 0);
}

#[tokio::test]
async fn a_farewell_that_nobody_hears_or_answers_does_not_hold_up_the_exit() {
    let mute = async {
        let answer = nothing_due();
        let fleet = Fleet::start_without_streams(agent(1), until_stopped(), Arc::clone(&answer)).await;
        *answer.lock().unwrap() = Value::Null;
        fleet
    };
    let (mute, mut deaf) = tokio::join!(mute, Fleet::start(agent(1), until_stopped()));
    deaf.server.stop().unwrap();
    for fleet in [&mute, &deaf] {
        fleet.handle.trigger(&Trigger::Signal(Signal::Term));
    }
    let beats = mute.beats.clone();
    let began = Instant::now();
    let exits = tokio::join!(mute.exit(), deaf.exit());
    for exit in [exits.0, exits.1] {
        assert_eq!((exit.status, exit.clean), (0, true), "nothing is left behind, it just could not say so");
    }
    assert_eq!(beats.borrow().last().unwrap()["state"], "gone", "it tried");
    let tries = beats.borrow().iter().filter(|beat| beat["state"] == "gone").count();
    assert!(tries >= 2, "somebody may have been ready for it later: said {tries} times");
    // The 15 s of the contract, and what two busy cores take.
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(14) && took < DEADLINE, "{took:?}");
}

#[tokio::test]
async fn work_that_blocks_its_thread_for_ever_does_not_hold_up_the_exit() {
    // Never sends: it is there so that the work waits for it.
    let (never, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Mutex::new(blocked);
    let started = Arc::new(Notify::new());
    let begun = Arc::clone(&started);
    let worker = worker_fn(move |_| {
        begun.notify_one();
        let _ = blocked.lock().unwrap().recv();
        std::future::pending::<Finish>()
    });
    let fleet = Fleet::start(agent(1).drain(Duration::ZERO), worker).await;
    fleet.dispatch("x", 1, json!(null)).await;
    within("the start of the work", started.notified()).await;
    fleet.handle.shut_down("test");
    // The task ends with everything that the agent owned dropped, its runtime among it.
    let exit = fleet.exit().await;
    assert_eq!((exit.status, exit.clean), (1, false), "it says that something was left behind");
    drop(never);
}

#[tokio::test]
async fn progress_is_in_the_heartbeat() {
    let mut fleet = Fleet::start(
        agent(2),
        worker_fn(|execution: Execution| async move {
            // Another one is quiet: it does not stand still.
            if execution.id.as_str() == "x" {
                execution.progress.set(17);
            }
            execution.stop.asked().await;
            Finish::Stopped(None)
        }),
    )
    .await;
    fleet.dispatch("x", 3, json!(null)).await;
    let beat = fleet.next_beat(|beat| beat["executions"][0]["progress"] == 17.0).await;
    assert_eq!(beat["executions"][0]["attempt"], 3);
    fleet.dispatch("quiet", 1, json!(null)).await;
    let beat = fleet.next_beat(|beat| beat["executions"].as_array().is_some_and(|e| e.len() == 2)).await;
    let quiet = beat["executions"].as_array().unwrap().iter().find(|e| e["id"] == "quiet").unwrap();
    assert!(quiet.get("progress").is_none(), "{beat}");
}
