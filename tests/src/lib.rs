//! The harness of the stories: a whole fleet of real servers and real service processes, private to one test.

pub mod agent;
pub mod audit;
pub mod fleet;
pub mod process;
pub mod sse;
pub mod wait;

pub use agent::{OnDispatch, OnTerminate, ScriptedAgent};
pub use fleet::{ApiFailure, Fleet, Options};
pub use wait::until;
