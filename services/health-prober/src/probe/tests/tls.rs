//! Endpoints behind TLS, and every way in which that can be wrong.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ServerConfig, crypto};

use super::*;

/// Somebody who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    roots: RootCertStore,
    /// Its own certificate.
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let mut roots = RootCertStore::empty();
        let certificate = params.self_signed(&key).unwrap();
        roots.add(certificate.der().clone()).unwrap();
        Self { issuer: Issuer::new(params, key), roots, pem: certificate.pem() }
    }

    /// A server's certificate for `well.test` and 127.0.0.1, or whatever `change` makes of it.
    fn config(&self, change: impl FnOnce(&mut CertificateParams)) -> ServerConfig {
        self.config_asking(None, change)
    }

    fn config_asking(
        &self,
        clients: Option<&RootCertStore>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let names = ["well.test".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = match clients {
            None => config.with_no_client_auth(),
            Some(roots) => {
                let roots = Arc::new(roots.clone());
                let asks = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
                config.with_client_cert_verifier(asks)
            }
        };
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        config.with_single_cert(vec![certificate.der().clone()], key).unwrap()
    }

    async fn server(&self, change: impl FnOnce(&mut CertificateParams)) -> Server {
        serving(self.config(change)).await
    }

    /// Trusts this one alone. Every name leads to this machine.
    fn trusting(&self) -> Prober {
        trusting(self.roots.clone())
    }
}

async fn serving(config: ServerConfig) -> Server {
    Server::secure(TlsAcceptor::from(Arc::new(config)), |_| server::plain("200 OK", "")).await
}

fn trusting(roots: RootCertStore) -> Prober {
    let mut prober = prober();
    prober.tls = Tls::new(Roots::only(roots));
    prober
}

/// Probes the server under this name.
async fn probe_as(prober: &Prober, name: &str, server: &Server) -> Found {
    let here = SocketAddr::new("127.0.0.1".parse().unwrap(), server.port());
    let prober = resolving(prober.clone(), &[&[here]]);
    probe(&prober, "http", &format!("https://{name}:{}/health", server.port())).await
}

fn assert_tls(found: &Found, says: &str) {
    match found {
        Found::Bad(Cause::Tls, words) => assert!(words.starts_with(says), "{words}, not {says}"),
        other => panic!("{other:?}, not {says}"),
    }
}

#[tokio::test]
async fn a_certificate_that_somebody_we_trust_vouches_for_is_good() {
    let authority = Authority::new();
    let server = authority.server(|_| {}).await;
    let prober = authority.trusting();
    assert_eq!(probe_as(&prober, "well.test", &server).await, Found::Good);
    assert_eq!(probe_as(&prober, "127.0.0.1", &server).await, Found::Good, "for an address too");
    assert!(server.requests()[0].starts_with("GET /health HTTP/1.1"), "{:?}", server.requests());
    let mut config = authority.config(|_| {});
    config.alpn_protocols = vec![b"h2".to_vec()];
    let port = server::secure_grpc(TlsAcceptor::from(Arc::new(config))).await;
    for scheme in ["grpcs", "https"] {
        let found = probe(&prober, "grpc", &format!("{scheme}://127.0.0.1:{port}/")).await;
        assert_eq!(found, Found::Good, "{scheme}");
    }
}

#[tokio::test]
async fn whatever_is_wrong_with_a_certificate_is_tls_and_says_what() {
    let (authority, other) = (Authority::new(), Authority::new());
    let prober = authority.trusting();
    let well = authority.server(|_| {}).await;
    assert_tls(&probe_as(&prober, "ill.test", &well).await, "its certificate is for another name");
    // Trusting nobody, and trusting another of the same name.
    for stranger in [trusting(RootCertStore::empty()), other.trusting()] {
        let found = probe_as(&stranger, "well.test", &well).await;
        assert_tls(&found, "its certificate is from nobody we trust");
    }
    let expired = authority
        .server(|params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        })
        .await;
    assert_tls(&probe_as(&prober, "well.test", &expired).await, "its certificate has expired");
    let early = authority
        .server(|params| {
            params.not_before = date_time_ymd(2998, 1, 1);
            params.not_after = date_time_ymd(2999, 1, 1);
        })
        .await;
    assert_tls(&probe_as(&prober, "well.test", &early).await, "its certificate is not valid yet");
    for server in [&well, &expired, &early] {
        assert_eq!(server.requests(), [""; 0], "nobody is asked who is not believed");
    }
    // The same for gRPC, which shakes hands with another protocol in mind.
    let port = well.port();
    let found = probe(&other.trusting(), "grpc", &format!("grpcs://127.0.0.1:{port}/")).await;
    assert_tls(&found, "its certificate is from nobody we trust");
}

#[tokio::test]
async fn who_speaks_no_tls_or_another_one_is_tls_and_says_so() {
    let authority = Authority::new();
    let prober = authority.trusting();
    let plain = Server::answering(|_| server::plain("400 Bad Request", "")).await;
    assert_tls(&probe_as(&prober, "well.test", &plain).await, "it does not speak TLS");
    // Wants a certificate of ours, which is said after the handshake.
    let asking = serving(authority.config_asking(Some(&authority.roots), |_| {})).await;
    assert_tls(&probe_as(&prober, "well.test", &asking).await, "it refuses our TLS");
    let mut config = authority.config(|_| {});
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    let port = serving(config).await.port();
    let found = probe(&prober, "grpc", &format!("grpcs://127.0.0.1:{port}/")).await;
    assert_tls(&found, "it refuses our TLS");
}

#[tokio::test]
async fn a_handshake_that_breaks_or_hangs_is_told_apart_from_one_that_fails() {
    let mut prober = Authority::new().trusting();
    let closing = Server::closing().await;
    assert_eq!(cause(&probe_as(&prober, "well.test", &closing).await), Some(Cause::Reset));
    prober.timeout = Duration::from_millis(200);
    let hanging = Server::hanging().await;
    assert_eq!(cause(&probe_as(&prober, "well.test", &hanging).await), Some(Cause::Timeout));
}

/// Where a process with other surroundings than ours finds what it is to probe.
const PROBE_THIS: &str = "ROLLCALL_TEST_PROBE_THIS";

#[tokio::test]
async fn this_machine_trusts_whom_ssl_cert_file_names() {
    const NAME: &str = "probe::tests::tls::this_machine_trusts_whom_ssl_cert_file_names";
    if let Ok(url) = std::env::var(PROBE_THIS) {
        let mut prober = prober();
        prober.tls = Tls::new(Roots::of_this_machine());
        assert_eq!(probe(&prober, "http", &url).await, Found::Good);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (authority, other) = (Authority::new(), Authority::new());
    let server = authority.server(|_| {}).await;
    let url = format!("https://127.0.0.1:{}/", server.port());
    for (named, trusts) in [(&authority, true), (&other, false)] {
        let file = folder.path().join("authority.pem");
        std::fs::write(&file, &named.pem).unwrap();
        let mut child = tokio::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", NAME]).env("SSL_CERT_FILE", file).env(PROBE_THIS, &url);
        let output = child.output().await.unwrap();
        assert_eq!(output.status.success(), trusts, "{}", String::from_utf8_lossy(&output.stdout));
    }
}
