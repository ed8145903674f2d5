//! `lockstep.v1.SyncService`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt, stream};
use lockstep_model::{Kind, ServiceKey};
use lockstep_wire::batch::SnapshotWriter;
use lockstep_wire::frame::Frame;
use lockstep_wire::frame::sync_service_server::SyncService;
use lockstep_wire::v1;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use crate::Hub;
use crate::frames::Dialect;
use crate::hub::invalid;
use crate::identity;

mod inbound;
mod session;
#[cfg(test)]
mod tests;

use session::Session;

/// The protocol version in force. There is one so far.
const PROTOCOL: u32 = 1;

/// Session features that this server has.
const FEATURES: [v1::Feature; 2] = [v1::Feature::EndpointPatch, v1::Feature::Zstd];

/// Serves streams from a hub.
#[derive(Debug, Clone)]
pub(crate) struct Sync {
    hub: Arc<Hub>,
}

type FrameStream = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

impl Sync {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }
}

#[tonic::async_trait]
impl SyncService for Sync {
    type SyncStream = FrameStream;
    type FetchSnapshotStream = FrameStream;

    /// Answers at once and waits for Hello inside the response: a client may well wait for the
    /// headers before it sends anything.
    async fn sync(
        &self,
        request: Request<Streaming<v1::SyncRequest>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        self.hub.lock().check_serving().inspect_err(|_| self.hub.counters.streams_refused.inc())?;
        let peer = request.remote_addr().map_or_else(|| "unknown".into(), |address| address.to_string());
        let names = match self.hub.config.node_name_from_certificate {
            true => Some(identity::node_names(request.peer_certs().as_deref().map_or(&[], |certs| certs))),
            false => None,
        };
        let hub = self.hub.clone();
        let inbound = request.into_inner();
        let start = async move {
            match open(&hub, inbound, peer.clone(), names).await {
                Ok(session) => session.into_stream(),
                Err(status) => {
                    debug!(peer, code = ?status.code(), message = status.message(), "stream refused");
                    hub.counters.streams_refused.inc();
                    stream::once(async { Err(status) }).boxed()
                }
            }
        };
        Ok(Response::new(stream::once(start).flatten().boxed()))
    }

    async fn fetch_snapshot(
        &self,
        request: Request<v1::FetchSnapshotRequest>,
    ) -> Result<Response<Self::FetchSnapshotStream>, Status> {
        let filter = Filter::new(request.into_inner())?;
        self.hub.lock().check_serving()?;
        let hub = self.hub.clone();
        let frames = tokio::task::spawn_blocking(move || {
            let (snapshot, position) = {
                let shared = hub.lock();
                (shared.store.snapshot(), shared.position(shared.store.head().seq))
            };
            let mut writer = SnapshotWriter::new(position);
            for entry in snapshot.entries.iter().filter(|entry| filter.takes(&entry.key)) {
                writer
                    .upsert(entry.key.kind(), entry.version, &entry.body)
                    .map_err(|error| crate::frames::too_large(&entry.key, error.bytes))?;
            }
            Ok::<_, crate::frames::BuildError>(writer.finish())
        });
        let frames = frames.await.map_err(internal)?.map_err(internal)?;
        Ok(Response::new(stream::iter(frames.into_iter().map(Ok)).boxed()))
    }
}

/// Reads Hello and starts the session.
async fn open(
    hub: &Arc<Hub>,
    mut inbound: Streaming<v1::SyncRequest>,
    peer: String,
    names: Option<Vec<String>>,
) -> Result<Session, Status> {
    let first = tokio::time::timeout(hub.config.hello_timeout, inbound.message()).await;
    let first = first.map_err(|_| {
        Status::invalid_argument(format!("no Hello within {} s", hub.config.hello_timeout.as_secs_f32()))
    })?;
    let hello = match first?.and_then(|request| request.kind) {
        Some(v1::sync_request::Kind::Hello(hello)) => hello,
        Some(_) => return Err(invalid("the first message is not a Hello")),
        None => return Err(invalid("the first message is missing or empty, it must be a Hello")),
    };
    if !(hello.protocol_min..=hello.protocol_max).contains(&PROTOCOL) {
        return Err(Status::failed_precondition(format!(
            "hello.protocol_min: this server speaks protocol {PROTOCOL}, the client {} to {}",
            hello.protocol_min, hello.protocol_max
        )));
    }
    if let Some(names) = names.filter(|names| !names.contains(&hello.node_name)) {
        return Err(Status::permission_denied(format!(
            "hello.node_name: {:?} is not in the client certificate, which names {names:?}",
            hello.node_name
        )));
    }
    let features: Vec<i32> =
        FEATURES.map(i32::from).into_iter().filter(|feature| hello.features.contains(feature)).collect();
    let has = |feature: v1::Feature| features.contains(&feature.into());
    let dialect = Dialect { zstd: has(v1::Feature::Zstd), patches: has(v1::Feature::EndpointPatch) };
    let admission = hub.admit(hello, peer)?;
    let welcome = v1::Welcome {
        server_id: hub.server_id.clone(),
        server_version: hub.config.version.clone(),
        protocol: PROTOCOL,
        features,
        resume_mode: crate::convert::resume(admission.resume).into(),
        head: Some(admission.head.clone()),
        heartbeat_interval: Some(crate::convert::duration(hub.config.heartbeat)),
        node_context: Some(admission.context.clone()),
    };
    Ok(Session::new(hub.clone(), admission, dialect, welcome, inbound))
}

/// Which part of a snapshot is asked for.
#[derive(Debug)]
struct Filter {
    namespace: String,
    service: String,
    kinds: Vec<Kind>,
}

impl Filter {
    fn new(request: v1::FetchSnapshotRequest) -> Result<Self, Status> {
        if request.namespace.is_empty() && !request.service.is_empty() {
            return Err(invalid("service: needs namespace"));
        }
        let kinds = request.kinds.iter().map(|kind| {
            lockstep_wire::convert::kind_from_wire("kinds", *kind).map_err(|fault| invalid(fault.to_string()))
        });
        let kinds = kinds.collect::<Result<_, _>>()?;
        Ok(Self { namespace: request.namespace, service: request.service, kinds })
    }

    fn takes(&self, key: &lockstep_model::Key) -> bool {
        let of = |wanted: &str, name: fn(&ServiceKey) -> &str| {
            wanted.is_empty() || key.service().is_some_and(|service| name(service) == wanted)
        };
        of(&self.namespace, |service| &service.namespace)
            && of(&self.service, |service| &service.name)
            && (self.kinds.is_empty() || self.kinds.contains(&key.kind()))
    }
}

fn internal(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}
