//! The operator's commands, a file for each kind.

pub(crate) mod agents;
pub(crate) mod credentials;
pub(crate) mod events;
pub(crate) mod executions;
pub(crate) mod submit;
pub(crate) mod watchdog;
