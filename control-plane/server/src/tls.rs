//! Certificates, checked, and what takes connections in with them.

use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;

/// Certificates, all PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Tls {
    /// Certificate chain of the server.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// Certificate authorities of clients. `None` = clients need no certificate.
    pub client_ca: Option<Vec<u8>>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate chain is no PEM.
    #[error("the certificate chain cannot be read")]
    Certificate(#[source] pem::Error),
    /// The private key is no PEM.
    #[error("the private key cannot be read")]
    Key(#[source] pem::Error),
    /// Certificate and key are not usable together.
    #[error("certificate and key cannot be used together")]
    Pair(#[source] rustls::Error),
    /// The authorities of clients are no PEM.
    #[error("the authorities of clients cannot be read")]
    ClientCa(#[source] pem::Error),
    /// One of them is no certificate.
    #[error("the authorities of clients cannot be used")]
    Authority(#[source] rustls::Error),
    /// There are none.
    #[error("the authorities of clients cannot be used")]
    Verifier(#[source] VerifierBuilderError),
}

/// Takes TLS connections in with one set of certificates. Sessions are resumed at the same
/// acceptor only, so that what was trusted before is not trusted for ever.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// Checks that the certificates fit together.
    pub fn new(tls: &Tls) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Pair)?;
        let builder = match &tls.client_ca {
            None => builder.with_no_client_auth(),
            Some(client_ca) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(client_ca).map_err(TlsError::ClientCa)? {
                    roots.add(authority).map_err(TlsError::Authority)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                builder.with_client_cert_verifier(verifier.build().map_err(TlsError::Verifier)?)
            }
        };
        let chain = certificates(&tls.certificate).map_err(TlsError::Certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&tls.key).map_err(TlsError::Key)?;
        let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Pair)?;
        // gRPC is HTTP/2, and clients insist on hearing it.
        config.alpn_protocols.push(b"h2".to_vec());
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    pub(crate) async fn accept(&self, connection: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.0.accept(connection).await
    }
}

fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    let certificates = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>()?;
    if certificates.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(certificates) }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey, generate_simple_self_signed};

    use super::*;

    fn pair() -> Tls {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        Tls {
            certificate: cert.pem().into_bytes(),
            key: signing_key.serialize_pem().into_bytes(),
            client_ca: Some(cert.pem().into_bytes()),
        }
    }

    fn fault(change: impl FnOnce(&mut Tls)) -> String {
        let mut tls = pair();
        change(&mut tls);
        Acceptor::new(&tls).err().expect("not usable").to_string()
    }

    #[test]
    fn a_pair_and_its_authority_are_taken() {
        assert!(Acceptor::new(&pair()).is_ok());
        assert!(Acceptor::new(&Tls { client_ca: None, ..pair() }).is_ok());
    }

    #[test]
    fn what_is_half_written_or_does_not_fit_is_named() {
        let half = |text: &mut Vec<u8>| text.truncate(text.len() / 2);
        assert!(fault(|tls| half(&mut tls.certificate)).contains("certificate chain"));
        assert!(fault(|tls| tls.certificate.clear()).contains("certificate chain"));
        assert!(fault(|tls| half(&mut tls.key)).contains("private key"));
        assert!(fault(|tls| tls.key = pair().key).contains("certificate and key"));
        assert!(fault(|tls| half(tls.client_ca.as_mut().unwrap())).contains("authorities of clients"));
        assert!(fault(|tls| tls.client_ca = Some(Vec::new())).contains("authorities of clients"));
    }
}
