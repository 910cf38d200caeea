//! Whom probes believe over TLS, and what went wrong when they don't.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error as TlsError, RootCertStore, crypto};

use super::dial::Place;
use super::{Found, blame};
use crate::detector::Cause;

/// Who may vouch for an endpoint's certificate.
#[derive(Debug, Clone)]
pub struct Roots(RootCertStore);

impl Roots {
    /// The roots that come with us, and what this machine trusts: `SSL_CERT_FILE` and `SSL_CERT_DIR` where they are set,
    /// its usual places otherwise. Certificates that can't be read are left out, and logged.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "certificates that this machine trusts can't be read");
        }
        let (added, ignored) = roots.add_parsable_certificates(found.certs);
        tracing::debug!(added, ignored, "certificates that this machine trusts");
        Self(roots)
    }

    /// Nobody but these.
    #[cfg(test)]
    pub(super) const fn only(store: RootCertStore) -> Self {
        Self(store)
    }
}

/// Makes TLS of connections.
#[derive(Clone)]
pub(super) struct Tls {
    http1: TlsConnector,
    http2: TlsConnector,
}

/// What is spoken inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    /// HTTP/1.1; not offered by name, since old servers refuse what they don't know.
    Http1,
    /// HTTP/2, for gRPC.
    Http2,
}

impl Tls {
    pub(super) fn new(roots: Roots) -> Self {
        let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring speaks the default versions of TLS")
            .with_root_certificates(roots.0)
            .with_no_client_auth();
        let mut http2 = config.clone();
        http2.alpn_protocols = vec![b"h2".to_vec()];
        Self { http1: TlsConnector::from(Arc::new(config)), http2: TlsConnector::from(Arc::new(http2)) }
    }

    /// Shakes hands; the certificate must be for the host of `place`.
    pub(super) async fn connect(
        &self,
        place: &Place,
        stream: TcpStream,
        inside: Inside,
    ) -> Result<TlsStream<TcpStream>, Found> {
        let name = match place.literal {
            Some(literal) => ServerName::IpAddress(literal.into()),
            None => ServerName::try_from(place.host.clone())
                .map_err(|_| Found::Skipped(format!("{} is no name for TLS", place.host)))?,
        };
        let connector = match inside {
            Inside::Http1 => &self.http1,
            Inside::Http2 => &self.http2,
        };
        connector.connect(name, stream).await.map_err(|error| blame_stream(&error, "tls"))
    }
}

/// What an I/O error of a connection says about the other side, encrypted or not.
pub(super) fn blame_stream(error: &io::Error, doing: &str) -> Found {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
        Some(tls) => Found::bad(Cause::Tls, format!("{}: {tls}", what_is_wrong(tls))),
        None => blame(error, doing),
    }
}

/// In words that somebody understands who has never heard of X.509.
fn what_is_wrong(error: &TlsError) -> &'static str {
    use CertificateError as Certificate;
    match error {
        TlsError::InvalidCertificate(certificate) => match certificate {
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                "its certificate is for another name"
            }
            Certificate::Expired | Certificate::ExpiredContext { .. } => "its certificate has expired",
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
                "its certificate is not valid yet"
            }
            // An authority of that name that is not the one we know, or none that we know.
            Certificate::UnknownIssuer | Certificate::BadSignature => {
                "its certificate is from nobody we trust"
            }
            Certificate::Revoked => "its certificate was revoked",
            _ => "its certificate can't be used",
        },
        TlsError::InvalidMessage(_) => "it does not speak TLS",
        TlsError::AlertReceived(_) => "it refuses our TLS",
        TlsError::PeerIncompatible(_) | TlsError::NoApplicationProtocol => "it speaks another TLS than we do",
        _ => "tls",
    }
}
