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
    replaced: u32,
    services: u32,
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap_or(Port::MIN)
}

fn key(index: u32) -> ServiceKey {
    ServiceKey::new(format!("team-{}", index % 50), format!("service-{index:05}"))
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
            replaced: 0,
            services,
        };
        let mut changes = Changes::default();
        for index in 0..services {
            changes.upsert(this.service(index));
            changes.upsert(this.endpoints(index, None));
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

    fn endpoints(&self, index: u32, first: Option<Ipv4Addr>) -> EndpointSet {
        let endpoint = |at: u32| {
            let number = index * ENDPOINTS + at;
            let usual = Ipv4Addr::from(PODS_FROM + number + 1);
            let node = usize::try_from(number % NODES).unwrap_or_default();
            Endpoint {
                address: IpAddr::V4(first.filter(|_| at == 0).unwrap_or(usual)),
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
        (self.service(index), self.endpoints(index, replaced.map(replacement)))
    }

    /// The event that one endpoint of each of `services` Services is replaced by another pod.
    pub fn replace(&mut self, services: u32) -> Changes {
        let mut changes = Changes::default();
        for _ in 0..services {
            self.replaced += 1;
            let index = self.replaced.wrapping_mul(7919) % self.services;
            changes.upsert(self.endpoints(index, Some(replacement(self.replaced))));
        }
        changes
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
