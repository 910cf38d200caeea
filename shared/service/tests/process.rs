//! The common main as a process: exit codes, signals, admin pages, the healthcheck subcommand.

// The lint's exception for tests knows only functions marked as such.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rollcall_nats::testing::NatsServer;
use rollcall_service::run::NATS_CONDITION;

const DEADLINE: Duration = Duration::from_secs(30);
const READY: &str = r#"{"ready":true}"#;

/// The probe with nothing of our own environment.
fn probe(environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rollcall-service-probe"));
    command.env_clear().envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(environment: &[(&str, &str)], arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = probe(environment).args(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A probe that runs; killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Running {
    fn start(environment: &[(&str, &str)]) -> Self {
        let mut all = vec![("ROLLCALL_ADMIN_ADDR", "127.0.0.1:0")];
        all.extend(environment);
        let mut child = probe(&all).spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: String::new() }
    }

    /// Waits for a log line with this text.
    fn line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line =
                self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("no {text:?} in:\n{}", self.seen));
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The admin address it chose.
    fn address(&mut self) -> String {
        let line = self.line("admin pages");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        line["address"].as_str().unwrap().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "still running:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get(address: &str, path: &str) -> (u16, String) {
    use std::io::Write;
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

/// Waits until `/readyz` answers with this status and body.
fn readyz(address: &str, wanted: u16, wanted_body: &str) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let (status, body) = get(address, "/readyz");
        if status == wanted && body == wanted_body {
            return;
        }
        assert!(Instant::now() < deadline, "{status} {body}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn bad_settings_exit_64_before_anything_with_all_of_them_named() {
    let (code, out, err) = run(&[("ROLLCALL_PREFIX", "a.b"), ("ROLLCALL_QUEUE_DEPTH", "x")], &[]);
    assert_eq!(code, Some(64), "{err}");
    assert!(err.contains("ROLLCALL_PREFIX") && err.contains("ROLLCALL_QUEUE_DEPTH"), "{err}");
    assert!(out.is_empty() && !err.contains("starting"));
}

#[test]
fn bad_arguments_exit_64_and_help_and_version_0() {
    assert_eq!(run(&[], &["--nonsense"]).0, Some(64));
    let (code, out, _) = run(&[], &["--help"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("ROLLCALL_BREAKER_MIN_AGENTS") && out.contains("healthcheck"), "{out}");
    let (code, out, _) = run(&[("ROLLCALL_PREFIX", "a.b")], &["--version"]);
    assert_eq!((code, out.contains(env!("CARGO_PKG_VERSION"))), (Some(0), true));
}

#[test]
fn a_failing_service_exits_1_and_says_why() {
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "fail")]);
    running.line("it did not work");
    assert_eq!(running.exit_code(), Some(1));
}

#[test]
fn a_panic_in_any_task_exits_70_and_is_logged() {
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "panic")]);
    running.line("a task died");
    assert_eq!(running.exit_code(), Some(70));
}

#[test]
fn a_panic_of_one_request_is_logged_and_nothing_ends() {
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "caught")]);
    let address = running.address();
    running.line("panic in a request");
    readyz(&address, 200, READY);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.exit_code(), Some(0));
}

#[test]
fn a_loop_that_does_not_turn_is_unhealthy_by_name() {
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "wedged")]);
    let address = running.address();
    readyz(&address, 200, READY);
    let deadline = Instant::now() + DEADLINE;
    while get(&address, "/healthz") != (503, r#"{"healthy":false,"wedged":["shell"]}"#.to_owned()) {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn an_address_that_is_taken_exits_1_and_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, _, err) = run(&[("ROLLCALL_ADMIN_ADDR", &address)], &[]);
    assert_eq!(code, Some(1));
    assert!(err.contains(&address) && err.contains("ROLLCALL_ADMIN_ADDR"), "{err}");
}

#[test]
fn both_signals_drain_and_exit_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut running = Running::start(&[]);
        let start = running.line("starting");
        assert!(start.contains("instance_id") && start.contains(env!("CARGO_PKG_VERSION")), "{start}");
        let address = running.address();
        readyz(&address, 200, READY);
        running.signal(signal);
        assert_eq!(running.exit_code(), Some(0), "{signal}");
    }
}

#[test]
fn a_second_signal_ends_a_drain_that_hangs() {
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "hang")]);
    let address = running.address();
    readyz(&address, 503, r#"{"ready":false,"waiting_for":["replay"]}"#);
    running.signal(Signal::SIGTERM);
    running.line("draining");
    readyz(&address, 503, r#"{"ready":false,"waiting_for":["replay","running"]}"#);
    running.signal(Signal::SIGTERM);
    running.line("second signal");
    assert_eq!(running.exit_code(), Some(1));
}

#[test]
fn a_drain_that_hangs_ends_within_its_bound() {
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "hang")]);
    running.line("admin pages");
    let started = Instant::now();
    running.signal(Signal::SIGTERM);
    assert_eq!(running.exit_code(), Some(1));
    let took = started.elapsed();
    assert!(took >= rollcall_service::DRAIN_TIMEOUT && took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn health_readiness_and_metrics_are_served_and_the_healthcheck_agrees() {
    let mut server = NatsServer::start().unwrap();
    let url = server.url();
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "nats"), ("ROLLCALL_NATS_URL", &url)]);
    let address = running.address();
    readyz(&address, 200, READY);
    assert_eq!(get(&address, "/healthz").0, 200);
    let (status, metrics) = get(&address, "/metrics");
    assert_eq!(status, 200);
    assert!(metrics.contains("rollcall_bus_connected 1"), "{metrics}");
    assert_eq!(get(&address, "/nothing").0, 404);
    let healthcheck = |address: &str| run(&[("ROLLCALL_ADMIN_ADDR", address)], &["healthcheck"]);
    assert_eq!(healthcheck(&address).0, Some(0));

    server.stop().unwrap();
    readyz(&address, 503, &format!(r#"{{"ready":false,"waiting_for":["{NATS_CONDITION}"]}}"#));
    let (code, _, err) = healthcheck(&address);
    assert_eq!(code, Some(1));
    assert!(err.contains(NATS_CONDITION), "{err}");
    server.start_again().unwrap();
    readyz(&address, 200, READY);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.exit_code(), Some(0));
    assert_eq!(healthcheck(&address).0, Some(1), "nobody there any more");
}

#[test]
fn a_signal_while_waiting_for_nats_is_an_orderly_end() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("nats://{gone}");
    let mut running = Running::start(&[("ROLLCALL_TEST_PROBE", "nats"), ("ROLLCALL_NATS_URL", &url)]);
    running.line("waiting for nats");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.exit_code(), Some(0));
}
