//! The backend on the real kernel, each test in a network namespace of its own. Needs root.

#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::io::Write as _;
use std::time::Duration;

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::netns;
use lockstep_model::Protocol;
use lockstep_view::{Backend, ForwardingPlan};
use support::*;

fn in_namespace(test: impl FnOnce() + Send) {
    netns::run_in_new(test).expect("these tests need root");
}

fn synced(plan: &ForwardingPlan) -> Nftables {
    let mut backend = Nftables::open().unwrap();
    let applied = backend.sync(plan).unwrap();
    assert_eq!(applied.failures, []);
    assert_eq!(backend.verify().unwrap(), []);
    backend
}

/// Walks a whole audit.
fn audit(backend: &mut Nftables) -> Vec<String> {
    let mut found = Vec::new();
    loop {
        let step = backend.audit(Duration::from_millis(1)).unwrap();
        found.extend(step.drift.iter().map(ToString::to_string));
        if step.completed {
            return found;
        }
    }
}

#[test]
fn every_shape_is_written_and_read_back() {
    in_namespace(|| {
        let mut backend = synced(&every_shape());
        assert_eq!(audit(&mut backend), Vec::<String>::new());
    });
}

/// What makes *verified* an honest word.
#[test]
fn the_read_back_tells_of_every_change_made_after_the_write() {
    let changes = [
        "delete element ip lockstep frontends { 10.96.0.1 . tcp . 80 }",
        "add element ip lockstep node_endpoints { tcp . 31999 . 0 : 10.244.0.9 . 1 }",
        "flush chain ip lockstep services",
        "flush chain ip6 lockstep no-endpoints",
        "delete table ip6 lockstep",
    ];
    for change in changes {
        in_namespace(|| {
            let mut backend = synced(&every_shape());
            run("nft", &[change]);
            assert_ne!(backend.verify().unwrap(), [], "{change}");
        });
    }
}

/// As many elements as before, and some of them not what they were.
#[test]
fn errors_that_cancel_in_count_are_told_by_read_back_and_audit() {
    let damage = [
        (
            "delete element ip lockstep endpoints { 10.96.0.1 . tcp . 80 . 0 }; add element ip lockstep endpoints { 10.96.0.77 . tcp . 80 . 0 : 10.244.1.2 . 8080 }",
            "map ip lockstep endpoints: 1 element missing, 1 element not ours",
        ),
        (
            "delete element ip lockstep endpoints { 10.96.0.1 . tcp . 80 . 0 }; add element ip lockstep endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.244.1.2 . 8081 }",
            "map ip lockstep endpoints: 1 element different",
        ),
        (
            // The same keys and the same data, only not together.
            "delete element ip lockstep endpoints { 10.96.0.1 . tcp . 80 . 0, 10.96.0.1 . tcp . 80 . 1 }; add element ip lockstep endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.244.2.2 . 8080, 10.96.0.1 . tcp . 80 . 1 : 10.244.1.2 . 8080 }",
            "map ip lockstep endpoints: 2 elements different",
        ),
        (
            "delete element ip lockstep frontends { 10.96.0.1 . tcp . 80 }; add element ip lockstep frontends { 10.96.0.1 . tcp . 80 : drop }",
            "map ip lockstep frontends: 1 element different",
        ),
        (
            "delete element ip lockstep serials { 10.96.0.5 . tcp . 80 . 0 }; add element ip lockstep serials { 10.96.0.5 . tcp . 80 . 0 : f000:2 }",
            "map ip lockstep serials: 1 element different",
        ),
        (
            "delete element ip lockstep allowed { 192.0.2.7 . tcp . 80 . 10.0.0.0/8 }; add element ip lockstep allowed { 192.0.2.7 . tcp . 80 . 10.0.0.0/7 }",
            "set ip lockstep allowed: 1 element different",
        ),
        (
            "delete element ip6 lockstep cluster_ips { fd00:96::1 }; add element ip6 lockstep cluster_ips { fd00:96::2 }",
            "set ip6 lockstep cluster_ips: 1 element missing, 1 element not ours",
        ),
        (
            "delete element ip lockstep service_cidrs { 10.96.0.0/12 }; add element ip lockstep service_cidrs { 10.96.0.0/13 }",
            "set ip lockstep service_cidrs: 1 element different",
        ),
    ];
    in_namespace(|| {
        let plan = every_shape();
        for (command, expected) in damage {
            let mut backend = Nftables::open().unwrap();
            run("nft", &["flush ruleset"]);
            backend.sync(&plan).unwrap();
            run("nft", &[command]);
            let found: Vec<String> = backend.verify().unwrap().iter().map(ToString::to_string).collect();
            assert_eq!(found, [expected], "{command}");
            assert_eq!(audit(&mut backend), [expected], "{command}");
            assert!(backend.sync(&plan).unwrap().objects_changed > 0, "{command}");
            assert_eq!(audit(&mut backend), Vec::<String>::new(), "{command}");
        }
    });
}

#[test]
fn the_read_back_of_one_change_tells_when_it_is_not_in_force() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut backend = synced(&plan);
        plan.services.remove(&key("plain"));
        backend.apply(&plan, &[key("plain")]).unwrap();
        run("nft", &["add element ip lockstep frontends { 10.96.0.1 . tcp . 80 : drop }"]);
        assert_ne!(backend.verify().unwrap(), [], "an element that was deleted is there again");
    });
}

#[test]
fn the_probe_leaves_nothing_behind() {
    in_namespace(|| {
        Nftables::open().unwrap().probe().unwrap();
        assert_eq!(run("nft", &["list", "ruleset"]), "");
    });
}

#[test]
fn nft_lists_the_tables_and_loads_its_own_listing_and_our_text() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut backend = synced(&plan);
        assert!(run("nft", &["list", "ruleset"]).contains("update @affinity { ip6 saddr . ip6 daddr"));
        // nft 1.0.6 lists a rule that updates a map with long keys, and aborts when it is to
        // load one, whoever wrote it; so without IPv6 here.
        let mut sticky = (*plan.services[&key("sticky")]).clone();
        sticky.ports.retain(|port| port.family == lockstep_model::Family::V4);
        plan.services.insert(key("sticky"), std::sync::Arc::new(sticky));
        backend.apply(&plan, &[key("sticky")]).unwrap();
        let listing = run("nft", &["list", "ruleset"]);
        assert!(listing.contains("update @affinity { ip saddr . ip daddr"));
        for text in [&listing, &backend.render()] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            write!(file, "table ip lockstep\ndelete table ip lockstep\ntable ip6 lockstep\ndelete table ip6 lockstep\n{text}").unwrap();
            run("nft", &["-f", file.path().to_str().unwrap()]);
            // What nft made of the text forwards the same packets; it may be declared a
            // little differently, but every element and chain is there.
            let again = run("nft", &["list", "ruleset"]);
            assert_eq!(sorted_lines(&again), sorted_lines(&listing));
        }
    });
}

fn sorted_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .replace(',', "\n")
        .lines()
        .map(|line| line.trim().trim_start_matches("elements = {").trim_end_matches('}').trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    lines.sort();
    lines
}

#[test]
fn a_restarted_process_adopts_what_is_there() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut first = synced(&plan);
        // Give the kernel indices that are not the plan's order.
        let changed = service(
            "plain",
            vec![port_plan(
                Protocol::Tcp,
                80,
                vec![target("10.244.0.9", 1), target("10.244.2.2", 8080)],
                vec![cluster_ip("10.96.0.1", 80)],
            )],
        );
        plan.services.insert(changed.key.clone(), changed);
        first.apply(&plan, &[key("plain")]).unwrap();
        assert_eq!(first.verify().unwrap(), []);
        let before = first.render();
        drop(first);

        let mut second = Nftables::open().unwrap();
        assert_eq!(second.sync(&plan).unwrap().objects_changed, 0);
        assert_eq!(second.render(), before, "the same indices");

        // A change made while nobody ran: only that difference.
        let moved = service(
            "plain",
            vec![port_plan(
                Protocol::Tcp,
                80,
                vec![target("10.244.0.10", 1), target("10.244.2.2", 8080)],
                vec![cluster_ip("10.96.0.1", 80)],
            )],
        );
        plan.services.insert(moved.key.clone(), moved);
        let mut third = Nftables::open().unwrap();
        assert_eq!(third.sync(&plan).unwrap().objects_changed, 2, "one element out, one in");
        assert_eq!(third.verify().unwrap(), []);
    });
}

/// Lets the map of clients say that 10.9.9.9 has the first serial number at 10.96.0.5.
fn remember_a_client() {
    run("nft", &["add element ip lockstep affinity { 10.9.9.9 . 10.96.0.5 . tcp . 80 timeout 3h : f000:1 }"]);
}

fn clients() -> String {
    run("nft", &["list", "map", "ip", "lockstep", "affinity"])
}

#[test]
fn what_packets_taught_is_no_drift_and_outlives_the_process() {
    in_namespace(|| {
        let plan = every_shape();
        let mut first = synced(&plan);
        remember_a_client();
        assert_eq!(first.verify().unwrap(), []);
        assert_eq!(audit(&mut first), Vec::<String>::new());
        let rendered = first.render();
        drop(first);
        let mut second = Nftables::open().unwrap();
        assert_eq!(second.sync(&plan).unwrap().objects_changed, 0);
        assert_eq!(second.render(), rendered, "the same serial numbers");
        assert!(clients().contains("10.9.9.9"));
        // What was taught with another declaration of the map is another matter.
        run("nft", &["delete table ip lockstep"]);
        assert!(second.sync(&plan).unwrap().objects_changed > 0);
        assert_eq!(audit(&mut second), Vec::<String>::new());
    });
}

#[test]
fn a_serial_number_that_a_client_still_has_is_not_given_to_anybody_else() {
    in_namespace(|| {
        let mut plan = every_shape();
        drop(synced(&plan));
        run(
            "nft",
            &["add element ip lockstep affinity { 10.9.9.9 . 10.96.0.5 . tcp . 80 timeout 3h : f000:77 }"],
        );
        let mut sticky = (*plan.services[&key("sticky")]).clone();
        sticky.ports[0].cluster.push(target("10.244.9.2", 8080));
        plan.services.insert(key("sticky"), std::sync::Arc::new(sticky));
        let mut second = Nftables::open().unwrap();
        second.sync(&plan).unwrap();
        assert_eq!(second.verify().unwrap(), []);
        assert!(second.render().contains("10.96.0.5 . tcp . 80 . f000:78 : 10.244.9.2 . 8080"));
    });
}

#[test]
fn clients_keep_their_endpoints_when_the_tables_are_made_anew() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut backend = synced(&plan);
        remember_a_client();
        let serials = |backend: &Nftables| {
            let text = backend.render();
            text.lines().filter(|line| line.contains(". f000:")).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = serials(&backend);
        plan.node.masquerade_mark = 0x8000;
        assert!(backend.sync(&plan).unwrap().objects_changed > 0);
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(serials(&backend), before);
        let clients = clients();
        assert!(clients.contains("10.9.9.9 . 10.96.0.5 . tcp . 80 timeout 3h expires 2h59m"), "{clients}");
        assert!(clients.contains(": f000:1 "), "{clients}");
    });
}

/// Leaves a table as a release did that had neither the sets nor the chain.
const WITHOUT_CLUSTER_IPS_CHECK: &str = "flush chain ip lockstep filter-forward; flush chain ip lockstep filter-output; delete chain ip lockstep cluster-ips-check; delete set ip lockstep service_cidrs; delete set ip lockstep cluster_ips";

/// Which table it is: one that is made anew has another handle.
fn handle() -> String {
    let listing = run("nft", &["-a", "list", "table", "ip", "lockstep"]);
    listing.lines().next().unwrap().to_owned()
}

#[test]
fn an_upgrade_adds_what_the_release_before_lacked_and_clients_keep_their_endpoints() {
    for damage in [
        WITHOUT_CLUSTER_IPS_CHECK,
        "add rule ip lockstep services counter; flush chain ip lockstep svc.c3s10800; flush chain ip lockstep refuse",
        // A chain of ours that nothing leads to, and one to which nothing can lead before it is made.
        "add chain ip lockstep svc.c9; add rule ip lockstep svc.c9 counter; flush map ip lockstep frontends; flush map ip lockstep nodeports; flush chain ip lockstep svc.c3s10800.c3s10800m.c3s10800m; flush chain ip lockstep svc.c3s10800.c3s10800m.l1s10800; delete chain ip lockstep svc.c3s10800m",
    ] {
        in_namespace(|| {
            let plan = every_shape();
            let first = synced(&plan);
            let rendered = first.render();
            drop(first);
            remember_a_client();
            let table = handle();
            run("nft", &[damage]);
            let mut second = Nftables::open().unwrap();
            assert_eq!(second.sync(&plan).unwrap().failures, [], "{damage}");
            assert_eq!(second.verify().unwrap(), [], "{damage}");
            assert_eq!(audit(&mut second), Vec::<String>::new(), "{damage}");
            assert!(!second.disturbed().unwrap(), "{damage}: our own change");
            assert_eq!(second.render(), rendered, "{damage}: the same serial numbers");
            assert_eq!(handle(), table, "{damage}");
            assert!(clients().contains("10.9.9.9"), "{damage}");
            assert_eq!(Nftables::open().unwrap().sync(&plan).unwrap().objects_changed, 0, "{damage}");
        });
    }
}

/// Where a set is declared in another way, there is no other way than tables made anew.
#[test]
fn clients_keep_their_endpoints_when_a_fresh_process_makes_the_tables_anew() {
    in_namespace(|| {
        let plan = every_shape();
        let first = synced(&plan);
        let rendered = first.render();
        drop(first);
        remember_a_client();
        // A map of clients that nobody can read is no reason not to begin.
        let damage = "delete set ip lockstep node_ips; add set ip lockstep node_ips { type ipv4_addr . ipv4_addr; }; flush chain ip6 lockstep services; delete table ip6 lockstep; add table ip6 lockstep; add map ip6 lockstep affinity { type inet_service : mark; flags timeout; }; add element ip6 lockstep affinity { 80 timeout 3h : 1 }";
        run("nft", &[damage]);
        let table = handle();
        let mut second = Nftables::open().unwrap();
        assert_eq!(second.sync(&plan).unwrap().failures, []);
        assert_eq!(second.verify().unwrap(), []);
        assert_eq!(audit(&mut second), Vec::<String>::new());
        let of_v4 = |text: &str| text.split("table ip6").next().unwrap().to_owned();
        assert_eq!(of_v4(&second.render()), of_v4(&rendered), "the same serial numbers");
        assert_ne!(handle(), table);
        assert!(clients().contains("10.9.9.9"));
    });
}

#[test]
fn drift_is_found_and_repaired() {
    in_namespace(|| {
        let plan = every_shape();
        let mut backend = synced(&plan);
        assert!(!backend.disturbed().unwrap());
        let damage = [
            (
                "delete element ip lockstep frontends { 10.96.0.1 . tcp . 80 }",
                "map ip lockstep frontends: 1 element missing",
            ),
            (
                "add element ip lockstep hairpin { 10.9.9.9 . 10.9.9.9 }",
                "set ip lockstep hairpin: 1 element not ours",
            ),
            (
                // For every address and port that is none of ours.
                "add element ip lockstep frontends { * : drop }",
                "map ip lockstep frontends: 1 element not ours",
            ),
            ("add rule ip lockstep services counter", "chain ip lockstep services: differs"),
            (
                "delete element ip lockstep affine_endpoints { 10.96.0.5 . tcp . 80 . f000:2 }",
                "map ip lockstep affine_endpoints: 1 element missing",
            ),
            ("flush chain ip lockstep svc.c3s10800", "chain ip lockstep svc.c3s10800: differs"),
            ("flush chain ip lockstep refuse", "chain ip lockstep refuse: differs"),
            ("add chain ip6 lockstep odd", "chain ip6 lockstep odd: not ours"),
            ("add set ip6 lockstep odd { type ipv4_addr; }", "set ip6 lockstep odd: not ours"),
            ("flush map ip6 lockstep endpoints", "map ip6 lockstep endpoints: 6 elements missing"),
            (
                "delete element ip lockstep cluster_ips { 10.96.0.1 }",
                "set ip lockstep cluster_ips: 1 element missing",
            ),
            (
                "delete element ip lockstep service_cidrs { 10.96.0.0/12 }",
                "set ip lockstep service_cidrs: 1 element missing",
            ),
            (
                "add element ip6 lockstep service_cidrs { fd00:97::/112 }",
                "set ip6 lockstep service_cidrs: 1 element not ours",
            ),
            ("flush chain ip6 lockstep cluster-ips-check", "chain ip6 lockstep cluster-ips-check: differs"),
            (WITHOUT_CLUSTER_IPS_CHECK, "set ip lockstep service_cidrs: missing"),
            ("delete table ip lockstep", "set ip lockstep frontends: missing"),
            ("flush ruleset", "set ip6 lockstep allowed: missing"),
        ];
        for (command, expected) in damage {
            run("nft", &[command]);
            assert!(backend.disturbed().unwrap(), "{command}");
            let found = audit(&mut backend);
            assert!(found.iter().any(|drift| drift == expected), "{command}: {found:?}");
            assert!(backend.sync(&plan).unwrap().objects_changed > 0, "{command}");
            assert_eq!(backend.verify().unwrap(), [], "{command}");
            assert_eq!(audit(&mut backend), Vec::<String>::new(), "{command}");
            assert!(!backend.disturbed().unwrap(), "{command}: the repair is our own");
        }
    });
}

#[test]
fn an_apply_on_a_damaged_table_repairs_it() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut backend = synced(&plan);
        run("nft", &["flush", "map", "ip", "lockstep", "endpoints"]);
        plan.services.remove(&key("plain"));
        assert_eq!(backend.apply(&plan, &[key("plain")]).unwrap().failures, []);
        assert_eq!(audit(&mut backend), Vec::<String>::new());
    });
}

#[test]
fn what_is_not_ours_stays_as_it_is() {
    in_namespace(|| {
        run(
            "nft",
            &[
                "table ip theirs { map m { type ipv4_addr : verdict; }; chain c { type nat hook prerouting priority -100; ip daddr vmap @m; }; }",
            ],
        );
        run("nft", &["table inet lockstep { chain c { type filter hook input priority 0; counter; }; }"]);
        let theirs = || {
            run("nft", &["list", "table", "ip", "theirs"])
                + &run("nft", &["list", "table", "inet", "lockstep"])
        };
        let before = theirs();
        let mut plan = every_shape();
        let mut backend = synced(&plan);
        assert!(!backend.disturbed().unwrap());
        run("nft", &["add table ip another"]);
        assert!(!backend.disturbed().unwrap(), "not our table");
        run("nft", &["delete table ip another"]);
        plan.services.remove(&key("plain"));
        backend.apply(&plan, &[key("plain")]).unwrap();
        assert!(backend.cleanup().unwrap() > 50);
        assert_eq!(run("nft", &["list", "ruleset"]), before);
        assert_eq!(backend.cleanup().unwrap(), 0);
        // And it can begin again.
        assert!(backend.sync(&plan).unwrap().objects_changed > 0);
        assert_eq!(backend.verify().unwrap(), []);
    });
}

#[test]
fn a_changed_node_changes_the_rules() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut backend = synced(&plan);
        // 1 byte is a comparison that the kernel keeps in a number, 14 and 16 are others.
        for (name, prefix) in [("v", true), ("veth", true), ("fourteen-bytes", true), ("br0", false)] {
            pods_by_interface(&mut plan, name, prefix);
            assert!(backend.sync(&plan).unwrap().objects_changed > 0, "{name}");
            assert_eq!(audit(&mut backend), Vec::<String>::new(), "{name}");
            let star = if prefix { "*" } else { "" };
            let listed = run("nft", &["list", "table", "ip", "lockstep"]);
            assert!(listed.contains(&format!("iifname \"{name}{star}\"")), "{listed}");
        }
        plan.node.masquerade_mark = 0x8000;
        plan.node.pods = None;
        plan.node.node_ports_v4 =
            lockstep_view::NodePortScope::Addresses(vec![ip("192.0.2.200"), ip("192.0.2.201")]);
        assert!(backend.sync(&plan).unwrap().objects_changed > 0);
        assert_eq!(audit(&mut backend), Vec::<String>::new());
        // One more address is one element.
        plan.node.node_ports_v4 = lockstep_view::NodePortScope::Addresses(vec![
            ip("192.0.2.200"),
            ip("192.0.2.201"),
            ip("192.0.2.202"),
        ]);
        assert_eq!(backend.sync(&plan).unwrap().objects_changed, 1);
        assert_eq!(backend.verify().unwrap(), []);
    });
}

/// Every way in which ranges can lie to each other, on a kernel that refuses some.
#[test]
fn service_cidrs_change_into_each_other() {
    in_namespace(|| {
        let mut plan = every_shape();
        plan.node.service_cidrs.clear();
        let mut backend = synced(&plan);
        for cidrs in [
            &["10.96.0.0/12", "fd00:96::/112"][..],
            &["10.96.0.0/13", "fd00:96::/112"],
            &["10.96.0.0/16", "10.98.0.0/16", "10.111.255.0/24"],
            &["10.96.0.0/16", "10.97.0.0/16", "10.98.0.0/15"],
            &["0.0.0.0/2", "192.0.0.0/2", "::/1", "8000::/1"],
            &["128.0.0.0/1", "ff00::/8"],
            &["10.96.0.1/32", "10.96.0.3/32", "fd00:96::1/128"],
            &[],
        ] {
            plan.node.service_cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
            let applied = backend.apply(&plan, &[]).unwrap();
            assert!((1..=16).contains(&applied.objects_changed), "{cidrs:?}: {}", applied.objects_changed);
            assert_eq!(backend.verify().unwrap(), [], "{cidrs:?}");
            assert_eq!(audit(&mut backend), Vec::<String>::new(), "{cidrs:?}");
            assert_eq!(
                Nftables::open().unwrap().sync(&plan).unwrap().objects_changed,
                0,
                "{cidrs:?}: adopted"
            );
        }
        for (range, change) in [
            ("10.96.0.0/12", "delete element ip lockstep service_cidrs { 10.96.0.0/12 }"),
            ("10.96.0.0/13", "add element ip lockstep service_cidrs { 10.112.0.0/16 }"),
        ] {
            plan.node.service_cidrs = vec![range.parse().unwrap()];
            backend.apply(&plan, &[]).unwrap();
            assert_eq!(backend.verify().unwrap(), [], "{range}");
            run("nft", &[change]);
            assert_ne!(backend.verify().unwrap(), [], "{change}");
            assert!(backend.sync(&plan).unwrap().objects_changed > 0, "{change}");
        }
    });
}

/// A Service with a cluster IP, a node port and these pods, 0 to 9 of them.
fn churning(n: u16, random: &mut fastrand::Rng) -> std::sync::Arc<lockstep_view::ServicePlan> {
    let [high, low] = n.to_be_bytes();
    let pods: std::collections::BTreeSet<u8> = (0..random.u8(0..10)).map(|_| random.u8(1..30)).collect();
    let targets: Vec<_> =
        pods.iter().map(|pod| target(&format!("10.{}.{low}.{pod}", 224 + high), 80)).collect();
    let mut frontends = vec![
        cluster_ip(&format!("10.96.{high}.{low}"), 80),
        external(lockstep_view::Surface::NodePort, 30000 + n),
    ];
    if targets.is_empty() {
        for frontend in &mut frontends {
            let reject = lockstep_view::Action::Reject;
            (frontend.from_pod, frontend.from_node, frontend.from_elsewhere) = (reject, reject, reject);
        }
    }
    let mut port = port_plan(Protocol::Tcp, 80, targets, frontends);
    port.affinity_seconds = [None, None, Some(60), Some(10_800)][random.usize(0..4)];
    port.hairpin = port.cluster.iter().filter(|target| target.address == ip("10.224.0.1")).copied().collect();
    service(&format!("s{n}"), vec![port])
}

#[test]
fn two_thousand_services_that_churn_end_where_a_fresh_start_ends() {
    in_namespace(|| {
        let mut random = fastrand::Rng::with_seed(7);
        let mut plan = plan((0..2000).map(|n| churning(n, &mut random)));
        let mut backend = synced(&plan);
        for round in 0..60 {
            let count = [1, 1, 7, 60, 400][round % 5];
            let mut changed = Vec::new();
            for _ in 0..count {
                let n = random.u16(0..2000);
                let name = key(&format!("s{n}"));
                if random.u8(0..10) == 0 {
                    plan.services.remove(&name);
                } else {
                    plan.services.insert(name.clone(), churning(n, &mut random));
                }
                changed.push(name);
            }
            assert_eq!(backend.apply(&plan, &changed).unwrap().failures, []);
            assert_eq!(backend.verify().unwrap(), [], "round {round}");
            assert!(!backend.disturbed().unwrap(), "round {round}: our own changes");
        }
        assert_eq!(audit(&mut backend), Vec::<String>::new());
        // A fresh process finds nothing to write, so the kernel is what it would write.
        assert_eq!(Nftables::open().unwrap().sync(&plan).unwrap().objects_changed, 0);
        // Growth past the declared sizes, under traffic of changes.
        for n in 2000..5000 {
            let service = churning(n, &mut random);
            plan.services.insert(service.key.clone(), service);
        }
        let all: Vec<_> = plan.services.keys().cloned().collect();
        assert_eq!(backend.apply(&plan, &all).unwrap().failures, []);
        assert_eq!(backend.verify().unwrap(), []);
    });
}
