//! What the kernel has not, what it refuses, and what is in force then.

use lockstep_kernel::ipvs::fake::FakeIpvs;

use super::*;

/// A Service that is reached at an address from outside.
fn balanced(name: &str, address: &str, endpoint: &str) -> ServicePlan {
    let frontend = at(Surface::LoadBalancerIp(ip(address)), 80, EXTERNAL);
    service(name, vec![port_plan(&[endpoint], &[], vec![frontend])])
}

fn failed(applied: &Applied) -> Vec<(String, &str)> {
    let all = applied.failures.iter();
    all.map(|failure| (failure.service.to_string(), failure.message.as_str())).collect()
}

#[test]
fn where_ipv6_does_not_work_everything_of_ipv4_does() {
    let kernel = Kernel::new();
    kernel.device.lock().refuse.insert(ip("2001:db8::"), Errno::INVAL);
    let mut backend = kernel.start();
    assert_eq!(backend.describe().families, [Family::V4]);
    let mut web = balanced("web", "203.0.113.1", A);
    web.health_check = Some(HealthCheck { port: port(32000), local_endpoints: 1 });
    let plan = plan([web]);
    sync(&mut backend, &plan);
    assert!(kernel.has(Purpose::HealthCheck, Entry::Port(32000)));
    assert!(kernel.sets.lock().sets.keys().all(|name| !name.contains("-6-")));
    apply(&mut backend, &plan, &["web"]);
}

#[test]
fn an_address_that_cannot_be_bound_is_the_fault_of_its_services() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    kernel.device.lock().refuse.insert(ip("203.0.113.1"), Errno::INVAL);
    let bad = || balanced("bad", "203.0.113.1", A);
    let told = [("default/bad".to_owned(), "bind 203.0.113.1 to kube-ipvs0: Invalid argument (os error 22)")];
    let all = plan([bad(), simple("web", VIP, &[B])]);
    assert_eq!(failed(&sync(&mut backend, &all)), told);
    assert!(kernel.targets(key(VIP, 80)).is_some() && kernel.is_bound(VIP));
    assert!(kernel.rules.rules().contains("KUBE-CLUSTER-IP"), "nat is written, too");
    assert_eq!(kernel.targets(key("203.0.113.1", 80)), None);
    assert!(!kernel.has(Purpose::Bound, Entry::Ip(ip("203.0.113.1"))));
    // The same of a change, and of one that had another address.
    let moved = plan([bad(), simple("web", VIP, &[B]), balanced("late", "203.0.113.2", C)]);
    assert_eq!(failed(&apply(&mut backend, &moved, &["bad", "late"])), told);
    let moved = plan([bad(), simple("web", VIP, &[B]), balanced("late", "203.0.113.1", C)]);
    let applied = apply(&mut backend, &moved, &["late"]);
    assert_eq!(applied.failures.len(), 2);
    assert!(applied.failures.iter().any(|failure| failure.previous_in_force));
    assert!(kernel.targets(key("203.0.113.2", 80)).is_some() && kernel.is_bound("203.0.113.2"));
    kernel.device.lock().refuse.clear();
    assert_eq!(failed(&sync(&mut backend, &moved)), []);
    assert!(kernel.is_bound("203.0.113.1") && !kernel.is_bound("203.0.113.2"));
}

#[test]
fn where_an_address_that_was_there_cannot_be_bound_again_the_rest_goes_on() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let two = plan([simple("web", VIP, &[A]), simple("b", "10.96.0.2", &[B])]);
    sync(&mut backend, &two);
    kernel.device.lock().addresses.as_mut().unwrap().clear();
    kernel.device.lock().refuse.insert(ip("10.96.0.2"), Errno::INVAL);
    let mut error = &backend.sync(&two).unwrap_err() as &dyn std::error::Error;
    while let Some(source) = error.source() {
        error = source;
    }
    assert_eq!(error.to_string(), "bind 10.96.0.2 to kube-ipvs0: Invalid argument (os error 22)");
    assert!(kernel.is_bound(VIP) && kernel.targets(key("10.96.0.2", 80)).is_some());
    kernel.device.lock().refuse.clear();
    sync(&mut backend, &two);
    assert!(kernel.is_bound("10.96.0.2"));
}

#[test]
fn comparing_everything_gives_nobody_more_time() {
    let kernel = Kernel::new();
    let mut backend = kernel.start_with(Options { drain: Duration::from_secs(60), ..Options::default() });
    sync(&mut backend, &plan([simple("web", VIP, &[A, B])]));
    kernel.connected(key(VIP, 80), A, 1);
    let without = plan([simple("web", VIP, &[B])]);
    apply(&mut backend, &without, &["web"]);
    let now = Instant::now();
    // So that time which begins anew would end later than the time that there was.
    std::thread::sleep(Duration::from_millis(20));
    sync(&mut backend, &without);
    assert_eq!(kernel.weights(key(VIP, 80)), [0, 1]);
    backend.drain(now + Duration::from_secs(60)).unwrap();
    assert_eq!(kernel.weights(key(VIP, 80)), [1]);
}

#[test]
fn a_source_range_that_becomes_wider_is_no_drift() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let open_to = |ranges: &[&str]| {
        let mut service = balanced("web", "203.0.113.1", A);
        let ranges = ranges.iter().map(|range| range.parse().unwrap());
        service.ports[0].frontends[0].allowed_sources = Some(ranges.collect());
        plan([service])
    };
    sync(&mut backend, &open_to(&["198.51.100.7/32"]));
    // Both read back what was written.
    apply(&mut backend, &open_to(&["198.51.100.0/24"]), &["web"]);
    apply(&mut backend, &open_to(&["198.51.100.7/32"]), &["web"]);
}

#[test]
fn nobody_is_shut_out_while_an_address_becomes_restricted() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let web = balanced("web", "203.0.113.1", A);
    sync(&mut backend, &plan([web.clone()]));
    let mut restricted = web;
    restricted.ports[0].frontends[0].allowed_sources = Some(["198.51.100.0/24".parse().unwrap()].into());
    let source = Entry::IpPortNet(ip("203.0.113.1"), 6, 80, "198.51.100.0/24".parse().unwrap());
    let closed = || kernel.has(Purpose::Firewall, Entry::IpPort(ip("203.0.113.1"), 6, 80));
    kernel.sets.lock().refuse.insert(source, Errno::NOMEM);
    let restricted = plan([restricted]);
    backend.apply(&restricted, &[ServiceKey::new("default", "web")]).unwrap_err();
    assert!(!closed(), "what it is open to is there first");
    kernel.sets.lock().refuse.clear();
    sync(&mut backend, &restricted);
    assert!(closed());
}

#[test]
fn a_port_that_leaves_an_address_that_stays_is_refused_before_its_virtual_server_goes() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let udp = |ports: &[u16]| {
        let plan_of = |number: &u16| {
            let frontend = at(Surface::ClusterIp(ip(VIP)), *number, INTERNAL);
            PortPlan { protocol: Protocol::Udp, ..port_plan(&[A], &[], vec![frontend]) }
        };
        plan([service("dns", ports.iter().map(plan_of).collect())])
    };
    sync(&mut backend, &udp(&[53, 54]));
    let (servers, gone): (FakeIpvs, _) = (kernel.servers.clone(), Key { protocol: 17, ..key(VIP, 54) });
    servers.lock().refuse.insert(gone, Errno::NOMEM);
    backend.apply(&udp(&[53]), &[ServiceKey::new("default", "dns")]).unwrap_err();
    assert!(kernel.targets(gone).is_some() && kernel.is_bound(VIP));
    assert!(!kernel.has(Purpose::ClusterIp, Entry::IpPort(ip(VIP), 17, 54)));
    servers.lock().refuse.clear();
    sync(&mut backend, &udp(&[53]));
    assert_eq!(kernel.targets(gone), None);
}

#[test]
fn a_node_port_closes_nothing_that_is_at_the_nodes_address_by_its_own() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let drops = at(Surface::NodePort, 30080, NONE_LOCAL);
    let by_port = service("a", vec![port_plan(&[A], &[], vec![drops])]);
    let open = at(Surface::ExternalIp(ip("192.0.2.10")), 30080, EXTERNAL);
    let by_address = service("b", vec![port_plan(&[B], &[], vec![open])]);
    sync(&mut backend, &plan([by_port.clone(), by_address]));
    let closed = || kernel.has(Purpose::DropExternal, Entry::IpPort(ip("192.0.2.10"), 6, 30080));
    assert!(!closed());
    sync(&mut backend, &plan([by_port]));
    assert!(closed());
}
