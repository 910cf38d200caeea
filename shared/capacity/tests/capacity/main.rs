//! One binary for all, so that it is linked once. Needs `redis-server`.

#![allow(clippy::unwrap_used, reason = "these are tests; the lint's own exception stops at helpers")]

mod agree;
mod lost;
mod race;
mod rules;
mod scale;
mod support;
