//! A client that speaks the NATS protocol by itself, so that it can say what no library would: the attacker of the stories.

use std::time::Duration;

use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

/// How long the server may take to answer a ping.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// What came from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A message.
    Message {
        /// Its subject.
        subject: String,
        /// Where its sender wants answers.
        reply: Option<String>,
        /// Its payload without headers.
        payload: String,
    },
    /// A refusal, in the server's words.
    Refusal(String),
}

/// A connection.
pub struct Raw {
    stream: BufReader<TcpStream>,
    subscriptions: u32,
}

impl Raw {
    /// Connects as this user.
    ///
    /// # Panics
    /// When it can't.
    pub async fn connect(port: u16, user: &str, password: &str) -> Self {
        let mut raw = Self::greet(port, user, password).await;
        let heard = raw.settle().await;
        assert!(heard.is_empty(), "{user} may connect: {heard:?}");
        raw
    }

    /// Tries to connect as this user and returns how the server refuses.
    ///
    /// # Panics
    /// When it does not.
    pub async fn refused(port: u16, user: &str, password: &str) -> String {
        let mut raw = Self::greet(port, user, password).await;
        raw.say("PING\r\n").await;
        match tokio::time::timeout(ANSWERS_WITHIN, raw.read_one()).await {
            Ok(Some(Heard::Refusal(words))) => words,
            other => panic!("{user:?} is not refused: {other:?}"),
        }
    }

    async fn greet(port: u16, user: &str, password: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("nats listens");
        let mut raw = Self { stream: BufReader::new(stream), subscriptions: 0 };
        let hello = json!({
            "verbose": false, "pedantic": false, "protocol": 1, "headers": true, "no_responders": true,
            "lang": "test", "version": "1", "user": user, "pass": password,
        });
        raw.say(&format!("CONNECT {hello}\r\n")).await;
        raw
    }

    /// Publishes.
    pub async fn publish(&mut self, subject: &str, reply: Option<&str>, payload: &str) {
        let reply = reply.map(|r| format!("{r} ")).unwrap_or_default();
        self.say(&format!("PUB {subject} {reply}{}\r\n{payload}\r\n", payload.len())).await;
    }

    /// Subscribes.
    pub async fn subscribe(&mut self, subject: &str) {
        self.subscriptions += 1;
        let id = self.subscriptions;
        self.say(&format!("SUB {subject} {id}\r\n")).await;
    }

    /// Everything that came until the server had dealt with all that was said.
    ///
    /// # Panics
    /// When the server hangs up or does not answer.
    pub async fn settle(&mut self) -> Vec<Heard> {
        self.say("PING\r\n").await;
        tokio::time::timeout(ANSWERS_WITHIN, self.read_to_pong()).await.expect("the server answers pings")
    }

    /// Waits for a message on this subject and returns its payload; what comes before it is passed over.
    ///
    /// # Panics
    /// When none comes.
    pub async fn hears(&mut self, wanted: &str, within: Duration) -> String {
        let looking = async {
            loop {
                match self.read_one().await {
                    Some(Heard::Message { subject, payload, .. }) if subject == wanted => return payload,
                    _ => {}
                }
            }
        };
        let heard = tokio::time::timeout(within, looking).await;
        heard.unwrap_or_else(|_| panic!("waited {within:?} for a message on {wanted}"))
    }

    async fn say(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).await.expect("the server listens");
    }

    async fn read_to_pong(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        while let Some(one) = self.read_one().await {
            heard.push(one);
        }
        heard
    }

    /// What comes next; `None` for the answer to a ping.
    async fn read_one(&mut self) -> Option<Heard> {
        loop {
            let mut line = String::new();
            let length = self.stream.read_line(&mut line).await.expect("the server speaks");
            assert!(length > 0, "the server hung up");
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["PONG"] => return None,
                ["PING"] => self.say("PONG\r\n").await,
                ["MSG", subject, _, reply @ .., size] => {
                    return Some(self.message(subject, reply.first().copied(), 0, size).await);
                }
                ["HMSG", subject, _, reply @ .., headers, size] => {
                    let headers = headers.parse().expect("a size");
                    return Some(self.message(subject, reply.first().copied(), headers, size).await);
                }
                ["-ERR", ..] => return Some(Heard::Refusal(line.trim().to_owned())),
                _ => {}
            }
        }
    }

    async fn message(&mut self, subject: &str, reply: Option<&str>, headers: usize, size: &str) -> Heard {
        let size: usize = size.parse().expect("a size");
        let mut body = vec![0; size + 2];
        self.stream.read_exact(&mut body).await.expect("a whole message");
        Heard::Message {
            subject: subject.to_owned(),
            reply: reply.map(str::to_owned),
            payload: String::from_utf8_lossy(&body[headers..size]).into_owned(),
        }
    }
}
