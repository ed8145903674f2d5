use std::collections::{HashMap, HashSet};

use lockstep_model::{Resource, Service, ServiceKey, ServicePort};
use lockstep_store::PageEntry;
use lockstep_wire::{convert as wire, v1};
use tonic::Status;

use super::page_size;
use crate::hub::{Shared, invalid};

/// Most nodes named as behind for one Service.
const NODES_BEHIND: usize = 100;

pub(super) fn list(
    shared: &Shared,
    request: &v1::ListServicesRequest,
) -> Result<v1::ListServicesResponse, Status> {
    let after = match request.page_token.as_str() {
        "" => None,
        token => {
            let (namespace, name) =
                token.split_once('/').ok_or_else(|| invalid("page_token: is not one of this list's"))?;
            Some(ServiceKey::new(namespace, name))
        }
    };
    let namespace = (!request.namespace.is_empty()).then_some(request.namespace.as_str());
    let size = page_size(request.page_size);
    let mut page: Vec<PageEntry> = shared.store.services(namespace, after.as_ref()).take(size + 1).collect();
    let more = page.len() > size;
    page.truncate(size);
    let next_page_token = match page.last() {
        Some(last) if more => last.service.key.to_string(),
        _ => String::new(),
    };
    let nodes = Progress::new(shared);
    Ok(v1::ListServicesResponse {
        services: page.iter().map(|entry| nodes.summary(entry)).collect(),
        next_page_token,
        position: Some(shared.position(shared.store.head().seq)),
    })
}

pub(super) fn get(shared: &Shared, key: &ServiceKey) -> Result<v1::GetServiceResponse, Status> {
    let view =
        shared.store.service(key).ok_or_else(|| Status::not_found(format!("service {key}: not found")))?;
    let changed = Some(view.summary.last_changed_seq);
    let behind =
        shared.nodes.iter(None).filter(|(_, node)| node.levels().verified < changed || node.may_fail(key));
    Ok(v1::GetServiceResponse {
        service: Some(wire::resource_to_wire(view.version, &Resource::Service(view.summary.service.clone()))),
        endpoint_sets: view.sets.iter().map(|(version, set)| wire::resource_to_wire(*version, set)).collect(),
        summary: Some(Progress::new(shared).summary(&view.summary)),
        nodes_behind: behind.take(NODES_BEHIND).map(|(name, _)| name.to_string()).collect(),
    })
}

/// How far the nodes are, once for a whole page.
struct Progress {
    /// Sorted.
    verified: Vec<Option<u64>>,
    failing: HashMap<ServiceKey, u32>,
}

impl Progress {
    fn new(shared: &Shared) -> Self {
        let mut verified = Vec::new();
        let mut failing = HashMap::new();
        for (_, node) in shared.nodes.iter(None) {
            verified.push(node.levels().verified);
            let services: HashSet<_> = node.failing_services().collect();
            services.into_iter().for_each(|key| *failing.entry(key.clone()).or_default() += 1);
        }
        verified.sort_unstable();
        Self { verified, failing }
    }

    fn summary(&self, entry: &PageEntry) -> v1::ServiceSummary {
        let service = &*entry.service;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let before = self.verified.partition_point(|verified| *verified < Some(entry.last_changed_seq));
        let addresses = service.cluster_ips.iter().chain(&service.external_ips).copied();
        let addresses = addresses.chain(service.load_balancer_ingress.iter().map(|ingress| ingress.ip));
        v1::ServiceSummary {
            namespace: service.key.namespace.to_string(),
            name: service.key.name.to_string(),
            r#type: service_type(service).into(),
            addresses: addresses.map(|address| address.to_string()).collect(),
            ports: service.ports.iter().map(port).collect(),
            ready_endpoints: entry.ready_endpoints,
            total_endpoints: entry.total_endpoints,
            last_changed_seq: entry.last_changed_seq,
            nodes_verified: count(self.verified.len() - before),
            nodes_expected: count(self.verified.len()),
            nodes_failing: self.failing.get(&service.key).copied().unwrap_or(0),
        }
    }
}

fn service_type(service: &Service) -> v1::ServiceType {
    match service.service_type {
        lockstep_model::ServiceType::ClusterIp => v1::ServiceType::ClusterIp,
        lockstep_model::ServiceType::NodePort => v1::ServiceType::NodePort,
        lockstep_model::ServiceType::LoadBalancer => v1::ServiceType::LoadBalancer,
    }
}

/// "http 80/TCP", "80:30080/TCP".
fn port(port: &ServicePort) -> String {
    let name = if port.name.is_empty() { String::new() } else { format!("{} ", port.name) };
    let node_port = port.node_port.map(|port| format!(":{port}")).unwrap_or_default();
    format!("{name}{}{node_port}/{}", port.port, port.protocol)
}
