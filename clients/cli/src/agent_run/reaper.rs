//! The reaper: a small process beside the agent that kills the agent's process groups when the agent died without doing
//! so itself (`kill -9`, out of memory). It reads `+GROUP` and `-GROUP` lines; their end is the agent's.

use std::{
    collections::BTreeSet,
    io::{self, BufRead},
    os::unix::process::CommandExt,
    process::{ChildStdin, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// The hidden subcommand that this is.
pub(crate) const SUBCOMMAND: &str = "reap-groups";

/// The program that runs now, also when its file was replaced since it started.
const SELF: &str = "/proc/self/exe";

/// Starts it. The returned pipe is its only tie: closing it is the signal.
pub(crate) fn start() -> io::Result<ChildStdin> {
    let mut child = Command::new(SELF)
        .args(["agent", SUBCOMMAND])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C in the terminal must not reach it before it has done its work.
        .process_group(0)
        .spawn()?;
    child.stdin.take().ok_or_else(|| io::Error::other("no pipe to the reaper"))
}

pub(crate) fn line_for(pgid: i32, alive: bool) -> String {
    format!("{}{pgid}\n", if alive { '+' } else { '-' })
}

/// The reaper's main: reads to the end, then kills what is left.
pub(crate) fn reap(input: impl BufRead) {
    for group in left_over(input) {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
}

/// The groups that were begun and not ended. Only groups of others: never 0, 1 or negative numbers.
fn left_over(input: impl BufRead) -> BTreeSet<i32> {
    let mut groups = BTreeSet::new();
    for line in input.lines() {
        let Ok(line) = line else { break };
        match (line.get(..1), line.get(1..).and_then(|n| n.parse::<i32>().ok()).filter(|n| *n > 1)) {
            (Some("+"), Some(group)) => drop(groups.insert(group)),
            (Some("-"), Some(group)) => drop(groups.remove(&group)),
            _ => {}
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_begun_and_not_ended_is_left_over() {
        let input = "+5\n+7\n-5\n+1\n+0\n+-9\nnonsense\n\n+é\n-8\n+9";
        assert_eq!(left_over(input.as_bytes()), BTreeSet::from([7, 9]));
        assert_eq!(line_for(7, true), "+7\n");
        assert_eq!(line_for(7, false), "-7\n");
    }
}
