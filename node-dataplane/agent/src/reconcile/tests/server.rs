//! A control plane in a few lines: one state, one stream.

use std::net::Ipv4Addr;
use std::time::Duration;

use lockstep_client::Position;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, Key, NodeContext, Port,
    Protocol, Resource, Service, ServiceCidr, ServiceCidrKey, ServiceKey, ServicePort, ServiceType, State,
    TrafficPolicy,
};
use lockstep_wire::batch::{Transaction, UpdateWriter};
use lockstep_wire::frame::Frame;
use lockstep_wire::{convert, v1};

#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) seq: u64,
    /// `None` = the cluster has no Node object of the agent's name.
    pub(super) node_uid: Option<&'static str>,
    state: State,
    /// What the stream has got so far.
    sent: (u64, State),
}

pub(super) fn key(index: u8) -> ServiceKey {
    ServiceKey::new("shop", format!("cart-{index}"))
}

impl Server {
    pub(super) fn new() -> Self {
        Self { seq: 1, node_uid: Some("uid"), state: State::default(), sent: (0, State::default()) }
    }

    /// A Service at an address made of its number and `variant`, with one endpoint.
    pub(super) fn service(&mut self, index: u8, variant: u8) {
        self.same_address(index, index, variant);
        self.endpoints(index, &[1]);
    }

    /// A Service at the address of another.
    pub(super) fn same_address(&mut self, index: u8, other: u8, variant: u8) {
        let http = Port::new(80).unwrap();
        self.upsert(
            Service {
                key: key(index),
                service_type: ServiceType::ClusterIp,
                cluster_ips: vec![Ipv4Addr::new(10, 96, variant, other).into()],
                external_ips: Vec::new(),
                load_balancer_ingress: Vec::new(),
                ports: vec![ServicePort {
                    protocol: Protocol::Tcp,
                    port: http,
                    name: "http".into(),
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
            .into(),
        );
    }

    pub(super) fn endpoints(&mut self, index: u8, hosts: &[u8]) {
        let endpoint = |host: &u8| Endpoint {
            address: Ipv4Addr::new(10, 244, index, *host).into(),
            node_name: None,
            zone: None,
            conditions: Conditions::READY,
            hints: None,
        };
        self.upsert(
            EndpointSet {
                key: EndpointSetKey::new(key(index), "slice"),
                family: Family::V4,
                ports: vec![EndpointPort {
                    name: "http".into(),
                    protocol: Protocol::Tcp,
                    port: Port::new(8080).unwrap(),
                }],
                endpoints: hosts.iter().map(endpoint).collect(),
            }
            .into(),
        );
    }

    pub(super) fn service_cidr(&mut self, range: &str) {
        let key = ServiceCidrKey("kubernetes".into());
        self.upsert(ServiceCidr { key, cidrs: vec![range.parse().unwrap()] }.into());
    }

    fn upsert(&mut self, resource: Resource) {
        self.state.upsert(resource.version(), resource);
        self.seq += 1;
    }

    pub(super) fn remove(&mut self, index: u8) {
        self.state.remove(&Key::Service(key(index)));
        self.seq += 1;
    }

    fn position(&self) -> v1::Position {
        Position { epoch: 7, seq: self.seq, digest: self.state.digest() }.to_wire(self.state.len())
    }

    /// Welcome and what follows it.
    pub(super) fn welcome(&mut self, hello: &v1::Hello) -> Vec<Frame> {
        let in_sync = hello.held.as_ref().is_some_and(|held| held.digest == self.position().digest);
        let mode = if in_sync { v1::ResumeMode::InSync } else { v1::ResumeMode::Full };
        let node = NodeContext { uid: self.node_uid.map(Into::into), ..NodeContext::unknown("node-a") };
        let welcome = v1::Welcome {
            protocol: 1,
            resume_mode: mode as i32,
            head: Some(self.position()),
            heartbeat_interval: Duration::from_secs(3_600).try_into().ok(),
            node_context: Some(convert::node_context_to_wire(&node)),
            ..Default::default()
        };
        let kind = Some(v1::sync_response::Kind::Welcome(welcome));
        let mut frames = vec![Frame::of(&v1::SyncResponse { kind })];
        if !in_sync {
            frames.extend(self.frames(None));
        }
        self.sent = (self.seq, self.state.clone());
        frames
    }

    /// What changed since the last frame.
    pub(super) fn delta(&mut self) -> Frame {
        let before = Position { epoch: 7, seq: self.sent.0, digest: self.sent.1.digest() };
        let mut frames = self.frames(Some(before));
        self.sent = (self.seq, self.state.clone());
        assert_eq!(frames.len(), 1);
        frames.remove(0)
    }

    /// A transaction that changes nothing.
    pub(super) fn empty(&mut self) -> Frame {
        self.delta()
    }

    fn frames(&self, from: Option<Position>) -> Vec<Frame> {
        let full = from.is_none();
        let transaction = Transaction {
            from: from.map(|from| from.to_wire(0)),
            to: self.position(),
            full,
            trigger_time: None,
        };
        let mut writer = UpdateWriter::new(transaction, false).unwrap();
        for (version, resource) in self.state.resources() {
            let key = resource.key();
            let known = self.sent.1.get(&key).is_some_and(|(sent, _)| sent == version);
            if full || !known {
                writer.upsert(key.kind(), version, &resource.canonical()).unwrap();
            }
        }
        for (_, resource) in self.sent.1.resources() {
            if !full && self.state.get(&resource.key()).is_none() {
                writer.remove(&resource.key());
            }
        }
        writer.finish()
    }
}
