//! A control plane small enough to be obviously right: what the tests converge to.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, Key, NodeContext, Port,
    Protocol, Resource, Service, ServiceCidr, ServiceCidrKey, ServiceKey, ServicePort, ServiceType, State,
    TrafficPolicy, Version,
};
use lockstep_wire::batch::{self, UpdateWriter};
use lockstep_wire::frame::Frame;
use lockstep_wire::{convert, raw, v1};

use crate::session::{Identity, Now, Session};
use crate::{Held, Position};

pub(crate) fn identity() -> Identity {
    Identity {
        node_name: "node-a".into(),
        instance_id: "instance".to_owned(),
        started: SystemTime::UNIX_EPOCH,
        boot_id: String::new(),
        agent_version: "test".to_owned(),
        backend: v1::Backend::default(),
        features: vec![v1::Feature::Sctp],
        settings: None,
        kernel_adopted: false,
    }
}

pub(crate) fn session(held: Option<Held>) -> Session {
    Session::new(identity(), held)
}

pub(crate) fn at(seconds: u64) -> Now {
    use std::sync::OnceLock;
    static START: OnceLock<Instant> = OnceLock::new();
    let after = Duration::from_secs(seconds);
    Now {
        monotonic: *START.get_or_init(Instant::now) + after,
        wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000) + after,
    }
}

pub(crate) fn service_key(index: u8) -> ServiceKey {
    ServiceKey::new("shop", format!("cart-{index}"))
}

pub(crate) fn set_key(index: u8) -> EndpointSetKey {
    EndpointSetKey::new(service_key(index), format!("cart-{index}-x1"))
}

/// A Service; `variant` changes its content.
pub(crate) fn service(index: u8, variant: u8) -> Resource {
    Service {
        key: service_key(index),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![Ipv4Addr::new(10, 96, variant, index).into()],
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: Port::new(80).unwrap(),
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
    .into()
}

/// An EndpointSet with one endpoint per listed number.
pub(crate) fn endpoints(index: u8, hosts: &[u8]) -> Resource {
    let endpoint = |host: &u8| Endpoint {
        address: Ipv4Addr::new(10, 244, index, *host).into(),
        node_name: Some("node-a".into()),
        zone: None,
        conditions: Conditions::READY,
        hints: None,
    };
    let mut set = EndpointSet {
        key: set_key(index),
        family: Family::V4,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: Port::new(8080).unwrap(),
        }],
        endpoints: hosts.iter().map(endpoint).collect(),
    };
    set.canonicalise();
    set.into()
}

pub(crate) fn cidr_key(index: u8) -> ServiceCidrKey {
    ServiceCidrKey(format!("range-{index}").into())
}

/// A ServiceCidr; `variant` changes its content.
pub(crate) fn service_cidr(index: u8, variant: u8) -> Resource {
    let cidrs = vec![format!("10.{index}.{variant}.0/24").parse().unwrap()];
    ServiceCidr { key: cidr_key(index), cidrs }.into()
}

/// One server process: a state and how it got there.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) epoch: u64,
    /// States by seq; the last one is the head.
    pub(crate) history: Vec<State>,
}

impl Server {
    /// A server whose first published state is `state`.
    pub(crate) fn new(epoch: u64, state: State) -> Self {
        Self { epoch, history: vec![State::default(), state] }
    }

    pub(crate) fn head(&self) -> &State {
        &self.history[self.history.len() - 1]
    }

    pub(crate) fn seq(&self) -> u64 {
        self.history.len() as u64 - 1
    }

    pub(crate) fn position(&self, seq: u64) -> Position {
        let digest = self.history[usize::try_from(seq).unwrap()].digest();
        Position { epoch: self.epoch, seq, digest }
    }

    /// Publishes a change.
    pub(crate) fn publish(&mut self, change: impl FnOnce(&mut State)) {
        let mut next = self.head().clone();
        change(&mut next);
        self.history.push(next);
    }

    pub(crate) fn upsert(&mut self, resource: Resource) {
        self.publish(|state| {
            state.upsert(resource.version(), resource);
        });
    }

    pub(crate) fn remove(&mut self, key: &Key) {
        self.publish(|state| {
            state.remove(key);
        });
    }

    pub(crate) fn welcome(&self, mode: v1::ResumeMode) -> raw::SyncResponse {
        batch::decode_response(self.welcome_frame(mode).into()).unwrap()
    }

    pub(crate) fn welcome_frame(&self, mode: v1::ResumeMode) -> Frame {
        let node = NodeContext { uid: Some("uid".into()), ..NodeContext::unknown("node-a") };
        let kind = v1::sync_response::Kind::Welcome(v1::Welcome {
            protocol: 1,
            resume_mode: mode as i32,
            head: Some(self.position(self.seq()).to_wire(0)),
            heartbeat_interval: Some(Duration::from_secs(5).try_into().unwrap()),
            node_context: Some(convert::node_context_to_wire(&node)),
            ..Default::default()
        });
        Frame::of(&v1::SyncResponse { kind: Some(kind) })
    }

    pub(crate) fn heartbeat(&self) -> raw::SyncResponse {
        let head = Some(self.position(self.seq()).to_wire(0));
        decoded(v1::sync_response::Kind::Heartbeat(v1::Heartbeat { head, source_fresh_at: None }))
    }

    /// What the protocol says about a Hello: the mode, and the frames that follow.
    pub(crate) fn answer(&self, hello: &v1::SyncRequest) -> (v1::ResumeMode, Vec<raw::SyncResponse>) {
        let Some(v1::sync_request::Kind::Hello(hello)) = &hello.kind else { panic!("not a Hello") };
        let held = hello.held.as_ref().map(|held| Position::from_wire(held).unwrap());
        match held {
            Some(held) if held.digest == self.head().digest() => (v1::ResumeMode::InSync, Vec::new()),
            Some(held) if held.epoch == self.epoch && self.is_at(held, &hello.position_digest) => {
                (v1::ResumeMode::Delta, self.delta(held.seq, self.seq(), false))
            }
            _ => (v1::ResumeMode::Full, self.full()),
        }
    }

    /// Whether a client was brought to the state of the seq it names, all of it taken in or not.
    fn is_at(&self, held: Position, stated: &[u8]) -> bool {
        let reached = self.position(held.seq).digest;
        held.digest == reached || stated == reached.to_bytes()
    }

    /// The whole head.
    pub(crate) fn full(&self) -> Vec<raw::SyncResponse> {
        decode(self.full_frames())
    }

    pub(crate) fn full_frames(&self) -> Vec<Frame> {
        let mut writer = self.writer(None, self.seq(), true);
        for (version, resource) in sorted(self.head()) {
            writer.upsert(resource.key().kind(), version, &resource.canonical()).unwrap();
        }
        writer.finish()
    }

    /// What changed between two states, with patches where wanted and possible.
    pub(crate) fn delta(&self, from: u64, to: u64, patches: bool) -> Vec<raw::SyncResponse> {
        let (old, new) =
            (&self.history[usize::try_from(from).unwrap()], &self.history[usize::try_from(to).unwrap()]);
        let mut writer = self.writer(Some(from), to, false);
        for (version, resource) in sorted(new) {
            let key = resource.key();
            match (old.get(&key), &resource) {
                (Some((before, _)), _) if before == version => {}
                (Some((base, Resource::EndpointSet(before))), Resource::EndpointSet(set)) if patches => {
                    let patch = before.patch_to(set).unwrap();
                    writer.patch(&set.key, base, version, &patch).unwrap();
                }
                _ => writer.upsert(key.kind(), version, &resource.canonical()).unwrap(),
            }
        }
        sorted(old)
            .iter()
            .map(|(_, resource)| resource.key())
            .filter(|key| new.get(key).is_none())
            .for_each(|key| writer.remove(&key));
        finish(writer)
    }

    /// The answer to a Refetch, at position `seq` of the stream.
    pub(crate) fn refetched(&self, refetch: &v1::SyncRequest, seq: u64) -> Vec<raw::SyncResponse> {
        let Some(v1::sync_request::Kind::Refetch(refetch)) = &refetch.kind else { panic!("not a Refetch") };
        if refetch.everything {
            return self.full();
        }
        let state = &self.history[usize::try_from(seq).unwrap()];
        let mut writer = self.writer(None, seq, false);
        for reference in &refetch.refs {
            let (key, _) = convert::key_from_wire(reference).unwrap();
            match state.get(&key) {
                Some((version, resource)) => {
                    writer.upsert(key.kind(), version, &resource.canonical()).unwrap();
                }
                None => writer.remove(&key),
            }
        }
        finish(writer)
    }

    fn writer(&self, from: Option<u64>, to: u64, full: bool) -> UpdateWriter {
        let from = from.map(|seq| self.position(seq).to_wire(0));
        let to = self.position(to).to_wire(0);
        UpdateWriter::new(batch::Transaction { from, to, full, trigger_time: None }, true).unwrap()
    }
}

fn sorted(state: &State) -> Vec<(Version, Resource)> {
    let mut all: Vec<_> = state.resources().collect();
    all.sort_by_key(|(_, resource)| resource.key());
    all
}

fn finish(writer: UpdateWriter) -> Vec<raw::SyncResponse> {
    decode(writer.finish())
}

fn decode(frames: Vec<Frame>) -> Vec<raw::SyncResponse> {
    frames.into_iter().map(|frame| batch::decode_response(frame.into()).unwrap()).collect()
}

pub(crate) fn decoded(kind: v1::sync_response::Kind) -> raw::SyncResponse {
    let frame = Frame::of(&v1::SyncResponse { kind: Some(kind) });
    batch::decode_response(frame.into()).unwrap()
}

/// The update in a frame, to be tampered with.
pub(crate) fn update_of(frame: &mut raw::SyncResponse) -> &mut raw::Update {
    match &mut frame.kind {
        Some(raw::sync_response::Kind::Update(update)) => update,
        other => panic!("not an Update: {other:?}"),
    }
}

/// The batch in a frame that is not compressed.
pub(crate) fn batch_of(frame: &mut raw::SyncResponse) -> &mut raw::ResourceBatch {
    match &mut update_of(frame).payload {
        Some(raw::update::Payload::Batch(batch)) => batch,
        other => panic!("not a plain batch: {other:?}"),
    }
}

/// The body of the `index`th upsert.
pub(crate) fn body_of(frame: &mut raw::SyncResponse, index: usize) -> &mut Bytes {
    match batch_of(frame).upserts[index].body.as_mut().unwrap() {
        raw::resource::Body::Service(body)
        | raw::resource::Body::EndpointSet(body)
        | raw::resource::Body::ServiceCidr(body) => body,
    }
}

/// A state of services 0..`count`, each with three endpoints.
pub(crate) fn cluster(count: u8) -> State {
    let mut state = State::default();
    for index in 0..count {
        for resource in [service(index, 0), endpoints(index, &[1, 2, 3])] {
            state.upsert(resource.version(), resource);
        }
    }
    state
}
