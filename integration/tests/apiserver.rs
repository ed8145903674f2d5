//! The Kubernetes source against a real API server. Needs no root, only the real programs.
//!
//! What the source says is put together as a control plane would, and compared with what the
//! API server has: by content, and by what was ever taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use lockstep_integration::apiserver::{ApiServer, Cluster, Kind};
use lockstep_integration::leftovers::Directory;
use lockstep_model::{InvalidField, NodeContext, Resource, Service};
use lockstep_source::{Changes, Event, NodeChange, QuarantineChange, kubernetes};
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

/// Two cores start one API server after another faster than several at once.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
const PATIENCE: Duration = Duration::from_secs(60);

/// What a control plane would know.
struct Known {
    events: mpsc::Receiver<Event>,
    task: tokio::task::JoinHandle<()>,
    resources: BTreeMap<String, Resource>,
    nodes: BTreeMap<String, NodeContext>,
    quarantine: BTreeMap<String, (InvalidField, bool)>,
    /// Everything ever taken back.
    removed: Vec<String>,
    synced: bool,
    not_synced: Vec<String>,
    trigger: Option<SystemTime>,
    revisions: BTreeMap<String, String>,
    alive: u32,
}

impl Known {
    async fn start(server: &ApiServer) -> Result<Self> {
        let client = kubernetes::connect(Some(&server.kubeconfig())).await?;
        let (out, events) = mpsc::channel(16);
        Ok(Self {
            events,
            task: tokio::spawn(kubernetes::run(client, out)),
            resources: BTreeMap::new(),
            nodes: BTreeMap::new(),
            quarantine: BTreeMap::new(),
            removed: Vec::new(),
            synced: false,
            not_synced: Vec::new(),
            trigger: None,
            revisions: BTreeMap::new(),
            alive: 0,
        })
    }

    /// Takes in events until `done`.
    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !done(self) {
            match tokio::time::timeout_at(deadline, self.events.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => panic!("the source ended while waiting for: {what}"),
                Err(_) => panic!(
                    "never happened: {what}\n{} resources, nodes {:?}, quarantine {:?}, removed {:?}, not synced: {:?}",
                    self.resources.len(),
                    self.nodes.keys(),
                    self.quarantine,
                    self.removed,
                    self.not_synced
                ),
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Changes(changes) => self.changes(changes),
            Event::Synced => {
                assert!(!self.synced, "synced is told once");
                self.synced = true;
            }
            Event::NotSynced(reason) => {
                assert!(!self.synced, "not synced after it was: {reason}");
                self.not_synced.push(reason);
            }
            Event::Alive => self.alive += 1,
        }
    }

    fn changes(&mut self, changes: Changes) {
        for key in &changes.removals {
            assert!(self.resources.remove(&key.to_string()).is_some(), "{key} was never there");
            self.removed.push(key.to_string());
        }
        for resource in changes.upserts {
            self.resources.insert(resource.key().to_string(), resource);
        }
        for node in changes.nodes {
            match node {
                NodeChange::Upsert(node) => {
                    self.nodes.insert(node.name.to_string(), node);
                }
                NodeChange::Remove(name) => {
                    assert!(self.nodes.remove(&name).is_some(), "node {name} was never there");
                }
            }
        }
        for change in changes.quarantine {
            match change {
                QuarantineChange::Add { object, fault, previous_in_force } => {
                    let name = format!("{} {}", object.kind, object.name);
                    self.quarantine.insert(name, (fault, previous_in_force));
                }
                QuarantineChange::Remove(object) => {
                    self.quarantine.remove(&format!("{} {}", object.kind, object.name));
                }
            }
        }
        self.trigger = changes.trigger.or(self.trigger);
        self.revisions.extend(changes.revisions);
    }

    fn service(&self, name: &str) -> Option<&Service> {
        match self.resources.get(&format!("default/{name}")) {
            Some(Resource::Service(service)) => Some(service),
            _ => None,
        }
    }

    /// Port of a test's Service; 0 where there is none.
    fn port(&self, name: &str) -> u16 {
        self.service(name).map_or(0, |service| service.ports[0].port.get())
    }

    fn endpoints(&self, key: &str) -> Vec<String> {
        match self.resources.get(key) {
            Some(Resource::EndpointSet(set)) => {
                set.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The test's own Services: name -> port.
    fn ports(&self) -> BTreeMap<String, u16> {
        let names = self.resources.keys().filter_map(|key| key.strip_prefix("default/"));
        let names = names.filter(|name| !name.contains('/') && *name != "kubernetes");
        names.map(|name| (name.to_owned(), self.port(name))).collect()
    }

    async fn end(self) {
        drop(self.events);
        tokio::time::timeout(PATIENCE, self.task).await.expect("the source ends").expect("it does not panic");
    }
}

/// What the API server was asked and agreed to.
struct Audit {
    directory: Directory,
    arguments: [String; 2],
}

impl Audit {
    fn new() -> Result<Self> {
        let directory = Directory::new("lockstep-test-")?;
        let (policy, log) = (directory.path().join("policy.yaml"), directory.path().join("audit.log"));
        let rule = json!({"level": "Metadata", "users": ["admin"], "verbs": ["list", "watch"]});
        let rules = json!([rule, {"level": "None"}]);
        let kind = json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules});
        std::fs::write(&policy, kind.to_string())?;
        let arguments = [
            format!("--audit-policy-file={}", policy.display()),
            format!("--audit-log-path={}", log.display()),
        ];
        Ok(Self { directory, arguments })
    }

    fn arguments(&self) -> [&str; 2] {
        [&self.arguments[0], &self.arguments[1]]
    }

    /// URIs of the lists and watches of a resource that were answered.
    fn requests(&self, resource: &str) -> Result<Vec<String>> {
        let log = std::fs::read_to_string(self.directory.path().join("audit.log"))?;
        let mut uris = Vec::new();
        for line in log.lines() {
            let entry: Value = serde_json::from_str(line)?;
            // A watch that goes on has only begun to be answered.
            let answered = entry["stage"] == "ResponseStarted" || entry["verb"] == "list";
            if entry["objectRef"]["resource"] == resource
                && answered
                && entry["responseStatus"]["code"] == 200
            {
                uris.extend(entry["requestURI"].as_str().map(str::to_owned));
            }
        }
        Ok(uris)
    }
}

fn service(name: &str, port: u16) -> Value {
    json!({"metadata": {"name": name}, "spec": {"ports": [{"port": port}]}})
}

fn slice(service: &str, address: &str) -> Value {
    json!({
        "metadata": {"name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": [{"addresses": [address], "nodeName": "node-1", "zone": "zone-a"}],
    })
}

/// Many at once: an API server waits more than it works.
async fn create_all(cluster: &Cluster, objects: Vec<(Kind, Value)>) -> Result<()> {
    let mut workers = JoinSet::new();
    let objects = std::sync::Arc::new(std::sync::Mutex::new(objects));
    for _ in 0..16 {
        let (cluster, objects) = (cluster.clone(), objects.clone());
        workers.spawn(async move {
            loop {
                let next = objects.lock().expect("no worker panics").pop();
                let Some((kind, object)) = next else { return Ok::<_, anyhow::Error>(()) };
                cluster.create(kind, object).await?;
            }
        });
    }
    while let Some(done) = workers.join_next().await {
        done??;
    }
    Ok(())
}

/// Name -> port of the Services that the API server has.
async fn truth(cluster: &Cluster) -> Result<BTreeMap<String, u16>> {
    let services = cluster.list(Kind::Service).await?.into_iter();
    let named = services.map(|service| {
        let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let port = service["spec"]["ports"][0]["port"].as_u64().unwrap_or_default();
        (name, u16::try_from(port).unwrap_or_default())
    });
    Ok(named.filter(|(name, _)| name != "kubernetes").collect())
}

#[tokio::test]
async fn the_first_lists_are_complete_and_only_what_is_for_us_is_read() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let audit = Audit::new()?;
    let server = ApiServer::start_with(&audit.arguments()).await?;
    let cluster = server.cluster().await?;
    let mut objects = Vec::new();
    for n in 0..300_u16 {
        objects.push((Kind::Service, service(&format!("s{n}"), 1000 + n)));
        objects.push((
            Kind::EndpointSlice,
            slice(&format!("s{n}"), &format!("10.1.{}.{}", n / 250, n % 250 + 1)),
        ));
    }
    let mut headless = service("headless", 80);
    headless["spec"]["clusterIP"] = "None".into();
    objects.push((Kind::Service, headless));
    let external = json!({"type": "ExternalName", "externalName": "example.com"});
    objects.push((Kind::Service, json!({"metadata": {"name": "external"}, "spec": external})));
    let mut other = service("other-proxy", 80);
    other["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": ""});
    objects.push((Kind::Service, other));
    let mut other = slice("s0", "10.9.0.1");
    other["metadata"]["name"] = "other-proxy-1".into();
    other["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
    objects.push((Kind::EndpointSlice, other));
    for n in 0..5 {
        let labels = json!({"topology.kubernetes.io/zone": "zone-a"});
        let node = json!({"metadata": {"name": format!("node-{n}"), "labels": labels},
            "spec": {"podCIDRs": [format!("10.244.{n}.0/24")], "podCIDR": format!("10.244.{n}.0/24")}});
        objects.push((Kind::Node, node));
    }
    create_all(&cluster, objects).await?;
    let addresses = json!({"status": {"addresses": [{"type": "Hostname", "address": "node-1"},
        {"type": "InternalIP", "address": "192.0.2.11"}]}});
    cluster.patch_status(Kind::Node, "", "node-1", addresses).await?;

    let mut known = Known::start(&server).await?;
    known.until("synced", |known| known.synced).await;
    // The API server makes its own as it starts.
    known.until("its own ServiceCIDR", |known| known.resources.contains_key("kubernetes")).await;
    assert_eq!(
        known.ports(),
        truth(&cluster).await?.into_iter().filter(|(name, _)| name.starts_with('s')).collect()
    );
    assert_eq!(known.resources.len(), 602, "300 Services, 300 slices, default/kubernetes, a ServiceCIDR");
    assert_eq!(known.endpoints("default/s299/s299-1"), ["10.1.1.50"]);
    assert_eq!(known.nodes.len(), 5);
    let node = &known.nodes["node-1"];
    assert_eq!(node.addresses, ["192.0.2.11".parse::<std::net::IpAddr>()?]);
    assert_eq!((node.zone.as_deref(), node.pod_cidrs.len()), (Some("zone-a"), 1));
    assert!(node.uid.is_some());
    assert!(known.not_synced[0].contains("waiting for the first list of services"), "{:?}", known.not_synced);
    assert!(known.quarantine.is_empty() && known.removed.is_empty());
    assert!(known.alive > 0);
    assert_eq!(
        known.revisions.keys().collect::<Vec<_>>(),
        ["endpointslices", "nodes", "servicecidrs", "services"],
        "how far each watch has come is told"
    );
    for (resource, fields) in [
        ("services", "spec.clusterIP%21%3DNone"),
        ("endpointslices", ""),
        ("nodes", ""),
        ("servicecidrs", ""),
    ] {
        let asked = audit.requests(resource)?;
        let listed = |uri: &&String| uri.contains("sendInitialEvents=true") && uri.contains(fields);
        assert_eq!(asked.iter().filter(listed).count(), 1, "one streaming list of {resource}: {asked:?}");
        assert!(!asked.iter().any(|uri| uri.contains("limit=")), "no pages of {resource}: {asked:?}");
    }
    known.end().await;
    Ok(())
}

#[tokio::test]
async fn service_cidrs_reach_a_follower_and_are_there_until_they_are_gone() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let server = ApiServer::start().await?;
    let cluster = server.cluster().await?;
    let mut known = Known::start(&server).await?;
    let cidrs = |known: &Known, name: &str| match known.resources.get(name) {
        Some(Resource::ServiceCidr(cidr)) => {
            cidr.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    };
    known.until("synced", |known| known.synced).await;
    known.until("the first one", |known| !cidrs(known, "kubernetes").is_empty()).await;

    // The finalizer that the controller manager keeps on it for as long as addresses are in use.
    let finalizers = ["networking.k8s.io/service-cidr-finalizer"];
    let more =
        json!({"metadata": {"name": "more", "finalizers": finalizers}, "spec": {"cidrs": ["10.200.0.0/24"]}});
    cluster.create(Kind::ServiceCidr, more).await?;
    known.until("more", |known| cidrs(known, "more") == "10.200.0.0/24").await;

    cluster.delete(Kind::ServiceCidr, "", "more").await?;
    // What is told after the deletion was marked has come past it.
    cluster
        .create(
            Kind::ServiceCidr,
            json!({"metadata": {"name": "last"}, "spec": {"cidrs": ["10.201.0.0/24"]}}),
        )
        .await?;
    known.until("last", |known| cidrs(known, "last") == "10.201.0.0/24").await;
    assert_eq!(cidrs(&known, "more"), "10.200.0.0/24", "addresses in it may be in use");
    cluster.patch(Kind::ServiceCidr, "", "more", json!({"metadata": {"finalizers": null}})).await?;
    known.until("more gone", |known| known.removed.iter().any(|key| key == "more")).await;
    assert!(known.quarantine.is_empty(), "{:?}", known.quarantine);
    known.end().await;
    Ok(())
}

#[tokio::test]
async fn changes_are_followed() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let server = ApiServer::start().await?;
    let cluster = server.cluster().await?;
    let mut known = Known::start(&server).await?;
    known.until("synced", |known| known.synced).await;

    // Services come, change and go.
    for name in ["a", "b", "c"] {
        cluster.create(Kind::Service, service(name, 80)).await?;
    }
    known.until("three Services", |known| known.ports().len() == 3).await;
    let ports = json!({"spec": {"ports": [{"port": 81}]}});
    cluster.patch(Kind::Service, "default", "a", ports).await?;
    known.until("a on port 81", |known| known.port("a") == 81).await;
    cluster.delete(Kind::Service, "default", "c").await?;
    known.until("c gone", |known| known.service("c").is_none()).await;

    // A slice says when its cause was.
    let mut with_time = slice("a", "10.1.0.1");
    with_time["metadata"]["annotations"] =
        json!({"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05.5Z"});
    cluster.create(Kind::EndpointSlice, with_time).await?;
    known.until("an endpoint", |known| !known.endpoints("default/a/a-1").is_empty()).await;
    let cause = SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_500);
    assert_eq!(known.trigger, Some(cause));

    // A label gives a Service away, and back.
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        let labels = |value: Value| json!({"metadata": {"labels": {label: value}}});
        cluster.patch(Kind::Service, "default", "a", labels("other".into())).await?;
        known.until("a given away", |known| known.service("a").is_none()).await;
        cluster.patch(Kind::EndpointSlice, "default", "a-1", labels("".into())).await?;
        known.until("its slice given away", |known| !known.resources.contains_key("default/a/a-1")).await;
        cluster.patch(Kind::Service, "default", "a", labels(Value::Null)).await?;
        cluster.patch(Kind::EndpointSlice, "default", "a-1", labels(Value::Null)).await?;
        known
            .until("both back", |known| known.port("a") == 81 && !known.endpoints("default/a/a-1").is_empty())
            .await;
    }

    // A slice goes over to another Service.
    let labels = json!({"metadata": {"labels": {"kubernetes.io/service-name": "b"}}});
    cluster.patch(Kind::EndpointSlice, "default", "a-1", labels).await?;
    known
        .until("the slice with b", |known| {
            known.resources.contains_key("default/b/a-1") && !known.resources.contains_key("default/a/a-1")
        })
        .await;

    // A Service turns into a name, and into a Service again.
    let named = json!({"spec": {"type": "ExternalName", "externalName": "example.com", "clusterIP": "", "clusterIPs": null}});
    cluster.patch(Kind::Service, "default", "b", named).await?;
    known.until("b only a name", |known| known.service("b").is_none()).await;
    let back = json!({"spec": {"type": "ClusterIP", "externalName": null}});
    cluster.patch(Kind::Service, "default", "b", back).await?;
    known.until("b back", |known| known.port("b") == 80).await;

    // Nodes.
    cluster.create(Kind::Node, json!({"metadata": {"name": "node-9"}})).await?;
    known.until("a Node", |known| known.nodes.contains_key("node-9")).await;
    cluster.delete(Kind::Node, "", "node-9").await?;
    known.until("no Node", |known| known.nodes.is_empty()).await;
    known.end().await;
    Ok(())
}

#[tokio::test]
async fn what_the_api_server_takes_and_we_do_not_is_in_quarantine() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let server = ApiServer::start().await?;
    let cluster = server.cluster().await?;
    let port = |port: i32| json!({"ports": [{"name": "", "port": port}]});
    let mut bad = slice("s", "10.1.0.1");
    bad["ports"][0]["port"] = 70_000.into();
    cluster.create(Kind::EndpointSlice, bad).await?;
    let mut bad = slice("s", "10.1.0.2");
    bad["metadata"] = json!({"name": "x", "labels": {"kubernetes.io/service-name": "Not.A_Service"}});
    cluster.create(Kind::EndpointSlice, bad).await?;
    cluster.create(Kind::Service, service("s", 80)).await?;

    // It keeps nothing from being synced.
    let mut known = Known::start(&server).await?;
    known.until("synced", |known| known.synced).await;
    assert_eq!(known.port("s"), 80);
    let fault = |known: &Known, name: &str| {
        known.quarantine.get(name).map(|(fault, previous)| (fault.to_string(), *previous))
    };
    assert_eq!(
        fault(&known, "EndpointSlice default/s-1"),
        Some(("ports[0].port: \"70000\" is not a port number (1-65535)".into(), false))
    );
    let label = fault(&known, "EndpointSlice default/x").expect("in quarantine").0;
    assert!(label.starts_with("metadata.labels[kubernetes.io/service-name]: \"Not.A_Service\""), "{label}");

    // Mended, broken again: what was good stays in force. Deleted: nothing of it stays.
    cluster.patch(Kind::EndpointSlice, "default", "s-1", port(8080)).await?;
    known.until("mended", |known| fault(known, "EndpointSlice default/s-1").is_none()).await;
    assert_eq!(known.endpoints("default/s/s-1"), ["10.1.0.1"]);
    cluster.patch(Kind::EndpointSlice, "default", "s-1", port(-1)).await?;
    known
        .until("broken", |known| {
            fault(known, "EndpointSlice default/s-1").is_some_and(|(_, previous)| previous)
        })
        .await;
    assert_eq!(known.endpoints("default/s/s-1"), ["10.1.0.1"]);
    cluster.delete(Kind::EndpointSlice, "default", "s-1").await?;
    cluster.delete(Kind::EndpointSlice, "default", "x").await?;
    known.until("nothing in quarantine", |known| known.quarantine.is_empty()).await;
    assert_eq!(known.removed, ["default/s/s-1"]);
    known.end().await;
    Ok(())
}

#[tokio::test]
async fn what_changes_behind_a_dead_api_server_is_caught_up_and_nothing_else_is_touched() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut server = ApiServer::start().await?;
    let cluster = server.cluster().await?;
    let services = (0..200_u16).map(|n| (Kind::Service, service(&format!("s{n}"), 1000 + n)));
    create_all(&cluster, services.collect()).await?;
    let mut known = Known::start(&server).await?;
    known.until("synced", |known| known.synced).await;
    assert_eq!(known.ports().len(), 200);

    server.kill();
    let second = server.second().await?;
    for n in 0..20 {
        second.cluster().delete(Kind::Service, "default", &format!("s{n}")).await?;
        let ports = json!({"spec": {"ports": [{"port": 5000 + n}]}});
        second.cluster().patch(Kind::Service, "default", &format!("s{}", n + 20), ports).await?;
        second.cluster().create(Kind::Service, service(&format!("new{n}"), 6000)).await?;
    }
    // One that was deleted and made again is another object of the same name.
    second.cluster().delete(Kind::Service, "default", "s199").await?;
    second.cluster().create(Kind::Service, service("s199", 7000)).await?;
    let expected = truth(second.cluster()).await?;
    drop(second);
    server.restart().await?;

    known.until("caught up", |known| known.ports() == expected).await;
    let deleted: BTreeSet<_> = (0..20).map(|n| format!("default/s{n}")).collect();
    let removed: BTreeSet<_> = known.removed.iter().filter(|key| *key != "default/s199").cloned().collect();
    assert_eq!(removed, deleted, "nothing was taken back that is still there");
    known.end().await;
    Ok(())
}

#[tokio::test]
async fn an_api_server_killed_under_changes_loses_none() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut server = ApiServer::start().await?;
    let cluster = server.cluster().await?;
    let mut known = Known::start(&server).await?;
    known.until("synced", |known| known.synced).await;

    // Writes 200 Services and takes every fourth away, through whatever happens to the server.
    let writer = tokio::spawn({
        let cluster = cluster.clone();
        async move {
            for n in 0..200_u16 {
                let name = format!("s{n}");
                while cluster.get(Kind::Service, "default", &name).await.is_err() {
                    let _ = cluster.create(Kind::Service, service(&name, 1000 + n)).await;
                    tokio::task::yield_now().await;
                }
                if n % 4 == 3 {
                    let gone = format!("s{}", n - 3);
                    while cluster.get(Kind::Service, "default", &gone).await.is_ok()
                        || !cluster.is_ready().await
                    {
                        let _ = cluster.delete(Kind::Service, "default", &gone).await;
                    }
                }
            }
        }
    });
    for at_least in [40, 90] {
        known.until("some Services", |known| known.ports().len() >= at_least).await;
        server.restart().await?;
    }
    writer.await?;
    let expected = truth(&cluster).await?;
    assert_eq!(expected.len(), 150);
    known.until("everything", |known| known.ports() == expected).await;
    let kept: Vec<_> =
        known.removed.iter().filter(|key| expected.contains_key(&key["default/".len()..])).collect();
    assert!(kept.is_empty(), "taken back and still there: {kept:?}");
    known.end().await;
    Ok(())
}

#[tokio::test]
async fn a_server_without_streaming_lists_is_read_in_pages() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().await;
    let audit = Audit::new()?;
    let [policy, log] = audit.arguments();
    let mut server = ApiServer::start_with(&["--feature-gates=WatchList=false", policy, log]).await?;
    let cluster = server.cluster().await?;
    let services = (0..1300_u16).map(|n| (Kind::Service, service(&format!("s{n}"), 1000 + n)));
    create_all(&cluster, services.collect()).await?;
    let mut known = Known::start(&server).await?;
    known.until("synced", |known| known.synced).await;
    assert_eq!(known.ports(), truth(&cluster).await?, "1300 Services are three pages");
    let asked = audit.requests("services")?;
    assert_eq!(asked.iter().filter(|uri| uri.contains("limit=500")).count(), 3, "{asked:?}");

    server.kill();
    let second = server.second().await?;
    second.cluster().delete(Kind::Service, "default", "s700").await?;
    drop(second);
    server.restart().await?;
    known.until("s700 gone", |known| known.service("s700").is_none()).await;
    assert_eq!((known.ports().len(), &known.removed), (1299, &vec!["default/s700".to_owned()]));
    known.end().await;
    Ok(())
}
