//! The harness of the stories: a whole fleet of real servers and real service processes, private to one test.

pub mod agent;
pub mod audit;
pub mod credentials;
pub mod fleet;
pub mod load;
pub mod options;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod sse;
pub mod wait;

pub use agent::{OnDispatch, OnTerminate, ScriptedAgent};
pub use fleet::{ApiFailure, Fleet};
pub use options::Options;
pub use wait::{Standstill, lasts, until};
