//! A scripted fleet: a plain NATS client that plays the services.

use std::{
    future::Future,
    io,
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rollcall_core::{
    ids::{AgentId, ExecutionId, InstanceId},
    subject::{AgentVerb, Subjects},
};
use rollcall_nats::{Bus, Reports, ensure_streams, testing::NatsServer};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
    sync::watch,
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come within {DEADLINE:?}"))
}

/// Looks until it is so.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    within(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

pub(crate) fn rollcall() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rollcall"));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("ROLLCALL_")) {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

pub(crate) async fn output(command: &mut Command) -> Output {
    within("the end of the command", command.output()).await.unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// A server, its streams, and a client on it.
pub(crate) struct Stage {
    pub(crate) server: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) subjects: Subjects,
}

impl Stage {
    pub(crate) async fn start() -> Self {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        Self::on(server, bus).await
    }

    /// On a server and with a connection of the caller's.
    pub(crate) async fn on(server: NatsServer, bus: Bus) -> Self {
        ensure_streams(&bus).await.unwrap();
        Self { server, bus, subjects: Subjects::default() }
    }

    /// `rollcall` with these arguments, on this server.
    pub(crate) fn rollcall(&self, arguments: &[&str]) -> Command {
        let mut command = rollcall();
        command.args(arguments).env("ROLLCALL_NATS_URL", self.server.url());
        command
    }

    /// Answers an API verb with whatever `answer` makes of the question.
    pub(crate) async fn serve(&self, verb: &str, answer: impl Fn(Value) -> Value + Send + 'static) {
        let mut requests = self.bus.subscribe(self.subjects.api(verb)).await.unwrap();
        self.bus.flush().await.unwrap();
        let bus = self.bus.clone();
        tokio::spawn(async move {
            while let Some(message) = requests.next().await {
                let question = serde_json::from_slice(&message.payload).unwrap();
                bus.reply(&message, answer(question).to_string().into()).await;
            }
        });
    }
}

/// `rollcall agent run` as a process, and what is heard of it.
pub(crate) struct AgentProcess {
    pub(crate) stage: Arc<Stage>,
    pub(crate) id: AgentId,
    pub(crate) instance: InstanceId,
    pub(crate) child: Child,
    beats: watch::Receiver<Vec<Value>>,
    log: Option<Lines<BufReader<ChildStderr>>>,
}

impl AgentProcess {
    /// Starts it with more options and a shell script as its command.
    pub(crate) async fn start(stage: &Arc<Stage>, options: &[&str], script: &str) -> Self {
        Self::start_as(stage, &[], options, script).await
    }

    /// The same with more variables.
    pub(crate) async fn start_as(
        stage: &Arc<Stage>,
        variables: &[(&str, &str)],
        options: &[&str],
        script: &str,
    ) -> Self {
        Self::launch(stage, variables, options, script, false).await
    }

    /// One whose log is read by the test.
    pub(crate) async fn start_logging(stage: &Arc<Stage>, script: &str) -> Self {
        Self::launch(stage, &[], &[], script, true).await
    }

    async fn launch(
        stage: &Arc<Stage>,
        variables: &[(&str, &str)],
        options: &[&str],
        script: &str,
        logs: bool,
    ) -> Self {
        let id = AgentId::new("a1").unwrap();
        let mut messages = stage.bus.subscribe(stage.subjects.heartbeat(&id)).await.unwrap();
        stage.bus.flush().await.unwrap();
        let (sender, beats) = watch::channel(Vec::<Value>::new());
        let bus = stage.bus.clone();
        tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                let answer = json!({"status": "connected", "interval_ms": 1000, "server_time": "2026-11-22T03:04:05.678Z"});
                bus.reply(&message, answer.to_string().into()).await;
                sender.send_modify(|beats| beats.push(serde_json::from_slice(&message.payload).unwrap()));
            }
        });
        let mut command =
            stage.rollcall(&["agent", "run", "--id", "a1", "--capacity", "4", "--interval-ms", "1000"]);
        command.args(options).args(["--", "/bin/sh", "-c", script]);
        command.envs(variables.iter().copied());
        command.env("ROLLCALL_LOG", if logs { "info" } else { "error" });
        command.stdout(Stdio::null()).stderr(if logs { Stdio::piped() } else { Stdio::inherit() });
        let mut child = command.spawn().unwrap();
        let log = child.stderr.take().map(|stderr| BufReader::new(stderr).lines());
        let mut seen = beats.clone();
        let first =
            within("the first heartbeat", seen.wait_for(|beats| !beats.is_empty())).await.unwrap()[0].clone();
        let instance = InstanceId::new(first["instance_id"].as_str().unwrap()).unwrap();
        Self { stage: Arc::clone(stage), id, instance, child, beats, log }
    }

    /// The next line of its log.
    pub(crate) async fn log_line(&mut self) -> String {
        self.log.as_mut().unwrap().next_line().await.unwrap().expect("it logs on")
    }

    pub(crate) async fn ask(&self, verb: AgentVerb, body: Value) -> Value {
        let subject = self.stage.subjects.agent_request(&self.id, &self.instance, verb);
        let reply = self.stage.bus.request(subject, body.to_string().into(), DEADLINE).await.unwrap();
        serde_json::from_slice(&reply.payload).unwrap()
    }

    pub(crate) async fn dispatch(&self, id: &str, input: Value) {
        let body = json!({"execution_id": id, "attempt": 1, "timeout_ms": 60_000,
            "deadline": "2026-11-22T03:04:05.678Z", "input": input, "checkpoint": {"step": 3}});
        assert_eq!(self.ask(AgentVerb::Dispatch, body).await, json!({"accepted": true}));
    }

    pub(crate) async fn terminate(&self, id: &str, grace_ms: u64) -> Value {
        let body = json!({"execution_id": id, "attempt": 1, "reason": "timed_out", "grace_ms": grace_ms});
        self.ask(AgentVerb::Terminate, body).await["state"].clone()
    }

    pub(crate) async fn report(&self, id: &str) -> Value {
        let subject = self.stage.subjects.report(&self.id, &ExecutionId::new(id).unwrap());
        within("a report", async {
            loop {
                if let Ok(Some(entry)) = Reports::new(&self.stage.bus).last(&subject).await {
                    return serde_json::from_slice(&entry.bytes).unwrap();
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
    }

    /// Dispatches and waits for the report.
    pub(crate) async fn run(&self, id: &str, input: Value) -> Value {
        self.dispatch(id, input).await;
        self.report(id).await
    }

    pub(crate) async fn beat(&mut self, is: impl Fn(&Value) -> bool) -> Value {
        let beats = within("a heartbeat", self.beats.wait_for(|beats| beats.iter().any(&is))).await.unwrap();
        beats.iter().find(|beat| is(beat)).unwrap().clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().expect("it runs")).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    pub(crate) async fn exit_status(&mut self) -> Option<i32> {
        within("the exit", self.child.wait()).await.unwrap().code()
    }
}

/// Reads process ids, one a line, once there are as many as expected.
pub(crate) async fn pids(file: &std::path::Path, expected: usize) -> Vec<i32> {
    let read = || -> io::Result<Vec<i32>> {
        Ok(std::fs::read_to_string(file)?.lines().filter_map(|line| line.parse().ok()).collect())
    };
    until("the process ids", || read().is_ok_and(|pids| pids.len() == expected)).await;
    read().unwrap()
}
