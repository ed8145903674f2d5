//! Servers and how to reach them.

use std::fmt;
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A dead peer is noticed within the sum of these, below any heartbeat.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A snapshot of several MiB should not wait for window updates.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// How a server is trusted.
#[derive(Clone)]
pub enum Security {
    /// Not at all: plaintext.
    Plaintext,
    /// By this authority (PEM); with a client certificate and key (PEM), if the server asks.
    Tls {
        /// The authority.
        ca: Vec<u8>,
        /// Certificate chain and key.
        identity: Option<(Vec<u8>, Vec<u8>)>,
    },
}

/// Servers that all serve the same cluster. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Servers(Vec<Server>);

#[derive(Debug, Clone)]
pub(super) struct Server {
    uri: Uri,
    endpoint: Endpoint,
}

/// Why servers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There are none.
    #[error("no control plane is named")]
    Empty,
    /// Not the URL of a server.
    #[error("{url:?} is not a server: {reason}")]
    Url {
        /// The text.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificates or key cannot be used.
    #[error("TLS for {url}")]
    Tls {
        /// The server.
        url: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

impl Servers {
    /// Checks URLs (`https://host:port`; `http://host:port` for plaintext only) and credentials.
    /// Connects to none.
    pub fn new(urls: &[String], security: &Security) -> Result<Self, ConfigError> {
        if urls.is_empty() {
            return Err(ConfigError::Empty);
        }
        urls.iter().map(|url| Server::new(url, security)).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The server whose turn it is.
    pub(super) fn get(&self, turn: usize) -> &Server {
        &self.0[turn % self.0.len()]
    }
}

impl Server {
    fn new(url: &str, security: &Security) -> Result<Self, ConfigError> {
        let fault = |reason: &str| ConfigError::Url { url: url.to_owned(), reason: reason.to_owned() };
        let uri: Uri = url.parse().map_err(|error| fault(&format!("{error}")))?;
        if uri.host().is_none() || uri.port_u16().is_none() {
            return Err(fault("a scheme, a host and a port are needed, as in https://host:7443"));
        }
        match (uri.scheme_str(), security) {
            (Some("http"), Security::Plaintext) | (Some("https"), Security::Tls { .. }) => {}
            (Some("http"), Security::Tls { .. }) => {
                return Err(fault("http:// is plaintext, which must be asked for"));
            }
            (Some("https"), Security::Plaintext) => {
                return Err(fault("https:// needs a certificate authority, not plaintext"));
            }
            _ => return Err(fault("only https:// and http:// are known")),
        }
        let mut endpoint = Endpoint::from(uri.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_connection_window_size(WINDOW_BYTES)
            .initial_stream_window_size(WINDOW_BYTES);
        if let Security::Tls { ca, identity } = security {
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
            if let Some((certificate, key)) = identity {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            endpoint = endpoint
                .tls_config(tls)
                .map_err(|source| ConfigError::Tls { url: url.to_owned(), source })?;
        }
        Ok(Self { uri, endpoint })
    }

    pub(super) async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        self.endpoint.connect().await
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

impl fmt::Debug for Security {
    /// Without keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Security::Plaintext => "Plaintext",
            Security::Tls { identity: None, .. } => "Tls",
            Security::Tls { identity: Some(_), .. } => "Tls with a client certificate",
        })
    }
}
