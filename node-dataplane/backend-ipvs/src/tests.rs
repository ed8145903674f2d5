//! The backend on a kernel in memory.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_kernel::Errno;
use lockstep_kernel::dummy::fake::FakeDevice;
use lockstep_kernel::exec::Run;
use lockstep_kernel::ipset::fake::FakeSets;
use lockstep_kernel::ipset::{Entry, Kind};
use lockstep_kernel::ipvs::fake::FakeIpvs;
use lockstep_kernel::ipvs::{Connections, Key, VirtualServer};
use lockstep_model::{Family, Feature, Port, Protocol, ServiceKey};
use lockstep_view::backend::{Applied, Backend, FailureKind};
use lockstep_view::{
    Action, ForwardingPlan, Frontend, HealthCheck, NodePlan, NodePortScope, PodSources, Pool, PortPlan,
    ServicePlan, Surface, Target,
};
use lockstep_xtables::fake::Fake;
use lockstep_xtables::{FixedChains, Flavour, Table};

use crate::drain::Drains;
use crate::names::{Purpose, Set};
use crate::tables::Tables;
use crate::terms::Terms;
use crate::{Ipvs, Options, fixed};

mod faults;
mod leaving;
mod other_nodes;
mod random;

const CLUSTER: Action = Action::Forward { pool: Pool::Cluster, masquerade: false };
const HIDDEN: Action = Action::Forward { pool: Pool::Cluster, masquerade: true };
const LOCAL: Action = Action::Forward { pool: Pool::Local, masquerade: false };
const INTERNAL: [Action; 3] = [CLUSTER, HIDDEN, HIDDEN];
const EXTERNAL: [Action; 3] = [HIDDEN; 3];
const LOCAL_HIDDEN: Action = Action::Forward { pool: Pool::Local, masquerade: true };
const EXTERNAL_LOCAL: [Action; 3] = [LOCAL, LOCAL_HIDDEN, LOCAL];
const NONE_LOCAL: [Action; 3] = [CLUSTER, HIDDEN, Action::Drop];

/// Everything under the backend.
#[derive(Clone, Default)]
struct Kernel {
    servers: FakeIpvs,
    sets: FakeSets,
    device: FakeDevice,
    rules: Arc<Fake>,
}

impl Kernel {
    fn new() -> Self {
        let this = Self::default();
        let others = ["127.0.0.1", "192.0.2.10", "::1", "fe80::1", "fd00:2::10"];
        this.device.lock().others = others.map(ip).into();
        this
    }

    /// A process that starts anew on what is there.
    fn start(&self) -> Ipvs {
        self.start_with(Options::default())
    }

    fn tables(&self, drain: Duration) -> Tables {
        let (servers, sets, device) = (self.servers.clone(), self.sets.clone(), self.device.clone());
        Tables::new(Box::new(servers), Box::new(sets), Box::new(device), Drains::new(drain))
    }

    fn run(&self) -> Arc<dyn Run> {
        Arc::clone(&self.rules) as Arc<dyn Run>
    }

    fn start_with(&self, options: Options) -> Ipvs {
        let tables = self.tables(options.drain);
        let run = self.run();
        // Somebody who had the lock of the tools has gone.
        while run.run("iptables-nft-restore", &["--noflush"], b"", Duration::ZERO).unwrap().status == Some(4)
        {
        }
        Ipvs::open_on(tables, &run, Flavour::Nft, options).unwrap()
    }

    /// Endpoints of a virtual server with their weights.
    fn targets(&self, key: Key) -> Option<Vec<(String, u32)>> {
        let inside = self.servers.lock();
        let (_, reals) = inside.servers.get(&key)?;
        Some(reals.values().map(|real| (real.address.to_string(), real.weight)).collect())
    }

    fn weights(&self, key: Key) -> Vec<u32> {
        self.targets(key).unwrap().into_iter().map(|(_, weight)| weight).collect()
    }

    fn connected(&self, key: Key, address: &str, active: u32) {
        let connections = Connections { active, inactive: 0, persistent: 0 };
        self.servers.lock().connections.insert((key, ip(address), 8080), connections);
    }

    fn has(&self, purpose: Purpose, entry: Entry) -> bool {
        let set = Set { family: Family::V4, purpose }.name();
        self.sets.lock().sets[set].entries.contains(&entry)
    }

    fn is_bound(&self, address: &str) -> bool {
        self.device.lock().addresses.as_ref().unwrap().contains(&ip(address))
    }

    /// All of it, for comparing.
    fn contents(&self) -> String {
        let servers = self.servers.lock();
        let sets = self.sets.lock();
        let entries: BTreeMap<&String, _> =
            sets.sets.iter().map(|(name, set)| (name, &set.entries)).collect();
        let addresses = self.device.lock().addresses.clone();
        format!("{:#?}\n{entries:#?}\n{addresses:#?}\n{}", servers.servers, self.rules.rules())
    }
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(address: &str, number: u16) -> Key {
    Key { protocol: 6, address: ip(address), port: number }
}

fn at(surface: Surface, number: u16, [from_pod, from_node, from_elsewhere]: [Action; 3]) -> Frontend {
    Frontend { surface, port: port(number), from_pod, from_node, from_elsewhere, allowed_sources: None }
}

fn target(address: &str) -> Target {
    Target { address: ip(address), port: port(8080) }
}

fn port_plan(cluster: &[&str], local: &[&str], frontends: Vec<Frontend>) -> PortPlan {
    let family = cluster.first().map_or(Family::V4, |address| Family::of(ip(address)));
    PortPlan {
        family,
        protocol: Protocol::Tcp,
        port: port(80),
        name: "http".into(),
        cluster: cluster.iter().map(|address| target(address)).collect(),
        local: local.iter().map(|address| target(address)).collect(),
        hairpin: local.iter().map(|address| target(address)).collect(),
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

/// A Service of one port at a cluster IP.
fn simple(name: &str, address: &str, endpoints: &[&str]) -> ServicePlan {
    let verdicts = if endpoints.is_empty() { [Action::Reject; 3] } else { INTERNAL };
    let frontend = at(Surface::ClusterIp(ip(address)), 80, verdicts);
    service(name, vec![port_plan(endpoints, &[], vec![frontend])])
}

fn plan(services: impl IntoIterator<Item = ServicePlan>) -> ForwardingPlan {
    let services = services.into_iter().map(|service| (service.key.clone(), Arc::new(service))).collect();
    let cidrs = ["10.244.0.0/16", "fd00:244::/64"].map(|cidr| cidr.parse().unwrap());
    let node = NodePlan {
        pods: Some(PodSources::Cidrs(cidrs.into())),
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::AllLocal,
        localhost_node_ports: false,
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        node_addresses: Vec::new(),
    };
    ForwardingPlan { node, services }
}

fn apply(backend: &mut Ipvs, plan: &ForwardingPlan, changed: &[&str]) -> Applied {
    let changed: Vec<ServiceKey> = changed.iter().map(|name| ServiceKey::new("default", *name)).collect();
    let applied = backend.apply(plan, &changed).unwrap();
    assert_eq!(backend.verify().unwrap(), []);
    applied
}

fn sync(backend: &mut Ipvs, plan: &ForwardingPlan) -> Applied {
    let applied = backend.sync(plan).unwrap();
    assert_eq!(backend.verify().unwrap(), []);
    applied
}

const A: &str = "10.244.1.1";
const B: &str = "10.244.1.2";
const C: &str = "10.244.2.1";
const VIP: &str = "10.96.0.1";

#[test]
fn every_surface_has_its_virtual_servers_sets_and_addresses() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let mut ranged = at(Surface::LoadBalancerIp(ip("203.0.113.1")), 80, EXTERNAL_LOCAL);
    ranged.allowed_sources = Some(["0.0.0.0/0".parse().unwrap()].into());
    let mut web = service(
        "web",
        vec![port_plan(
            &[A, B, C],
            &[A],
            vec![
                at(Surface::ClusterIp(ip(VIP)), 80, INTERNAL),
                at(Surface::ExternalIp(ip("192.0.2.10")), 80, EXTERNAL_LOCAL),
                ranged,
                at(Surface::NodePort, 30080, EXTERNAL_LOCAL),
            ],
        )],
    );
    web.health_check = Some(HealthCheck { port: port(32000), local_endpoints: 1 });
    web.ports[0].affinity_seconds = Some(300);
    let none = service(
        "none",
        vec![port_plan(&[C], &[], vec![at(Surface::LoadBalancerIp(ip("203.0.113.2")), 80, NONE_LOCAL)])],
    );
    let closed = service(
        "closed",
        vec![port_plan(&[], &[], vec![at(Surface::ClusterIp(ip("10.96.0.2")), 80, [Action::Drop; 3])])],
    );
    let plan = plan([web, none, closed, simple("empty", "10.96.0.3", &[])]);
    sync(&mut backend, &plan);
    let names = |key| kernel.targets(key).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(key(VIP, 80)), [A, B, C]);
    assert_eq!(names(key("203.0.113.1", 80)), [A], "one pool, whoever asks");
    assert_eq!(names(key("192.0.2.10", 30080)), [A], "a node port is at the node's addresses");
    assert_eq!(kernel.targets(key("127.0.0.1", 30080)), None);
    assert_eq!(names(key("203.0.113.2", 80)), [C], "for pods and the node");
    assert_eq!(kernel.targets(key("10.96.0.2", 80)), None);
    assert_eq!(kernel.targets(key("10.96.0.3", 80)), Some(Vec::new()), "which refuses");
    let (server, _) = kernel.servers.lock().servers[&key(VIP, 80)].clone();
    assert_eq!((server.flags, server.timeout, server.netmask), (1, 300, u32::MAX));
    for address in [VIP, "203.0.113.1", "203.0.113.2", "10.96.0.2", "10.96.0.3"] {
        assert!(kernel.is_bound(address), "{address}");
    }
    assert!(!kernel.is_bound("192.0.2.10"), "another interface has it");
    let pair = |address| Entry::IpPort(ip(address), 6, 80);
    for (purpose, entry) in [
        (Purpose::ClusterIp, pair(VIP)),
        (Purpose::ExternalIpLocal, pair("192.0.2.10")),
        (Purpose::LoadBalancer, pair("203.0.113.1")),
        (Purpose::LoadBalancerLocal, pair("203.0.113.1")),
        (Purpose::Firewall, pair("203.0.113.1")),
        (Purpose::SourceIp, Entry::IpPortIp(ip("203.0.113.1"), 6, 80, ip("203.0.113.1"))),
        (Purpose::NodePortLocalTcp, Entry::Port(30080)),
        (Purpose::HealthCheck, Entry::Port(32000)),
        (Purpose::LoopBack, Entry::IpPortIp(ip(A), 6, 8080, ip(A))),
        (Purpose::DropExternal, pair("203.0.113.2")),
        (Purpose::Drop, pair("10.96.0.2")),
        (Purpose::Bound, Entry::Ip(ip(VIP))),
    ] {
        assert!(kernel.has(purpose, entry), "{purpose:?} {entry:?}");
    }
    // All sources: the kernel takes no network of length 0.
    let halves = ["0.0.0.0/1", "128.0.0.0/1"].map(|half| half.parse().unwrap());
    for half in halves {
        assert!(kernel.has(Purpose::SourceCidr, Entry::IpPortNet(ip("203.0.113.1"), 6, 80, half)));
    }
    let before = kernel.contents();
    assert_eq!(sync(&mut kernel.start(), &plan).objects_changed, 0, "adopted");
    assert_eq!(kernel.contents(), before);
    backend.cleanup().unwrap();
    let inside = kernel.servers.lock();
    assert!(inside.servers.is_empty() && kernel.sets.lock().sets.is_empty());
    assert_eq!(kernel.device.lock().addresses, None);
    assert!(!kernel.rules.rules().contains("KUBE-"), "{}", kernel.rules.rules());
}

#[test]
fn a_listing_that_leaves_a_server_out_misleads_nobody() {
    let kernel = Kernel::new();
    sync(&mut kernel.start(), &plan([simple("web", VIP, &[A, B]), simple("b", "10.96.0.2", &[A])]));
    kernel.servers.lock().unlisted.insert(key(VIP, 80));
    let mut backend = kernel.start();
    let applied = sync(&mut backend, &plan([simple("web", VIP, &[B, C]), simple("b", "10.96.0.2", &[A])]));
    assert_eq!(applied.failures, []);
    assert_eq!(kernel.targets(key(VIP, 80)).unwrap(), [(B.to_owned(), 1), (C.to_owned(), 1)]);
    assert_eq!(backend.audit(Duration::from_secs(60)).unwrap().drift, []);
}

#[test]
fn others_virtual_servers_stay() {
    let kernel = Kernel::new();
    let server =
        |key| VirtualServer { key, scheduler: "wlc".into(), flags: 0, timeout: 0, netmask: u32::MAX };
    let foreign = [key("198.51.100.7", 80), key(VIP, 8080), key("192.0.2.10", 443)];
    for key in foreign {
        kernel.servers.lock().servers.insert(key, (server(key), BTreeMap::new()));
    }
    let options = Options { exclude: vec!["198.51.100.0/24".parse().unwrap()], ..Options::default() };
    let mut backend = kernel.start_with(options.clone());
    sync(&mut backend, &plan([simple("web", VIP, &[A])]));
    // The second is at an address of a Service, which is ours whatever its port.
    assert_eq!(foreign.map(|key| kernel.targets(key).is_some()), [true, false, true]);
    let mut backend = kernel.start_with(options);
    sync(&mut backend, &plan([]));
    backend.cleanup().unwrap();
    assert!(kernel.targets(foreign[0]).is_some() && kernel.targets(foreign[2]).is_some());
    assert_eq!(kernel.servers.lock().servers.len(), 2);
}

#[test]
fn one_service_that_is_refused_leaves_the_others_alone() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let good = || simple("good", "10.96.0.9", &[B]);
    sync(&mut backend, &plan([good(), simple("web", VIP, &[A])]));
    kernel.servers.lock().refuse.insert(key("10.96.0.5", 80), Errno::NOMEM);
    let frontends = |at_5: bool| {
        let mut all = vec![at(Surface::ClusterIp(ip(VIP)), 80, INTERNAL)];
        all.extend(at_5.then(|| at(Surface::ExternalIp(ip("10.96.0.5")), 80, EXTERNAL)));
        all
    };
    let web = service("web", vec![port_plan(&[B], &[], frontends(true))]);
    let bad = plan([simple("good", "10.96.0.9", &[C]), web]);
    let applied = apply(&mut backend, &bad, &["good", "web"]);
    let [failure] = &applied.failures[..] else { panic!("{applied:?}") };
    assert_eq!((failure.service.name.as_ref(), failure.kind), ("web", FailureKind::Resources));
    assert!(failure.previous_in_force && failure.message.contains("TCP 10.96.0.5:80"), "{failure:?}");
    assert_eq!(kernel.targets(key(VIP, 80)).unwrap(), [(A.to_owned(), 1)], "as before");
    assert_eq!(kernel.targets(key("10.96.0.9", 80)).unwrap(), [(C.to_owned(), 1)]);
    assert!(!kernel.is_bound("10.96.0.5"));
    kernel.servers.lock().refuse.clear();
    assert_eq!(apply(&mut backend, &bad, &["web"]).failures, []);
    assert_eq!(kernel.targets(key("10.96.0.5", 80)).unwrap(), [(B.to_owned(), 1)]);
    // At a start too, where nothing of it is there.
    kernel.servers.lock().refuse.insert(key("10.96.0.7", 80), Errno::INVAL);
    let mut backend = kernel.start();
    let more = plan([good(), simple("new", "10.96.0.7", &[A])]);
    let applied = sync(&mut backend, &more);
    assert_eq!(applied.failures.len(), 1);
    assert!(!applied.failures[0].previous_in_force && !kernel.is_bound("10.96.0.7"));
    kernel.servers.lock().refuse.clear();
    assert_eq!(apply(&mut backend, &more, &["new"]).failures, []);
}

#[test]
fn what_a_service_cannot_have_keeps_what_it_had_until_another_has_it() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &plan([simple("a", VIP, &[A])]));
    let mut unable = simple("a", VIP, &[B]);
    unable.required_features = vec![Feature::Sctp];
    backend.features.retain(|feature| *feature != Feature::Sctp);
    let applied = apply(&mut backend, &plan([unable.clone()]), &["a"]);
    assert!(applied.failures[0].previous_in_force);
    assert_eq!(kernel.targets(key(VIP, 80)).unwrap(), [(A.to_owned(), 1)]);
    unable.ports.clear();
    let taken = plan([unable, simple("b", VIP, &[C])]);
    let applied = apply(&mut backend, &taken, &["b"]);
    assert!(!applied.failures[0].previous_in_force);
    assert_eq!(kernel.targets(key(VIP, 80)).unwrap(), [(C.to_owned(), 1)]);
}

#[test]
fn an_address_goes_from_one_service_to_another_without_a_gap() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &plan([simple("a", VIP, &[A, B])]));
    let before = kernel.servers.lock().requests;
    apply(&mut backend, &plan([simple("b", VIP, &[B, C])]), &["a", "b"]);
    assert_eq!(kernel.weights(key(VIP, 80)), [1, 1]);
    // C comes, A gets weight 0 and goes; the virtual server is not touched.
    assert_eq!(kernel.servers.lock().requests - before, 3);
}

#[test]
fn a_change_costs_what_it_touches() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let many = |endpoint: &str| {
        let name = |number: u32| (format!("s{number}"), format!("10.96.{}.{}", number / 250, number % 250));
        plan((1..=500).map(name).map(|(name, address)| {
            simple(&name, &address, if name == "s7" { std::slice::from_ref(&endpoint) } else { &[A, B] })
        }))
    };
    sync(&mut backend, &many(A));
    let counts = || {
        let (servers, sets, device) = (kernel.servers.lock(), kernel.sets.lock(), kernel.device.lock());
        (servers.requests, servers.lists, sets.changed + sets.lists, device.changes)
    };
    let before = counts();
    apply(&mut backend, &many(C), &["s7"]);
    let after = counts();
    assert_eq!((after.0 - before.0, after.1 - before.1), (3, 2), "requests and lists");
    assert_eq!((after.2, after.3), (before.2, before.3), "sets and addresses");
}

#[test]
fn a_set_without_room_is_made_anew_with_more() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &plan([simple("web", VIP, &[A])]));
    let name = Set { family: Family::V4, purpose: Purpose::ClusterIp }.name();
    // Filled by somebody else.
    kernel.sets.lock().sets.get_mut(name).unwrap().declaration.max_elements = 1;
    apply(&mut backend, &plan([simple("web", VIP, &[A]), simple("b", "10.96.0.2", &[A])]), &["b"]);
    let inside = kernel.sets.lock();
    assert!(inside.sets[name].declaration.max_elements >= 65_536);
    assert_eq!(inside.sets[name].entries.len(), 2);
    assert!(!inside.sets.contains_key("KUBE-LOCKSTEP-ANEW"));
}

#[test]
fn a_set_of_our_name_that_is_of_another_type_is_named() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &plan([]));
    let name = Set { family: Family::V4, purpose: Purpose::ClusterIp }.name();
    kernel.sets.lock().sets.get_mut(name).unwrap().declaration.kind = Kind::HashIp;
    let error = backend.sync(&plan([])).unwrap_err();
    assert!(
        crate::backend::error_text(&error).contains("ipset KUBE-CLUSTER-IP, which is a hash:ip"),
        "{error:?}"
    );
}

/// How a fault is told, and what makes it.
type Fault<'a> = (&'a str, &'a dyn Fn(&Kernel));

#[test]
fn what_others_change_is_seen_told_and_mended() {
    let kernel = Kernel::new();
    let web = plan([simple("web", VIP, &[A, B]), simple("b", "10.96.0.2", &[A])]);
    let bound = Set { family: Family::V4, purpose: Purpose::Bound }.name();
    let faults: [Fault<'_>; 8] = [
        ("IPVS virtual servers: 2 missing", &|kernel| kernel.servers.lock().servers.clear()),
        ("interface kube-ipvs0: missing", &|kernel| {
            let mut device = kernel.device.lock();
            (device.addresses, device.news) = (None, true);
        }),
        ("interface kube-ipvs0: 1 missing", &|kernel| {
            let mut device = kernel.device.lock();
            device.addresses.as_mut().unwrap().remove(&ip(VIP));
            device.news = true;
        }),
        ("ipset KUBE-IPVS-IPS: 2 missing", &|kernel| {
            kernel.sets.lock().sets.get_mut(bound).unwrap().entries.clear();
        }),
        ("iptables filter chain KUBE-IPVS-FILTER: missing", &|kernel| {
            let tool = lockstep_xtables::Tool::new(
                Arc::clone(&kernel.rules) as Arc<dyn Run>,
                Flavour::Nft,
                Family::V4,
            );
            lockstep_xtables::remove_from(&tool, &|_, chain| chain == "KUBE-IPVS-FILTER").unwrap();
        }),
        // No cheap sign tells of these: the audit does.
        ("IPVS virtual server TCP 10.96.0.1:80: 1 missing", &|kernel| {
            kernel.servers.lock().servers.get_mut(&key(VIP, 80)).unwrap().1.remove(&(ip(A), 8080));
        }),
        ("IPVS virtual server TCP 10.96.0.1:80: scheduler wlc instead of rr", &|kernel| {
            kernel.servers.lock().servers.get_mut(&key(VIP, 80)).unwrap().0.scheduler = "wlc".into();
        }),
        ("IPVS virtual server TCP 10.96.0.1:80: 1 endpoints have another weight", &|kernel| {
            let mut inside = kernel.servers.lock();
            inside.servers.get_mut(&key(VIP, 80)).unwrap().1.get_mut(&(ip(A), 8080)).unwrap().weight = 5;
        }),
    ];
    for (at, (text, break_it)) in faults.into_iter().enumerate() {
        let mut backend = kernel.start();
        sync(&mut backend, &web);
        assert!(!backend.disturbed().unwrap(), "{text}");
        break_it(&kernel);
        // Chains have a watch of their own, which needs a kernel.
        if at < 4 {
            assert!(backend.disturbed().unwrap(), "{text}");
        }
        let audit = backend.audit(Duration::from_secs(60)).unwrap();
        assert!(audit.completed);
        let found: Vec<String> = audit.drift.iter().map(ToString::to_string).collect();
        assert!(found.iter().any(|found| found == text), "{text}: {found:?}");
        assert!(sync(&mut backend, &web).objects_changed > 0, "{text}");
        assert_eq!(backend.audit(Duration::from_secs(60)).unwrap().drift, [], "{text}");
    }
}

#[test]
fn an_address_that_the_node_gets_answers_on_node_ports() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let frontend = at(Surface::NodePort, 30080, EXTERNAL);
    let plan = plan([service("web", vec![port_plan(&[A], &[], vec![frontend])])]);
    sync(&mut backend, &plan);
    let mut inside = kernel.device.lock();
    inside.others.push(ip("192.0.2.11"));
    inside.others.sort_unstable();
    inside.news = true;
    drop(inside);
    assert!(backend.disturbed().unwrap());
    sync(&mut backend, &plan);
    assert!(kernel.targets(key("192.0.2.11", 30080)).is_some());
    let mut inside = kernel.device.lock();
    inside.others.retain(|other| *other != ip("192.0.2.11"));
    inside.news = true;
    drop(inside);
    kernel.connected(key("192.0.2.11", 30080), A, 1);
    assert!(backend.disturbed().unwrap());
    sync(&mut backend, &plan);
    // IPVS would take what this node sends to whoever has it next.
    assert_eq!(kernel.targets(key("192.0.2.11", 30080)), None);
    assert!(kernel.targets(key("192.0.2.10", 30080)).is_some());
}

#[test]
fn link_local_addresses_come_and_go_with_pods_and_change_nothing() {
    let kernel = Kernel::new();
    let mut backend = kernel.start_with(Options { drain: Duration::from_secs(60), ..Options::default() });
    let web = plan([simple("web", VIP, &[A])]);
    sync(&mut backend, &web);
    let mut inside = kernel.device.lock();
    inside.others.push(ip("fe80::77"));
    inside.news = true;
    drop(inside);
    assert!(!backend.disturbed().unwrap());
    let requests = kernel.servers.lock().requests;
    let both = plan([simple("web", VIP, &[A]), simple("other", "10.96.0.2", &[B])]);
    let lists = kernel.sets.lock().lists;
    apply(&mut backend, &both, &["other"]);
    assert_eq!(kernel.servers.lock().requests - requests, 2, "no more than is new");
    assert_eq!(kernel.sets.lock().lists, lists, "nothing is compared");
}

#[test]
fn an_external_address_of_the_node_comes_before_a_node_port() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let at_node = |surface, endpoint| {
        service("", vec![port_plan(&[endpoint], &[], vec![at(surface, 30080, EXTERNAL)])])
    };
    let named = |name: &str, surface, endpoint| ServicePlan {
        key: ServiceKey::new("default", name),
        ..at_node(surface, endpoint)
    };
    let by_port = || named("a", Surface::NodePort, A);
    let by_address = || named("b", Surface::ExternalIp(ip("192.0.2.10")), B);
    sync(&mut backend, &plan([by_port()]));
    let names = || kernel.targets(key("192.0.2.10", 30080)).unwrap();
    assert_eq!(names(), [(A.to_owned(), 1)]);
    apply(&mut backend, &plan([by_port(), by_address()]), &["b"]);
    assert_eq!(names(), [(B.to_owned(), 1)]);
    let mut backend = kernel.start();
    assert_eq!(sync(&mut backend, &plan([by_port(), by_address()])).objects_changed, 0);
    apply(&mut backend, &plan([by_port()]), &["b"]);
    assert_eq!(names(), [(A.to_owned(), 1)]);
}

#[test]
fn a_chain_that_kube_proxy_alone_writes_is_ours_to_remove() {
    let terms = Terms::new(&"rr".into(), Family::ALL.to_vec(), &plan([]).node, Vec::new());
    let FixedChains { chains, .. } = fixed::chains(&terms, Family::V4, true);
    assert!(chains.iter().all(|(table, chain, _)| crate::is_written(*table, chain)));
    let theirs = (Table::Filter, "KUBE-IPVS-OUT-FILTER");
    assert!(crate::is_chain(theirs.0, theirs.1) && !crate::is_written(theirs.0, theirs.1));
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(format!("{name}.txt"));
    if std::env::var_os("LOCKSTEP_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let blessed = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, blessed, "{}", path.display());
}

#[test]
fn golden_chains() {
    let text = |plan: &ForwardingPlan| {
        let own = ["127.0.0.1", "192.0.2.10", "fd00:2::10"].map(ip).to_vec();
        let terms = Terms::new(&"rr".into(), Family::ALL.to_vec(), &plan.node, own);
        let mut text = String::new();
        for family in Family::ALL {
            let FixedChains { chains, jumps, .. } = fixed::chains(&terms, family, true);
            text.push_str(&format!("{family:?}\n"));
            let chains = chains.iter().map(|(table, chain, rules)| (*table, *chain, rules));
            for (table, chain, rules) in
                chains.chain(jumps.iter().map(|jumps| (jumps.table, jumps.chain, &jumps.rules)))
            {
                let lines = rules.iter().map(|rule| format!("-t {} -A {chain} {rule}\n", table.name()));
                text.extend(lines);
            }
        }
        text
    };
    golden("chains", &text(&plan([])));
    let mut untold = plan([]);
    untold.node.pods = None;
    untold.node.node_ports_v4 = NodePortScope::Addresses(vec![ip("192.0.2.10")]);
    golden("chains-no-pods", &text(&untold));
}
