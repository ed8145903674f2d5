use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use lockstep_wire::v1::sync_service_client::SyncServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::Failure;
use super::args::Connection;

/// How long to try to reach the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is taken: a page of nodes of which everything fails.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// Connects, so that a server that is not there is said to be so before anything else.
pub(super) async fn connect(connection: &Connection) -> Result<Channel, Failure> {
    let url = url(connection).map_err(Failure::Usage)?;
    let mut endpoint = Endpoint::from_shared(url.clone())
        .map_err(|error| Failure::Usage(format!("--server {url}: {error}")))?
        .connect_timeout(CONNECT_TIMEOUT);
    if !connection.insecure {
        endpoint = endpoint.tls_config(tls(connection)?).context("TLS")?;
    }
    Ok(endpoint.connect().await.map_err(|error| anyhow::anyhow!("{url}: {}", chain(&error)))?)
}

/// Who knows how the cluster stands.
pub(super) fn status(channel: Channel) -> StatusServiceClient<Channel> {
    StatusServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// Who has the state itself.
pub(super) fn sync(channel: Channel) -> SyncServiceClient<Channel> {
    SyncServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// The URL with its scheme; plaintext only where it is asked for by name.
fn url(connection: &Connection) -> Result<String, String> {
    let server = connection.server.as_str();
    // By value: to the parser, LOCKSTEP_INSECURE=0 is the option all the same.
    if connection.insecure && (connection.ca.is_some() || connection.cert.is_some()) {
        return Err("--insecure cannot be used with --ca, --cert and --key".into());
    }
    match (server.split_once("://"), connection.insecure) {
        (None, false) => Ok(format!("https://{server}")),
        (None, true) => Ok(format!("http://{server}")),
        (Some(("http", _)), false) => Err(format!("--server {server}: plaintext needs --insecure")),
        (Some(("https", _)), true) => Err(format!("--server {server}: --insecure needs http://")),
        (Some(("http" | "https", _)), _) => Ok(server.into()),
        (Some((scheme, _)), _) => Err(format!("--server {server}: {scheme} is neither http nor https")),
    }
}

fn tls(connection: &Connection) -> Result<ClientTlsConfig, Failure> {
    let Some(ca) = &connection.ca else {
        return Err(Failure::Usage("--ca is missing (or --insecure for plaintext)".into()));
    };
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("--ca", ca)?));
    if let (Some(cert), Some(key)) = (&connection.cert, &connection.key) {
        config = config.identity(Identity::from_pem(read("--cert", cert)?, read("--key", key)?));
    }
    Ok(config)
}

fn read(flag: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{flag} {}", path.display()))
}

/// The transport's own text is "transport error"; what people need is below.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut parts = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if parts.last() != Some(&text) && text != "transport error" {
            parts.push(text);
        }
        next = error.source();
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(server: &str, insecure: bool) -> Result<String, String> {
        url(&Connection { server: server.into(), insecure, ca: None, cert: None, key: None })
    }

    #[test]
    fn plaintext_is_asked_for_by_name() {
        assert_eq!(at("h:1", false).unwrap(), "https://h:1");
        assert_eq!(at("h:1", true).unwrap(), "http://h:1");
        assert_eq!(at("http://h:1", true).unwrap(), "http://h:1");
        assert!(at("http://h:1", false).unwrap_err().contains("--insecure"));
        assert!(at("https://h:1", true).is_err());
        assert!(at("unix://h", true).is_err());
        let ca = Some("ca.pem".into());
        let both = Connection { server: "h:1".into(), insecure: true, ca, cert: None, key: None };
        assert!(url(&both).unwrap_err().contains("--insecure cannot be used with --ca"));
    }
}
