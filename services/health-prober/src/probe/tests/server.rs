//! Endpoints to be probed: small servers that speak just enough.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// How long anything may take that is not itself about time.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// An HTTP/1.1 answer of one piece.
pub(super) fn plain(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// An answer after which the server closes.
pub(super) fn closing_after(status: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").into_bytes()
}

pub(super) fn json(body: &str) -> Vec<u8> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:";
    format!("{head} {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// These events, of a stream that stays open: an empty one and a comment come first.
pub(super) fn events(bodies: &[String]) -> Vec<u8> {
    let mut event = "id: 0\nretry: 100\ndata:\n\n: hello\n\n".to_owned();
    for body in bodies {
        event += &format!("event: message\ndata: {body}\n\n");
    }
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    format!("{head}{:x}\r\n{event}\r\n", event.len()).into_bytes()
}

/// A port that nobody listens on, and nobody else can take as long as this lives.
pub(super) struct ClosedPort(TcpSocket);

impl ClosedPort {
    pub(super) fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        Self(socket)
    }

    pub(super) fn number(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }
}

/// An address that swallows whatever is sent to it, for as long as this lives.
pub(super) struct Swallowing {
    pub(super) address: SocketAddr,
    _queued: Vec<TcpStream>,
    _listener: TcpListener,
}

/// Nobody takes connections from its queue, and the queue is full.
pub(super) async fn swallowing() -> Swallowing {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(50), TcpStream::connect(address)).await
    {
        queued.push(stream.unwrap());
    }
    Swallowing { address, _queued: queued, _listener: listener }
}

/// Listens on every address of this machine's loopback range.
pub(super) struct Server {
    port: u16,
    connections: Arc<AtomicUsize>,
    requests: Arc<Mutex<Vec<String>>>,
    /// Answers are held back.
    held: Arc<watch::Sender<bool>>,
}

type Answerer = dyn Fn(&str) -> Vec<u8> + Send + Sync;

/// Which requests are answered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    /// The first of each connection.
    FirstOfEach,
    /// Those on the first connection.
    OnFirst,
}

enum Manner {
    Answer(Which, Arc<Answerer>),
    Secure(TlsAcceptor, Arc<Answerer>),
    Close,
    Hang,
}

impl Server {
    pub(super) async fn answering(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::start(Manner::Answer(Which::All, Arc::new(answer))).await
    }

    /// As [`Server::answering`], and each connection is dead after its first answer, without a word.
    pub(super) async fn answering_once_per_connection(
        answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        Self::start(Manner::Answer(Which::FirstOfEach, Arc::new(answer))).await
    }

    /// As [`Server::answering`], and only the first connection is served.
    pub(super) async fn answering_first_connection(
        answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        Self::start(Manner::Answer(Which::OnFirst, Arc::new(answer))).await
    }

    /// As [`Server::answering`], inside TLS.
    pub(super) async fn secure(
        tls: TlsAcceptor,
        answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        Self::start(Manner::Secure(tls, Arc::new(answer))).await
    }

    /// Takes connections and closes them.
    pub(super) async fn closing() -> Self {
        Self::start(Manner::Close).await
    }

    /// Takes connections and says nothing.
    pub(super) async fn hanging() -> Self {
        Self::start(Manner::Hang).await
    }

    async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            connections: Arc::default(),
            requests: Arc::default(),
            held: Arc::new(watch::Sender::new(false)),
        };
        let gate = Arc::clone(&server.held);
        let (connections, requests) = (Arc::clone(&server.connections), Arc::clone(&server.requests));
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                let first = connections.fetch_add(1, Ordering::SeqCst) == 0;
                match &manner {
                    Manner::Answer(Which::OnFirst, _) if !first => held.push(stream),
                    Manner::Answer(which, answer) => {
                        let once = *which == Which::FirstOfEach;
                        let gated = Gated { answer: Arc::clone(answer), gate: gate.subscribe(), once };
                        tokio::spawn(serve(stream, gated, Arc::clone(&requests)));
                    }
                    Manner::Secure(tls, answer) => {
                        let gated = Gated { answer: Arc::clone(answer), gate: gate.subscribe(), once: false };
                        let (tls, requests) = (tls.clone(), Arc::clone(&requests));
                        tokio::spawn(async move {
                            // Whoever does not like our certificate goes away here.
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, gated, requests).await;
                            }
                        });
                    }
                    Manner::Close => drop(stream),
                    Manner::Hang => held.push(stream),
                }
            }
        });
        server
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(super) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// Answers nothing until [`Server::release`].
    pub(super) fn hold(&self) {
        self.held.send_replace(true);
    }

    pub(super) fn release(&self) {
        self.held.send_replace(false);
    }

    /// Waits until it is as wanted.
    pub(super) async fn until(&self, wanted: impl Fn(&Self) -> bool) {
        let end = tokio::time::Instant::now() + DEADLINE;
        while !wanted(self) {
            assert!(tokio::time::Instant::now() < end, "never as wanted: {:?}", self.requests());
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// How a connection is answered.
struct Gated {
    answer: Arc<Answerer>,
    gate: watch::Receiver<bool>,
    /// Only its first request.
    once: bool,
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    Gated { answer, mut gate, once }: Gated,
    requests: Arc<Mutex<Vec<String>>>,
) {
    let (mut buffer, mut answered) = (Vec::new(), false);
    loop {
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(read) => buffer.extend_from_slice(&chunk[..read]),
        }
        while let Some(length) = complete(&buffer) {
            let request = String::from_utf8_lossy(&buffer[..length]).into_owned();
            buffer.drain(..length);
            let reply = answer(&request);
            requests.lock().unwrap().push(request);
            if gate.wait_for(|held| !held).await.is_err() {
                return;
            }
            // What is answered with nothing is swallowed.
            if once && std::mem::replace(&mut answered, true) || reply.is_empty() {
                continue;
            }
            if stream.write_all(&reply).await.is_err() {
                return;
            }
            if String::from_utf8_lossy(&reply).contains("Connection: close") || !reply.starts_with(b"HTTP") {
                return;
            }
        }
        // What is no HTTP (a TLS greeting, HTTP/2) is answered as it is, and that is all.
        if !buffer.is_empty() && !buffer[0].is_ascii_uppercase() || buffer.starts_with(b"PRI ") {
            let _ = stream.write_all(&answer("")).await;
            return;
        }
    }
}

/// Length of the first request in the buffer, if all of it is there.
fn complete(buffer: &[u8]) -> Option<usize> {
    if buffer.starts_with(b"PRI ") {
        return None;
    }
    let head = buffer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |length| length.trim().parse::<usize>().unwrap());
    (buffer.len() >= head + length).then_some(head + length)
}

/// A gRPC server whose health check ends so; returns its port.
pub(super) async fn grpc(status: &'static str, serving: Option<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve_grpc(stream, status, serving));
        }
    });
    port
}

/// A gRPC server that answers without a message, its status among the headers; returns its port.
pub(super) async fn grpc_without_message(status: &'static str) -> u16 {
    http2_answering(200, Some(status)).await
}

/// An HTTP/2 server that knows nothing of gRPC; returns its port.
pub(super) async fn http2(status: u16) -> u16 {
    http2_answering(status, None).await
}

async fn http2_answering(status: u16, grpc_status: Option<&'static str>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let service = service_fn(move |_: hyper::Request<hyper::body::Incoming>| async move {
        let mut response = hyper::Response::new(http_body_util::Empty::<bytes::Bytes>::new());
        *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap();
        if let Some(status) = grpc_status {
            response.headers_mut().insert("grpc-status", status.parse().unwrap());
        }
        Ok::<_, Infallible>(response)
    });
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
        }
    });
    port
}

/// As [`grpc`], inside TLS.
pub(super) async fn secure_grpc(tls: TlsAcceptor) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                if let Ok(stream) = tls.accept(stream).await {
                    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
                    serve_grpc(stream, "0", Some(1)).await;
                }
            });
        }
    });
    port
}

async fn serve_grpc(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    status: &'static str,
    serving: Option<u8>,
) {
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| async move {
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        assert_eq!(request.headers()["content-type"], "application/grpc");
        let mut frames = Vec::new();
        if let Some(serving) = serving {
            let mut data = BytesMut::new();
            data.put_u8(0);
            data.put_u32(2);
            data.put_slice(&[0x08, serving]);
            frames.push(Ok::<_, Infallible>(Frame::data(data.freeze())));
        }
        let mut trailers = hyper::HeaderMap::new();
        trailers.insert("grpc-status", status.parse().unwrap());
        frames.push(Ok(Frame::trailers(trailers)));
        let body = StreamBody::new(futures_util::stream::iter(frames));
        let mut response = hyper::Response::new(body);
        response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        Ok::<_, Infallible>(response)
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
}
