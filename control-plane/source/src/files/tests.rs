//! The source over a real directory. Nothing waits for a time: every test waits for what the
//! source says next.

use std::fs;
use std::path::PathBuf;

use lockstep_model::{Key, Resource};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Duration, timeout};

use super::{Error, run};
use crate::{Changes, Event, NodeChange, ObjectName, QuarantineChange};

/// A source over a directory of its own.
struct Source {
    directory: PathBuf,
    _kept: TempDir,
    events: mpsc::Receiver<Event>,
    task: JoinHandle<Result<(), Error>>,
}

impl Source {
    /// Starts with these files in the directory.
    fn start(files: &[(&str, &str)]) -> Self {
        let kept = tempfile::tempdir().unwrap();
        let directory = kept.path().join("manifests");
        fs::create_dir(&directory).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
        Self::over(directory, kept)
    }

    fn over(directory: PathBuf, kept: TempDir) -> Self {
        let (out, events) = mpsc::channel(16);
        let task = tokio::spawn(run(directory.clone(), out));
        Self { directory, _kept: kept, events, task }
    }

    /// As a careful writer does it.
    fn replace(&self, name: &str, text: &str) {
        let temporary = self.directory.join(".being-written");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.directory.join(name)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.join(name)).unwrap();
    }

    /// The next event that is not [`Event::Alive`] nor about files still being written.
    async fn next(&mut self) -> Event {
        loop {
            let event = timeout(Duration::from_secs(20), self.events.recv()).await;
            match event.expect("the source says something").expect("the source runs") {
                Event::Alive => {}
                Event::NotSynced(reason) if reason == "files are being written" => {}
                event => return event,
            }
        }
    }

    async fn changes(&mut self) -> Changes {
        match self.next().await {
            Event::Changes(changes) => changes,
            other => panic!("expected changes, got {other:?}"),
        }
    }

    async fn not_synced(&mut self) -> String {
        match self.next().await {
            Event::NotSynced(reason) => reason,
            other => panic!("expected not to be synced, got {other:?}"),
        }
    }

    async fn synced(&mut self) {
        assert_eq!(self.next().await, Event::Synced);
    }
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  clusterIP: {ip}\n  ports:\n  - port: 80\n"
    )
}

fn upserted(changes: &Changes) -> Vec<String> {
    changes.upserts.iter().map(|resource| resource.key().to_string()).collect()
}

fn removed(changes: &Changes) -> Vec<String> {
    changes.removals.iter().map(Key::to_string).collect()
}

/// (kind, name, fault, previous in force), or what has left.
fn quarantine(changes: &Changes) -> Vec<String> {
    let line = |change: &QuarantineChange| match change {
        QuarantineChange::Add { object, fault, previous_in_force } => {
            format!("+ {} {} [{fault}] {previous_in_force}", object.kind, object.name)
        }
        QuarantineChange::Remove(ObjectName { kind, name }) => format!("- {kind} {name}"),
    };
    changes.quarantine.iter().map(line).collect()
}

fn cluster_ip(changes: &Changes) -> String {
    match &changes.upserts[..] {
        [Resource::Service(service)] => service.cluster_ips[0].to_string(),
        other => panic!("expected one Service, got {other:?}"),
    }
}

#[tokio::test]
async fn an_empty_directory_is_a_state_too() {
    let mut source = Source::start(&[]);
    source.synced().await;
}

#[tokio::test]
async fn reads_documents_lists_json_and_kubectl_output() {
    let kubectl = r#"
apiVersion: v1
items:
- apiVersion: v1
  kind: Service
  metadata:
    annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}
    creationTimestamp: "2026-01-02T03:04:05Z"
    name: from-kubectl
    namespace: shop
    resourceVersion: "123"
    uid: 1b4e28ba-2fa1-11d2-883f-0016d3cca427
  spec:
    clusterIP: 10.0.0.9
    clusterIPs: [10.0.0.9]
    internalTrafficPolicy: Cluster
    ipFamilies: [IPv4]
    ipFamilyPolicy: SingleStack
    ports: [{name: http, port: 80, protocol: TCP, targetPort: web}]
    sessionAffinity: None
    type: ClusterIP
  status:
    loadBalancer: {}
kind: List
metadata:
  resourceVersion: ""
"#;
    let documents = format!(
        "# a comment first\n---\n{}---\n{}---\n",
        service("one", "10.0.0.1"),
        "apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n"
    );
    let slices = r#"{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": [
        {"metadata": {"name": "one-abc", "labels": {"kubernetes.io/service-name": "one"}},
         "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": [{"addresses": ["10.1.0.1"]}]}]}"#;
    let mut source = Source::start(&[
        ("a.yaml", &documents),
        ("b.yml", kubectl),
        ("c.json", slices),
        ("d.txt", "not a manifest: ["),
        (".hidden.yaml", "not a manifest: ["),
    ]);
    let changes = source.changes().await;
    assert_eq!(upserted(&changes), ["default/one", "shop/from-kubectl", "default/one/one-abc"]);
    assert_eq!(changes.trigger, None, "what was there at the start has no cause");
    match &changes.nodes[..] {
        [NodeChange::Upsert(node)] => {
            assert_eq!(&*node.name, "node-1");
            assert_eq!(node.uid.as_deref(), Some("node-1"), "a Node that is there has a uid");
        }
        other => panic!("expected one Node, got {other:?}"),
    }
    source.synced().await;
}

#[tokio::test]
async fn other_kinds_are_passed_over() {
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n";
    let knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\n";
    let text = format!("{deployment}---\n{knative}---\n{}", service("web", "10.0.0.1"));
    let mut source = Source::start(&[("a.yaml", &text)]);
    assert_eq!(upserted(&source.changes().await), ["default/web"]);
    source.synced().await;
}

#[tokio::test]
async fn changes_are_followed_and_only_they_are_told() {
    let mut source =
        Source::start(&[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", &service("b", "10.0.0.2"))]);
    source.changes().await;
    source.synced().await;

    source.replace("a.yaml", &service("a", "10.0.0.11"));
    let changes = source.changes().await;
    assert_eq!(upserted(&changes), ["default/a"]);
    assert_eq!(cluster_ip(&changes), "10.0.0.11");
    assert!(changes.trigger.is_some());

    // In place, as an editor may do it, and with a comment only: nothing to tell.
    fs::write(source.directory.join("a.yaml"), format!("# hello\n{}", service("a", "10.0.0.11"))).unwrap();
    source.remove("b.yaml");
    let changes = source.changes().await;
    assert_eq!((upserted(&changes), removed(&changes)), (vec![], vec!["default/b".to_owned()]));

    source.replace("c.yaml", &service("c", "10.0.0.3"));
    assert_eq!(upserted(&source.changes().await), ["default/c"]);
}

#[tokio::test]
async fn an_object_can_move_to_another_file() {
    let mut source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]);
    source.changes().await;
    source.synced().await;
    fs::rename(source.directory.join("a.yaml"), source.directory.join("b.yaml")).unwrap();
    source.replace("c.yaml", &service("c", "10.0.0.3"));
    let changes = source.changes().await;
    assert_eq!((upserted(&changes), removed(&changes)), (vec!["default/c".to_owned()], vec![]));
}

#[tokio::test]
async fn a_broken_file_keeps_its_last_good_content() {
    let mut source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]);
    source.changes().await;
    source.synced().await;

    source.replace("a.yaml", "kind: Service\n  broken: [\n");
    let changes = source.changes().await;
    assert!(changes.upserts.is_empty() && changes.removals.is_empty(), "{changes:?}");
    let told = quarantine(&changes);
    assert!(
        told.len() == 1
            && told[0].starts_with("+ File a.yaml [: \"a.yaml\" is not valid YAML at line 2 column"),
        "{told:?}"
    );
    assert!(told[0].ends_with("true"), "the last good content is in force: {told:?}");

    // Another file goes on.
    source.replace("b.yaml", &service("b", "10.0.0.2"));
    assert_eq!(upserted(&source.changes().await), ["default/b"]);

    source.replace("a.yaml", &service("a", "10.0.0.11"));
    let changes = source.changes().await;
    assert_eq!(cluster_ip(&changes), "10.0.0.11");
    assert_eq!(quarantine(&changes), ["- File a.yaml"]);
}

#[tokio::test]
async fn a_broken_file_that_goes_takes_its_objects_with_it() {
    let mut source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]);
    source.changes().await;
    source.synced().await;
    source.replace("a.yaml", "[");
    assert_eq!(quarantine(&source.changes().await).len(), 1);
    source.remove("a.yaml");
    let changes = source.changes().await;
    assert_eq!(
        (removed(&changes), quarantine(&changes)),
        (vec!["default/a".into()], vec!["- File a.yaml".into()])
    );
}

#[tokio::test]
async fn starting_on_a_broken_file_is_not_synced_until_it_is_mended() {
    let mut source =
        Source::start(&[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", "apiVersion: v1\nkind Service\n")]);
    let changes = source.changes().await;
    assert_eq!(upserted(&changes), ["default/a"]);
    assert!(quarantine(&changes)[0].ends_with("false"), "nothing of the file is in force");
    let reason = source.not_synced().await;
    assert!(reason.contains("b.yaml is not valid YAML at line 2"), "{reason}");

    source.replace("b.yaml", "hello: world\n");
    assert_eq!(quarantine(&source.changes().await).len(), 1);
    let reason = source.not_synced().await;
    assert!(reason.contains("b.yaml is not a manifest: document 1 has no apiVersion and kind"), "{reason}");

    source.replace("b.yaml", &service("b", "10.0.0.2"));
    let changes = source.changes().await;
    assert_eq!(
        (upserted(&changes), quarantine(&changes)),
        (vec!["default/b".into()], vec!["- File b.yaml".into()])
    );
    source.synced().await;
}

#[tokio::test]
async fn starting_on_a_broken_file_is_not_synced_until_it_is_gone() {
    let mut source = Source::start(&[("b.json", "{\"kind\": ")]);
    assert_eq!(quarantine(&source.changes().await).len(), 1);
    let reason = source.not_synced().await;
    assert!(reason.contains("b.json is not valid JSON") && reason.contains("line 1 column"), "{reason}");
    source.remove("b.json");
    assert_eq!(quarantine(&source.changes().await), ["- File b.json"]);
    source.synced().await;
}

#[tokio::test]
async fn a_broken_object_is_in_quarantine_by_itself() {
    let bad_port = service("typed", "10.0.0.2").replace("80", "eighty");
    let bad_version = "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: old}\n";
    let no_ip = "apiVersion: v1\nkind: Service\nmetadata: {name: no-ip}\nspec: {ports: [{port: 1}]}\n";
    let headless = no_ip.replace("no-ip", "headless").replace("ports", "clusterIP: None, ports");
    let text =
        [service("good", "10.0.0.1"), bad_port, bad_version.into(), no_ip.into(), headless].join("---\n");
    let mut source = Source::start(&[("a.yaml", &text)]);
    let changes = source.changes().await;
    assert_eq!(upserted(&changes), ["default/good"]);
    assert_eq!(
        quarantine(&changes),
        [
            r#"+ EndpointSlice default/old [apiVersion: "discovery.k8s.io/v1beta1" is not version v1, the one that is read (in a.yaml)] false"#,
            r#"+ Service default/no-ip [spec.clusterIP: "" is missing: there is nobody to allocate one to a manifest (in a.yaml)] false"#,
            r#"+ Service default/typed [spec.ports[0].port: "eighty" does not fit: invalid type: string "eighty", expected i32 (in a.yaml)] false"#,
        ]
    );
    source.synced().await;

    // The good one turns bad: what it was stays in force. A bad one is mended, one goes.
    source.replace("a.yaml", &[service("good", "10.0.0.256"), service("typed", "10.0.0.2")].join("---\n"));
    let changes = source.changes().await;
    assert_eq!((upserted(&changes), removed(&changes)), (vec!["default/typed".into()], vec![]));
    assert_eq!(
        quarantine(&changes),
        [
            "- EndpointSlice default/old",
            r#"+ Service default/good [spec.clusterIP: "10.0.0.256" is not an IP address (in a.yaml)] true"#,
            "- Service default/no-ip",
            "- Service default/typed",
        ]
    );
}

#[tokio::test]
async fn the_first_of_two_definitions_is_in_force() {
    let mut source = Source::start(&[("b.yaml", &service("web", "10.0.0.2"))]);
    source.changes().await;
    source.synced().await;

    source.replace("c.yaml", &service("web", "10.0.0.3"));
    let changes = source.changes().await;
    assert!(changes.upserts.is_empty());
    assert_eq!(
        quarantine(&changes),
        [
            r#"+ Service default/web [: "c.yaml" defines the object again: its first definition, in b.yaml, is in force] true"#
        ]
    );

    source.replace("a.yaml", &service("web", "10.0.0.1"));
    let changes = source.changes().await;
    assert_eq!(cluster_ip(&changes), "10.0.0.1");

    source.remove("a.yaml");
    assert_eq!(cluster_ip(&source.changes().await), "10.0.0.2");
    source.remove("b.yaml");
    let changes = source.changes().await;
    assert_eq!(cluster_ip(&changes), "10.0.0.3");
    assert_eq!(quarantine(&changes), ["- Service default/web"]);

    let twice = [service("web", "10.0.0.3"), service("web", "10.0.0.4")].join("---\n");
    source.replace("c.yaml", &twice);
    let changes = source.changes().await;
    assert!(changes.upserts.is_empty());
    assert_eq!(
        quarantine(&changes),
        [
            r#"+ Service default/web [: "c.yaml" defines the object again: its first definition, in c.yaml, is in force] true"#
        ]
    );
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_waited_for_and_one_that_goes_takes_nothing_along() {
    let kept = tempfile::tempdir().unwrap();
    let directory = kept.path().join("manifests");
    let mut source = Source::over(directory.clone(), kept);
    let reason = source.not_synced().await;
    assert!(reason.contains("manifests: No such file or directory"), "{reason}");

    let staged = directory.with_extension("staged");
    fs::create_dir(&staged).unwrap();
    fs::write(staged.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
    fs::rename(&staged, &directory).unwrap();
    assert_eq!(upserted(&source.changes().await), ["default/a"]);
    source.synced().await;

    // Gone and back with other content: the first to be told is the difference.
    fs::rename(&directory, &staged).unwrap();
    fs::write(staged.join("b.yaml"), service("b", "10.0.0.2")).unwrap();
    fs::rename(&staged, &directory).unwrap();
    let changes = source.changes().await;
    assert_eq!((upserted(&changes), removed(&changes)), (vec!["default/b".into()], vec![]));
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_links() {
    let kept = tempfile::tempdir().unwrap();
    let directory = kept.path().join("manifests");
    for (version, ip) in [("..v1", "10.0.0.1"), ("..v2", "10.0.0.2")] {
        fs::create_dir_all(directory.join(version)).unwrap();
        fs::write(directory.join(version).join("a.yaml"), service("a", ip)).unwrap();
    }
    let link = |from: &str, to: &str| std::os::unix::fs::symlink(from, directory.join(to)).unwrap();
    link("..v1", "..data");
    link("..data/a.yaml", "a.yaml");
    let mut source = Source::over(directory.clone(), kept);
    assert_eq!(cluster_ip(&source.changes().await), "10.0.0.1");
    source.synced().await;
    link("..v2", "..data_tmp");
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    assert_eq!(cluster_ip(&source.changes().await), "10.0.0.2");
}

#[tokio::test]
async fn a_file_is_no_directory() {
    let kept = tempfile::tempdir().unwrap();
    let path = kept.path().join("a.yaml");
    fs::write(&path, "").unwrap();
    let (out, _events) = mpsc::channel(1);
    let error = run(path.clone(), out).await.unwrap_err();
    assert_eq!(error.to_string(), format!("source directory {}: is not a directory", path.display()));
}

#[tokio::test]
async fn ends_when_nobody_listens() {
    let source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]);
    drop(source.events);
    timeout(Duration::from_secs(20), source.task).await.expect("the source ends").unwrap().unwrap();
}

#[test]
fn a_large_file_and_yaml_1_1_words_are_read_as_they_are_meant() {
    let mut names = lockstep_model::Interner::default();
    let many: Vec<_> =
        (0..5000).map(|n| service(&format!("s{n}"), &format!("10.0.{}.{}", n / 250, n % 250 + 1))).collect();
    let manifest = super::manifest::parse(&many.join("---\n"), false, &mut names).unwrap();
    assert_eq!(manifest.objects.len(), 5000);
    assert!(manifest.objects.iter().all(|(_, conversion)| conversion.is_ok()));

    let named_no = service("no", "10.0.0.1");
    let manifest = super::manifest::parse(&named_no, false, &mut names).unwrap();
    assert_eq!(manifest.objects[0].0.1, "default/no");
    assert!(manifest.objects[0].1.is_ok());
}
