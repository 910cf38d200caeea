//! `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`: how `nats micro` finds a service.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::{Message, Subscriber};
use bytes::Bytes;
use chrono::{SecondsFormat, Utc};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use serde_json::{Value, json};

use super::{ApiError, ApiOptions, Endpoint, QUEUE_GROUP};
use crate::bus::{Bus, SubscribeError};

/// What one endpoint has done so far.
pub(super) struct EndpointStats {
    name: String,
    subject: String,
    requests: AtomicU64,
    errors: AtomicU64,
    nanos: AtomicU64,
    last_error: Mutex<String>,
}

impl EndpointStats {
    pub(super) fn new(verb: &str, subject: String) -> Self {
        Self {
            // Endpoint names have no dots.
            name: verb.replace('.', "-"),
            subject,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanos: AtomicU64::new(0),
            last_error: Mutex::new(String::new()),
        }
    }

    pub(super) fn count(&self, took: Duration, error: Option<&ApiError>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        if let Some(error) = error {
            self.errors.fetch_add(1, Ordering::Relaxed);
            *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) =
                format!("{}:{error}", error.status());
        }
    }

    fn describe(&self) -> Value {
        json!({ "name": self.name, "subject": self.subject, "queue_group": QUEUE_GROUP, "metadata": {} })
    }

    fn report(&self) -> Value {
        let requests = self.requests.load(Ordering::Relaxed);
        let nanos = self.nanos.load(Ordering::Relaxed);
        json!({
            "name": self.name,
            "subject": self.subject,
            "queue_group": QUEUE_GROUP,
            "num_requests": requests,
            "num_errors": self.errors.load(Ordering::Relaxed),
            "last_error": *self.last_error.lock().unwrap_or_else(PoisonError::into_inner),
            "processing_time": nanos,
            "average_processing_time": nanos.checked_div(requests).unwrap_or(0),
        })
    }
}

pub(super) struct Discovery {
    bus: Bus,
    asked: SelectAll<Subscriber>,
    name: String,
    id: String,
    version: String,
    description: String,
    started: String,
    endpoints: Vec<Arc<Endpoint>>,
}

impl Discovery {
    pub(super) async fn start(
        bus: &Bus,
        options: &ApiOptions,
        endpoints: Vec<Arc<Endpoint>>,
    ) -> Result<Self, SubscribeError> {
        let id = bus.new_token();
        let name = options.service.clone();
        let mut asked = SelectAll::new();
        for question in ["PING", "INFO", "STATS"] {
            for subject in [
                format!("$SRV.{question}"),
                format!("$SRV.{question}.{name}"),
                format!("$SRV.{question}.{name}.{id}"),
            ] {
                asked.push(bus.subscribe(subject).await?);
            }
        }
        Ok(Self {
            bus: bus.clone(),
            asked,
            name,
            id,
            version: options.version.clone(),
            description: options.description.clone(),
            started: Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true),
            endpoints,
        })
    }

    /// Waits for one question and answers it, if its reply subject is an inbox.
    pub(super) async fn answer_one(&mut self) {
        match self.asked.next().await {
            Some(message) => {
                let answer = Bytes::from(self.answer(&message).to_string());
                self.bus.reply(&message, answer).await;
            }
            // The connection was closed: nobody asks any more.
            None => std::future::pending().await,
        }
    }

    fn answer(&self, message: &Message) -> Value {
        let question = message.subject.split('.').nth(1).unwrap_or("");
        let mut answer = json!({ "name": self.name, "id": self.id, "version": self.version, "metadata": {} });
        match question {
            "INFO" => {
                answer["type"] = json!("io.nats.micro.v1.info_response");
                answer["description"] = json!(self.description);
                answer["endpoints"] =
                    self.endpoints.iter().map(|endpoint| endpoint.stats.describe()).collect();
            }
            "STATS" => {
                answer["type"] = json!("io.nats.micro.v1.stats_response");
                answer["started"] = json!(self.started);
                answer["endpoints"] = self.endpoints.iter().map(|endpoint| endpoint.stats.report()).collect();
            }
            _ => answer["type"] = json!("io.nats.micro.v1.ping_response"),
        }
        answer
    }
}
