//! All services on one port.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use lockstep_wire::frame::sync_service_server::SyncServiceServer;
use lockstep_wire::v1::status_service_server::StatusServiceServer;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::warn;

use crate::Hub;
use crate::status::StatusQueries;
use crate::sync::Sync;

#[cfg(test)]
mod tests;

/// Largest message a client may send, as the contract has it.
const MAX_INBOUND: usize = lockstep_wire::batch::MAX_MESSAGE_BYTES;

/// Name of the Sync service in `grpc.health.v1`.
const SYNC_SERVICE: &str = "lockstep.v1.SyncService";

/// How long a stream may take to end by itself when the server goes.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(3);

/// A connection that is silent for this long is asked whether it is alive, and closed where it
/// does not answer: a node that lost its power must not look connected.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// How long nothing is accepted after an error. Most are about one connection; but without file
/// descriptors every attempt fails at once, and only time helps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Certificates, all PEM.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Certificate chain of the server.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// Certificate authorities of clients. `None` = clients need no certificate.
    pub client_ca: Option<Vec<u8>>,
}

/// Why the server cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates are not usable.
    #[error("TLS: {0:?}")]
    Tls(#[source] tonic::transport::Error),
    /// Reflection has no usable descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The listener broke.
    #[error("gRPC: {0}")]
    Transport(#[source] tonic::transport::Error),
}

/// Serves until `shutdown` is done, then ends every stream with a Goodbye.
pub async fn serve(
    hub: Arc<Hub>,
    listener: TcpListener,
    tls: Option<Tls>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let follow = tokio::spawn(follow_health(hub.clone(), health));
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE / 2))
        .max_concurrent_streams(256);
    if let Some(tls) = tls {
        server = server.tls_config(tls.into_config()).map_err(ServeError::Tls)?;
    }
    let router = server
        .add_service(SyncServiceServer::new(Sync::new(hub.clone())).max_decoding_message_size(MAX_INBOUND))
        .add_service(
            StatusServiceServer::new(StatusQueries::new(hub.clone())).max_decoding_message_size(MAX_INBOUND),
        )
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    let incoming = connections(listener, ACCEPT_PAUSE);
    let (stopped, stopping) = tokio::sync::oneshot::channel::<()>();
    let serving = router.serve_with_incoming_shutdown(incoming, async {
        shutdown.await;
        hub.shut_down();
        let _ = stopped.send(());
    });
    // A reader that does not read would keep the server up for ever.
    let grace = async {
        match stopping.await {
            Ok(()) => tokio::time::sleep(SHUTDOWN_GRACE).await,
            Err(_) => std::future::pending().await,
        }
    };
    let result = tokio::select! {
        result = serving => result.map_err(ServeError::Transport),
        () = grace => Ok(()),
    };
    follow.abort();
    result
}

/// Connections as they come. Goes on whatever happens, and says so once per trouble.
fn connections(
    listener: TcpListener,
    pause: Duration,
) -> impl Stream<Item = std::io::Result<TcpStream>> + Send {
    stream::unfold((listener, false), move |(listener, mut troubled)| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    // A connection that is gone already says so itself when it is read.
                    let _ = connection.set_nodelay(true);
                    return Some((Ok(connection), (listener, false)));
                }
                Err(error) => {
                    if !std::mem::replace(&mut troubled, true) {
                        warn!(%error, "a connection could not be accepted, trying on");
                    }
                    tokio::time::sleep(pause).await;
                }
            }
        }
    })
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(lockstep_wire::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Sync is healthy when it serves; the status service always is, so that people can ask why
/// Sync is not.
async fn follow_health(hub: Arc<Hub>, health: HealthReporter) {
    health.set_service_status("lockstep.v1.StatusService", ServingStatus::Serving).await;
    let mut serving = hub.serving();
    loop {
        let status = match *serving.borrow_and_update() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        health.set_service_status(SYNC_SERVICE, status).await;
        if serving.changed().await.is_err() {
            return;
        }
    }
}

impl Tls {
    fn into_config(self) -> ServerTlsConfig {
        let config = ServerTlsConfig::new().identity(Identity::from_pem(self.certificate, self.key));
        match self.client_ca {
            Some(ca) => config.client_ca_root(Certificate::from_pem(ca)),
            None => config,
        }
    }
}
