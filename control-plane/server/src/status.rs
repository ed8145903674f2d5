//! `lockstep.v1.StatusService`: read-only answers about the state and the nodes.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use lockstep_model::{Key, Kind, ServiceKey};
use lockstep_wire::v1;
use lockstep_wire::v1::status_service_server::StatusService;
use prost_types::Timestamp;
use tonic::{Request, Response, Status};

use crate::Hub;
use crate::convert;
use crate::hub::{Shared, invalid};

mod nodes;
mod services;
#[cfg(test)]
mod tests;
mod watch;

/// Page size where the request states none, and the largest one.
const PAGE: (u32, u32) = (100, 1_000);

/// Most nodes named for one failure.
const SAMPLE: usize = 20;

/// Answers from a hub.
#[derive(Debug, Clone)]
pub(crate) struct StatusQueries {
    hub: Arc<Hub>,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl StatusQueries {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }
}

#[tonic::async_trait]
impl StatusService for StatusQueries {
    type WatchConvergenceStream = Responses<v1::WatchConvergenceResponse>;
    type WaitStream = Responses<v1::WaitResponse>;

    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let shared = self.hub.lock();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(Response::new(v1::GetServerInfoResponse {
            server_id: self.hub.server_id.clone(),
            version: self.hub.config.version.clone(),
            head: Some(shared.position(shared.store.head().seq)),
            synced: shared.not_serving.is_none(),
            source_fresh_at: shared.source_fresh_at.map(Timestamp::from),
            streams: count(shared.nodes.stream_count()),
            services: shared.store.resource_count(Kind::Service),
            endpoint_sets: shared.store.resource_count(Kind::EndpointSet),
            service_cidrs: shared.store.resource_count(Kind::ServiceCidr),
            quarantined: count(shared.quarantine.len()),
            not_serving_reason: shared.not_serving.clone().unwrap_or_default(),
        }))
    }

    async fn list_services(
        &self,
        request: Request<v1::ListServicesRequest>,
    ) -> Result<Response<v1::ListServicesResponse>, Status> {
        let shared = self.hub.lock();
        shared.check_serving()?;
        services::list(&shared, &request.into_inner()).map(Response::new)
    }

    async fn get_service(
        &self,
        request: Request<v1::GetServiceRequest>,
    ) -> Result<Response<v1::GetServiceResponse>, Status> {
        let request = request.into_inner();
        let shared = self.hub.lock();
        shared.check_serving()?;
        let key = service_key(&request.namespace, &request.name)?;
        services::get(&shared, &key).map(Response::new)
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        nodes::list(&self.hub.lock(), &request.into_inner()).map(Response::new)
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::GetNodeResponse>, Status> {
        nodes::get(&self.hub.lock(), &request.into_inner().node_name).map(Response::new)
    }

    async fn watch_convergence(
        &self,
        request: Request<v1::WatchConvergenceRequest>,
    ) -> Result<Response<Self::WatchConvergenceStream>, Status> {
        Ok(Response::new(watch::convergence(self.hub.clone(), &request.into_inner())))
    }

    async fn wait(&self, request: Request<v1::WaitRequest>) -> Result<Response<Self::WaitStream>, Status> {
        let deadline = watch::deadline(request.metadata());
        watch::wait(self.hub.clone(), &request.into_inner(), deadline).map(Response::new)
    }

    async fn list_failures(
        &self,
        request: Request<v1::ListFailuresRequest>,
    ) -> Result<Response<v1::ListFailuresResponse>, Status> {
        let request = request.into_inner();
        let class = v1::FailureReason::try_from(request.reason)
            .map_err(|_| invalid(format!("reason: {} is not a value this release knows", request.reason)))?;
        Ok(Response::new(failures(&self.hub.lock(), &request.namespace, class)))
    }
}

/// Node failures grouped by resource and reason, and the quarantine.
fn failures(shared: &Shared, namespace: &str, class: v1::FailureReason) -> v1::ListFailuresResponse {
    // What has no key is told apart by its message.
    let mut groups: BTreeMap<(Option<&Key>, &str, v1::FailureReason), v1::FailureGroup> = BTreeMap::new();
    let mut failed_nodes = Vec::new();
    for (name, node) in shared.nodes.iter(None) {
        if !node.backend_error().is_empty() {
            failed_nodes.push(name.to_string());
        }
        for failure in node.failures() {
            let reason = convert::class_to_wire(failure.class);
            let key = failure.key.as_ref();
            let wanted = (namespace.is_empty()
                || key.and_then(Key::service).is_some_and(|service| *service.namespace == *namespace))
                && (class == v1::FailureReason::Unspecified || class == reason);
            if !wanted {
                continue;
            }
            let nameless = if key.is_none() { &*failure.message } else { "" };
            let group = groups.entry((key, nameless, reason)).or_insert_with(|| v1::FailureGroup {
                r#ref: key.map(|key| lockstep_wire::convert::key_to_wire(key, failure.version)),
                reason: reason.into(),
                sample_message: failure.message.to_string(),
                ..Default::default()
            });
            group.node_count += 1;
            if group.sample_nodes.len() < SAMPLE {
                group.sample_nodes.push(name.to_string());
            }
        }
    }
    let mut groups: Vec<v1::FailureGroup> = groups.into_values().collect();
    // Stable: equal counts stay sorted by resource and reason.
    groups.sort_by_key(|group| std::cmp::Reverse(group.node_count));
    let in_namespace = |name: &str| {
        namespace.is_empty() || name.split_once('/').is_some_and(|(of_object, _)| of_object == namespace)
    };
    let quarantined = shared.quarantine.iter().filter(|(_, name, _)| in_namespace(name));
    let quarantined = quarantined.map(|(kind, name, why)| v1::QuarantinedObject {
        kind: kind.into(),
        name: name.into(),
        field: why.fault.field.clone(),
        value: convert::shortened(&why.fault.value, 128).into(),
        reason: why.fault.reason.clone(),
        in_force: match why.previous_in_force {
            true => v1::InForce::Previous,
            false => v1::InForce::Nothing,
        }
        .into(),
        since: Some(why.since.into()),
    });
    v1::ListFailuresResponse { groups, quarantined: quarantined.collect(), failed_nodes }
}

fn service_key(namespace: &str, name: &str) -> Result<ServiceKey, Status> {
    match (namespace, name) {
        ("", _) => Err(invalid("namespace: is missing")),
        (_, "") => Err(invalid("name: is missing")),
        _ => Ok(ServiceKey::new(namespace, name)),
    }
}

fn page_size(asked: u32) -> usize {
    let size = if asked == 0 { PAGE.0 } else { asked.min(PAGE.1) };
    size as usize
}
