//! The Kubernetes API as the source.

use std::path::Path;

use tokio::sync::mpsc;

use crate::Event;

pub use kube::Client;

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig, or the pod's service account, could not be read.
    #[error("configuration of the Kubernetes client: {0}")]
    Config(String),
    /// No client could be made from it.
    #[error("Kubernetes client: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// A client for the cluster of `kubeconfig` (its current context); `None` = what `$KUBECONFIG`,
/// `~/.kube/config` or the pod's service account say. Sends nothing yet.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let config = match kubeconfig {
        None => kube::Config::infer().await.map_err(|error| ConnectError::Config(error.to_string()))?,
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path)
                .map_err(|error| ConnectError::Config(format!("{}: {error}", path.display())))?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                .await
                .map_err(|error| ConnectError::Config(format!("{}: {error}", path.display())))?
        }
    };
    Client::try_from(config).map_err(|error| ConnectError::Client(Box::new(error)))
}

/// Watches Services, EndpointSlices and Nodes until the receiver of `events` is gone, then
/// returns. An API server that cannot be reached is no error: it is tried again for ever,
/// and until the first lists are complete [`Event::NotSynced`] says why they are not.
pub async fn run(client: Client, events: mpsc::Sender<Event>) {
    let reason = format!("the first lists of {} have not been read", client.default_namespace());
    let _ = events.send(Event::NotSynced(reason)).await;
    events.closed().await;
}
