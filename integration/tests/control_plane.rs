//! The whole way from a real API server through the real control plane to nodes that hold state:
//! with the rights of `deploy/rbac.yaml` only, and through kill -9 of either program.
//! Needs no root, only the real programs.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Client;
use lockstep_client::transport::Security;
use lockstep_integration::apiserver::{ApiServer, Cluster, Kind};
use lockstep_integration::control_plane::ControlPlane;
use lockstep_integration::follower::{Follower, Seen};
use lockstep_integration::leftovers::Directory;
use lockstep_wire::v1;
use serde_json::{Value, json};
use tokio::sync::Mutex;

/// Two cores start one API server after another faster than several at once.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
const PATIENCE: Duration = Duration::from_secs(60);

/// An API server, a control plane that follows it, and two nodes.
struct World {
    // Ends in this order: nobody is left to complain of who is gone.
    nodes: [Follower; 2],
    control_plane: ControlPlane,
    server: ApiServer,
    cluster: Cluster,
    _kubeconfig: Directory,
}

impl World {
    async fn start() -> Result<Self> {
        let server = ApiServer::start().await?;
        let cluster = server.cluster().await?;
        for name in ["web", "api"] {
            cluster.create(Kind::Service, service(name, 80)).await?;
            cluster.create(Kind::EndpointSlice, slice(name, &["10.1.0.1", "10.1.0.2"])).await?;
        }
        for name in ["node-1", "node-2"] {
            cluster.create(Kind::Node, json!({"metadata": {"name": name}})).await?;
        }
        let directory = Directory::new("lockstep-test-")?;
        let kubeconfig = minimal_kubeconfig(&server, cluster.client(), directory.path().join("kubeconfig"));
        let kubeconfig = kubeconfig.await?.display().to_string();
        let arguments = ["--source", "kubernetes", "--kubeconfig", &kubeconfig, "--insecure"];
        let mut control_plane = ControlPlane::start(&arguments).await?;
        control_plane.ready().await?;
        let urls = [control_plane.url()];
        let node = |name| Follower::start(name, &urls, &Security::Plaintext);
        let nodes = [node("node-1")?, node("node-2")?];
        Ok(Self { nodes, control_plane, server, cluster, _kubeconfig: directory })
    }

    /// Waits until both nodes hold exactly these Services, with a set each where it has one, and
    /// what the control plane says it has; returns what the first has seen.
    async fn hold(&mut self, what: &str, keys: &[&str]) -> Result<Seen> {
        let keys: BTreeSet<String> = keys.iter().map(|&key| key.to_owned()).collect();
        for node in &mut self.nodes {
            node.until(what, PATIENCE, |seen| seen.confirmed && own(seen) == keys).await;
        }
        let request = v1::GetServerInfoRequest {};
        let info = self.control_plane.status().await?.get_server_info(request).await?.into_inner();
        let head = info.head.context("a head")?;
        for node in &mut self.nodes {
            let at_head = |seen: &Seen| seen.position.is_some_and(|held| held.seq >= head.seq);
            let seen = node.until("the head", PATIENCE, at_head).await;
            let digest = seen.digest.context("a digest")?.to_bytes();
            assert_eq!(digest[..], head.digest[..], "{what}: equal digest");
        }
        Ok(self.nodes[0].seen())
    }
}

/// Keys of the test's own objects: every cluster has default/kubernetes, and a ServiceCIDR.
fn own(seen: &Seen) -> BTreeSet<String> {
    let own = |key: &&String| !key.starts_with("default/kubernetes") && *key != "kubernetes";
    seen.keys.iter().filter(own).cloned().collect()
}

fn service(name: &str, port: u16) -> Value {
    json!({"metadata": {"name": name}, "spec": {"ports": [{"port": port}]}})
}

fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({
        "metadata": {"name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": endpoints,
    })
}

/// Applies `deploy/rbac.yaml` and writes a kubeconfig with a token of its service account.
async fn minimal_kubeconfig(server: &ApiServer, client: &Client, path: PathBuf) -> Result<PathBuf> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/rbac.yaml");
    let manifest = std::fs::read_to_string(manifest)?;
    for document in manifest.split("\n---\n") {
        let object: Value = serde_saphyr::from_str(document)?;
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let collection = match object["kind"].as_str() {
            Some("Namespace") => "/api/v1/namespaces".to_owned(),
            Some("ServiceAccount") => "/api/v1/namespaces/lockstep-system/serviceaccounts".to_owned(),
            Some("ClusterRole") => format!("{rbac}/clusterroles"),
            Some("ClusterRoleBinding") => format!("{rbac}/clusterrolebindings"),
            other => anyhow::bail!("deploy/rbac.yaml has a {other:?}"),
        };
        post(client, &collection, &object).await?;
    }
    let account = "/api/v1/namespaces/lockstep-system/serviceaccounts/lockstep-control-plane/token";
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let token = post(client, account, &request).await?["status"]["token"].take();
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(server.kubeconfig())?)?;
    config["users"][0]["user"] = json!({ "token": token });
    std::fs::write(&path, config.to_string())?;
    let cluster = Cluster::connect(&path).await?;
    let denied = cluster.create(Kind::Service, service("forbidden", 80)).await;
    ensure!(denied.is_err(), "the account may read only");
    Ok(path)
}

async fn post(client: &Client, path: &str, body: &Value) -> Result<Value> {
    let request = http::Request::post(path).header("content-type", "application/json");
    let request = request.body(body.to_string().into_bytes())?;
    client.request(request).await.with_context(|| format!("POST {path}"))
}

#[tokio::test]
async fn what_happens_in_the_cluster_comes_to_every_node() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut world = World::start().await?;
    let first = ["default/api", "default/api/api-1", "default/web", "default/web/web-1"];
    let seen = world.hold("the first state", &first).await?;
    assert_eq!(seen.resumed, [v1::ResumeMode::Full]);

    let (code, metrics) = world.control_plane.get("/metrics").await?;
    assert_eq!(code, 200);
    assert!(metrics.contains("lockstep_") && metrics.ends_with("# EOF\n"), "{metrics}");

    // Changes and deletions, each a barrier of its own.
    let ports = json!({"spec": {"ports": [{"port": 81}]}});
    world.cluster.patch(Kind::Service, "default", "web", ports).await?;
    world.cluster.delete(Kind::EndpointSlice, "default", "api-1").await?;
    world.cluster.delete(Kind::Service, "default", "api").await?;
    let seen = world.hold("without api", &["default/web", "default/web/web-1"]).await?;
    // Two watches bring the two removals, so their order is not fixed.
    let mut removed = seen.removed.clone();
    removed.sort();
    assert_eq!(removed, ["default/api", "default/api/api-1"], "nothing else was ever taken away");
    let output = world.control_plane.ctl(&["wait", "default/api"])?.output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = world.control_plane.ctl(&["wait", "default/apo", "--timeout", "1s"])?.output()?;
    assert_eq!(output.status.code(), Some(3), "never heard of");

    // What the API server takes and no node could program: the rest goes on.
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "224.0.0.1"}]}}});
    let mut balanced = service("balanced", 80);
    balanced["spec"]["type"] = "LoadBalancer".into();
    world.cluster.create(Kind::Service, balanced).await?;
    let keys = ["default/balanced", "default/web", "default/web/web-1"];
    world.hold("with a load balancer", &keys).await?;
    world.cluster.patch_status(Kind::Service, "default", "balanced", status).await?;
    world.cluster.create(Kind::Service, service("later", 80)).await?;
    world
        .hold("what comes later", &["default/balanced", "default/later", "default/web", "default/web/web-1"])
        .await?;
    let request = v1::ListFailuresRequest::default();
    let failures = world.control_plane.status().await?.list_failures(request).await?.into_inner();
    let [object] = &failures.quarantined[..] else { panic!("{failures:?}") };
    assert_eq!((object.kind.as_str(), object.name.as_str()), ("Service", "default/balanced"));
    assert_eq!(object.field, "status.loadBalancer.ingress[0].ip");
    assert_eq!((object.value.as_str(), object.in_force()), ("224.0.0.1", v1::InForce::Previous));
    Ok(())
}

#[tokio::test]
async fn kill_9_of_the_api_server_empties_nothing() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut world = World::start().await?;
    let first = ["default/api", "default/api/api-1", "default/web", "default/web/web-1"];
    let before = world.hold("the first state", &first).await?;
    let second = world.server.second().await?;
    world.server.kill();
    // Changes that the control plane misses.
    second.cluster().delete(Kind::Service, "default", "api").await?;
    second.cluster().create(Kind::Service, service("new", 80)).await?;
    second.cluster().delete(Kind::EndpointSlice, "default", "web-1").await?;
    second.cluster().create(Kind::EndpointSlice, slice("web", &["10.1.0.9"])).await?;
    assert_eq!(world.control_plane.get("/readyz").await?.0, 200, "it serves what it has");
    assert_eq!(world.nodes[0].seen().digest, before.digest, "and nodes keep it");
    world.server.restart().await?;
    let keys = ["default/api/api-1", "default/new", "default/web", "default/web/web-1"];
    let seen = world.hold("what was missed", &keys).await?;
    assert_eq!(seen.removed, ["default/api"], "only what the API server does not have any more");
    assert!(seen.lost.is_empty(), "the streams went on: {:?}", seen.lost);
    Ok(())
}

#[tokio::test]
async fn kill_9_of_the_control_plane_costs_nothing_where_nothing_changed() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut world = World::start().await?;
    let first = ["default/api", "default/api/api-1", "default/web", "default/web/web-1"];
    let before = world.hold("the first state", &first).await?;
    world.control_plane.restart().await?;
    let again = |seen: &Seen| seen.resumed.len() == 2 && seen.confirmed;
    for node in &mut world.nodes {
        let seen = node.until("a second session", PATIENCE, again).await;
        assert_eq!(seen.resumed[1], v1::ResumeMode::InSync, "equal digest");
        assert_eq!((seen.digest, seen.removed.len()), (before.digest, 0));
        assert_ne!(seen.position.map(|it| it.epoch), before.position.map(|it| it.epoch));
    }
    // What changes while it is dead.
    world.control_plane.kill();
    world.cluster.delete(Kind::Service, "default", "api").await?;
    world.cluster.create(Kind::Service, service("new", 80)).await?;
    world.control_plane.restart().await?;
    let keys = ["default/api/api-1", "default/new", "default/web", "default/web/web-1"];
    let seen = world.hold("what changed meanwhile", &keys).await?;
    assert_eq!(seen.removed, ["default/api"]);
    Ok(())
}
