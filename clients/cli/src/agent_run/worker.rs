//! One execution as one run of the command.

use std::{
    ffi::OsString, io, os::unix::process::ExitStatusExt, process::ExitStatus, process::Stdio, sync::Arc,
    time::Duration,
};

use nix::sys::signal::Signal;
use rollcall_agent::{Death, Execution, Finish, Worker};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, Command},
    time::timeout,
};

use super::{
    groups::{Group, Groups},
    output::{Tail, Whole, read_into},
};

/// How long output may still come from the group after the command ended, before the rest of the group is killed.
const AFTER_EXIT_BOUND: Duration = Duration::from_millis(500);
/// How long output may still come after the group is gone (from a process that left it and kept the pipe).
const AFTER_DEATH_BOUND: Duration = Duration::from_millis(200);
/// Longest checkpoint that is handed over, in bytes: the system takes 128 KiB for one variable, its name included.
const CHECKPOINT_BYTES_MAX: usize = 127 * 1024;
/// Variables that the command has no business with.
const SECRETS: [&str; 5] = [
    "ROLLCALL_NATS_URL",
    "ROLLCALL_NATS_CREDS",
    "ROLLCALL_NATS_USER",
    "ROLLCALL_NATS_PASSWORD",
    "ROLLCALL_REDIS_URL",
];

/// Runs the command.
#[derive(Debug)]
pub(crate) struct CommandWorker {
    program: OsString,
    arguments: Vec<OsString>,
    groups: Arc<Groups>,
}

impl CommandWorker {
    pub(crate) fn new(program: OsString, arguments: Vec<OsString>, groups: Arc<Groups>) -> Self {
        Self { program, arguments, groups }
    }

    fn command(&self, execution: &Execution) -> Command {
        let mut command = Command::new(&self.program);
        for secret in SECRETS {
            command.env_remove(secret);
        }
        command
            .args(&self.arguments)
            .env("ROLLCALL_EXECUTION_ID", execution.id.as_str())
            .env("ROLLCALL_ATTEMPT", execution.attempt.to_string())
            .env("ROLLCALL_AGENT_ID", execution.agent_id.as_str())
            .env("ROLLCALL_DEADLINE", execution.deadline.to_string());
        match &execution.checkpoint {
            Some(checkpoint) => command.env("ROLLCALL_CHECKPOINT", checkpoint.get()),
            None => command.env_remove("ROLLCALL_CHECKPOINT"),
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }
}

impl Worker for CommandWorker {
    // Dropping the future would lose sight of the process: it ends by itself, and then the group is gone.
    const DEATH: Death = Death::Own;

    async fn run(&self, execution: Execution) -> Finish {
        if let Some(bytes) =
            execution.checkpoint.as_ref().map(|c| c.get().len()).filter(|n| *n > CHECKPOINT_BYTES_MAX)
        {
            return Finish::failed(
                "too_large",
                format!(
                    "the checkpoint has {bytes} bytes, at most {CHECKPOINT_BYTES_MAX} can be handed to a command"
                ),
            );
        }
        let started = self.groups.spawn(&mut self.command(&execution));
        match started {
            Ok((child, group)) => attend(child, &group, &execution).await,
            Err(error) => Finish::failed(
                "not_started",
                format!("{} can't be run: {error}", self.program.to_string_lossy()),
            ),
        }
    }

    fn exit_at_once(&self) {
        self.groups.kill_all();
    }
}

/// From the start of the command to the end of its group.
async fn attend(mut child: Child, group: &Group<'_>, execution: &Execution) -> Finish {
    let (mut out, mut err) = (Whole::default(), Tail::default());
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let ended = {
        let output = async {
            let out = async {
                if let Some(stdout) = stdout {
                    read_into(stdout, &mut out, &execution.progress).await;
                }
            };
            let err = async {
                if let Some(stderr) = stderr {
                    read_into(stderr, &mut err, &execution.progress).await;
                }
            };
            tokio::join!(out, err);
        };
        tokio::pin!(output);
        let feeding = feed(stdin, execution.input.get());
        let mut drained = false;
        let ended = {
            let life = live(&mut child, group, execution);
            tokio::pin!(life, feeding);
            let mut fed = false;
            loop {
                tokio::select! {
                    ended = &mut life => break ended,
                    () = &mut output, if !drained => drained = true,
                    () = &mut feeding, if !fed => fed = true,
                }
            }
        };
        // What the command piped through others may still come; nobody is waited for who just holds the pipe.
        if !drained && !ended.stopped {
            drained = timeout(AFTER_EXIT_BOUND, &mut output).await.is_ok();
        }
        group.end().await;
        if !drained {
            let _ = timeout(AFTER_DEATH_BOUND, &mut output).await;
        }
        ended
    };
    match ended.status {
        _ if ended.stopped => Finish::Stopped(out.into_checkpoint()),
        Ok(status) if status.success() => out.into_result(),
        Ok(status) => failure(status, err),
        Err(error) => Finish::failed("not_waited", format!("the command's end can't be waited for: {error}")),
    }
}

/// Hands the input over. A command that does not read it, or stops reading, is no error.
async fn feed(stdin: Option<ChildStdin>, input: &str) {
    if let Some(mut stdin) = stdin
        && stdin.write_all(input.as_bytes()).await.is_ok()
        && stdin.write_all(b"\n").await.is_ok()
    {
        let _ = stdin.shutdown().await;
    }
}

struct Ended {
    status: io::Result<ExitStatus>,
    /// It was asked to stop before it ended by itself.
    stopped: bool,
}

/// Waits for the leader to end, by itself or because it was stopped.
async fn live(child: &mut Child, group: &Group<'_>, execution: &Execution) -> Ended {
    tokio::select! {
        biased;
        status = child.wait() => return Ended { status, stopped: false },
        () = execution.stop.asked() => {}
    }
    // It may have ended in the same moment: what is finished is finished.
    if let Ok(Some(status)) = child.try_wait() {
        return Ended { status: Ok(status), stopped: false };
    }
    group.signal(Signal::SIGTERM);
    let status = tokio::select! {
        biased;
        status = child.wait() => status,
        () = execution.stop.killed() => {
            group.signal(Signal::SIGKILL);
            return Ended { status: child.wait().await, stopped: true };
        }
    };
    // The grace is for the whole group: a shell may go first while what it started still cleans up.
    tokio::select! {
        () = group.gone() => {}
        () = execution.stop.killed() => {}
    }
    Ended { status, stopped: true }
}

fn failure(status: ExitStatus, err: Tail) -> Finish {
    let (code, text) = match (status.code(), status.signal()) {
        (Some(code), _) => (format!("exit_{code}"), format!("the command exited with status {code}")),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal).map_or_else(|_| signal.to_string(), |s| s.to_string());
            (format!("signal_{signal}"), format!("the command was killed by {name}"))
        }
        (None, None) => ("exit_unknown".to_owned(), "the command ended in an unknown way".to_owned()),
    };
    let said = err.into_message();
    Finish::failed(code, if said.is_empty() { text } else { format!("{text}: {said}") })
}
