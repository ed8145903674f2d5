use lockstep_wire::v1;
use lockstep_wire::v1::sync_request::Kind as Request;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::sync::watch;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1 as reflection, v1alpha as reflection_alpha};

use crate::testing::{Node, PATIENCE, World, hello, refusal, request};
use crate::{Acceptor, Config, Tls};

/// A certificate authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// (certificate, key) for a common name, valid for localhost.
    fn issue(&self, common: &str) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, common);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn client(&self, identity: Option<(String, String)>) -> ClientTlsConfig {
        let tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.pem)).domain_name("localhost");
        match identity {
            Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
            None => tls,
        }
    }
}

async fn world(authority: &Authority, mutual: bool) -> World {
    let (certificate, key) = authority.issue("control-plane");
    let client_ca = mutual.then(|| authority.pem.clone().into_bytes());
    let tls = Tls { certificate: certificate.into_bytes(), key: key.into_bytes(), client_ca };
    let config = Config { node_name_from_certificate: mutual, ..Config::default() };
    let (_, acceptors) = watch::channel(Acceptor::new(&tls).unwrap());
    let world = World::unsynced(config, Some(acceptors)).await;
    world.hub.start_serving();
    world
}

async fn connect(world: &World, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
    let url = format!("https://{}", world.address);
    Channel::from_shared(url).unwrap().tls_config(tls)?.connect().await
}

#[tokio::test]
async fn with_a_server_certificate_clients_need_none() {
    let authority = Authority::new();
    let world = world(&authority, false).await;
    let channel = connect(&world, authority.client(None)).await.unwrap();
    Node::start(channel, hello("n1", "a")).await.unwrap().reach(1).await;
    assert!(connect(&world, Authority::new().client(None)).await.is_err(), "not our authority");
}

#[tokio::test]
async fn a_client_certificate_speaks_for_the_node_it_names() {
    let authority = Authority::new();
    let world = world(&authority, true).await;
    let n1 = authority.client(Some(authority.issue("system:node:n1")));
    let channel = connect(&world, n1).await.unwrap();
    Node::start(channel.clone(), hello("n1", "a")).await.unwrap().reach(1).await;
    let refused = refusal(channel, vec![request(Request::Hello(hello("n2", "a")))]).await;
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(
        refused.message(),
        r#"hello.node_name: "n2" is not in the client certificate, which names ["n1", "localhost"]"#
    );
    for tls in [authority.client(None), authority.client(Some(Authority::new().issue("n1")))] {
        // TLS 1.3 tells a client that it was refused only after its handshake.
        if let Ok(channel) = connect(&world, tls).await {
            let refused = refusal(channel, vec![request(Request::Hello(hello("n1", "b")))]).await;
            assert_ne!(refused.code(), Code::Ok);
        }
    }
    assert_eq!(world.hub.overview().counts.expected, 0, "nobody else ever was a node here");
}

#[tokio::test]
async fn sync_is_healthy_once_it_serves() {
    let mut world = World::unsynced(Config::default(), None).await;
    let mut client = HealthClient::new(world.channel().await);
    let ask = HealthCheckRequest { service: "lockstep.v1.SyncService".into() };
    let mut watch = client.watch(ask).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while !seen.contains(&ServingStatus::Serving) {
        let next = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
        seen.push(next.status());
        if seen.len() == 1 || next.status() == ServingStatus::NotServing {
            world.hub.start_serving();
        }
    }
    assert_ne!(seen[0], ServingStatus::Serving);
    world.stop.take().unwrap().send(()).unwrap();
    let last = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(last.status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn both_reflections_know_the_contract() {
    let world = World::new(Config::default()).await;
    let symbol = "lockstep.v1.SyncService";
    let mut client = reflection::server_reflection_client::ServerReflectionClient::new(world.channel().await);
    let ask = reflection::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(reflection::server_reflection_request::MessageRequest::FileContainingSymbol(
            symbol.into(),
        )),
    };
    let mut answers = client.server_reflection_info(tokio_stream::iter([ask])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    use reflection::server_reflection_response::MessageResponse;
    assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
    let mut client =
        reflection_alpha::server_reflection_client::ServerReflectionClient::new(world.channel().await);
    let ask = reflection_alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(reflection_alpha::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
    };
    let mut answers = client.server_reflection_info(tokio_stream::iter([ask])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    use reflection_alpha::server_reflection_response::MessageResponse as AlphaResponse;
    let AlphaResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["lockstep.v1.SyncService", "lockstep.v1.StatusService", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[tokio::test]
async fn the_status_service_answers_before_sync_does() {
    let world = World::unsynced(Config::default(), None).await;
    let mut client = world.status().await;
    assert!(!client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner().synced);
}
