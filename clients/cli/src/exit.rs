//! What the exit status means. `rollcall --help` prints this table.

use rollcall_service::settings::help_table;

/// Done.
pub(crate) const OK: u8 = 0;
/// It failed, or was refused.
pub(crate) const FAILED: u8 = 1;
/// The arguments are wrong (clap's own status).
pub(crate) const USAGE: u8 = 2;
/// There is no such execution or agent.
pub(crate) const NOT_FOUND: u8 = 3;
/// `--wait`: it ended cancelled.
pub(crate) const CANCELLED: u8 = 4;
/// `--wait`: it waited in the queue for too long.
pub(crate) const EXPIRED: u8 = 5;
/// `--wait`: it was lost too often.
pub(crate) const QUARANTINED: u8 = 6;
/// Settings are wrong (`EX_USAGE`, as in every program of Rollcall).
pub(crate) const SETTINGS: u8 = 64;
/// NATS or the service does not answer, or is not ready (`EX_UNAVAILABLE`).
pub(crate) const UNAVAILABLE: u8 = 69;
/// Refused for now, try again later (`EX_TEMPFAIL`): the queue is full.
pub(crate) const TRY_LATER: u8 = 75;
/// Not allowed (`EX_NOPERM`).
pub(crate) const FORBIDDEN: u8 = 77;

/// The table, for people.
pub(crate) const TABLE: &str = "\
Exit status:
   0  done; with --wait: completed
   1  failed or refused; with --wait: failed
   2  wrong arguments
   3  no such execution or agent
   4  with --wait: cancelled        5  with --wait: expired        6  with --wait: quarantined
  64  bad settings
  69  NATS or the service does not answer, or is not ready
  75  refused for now (queue full); of `agent run`: restart me
  77  not allowed

Every ROLLCALL_* setting is read from the environment and from the TOML file that ROLLCALL_CONFIG names; options win.
Answers go to stdout, logs to stderr (ROLLCALL_LOG, here `warn` unless set).";

/// What `--help` ends with: `text`, and every setting with its default.
pub(crate) fn with_settings(text: &str) -> String {
    format!("{text}\n\n{}", help_table("rollcall"))
}
