use std::time::Duration;

use lockstep_model::{Key, NodeContext, ServiceKey};
use lockstep_wire::raw::sync_response::Kind as Response;
use lockstep_wire::v1::sync_request::Kind as Request;
use lockstep_wire::v1::sync_service_client::SyncServiceClient;
use lockstep_wire::{convert, v1};
use tonic::Code;

use crate::Config;
use crate::testing::{Node, PATIENCE, World, ack, hello, open, refusal, request, service, set};

async fn world() -> World {
    World::new(Config::default()).await
}

fn held(node: &Node) -> Option<v1::Position> {
    Some(node.position.clone())
}

#[tokio::test]
async fn a_new_node_gets_everything_and_then_each_change() {
    let world = world().await;
    world.publish(|changes| {
        changes.upsert(service("web", 1));
        changes.upsert(set("web", 10, 1));
    });
    let mut node = world.node(hello("n1", "a")).await;
    assert_eq!(node.resume(), v1::ResumeMode::Full);
    node.reach(2).await;
    assert!(node.last.full);
    assert_eq!((node.last.from, node.last.upserts), (None, 2));
    world.publish(|changes| changes.upsert(set("web", 10, 2)));
    node.reach(3).await;
    assert!(!node.last.full);
    assert_eq!((node.last.from, node.last.upserts, node.last.patches), (Some(2), 0, 1));
    world.publish(|changes| changes.remove(Key::Service(ServiceKey::new("default", "web"))));
    node.reach(4).await;
    assert_eq!((node.last.removals, node.state.len()), (1, 1));
}

#[tokio::test]
async fn an_empty_cluster_is_a_state_too() {
    let world = world().await;
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(1).await;
    assert!(node.last.full && node.state.is_empty());
}

#[tokio::test]
async fn equal_digests_need_nothing() {
    let world = world().await;
    world.publish(|changes| changes.upsert(service("web", 1)));
    let mut first = world.node(hello("n1", "a")).await;
    first.reach(2).await;
    // As from another server: nothing but the digest means anything here.
    let position = v1::Position { epoch: 99, seq: 7_000, ..first.position.clone() };
    let second = world.node(v1::Hello { held: Some(position), ..hello("n1", "b") }).await;
    assert_eq!(second.resume(), v1::ResumeMode::InSync);
    assert_eq!(second.welcome.head.as_ref().unwrap().seq, 2);
}

#[tokio::test]
async fn a_remembered_digest_needs_the_difference() {
    let world = world().await;
    world.publish(|changes| {
        changes.upsert(service("web", 1));
        changes.upsert(set("web", 10, 1));
    });
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(2).await;
    world.publish(|changes| changes.upsert(set("web", 10, 2)));
    world.publish(|changes| changes.upsert(service("api", 1)));
    let position = v1::Position { epoch: 99, seq: 7_000, ..node.position.clone() };
    let mut again = world.node(v1::Hello { held: Some(position), ..hello("n1", "a") }).await;
    assert_eq!(again.resume(), v1::ResumeMode::Delta);
    again.state = node.state.clone();
    again.reach(4).await;
    assert_eq!((again.last.from, again.last.upserts, again.last.patches), (Some(2), 1, 1));
}

#[tokio::test]
async fn a_seq_of_this_epoch_helps_where_the_digest_is_forgotten() {
    let world = world().await;
    world.publish(|changes| changes.upsert(service("web", 0)));
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(2).await;
    for variant in 0..1_100_u32 {
        let name = format!("s{}", variant % 7);
        world.publish(|changes| changes.upsert(service(&name, u8::try_from(variant / 7).unwrap() + 1)));
    }
    let mut again = world.node(v1::Hello { held: held(&node), ..hello("n1", "a") }).await;
    assert_eq!(again.resume(), v1::ResumeMode::Delta);
    again.state = node.state.clone();
    again.reach(1_102).await;
    assert_eq!(again.last.upserts, 7, "each once, at its latest");
    // The same seq, but of another epoch: means nothing.
    let other = v1::Position { epoch: 99, ..node.position.clone() };
    let fresh = world.node(v1::Hello { held: Some(other), ..hello("n2", "a") }).await;
    assert_eq!(fresh.resume(), v1::ResumeMode::Full);
    // A digest that contradicts the seq that came with it: the seq is not believed.
    let wrong = v1::Position { seq: 1_102, digest: vec![7; 32].into(), ..node.position.clone() };
    let fresh = world.node(v1::Hello { held: Some(wrong), ..hello("n3", "a") }).await;
    assert_eq!(fresh.resume(), v1::ResumeMode::Full);
}

#[tokio::test]
async fn a_client_that_lacks_something_is_continued_and_never_taken_for_complete() {
    // No heartbeat takes the place of what is waited for.
    let world = World::new(Config { heartbeat: PATIENCE * 3, ..Config::default() }).await;
    world.publish(|changes| {
        changes.upsert(service("web", 1));
        changes.upsert(service("api", 1));
    });
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(2).await;
    let api = Key::Service(ServiceKey::new("default", "api"));
    let mut lacking = node.state.clone();
    lacking.remove(&api);
    let digest = lacking.digest().to_bytes().to_vec();
    let incomplete = v1::Hello {
        held: Some(v1::Position { digest: digest.into(), ..node.position.clone() }),
        position_digest: node.position.digest.clone(),
        ..hello("n1", "a")
    };
    // Nothing has changed: it is told where it is, and gets what it asks for.
    let mut again = world.node(incomplete.clone()).await;
    assert_eq!(again.resume(), v1::ResumeMode::Delta);
    again.state = lacking.clone();
    again.reach_again().await;
    assert_eq!((again.last.from, again.last.upserts, again.position.seq), (Some(2), 0, 2));
    assert_ne!(again.state.digest().to_bytes()[..], again.position.digest[..]);
    let refs = vec![convert::key_to_wire(&api, None)];
    again.send(Request::Refetch(v1::Refetch { refs, everything: false })).await;
    again.reach_again().await;
    assert_eq!(again.state.digest().to_bytes()[..], again.position.digest[..]);
    // What it lacks changes: the difference is enough. The same after a restart of the server.
    world.publish(|changes| changes.upsert(service("api", 2)));
    let other = self::world().await;
    for change in [1, 2] {
        other.publish(|changes| {
            changes.upsert(service("web", 1));
            changes.upsert(service("api", change));
        });
    }
    for world in [&world, &other] {
        let mut again = world.node(incomplete.clone()).await;
        assert_eq!(again.resume(), v1::ResumeMode::Delta);
        again.state = lacking.clone();
        again.reach(3).await;
        assert_eq!((again.last.upserts, again.state.len()), (1, 2));
    }
    // A position that never was is no place to go on from.
    let wrong = v1::Hello { position_digest: vec![7; 32].into(), ..incomplete };
    assert_eq!(world.node(wrong).await.resume(), v1::ResumeMode::Full);
}

#[tokio::test]
async fn another_server_process_resumes_by_digest() {
    let one = world().await;
    let two = world().await;
    for world in [&one, &two] {
        world.publish(|changes| changes.upsert(service("web", 1)));
    }
    let mut node = one.node(hello("n1", "a")).await;
    node.reach(2).await;
    two.publish(|changes| changes.upsert(service("api", 1)));
    let mut moved = two.node(v1::Hello { held: held(&node), ..hello("n1", "a") }).await;
    assert_eq!(moved.resume(), v1::ResumeMode::Delta);
    assert_ne!(moved.welcome.head.as_ref().unwrap().epoch, node.position.epoch);
    moved.state = node.state.clone();
    moved.reach(3).await;
    assert_eq!(moved.last.upserts, 1);
}

#[tokio::test]
async fn what_a_client_does_not_speak_it_does_not_get() {
    let world = world().await;
    world.publish(|changes| changes.upsert(set("web", 200, 1)));
    let mut node = world.node(v1::Hello { features: vec![], ..hello("n1", "a") }).await;
    assert!(node.welcome.features.is_empty());
    node.reach(2).await;
    world.publish(|changes| changes.upsert(set("web", 200, 2)));
    node.reach(3).await;
    assert_eq!((node.last.upserts, node.last.patches), (1, 0));
}

#[tokio::test]
async fn a_slow_reader_gets_the_latest_once() {
    let world = world().await;
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(1).await;
    // More than every buffer on the way holds, all of it about the same twenty sets.
    for round in 0..60_u8 {
        world.publish(|changes| {
            for index in 0..20 {
                changes.upsert(set(&format!("s{index}"), 1_000, round + 1));
            }
        });
    }
    let mut transactions = 0;
    while node.position.seq != 61 {
        node.reach_next().await;
        transactions += 1;
    }
    assert!(transactions < 60, "{transactions} transactions: what was overtaken is not sent");
    assert_eq!(node.state.len(), 20);
    assert_eq!(node.state.digest().to_bytes()[..], node.position.digest[..]);
}

impl Node {
    async fn reach_next(&mut self) {
        let before = self.position.seq;
        while self.position.seq == before {
            let Response::Update(update) = self.next().await.unwrap().unwrap() else { continue };
            self.take(update);
        }
    }
}

#[tokio::test]
async fn no_message_is_larger_than_a_mebibyte() {
    let world = world().await;
    world.publish(|changes| {
        for index in 0..60 {
            changes.upsert(set(&format!("s{index}"), 1_000, 1));
        }
    });
    let mut node = world.node(v1::Hello { features: vec![], ..hello("n1", "a") }).await;
    let mut messages = 0;
    while node.position.seq != 2 {
        let Response::Update(update) = node.next().await.unwrap().unwrap() else { continue };
        messages += 1;
        node.take(update);
    }
    assert!(messages > 1);
    let request = v1::FetchSnapshotRequest::default();
    let mut client = SyncServiceClient::new(world.channel().await).max_decoding_message_size(1024 * 1024);
    let mut snapshot = client.fetch_snapshot(request).await.unwrap().into_inner();
    let mut resources = 0;
    while let Some(part) = snapshot.message().await.unwrap() {
        assert_eq!(part.position.unwrap().seq, 2);
        resources += part.batch.unwrap().upserts.len();
    }
    assert_eq!(resources, 60);
}

#[tokio::test]
async fn streams_share_the_frames_of_a_step() {
    let world = world().await;
    let mut nodes = Vec::new();
    for index in 0..5 {
        let mut node = world.node(hello(&format!("n{index}"), "a")).await;
        node.reach(1).await;
        nodes.push(node);
    }
    let before = world.hub.counters().frames_built.get();
    world.publish(|changes| changes.upsert(service("web", 1)));
    for node in &mut nodes {
        node.reach(2).await;
    }
    assert_eq!(world.hub.counters().frames_built.get() - before, 1);
    let (observed, _) = world.hub.counters().frame_ready.read();
    assert_eq!(observed.iter().sum::<u64>(), 1);
}

#[tokio::test]
async fn the_newest_process_of_a_node_name_has_the_stream() {
    let world = world().await;
    let mut old = world.node(hello("n1", "old")).await;
    old.reach(1).await;
    let new = world.node(hello("n1", "new")).await;
    let Response::Goodbye(goodbye) = old.next_other().await else { panic!("a goodbye") };
    assert_eq!(goodbye.reason(), v1::GoodbyeReason::Superseded);
    assert!(goodbye.message.contains("instance new at 127.0.0.1:"), "{}", goodbye.message);
    assert!(old.next().await.unwrap().is_none(), "it was the last message");
    let refused = refusal(world.channel().await, vec![request(Request::Hello(hello("n1", "old")))]).await;
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(refused.message().contains("instance \"new\" at 127.0.0.1:"), "{}", refused.message());
    drop(new);
    // The server notices in its own time.
    let mut activity = world.hub.activity();
    while world.hub.overview().streams > 0 {
        tokio::time::timeout(PATIENCE, activity.changed()).await.unwrap().unwrap();
    }
    world.node(hello("n1", "old")).await;
}

#[tokio::test]
async fn the_process_that_started_last_has_the_stream_after_a_restart_of_the_server_too() {
    let started = |instance: &str, seconds| v1::Hello {
        started_at: Some(prost_types::Timestamp { seconds, nanos: 0 }),
        ..hello("n1", instance)
    };
    let before = world().await;
    let mut old = before.node(started("old", 100)).await;
    let _new = before.node(started("new", 200)).await;
    let Response::Goodbye(goodbye) = old.next_other().await else { panic!("a goodbye") };
    assert_eq!(goodbye.reason(), v1::GoodbyeReason::Superseded);
    // Another process of the server remembers nothing of that, and the older one comes last.
    let after = world().await;
    let mut new = after.node(started("new", 200)).await;
    let refused = refusal(after.channel().await, vec![request(Request::Hello(started("old", 100)))]).await;
    assert_eq!(refused.code(), Code::AlreadyExists);
    new.reach(1).await;
    // The older one first is no matter either.
    let after = world().await;
    let mut old = after.node(started("old", 100)).await;
    let mut new = after.node(started("new", 200)).await;
    assert!(matches!(old.next_other().await, Response::Goodbye(_)));
    new.reach(1).await;
}

#[tokio::test]
async fn refetch_brings_back_what_was_asked_for() {
    let world = world().await;
    world.publish(|changes| {
        changes.upsert(service("web", 1));
        changes.upsert(service("api", 1));
    });
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(2).await;
    let names = |name: &str| v1::ResourceRef {
        kind: v1::ResourceKind::Service.into(),
        key: format!("default/{name}"),
        ..Default::default()
    };
    node.state.remove(&Key::Service(ServiceKey::new("default", "web")));
    let refs = vec![names("web"), names("gone")];
    node.send(Request::Refetch(v1::Refetch { refs, everything: false })).await;
    node.reach_again().await;
    assert_eq!((node.last.from, node.last.upserts, node.last.removals, node.last.full), (None, 1, 1, false));
    assert_eq!(node.state.digest().to_bytes()[..], node.position.digest[..]);
    node.send(Request::Refetch(v1::Refetch { refs: vec![], everything: true })).await;
    node.reach_again().await;
    assert_eq!((node.last.from, node.last.upserts, node.last.full), (None, 2, true));
    let wrong = v1::ResourceRef { key: "x".into(), ..names("") };
    node.send(Request::Refetch(v1::Refetch { refs: vec![wrong], everything: false })).await;
    let status = node.next().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("refetch.refs[0].key"), "{}", status.message());
}

impl Node {
    async fn reach_again(&mut self) {
        loop {
            let Response::Update(update) = self.next().await.unwrap().unwrap() else { continue };
            let commit = update.commit;
            self.take(update);
            if commit {
                return;
            }
        }
    }
}

#[tokio::test]
async fn silence_is_broken_by_heartbeats() {
    let config = Config { heartbeat: Duration::from_millis(30), ..Config::default() };
    let world = World::new(config).await;
    let mut node = world.node(hello("n1", "a")).await;
    assert_eq!(node.welcome.heartbeat_interval.unwrap().nanos, 30_000_000);
    for _ in 0..2 {
        let Response::Heartbeat(heartbeat) = node.next_other().await else { panic!("a heartbeat") };
        assert_eq!(heartbeat.head.unwrap().seq, 1);
    }
}

#[tokio::test]
async fn a_node_hears_of_its_own_facts_only() {
    let world = world().await;
    let mut node = world.node(hello("n1", "a")).await;
    assert_eq!(node.welcome.node_context.as_ref().unwrap().uid, "", "no such Node yet");
    world.hub.upsert_node(NodeContext { uid: Some("u2".into()), ..NodeContext::unknown("n2") });
    world.hub.upsert_node(NodeContext { uid: Some("u1".into()), ..NodeContext::unknown("n1") });
    let Response::NodeContext(context) = node.next_other().await else { panic!("facts") };
    assert_eq!((context.name.as_str(), context.uid.as_str()), ("n1", "u1"));
    world.hub.remove_node("n1");
    let Response::NodeContext(context) = node.next_other().await else { panic!("facts") };
    assert_eq!((context.name.as_str(), context.uid.as_str()), ("n1", ""));
}

#[tokio::test]
async fn every_node_hears_of_nodes_addresses_that_services_name_before_the_services() {
    let world = world().await;
    let at = |last: u8| std::net::IpAddr::from([192, 0, 2, last]);
    let object = |name: &str, addresses: Vec<std::net::IpAddr>| NodeContext {
        uid: Some(name.into()),
        addresses,
        ..NodeContext::unknown(name)
    };
    world.hub.upsert_node(object("n2", vec![at(2), at(22)]));
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(1).await;
    let named = |context: &v1::NodeContext| context.node_addresses.join(" ");
    assert_eq!(named(node.welcome.node_context.as_ref().unwrap()), "");
    let web = |external: Vec<std::net::IpAddr>| lockstep_model::Service {
        external_ips: external,
        ..service("web", 1)
    };
    world.publish(|changes| changes.upsert(web(vec![at(2), at(3)])));
    let Response::NodeContext(context) = node.next_other().await else { panic!("facts") };
    assert_eq!((named(&context), context.uid.as_str()), ("192.0.2.2".into(), ""), "n1 has no Node object");
    assert_eq!(node.position.seq, 1, "what names them comes after");
    node.reach(2).await;
    world.hub.upsert_node(object("n3", vec![at(3)]));
    let Response::NodeContext(context) = node.next_other().await else { panic!("facts") };
    assert_eq!(named(&context), "192.0.2.2 192.0.2.3");
    let late = world.node(hello("n3", "a")).await;
    assert_eq!(named(late.welcome.node_context.as_ref().unwrap()), "192.0.2.2 192.0.2.3");
    let request = v1::GetNodeRequest { node_name: "n3".into() };
    let shown = world.status().await.get_node(request).await.unwrap().into_inner().context.unwrap();
    assert_eq!(named(&shown), "192.0.2.2 192.0.2.3", "what is asked for is what nodes are told");
    world.hub.remove_node("n2");
    let Response::NodeContext(context) = node.next_other().await else { panic!("facts") };
    assert_eq!(named(&context), "192.0.2.3");
    world.publish(|changes| changes.remove(Key::Service(ServiceKey::new("default", "web"))));
    let Response::NodeContext(context) = node.next_other().await else { panic!("facts") };
    assert_eq!(named(&context), "");
}

#[tokio::test]
async fn an_unusable_beginning_is_refused() {
    let config = Config { hello_timeout: Duration::from_millis(50), ..Config::default() };
    let world = World::new(config).await;
    let first = |kind| vec![request(kind)];
    let long = "x".repeat(254);
    for (messages, code, says) in [
        (vec![], Code::InvalidArgument, "no Hello within"),
        (vec![v1::SyncRequest { kind: None }], Code::InvalidArgument, "missing or empty"),
        (first(Request::Ack(v1::Ack::default())), Code::InvalidArgument, "not a Hello"),
        (first(Request::Hello(hello("", "a"))), Code::InvalidArgument, "hello.node_name"),
        (first(Request::Hello(hello(&long, "a"))), Code::InvalidArgument, "hello.node_name"),
        (first(Request::Hello(hello("n1\nn2", "a"))), Code::InvalidArgument, "hello.node_name"),
        (first(Request::Hello(hello("n1", ""))), Code::InvalidArgument, "hello.instance_id"),
        (
            first(Request::Hello(v1::Hello { protocol_min: 2, protocol_max: 3, ..hello("n1", "a") })),
            Code::FailedPrecondition,
            "speaks protocol 1",
        ),
    ] {
        let status = refusal(world.channel().await, messages).await;
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(says), "{status}");
    }
    assert_eq!(world.hub.counters().streams_refused.get(), 8);
    assert_eq!(world.hub.overview().streams, 0);
}

#[tokio::test]
async fn too_large_a_message_ends_the_stream() {
    let world = world().await;
    let huge = v1::Hello { agent_version: "x".repeat(1024 * 1024), ..hello("n1", "a") };
    let status = refusal(world.channel().await, vec![request(Request::Hello(huge))]).await;
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
}

#[tokio::test]
async fn nothing_is_served_before_the_source_was_read() {
    let world = World::unsynced(Config::default(), None).await;
    world.hub.not_serving("services: not listed yet".into());
    let status = refusal(world.channel().await, vec![request(Request::Hello(hello("n1", "a")))]).await;
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "not serving: services: not listed yet");
    let mut client = SyncServiceClient::new(world.channel().await);
    let status = client.fetch_snapshot(v1::FetchSnapshotRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    world.hub.start_serving();
    world.node(hello("n1", "a")).await.reach(1).await;
}

#[tokio::test]
async fn contradictory_reports_end_the_stream_and_late_ones_do_not() {
    let world = world().await;
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(1).await;
    let head = node.position.clone();
    node.send(Request::Ack(ack(&v1::Position { epoch: 99, ..head.clone() }, 500))).await;
    node.send(Request::Ack(ack(&head, 1))).await;
    let mut activity = world.hub.activity();
    while world.hub.counters().acks.get() == 0 {
        tokio::time::timeout(PATIENCE, activity.changed()).await.unwrap().unwrap();
    }
    assert_eq!(world.hub.counters().acks_refused.get(), 1);
    let mut liar = world.node(hello("n2", "a")).await;
    liar.reach(1).await;
    let elsewhere = v1::Position { digest: vec![1; 32].into(), ..head.clone() };
    liar.send(Request::Ack(ack(&elsewhere, 1))).await;
    let status = liar.next().await.unwrap_err();
    assert!(status.message().starts_with("ack: position.digest: "), "{status}");
    node.send(Request::Ack(ack(&head, 2))).await;
    let status = node.next().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.message(), "ack: received_seq: 2 is newer than the head, 1");
}

#[tokio::test]
async fn a_client_that_only_listens_is_served() {
    let world = world().await;
    let (sender, mut responses) =
        open(world.channel().await, vec![request(Request::Hello(hello("n1", "a")))]).await.unwrap();
    drop(sender);
    responses.message().await.unwrap().unwrap();
    responses.message().await.unwrap().unwrap();
    world.publish(|changes| changes.upsert(service("web", 1)));
    let response = tokio::time::timeout(PATIENCE, responses.message()).await.unwrap().unwrap();
    assert!(matches!(response.unwrap().kind, Some(Response::Update(_))));
}

#[tokio::test]
async fn a_server_that_goes_says_goodbye() {
    let mut world = world().await;
    let mut node = world.node(hello("n1", "a")).await;
    node.reach(1).await;
    world.stop.take().unwrap().send(()).unwrap();
    let Response::Goodbye(goodbye) = node.next_other().await else { panic!("a goodbye") };
    assert_eq!(goodbye.reason(), v1::GoodbyeReason::Shutdown);
    assert!(goodbye.reconnect_after.unwrap().seconds <= 5);
    assert!(node.next().await.unwrap().is_none());
    drop(node);
    tokio::time::timeout(PATIENCE, world.server).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn what_is_complete_after_the_server_began_to_go_is_not_served() {
    let world = World::unsynced(Config::default(), None).await;
    world.hub.shut_down();
    world.hub.not_serving("services: not listed yet".into());
    world.hub.start_serving();
    assert_eq!(world.hub.overview().not_serving.unwrap(), "the server is shutting down");
}

#[tokio::test]
async fn a_snapshot_can_be_a_part() {
    let world = world().await;
    world.publish(|changes| {
        changes.upsert(service("web", 1));
        changes.upsert(set("web", 3, 1));
        changes.upsert(service("api", 1));
        let key = lockstep_model::ServiceCidrKey("kubernetes".into());
        changes.upsert(lockstep_model::ServiceCidr { key, cidrs: vec!["10.96.0.0/12".parse().unwrap()] });
    });
    let mut client = SyncServiceClient::new(world.channel().await);
    let all = v1::FetchSnapshotRequest::default();
    let namespace = v1::FetchSnapshotRequest { namespace: "default".into(), ..all.clone() };
    for (request, count) in [
        (all.clone(), 4),
        (namespace.clone(), 3),
        (v1::FetchSnapshotRequest { namespace: "other".into(), ..all.clone() }, 0),
        (v1::FetchSnapshotRequest { service: "web".into(), ..namespace.clone() }, 2),
        (v1::FetchSnapshotRequest { kinds: vec![v1::ResourceKind::Service.into()], ..all.clone() }, 2),
        (v1::FetchSnapshotRequest { kinds: vec![v1::ResourceKind::ServiceCidr.into()], ..all.clone() }, 1),
    ] {
        let mut snapshot = client.fetch_snapshot(request.clone()).await.unwrap().into_inner();
        let mut got = 0;
        while let Some(part) = snapshot.message().await.unwrap() {
            got += part.batch.map_or(0, |batch| batch.upserts.len());
        }
        assert_eq!(got, count, "{request:?}");
    }
    let alone = v1::FetchSnapshotRequest { service: "web".into(), ..all };
    assert_eq!(client.fetch_snapshot(alone).await.unwrap_err().code(), Code::InvalidArgument);
}
