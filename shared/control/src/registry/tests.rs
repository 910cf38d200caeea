use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn control(url: &str, trust: Trust) -> Control {
    Control { endpoint: Endpoint { kind: "http".to_owned(), url: url.to_owned() }, trust }
}

/// A server on loopback that answers everything the same, and closes.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn answering(at: &str, answer: String) -> Self {
        let listener = tokio::net::TcpListener::bind((at, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { address, connections }
    }

    async fn empty(at: &str) -> Self {
        let answer = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 17\r\n\r\n{\"executions\":[]}";
        Self::answering(at, answer.to_owned()).await
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Names lead to these, one list for each time they are asked for; the last one stays.
fn leading_to(allowed: &[&str], script: &[&[&str]]) -> Registries {
    let allowed: Vec<Cidr> = allowed.iter().map(|range| range.parse().unwrap()).collect();
    let script: Vec<Vec<SocketAddr>> = script
        .iter()
        .map(|list| list.iter().map(|address| SocketAddr::new(address.parse().unwrap(), 0)).collect())
        .collect();
    let asked = AtomicUsize::new(0);
    let names = move |_| {
        let turn = asked.fetch_add(1, Ordering::SeqCst).min(script.len() - 1);
        std::future::ready(Ok(script[turn].clone())).boxed()
    };
    Registries::with_names(&allowed, Arc::new(names))
}

const PATIENCE: Duration = Duration::from_secs(10);

/// Neither of the two calls gets through, and the guard is why.
async fn assert_refused(registries: &Registries, control: &Control, what: &str) {
    let execution = ExecutionId::new("x").unwrap();
    let asked = registries.running(control, PATIENCE).await.map(|_| ());
    let ended = registries.terminate(control, &execution, PATIENCE).await;
    for refused in [asked, ended] {
        let error = refused.expect_err(what);
        assert!(matches!(error, RegistryError::Refused { .. }), "{what}: {error:?}");
        let error = error.to_string();
        assert!(error.contains("never allowed") || error.contains("ROLLCALL_ALLOW_CIDRS"), "{what}: {error}");
    }
}

#[tokio::test]
async fn literals_are_checked_however_they_are_written() {
    let server = Server::empty("127.0.0.1").await;
    let port = server.address.port();
    let registries = Registries::new(&[]);
    for host in [
        "127.0.0.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "0.0.0.0",
    ] {
        let control = control(&format!("http://{host}:{port}"), Trust::Agent);
        assert_refused(&registries, &control, host).await;
    }
    assert!(registries.prepare(&control("ftp://x/", Trust::Agent), &[]).is_err(), "not http");
    assert_eq!(server.connections(), 0, "nobody was connected to");
    // The operator may mean private addresses; what nobody may mean he may not either.
    let of_operator = control(&format!("http://127.0.0.1:{port}"), Trust::Operator);
    assert_eq!(registries.running(&of_operator, PATIENCE).await.unwrap(), RegistryList::default());
    assert_refused(&registries, &control("http://169.254.169.254", Trust::Operator), "metadata").await;
    assert_refused(&registries, &control("http://[::ffff:10.0.0.1]", Trust::Operator), "mapped").await;
}

/// In a log from before such were refused when they were read.
#[tokio::test]
async fn a_user_or_password_is_neither_sent_nor_shown() {
    let server = Server::empty("127.0.0.1").await;
    let registries = Registries::new(&["127.0.0.0/8".parse().unwrap()]);
    for trust in [Trust::Agent, Trust::Operator] {
        for user in ["u:hunter2", "hunter2", ":hunter2"] {
            let control = control(&format!("http://{user}@{}", server.address), trust);
            let error = registries.running(&control, PATIENCE).await.expect_err(user);
            assert!(matches!(error, RegistryError::Refused { .. }), "{error:?}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn names_are_checked_by_all_that_they_lead_to() {
    let server = Server::empty("127.0.0.1").await;
    let named = control(&format!("http://agent.test:{}", server.address.port()), Trust::Agent);
    for address in ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
    {
        assert_refused(&leading_to(&[], &[&[address]]), &named, address).await;
    }
    // One bad address refuses the name.
    let mixed = leading_to(&["127.0.0.1/32"], &[&["127.0.0.1", "169.254.169.254"]]);
    assert_refused(&mixed, &named, "mixed").await;
    // The machine's own resolver is asked no less.
    let localhost = control(&format!("http://localhost:{}", server.address.port()), Trust::Agent);
    assert_refused(&Registries::new(&[]), &localhost, "localhost").await;
    assert_eq!(server.connections(), 0);
    let allowed = leading_to(&["127.0.0.1/32"], &[&["127.0.0.1"]]);
    assert_eq!(allowed.running(&named, PATIENCE).await.unwrap(), RegistryList::default());
}

#[tokio::test]
async fn a_name_that_is_rebound_is_checked_again_at_every_connect() {
    let outside = Server::empty("127.0.0.1").await;
    // 127.0.0.1 plays the public address here, 127.0.0.2 the private one.
    let registries = leading_to(&["127.0.0.1/32"], &[&["127.0.0.1"], &["127.0.0.2"]]);
    let named = control(&format!("http://rebinding.test:{}", outside.address.port()), Trust::Agent);
    assert!(registries.running(&named, PATIENCE).await.is_ok());
    assert_refused(&registries, &named, "rebound").await;
    assert_eq!(outside.connections(), 1);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let inside = Server::empty("127.0.0.1").await;
    let execution = ExecutionId::new("x").unwrap();
    for status in ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"] {
        let answer = format!(
            "HTTP/1.1 {status}\r\nlocation: http://{}/secret\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            inside.address
        );
        let outside = Server::answering("127.0.0.1", answer).await;
        for trust in [Trust::Agent, Trust::Operator] {
            let registries = Registries::new(&["127.0.0.0/8".parse().unwrap()]);
            let control = control(&format!("http://{}", outside.address), trust);
            let asked = registries.running(&control, PATIENCE).await;
            assert!(matches!(asked, Err(RegistryError::Answer(_))), "{status}: {asked:?}");
            let ended = registries.terminate(&control, &execution, PATIENCE).await;
            assert!(matches!(ended, Err(RegistryError::Answer(_))), "{status}: {ended:?}");
        }
        assert_eq!(outside.connections(), 4);
    }
    assert_eq!(inside.connections(), 0, "nobody was led there");
}

/// An error with a cause, as the client wraps them.
#[derive(Debug, thiserror::Error)]
#[error("sending the request")]
struct Wrapped(#[source] io::Error);

#[test]
fn our_own_limits_are_not_held_against_the_agent() {
    let of = control("http://agent.test", Trust::Agent);
    for code in [24, 23, 105, 101, 99, 1, 13] {
        let error = failed(&of, &Wrapped(io::Error::from_raw_os_error(code)));
        assert!(matches!(error, RegistryError::Ours(_)), "{code}: {error}");
    }
    for code in [111, 104, 113, 110] {
        let error = failed(&of, &Wrapped(io::Error::from_raw_os_error(code)));
        assert!(matches!(error, RegistryError::Unreachable(_)), "{code}: {error}");
    }
}

/// Calls wait for a place before their own time begins: many others that hang don't make one time out.
#[tokio::test]
async fn waiting_for_a_place_is_not_counted_as_the_agents_time() {
    let mut registries = Registries::new(&["127.0.0.0/8".parse().unwrap()]);
    registries.places = tokio::sync::Semaphore::new(1);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut hung = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.unwrap_or(0);
            if request[..read].starts_with(b"GET /hangs") {
                hung.push(stream);
                continue;
            }
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"executions\":[]}";
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let hangs = control(&format!("{url}/hangs"), Trust::Agent);
    let answers = control(&url, Trust::Agent);
    let timeout = Duration::from_millis(500);
    let (one, two, three) = tokio::join!(
        registries.running(&hangs, timeout),
        registries.running(&hangs, timeout),
        registries.running(&answers, timeout)
    );
    assert!(matches!(one, Err(RegistryError::Unreachable(_))), "{one:?}");
    assert!(matches!(two, Err(RegistryError::Unreachable(_))), "{two:?}");
    assert_eq!(three.unwrap(), RegistryList::default());
}

#[test]
fn odd_entries_of_a_registry_are_skipped() {
    let body = br#"{"executions":[{"execution_id":"a"},null,{"execution_id":null},{"execution_id":"x.y"},{}],
        "pending_ids":["p",null,""],"recently_completed_ids":["z",7]}"#;
    let RegistryList { running, known } = read_running(body).unwrap();
    let named = |ids: &[ExecutionId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        (named(&running), named(&known)),
        (vec!["a".to_owned()], vec!["p".to_owned(), "z".to_owned()])
    );
    assert!(read_running(b"{}").is_err() && read_running(b"[]").is_err());
}
