use std::time::Duration;

use lockstep_model::{InvalidField, Key, NodeContext, ServiceKey};
use lockstep_wire::v1;
use lockstep_wire::v1::sync_request::Kind as Request;
use tonic::Code;

use crate::Config;
use crate::intake::QuarantineInput;
use crate::testing::{Node, PATIENCE, World, ack, hello, service, set};

/// A node that has got everything and reports it.
async fn verified(world: &World, name: &str) -> Node {
    let mut node = world.node(hello(name, "a")).await;
    node.reach(world.hub.overview().head.seq).await;
    report(world, &node, ack(&node.position, node.position.seq)).await;
    node
}

/// Sends a report and waits until it is taken.
async fn report(world: &World, node: &Node, ack: v1::Ack) {
    let before = world.hub.counters().acks.get();
    let mut activity = world.hub.activity();
    node.send(Request::Ack(ack)).await;
    while world.hub.counters().acks.get() == before {
        tokio::time::timeout(PATIENCE, activity.changed()).await.unwrap().unwrap();
    }
}

fn failing(node: &Node, service: &str, message: &str) -> v1::Ack {
    let failure = v1::ResourceFailure {
        r#ref: Some(v1::ResourceRef {
            kind: v1::ResourceKind::Service.into(),
            key: format!("default/{service}"),
            ..Default::default()
        }),
        reason: v1::FailureReason::Kernel.into(),
        in_force: v1::InForce::Previous.into(),
        message: message.into(),
        attempts: 2,
        ..Default::default()
    };
    v1::Ack {
        failures: vec![failure],
        outcome: v1::Outcome::Partial.into(),
        ..ack(&node.position, node.position.seq)
    }
}

async fn world() -> World {
    let world = World::new(Config::default()).await;
    world.publish(|changes| {
        changes.upsert(service("web", 1));
        changes.upsert(set("web", 3, 1));
        changes.upsert(service("api", 1));
    });
    world
}

#[tokio::test]
async fn the_server_says_what_it_holds_and_why_it_does_not_serve() {
    let world = World::unsynced(Config::default(), None).await;
    world.hub.not_serving("nodes: not listed yet".into());
    let mut client = world.status().await;
    let info = client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.synced, info.not_serving_reason.as_str()), (false, "nodes: not listed yet"));
    let refused = client.list_services(v1::ListServicesRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    world.publish(|changes| changes.upsert(service("web", 1)));
    world.hub.start_serving();
    let info = client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.synced, info.services, info.head.unwrap().seq), (true, 1, 1));
}

#[tokio::test]
async fn services_come_in_pages_with_what_the_nodes_say() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    world.hub.upsert_node(NodeContext::unknown("n2"));
    report(&world, &node, failing(&node, "web", "no room")).await;
    let mut client = world.status().await;
    let mut request = v1::ListServicesRequest { page_size: 1, ..Default::default() };
    let mut lines = Vec::new();
    loop {
        let page = client.list_services(request.clone()).await.unwrap().into_inner();
        lines.extend(page.services.iter().map(|it| {
            let (ready, verified) = (it.ready_endpoints, it.nodes_verified);
            format!(
                "{} {ready} {verified}/{} {} {:?}",
                it.name, it.nodes_expected, it.nodes_failing, it.ports
            )
        }));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(lines, ["api 0 1/2 0 [\"http 80/TCP\"]", "web 3 1/2 1 [\"http 80/TCP\"]"]);
    request.page_token = "nonsense".into();
    assert_eq!(client.list_services(request).await.unwrap_err().code(), Code::InvalidArgument);
    let web = v1::GetServiceRequest { namespace: "default".into(), name: "web".into() };
    let web = client.get_service(web).await.unwrap().into_inner();
    assert_eq!((web.endpoint_sets.len(), web.nodes_behind), (1, vec!["n1".to_owned(), "n2".to_owned()]));
    let gone = v1::GetServiceRequest { namespace: "default".into(), name: "gone".into() };
    assert_eq!(client.get_service(gone).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn nodes_come_in_pages_with_their_state() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    let _behind = world.node(hello("n2", "a")).await;
    world.hub.upsert_node(NodeContext::unknown("n3"));
    let mut client = world.status().await;
    let mut request = v1::ListNodesRequest { page_size: 2, ..Default::default() };
    let first = client.list_nodes(request.clone()).await.unwrap().into_inner();
    request.page_token = first.next_page_token;
    let second = client.list_nodes(request.clone()).await.unwrap().into_inner();
    assert_eq!(second.next_page_token, "");
    let states: Vec<_> = first.nodes.iter().chain(&second.nodes).map(|node| node.state()).collect();
    assert_eq!(states, [v1::NodeSyncState::InSync, v1::NodeSyncState::Behind, v1::NodeSyncState::NeverSeen]);
    let names =
        |nodes: &[v1::NodeStatus]| nodes.iter().map(|node| node.node_name.clone()).collect::<Vec<_>>();
    let behind = v1::ListNodesRequest { only_behind: true, ..Default::default() };
    assert_eq!(names(&client.list_nodes(behind).await.unwrap().into_inner().nodes), ["n2", "n3"]);
    report(&world, &node, failing(&node, "web", "no room")).await;
    let failing = v1::ListNodesRequest { only_failing: true, ..Default::default() };
    assert_eq!(names(&client.list_nodes(failing).await.unwrap().into_inner().nodes), ["n1"]);
    let one = client.get_node(v1::GetNodeRequest { node_name: "n1".into() }).await.unwrap().into_inner();
    let status = one.node.unwrap();
    assert_eq!((status.state(), status.has_node_object), (v1::NodeSyncState::Degraded, false));
    assert_eq!((status.sent_seq, status.verified_seq, status.failures.len()), (2, 2, 1));
    let gone = client.get_node(v1::GetNodeRequest { node_name: "n9".into() }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

#[tokio::test]
async fn what_a_node_says_of_its_settings_is_shown_whole_or_not_at_all() {
    let world = world().await;
    let told = v1::NodeSettings {
        detect_local_mode: 99,
        cluster_cidrs: vec!["10.0.0.0/8".into()],
        pod_interface: "cni0".into(),
        node_port_addresses: v1::NodePortAddresses::Cidrs.into(),
        node_port_cidrs: vec!["192.0.2.0/24".into()],
        masquerade_all: true,
        masquerade_mark: 0x4000,
        loopback_node_ports: true,
    };
    let many = vec!["10.0.0.0/8".to_owned(); 257];
    let longest = v1::NodeSettings {
        cluster_cidrs: vec!["2001:0db8:0000:0000:0000:ffff:192.168.100.100/128".into()],
        pod_interface: "x".repeat(15),
        ..told.clone()
    };
    let mut status = world.status().await;
    for (name, settings, shown) in [
        ("n1", Some(told.clone()), Some(told.clone())),
        ("n2", None, None),
        ("n3", Some(v1::NodeSettings { cluster_cidrs: many, ..told.clone() }), None),
        ("n4", Some(v1::NodeSettings { pod_interface: "x".repeat(16), ..told.clone() }), None),
        ("n5", Some(v1::NodeSettings { node_port_cidrs: vec!["x".repeat(512)], ..told.clone() }), None),
        ("n6", Some(v1::NodeSettings { cluster_cidrs: vec!["10.0.0.0/33".into()], ..told.clone() }), None),
        ("n7", Some(longest.clone()), Some(longest)),
    ] {
        let _node = world.node(v1::Hello { settings, ..hello(name, "a") }).await;
        let request = v1::GetNodeRequest { node_name: name.into() };
        let response = status.get_node(request).await.unwrap().into_inner();
        assert_eq!(response.settings, shown, "{name}");
    }
}

#[tokio::test]
async fn a_wait_names_who_is_missing_until_nobody_is() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    world.hub.upsert_node(NodeContext::unknown("n2"));
    let mut client = world.status().await;
    let service = v1::ServiceRef { namespace: "default".into(), name: "web".into() };
    let target = Some(v1::wait_request::Target::Service(service));
    let mut wait = client.wait(v1::WaitRequest { target, ..Default::default() }).await.unwrap().into_inner();
    let first = wait.message().await.unwrap().unwrap();
    assert_eq!((first.nodes_expected, first.nodes_done, first.done), (2, 1, false));
    assert_eq!(first.laggards[0].node_name, "n2");
    assert_eq!(first.laggards[0].reason, "no stream since the server started");
    report(&world, &node, failing(&node, "web", "no room")).await;
    let second = wait.message().await.unwrap().unwrap();
    assert_eq!((second.nodes_done, second.laggards[0].reason.as_str()), (0, "default/web: no room"));
    world.hub.remove_node("n2");
    report(&world, &node, ack(&node.position, 2)).await;
    let mut last = second;
    while let Some(response) = tokio::time::timeout(PATIENCE, wait.message()).await.unwrap().unwrap() {
        last = response;
    }
    assert_eq!((last.nodes_expected, last.nodes_done, last.done), (1, 1, true));
}

fn wait_for(name: &str) -> v1::WaitRequest {
    let service = v1::ServiceRef { namespace: "default".into(), name: name.into() };
    v1::WaitRequest { target: Some(v1::wait_request::Target::Service(service)), ..Default::default() }
}

#[tokio::test]
async fn a_wait_for_a_removed_service_waits_for_the_removal() {
    let world = world().await;
    let mut node = verified(&world, "n1").await;
    world.publish(|changes| changes.remove(Key::Service(ServiceKey::new("default", "api"))));
    let mut client = world.status().await;
    let mut wait = client.wait(wait_for("api")).await.unwrap().into_inner();
    let first = wait.message().await.unwrap().unwrap();
    assert_eq!((first.target.unwrap().seq, first.nodes_done, first.done), (3, 0, false));
    node.reach(3).await;
    report(&world, &node, ack(&node.position, 3)).await;
    assert!(tokio::time::timeout(PATIENCE, wait.message()).await.unwrap().unwrap().unwrap().done);
}

#[tokio::test]
async fn a_laggard_is_explained_by_what_is_waited_for_only() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    report(&world, &node, failing(&node, "web", "no room")).await;
    world.publish(|changes| changes.upsert(service("api", 2)));
    let mut wait = world.status().await.wait(wait_for("api")).await.unwrap().into_inner();
    let first = wait.message().await.unwrap().unwrap();
    assert_eq!((first.laggards[0].node_name.as_str(), first.laggards[0].reason.as_str()), ("n1", ""));
}

#[tokio::test]
async fn what_belongs_to_no_service_holds_up_no_wait_for_one() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    let mut ack = failing(&node, "web", "no room");
    ack.failures[0].r#ref = Some(v1::ResourceRef {
        kind: v1::ResourceKind::ServiceCidr.into(),
        key: "kubernetes".into(),
        ..Default::default()
    });
    report(&world, &node, ack).await;
    let mut client = world.status().await;
    let mut wait = client.wait(wait_for("web")).await.unwrap().into_inner();
    let mut last = wait.message().await.unwrap().unwrap();
    while let Some(response) = tokio::time::timeout(PATIENCE, wait.message()).await.unwrap().unwrap() {
        last = response;
    }
    assert!(last.done);
    // It is no secret, though.
    let all = client.list_failures(v1::ListFailuresRequest::default()).await.unwrap().into_inner();
    assert_eq!(all.groups[0].r#ref.as_ref().unwrap().key, "kubernetes");
    let request = v1::ListFailuresRequest { namespace: "default".into(), ..Default::default() };
    assert_eq!(client.list_failures(request).await.unwrap().into_inner().groups, []);
}

#[tokio::test]
async fn answers_that_go_on_end_with_the_server() {
    let mut world = world().await;
    world.hub.upsert_node(NodeContext::unknown("n1"));
    let mut client = world.status().await;
    let mut wait = client.wait(wait_for("web")).await.unwrap().into_inner();
    let long = prost_types::Duration { seconds: i64::MAX, nanos: 0 };
    let request = v1::WatchConvergenceRequest { min_interval: Some(long) };
    let mut watch = client.watch_convergence(request).await.unwrap().into_inner();
    assert!(wait.message().await.unwrap().is_some() && watch.message().await.unwrap().is_some());
    world.stop.take().unwrap().send(()).unwrap();
    for status in [wait.message().await.unwrap_err(), watch.message().await.unwrap_err()] {
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "the server is shutting down"));
    }
}

#[tokio::test]
async fn a_wait_for_what_cannot_be_is_refused() {
    let world = world().await;
    let mut client = world.status().await;
    let head = world.hub.overview().head;
    let seq = |seq| Some(v1::wait_request::Target::Seq(seq));
    let gone = v1::ServiceRef { namespace: "default".into(), name: "gone".into() };
    for (target, epoch, level, code) in [
        (None, 0, 0, Code::InvalidArgument),
        (seq(head.seq + 1), 0, 0, Code::OutOfRange),
        (seq(1), head.epoch ^ 1, 0, Code::FailedPrecondition),
        (seq(1), head.epoch, 9, Code::InvalidArgument),
        (Some(v1::wait_request::Target::Service(gone)), 0, 0, Code::NotFound),
    ] {
        let status = client.wait(v1::WaitRequest { target, epoch, level }).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
}

#[tokio::test]
async fn a_wait_ends_with_the_deadline_of_its_caller() {
    let world = world().await;
    world.hub.upsert_node(NodeContext::unknown("n1"));
    let mut client = world.status().await;
    let target = Some(v1::wait_request::Target::Seq(0));
    let mut request = tonic::Request::new(v1::WaitRequest { target, ..Default::default() });
    request.set_timeout(Duration::from_millis(300));
    let mut wait = client.wait(request).await.unwrap().into_inner();
    assert!(!wait.message().await.unwrap().unwrap().done);
    let status = tokio::time::timeout(PATIENCE, wait.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
}

#[test]
fn deadlines_are_read_in_every_unit() {
    let seconds = |text: &str| {
        let mut metadata = tonic::metadata::MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().unwrap());
        let now = tokio::time::Instant::now();
        super::watch::deadline(&metadata).map(|at| at.duration_since(now).as_secs_f64().round())
    };
    let units = ["2H", "3M", "4S", "5000m", "6000000u", "7000000000n"].map(seconds);
    assert_eq!(units, [7_200.0, 180.0, 4.0, 5.0, 6.0, 7.0].map(Some));
    assert_eq!(["", "S", "5", "5x", "-5S"].map(seconds), [None; 5]);
}

#[tokio::test]
async fn convergence_is_watched() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    let min_interval = Some(prost_types::Duration { seconds: 0, nanos: 50_000_000 });
    let mut client = world.status().await;
    let request = v1::WatchConvergenceRequest { min_interval };
    let mut watch = client.watch_convergence(request).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!((first.nodes_expected, first.nodes_verified, first.laggards.len()), (1, 1, 0));
    assert!(first.last_convergence.is_some());
    world.publish(|changes| changes.upsert(service("web", 2)));
    let second = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
    assert_eq!((second.head.unwrap().seq, second.nodes_verified, second.laggards), (3, 0, vec!["n1".into()]));
    drop(node);
}

#[tokio::test]
async fn failures_are_grouped_and_quarantined_objects_listed() {
    let world = world().await;
    let mut nodes = Vec::new();
    for name in ["n1", "n2"] {
        let node = verified(&world, name).await;
        report(&world, &node, failing(&node, "web", "no room")).await;
        nodes.push(node);
    }
    let node = verified(&world, "n3").await;
    report(&world, &node, v1::Ack { backend_error: "no nf_tables".into(), ..failing(&node, "api", "x") })
        .await;
    crate::intake::take_quarantine(
        &world.hub,
        QuarantineInput::Add {
            kind: "Service".into(),
            name: "default/bad".into(),
            fault: InvalidField { field: "spec".into(), value: "é".repeat(100), reason: "is wrong".into() },
            previous_in_force: false,
        },
    );
    let mut client = world.status().await;
    let all = client.list_failures(v1::ListFailuresRequest::default()).await.unwrap().into_inner();
    let groups: Vec<_> = all
        .groups
        .iter()
        .map(|group| {
            (group.r#ref.as_ref().unwrap().key.as_str(), group.node_count, group.sample_nodes.join(" "))
        })
        .collect();
    assert_eq!(groups, [("default/web", 2, "n1 n2".to_owned()), ("default/api", 1, "n3".to_owned())]);
    assert_eq!(all.failed_nodes, ["n3"]);
    assert_eq!((all.quarantined[0].name.as_str(), all.quarantined[0].value.len()), ("default/bad", 128));
    let request =
        v1::ListFailuresRequest { reason: v1::FailureReason::Conflict.into(), ..Default::default() };
    assert!(client.list_failures(request).await.unwrap().into_inner().groups.is_empty());
    let request = v1::ListFailuresRequest { namespace: "other".into(), ..Default::default() };
    let other = client.list_failures(request).await.unwrap().into_inner();
    assert!(other.groups.is_empty() && other.quarantined.is_empty());
}

#[tokio::test]
async fn a_verbose_report_is_cut_and_taken() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    let one = failing(&node, "web", &"x".repeat(600)).failures.remove(0);
    let failures = vec![one; 300];
    report(&world, &node, v1::Ack { failures, ..ack(&node.position, 2) }).await;
    let mut client = world.status().await;
    let status = client.get_node(v1::GetNodeRequest { node_name: "n1".into() }).await.unwrap().into_inner();
    let status = status.node.unwrap();
    assert_eq!((status.failures.len(), status.failures_truncated), (256, 44));
    assert_eq!(status.failures[0].message.len(), 512);
}

#[tokio::test]
async fn a_failure_that_names_no_resource_is_kept_and_ends_no_stream() {
    let world = world().await;
    let mut node = verified(&world, "n1").await;
    let of = |r#ref, reason: v1::FailureReason, message: &str| v1::ResourceFailure {
        r#ref,
        reason: reason.into(),
        message: message.into(),
        ..Default::default()
    };
    let unknown_kind = of(None, v1::FailureReason::Unsupported, "a kind this client does not know");
    let with = |failures: Vec<v1::ResourceFailure>| v1::Ack { failures, ..ack(&node.position, 2) };
    report(&world, &node, with(vec![unknown_kind.clone()])).await;
    let mut client = world.status().await;
    let get = v1::GetNodeRequest { node_name: "n1".into() };
    let status = client.get_node(get.clone()).await.unwrap().into_inner().node.unwrap();
    assert_eq!(
        (status.state(), &status.failures),
        (v1::NodeSyncState::Degraded, &vec![unknown_kind.clone()])
    );
    let mut wait = client.wait(wait_for("web")).await.unwrap().into_inner();
    assert!(wait.message().await.unwrap().unwrap().done, "no Service is of an unknown kind");
    // What cannot be read may be of any Service, whatever reason it gives.
    let bad = v1::ResourceRef { kind: 1, key: "x".into(), ..Default::default() };
    let later = v1::ResourceRef { kind: 77, key: "a/b".into(), ..Default::default() };
    for (named, says) in [
        (None, "a resource without a key: no room"),
        (Some(bad), "a resource without a key: no room (ref.key: \"x\" is not namespace/name)"),
        (
            Some(later),
            "a resource without a key: no room (ref.kind: \"77\" is not a kind this release knows)",
        ),
    ] {
        let reason = if named.is_some() { v1::FailureReason::Unsupported } else { v1::FailureReason::Decode };
        report(&world, &node, with(vec![of(named, reason, "no room")])).await;
        let mut wait = client.wait(wait_for("web")).await.unwrap().into_inner();
        let first = wait.message().await.unwrap().unwrap();
        assert_eq!((first.done, first.laggards[0].reason.as_str()), (false, says));
    }
    let all = client.list_failures(v1::ListFailuresRequest::default()).await.unwrap().into_inner();
    assert_eq!((all.groups.len(), all.groups[0].r#ref.clone()), (1, None));
    let elsewhere = v1::ListFailuresRequest { namespace: "default".into(), ..Default::default() };
    assert!(client.list_failures(elsewhere).await.unwrap().into_inner().groups.is_empty());
    // The stream is the same one, and goes on.
    world.publish(|changes| changes.upsert(service("web", 2)));
    node.reach(3).await;
}

#[tokio::test]
async fn a_wait_counts_failures_that_are_not_listed() {
    let world = world().await;
    let node = verified(&world, "n1").await;
    let named = |name: &str| failing(&node, name, "no room").failures.remove(0);
    let mut failures: Vec<_> = (0..256).map(|index| named(&format!("s{index}"))).collect();
    let told = |failures: &[v1::ResourceFailure], failures_truncated| v1::Ack {
        failures: failures.to_vec(),
        failures_truncated,
        ..ack(&node.position, 2)
    };
    let mut client = world.status().await;
    // 257 failures of which the node lists 256: the last one may be of any Service.
    report(&world, &node, told(&failures, 1)).await;
    let mut wait = client.wait(wait_for("web")).await.unwrap().into_inner();
    let first = wait.message().await.unwrap().unwrap();
    assert_eq!((first.done, first.laggards[0].reason.as_str()), (false, "1 failures not listed"));
    // All of them told: kept in mind, though one is not listed.
    failures.push(named("web"));
    report(&world, &node, told(&failures, 0)).await;
    for (name, done) in [("web", false), ("api", true)] {
        let mut wait = client.wait(wait_for(name)).await.unwrap().into_inner();
        assert_eq!(wait.message().await.unwrap().unwrap().done, done, "{name}");
    }
    let web = v1::GetServiceRequest { namespace: "default".into(), name: "web".into() };
    let web = client.get_service(web).await.unwrap().into_inner();
    assert_eq!((web.nodes_behind, web.summary.unwrap().nodes_failing), (vec!["n1".to_owned()], 1));
}
