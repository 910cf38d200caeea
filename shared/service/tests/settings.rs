//! Loading settings: layers, bounds, and that everything wrong is said at once.

// The lint's exception for tests knows only functions marked as such.
#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use rollcall_service::settings::{Kind, Loaded, VARIABLES, help_table};
use rollcall_service::{Settings, SettingsError};

fn load(environment: &[(&str, &str)]) -> Result<Loaded, SettingsError> {
    Settings::load_from(
        "dispatcher",
        environment.iter().map(|(name, value)| ((*name).into(), (*value).into())),
    )
}

fn names(error: &SettingsError) -> Vec<&str> {
    error.problems.iter().map(|problem| problem.name.as_str()).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn the_defaults_are_the_protocols() {
    let settings = load(&[]).unwrap().settings;
    assert_eq!(settings.nats_url.reveal(), "nats://127.0.0.1:4222");
    assert_eq!(settings.prefix, "rollcall");
    assert_eq!(settings.admin_addr, "127.0.0.1:9102".parse().unwrap());
    assert_eq!(settings.heartbeat_interval, Duration::from_secs(5));
    assert_eq!((settings.failure_threshold, settings.success_threshold), (3, 2));
    assert_eq!(settings.stale_after, Duration::from_secs(7200));
    assert_eq!((settings.queue_depth, settings.breaker_min_agents), (50, 3));
    assert!((settings.breaker_fraction - 0.5).abs() < f64::EPSILON);
    assert!(settings.allow_cidrs.is_empty() && settings.agents_file.is_none());
    for (service, port) in [("health-prober", 9101), ("watchdog", 9103), ("notifier", 9104)] {
        assert_eq!(Settings::defaults(service).admin_addr.port(), port);
    }
}

/// What the systems before this one did by default, to the second.
#[test]
fn the_times_that_others_kept_are_the_defaults() {
    let settings = load(&[]).unwrap().settings;
    let minutes = |n: u64| Duration::from_secs(n * 60);
    assert_eq!(settings.probe_interval, Duration::from_secs(30));
    assert_eq!((settings.dispatch_grace, settings.lost_after), (minutes(1), minutes(1)));
    assert_eq!((settings.default_timeout, settings.stale_after), (minutes(15), minutes(120)));
    assert_eq!((settings.cycle_interval, settings.audit_interval), (minutes(1) / 2, minutes(1) / 2));
    assert_eq!(settings.forget_after, minutes(24 * 60));
}

#[test]
fn all_that_is_wrong_is_named_at_once_with_value_and_reason() {
    let error = load(&[
        ("ROLLCALL_PREFIX", "a.b"),
        ("ROLLCALL_PROBE_INTERVAL_MS", "0"),
        ("ROLLCALL_FAILURE_THRESHOLD", "0"),
        ("ROLLCALL_BREAKER_FRACTION", "1.5"),
        ("ROLLCALL_HTTP_ADDR", "localhost"),
        ("ROLLCALL_ALLOW_CIDRS", "10.0.0.0/8, 8.8.8.0/24"),
        ("ROLLCALL_QUEUE_TTL_MS", "soon"),
        ("ROLLCALL_NATS_URL", "http://joe:s3cret@x"),
        ("ROLLCALL_REDIS_URL", "http://x"),
        ("ROLLCALL_LOG", "info,=nonsense=,["),
        ("ROLLCALL_LOG_FORMAT", "xml"),
    ])
    .unwrap_err();
    let mut found = names(&error);
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "ROLLCALL_ALLOW_CIDRS",
            "ROLLCALL_BREAKER_FRACTION",
            "ROLLCALL_FAILURE_THRESHOLD",
            "ROLLCALL_HTTP_ADDR",
            "ROLLCALL_LOG",
            "ROLLCALL_LOG_FORMAT",
            "ROLLCALL_NATS_URL",
            "ROLLCALL_PREFIX",
            "ROLLCALL_PROBE_INTERVAL_MS",
            "ROLLCALL_QUEUE_TTL_MS",
            "ROLLCALL_REDIS_URL",
        ]
    );
    let text = error.to_string();
    assert!(text.starts_with("11 bad settings:"), "{text}");
    assert!(
        text.contains(r#"ROLLCALL_PROBE_INTERVAL_MS = "0": must be a whole number from 10 to"#),
        "{text}"
    );
    assert!(text.contains("8.8.8.0/24 is neither private"), "{text}");
    assert!(!text.contains("s3cret"), "{text}");
}

#[test]
fn every_number_refuses_zero_unless_zero_means_something_and_nothing_overflows() {
    for variable in VARIABLES {
        let zero = load(&[(variable.name, "0")]).is_ok();
        let may = [
            "ROLLCALL_ACTIVITY_TIMEOUT_MS",
            "ROLLCALL_DISPATCH_GRACE_MS",
            "ROLLCALL_TERMINATE_GRACE_MS",
            "ROLLCALL_QUEUE_DEPTH",
        ];
        // Free text takes a 0 as text.
        let text = ["NATS_CREDS", "NATS_USER", "PREFIX", "AGENTS_FILE"]
            .iter()
            .any(|key| variable.name.ends_with(key));
        let host = variable.name == "ROLLCALL_NATS_URL" || variable.name == "ROLLCALL_LOG";
        assert_eq!(zero, may.contains(&variable.name) || text || (host && zero), "{}", variable.name);
        if variable.name.ends_with("_MS") {
            for bad in ["-1", "1.5", "18446744073709551615", "99999999999999999999", "1e3", ""] {
                assert_eq!(
                    load(&[(variable.name, bad)]).is_ok(),
                    bad.is_empty(),
                    "{} = {bad}",
                    variable.name
                );
            }
        }
    }
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
    let file = file(
        "queue_depth = 7\nprefix = \"from-file\"\nbreaker_fraction = 0.25\nallow_cidrs = [\"10.0.0.0/8\", \"127.0.0.0/8\"]\n",
    );
    let path = file.path().to_str().unwrap();
    let settings =
        load(&[("ROLLCALL_CONFIG", path), ("ROLLCALL_PREFIX", "from-env"), ("ROLLCALL_QUEUE_DEPTH", "")])
            .unwrap()
            .settings;
    assert_eq!(settings.prefix, "from-env");
    assert_eq!(settings.queue_depth, 7, "an empty variable is unset");
    assert!((settings.breaker_fraction - 0.25).abs() < f64::EPSILON);
    assert_eq!(settings.allow_cidrs.len(), 2);
    assert_eq!(settings.recovery_rate, 100);
}

#[test]
fn a_file_with_mistakes_says_which() {
    let bad = file("queue_depht = 7\nprefix = \"a b\"\nqueue_ttl_ms = { a = 1 }\n");
    let path = bad.path().to_str().unwrap();
    let error = load(&[("ROLLCALL_CONFIG", path)]).unwrap_err();
    assert_eq!(
        names(&error),
        [format!("queue_depht in {path}"), format!("queue_ttl_ms in {path}"), format!("prefix in {path}")]
    );
    let broken = file("queue_depth = \n");
    let error = load(&[("ROLLCALL_CONFIG", broken.path().to_str().unwrap())]).unwrap_err();
    assert!(names(&error)[0].starts_with("ROLLCALL_CONFIG"), "{error}");
    let error = load(&[("ROLLCALL_CONFIG", "/nonexistent/rollcall.toml")]).unwrap_err();
    assert_eq!(error.problems.len(), 1);
    assert_eq!(names(&error), ["ROLLCALL_CONFIG (/nonexistent/rollcall.toml)"]);
    assert_eq!(error.problems[0].why, "there is no such file");
}

#[test]
fn unknown_variables_are_a_warning_and_foreign_ones_nothing() {
    let loaded = load(&[
        ("ROLLCALL_QUEUE_DEPHT", "1"),
        ("ROLLCALL_TEST_X", "1"),
        ("ROLLCALL_NATS_SERVER", "/x"),
        ("HOME", "/root"),
    ])
    .unwrap();
    assert_eq!(loaded.warnings, ["ROLLCALL_QUEUE_DEPHT is no setting and is ignored"]);
}

#[test]
fn what_is_wrong_together_is_named() {
    let error =
        load(&[("ROLLCALL_PROBE_INTERVAL_MS", "1000"), ("ROLLCALL_PROBE_TIMEOUT_MS", "1001")]).unwrap_err();
    assert_eq!(names(&error), ["ROLLCALL_PROBE_TIMEOUT_MS"]);
    let file = file("probe_timeout_ms = 1001\n");
    let path = file.path().to_str().unwrap();
    let error = load(&[("ROLLCALL_PROBE_INTERVAL_MS", "1000"), ("ROLLCALL_CONFIG", path)]).unwrap_err();
    assert_eq!(names(&error), [format!("probe_timeout_ms in {path}")]);
    let error = load(&[("ROLLCALL_NATS_PASSWORD", "s3cret")]).unwrap_err();
    assert_eq!(names(&error), ["ROLLCALL_NATS_PASSWORD"]);
    assert!(!error.to_string().contains("s3cret"));
    let error = load(&[("ROLLCALL_NATS_USER", "u"), ("ROLLCALL_NATS_CREDS", "/f")]).unwrap_err();
    assert_eq!(names(&error), ["ROLLCALL_NATS_USER"]);
}

#[test]
fn a_default_gives_way_to_what_was_given() {
    let millis = Duration::from_millis;
    let settings = load(&[("ROLLCALL_PROBE_INTERVAL_MS", "1000")]).unwrap().settings;
    assert_eq!((settings.probe_interval, settings.probe_timeout), (millis(1000), millis(1000)));
    let settings = load(&[("ROLLCALL_PROBE_TIMEOUT_MS", "40000")]).unwrap().settings;
    assert_eq!((settings.probe_interval, settings.probe_timeout), (millis(40_000), millis(40_000)));
    // Whatever one setting may be on its own, it may be without any other.
    for variable in VARIABLES {
        let (Kind::Count(low, high) | Kind::Millis(low, high)) = variable.kind else { continue };
        for bound in [low, high] {
            let loaded = load(&[(variable.name, &bound.to_string())]);
            assert!(loaded.is_ok(), "{} = {bound}: {loaded:?}", variable.name);
        }
    }
}

#[test]
fn secrets_are_kept_as_given_and_never_printed() {
    let settings = load(&[
        ("ROLLCALL_NATS_USER", "u"),
        ("ROLLCALL_NATS_PASSWORD", "00123"),
        ("ROLLCALL_NATS_URL", "nats://u:geheim@h:4222"),
        ("ROLLCALL_REDIS_URL", "redis://:geheim@h:6379"),
    ])
    .unwrap()
    .settings;
    assert_eq!(settings.nats_password.as_ref().unwrap().reveal(), "00123");
    let shown = format!("{settings:?} {:?}", settings.bus_options("x"));
    assert!(!shown.contains("00123") && !shown.contains("geheim"), "{shown}");
}

#[test]
fn a_value_that_is_no_text_is_named() {
    let environment = [(OsString::from("ROLLCALL_PREFIX"), OsString::from_vec(vec![0xff, 0xfe]))];
    let error = Settings::load_from("dispatcher", environment).unwrap_err();
    assert_eq!(names(&error), ["ROLLCALL_PREFIX"]);
}

#[test]
fn help_names_every_setting_with_its_default() {
    let help = help_table("watchdog");
    for variable in VARIABLES {
        assert!(help.contains(variable.name), "{}", variable.name);
    }
    assert!(help.contains("127.0.0.1:9103"));
}
