//! Cutting, against flows in memory.

use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc;
use std::time::Duration;

use lockstep_kernel::Errno;
use lockstep_kernel::conntrack::Flow;
use lockstep_kernel::conntrack::fake::FakeConntrack;
use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::{Action, ForwardingPlan, Frontend, PortPlan, ServicePlan, Surface, Target, ViewConfig};
use prometheus_client::registry::Registry;

use super::*;

const UDP: u8 = 17;
const EPERM: Errno = Errno(1);
const PATIENCE: Duration = Duration::from_secs(20);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn flow(source: &str, destination: &str, answers_from: &str) -> Flow {
    Flow {
        protocol: UDP,
        source: at(source),
        destination: at(destination),
        answers_from: at(answers_from),
        zone: 0,
        id: 1,
    }
}

fn frontend(surface: Surface, port: u16) -> Frontend {
    let (from_pod, from_node, from_elsewhere) = (Action::Drop, Action::Drop, Action::Drop);
    let port = Port::new(port).unwrap();
    Frontend { surface, port, from_pod, from_node, from_elsewhere, allowed_sources: None }
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("kube", name)
}

/// A Service at `address`:53 and node port 30053 that these endpoints serve.
fn service(name: &str, address: &str, serving: &[&str]) -> Arc<ServicePlan> {
    let target = |text: &&str| Target { address: at(text).ip(), port: Port::new(at(text).port()).unwrap() };
    let address: IpAddr = address.parse().unwrap();
    let port = PortPlan {
        family: Family::of(address),
        protocol: Protocol::Udp,
        port: Port::new(53).unwrap(),
        name: "".into(),
        cluster: Vec::new(),
        local: Vec::new(),
        hairpin: Vec::new(),
        serving: serving.iter().map(target).collect(),
        frontends: vec![frontend(Surface::ClusterIp(address), 53), frontend(Surface::NodePort, 30053)],
        affinity_seconds: None,
    };
    Arc::new(ServicePlan {
        key: key(name),
        ports: vec![port],
        required_features: Vec::new(),
        health_check: None,
        conflicts: Vec::new(),
        cluster_ips: Vec::new(),
    })
}

fn plan(services: &[Arc<ServicePlan>]) -> ForwardingPlan {
    let node = ViewConfig::new("node-a").node_plan(&lockstep_model::NodeContext::unknown("node-a"), &[], &[]);
    let services = services.iter().map(|service| (service.key.clone(), service.clone())).collect();
    ForwardingPlan { node, services }
}

fn work(plan: &ForwardingPlan) -> Work {
    Work { node: plan.node.clone(), services: plan.services.values().cloned().collect() }
}

#[test]
fn a_sweep_cuts_stale_udp_flows_of_both_families_and_nothing_else() {
    let dns = service("dns", "172.30.0.10", &["10.1.0.1:5353"]);
    let dns6 = service("dns6", "fd00:30::10", &["[fd00:1::1]:5353"]);
    let stale = [
        flow("10.9.0.1:4000", "172.30.0.10:53", "10.1.0.9:5353"),
        flow("10.9.0.1:4001", "172.30.0.10:53", "172.30.0.10:53"),
        flow("10.9.0.1:4002", "10.200.0.11:30053", "10.1.0.9:5353"),
        flow("[fd00:9::1]:4000", "[fd00:30::10]:53", "[fd00:1::9]:5353"),
    ];
    let kept = [
        flow("10.9.0.1:4003", "172.30.0.10:53", "10.1.0.1:5353"),
        flow("10.9.0.1:4004", "192.0.2.1:30053", "192.0.2.1:30053"),
        flow("10.9.0.1:4005", "192.0.2.1:53", "192.0.2.1:53"),
        Flow { protocol: 6, ..flow("10.9.0.1:4000", "172.30.0.10:53", "10.1.0.9:5353") },
        Flow { protocol: 132, ..flow("10.9.0.1:4000", "172.30.0.10:53", "10.1.0.9:5353") },
    ];
    let mut fake = FakeConntrack::default();
    fake.lock().flows = [&stale[..], &kept].concat();
    let mut asked = Vec::new();
    let mut is_local = |address: IpAddr| {
        asked.push(address);
        Ok(address == at("10.200.0.11:1").ip())
    };
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    sweep::sweep(&mut fake, &mut is_local, &work(&plan(&[dns, dns6])), &metrics).unwrap();
    assert_eq!(fake.lock().flows, kept);
    assert_eq!(fake.lock().dumps, 2, "one per family");
    asked.sort();
    assert_eq!(asked, [at("10.200.0.11:1").ip(), at("192.0.2.1:1").ip()]);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        r#"kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv4"} 3"#,
        r#"kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv6"} 1"#,
        r#"kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"} 1"#,
    ] {
        assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
    }
}

/// Services of a sweep, and how many endpoints serve each.
type About = Vec<(ServiceKey, usize)>;

/// A cutter whose sweeps wait for leave, and say what they are about.
fn guided() -> (Cutter, mpsc::Receiver<About>, mpsc::Sender<Result<(), Errno>>) {
    let (say, said) = mpsc::channel();
    let (leave, leaves) = mpsc::channel::<Result<(), Errno>>();
    let cutter = Cutter::start(Box::new(move |work| {
        let about = work.services.iter().map(|it| (it.key.clone(), it.ports[0].serving.len()));
        // Nobody listens any more once a test is over.
        let _ = say.send(about.collect());
        match leaves.recv().unwrap_or(Ok(())) {
            Ok(()) => Ok(()),
            Err(errno) => {
                Err(netlink::Error::Refused { request: "conntrack dump".to_owned(), message: None, errno })
            }
        }
    }));
    (cutter.unwrap(), said, leave)
}

#[test]
fn passes_during_a_sweep_make_one_more_by_the_newest_plan() {
    let (mut cutter, said, leave) = guided();
    let ok = |_: &ServiceKey| false;
    let one =
        plan(&[service("a", "172.30.0.1", &["10.1.0.1:53"]), service("b", "172.30.0.2", &["10.1.0.1:53"])]);
    cutter.committed(&one, None, &ok);
    assert_eq!(said.recv_timeout(PATIENCE).unwrap(), [(key("a"), 1), (key("b"), 1)]);
    // While that one is on its way: `a` changes twice, `b` goes, `c` comes and fails.
    let two = plan(&[service("a", "172.30.0.1", &["10.1.0.1:53", "10.1.0.2:53"])]);
    cutter.committed(&two, Some(&[key("a")]), &ok);
    let three = plan(&[
        service("a", "172.30.0.1", &["10.1.0.1:53", "10.1.0.2:53", "10.1.0.3:53"]),
        service("c", "172.30.0.3", &["10.1.0.1:53"]),
    ]);
    cutter.committed(&three, Some(&[key("a"), key("b"), key("c")]), &|it| *it == key("c"));
    assert!(said.try_recv().is_err(), "never two at once");
    leave.send(Ok(())).unwrap();
    assert_eq!(said.recv_timeout(PATIENCE).unwrap(), [(key("a"), 3)]);
    leave.send(Ok(())).unwrap();
    assert_eq!(cutter.complaints(), None);
}

#[test]
fn a_node_port_of_the_number_of_an_address_is_swept_with_it() {
    let (mut cutter, said, leave) = guided();
    let mut at_node = (*service("b", "172.30.0.2", &["10.1.0.2:53"])).clone();
    let address = at("10.200.0.11:1").ip();
    at_node.ports[0].frontends = vec![frontend(Surface::ExternalIp(address), 30053)];
    let all = plan(&[service("a", "172.30.0.1", &["10.1.0.1:53"]), Arc::new(at_node)]);
    for (changed, failed) in [("a", "-"), ("b", "-"), ("a", "b")] {
        cutter.committed(&all, Some(&[key(changed)]), &|it| *it == key(failed));
        let about = said.recv_timeout(PATIENCE).unwrap();
        let names: Vec<ServiceKey> = about.into_iter().map(|(key, _)| key).collect();
        let expected = if failed == "b" { vec![key("a")] } else { vec![key("a"), key("b")] };
        assert_eq!(names, expected, "{changed} changed");
        leave.send(Ok(())).unwrap();
    }
}

#[test]
fn what_cannot_be_cut_is_complained_of_until_it_is_or_has_gone() {
    let (mut cutter, said, leave) = guided();
    let ok = |_: &ServiceKey| false;
    let both =
        plan(&[service("a", "172.30.0.1", &["10.1.0.1:53"]), service("b", "172.30.0.2", &["10.1.0.1:53"])]);
    cutter.committed(&both, None, &ok);
    said.recv_timeout(PATIENCE).unwrap();
    // `b` goes before the failure is known: nobody complains of what is not there.
    let rest = plan(&[service("a", "172.30.0.1", &["10.1.0.1:53"])]);
    cutter.committed(&rest, Some(&[key("b"), key("a")]), &ok);
    leave.send(Err(EPERM)).unwrap();
    assert_eq!(said.recv_timeout(PATIENCE).unwrap(), [(key("a"), 1)], "tried again by itself");
    let complaints = cutter.complaints().unwrap();
    assert_eq!(complaints.iter().map(|it| it.service.clone()).collect::<Vec<_>>(), [key("a")]);
    assert!(
        complaints[0].message.contains("kube/a") && complaints[0].message.contains("not permitted"),
        "{complaints:?}"
    );
    assert_eq!(cutter.complaints(), None, "said once");
    leave.send(Ok(())).unwrap();
    cutter.committed(&rest, Some(&[key("a")]), &ok);
    said.recv_timeout(PATIENCE).unwrap();
    assert_eq!(cutter.complaints(), Some(Vec::new()));
}
