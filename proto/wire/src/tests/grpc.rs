//! The frame server and the raw client against the stock typed halves, over loopback gRPC: the
//! wire form of all three is one.

use std::net::SocketAddr;
use std::pin::Pin;

use crate::batch::{SnapshotWriter, Transaction, Unpacker, UpdateWriter};
use crate::frame::Frame;
use crate::frame::sync_service_server::{SyncService, SyncServiceServer};
use crate::{convert, decode_resource, raw, v1};
use lockstep_model::{
    Interner, Key, Kind, Port, Protocol, Resource, Service, ServiceKey, ServicePort, ServiceType,
};
use lockstep_model::{State, TrafficPolicy};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Serves one fixed state.
struct Fixed {
    state: State,
}

type Frames = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

impl Fixed {
    fn position(&self) -> v1::Position {
        v1::Position {
            epoch: 7,
            seq: 1,
            digest: convert::digest_to_wire(self.state.digest()),
            source_revisions: Vec::new(),
            resource_count: self.state.len(),
        }
    }

    fn sorted(&self) -> Vec<(Key, lockstep_model::Version, Resource)> {
        let mut all: Vec<_> =
            self.state.resources().map(|(version, resource)| (resource.key(), version, resource)).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

#[tonic::async_trait]
impl SyncService for Fixed {
    type SyncStream = Frames;
    type FetchSnapshotStream = Frames;

    async fn sync(&self, request: Request<Streaming<v1::SyncRequest>>) -> Result<Response<Frames>, Status> {
        let mut requests = request.into_inner();
        let hello = requests.message().await?.and_then(|request| request.kind);
        let Some(v1::sync_request::Kind::Hello(hello)) = hello else {
            return Err(Status::invalid_argument("the first message is no Hello"));
        };
        let welcome =
            v1::Welcome { server_id: hello.node_name, head: Some(self.position()), ..Default::default() };
        let kind = Some(v1::sync_response::Kind::Welcome(welcome));
        let mut frames = vec![Frame::of(&v1::SyncResponse { kind })];
        let transaction = Transaction { to: self.position(), full: true, ..Default::default() };
        let mut writer = UpdateWriter::new(transaction, true)?;
        for (key, version, resource) in self.sorted() {
            writer.upsert(key.kind(), version, &resource.canonical()).unwrap();
        }
        frames.extend(writer.finish());
        Ok(Response::new(Box::pin(tokio_stream::iter(frames).map(Ok))))
    }

    async fn fetch_snapshot(&self, _: Request<v1::FetchSnapshotRequest>) -> Result<Response<Frames>, Status> {
        let mut writer = SnapshotWriter::new(self.position());
        for (key, version, resource) in self.sorted() {
            writer.upsert(key.kind(), version, &resource.canonical()).unwrap();
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(writer.finish()).map(Ok))))
    }
}

fn service(index: u32) -> Service {
    Service {
        key: ServiceKey::new("shop", format!("cart-{index}")),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![std::net::Ipv4Addr::from(0x0a60_0000 + index).into()],
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: Port::new(80).unwrap(),
            name: "http".into(),
            node_port: None,
            app_protocol: Some("kubernetes.io/h2c".into()),
        }],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        traffic_distribution: None,
        client_ip_affinity_seconds: Some(10_800),
        load_balancer_source_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        health_check_node_port: None,
        publish_not_ready_addresses: false,
    }
}

fn state(services: u32) -> State {
    let mut state = State::default();
    for resource in (0..services).map(service).map(Resource::from) {
        assert!(state.upsert(resource.version(), resource));
    }
    state
}

async fn serve(state: State) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = tonic::transport::Server::builder().add_service(SyncServiceServer::new(Fixed { state }));
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

async fn channel(address: SocketAddr) -> tonic::transport::Channel {
    tonic::transport::Endpoint::try_from(format!("http://{address}")).unwrap().connect().await.unwrap()
}

fn hello() -> v1::SyncRequest {
    let hello = v1::Hello { node_name: "node-a".into(), instance_id: "1".into(), ..Default::default() };
    v1::SyncRequest { kind: Some(v1::sync_request::Kind::Hello(hello)) }
}

#[tokio::test]
async fn raw_client_rebuilds_the_state_from_frames() {
    let sent = state(20_000);
    let address = serve(sent.clone()).await;
    let mut client = raw::sync_service_client::SyncServiceClient::new(channel(address).await);
    let mut responses = client.sync(tokio_stream::iter([hello()])).await.unwrap().into_inner();

    let mut held = State::default();
    let (mut unpacker, mut interner) = (Unpacker::new().unwrap(), Interner::default());
    let (mut welcomed, mut messages, mut committed) = (false, 0, false);
    while let Some(response) = responses.message().await.unwrap() {
        match response.kind.unwrap() {
            raw::sync_response::Kind::Welcome(welcome) => {
                assert_eq!(welcome.server_id, "node-a");
                welcomed = true;
            }
            raw::sync_response::Kind::Update(update) => {
                assert!(welcomed && !committed && update.full);
                messages += 1;
                committed = update.commit;
                for resource in unpacker.unpack(update.payload.unwrap()).unwrap().upserts {
                    let (version, resource) = decode_resource(&resource, &mut interner).unwrap();
                    held.upsert(version, resource);
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(committed && messages > 1, "{messages} messages");
    assert_eq!((held.len(), held.digest()), (sent.len(), sent.digest()));
}

#[tokio::test]
async fn stock_client_reads_frames_as_typed_messages() {
    let sent = state(3);
    let address = serve(sent.clone()).await;
    let mut client = v1::sync_service_client::SyncServiceClient::new(channel(address).await);
    let mut responses =
        client.fetch_snapshot(v1::FetchSnapshotRequest::default()).await.unwrap().into_inner();
    let response = responses.message().await.unwrap().unwrap();
    assert_eq!(response.position.unwrap().digest, sent.digest().to_bytes()[..]);
    let upserts = response.batch.unwrap().upserts;
    let names: Vec<_> = upserts
        .iter()
        .map(|resource| match resource.body.as_ref().unwrap() {
            v1::resource::Body::Service(service) => service.name.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names, ["cart-0", "cart-1", "cart-2"]);
    assert!(responses.message().await.unwrap().is_none());
    let key = convert::key_from_text(Kind::Service, "shop/cart-1").unwrap();
    assert_eq!(upserts[1].version, sent.get(&key).unwrap().0.0[..]);
}

#[tokio::test]
async fn server_refuses_what_it_cannot_decode() {
    let address = serve(state(0)).await;
    let mut client = raw::sync_service_client::SyncServiceClient::new(channel(address).await);
    let error = client.sync(tokio_stream::iter([v1::SyncRequest { kind: None }])).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
}
