//! What goes out to addresses that others named: the guard on where a URL may lead, and the client for agents that
//! are driven over HTTP (PROTOCOL.md 2.4).

pub mod guard;
mod ours;
mod registry;

pub use guard::{Guard, Refusal, Trust};
pub use ours::{is_ours, resolve};
pub use registry::{CALLS_MAX, Control, Registries, RegistryError, RegistryList};
