//! The bus: connection, event log, durable work, payloads and the request API, all on NATS.
//!
//! This is the only crate that names `async_nats`, and it uses only the core protocol of it: the JetStream and
//! services APIs are spoken here ([`js`], [`api`]), because their error codes, their reply subjects and their
//! behaviour over a reconnect are what the rest of the system's guarantees hang on.
//!
//! Start with [`Bus::connect`] and [`ensure_streams`]; append and read events through [`EventLog`]; follow them with
//! [`Tail`]; take durable work with [`WorkConsumer`]; answer requests with [`ApiServer`].

pub mod api;
pub mod bus;
pub mod canary;
pub mod inbox;
pub mod isolation;
mod js;
pub mod link;
pub mod log;
pub mod names;
mod pull;
pub mod store;
pub mod streams;
pub mod tail;
#[cfg(feature = "testing")]
pub mod testing;
pub mod version;
pub mod work;

pub use api::{ApiError, ApiHandle, ApiOptions, ApiRequest, ApiServer};
pub use async_nats::{HeaderMap, Message, StatusCode, Subject, Subscriber};
pub use bus::{Bus, BusOptions, ConnectError, PublishError, ReplyOutcome, RequestError, SubscribeError};
pub use inbox::is_inbox;
pub use link::Link;
pub use log::{Append, AppendError, Entry, EventLog, Head, Page, ReadError};
pub use names::{Names, PrefixError};
pub use store::{Payloads, Reports, StoreError};
pub use streams::{EnsureStreamsError, StreamOptions, ensure_streams, ensure_streams_with};
pub use tail::{Batch, Tail, TailError, TailItem};
pub use work::{AckError, Delivery, WorkConsumer, WorkError, WorkOptions};
