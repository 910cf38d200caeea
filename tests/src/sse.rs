//! A subscriber to the notifier's SSE stream.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use serde_json::Value;

use crate::wait::until;

/// One event as it came.
#[derive(Debug, Clone)]
pub struct Frame {
    /// `id:`
    pub id: u64,
    /// `event:`
    pub event: String,
    /// `data:`
    pub data: Value,
    /// When it came.
    pub at: Instant,
}

/// An open SSE stream.
pub struct Sse {
    frames: Arc<Mutex<Vec<Frame>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Sse {
    /// Opens `http://<address>/events?<query>`.
    ///
    /// # Panics
    /// When it is not answered with an event stream.
    pub async fn open(address: &str, query: &str) -> Self {
        let response =
            reqwest::get(format!("http://{address}/events?{query}")).await.expect("the notifier answers");
        assert_eq!(response.status(), 200, "/events?{query}");
        let frames = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&frames);
        let task = tokio::spawn(async move {
            let mut bytes = response.bytes_stream();
            let mut text = Vec::new();
            while let Some(Ok(chunk)) = bytes.next().await {
                text.extend_from_slice(&chunk);
                while let Some(end) = text.windows(2).position(|w| w == b"\n\n") {
                    let block: Vec<u8> = text.drain(..end + 2).collect();
                    if let Some(frame) = parse(&String::from_utf8_lossy(&block)) {
                        kept.lock().expect("no panic while pushing").push(frame);
                    }
                }
            }
        });
        Self { frames, task }
    }

    /// Everything that came so far.
    ///
    /// # Panics
    /// Never: nothing panics while it holds the lock.
    #[must_use]
    pub fn frames(&self) -> Vec<Frame> {
        self.frames.lock().expect("no panic while pushing").clone()
    }

    /// Waits for an event of this type about this subject.
    pub async fn event(&self, kind: &str, subject: &str, within: Duration) -> Frame {
        until(&format!("{kind} of {subject} on SSE"), within, || async {
            let frames = self.frames();
            frames
                .iter()
                .find(|f| f.event == kind && f.data["subject"] == subject)
                .cloned()
                .ok_or_else(|| frames.iter().map(|f| f.event.clone()).collect::<Vec<_>>())
        })
        .await
    }
}

impl Drop for Sse {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn parse(block: &str) -> Option<Frame> {
    let (mut id, mut event, mut data) = (None, None, None);
    for line in block.lines() {
        if let Some(value) = line.strip_prefix("id:") {
            id = value.trim().parse().ok();
        } else if let Some(value) = line.strip_prefix("event:") {
            event = Some(value.trim().to_owned());
        } else if let Some(value) = line.strip_prefix("data:") {
            data = serde_json::from_str(value.trim()).ok();
        }
    }
    Some(Frame { id: id?, event: event?, data: data?, at: Instant::now() })
}
