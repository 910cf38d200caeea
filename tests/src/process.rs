//! Service processes: started as users start them, ended as accidents end them.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait::until;

/// Where the built programs are: `ROLLCALL_BIN_DIR`, else beside this test binary's folder.
///
/// # Panics
/// With one line when a program is not there.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let folder = std::env::var_os("ROLLCALL_BIN_DIR").map_or_else(
        || {
            let own = std::env::current_exe().expect("a running test has a path");
            own.ancestors().nth(2).expect("target/debug/deps/e2e").to_path_buf()
        },
        PathBuf::from,
    );
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run `cargo build` first, or scripts/test", path.display());
    path
}

/// A child process with its output in a file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Option<Child>,
    command: (PathBuf, Vec<String>, Vec<(String, String)>),
    log: PathBuf,
    starts: u32,
}

impl Process {
    /// Starts `program` with these arguments and this environment, its stderr in `folder`.
    ///
    /// # Panics
    /// When it can't be started.
    #[must_use]
    pub fn start(
        name: &str,
        program: &Path,
        args: &[String],
        env: &[(String, String)],
        folder: &Path,
    ) -> Self {
        let mut process = Self {
            name: name.to_owned(),
            child: None,
            command: (program.to_path_buf(), args.to_vec(), env.to_vec()),
            log: folder.join(format!("{name}.log")),
            starts: 0,
        };
        process.start_again();
        process
    }

    /// Starts it again with the same arguments; its log starts anew.
    ///
    /// # Panics
    /// When it runs, or can't be started.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        self.starts += 1;
        self.log.set_extension(format!("{}.log", self.starts));
        let log = File::create(&self.log).expect("the test's folder takes files");
        let (program, args, env) = &self.command;
        let child = Command::new(program)
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file handle"))
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap_or_else(|e| panic!("{} does not start: {e}", program.display())));
    }

    /// What it has written so far.
    #[must_use]
    pub fn output(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = File::open(&self.log) {
            // Half a character at the end is no reason to fail.
            let mut bytes = Vec::new();
            let _ = file.read_to_end(&mut bytes);
            text = String::from_utf8_lossy(&bytes).into_owned();
        }
        text
    }

    /// The process id while it runs.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> Pid {
        let child = self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name));
        Pid::from_raw(i32::try_from(child.id()).expect("a process id"))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself: then there is nobody to tell.
        let _ = kill(self.pid(), signal);
    }

    /// Stops it without ending it, and returns when none of its threads runs any more.
    pub async fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.pid());
        until(&format!("{} to stand still", self.name), Duration::from_secs(10), || async {
            let threads = std::fs::read_dir(&tasks).map_err(|e| e.to_string())?;
            for thread in threads.flatten() {
                let stat = std::fs::read_to_string(thread.path().join("stat")).map_err(|e| e.to_string())?;
                // The state follows the name, which is in parentheses.
                if !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
                    return Err(stat);
                }
            }
            Ok(())
        })
        .await;
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Killing what has ended already fails, and is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end and returns its exit code.
    ///
    /// # Panics
    /// When it has not ended in time.
    pub async fn terminate(&mut self, within: Duration) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.ended(within).await
    }

    /// Waits for its end and returns its exit code.
    ///
    /// # Panics
    /// When it has not ended in time.
    pub async fn ended(&mut self, within: Duration) -> Option<i32> {
        let name = self.name.clone();
        let mut child = self.child.take().unwrap_or_else(|| panic!("{name} does not run"));
        let what = format!("{name} to end");
        let cell = std::cell::RefCell::new(&mut child);
        let status = until(&what, within, || async {
            match cell.borrow_mut().try_wait() {
                Ok(Some(status)) => Ok(status),
                Ok(None) => Err("it runs".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
        status.code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &self.child {
            // A stopped process takes no signal but this one.
            let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap_or(0).max(1)), Signal::SIGCONT);
        }
        self.kill();
        if std::thread::panicking() {
            let output = self.output();
            let tail: Vec<&str> = output.lines().rev().take(30).collect();
            eprintln!("--- {} ---", self.name);
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}
