//! The backend on iptables in memory, and golden texts of what it writes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::backend::Backend;
use lockstep_view::{
    Action, ForwardingPlan, Frontend, HealthCheck, InterfaceName, NodePlan, NodePortScope, PodSources, Pool,
    PortPlan, ServicePlan, Surface, Target,
};
use lockstep_xtables::fake::Fake;
use lockstep_xtables::{Flavour, Snapshot};

use crate::Iptables;
use crate::diff::{Kept, KernelDiff, Wanted};
use crate::fixed::Terms;
use crate::guard;
use crate::input::Input;
use crate::render::ServiceRules;

mod localhost;

const CLUSTER: Action = Action::Forward { pool: Pool::Cluster, masquerade: false };
const CLUSTER_MASQUERADED: Action = Action::Forward { pool: Pool::Cluster, masquerade: true };
const LOCAL: Action = Action::Forward { pool: Pool::Local, masquerade: false };
const ALL_BUT_PODS: [Action; 3] = [CLUSTER, CLUSTER_MASQUERADED, CLUSTER_MASQUERADED];

fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(surface: Surface, number: u16, [from_pod, from_node, from_elsewhere]: [Action; 3]) -> Frontend {
    Frontend { surface, port: port(number), from_pod, from_node, from_elsewhere, allowed_sources: None }
}

fn target(address: &str) -> Target {
    Target { address: ip(address), port: port(8080) }
}

fn port_plan(family: Family, cluster: &[&str], local: &[&str], frontends: Vec<Frontend>) -> PortPlan {
    PortPlan {
        family,
        protocol: Protocol::Tcp,
        port: port(80),
        name: "http".into(),
        cluster: cluster.iter().map(|address| target(address)).collect(),
        local: local.iter().map(|address| target(address)).collect(),
        hairpin: Vec::new(),
        serving: Vec::new(),
        frontends,
        affinity_seconds: None,
    }
}

fn service(name: &str, ports: Vec<PortPlan>) -> ServicePlan {
    let (required_features, conflicts) = (Vec::new(), Vec::new());
    let key = ServiceKey::new("default", name);
    ServicePlan { key, ports, required_features, health_check: None, conflicts, cluster_ips: Vec::new() }
}

fn node() -> NodePlan {
    let cidrs = ["10.244.0.0/16", "fd00:244::/64"].map(|cidr| cidr.parse().unwrap());
    NodePlan {
        pods: Some(PodSources::Cidrs(cidrs.into())),
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::AllLocal,
        localhost_node_ports: false,
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        node_addresses: Vec::new(),
    }
}

fn plan(services: impl IntoIterator<Item = ServicePlan>) -> ForwardingPlan {
    let services = services.into_iter().map(|service| (service.key.clone(), Arc::new(service))).collect();
    ForwardingPlan { node: node(), services }
}

/// The input that makes this plan of nothing.
fn input(plan: &ForwardingPlan, flavour: Flavour, family: Family) -> String {
    let terms = Terms::new(family, &plan.node, true, false);
    let wanted: BTreeMap<ServiceKey, Wanted> = plan
        .services
        .iter()
        .map(|(key, service)| {
            let new = ServiceRules::render(service, &terms).unwrap();
            (key.clone(), Wanted { new, old: ServiceRules::default() })
        })
        .collect();
    let snapshot = Snapshot::default();
    let mut diff = KernelDiff::new(&snapshot, &terms, Kept::default());
    diff.choose_rewrites(&wanted);
    let mut changes = vec![diff.everybody()];
    changes.extend(wanted.iter().map(|(key, wanted)| diff.service(key, wanted)));
    Input::new(flavour, 0, &changes).text
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(format!("{name}.txt"));
    if std::env::var_os("LOCKSTEP_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let blessed = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, blessed, "{}: run with LOCKSTEP_BLESS=1 where the new text is right", path.display());
}

fn load_balancer(cluster: &[&str], local: &[&str], outside: [Action; 3]) -> Vec<PortPlan> {
    let frontends = vec![
        at(Surface::ClusterIp(ip("10.96.0.10")), 80, ALL_BUT_PODS),
        at(Surface::ExternalIp(ip("192.0.2.8")), 80, outside),
        at(Surface::LoadBalancerIp(ip("203.0.113.7")), 80, outside),
        at(Surface::NodePort, 30080, outside),
    ];
    vec![port_plan(Family::V4, cluster, local, frontends)]
}

#[test]
fn goldens_of_the_policies() {
    let (both, one) = (["10.244.0.5", "10.244.1.10", "10.244.1.9"], ["10.244.0.5"]);
    let short_circuit = |rest| [CLUSTER, CLUSTER_MASQUERADED, rest];
    for (name, ports) in [
        ("policy-cluster", load_balancer(&both, &[], [CLUSTER_MASQUERADED; 3])),
        ("policy-local", load_balancer(&both, &one, short_circuit(LOCAL))),
        ("policy-local-none-here", load_balancer(&both, &[], short_circuit(Action::Drop))),
        (
            "cluster-ip-local",
            vec![port_plan(
                Family::V4,
                &[],
                &one,
                vec![at(Surface::ClusterIp(ip("10.96.0.10")), 80, [LOCAL; 3])],
            )],
        ),
    ] {
        let mut service = service("nginx-basic", ports);
        service.health_check =
            (name == "policy-local").then_some(HealthCheck { port: port(32001), local_endpoints: 1 });
        golden(name, &input(&plan([service]), Flavour::Nft, Family::V4));
    }
    let mut refused = load_balancer(&[], &[], [Action::Reject; 3]);
    refused[0].frontends[0] = at(Surface::ClusterIp(ip("10.96.0.10")), 80, [Action::Reject; 3]);
    golden("no-endpoints", &input(&plan([service("nginx-basic", refused)]), Flavour::Nft, Family::V4));
}

#[test]
fn goldens_of_the_rest() {
    let mut affine = load_balancer(&["10.244.0.5", "10.244.1.9"], &[], [CLUSTER_MASQUERADED; 3]);
    affine[0].affinity_seconds = Some(10800);
    affine[0].protocol = Protocol::Udp;
    golden("affinity-udp", &input(&plan([service("dns", affine)]), Flavour::Nft, Family::V4));

    let mut guarded = load_balancer(&["10.244.0.5"], &[], [CLUSTER_MASQUERADED, Action::Reject, CLUSTER]);
    let ranges = ["198.51.100.0/24", "203.0.113.0/25"].map(|range| range.parse().unwrap());
    guarded[0].frontends[2].allowed_sources = Some(ranges.into());
    golden("source-ranges-mixed-actions", &input(&plan([service("web", guarded)]), Flavour::Nft, Family::V4));

    let v6 = vec![
        at(Surface::ClusterIp(ip("fd00:96::a")), 80, ALL_BUT_PODS),
        at(Surface::NodePort, 30080, [Action::Drop; 3]),
    ];
    let v6 = port_plan(Family::V6, &["fd00:244::5", "fd00:244::9"], &[], v6);
    golden("ipv6", &input(&plan([service("web", vec![v6])]), Flavour::Nft, Family::V6));

    let ports = load_balancer(&["10.244.0.5"], &[], [CLUSTER, Action::Drop, Action::Reject]);
    let mut odd = plan([service("odd", ports)]);
    let cidrs = ["10.244.0.0/16", "10.245.0.0/16"].map(|cidr| cidr.parse().unwrap());
    odd.node.pods = Some(PodSources::Cidrs(cidrs.into()));
    odd.node.node_ports_v4 =
        NodePortScope::Addresses(vec![ip("127.0.0.1"), ip("192.0.2.1"), ip("192.0.2.2")]);
    golden("two-pod-ranges-listed-node-ports", &input(&odd, Flavour::Nft, Family::V4));
}

#[test]
fn goldens_of_pods_told_by_interface_and_of_node_ports_at_localhost() {
    let bridge = |name: &str| InterfaceName::new(name).unwrap();
    let ports =
        || load_balancer(&["10.244.0.5", "10.244.1.9"], &[], [CLUSTER, CLUSTER_MASQUERADED, Action::Drop]);
    let refused = [CLUSTER, Action::Reject, Action::Drop];
    let mut odd = load_balancer(&["10.244.0.5"], &[], refused);
    odd[0].name = "odd".into();
    let mut by_bridge = plan([service("nginx-basic", [ports(), odd].concat())]);
    by_bridge.node.pods = Some(PodSources::Interface(bridge("br0")));
    golden("pods-by-bridge", &input(&by_bridge, Flavour::Nft, Family::V4));
    let mut by_prefix = plan([service("nginx-basic", ports())]);
    by_prefix.node.pods = Some(PodSources::InterfacePrefix(bridge("veth")));
    by_prefix.node.localhost_node_ports = true;
    golden("pods-by-prefix-localhost", &input(&by_prefix, Flavour::Legacy, Family::V4));
    let mut listed = plan([service("nginx-basic", vec![])]);
    listed.node.localhost_node_ports = true;
    listed.node.node_ports_v4 = NodePortScope::Addresses(vec![ip("127.0.0.1"), ip("192.0.2.1")]);
    let text = input(&listed, Flavour::Legacy, Family::V4);
    assert!(
        text.contains("-A KUBE-SERVICES -d 127.0.0.1/32 ")
            && text.contains("-A KUBE-SERVICES -d 192.0.2.1/32 ")
    );
    assert!(!input(&listed, Flavour::Legacy, Family::V6).contains(guard::CHAIN), "IPv4 alone");
}

fn backend(fake: &Arc<Fake>) -> Iptables {
    let backend = Iptables::open(Arc::clone(fake) as Arc<dyn Run>, Flavour::Nft).unwrap();
    fake.restores();
    backend
}

/// A Service that depends on the dice.
fn random_service(dice: &mut fastrand::Rng, index: u8) -> ServicePlan {
    let actions =
        [CLUSTER, CLUSTER_MASQUERADED, LOCAL, Action::Reject, Action::Drop, ALL_BUT_PODS[0], ALL_BUT_PODS[1]];
    let ports = Family::ALL
        .into_iter()
        .map(|family| {
            let address = |kind: u8, last: u8| match family {
                Family::V4 => ip(&format!("10.{kind}.{index}.{last}")),
                Family::V6 => ip(&format!("fd00:{kind}::{index}:{last}")),
            };
            let mut pick = || [(); 3].map(|()| actions[dice.usize(..actions.len())]);
            let frontends = vec![
                at(Surface::ClusterIp(address(96, 1)), 80, pick()),
                at(Surface::ExternalIp(address(97, 1)), 80, pick()),
                at(Surface::LoadBalancerIp(address(98, 1)), 80, pick()),
                at(Surface::NodePort, 30000 + u16::from(index), pick()),
            ];
            let mut plan = port_plan(family, &[], &[], frontends);
            plan.cluster = (1..=dice.u8(1..6))
                .map(|last| Target { address: address(244, last), port: port(8080) })
                .collect();
            plan.local = plan.cluster[..1].to_vec();
            plan.affinity_seconds = dice.bool().then_some(60);
            plan
        })
        .collect();
    service(&format!("s{index}"), ports)
}

#[test]
fn any_history_ends_in_the_same_rules() {
    for seed in 0..30 {
        let mut dice = fastrand::Rng::with_seed(seed);
        let fake = Arc::new(Fake::default());
        let mut walker = backend(&fake);
        let mut plan = plan((0..6).map(|index| random_service(&mut dice, index)));
        walker.sync(&plan).unwrap();
        fake.restores();
        for _ in 0..10 {
            let changed: Vec<ServiceKey> = (0..dice.u8(1..4))
                .map(|_| {
                    let index = dice.u8(0..8);
                    let service = random_service(&mut dice, index);
                    let key = service.key.clone();
                    match dice.u8(..3) {
                        0 => drop(plan.services.remove(&key)),
                        _ => drop(plan.services.insert(key.clone(), Arc::new(service))),
                    }
                    key
                })
                .collect();
            assert_eq!(walker.apply(&plan, &changed).unwrap().failures, [], "seed {seed}");
            assert!(fake.restores() <= 2, "seed {seed}: one restore per family");
            assert_eq!(walker.verify().unwrap(), [], "seed {seed}");
        }
        let mut next = backend(&fake);
        assert_eq!(next.sync(&plan).unwrap().objects_changed, 0, "seed {seed}");
        let fresh = Arc::new(Fake::default());
        backend(&fresh).sync(&plan).unwrap();
        assert_eq!(fake.rules(), fresh.rules(), "seed {seed}");
    }
}

fn simple(index: u8) -> ServicePlan {
    let frontends = vec![at(Surface::ClusterIp(ip(&format!("10.96.0.{index}"))), 80, ALL_BUT_PODS)];
    let end = format!("10.244.0.{index}");
    service(&format!("s{index}"), vec![port_plan(Family::V4, &[&end], &[], frontends)])
}

#[test]
fn a_refusal_that_names_no_line_is_narrowed_down() {
    let fake = Arc::new(Fake::default());
    let mut backend = backend(&fake);
    fake.refuse(Some("default/s5:http"));
    let mut plan = plan((1..=16).map(simple));
    let applied = backend.sync(&plan).unwrap();
    assert_eq!(applied.failures.len(), 1, "{:?}", applied.failures);
    assert_eq!(applied.failures[0].service, ServiceKey::new("default", "s5"));
    assert!(!applied.failures[0].previous_in_force);
    assert_eq!(backend.verify().unwrap(), []);
    assert!(
        (1..=16)
            .filter(|index| *index != 5)
            .all(|index| fake.rules().contains(&format!("10.96.0.{index}/32")))
    );

    fake.refuse(None);
    let key = ServiceKey::new("default", "s5");
    assert_eq!(backend.apply(&plan, std::slice::from_ref(&key)).unwrap().failures, []);
    let whole = fake.rules();
    fake.refuse(Some("10.244.0.99"));
    let mut worse = simple(5);
    worse.ports[0].cluster = vec![target("10.244.0.99")];
    plan.services.insert(key.clone(), Arc::new(worse));
    let applied = backend.apply(&plan, &[key]).unwrap();
    assert!(applied.failures[0].previous_in_force);
    assert_eq!(fake.rules(), whole, "the version before is in force");
}

#[test]
fn service_cidrs_are_nothing_to_write_and_nothing_to_read() {
    for flavour in [Flavour::Nft, Flavour::Legacy] {
        let fake = Arc::new(Fake::default());
        let mut backend = Iptables::open(Arc::clone(&fake) as Arc<dyn Run>, flavour).unwrap();
        let mut plan = plan([simple(1)]);
        backend.sync(&plan).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        assert!(fake.runs() > 0);
        plan.node.service_cidrs = vec!["10.96.0.0/12".parse().unwrap()];
        assert_eq!(backend.apply(&plan, &[]).unwrap().objects_changed, 0);
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(fake.runs(), 0, "{flavour}");
        let key = ServiceKey::new("default", "s1");
        let mut other = simple(1);
        other.ports[0].cluster = vec![target("10.244.0.9")];
        plan.services.insert(key.clone(), Arc::new(other));
        backend.apply(&plan, &[key]).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        assert!(fake.runs() >= 2, "{flavour}: one to write, one to read");
    }
}

#[test]
fn a_held_lock_changes_nothing_and_loses_nothing() {
    let fake = Arc::new(Fake::default());
    fake.take_v6_away();
    let mut backend = backend(&fake);
    assert_eq!(backend.describe().families, [Family::V4]);
    let mut plan = plan([simple(1)]);
    backend.sync(&plan).unwrap();
    let before = fake.rules();
    plan.services.insert(ServiceKey::new("default", "s2"), Arc::new(simple(2)));
    fake.lock_once();
    assert!(backend.apply(&plan, &[ServiceKey::new("default", "s2")]).is_err());
    assert_eq!(fake.rules(), before);
    plan.services.insert(ServiceKey::new("default", "s3"), Arc::new(simple(3)));
    backend.apply(&plan, &[ServiceKey::new("default", "s3")]).unwrap();
    assert!(fake.rules().contains("10.96.0.2/32"), "what is owed is written with the next change");
    assert_eq!(backend.verify().unwrap(), []);
}

#[test]
fn what_one_family_owes_is_said_until_it_is_written() {
    let fake = Arc::new(Fake::default());
    let mut backend = backend(&fake);
    let mut dice = fastrand::Rng::with_seed(1);
    let mut change = |plan: &mut ForwardingPlan, index| {
        let service = random_service(&mut dice, index);
        let key = service.key.clone();
        plan.services.insert(key.clone(), Arc::new(service));
        [key]
    };
    let mut plan = plan([]);
    backend.sync(&plan).unwrap();
    fake.lock_v6(true);
    let services = |applied: lockstep_view::backend::Applied| -> Vec<String> {
        applied.failures.iter().map(|failure| failure.service.name.to_string()).collect()
    };
    for (index, owed) in [(1, vec!["s1"]), (2, vec!["s1", "s2"])] {
        let changed = change(&mut plan, index);
        assert_eq!(services(backend.apply(&plan, &changed).unwrap()), owed);
    }
    // The other family has nothing to write, and is as it should be.
    let none: [ServiceKey; 0] = [];
    assert_eq!(services(backend.apply(&plan, &none).unwrap()), ["s1", "s2"]);
    assert!(backend.is_whole());
    // A comparison with everything that failed leaves nothing of the family known.
    for _ in 0..2 {
        assert_eq!(services(backend.sync(&plan).unwrap()), ["s1", "s2"]);
        assert_eq!(backend.verify().unwrap(), []);
        assert!(!backend.is_whole());
    }
    change(&mut plan, 3);
    assert_eq!(services(backend.sync(&plan).unwrap()), ["s1", "s2", "s3"]);
    let changed = change(&mut plan, 4);
    assert_eq!(services(backend.apply(&plan, &changed).unwrap()), ["s1", "s2", "s3", "s4"]);
    fake.lock_v6(false);
    let changed = change(&mut plan, 4);
    assert_eq!(services(backend.apply(&plan, &changed).unwrap()), Vec::<String>::new());
    assert_eq!(backend.verify().unwrap(), []);
    assert!(backend.is_whole());
    // Who starts while the lock is held does not do without the family from then on.
    fake.lock_v6(true);
    let run = Arc::clone(&fake) as Arc<dyn Run>;
    assert!(matches!(Iptables::open(run, Flavour::Nft), Err(lockstep_xtables::ToolError::Locked { .. })));
}

#[test]
fn what_an_earlier_process_left_of_a_refused_service_goes_with_it() {
    let fake = Arc::new(Fake::default());
    let mut plan = plan((1..=2).map(simple));
    backend(&fake).sync(&plan).unwrap();
    let key = ServiceKey::new("default", "s2");
    let mut worse = simple(2);
    worse.ports[0].cluster = vec![target("10.244.0.99")];
    plan.services.insert(key.clone(), Arc::new(worse));
    for deleted in [false, true] {
        fake.refuse(Some("10.244.0.99"));
        let mut next = backend(&fake);
        let failures = next.sync(&plan).unwrap().failures;
        assert!(failures.len() == 1 && failures[0].previous_in_force, "{failures:?}");
        fake.refuse(None);
        let mut plan = plan.clone();
        plan.services.remove(&key);
        if !deleted {
            let mut better = simple(3);
            better.key = key.clone();
            plan.services.insert(key.clone(), Arc::new(better));
        }
        assert_eq!(next.apply(&plan, std::slice::from_ref(&key)).unwrap().failures, []);
        let fresh = Arc::new(Fake::default());
        backend(&fresh).sync(&plan).unwrap();
        assert_eq!(fake.rules(), fresh.rules(), "deleted: {deleted}");
    }
}

#[test]
fn rules_of_an_earlier_process_are_in_force_however_often_it_is_tried() {
    let fake = Arc::new(Fake::default());
    let mut plan = plan([simple(1)]);
    backend(&fake).sync(&plan).unwrap();
    let whole = fake.rules();
    let mut odd = simple(1);
    odd.ports[0].cluster = vec![target("fd00::1")];
    let key = odd.key.clone();
    plan.services.insert(key.clone(), Arc::new(odd));
    let mut next = backend(&fake);
    assert!(next.sync(&plan).unwrap().failures[0].previous_in_force);
    assert!(next.apply(&plan, std::slice::from_ref(&key)).unwrap().failures[0].previous_in_force);
    assert_eq!(fake.rules(), whole);
    assert_eq!(next.verify().unwrap(), []);
    plan.services.remove(&key);
    assert_eq!(next.apply(&plan, &[key]).unwrap().failures, []);
    assert!(!fake.rules().contains("default/s1"));
}

#[test]
fn a_name_that_would_break_out_of_its_comment_is_left_out() {
    let fake = Arc::new(Fake::default());
    let mut backend = backend(&fake);
    let mut evil = simple(1);
    evil.key = ServiceKey::new("default", "x\" -j ACCEPT\nCOMMIT");
    let applied = backend.sync(&plan([evil, simple(2)])).unwrap();
    assert_eq!(applied.failures.len(), 1);
    assert!(!fake.rules().contains("ACCEPT\n") && fake.rules().contains("10.96.0.2/32"));
    assert_eq!(backend.verify().unwrap(), []);
}

/// Services of three chains each, with external addresses that need a fourth.
fn many(count: u32) -> ForwardingPlan {
    plan((0..count).map(|index| {
        let address = |first: u32| IpAddr::V4(((first << 24) + index).into());
        let frontends = vec![
            at(Surface::ClusterIp(address(172)), 80, ALL_BUT_PODS),
            at(Surface::ExternalIp(address(198)), 80, [CLUSTER_MASQUERADED; 3]),
        ];
        let mut ports = port_plan(Family::V4, &[], &[], frontends);
        ports.cluster = vec![Target { address: address(10), port: port(8080) }];
        service(&format!("s{index}"), vec![ports])
    }))
}

#[test]
fn the_nft_flavour_gets_small_sections_that_end_in_the_same_rules() {
    let (nft, legacy) = (Arc::new(Fake::default()), Arc::new(Fake::default()));
    let mut cut = backend(&nft);
    let mut whole = Iptables::open(Arc::clone(&legacy) as Arc<dyn Run>, Flavour::Legacy).unwrap();
    let plan = many(300);
    let text = input(&plan, Flavour::Nft, Family::V4);
    let sections: Vec<&str> = text.split_inclusive("COMMIT\n").collect();
    assert_eq!(sections.len(), 6, "filter, 902 chains in four, lines of shared chains");
    let chains = |section: &&str| section.lines().filter(|line| line.starts_with(':')).count();
    assert!(sections.iter().all(|section| chains(section) <= 250));
    assert!(sections[5].contains("-j KUBE-SERVICES") && !sections[4].contains("KUBE-SERVICES"));

    cut.sync(&plan).unwrap();
    whole.sync(&plan).unwrap();
    assert_eq!(nft.rules(), legacy.rules());
    let mut gone = plan;
    let keys: Vec<ServiceKey> = gone.services.keys().filter(|key| &*key.name != "s7").cloned().collect();
    keys.iter().for_each(|key| drop(gone.services.remove(key)));
    cut.apply(&gone, &keys).unwrap();
    whole.apply(&gone, &keys).unwrap();
    assert_eq!(nft.rules(), legacy.rules());
    assert_eq!(cut.verify().unwrap(), []);
    assert!(nft.rules().contains("NOTE: this must be the last rule"), "written again with its chain");
    assert_eq!(cut.sync(&gone).unwrap().objects_changed, 0);
    cut.cleanup().unwrap();
    assert!(!nft.rules().contains("KUBE-"));
}

#[test]
fn where_every_address_is_a_pods_no_rule_asks_for_it() {
    let mut all = plan([simple(1)]);
    all.node.pods =
        Some(PodSources::Cidrs(vec!["10.244.0.0/16".parse().unwrap(), "0.0.0.0/0".parse().unwrap()]));
    let text = input(&all, Flavour::Legacy, Family::V4);
    assert!(text.contains("default/s1:http") && !text.contains("-s 0.0.0.0/0"), "{text}");
    let marks = text.lines().filter(|line| line.ends_with("-j KUBE-MARK-MASQ"));
    assert_eq!(marks.count(), 1, "the hairpin's: pods are not masqueraded otherwise");
}
