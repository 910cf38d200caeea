//! A registry over HTTP, as PROTOCOL.md 2.4 wants it, in as few lines as possible.

use std::sync::{Arc, Mutex};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

pub struct HttpAgent {
    pub url: String,
    inside: Arc<Mutex<Inside>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Inside {
    running: Vec<String>,
    pending: Vec<String>,
    completed: Vec<String>,
    terminated: Vec<String>,
    calls: usize,
    pause: std::time::Duration,
    broken: bool,
}

impl HttpAgent {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let inside = Arc::new(Mutex::new(Inside::default()));
        let shared = Arc::clone(&inside);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Self { url, inside, task }
    }

    pub fn runs(&self, ids: &[&str]) {
        self.inside.lock().unwrap().running = ids.iter().map(|id| (*id).to_owned()).collect();
    }

    /// What it knows of besides: accepted and not begun, and just finished.
    pub fn knows(&self, pending: &[&str], completed: &[&str]) {
        let owned = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let mut inside = self.inside.lock().unwrap();
        (inside.pending, inside.completed) = (owned(pending), owned(completed));
    }

    pub fn terminated(&self) -> Vec<String> {
        self.inside.lock().unwrap().terminated.clone()
    }

    /// How often it was asked what it runs.
    pub fn calls(&self) -> usize {
        self.inside.lock().unwrap().calls
    }

    /// From now on it answers with an error.
    pub fn breaks(&self) {
        self.inside.lock().unwrap().broken = true;
    }

    /// Every answer takes so long.
    pub fn slow(&self, pause: std::time::Duration) {
        self.inside.lock().unwrap().pause = pause;
    }
}

impl Drop for HttpAgent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, inside: Arc<Mutex<Inside>>) {
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk).await {
            Ok(read) if read > 0 => request.extend_from_slice(&chunk[..read]),
            _ => return,
        }
    }
    let pause = inside.lock().unwrap().pause;
    // Being slow is what this agent is for.
    tokio::time::sleep(pause).await;
    if inside.lock().unwrap().broken {
        inside.lock().unwrap().calls += 1;
        let _ =
            stream.write_all(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
        return;
    }
    let line = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned();
    let body = {
        let mut inside = inside.lock().unwrap();
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["GET", "/api/executions/running", _] => {
                inside.calls += 1;
                let executions: Vec<_> =
                    inside.running.iter().map(|id| serde_json::json!({"execution_id": id})).collect();
                serde_json::json!({"executions": executions, "pending_ids": inside.pending,
                    "recently_completed_ids": inside.completed})
                .to_string()
            }
            ["POST", path, _] => {
                let id =
                    path.trim_start_matches("/api/executions/").trim_end_matches("/terminate").to_owned();
                inside.running.retain(|running| *running != id);
                inside.terminated.push(id);
                "{}".to_owned()
            }
            _ => return,
        }
    };
    let answer =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    let _ = stream.write_all(answer.as_bytes()).await;
}
