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
use tokio_rustls::TlsAcceptor;

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

/// One event of a stream that stays open.
pub(super) fn events(body: &str) -> Vec<u8> {
    let event = format!(": hello\n\nevent: message\ndata: {body}\n\n");
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    format!("{head}{:x}\r\n{event}\r\n", event.len()).into_bytes()
}

/// A port that nobody listens on.
pub(super) async fn closed_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().port()
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
}

type Answerer = dyn Fn(&str) -> Vec<u8> + Send + Sync;

enum Manner {
    Answer(Arc<Answerer>),
    Secure(TlsAcceptor, Arc<Answerer>),
    Close,
    Hang,
}

impl Server {
    pub(super) async fn answering(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::start(Manner::Answer(Arc::new(answer))).await
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
        };
        let (connections, requests) = (Arc::clone(&server.connections), Arc::clone(&server.requests));
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                match &manner {
                    Manner::Answer(answer) => {
                        tokio::spawn(serve(stream, Arc::clone(answer), Arc::clone(&requests)));
                    }
                    Manner::Secure(tls, answer) => {
                        let (tls, answer, requests) =
                            (tls.clone(), Arc::clone(answer), Arc::clone(&requests));
                        tokio::spawn(async move {
                            // Whoever does not like our certificate goes away here.
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, answer, requests).await;
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
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    answer: Arc<Answerer>,
    requests: Arc<Mutex<Vec<String>>>,
) {
    let mut buffer = Vec::new();
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
