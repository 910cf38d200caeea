//! A private `redis-server` for tests: no port, a socket in a directory of its own, nothing saved, stopped with its handle.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const START_POLL: Duration = Duration::from_millis(5);

/// A running server.
#[derive(Debug)]
pub struct RedisServer {
    child: Option<Child>,
    directory: tempfile::TempDir,
}

impl RedisServer {
    /// Starts one.
    ///
    /// # Panics
    /// With one line that says what is missing, when there is no `redis-server` or it does not start.
    pub fn start() -> Self {
        let directory = match tempfile::tempdir() {
            Ok(directory) => directory,
            Err(error) => panic!("no temporary directory for redis-server: {error}"),
        };
        let mut server = Self { child: None, directory };
        server.launch();
        server
    }

    /// The URL to connect to.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Stops it at once, as a crash does. Everything in it is lost.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Failing means that it is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again, empty, at the same URL.
    pub fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn launch(&mut self) {
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        let program = server_binary();
        let child = Command::new(&program)
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(&socket)
            .arg("--dir")
            .arg(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => panic!(
                "these tests need {} (scripts/servers finds or installs one; Debian: apt-get install redis-server)",
                program.display()
            ),
            Err(error) => panic!("{} can't be started: {error}", program.display()),
        };
        self.child = Some(child);
        wait_for(&socket);
    }
}

/// The program: `ROLLCALL_REDIS_SERVER`, then the repository's `.rollcall/bin`, then the `PATH`.
fn server_binary() -> PathBuf {
    if let Some(named) = std::env::var_os("ROLLCALL_REDIS_SERVER").filter(|value| !value.is_empty()) {
        return named.into();
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    let installed = repository.map(|root| root.join(".rollcall/bin/redis-server"));
    installed.filter(|file| file.is_file()).unwrap_or_else(|| "redis-server".into())
}

fn wait_for(socket: &Path) {
    let deadline = Instant::now() + START_TIMEOUT;
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "redis-server did not listen on {} in time", socket.display());
        std::thread::sleep(START_POLL);
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}
