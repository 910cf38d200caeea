//! The process groups that are alive: killed as a whole, and made sure of.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    process::ChildStdin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::Pid,
};
use tokio::process::{Child, Command};
use tokio_util::task::AbortOnDropHandle;

use super::reaper;

/// How often a group that was killed is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How often processes that left their group and lost their parents are reaped.
const STRAY_INTERVAL: Duration = Duration::from_secs(1);
/// Strays reaped in one go.
const STRAYS_MAX: usize = 256;

/// All process groups of this agent.
#[derive(Debug)]
pub(crate) struct Groups {
    alive: Mutex<BTreeSet<i32>>,
    /// Tells the reaper what to kill when this process dies without a word.
    reaper: Mutex<Option<ChildStdin>>,
}

impl Groups {
    /// No groups yet. Orphans of groups become children of this process, so that it can reap them and know.
    pub(crate) fn start() -> Self {
        if let Err(error) = set_child_subreaper(true) {
            tracing::warn!(%error, "orphans can't be reaped here, the system has to");
        }
        let reaper = match reaper::start() {
            Ok(stdin) => Some(stdin),
            Err(error) => {
                tracing::warn!(%error, "no reaper: commands would outlive a kill -9 of this agent");
                None
            }
        };
        Self { alive: Mutex::default(), reaper: Mutex::new(reaper) }
    }

    /// Starts `command` as the leader of a group of its own.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(Child, Group<'_>)> {
        // The lock is held over the start, so that nobody takes the new child for a stray.
        let mut alive = lock(&self.alive);
        let child = command.process_group(0).spawn()?;
        let leader = child.id().ok_or_else(|| io::Error::other("it has no process id"))?;
        let pgid = i32::try_from(leader).map_err(io::Error::other)?;
        alive.insert(pgid);
        drop(alive);
        self.tell_reaper(reaper::line_for(pgid, true));
        Ok((child, Group { pgid, groups: self }))
    }

    fn tell_reaper(&self, line: String) {
        let mut reaper = lock(&self.reaper);
        let Some(stdin) = reaper.as_mut() else { return };
        // A few bytes into a pipe that is read at once: does not block.
        if let Err(error) = stdin.write_all(line.as_bytes()) {
            tracing::warn!(%error, "the reaper is gone: commands would outlive a kill -9 of this agent");
            *reaper = None;
        }
    }

    /// SIGKILL to every group, without waiting for anything.
    pub(crate) fn kill_all(&self) {
        for pgid in lock(&self.alive).iter() {
            let _ = killpg(Pid::from_raw(*pgid), Signal::SIGKILL);
        }
    }

    /// Reaps, from time to time, what left its group before it was orphaned, until the handle is dropped.
    pub(crate) fn reap_strays(self: &std::sync::Arc<Self>) -> AbortOnDropHandle<()> {
        let groups = std::sync::Arc::clone(self);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut tick = tokio::time::interval(STRAY_INTERVAL);
            loop {
                tick.tick().await;
                for _ in 0..STRAYS_MAX {
                    if !groups.reap_one_stray() {
                        break;
                    }
                }
            }
        }))
    }

    /// Looks at a dead child without reaping it: a leader's status belongs to whoever waits for it.
    fn reap_one_stray(&self) -> bool {
        let alive = lock(&self.alive);
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) = waitid(Id::All, look) else {
            return false;
        };
        !alive.contains(&pid.as_raw()) && waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_ok()
    }
}

/// One process group; forgotten when dropped, which must only happen once it is gone.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    pgid: i32,
    groups: &'a Groups,
}

impl Group<'_> {
    /// Sends a signal to everything in it.
    pub(crate) fn signal(&self, signal: Signal) {
        match killpg(Pid::from_raw(self.pgid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                tracing::warn!(group = self.pgid, %signal, %error, "a process group can't be signalled")
            }
        }
    }

    /// Whether there is nothing in it any more, not even a dead process that nobody reaped.
    pub(crate) fn is_gone(&self) -> bool {
        // Its orphans are our children (see `start`). Its leader was reaped by whoever waited for it.
        while let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) =
            waitpid(Pid::from_raw(-self.pgid), Some(WaitPidFlag::WNOHANG))
        {}
        killpg(Pid::from_raw(self.pgid), None) == Err(Errno::ESRCH)
    }

    /// Waits until it is gone by itself.
    pub(crate) async fn gone(&self) {
        while !self.is_gone() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Kills what is left of it and returns once it is gone. Does not give up: as long as it lives, it lives.
    pub(crate) async fn end(&self) {
        while !self.is_gone() {
            self.signal(Signal::SIGKILL);
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        lock(&self.groups.alive).remove(&self.pgid);
        // Left to the reaper if it still lives (the runtime is being torn down).
        if self.is_gone() {
            self.groups.tell_reaper(reaper::line_for(self.pgid, false));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Sets and pipes are not left half changed by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
