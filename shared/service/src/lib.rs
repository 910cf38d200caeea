//! What every service does the same way: settings, logs, metrics, health, signals, exit codes.
//!
//! A service's `main` is [`run_main`] with a [`Program`] and an async function that gets a [`Context`].

pub mod admin;
pub mod cidr;
pub mod clock;
pub mod exit;
pub mod health;
pub mod healthcheck;
pub mod lag;
mod panics;
pub mod run;
pub mod settings;
pub mod telemetry;

pub use cidr::Cidr;
pub use health::{LoopBeat, Readiness};
pub use lag::{Jump, LoopHealth, Stall};
pub use run::{Context, DRAIN_TIMEOUT, Program, run_main};
pub use settings::{LogFormat, Secret, Settings, SettingsError};
