//! `explain`, decision by decision.

use lockstep_model::Hints;

use super::*;

fn settings() -> v1::NodeSettings {
    v1::NodeSettings {
        detect_local_mode: v1::DetectLocalMode::ClusterCidr.into(),
        cluster_cidrs: vec!["10.1.0.0/16".into()],
        node_port_addresses: v1::NodePortAddresses::Primary.into(),
        masquerade_mark: 0x4000,
        ..Default::default()
    }
}

impl World {
    /// Puts resources and Node objects in and waits until they are served.
    async fn put(&self, change: impl FnOnce(&mut lockstep_store::Changes), nodes: Vec<NodeContext>) {
        let before = self.hub.overview().head.seq;
        let mut changes = lockstep_store::Changes::default();
        change(&mut changes);
        let nodes = nodes.into_iter().map(NodeInput::Upsert).collect();
        self.input(Input::Changes { changes, nodes, quarantine: vec![] }).await;
        while self.hub.overview().head.seq == before {
            tokio::task::yield_now().await;
        }
    }

    /// Node `n1` in zone `z1` at 10.200.0.11, with this Service and these sets beside `web`. The
    /// node is there for as long as its stream.
    async fn explained(
        service: Service,
        sets: Vec<EndpointSet>,
        failures: Vec<v1::ResourceFailure>,
    ) -> (Self, mpsc::Sender<v1::SyncRequest>) {
        let world = Self::new().await;
        let node = NodeContext {
            uid: Some("u1".into()),
            zone: Some("z1".into()),
            addresses: vec!["10.200.0.11".parse().unwrap()],
            ..NodeContext::unknown("n1")
        };
        let put = |changes: &mut lockstep_store::Changes| {
            changes.upsert(service);
            sets.into_iter().for_each(|set| changes.upsert(set));
        };
        world.put(put, vec![node]).await;
        let stream = world.node_with("n1", failures, Some(settings())).await;
        (world, stream)
    }

    async fn json(&self, line: &str) -> serde_json::Value {
        let (text, code) = self.run(&format!("explain -o json {line}")).await;
        assert_eq!(code, 0, "{text}");
        serde_json::from_str(&text).unwrap()
    }
}

fn shop() -> Service {
    Service {
        key: ServiceKey::new("shop", "cart"),
        service_type: ServiceType::LoadBalancer,
        cluster_ips: vec!["10.96.0.42".parse().unwrap()],
        external_ips: vec!["192.0.2.80".parse().unwrap()],
        load_balancer_ingress: vec![lockstep_model::LoadBalancerIngress {
            ip: "198.51.100.42".parse().unwrap(),
            proxy_mode: false,
        }],
        load_balancer_source_ranges: vec!["203.0.113.0/24".parse().unwrap()],
        client_ip_affinity_seconds: Some(10_800),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: 443.try_into().unwrap(),
            name: "http".into(),
            node_port: Some(30_443.try_into().unwrap()),
            app_protocol: None,
        }],
        ..service("cart")
    }
}

/// Two ready endpoints in `z1`, of which the first is on `n1`; one in `z2`, one shutting down.
fn carts() -> EndpointSet {
    let endpoint = |last: u8, node: &str, zone: &str, conditions| Endpoint {
        address: IpAddr::V4(Ipv4Addr::new(10, 1, 0, last)),
        node_name: Some(node.into()),
        zone: Some(zone.into()),
        conditions,
        hints: Some(Box::new(Hints {
            zones: [Arc::from(zone)].into_iter().collect(),
            nodes: Default::default(),
        })),
    };
    let draining = Conditions { ready: false, serving: true, terminating: true };
    EndpointSet {
        key: EndpointSetKey::new(ServiceKey::new("shop", "cart"), "cart-x"),
        endpoints: vec![
            endpoint(5, "n1", "z1", Conditions::READY),
            endpoint(6, "n2", "z1", Conditions::READY),
            endpoint(7, "n3", "z2", Conditions::READY),
            endpoint(8, "n1", "z1", draining),
        ],
        ..endpoints("cart")
    }
}

#[tokio::test]
async fn every_decision_is_told_to_people() {
    let (world, _node) = World::explained(shop(), vec![carts()], vec![]).await;
    let (text, code) = world.run("explain --node n1 --from 10.1.0.5 tcp 10.96.0.42:443").await;
    let expected = "\
Packet        10.1.0.5 -> 10.96.0.42:443/TCP, a new connection at n1
Client        a pod: in 10.1.0.0/16, a network of pods
Service       shop/cart, port http 443, by its cluster IP
Verdict       forwarded to one of 2 endpoints: internalTrafficPolicy Cluster
Pool          ready endpoints whose hints name this node's zone
Source seen   the client's: the client is a pod
Affinity      by client: it keeps its endpoint until it was idle for 3h0m
In force      yes: n1 is verified at the head, seq 2 of 2

ENDPOINT        NODE   ZONE   STATE                  SLICE    ANSWERS   SEES     WHY
10.1.0.5:8080   n1     z1     ready                  cart-x   yes       node     it is the client itself
10.1.0.6:8080   n2     z1     ready                  cart-x   yes       client   -
10.1.0.7:8080   n3     z2     ready                  cart-x   no        -        meant for other zones
10.1.0.8:8080   n1     z1     terminating, serving   cart-x   no        -        terminating

Notes:
  a change of the Node object (zone, podCIDRs, addresses) has no sequence number: n1 may go by an earlier one
";
    assert_eq!((text.as_str(), code), (expected, 0));
    let (text, _) = world.run("explain --node n1 --from 10.200.0.11 tcp 198.51.100.42:443").await;
    let expected = "\
Packet          10.200.0.11 -> 198.51.100.42:443/TCP, a new connection at n1
Client          the node itself: an address of the node
Service         shop/cart, port http 443, by a load balancer's address
Source ranges   203.0.113.0/24 do not let the client in
Verdict         dropped: 10.200.0.11 is in no source range of the load balancer
In force        yes: n1 is verified at the head, seq 2 of 2
";
    assert!(text.starts_with(expected), "{text}");
}

#[tokio::test]
async fn scripts_get_every_decision_by_a_stable_name() {
    let (world, _node) = World::explained(shop(), vec![carts()], vec![]).await;
    let it = world.json("--node n1 --from 203.0.113.9 tcp 198.51.100.42:443").await;
    assert_eq!((&it["verdict"], &it["source"]["class"]), (&"Forwarded".into(), &"Elsewhere".into()));
    assert_eq!(it["service"]["surface"], "LoadBalancerIP");
    assert_eq!(it["service"]["sourceRanges"]["allowed"], true);
    assert_eq!(it["forward"]["pool"], "Local");
    assert_eq!(it["forward"]["masquerade"], false);
    assert_eq!(it["endpoints"][0]["sees"], "Client");
    assert_eq!(it["endpoints"][1]["excluded"], "NotLocal");
    assert_eq!(it["inForce"]["state"], "Verified");
    assert_eq!(it["settings"]["podNetworks"][0], "10.1.0.0/16");
    let (yaml, _) = world.run("explain --node n1 --from 203.0.113.9 tcp 10.200.0.11:30443 -o yaml").await;
    assert!(yaml.contains("  surface: NodePort\n") && yaml.contains("verdict: Forwarded\n"), "{yaml}");
}

#[tokio::test]
async fn who_has_a_contested_address_is_said_from_both_sides() {
    let mut cart = shop();
    cart.ports[0].port = 80.try_into().unwrap();
    let (world, _node) = World::explained(cart, vec![carts()], vec![]).await;
    // Both claim 192.0.2.80:80; the lower name has it.
    let winner = world.json("--node n1 --from 10.1.0.9 tcp 192.0.2.80:80").await;
    assert_eq!(
        (&winner["service"]["name"], &winner["service"]["alsoClaimedBy"][0]),
        (&"web".into(), &"shop/cart".into())
    );
    let loser = world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.42:80").await;
    let conflict = &loser["service"]["conflicts"][0];
    assert_eq!((&conflict["address"], &conflict["owner"]), (&"192.0.2.80".into(), &"default/web".into()));
}

#[tokio::test]
async fn a_node_that_fails_or_is_away_is_not_taken_at_the_plans_word() {
    let question = "--node n1 --from 10.1.0.9 tcp 10.96.0.1:80";
    let (world, _node) = World::explained(shop(), vec![carts()], vec![failure()]).await;
    let it = world.json(question).await;
    assert_eq!(it["verdict"], "Forwarded");
    assert_eq!(it["inForce"]["state"], "Failing");
    let text = it["inForce"]["text"].as_str().unwrap();
    assert_eq!(text, "no: n1 fails to program it: no room; the version before is in force");
    assert_eq!(it["inForce"]["failures"][0]["key"], "default/web");
    // The other Service is not concerned.
    let other = world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.42:443").await;
    assert_eq!(other["inForce"]["state"], "Verified");
    // At a port that it does not have, the cluster IP's Service is concerned.
    let it = world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.1:81").await;
    assert_eq!((&it["service"], &it["inForce"]["state"]), (&serde_json::Value::Null, &"Failing".into()));
    let it = world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.42:81").await;
    assert_eq!(it["inForce"]["state"], "Verified");
    // A change that the node has not acknowledged.
    world.put(|changes| changes.upsert(endpoints("late")), vec![]).await;
    assert_eq!(
        world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.42:443").await["inForce"]["state"],
        "Verified"
    );
    world.put(|changes| changes.upsert(EndpointSet { endpoints: vec![], ..carts() }), vec![]).await;
    let behind = world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.42:443").await;
    assert_eq!((&behind["inForce"]["state"], &behind["verdict"]), (&"Behind".into(), &"Refused".into()));
    let away = world.json("--node absent --from 10.1.0.9 tcp 10.96.0.1:80").await;
    assert_eq!(away["inForce"]["state"], "NeverSeen");
    assert!(!away["notes"].to_string().contains("sequence number"), "nothing is said to be in force: {away}");
    assert_eq!(away["settings"]["known"], false);
    assert!(
        away["notes"][0].as_str().unwrap().starts_with("node absent does not say how it is configured"),
        "{away}"
    );
}

#[tokio::test]
async fn a_node_port_behind_an_address_that_does_not_take_the_client_is_named() {
    // At the node's own address, with the number of the node port of `web`.
    let mut cart = shop();
    cart.external_ips = vec!["10.200.0.11".parse().unwrap()];
    cart.ports[0].port = 30_080.try_into().unwrap();
    let mut elsewhere = carts();
    elsewhere.endpoints.retain(|endpoint| endpoint.node_name.as_deref() != Some("n1"));
    let (world, _node) = World::explained(cart, vec![elsewhere], vec![]).await;
    let question = "--node n1 --from 203.0.113.9 tcp 10.200.0.11:30080";
    let it = world.json(question).await;
    assert_eq!((&it["service"]["name"], &it["verdict"]), (&"cart".into(), &"Dropped".into()));
    let note = "in iptables mode node port 30080 of default/web decides instead: the rules for \
                10.200.0.11:30080 do not take this client";
    assert_eq!(it["notes"][0], note);
    let pod = world.json("--node n1 --from 10.1.0.9 tcp 10.200.0.11:30080").await;
    assert_eq!(pod["verdict"], "Forwarded");
    assert!(!pod["notes"].to_string().contains("decides instead"), "{pod}");

    world.put(|changes| changes.upsert(EndpointSet { endpoints: vec![], ..carts() }), vec![]).await;
    let it = world.json(question).await;
    let note = "node port 30080 of default/web decides instead: without endpoints, the rules have nothing for \
                10.200.0.11:30080 itself";
    assert_eq!((&it["verdict"], &it["notes"][0]), (&"Refused".into(), &note.into()));
}

#[tokio::test]
async fn node_ports_at_loopback_addresses_are_for_the_node_itself() {
    let (world, _node) = World::explained(shop(), vec![carts()], vec![]).await;
    let everywhere = v1::NodeSettings {
        node_port_addresses: v1::NodePortAddresses::AllLocal.into(),
        loopback_node_ports: true,
        ..settings()
    };
    let _node2 = world.node_with("n2", vec![], Some(everywhere)).await;
    for from in ["127.0.0.1", "127.0.0.2"] {
        let it = world.json(&format!("--node n2 --from {from} tcp 127.0.0.1:30443")).await;
        assert_eq!((&it["verdict"], &it["source"]["class"]), (&"Forwarded".into(), &"Node".into()), "{from}");
    }
    let it = world.json("--node n2 --from 203.0.113.9 tcp 127.0.0.1:30443").await;
    let near = "shop/cart has node port 30443, which answers at 127.0.0.1 on n2 to the node itself alone";
    assert_eq!((&it["verdict"], &it["nearby"][0]), (&"LeftAlone".into(), &near.into()));
}

#[tokio::test]
async fn what_a_node_says_cannot_drive_a_terminal() {
    let (world, _node) = World::explained(shop(), vec![carts()], vec![]).await;
    let by_interface = v1::NodeSettings {
        detect_local_mode: v1::DetectLocalMode::BridgeInterface.into(),
        pod_interface: "\x1b[2J\nfine".into(),
        ..settings()
    };
    let _stream = world.node_with("n8", vec![], Some(by_interface)).await;
    let (_, result) = world.result("explain --node n8 --from 10.1.0.9 tcp 10.96.0.42:443").await;
    let said = super::super::message(&result.unwrap_err());
    let quoted = r#""\u{1b}[2J\nfine""#;
    assert_eq!(
        said,
        format!("node n8: settings.pod_interface: {quoted} cannot be explained by this release")
    );
    // What is no network does not come through the server.
    let by_pods = v1::NodeSettings { cluster_cidrs: vec!["10.0.0.0/8\x1b[2J".into()], ..settings() };
    let _stream = world.node_with("n9", vec![], Some(by_pods)).await;
    let it = world.json("--node n9 --from 10.1.0.9 tcp 10.96.0.42:443").await;
    assert_eq!(
        (&it["settings"]["known"], &it["settings"]["podNetworks"]),
        (&false.into(), &serde_json::json!([]))
    );
}

#[tokio::test]
async fn a_failure_without_a_name_leaves_a_doubt() {
    let nameless = v1::ResourceFailure { r#ref: None, ..failure() };
    let (world, _node) = World::explained(shop(), vec![carts()], vec![nameless]).await;
    let it = world.json("--node n1 --from 10.1.0.9 tcp 10.96.0.42:443").await;
    assert_eq!(it["inForce"]["state"], "PossiblyFailing");
}

#[tokio::test]
async fn a_packet_for_nobody_is_left_alone_and_what_is_close_is_named() {
    let mut cart = shop();
    cart.load_balancer_ingress[0].proxy_mode = true;
    let (world, _node) = World::explained(cart, vec![carts()], vec![]).await;
    // An iptables node, which leaves them alone.
    for to in ["tcp 10.96.0.42:444", "udp 10.96.0.42:443"] {
        let it = world.json(&format!("--node n1 --from 10.1.0.9 {to}")).await;
        assert_eq!((&it["verdict"], &it["service"]), (&"LeftAlone".into(), &serde_json::Value::Null), "{to}");
        let reason = it["reason"].as_str().unwrap();
        assert!(reason.ends_with("10.96.0.42 is a cluster IP, which this mode leaves alone"), "{reason}");
        assert_eq!(it["nearby"][0], "shop/cart has 10.96.0.42, but only port 443/TCP");
    }
    for (to, near) in [
        (
            "tcp 198.51.100.42:443",
            "shop/cart has 198.51.100.42 with ipMode Proxy: nodes leave that to the load balancer",
        ),
        (
            "tcp 10.200.0.12:30443",
            "shop/cart has node port 30443, which answers on n1 at the primary addresses: 10.200.0.11",
        ),
        ("tcp 127.0.0.1:30443", "shop/cart has node port 30443, which does not answer at 127.0.0.1 on n1"),
    ] {
        let it = world.json(&format!("--node n1 --from 10.1.0.9 {to}")).await;
        assert_eq!((&it["verdict"], &it["nearby"][0]), (&"LeftAlone".into(), &near.into()), "{to}");
        assert_eq!(it["inForce"]["state"], "Verified");
    }
    let nobody = world.json("--node n1 --from 10.1.0.9 tcp 10.96.9.9:1").await;
    assert_eq!(nobody["reason"], "no Service has 10.96.9.9:1/TCP on this node");
    assert!(nobody["nearby"].as_array().unwrap().is_empty() && nobody["service"].is_null());
}

#[tokio::test]
async fn what_is_at_another_nodes_address_is_left_to_that_node_in_ipvs_mode() {
    let (world, _node) = World::explained(shop(), vec![carts()], vec![]).await;
    let at = "10.200.0.12".parse().unwrap();
    let other = NodeContext { uid: Some("u2".into()), addresses: vec![at], ..NodeContext::unknown("n2") };
    let cart = Service { external_ips: vec![at], ..shop() };
    world.put(|changes| changes.upsert(cart), vec![other]).await;
    let _others = [
        world.node_in(v1::BackendKind::Ipvs, "n2", vec![], Some(settings())).await,
        world.node_in(v1::BackendKind::Ipvs, "n3", vec![], Some(settings())).await,
    ];
    let question = |node: &str| format!("--node {node} --from 10.1.0.9 tcp 10.200.0.12:443");
    for node in ["n1", "n2"] {
        assert_eq!(world.json(&question(node)).await["verdict"], "Forwarded", "{node}");
    }
    let it = world.json(&question("n3")).await;
    let near =
        "shop/cart has 10.200.0.12, which is another node's address: n3 leaves it to that node in this mode";
    assert_eq!((&it["verdict"], &it["nearby"][0]), (&"LeftAlone".into(), &near.into()));
}

#[tokio::test]
async fn a_question_without_an_answer_has_an_exit_code() {
    let (world, _node) = World::explained(shop(), vec![carts()], vec![]).await;
    for (line, expected) in [
        ("--node gone --from 10.1.0.9 tcp 10.96.0.42:443", 3),
        ("--node n1 --from fd00::1 tcp 10.96.0.42:443", 2),
        ("--node n1 --from 10.1.0.9 tcp 10.96.0.42:0", 2),
    ] {
        let (text, code) = world.run(&format!("explain {line}")).await;
        assert_eq!((code, text.as_str()), (expected, ""), "{line}");
    }
    // Settings of a later release: no explanation by other ones.
    let strange = v1::NodeSettings { detect_local_mode: 99, ..settings() };
    let _stranger = world.node_with("n9", vec![], Some(strange)).await;
    let (text, code) = world.run("explain --node n9 --from 10.1.0.9 tcp 10.96.0.42:443").await;
    assert_eq!((code, text.as_str()), (1, ""));
}
