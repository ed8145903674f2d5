//! The cluster that is measured: ClusterIP Services with one TCP port and ten endpoints each,
//! spread over a hundred nodes; and a control plane's store that holds it.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, NodeContext, Port, Protocol,
    Service, ServiceKey, ServicePort, ServiceType, TrafficPolicy,
};
use lockstep_source::convert::SERVICE_NAME_LABEL;
use lockstep_store::{Changes, Position, Store};
use lockstep_wire::batch::{Transaction, UpdateWriter};
use lockstep_wire::frame::Frame;
use lockstep_wire::{convert, v1};

/// Endpoints of a Service.
pub const ENDPOINTS: u32 = 10;
/// Nodes that the endpoints are spread over.
const NODES: u32 = 100;
/// Cluster IPs count from here, 10.64.0.0.
const SERVICES_FROM: u32 = 0x0a40_0000;
/// Pods count from here, 10.128.0.0.
const PODS_FROM: u32 = 0x0a80_0000;
/// Replaced pods count from here, 10.192.0.0.
const REPLACED_FROM: u32 = 0x0ac0_0000;
/// The node that is measured.
pub const NODE: &str = "node-0";
/// Where its pods are.
pub const CLUSTER_CIDR: &str = "10.128.0.0/9";

/// A store, and what its server would send.
pub struct Upstream {
    store: Store,
    names: Vec<Arc<str>>,
    http: Arc<str>,
    services: u32,
    /// How often a Service was given other endpoints.
    turns: u32,
    /// Number of the last pod that took another's place.
    pods: u32,
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap_or(Port::MIN)
}

fn key(index: u32) -> ServiceKey {
    ServiceKey::new(format!("team-{}", index % 50), format!("service-{index:05}"))
}

/// What an event replaces.
#[derive(Debug, Clone, Copy)]
pub struct Replaced {
    /// In so many Services,
    pub services: u32,
    /// so many endpoints each.
    pub endpoints: u32,
}

impl Replaced {
    /// A single endpoint.
    pub const ONE: Self = Self { services: 1, endpoints: 1 };
    /// A thousand endpoints of as many Services: a node that had one of each is gone.
    pub const SPREAD: Self = Self { services: 1000, endpoints: 1 };
    /// A thousand endpoints of a hundred Services: all of them are rolled.
    pub const DENSE: Self = Self { services: 100, endpoints: ENDPOINTS };
}

/// The address of a pod that takes the place of another.
pub fn replacement(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(REPLACED_FROM + number % 0x3f_0000)
}

impl Upstream {
    /// A store with this many Services, as one transaction.
    pub fn new(services: u32) -> Self {
        let mut this = Self {
            store: Store::new(NonZeroU64::MIN, Instant::now()),
            names: (0..NODES).map(|node| format!("node-{node}").into()).collect(),
            http: "http".into(),
            services,
            turns: 0,
            pods: 0,
        };
        let mut changes = Changes::default();
        for index in 0..services {
            changes.upsert(this.service(index));
            changes.upsert(this.endpoints(index, 0, 0));
        }
        this.store.apply(changes, Instant::now());
        this
    }

    fn service(&self, index: u32) -> Service {
        Service {
            key: key(index),
            service_type: ServiceType::ClusterIp,
            cluster_ips: vec![Ipv4Addr::from(SERVICES_FROM + index + 1).into()],
            external_ips: Vec::new(),
            load_balancer_ingress: Vec::new(),
            ports: vec![ServicePort {
                protocol: Protocol::Tcp,
                port: port(80),
                name: self.http.clone(),
                node_port: None,
                app_protocol: None,
            }],
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Cluster,
            traffic_distribution: None,
            client_ip_affinity_seconds: None,
            load_balancer_source_ranges: Vec::new(),
            health_check_node_port: None,
            publish_not_ready_addresses: false,
        }
    }

    /// The first `replaced` endpoints are the pods from number `from` on.
    fn endpoints(&self, index: u32, replaced: u32, from: u32) -> EndpointSet {
        let endpoint = |at: u32| {
            let number = index * ENDPOINTS + at;
            let usual = Ipv4Addr::from(PODS_FROM + number + 1);
            let node = usize::try_from(number % NODES).unwrap_or_default();
            Endpoint {
                address: IpAddr::V4(if at < replaced { replacement(from + at) } else { usual }),
                node_name: Some(self.names[node].clone()),
                zone: None,
                conditions: Conditions::READY,
                hints: None,
            }
        };
        let service = key(index);
        let slice = format!("{}-x", service.name);
        let mut set = EndpointSet {
            key: EndpointSetKey::new(service, slice),
            family: Family::V4,
            ports: vec![EndpointPort { name: self.http.clone(), protocol: Protocol::Tcp, port: port(8080) }],
            endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        };
        set.canonicalise();
        set
    }

    /// The objects of one Service as they were loaded; or with the first endpoint replaced by the
    /// pod of that number.
    pub fn objects(&self, index: u32, replaced: Option<u32>) -> (Service, EndpointSet) {
        let from = replaced.unwrap_or_default();
        (self.service(index), self.endpoints(index, u32::from(replaced.is_some()), from))
    }

    /// The event that endpoints are replaced by other pods.
    pub fn replace(&mut self, what: Replaced) -> Changes {
        let mut changes = Changes::default();
        for _ in 0..what.services {
            changes.upsert(self.next_replaced(what.endpoints));
        }
        changes
    }

    /// The next Service's endpoints, so many of them replaced.
    fn next_replaced(&mut self, endpoints: u32) -> EndpointSet {
        self.turns = self.turns.wrapping_add(1);
        self.pods = self.pods.wrapping_add(endpoints);
        self.endpoints(self.turns.wrapping_mul(7919) % self.services, endpoints, self.pods)
    }

    /// The EndpointSlice that an API server sends when one endpoint is replaced, as JSON.
    pub fn watched_slice(&mut self) -> String {
        let set = self.next_replaced(1);
        let endpoints: Vec<_> = set.endpoints.iter().map(watched_endpoint).collect();
        let EndpointSetKey { service, slice } = &set.key;
        serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": *service.namespace,
                "name": **slice,
                "uid": "5f0c3fb4-8d6c-4c5e-9a4e-0a4c1b1f3f52",
                "resourceVersion": self.turns.to_string(),
                "labels": {SERVICE_NAME_LABEL: *service.name},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            "endpoints": endpoints,
        })
        .to_string()
    }

    /// Takes an event in and makes the frames for a stream that was at the head.
    pub fn publish(&mut self, changes: Changes) -> Result<Vec<Bytes>> {
        let before = self.store.head();
        self.store.apply(changes, Instant::now());
        let delta = self.store.delta(before.seq, true).context("history is short")?;
        let mut writer = writer(Some(before), delta.to)?;
        for entry in &delta.upserts {
            writer.upsert(entry.key.kind(), entry.version, &entry.body)?;
        }
        for patch in &delta.patches {
            writer.patch(&patch.key, patch.base, patch.version, &patch.patch)?;
        }
        Ok(bytes(writer.finish()))
    }

    /// What a stream that starts empty gets: Welcome and the whole state.
    pub fn greeting(&self) -> Result<Vec<Bytes>> {
        let node = NodeContext {
            uid: Some("uid".into()),
            addresses: vec![Ipv4Addr::new(192, 0, 2, 1).into()],
            ..NodeContext::unknown(NODE)
        };
        let welcome = v1::sync_response::Kind::Welcome(v1::Welcome {
            protocol: 1,
            resume_mode: v1::ResumeMode::Full as i32,
            head: Some(position(self.store.head())),
            heartbeat_interval: Some(Duration::from_secs(600).try_into()?),
            node_context: Some(convert::node_context_to_wire(&node)),
            ..Default::default()
        });
        let snapshot = self.store.snapshot();
        let mut writer = writer(None, snapshot.position)?;
        for entry in &snapshot.entries {
            writer.upsert(entry.key.kind(), entry.version, &entry.body)?;
        }
        let mut frames = vec![Frame::of(&v1::SyncResponse { kind: Some(welcome) })];
        frames.extend(writer.finish());
        Ok(bytes(frames))
    }
}

fn watched_endpoint(endpoint: &Endpoint) -> serde_json::Value {
    let pod = format!("pod-{}", endpoint.address);
    serde_json::json!({
        "addresses": [endpoint.address],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": endpoint.node_name.as_deref(),
        "targetRef": {"kind": "Pod", "namespace": "default", "name": pod, "uid": "9d1f0a55-6c39-4a77-8b0e-7f6f1f0e3c11"},
    })
}

fn writer(from: Option<Position>, to: Position) -> Result<UpdateWriter> {
    let full = from.is_none();
    let transaction = Transaction { from: from.map(position), to: position(to), full, trigger_time: None };
    Ok(UpdateWriter::new(transaction, true)?)
}

fn position(at: Position) -> v1::Position {
    v1::Position {
        epoch: at.epoch,
        seq: at.seq,
        digest: at.digest.to_bytes().to_vec().into(),
        source_revisions: Vec::new(),
        resource_count: at.resources,
    }
}

fn bytes(frames: Vec<Frame>) -> Vec<Bytes> {
    frames.into_iter().map(Bytes::from).collect()
}
