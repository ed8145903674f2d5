//! All services on one port.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use lockstep_wire::frame::sync_service_server::SyncServiceServer;
use lockstep_wire::v1::status_service_server::StatusServiceServer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::{Connected, Router};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::connections::{plain, protected};
use crate::status::StatusQueries;
use crate::sync::Sync;
use crate::{Acceptor, Hub};

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

/// Why the server cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Reflection has no usable descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The listener broke.
    #[error("gRPC: {0}")]
    Transport(#[source] tonic::transport::Error),
}

/// Serves until `shutdown` is done, then ends every stream with a Goodbye. With `tls`, each new
/// connection is taken in by the acceptor of that moment; without, connections are plaintext.
pub async fn serve(
    hub: Arc<Hub>,
    listener: TcpListener,
    tls: Option<watch::Receiver<Acceptor>>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let follow = tokio::spawn(follow_health(hub.clone(), health));
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE / 2))
        .max_concurrent_streams(256)
        .add_service(SyncServiceServer::new(Sync::new(hub.clone())).max_decoding_message_size(MAX_INBOUND))
        .add_service(
            StatusServiceServer::new(StatusQueries::new(hub.clone())).max_decoding_message_size(MAX_INBOUND),
        )
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    let result = match tls {
        None => serve_connections(&hub, router, plain(listener), shutdown).await,
        Some(acceptors) => serve_connections(&hub, router, protected(listener, acceptors), shutdown).await,
    };
    follow.abort();
    result
}

async fn serve_connections<IO>(
    hub: &Hub,
    router: Router,
    incoming: impl Stream<Item = std::io::Result<IO>>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
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
    tokio::select! {
        result = serving => result.map_err(ServeError::Transport),
        () = grace => Ok(()),
    }
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
