//! Servers and how to reach them.

use std::fmt;
use std::time::Duration;

use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Uri};

use super::credentials::{Credentials, CredentialsError, Files};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A dead peer is noticed within the sum of these, below any heartbeat.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A snapshot of several MiB should not wait for window updates.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// How a server is trusted.
#[derive(Debug, Clone)]
pub enum Security {
    /// Not at all: plaintext.
    Plaintext,
    /// By the certificates in these files, as they are when a connection is made.
    Tls(Files),
}

/// Servers that all serve the same cluster.
#[derive(Debug, Clone)]
pub struct Servers {
    servers: Vec<Server>,
    /// `None` = plaintext.
    credentials: Option<Credentials>,
}

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
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

impl Servers {
    /// Checks URLs (`https://host:port`; `http://host:port` for plaintext only) and reads
    /// credentials. Connects to none.
    pub fn new(urls: &[String], security: &Security) -> Result<Self, ConfigError> {
        if urls.is_empty() {
            return Err(ConfigError::Empty);
        }
        let mut servers = urls.iter().map(|url| Server::new(url, security)).collect::<Result<Vec<_>, _>>()?;
        let credentials = match security {
            Security::Plaintext => None,
            Security::Tls(files) => {
                let (credentials, tls) = Credentials::read(files.clone())?;
                protect(&mut servers, &tls)?;
                Some(credentials)
            }
        };
        Ok(Self { servers, credentials })
    }

    pub(super) fn len(&self) -> usize {
        self.servers.len()
    }

    /// The server whose turn it is, to be connected to with the credentials of this moment.
    pub(super) fn get(&mut self, turn: usize) -> &Server {
        let servers = &mut self.servers;
        if let Some(credentials) = &mut self.credentials {
            credentials.renew(|tls| protect(servers, tls));
        }
        &self.servers[turn % self.servers.len()]
    }
}

/// Makes all servers use these credentials, or none.
fn protect(servers: &mut [Server], tls: &ClientTlsConfig) -> Result<(), CredentialsError> {
    let protected = |server: &Server| server.endpoint.clone().tls_config(tls.clone());
    let endpoints =
        servers.iter().map(protected).collect::<Result<Vec<_>, _>>().map_err(CredentialsError::Unusable)?;
    for (server, endpoint) in servers.iter_mut().zip(endpoints) {
        server.endpoint = endpoint;
    }
    Ok(())
}

impl Server {
    fn new(url: &str, security: &Security) -> Result<Self, ConfigError> {
        let fault = |reason: &str| ConfigError::Url { url: url.to_owned(), reason: reason.to_owned() };
        let uri: Uri = url.parse().map_err(|error| fault(&format!("{error}")))?;
        if uri.host().is_none() || uri.port_u16().is_none() {
            return Err(fault("a scheme, a host and a port are needed, as in https://host:7443"));
        }
        match (uri.scheme_str(), security) {
            (Some("http"), Security::Plaintext) | (Some("https"), Security::Tls(_)) => {}
            (Some("http"), Security::Tls(_)) => {
                return Err(fault("http:// is plaintext, which must be asked for"));
            }
            (Some("https"), Security::Plaintext) => {
                return Err(fault("https:// needs a certificate authority, not plaintext"));
            }
            _ => return Err(fault("only https:// and http:// are known")),
        }
        let endpoint = Endpoint::from(uri.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_connection_window_size(WINDOW_BYTES)
            .initial_stream_window_size(WINDOW_BYTES);
        Ok(Self { uri, endpoint })
    }

    pub(super) fn is_protected(&self) -> bool {
        self.uri.scheme_str() == Some("https")
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
