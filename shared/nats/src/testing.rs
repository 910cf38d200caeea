//! A private nats-server for tests: JetStream on, a port of the kernel's choice, its store in a temporary folder.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::bus::{Bus, BusOptions};

/// How long a server may take to start or to stop.
const DEADLINE: Duration = Duration::from_secs(20);
/// How often a start or a stop is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum TestServerError {
    /// No binary.
    #[error("nats-server not found: run scripts/servers, or name it in ROLLCALL_NATS_SERVER")]
    Missing,
    /// It does not start or stop in time.
    #[error("nats-server {0} within {DEADLINE:?}")]
    Slow(&'static str),
    /// It ended at once; what it wrote.
    #[error("nats-server ended: {0}")]
    Ended(String),
    /// Files or processes.
    #[error("nats-server can't be run")]
    Io(#[from] io::Error),
}

/// Finds the binary: `ROLLCALL_NATS_SERVER`, then the repository's `.rollcall/bin`, then the `PATH`.
///
/// # Errors
/// [`TestServerError::Missing`].
pub fn server_binary() -> Result<PathBuf, TestServerError> {
    if let Some(named) = std::env::var_os("ROLLCALL_NATS_SERVER").filter(|value| !value.is_empty()) {
        let named = PathBuf::from(named);
        return if named.is_file() { Ok(named) } else { Err(TestServerError::Missing) };
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_owned);
    let installed = repository.map(|root| root.join(".rollcall/bin/nats-server"));
    let on_path = std::env::var_os("PATH").into_iter().flat_map(|path| {
        std::env::split_paths(&path).map(|folder| folder.join("nats-server")).collect::<Vec<_>>()
    });
    installed.into_iter().chain(on_path).find(|file| file.is_file()).ok_or(TestServerError::Missing)
}

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct NatsServer {
    folder: TempDir,
    config: Option<String>,
    child: Option<Child>,
    port: u16,
}

impl NatsServer {
    /// Starts one with JetStream and nothing else configured.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn start() -> Result<Self, TestServerError> {
        Self::start_with(None)
    }

    /// Starts one with these lines of configuration.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn start_with(config: Option<&str>) -> Result<Self, TestServerError> {
        let mut server =
            Self { folder: TempDir::new()?, config: config.map(str::to_owned), child: None, port: 0 };
        server.run()?;
        Ok(server)
    }

    /// `nats://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Its port, the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// A bus on this server.
    ///
    /// # Panics
    /// When there is no connection; tests have nothing better to do.
    pub async fn bus(&self, prefix: &str) -> Bus {
        let options = BusOptions {
            url: self.url(),
            prefix: prefix.to_owned(),
            connection_name: "test".to_owned(),
            ..BusOptions::default()
        };
        Bus::connect(options, CancellationToken::new()).await.expect("the test server was just started")
    }

    /// Ends it in order, keeping port and store.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn stop(&mut self) -> Result<(), TestServerError> {
        self.end(Signal::SIGTERM)
    }

    /// Ends it at once, keeping port and store.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn kill(&mut self) -> Result<(), TestServerError> {
        self.end(Signal::SIGKILL)
    }

    /// Has it stand still: connections stay, and nothing passes.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn freeze(&self) -> Result<(), TestServerError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn thaw(&self) -> Result<(), TestServerError> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), TestServerError> {
        let Some(child) = &self.child else { return Ok(()) };
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(kill(Pid::from_raw(pid), signal).map_err(io::Error::from)?)
    }

    /// Starts it again on the same port and store. It must not be running.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn start_again(&mut self) -> Result<(), TestServerError> {
        if self.child.is_none() { self.run() } else { Ok(()) }
    }

    /// Other lines of configuration from its next start on.
    pub fn configure(&mut self, config: Option<&str>) {
        self.config = config.map(str::to_owned);
    }

    /// Stops and starts it on the same port and store.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn restart(&mut self) -> Result<(), TestServerError> {
        self.stop()?;
        self.start_again()
    }

    /// Stops it, throws its store away and starts it on the same port.
    ///
    /// # Errors
    /// See [`TestServerError`].
    pub fn restart_empty(&mut self) -> Result<(), TestServerError> {
        self.stop()?;
        std::fs::remove_dir_all(self.folder.path().join("store"))?;
        self.start_again()
    }

    /// Starts it. Its port is one that the kernel also gives to clients: while it was down somebody may have got it for a
    /// moment.
    fn run(&mut self) -> Result<(), TestServerError> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.run_once() {
                Err(TestServerError::Ended(log))
                    if log.contains("address already in use") && Instant::now() < deadline =>
                {
                    std::thread::sleep(LOOK_INTERVAL);
                }
                other => return other,
            }
        }
    }

    fn run_once(&mut self) -> Result<(), TestServerError> {
        let folder = self.folder.path().to_owned();
        let log = std::fs::File::create(folder.join("log"))?;
        let mut command = Command::new(server_binary()?);
        command.args(["-js", "-a", "127.0.0.1", "-sd"]).arg(folder.join("store"));
        command.args(["-p", &if self.port == 0 { "-1".to_owned() } else { self.port.to_string() }]);
        command.arg("--ports_file_dir").arg(&folder);
        if let Some(config) = &self.config {
            let file = folder.join("nats.conf");
            std::fs::write(&file, config)?;
            command.arg("-c").arg(file);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(TestServerError::Io)?;
        let ports = folder.join(format!("nats-server_{}.ports", child.id()));
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(port) = std::fs::read(&ports).ok().and_then(|text| read_port(&text)) {
                self.port = port;
                self.child = Some(child);
                return Ok(());
            }
            if child.try_wait()?.is_some() {
                let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
                return Err(TestServerError::Ended(log));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(TestServerError::Slow("did not start"));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn end(&mut self, signal: Signal) -> Result<(), TestServerError> {
        self.signal(signal)?;
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let deadline = Instant::now() + DEADLINE;
        while child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(TestServerError::Slow("did not stop"));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[derive(serde::Deserialize)]
struct Ports {
    nats: Vec<String>,
}

fn read_port(text: &[u8]) -> Option<u16> {
    let ports: Ports = serde_json::from_slice(text).ok()?;
    ports.nats.first()?.rsplit(':').next()?.parse().ok()
}
