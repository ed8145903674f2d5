//! A real server on loopback, and clients driven by hand.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, Interner, Protocol, Service,
    ServiceKey, ServicePort, ServiceType, State, TrafficPolicy,
};
use lockstep_store::Changes;
use lockstep_wire::batch::Unpacker;
use lockstep_wire::raw::sync_service_client::SyncServiceClient;
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use lockstep_wire::{ReceivedPatch, convert, decode_resource, raw, v1};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::{Acceptor, Config, Hub, serve};

/// Nothing in these tests takes this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A server in this process.
pub(crate) struct World {
    pub(crate) hub: Arc<Hub>,
    pub(crate) address: SocketAddr,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) server: tokio::task::JoinHandle<Result<(), crate::ServeError>>,
}

impl World {
    /// A server that serves nothing yet.
    pub(crate) async fn unsynced(config: Config, tls: Option<watch::Receiver<Acceptor>>) -> Self {
        let hub = Arc::new(Hub::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(serve(hub.clone(), listener, tls, async {
            // A dropped sender is the end of the test, which is no reason for goodbyes.
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        }));
        Self { hub, address, stop: Some(stop), server }
    }

    /// A server that serves an empty state.
    pub(crate) async fn new(config: Config) -> Self {
        let world = Self::unsynced(config, None).await;
        world.hub.start_serving();
        world
    }

    pub(crate) fn publish(&self, change: impl FnOnce(&mut Changes)) {
        let mut changes = Changes::default();
        change(&mut changes);
        self.hub.publish(changes, Instant::now());
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn status(&self) -> StatusServiceClient<Channel> {
        StatusServiceClient::new(self.channel().await)
    }

    /// A node that has said Hello and got its Welcome.
    pub(crate) async fn node(&self, hello: v1::Hello) -> Node {
        Node::start(self.channel().await, hello).await.unwrap()
    }
}

pub(crate) fn hello(node: &str, instance: &str) -> v1::Hello {
    v1::Hello {
        node_name: node.into(),
        instance_id: instance.into(),
        agent_version: "test".into(),
        protocol_min: 1,
        protocol_max: 1,
        features: vec![v1::Feature::EndpointPatch.into(), v1::Feature::Zstd.into()],
        backend: Some(v1::Backend { kind: v1::BackendKind::External.into(), ..Default::default() }),
        ..Default::default()
    }
}

pub(crate) fn ack(head: &v1::Position, seq: u64) -> v1::Ack {
    v1::Ack {
        received_seq: seq,
        applied_seq: seq,
        verified_seq: seq,
        position: Some(v1::Position { seq, ..head.clone() }),
        outcome: v1::Outcome::Verified.into(),
        ..Default::default()
    }
}

pub(crate) fn request(kind: v1::sync_request::Kind) -> v1::SyncRequest {
    v1::SyncRequest { kind: Some(kind) }
}

/// Opens a stream and sends these messages.
pub(crate) async fn open(
    channel: Channel,
    first: Vec<v1::SyncRequest>,
) -> Result<(mpsc::Sender<v1::SyncRequest>, Streaming<raw::SyncResponse>), Status> {
    let (sender, receiver) = mpsc::channel(64);
    for message in first {
        sender.send(message).await.unwrap();
    }
    let mut client = SyncServiceClient::new(channel).max_encoding_message_size(usize::MAX);
    let responses = client.sync(ReceiverStream::new(receiver)).await?.into_inner();
    Ok((sender, responses))
}

/// The status with which a stream that begins like this ends.
pub(crate) async fn refusal(channel: Channel, first: Vec<v1::SyncRequest>) -> Status {
    match open(channel, first).await {
        Err(status) => status,
        Ok((_sender, mut responses)) => {
            let answer = tokio::time::timeout(PATIENCE, responses.message()).await.unwrap();
            answer.expect_err("the stream is refused")
        }
    }
}

/// A client that holds state as a node does.
pub(crate) struct Node {
    pub(crate) sender: mpsc::Sender<v1::SyncRequest>,
    pub(crate) responses: Streaming<raw::SyncResponse>,
    pub(crate) welcome: v1::Welcome,
    pub(crate) state: State,
    pub(crate) position: v1::Position,
    /// What the last transaction was made of.
    pub(crate) last: Transaction,
    committed: bool,
}

/// What a transaction was made of.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Transaction {
    pub(crate) messages: usize,
    pub(crate) full: bool,
    pub(crate) from: Option<u64>,
    pub(crate) upserts: usize,
    pub(crate) removals: usize,
    pub(crate) patches: usize,
}

impl Node {
    pub(crate) async fn start(channel: Channel, hello: v1::Hello) -> Result<Self, Status> {
        let (sender, mut responses) =
            open(channel, vec![request(v1::sync_request::Kind::Hello(hello))]).await?;
        let first = tokio::time::timeout(PATIENCE, responses.message()).await.unwrap()?;
        let Some(raw::sync_response::Kind::Welcome(welcome)) = first.and_then(|response| response.kind)
        else {
            panic!("the first message is a Welcome");
        };
        Ok(Self {
            sender,
            responses,
            welcome,
            state: State::default(),
            position: v1::Position::default(),
            last: Transaction::default(),
            committed: true,
        })
    }

    pub(crate) fn resume(&self) -> v1::ResumeMode {
        self.welcome.resume_mode()
    }

    pub(crate) async fn send(&self, kind: v1::sync_request::Kind) {
        self.sender.send(request(kind)).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> Result<Option<raw::sync_response::Kind>, Status> {
        let message =
            tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("a message in time")?;
        Ok(message.map(|message| message.kind.unwrap()))
    }

    /// The next message that is no update; applies those before it.
    pub(crate) async fn next_other(&mut self) -> raw::sync_response::Kind {
        loop {
            match self.next().await.unwrap().expect("the stream goes on") {
                raw::sync_response::Kind::Update(update) => self.take(update),
                other => return other,
            }
        }
    }

    /// Applies updates until a transaction has led to `seq`.
    pub(crate) async fn reach(&mut self, seq: u64) {
        while self.position.seq != seq || self.position.epoch == 0 {
            if let raw::sync_response::Kind::Update(update) = self.next().await.unwrap().unwrap() {
                self.take(update);
            }
        }
        assert_eq!(
            self.state.digest().to_bytes()[..],
            self.position.digest[..],
            "holds what the server says"
        );
    }

    pub(crate) fn take(&mut self, update: raw::Update) {
        let mut interner = Interner::default();
        if self.committed {
            self.last = Transaction::default();
            if update.full {
                self.state = State::default();
            }
        }
        self.committed = update.commit;
        let last = &mut self.last;
        last.messages += 1;
        last.full = update.full;
        last.from = update.from.as_ref().map(|from| from.seq);
        let payload = update.payload.map(|payload| Unpacker::new().unwrap().unpack(payload).unwrap());
        let batch = payload.unwrap_or_default();
        last.upserts += batch.upserts.len();
        last.removals += batch.removals.len();
        last.patches += batch.patches.len();
        for resource in &batch.upserts {
            let (version, resource) = decode_resource(resource, &mut interner).unwrap();
            self.state.upsert(version, resource);
        }
        for removal in &batch.removals {
            self.state.remove(&convert::key_from_wire(removal).unwrap().0);
        }
        for patch in &batch.patches {
            let patch = ReceivedPatch::read(patch).unwrap();
            let key = convert::key_from_text(lockstep_model::Kind::EndpointSet, patch.key).unwrap();
            let (base, lockstep_model::Resource::EndpointSet(set)) = self.state.get(&key).unwrap() else {
                panic!()
            };
            assert_eq!(base.0[..], *patch.base_version);
            let patched = set.patched(patch.decode(&mut interner).unwrap());
            let resource = lockstep_model::Resource::from(patched);
            self.state.upsert(resource.version(), resource);
        }
        if update.commit {
            self.position = update.to.unwrap();
        }
    }
}

/// A Service whose content depends on `variant`.
pub(crate) fn service(name: &str, variant: u8) -> Service {
    Service {
        key: ServiceKey::new("default", name),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![IpAddr::V4(Ipv4Addr::new(10, 96, 0, variant))],
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: 80.try_into().unwrap(),
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
}

/// The endpoint set NAME-1 of a Service with this many endpoints, of which the last one is at
/// `moving`.
pub(crate) fn set(name: &str, endpoints: u16, moving: u8) -> EndpointSet {
    let endpoint = |a: u8, b: u8| Endpoint {
        address: IpAddr::V4(Ipv4Addr::new(10, 1, a, b)),
        node_name: Some("n1".into()),
        zone: None,
        conditions: Conditions::READY,
        hints: None,
    };
    let mut set = EndpointSet {
        key: EndpointSetKey::new(ServiceKey::new("default", name), format!("{name}-1")),
        family: Family::V4,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080.try_into().unwrap(),
        }],
        endpoints: (1..endpoints).map(|index| endpoint((index >> 8) as u8, (index & 0xff) as u8)).collect(),
    };
    set.endpoints.push(endpoint(200, moving));
    set.canonicalise();
    set
}
