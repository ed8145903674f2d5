//! Every command against a real server in this process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, InvalidField, NodeContext,
    Protocol, Service, ServiceKey, ServicePort, ServiceType, TrafficPolicy,
};
use lockstep_server::{Config, Hub, Input, NodeInput, QuarantineInput, run_intake, serve};
use lockstep_wire::v1;
use lockstep_wire::v1::sync_request::Kind;
use lockstep_wire::v1::sync_service_client::SyncServiceClient;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::args::Args;
use super::{Failure, commands};

mod before;
mod explain;

struct World {
    hub: Arc<Hub>,
    address: SocketAddr,
    inputs: mpsc::Sender<Input>,
}

fn service(name: &str) -> Service {
    Service {
        key: ServiceKey::new("default", name),
        service_type: ServiceType::NodePort,
        cluster_ips: vec![IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1))],
        external_ips: vec![IpAddr::V4(Ipv4Addr::new(192, 0, 2, 80))],
        load_balancer_ingress: Vec::new(),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: 80.try_into().unwrap(),
            name: "http".into(),
            node_port: Some(30_080.try_into().unwrap()),
            app_protocol: None,
        }],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Local,
        traffic_distribution: None,
        client_ip_affinity_seconds: None,
        load_balancer_source_ranges: Vec::new(),
        health_check_node_port: None,
        publish_not_ready_addresses: false,
    }
}

fn endpoints(name: &str) -> EndpointSet {
    let endpoint = |last: u8, ready: bool| Endpoint {
        address: IpAddr::V4(Ipv4Addr::new(10, 1, 0, last)),
        node_name: Some("n1".into()),
        zone: None,
        conditions: Conditions { ready, serving: ready, terminating: !ready },
        hints: None,
    };
    EndpointSet {
        key: EndpointSetKey::new(ServiceKey::new("default", name), format!("{name}-x")),
        family: Family::V4,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080.try_into().unwrap(),
        }],
        endpoints: vec![endpoint(1, true), endpoint(2, false)],
    }
}

impl World {
    /// A server with one Service, one Node object without a stream, and one broken object.
    async fn new() -> Self {
        let hub = Arc::new(Hub::new(Config::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(hub.clone(), listener, None, std::future::pending()));
        let (inputs, taken) = mpsc::channel(16);
        tokio::spawn(run_intake(hub.clone(), taken));
        let world = Self { hub, address, inputs };
        let mut changes = lockstep_store::Changes::default();
        changes.upsert(service("web"));
        changes.upsert(endpoints("web"));
        let fault = InvalidField {
            field: "spec.ports[0].port".into(),
            value: "0".into(),
            reason: "is not a port".into(),
        };
        world
            .input(Input::Changes {
                changes,
                nodes: vec![NodeInput::Upsert(NodeContext {
                    uid: Some("u".into()),
                    ..NodeContext::unknown("absent")
                })],
                quarantine: vec![QuarantineInput::Add {
                    kind: "Service".into(),
                    name: "default/broken".into(),
                    fault,
                    previous_in_force: true,
                }],
            })
            .await;
        world.input(Input::Synced).await;
        let mut serving = world.hub.serving();
        serving.wait_for(|serving| *serving).await.unwrap();
        world
    }

    async fn input(&self, input: Input) {
        self.inputs.send(input).await.unwrap();
    }

    /// A node that follows and has verified the head, failing what it is told to.
    async fn node(&self, name: &str, failures: Vec<v1::ResourceFailure>) -> mpsc::Sender<v1::SyncRequest> {
        self.node_with(name, failures, None).await
    }

    /// The same, configured like this.
    async fn node_with(
        &self,
        name: &str,
        failures: Vec<v1::ResourceFailure>,
        settings: Option<v1::NodeSettings>,
    ) -> mpsc::Sender<v1::SyncRequest> {
        self.node_in(v1::BackendKind::Iptables, name, failures, settings).await
    }

    async fn node_in(
        &self,
        mode: v1::BackendKind,
        name: &str,
        failures: Vec<v1::ResourceFailure>,
        settings: Option<v1::NodeSettings>,
    ) -> mpsc::Sender<v1::SyncRequest> {
        let (sender, receiver) = mpsc::channel(8);
        let request = |kind| v1::SyncRequest { kind: Some(kind) };
        let hello = v1::Hello {
            node_name: name.into(),
            instance_id: "i".into(),
            agent_version: "1.2.3".into(),
            protocol_min: 1,
            protocol_max: 1,
            backend: Some(v1::Backend {
                kind: mode.into(),
                version: "legacy 1.8.9".into(),
                families: vec![],
            }),
            settings,
            ..Default::default()
        };
        sender.send(request(Kind::Hello(hello))).await.unwrap();
        let mut client = SyncServiceClient::new(
            Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap(),
        );
        let mut responses = client.sync(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let welcome = responses.message().await.unwrap().unwrap();
        let Some(v1::sync_response::Kind::Welcome(welcome)) = welcome.kind else { panic!("a Welcome") };
        responses.message().await.unwrap().unwrap();
        let seq = welcome.head.clone().unwrap_or_default().seq;
        let ack = v1::Ack {
            received_seq: seq,
            applied_seq: seq,
            verified_seq: seq,
            position: welcome.head,
            failures,
            ..Default::default()
        };
        sender.send(request(Kind::Ack(ack))).await.unwrap();
        // The stream is read for as long as the node is there.
        tokio::spawn(async move { while let Ok(Some(_)) = responses.message().await {} });
        while self.verified(name).await != Some(seq) {}
        sender
    }

    async fn verified(&self, name: &str) -> Option<u64> {
        let (text, _) = self.run(&format!("node {name} -o json")).await;
        let node: serde_json::Value = serde_json::from_str(&text).ok()?;
        node["verifiedSeq"].as_u64()
    }

    /// Output and exit code.
    async fn run(&self, line: &str) -> (String, u8) {
        let (text, result) = self.result(line).await;
        (text, result.as_ref().map_or_else(Failure::code, |()| 0))
    }

    async fn result(&self, line: &str) -> (String, Result<(), Failure>) {
        let line = format!("lockstepctl --server {} --insecure {line}", self.address);
        let args = Args::try_parse_from(line.split_whitespace()).unwrap();
        let mut out = Vec::new();
        let result =
            tokio::time::timeout(Duration::from_secs(20), commands::run(args, &mut out)).await.unwrap();
        (String::from_utf8(out).unwrap(), result)
    }

    /// Output with one space between columns and `T` for every time.
    async fn golden(&self, line: &str) -> String {
        let (text, code) = self.run(line).await;
        assert_eq!(code, 0, "{text}");
        normal(&text)
    }
}

fn normal(text: &str) -> String {
    let word = |word: &str| {
        let number = word.strip_suffix("ms").or_else(|| word.strip_suffix('s'));
        let is_time = number.is_some_and(|number| number.parse::<f64>().is_ok());
        let is_date = word.len() > 20 && word.ends_with('Z') && word.starts_with("20");
        let is_peer = word.starts_with("127.0.0.1:");
        match (is_time || is_date, is_peer) {
            (true, _) => "T".to_owned(),
            (_, true) => "PEER".to_owned(),
            _ => word.to_owned(),
        }
    };
    let line = |line: &str| line.split_whitespace().map(word).collect::<Vec<_>>().join(" ") + "\n";
    text.lines().map(line).collect()
}

fn failure() -> v1::ResourceFailure {
    v1::ResourceFailure {
        r#ref: Some(v1::ResourceRef {
            kind: v1::ResourceKind::Service.into(),
            key: "default/web".into(),
            ..Default::default()
        }),
        in_force: v1::InForce::Previous.into(),
        reason: v1::FailureReason::Kernel.into(),
        message: "no room".into(),
        retrying: true,
        attempts: 3,
        first_seen: None,
    }
}

#[tokio::test]
async fn status_says_who_is_behind() {
    let world = World::new().await;
    let _node = world.node("n1", vec![]).await;
    let text = world.golden("status").await;
    let expected = "Serving yes\n\
        Source heard of T ago\n\
        Head seq 1, 2 resources, digest DIGEST\n\
        Services 1 with 1 endpoint sets; 0 ServiceCIDRs\n\
        Quarantine 1 object, see `failures`\n\
        Nodes 2 expected: 1 received, 1 applied, 1 verified; 0 with failures, 1 without a stream\n\
        Converged not yet\n\
        \n\
        Not verified at the head:\n\
        NODE STATE BEHIND RECEIVED APPLIED VERIFIED BACKEND VERSION REASON\n\
        absent NeverSeen T 0 0 0 - - -\n";
    let digest = world.hub.overview().head.digest.to_string();
    assert_eq!(text, expected.replace("DIGEST", &digest[..12]));
}

#[tokio::test]
async fn services_are_listed_and_described() {
    let world = World::new().await;
    let _node = world.node("n1", vec![failure()]).await;
    let (list, _) = world.run("services").await;
    let expected = "\
NAMESPACE   NAME   TYPE       ADDRESSES              PORTS               READY   CHANGED   VERIFIED   FAILING
default     web    NodePort   10.96.0.1,192.0.2.80   http 80:30080/TCP   1/2     1         1/2        1
";
    assert_eq!(list, expected);
    let (detail, _) = world.run("service default/web").await;
    let expected = "\
Service           default/web
Type              NodePort
Addresses         10.96.0.1, 192.0.2.80
Ports             http 80:30080/TCP
Internal policy   Cluster
External policy   Local
Endpoints         1 ready of 2
Last changed      seq 1
Verified on       1 of 2 nodes
Failing on        1 nodes
Nodes behind      absent n1

SLICE   ENDPOINT   PORTS           STATE         NODE   ZONE
web-x   10.1.0.1   http 8080/TCP   ready         n1     -
web-x   10.1.0.2   http 8080/TCP   terminating   n1     -
";
    assert_eq!(detail, expected);
    let (none, _) = world.run("services -n other -o json").await;
    assert_eq!(none, "[]\n");
}

#[tokio::test]
async fn nodes_are_listed_and_described() {
    let world = World::new().await;
    let _node = world.node("n1", vec![failure()]).await;
    let list = world.golden("nodes").await;
    let expected = "NODE STATE BEHIND RECEIVED APPLIED VERIFIED BACKEND VERSION REASON\n\
        absent NeverSeen T 0 0 0 - - -\n\
        n1 Degraded - 1 1 1 iptables legacy 1.8.9 1.2.3 default/web: no room\n";
    assert_eq!(list, expected);
    assert!(!world.golden("nodes --behind").await.contains("n1"));
    assert!(!world.golden("nodes --failing").await.contains("absent"));
    let detail = world.golden("node n1").await;
    for line in [
        "State Degraded",
        "Progress head 1: sent 1, received 1, applied 1, verified 1",
        "Stream from PEER Full",
        "Node object no: nothing in the cluster has this name",
        "Service default/web Kernel Previous 3, retrying - no room",
    ] {
        assert!(detail.lines().any(|it| it == line), "{line:?} in\n{detail}");
    }
}

#[tokio::test]
async fn failures_name_resource_reason_and_nodes() {
    let world = World::new().await;
    let _node = world.node("n1", vec![failure()]).await;
    let expected = "Not in force on some nodes:\n\
        KIND RESOURCE REASON NODES MESSAGE FOR EXAMPLE\n\
        Service default/web Kernel 1 no room n1\n\
        \n\
        Source objects in quarantine:\n\
        KIND OBJECT FIELD VALUE IN FORCE SINCE WHY\n\
        Service default/broken spec.ports[0].port 0 Previous T is not a port\n";
    assert_eq!(world.golden("failures").await, expected);
}

#[tokio::test]
async fn a_failure_without_a_key_is_shown_by_its_message() {
    let world = World::new().await;
    let nameless = v1::ResourceFailure {
        r#ref: None,
        reason: v1::FailureReason::Unsupported.into(),
        message: "a kind of resource that this client does not know".into(),
        ..failure()
    };
    let _node = world.node("n1", vec![nameless]).await;
    let failures = world.golden("failures").await;
    let row = "Unknown - Unsupported 1 a kind of resource that this client does not know n1\n";
    assert!(failures.contains(row), "{failures}");
    let node = world.golden("node n1").await;
    let row =
        "Unknown - Unsupported Previous 3, retrying - a kind of resource that this client does not know\n";
    assert!(node.contains(row), "{node}");
    let nodes = world.golden("nodes --failing").await;
    assert!(nodes.contains(" a kind of resource that this client does not know\n"), "{nodes}");
    assert!(!nodes.contains(": a kind"), "{nodes}");
}

#[tokio::test]
async fn a_wait_ends_with_who_is_missing_or_with_everybody() {
    let world = World::new().await;
    let _node = world.node("n1", vec![]).await;
    let (text, code) = world.run("wait default/web --timeout 300ms").await;
    assert_eq!(code, 4);
    let expected = "default/web: seq 1 verified on 1 of 2 nodes after T\n\
        \n\
        Not done:\n\
        NODE STATE BEHIND REASON\n\
        absent NeverSeen T no stream since the server started\n";
    assert_eq!(normal(&text), expected);
    let (json, code) = world.run("wait --timeout 300ms -o json").await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["done"], &json["laggards"][0]["node"]), (4, &false.into(), &"absent".into()));
    world
        .input(Input::Changes {
            changes: Default::default(),
            nodes: vec![NodeInput::Remove("absent".into())],
            quarantine: vec![],
        })
        .await;
    for line in ["wait default/web --level applied", "wait"] {
        let (text, code) = world.run(line).await;
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("on 1 of 1 nodes"), "{text}");
    }
}

#[tokio::test]
async fn a_wait_may_be_a_moment_early() {
    let world = World::new().await;
    let create = async {
        // However this and the first question fall, the wait finds the Service.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let mut changes = lockstep_store::Changes::default();
        changes.upsert(Service { key: ServiceKey::new("default", "late"), ..service("web") });
        world.input(Input::Changes { changes, nodes: vec![], quarantine: vec![] }).await;
    };
    let ((text, code), ()) = tokio::join!(world.run("wait default/late --timeout 1s"), create);
    assert_eq!(code, 4, "{text}");
    assert!(text.starts_with("default/late: seq 2 verified on 0 of 1 nodes"), "{text}");
}

#[tokio::test]
async fn exit_codes_tell_what_went_wrong() {
    let world = World::new().await;
    for (line, expected) in [
        ("service default/gone", 3),
        ("node gone", 3),
        ("wait default/gone --timeout 300ms", 3),
        ("status --server https://127.0.0.1:1", 2),
        ("status --server http://127.0.0.1:1", 1),
    ] {
        let (text, code) = world.run(line).await;
        assert_eq!((code, text.as_str()), (expected, ""), "{line}");
    }
}

#[tokio::test]
async fn scripts_get_json_and_yaml() {
    let world = World::new().await;
    let (json, _) = world.run("status -o json").await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["head"]["seq"], &json["convergence"]["nodesExpected"]), (&1.into(), &1.into()));
    let (yaml, _) = world.run("service default/web -o yaml").await;
    assert!(
        yaml.contains("externalTrafficPolicy: Local\n") && yaml.contains("  - address: \"10.1.0.1\"\n"),
        "{yaml}"
    );
    let (lines, _) = world.run("watch --count 1 -o json").await;
    assert_eq!(lines.lines().count(), 1);
    assert!(lines.starts_with(r#"{"head":{"epoch":""#), "{lines}");
}
