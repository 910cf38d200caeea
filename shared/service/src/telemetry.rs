//! Logs to stderr, metrics to `/metrics`.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::ChronoUtc;
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::LogFormat;

/// Libraries that log their own life at info; ours say what matters of it. A filter of the user's own wins.
const QUIET: &str = "async_nats=warn,hyper=warn";
/// Upper bounds of histogram buckets, in seconds: from a function call to a minute.
const BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// How often old histogram samples are folded away.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Logs or metrics can't be set up; a second set-up in one process is the usual reason.
#[derive(Debug, thiserror::Error)]
#[error("telemetry can't be set up: {0}")]
pub struct TelemetryError(String);

/// Starts logging, once per process.
///
/// # Errors
/// See [`TelemetryError`].
pub fn init_logs(filter: &str, format: LogFormat) -> Result<(), TelemetryError> {
    let failed = |error: &dyn std::fmt::Display| TelemetryError(error.to_string());
    let filter = EnvFilter::try_new(format!("{QUIET},{filter}")).map_err(|error| failed(&error))?;
    let text = match format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => stderr().is_terminal(),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(ChronoUtc::new("%Y-%m-%dT%H:%M:%S%.3fZ".to_owned()))
        .with_writer(stderr);
    if text {
        builder.with_ansi(stderr().is_terminal()).finish().try_init().map_err(|error| failed(&error))
    } else {
        builder.json().flatten_event(true).finish().try_init().map_err(|error| failed(&error))
    }
}

/// Installs the metrics recorder, once per process, and keeps it tidy. Needs a runtime.
///
/// # Errors
/// See [`TelemetryError`].
pub fn init_metrics() -> Result<PrometheusHandle, TelemetryError> {
    let failed = |error: &dyn std::fmt::Display| TelemetryError(error.to_string());
    let handle = PrometheusBuilder::new()
        .set_buckets(&BUCKETS)
        .map_err(|error| failed(&error))?
        .install_recorder()
        .map_err(|error| failed(&error))?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            tick.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(handle)
}
