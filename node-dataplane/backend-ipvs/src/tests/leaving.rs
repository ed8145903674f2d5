//! What leaves while it has connections: endpoints, Services, the mode as a whole.

use super::*;
use crate::cleanup::{Removed, remove_from_tables};

#[test]
fn an_endpoint_that_leaves_keeps_its_connections() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &plan([simple("web", VIP, &[A, B])]));
    kernel.connected(key(VIP, 80), A, 1);
    let without = plan([simple("web", VIP, &[B, C])]);
    apply(&mut backend, &without, &["web"]);
    assert_eq!(kernel.weights(key(VIP, 80)), [0, 1, 1]);
    // B had none and left at once.
    apply(&mut backend, &plan([simple("web", VIP, &[C])]), &["web"]);
    assert_eq!(kernel.targets(key(VIP, 80)).unwrap(), [(A.to_owned(), 0), (C.to_owned(), 1)]);
    // A process that starts anew lets it drain too.
    let mut backend = kernel.start();
    assert_eq!(sync(&mut backend, &plan([simple("web", VIP, &[C])])).objects_changed, 0);
    apply(&mut backend, &plan([simple("web", VIP, &[A, C])]), &["web"]);
    assert_eq!(kernel.weights(key(VIP, 80)), [1, 1], "it came back");
    apply(&mut backend, &plan([simple("web", VIP, &[C])]), &["web"]);
    let now = Instant::now();
    backend.drain(now).unwrap();
    assert_eq!(kernel.weights(key(VIP, 80)), [0, 1], "not while it has connections");
    kernel.connected(key(VIP, 80), A, 0);
    backend.drain(now + Duration::from_millis(1)).unwrap();
    assert_eq!(kernel.weights(key(VIP, 80)), [0, 1], "not yet looked at again");
    backend.drain(now + Duration::from_secs(1)).unwrap();
    assert_eq!(kernel.weights(key(VIP, 80)), [1]);
    assert_eq!(backend.verify().unwrap(), []);
}

#[test]
fn what_does_not_end_ends_at_the_limit() {
    let kernel = Kernel::new();
    let mut backend = kernel.start_with(Options { drain: Duration::from_secs(60), ..Options::default() });
    sync(&mut backend, &plan([simple("web", VIP, &[A, B])]));
    kernel.connected(key(VIP, 80), A, 1);
    apply(&mut backend, &plan([simple("web", VIP, &[B])]), &["web"]);
    let now = Instant::now();
    backend.drain(now + Duration::from_secs(50)).unwrap();
    assert_eq!(kernel.weights(key(VIP, 80)), [0, 1]);
    backend.drain(now + Duration::from_secs(61)).unwrap();
    assert_eq!(kernel.weights(key(VIP, 80)), [1]);
}

#[test]
fn a_service_that_is_deleted_keeps_its_connections_and_refuses_new_ones() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let other = || simple("other", "10.96.0.9", &[B]);
    sync(&mut backend, &plan([simple("web", VIP, &[A, B]), other()]));
    kernel.connected(key(VIP, 80), A, 1);
    apply(&mut backend, &plan([other()]), &["web"]);
    assert_eq!(kernel.weights(key(VIP, 80)), [0]);
    assert!(kernel.is_bound(VIP) && kernel.has(Purpose::ClusterIp, Entry::IpPort(ip(VIP), 6, 80)));
    // Somebody else may have the address at once.
    apply(&mut backend, &plan([other(), simple("next", VIP, &[C])]), &["next"]);
    assert_eq!(kernel.targets(key(VIP, 80)).unwrap(), [(A.to_owned(), 0), (C.to_owned(), 1)]);
    apply(&mut backend, &plan([other()]), &["next"]);
    // Also over a restart.
    let mut backend = kernel.start();
    sync(&mut backend, &plan([other()]));
    assert_eq!(kernel.weights(key(VIP, 80)), [0]);
    kernel.connected(key(VIP, 80), A, 0);
    backend.drain(Instant::now()).unwrap();
    assert_eq!(kernel.targets(key(VIP, 80)), None);
    assert!(!kernel.is_bound(VIP) && !kernel.has(Purpose::ClusterIp, Entry::IpPort(ip(VIP), 6, 80)));
    assert_eq!(backend.verify().unwrap(), []);
}

#[test]
fn udp_does_not_wait() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let udp = |endpoints: &[&str]| {
        let mut service = simple("dns", VIP, endpoints);
        service.ports[0].protocol = Protocol::Udp;
        service
    };
    sync(&mut backend, &plan([udp(&[A, B])]));
    let at = Key { protocol: 17, ..key(VIP, 80) };
    kernel.connected(at, A, 1);
    apply(&mut backend, &plan([udp(&[B])]), &["dns"]);
    assert_eq!(kernel.weights(at), [1]);
    kernel.connected(at, B, 1);
    apply(&mut backend, &plan([]), &["dns"]);
    assert_eq!(kernel.targets(at), None);
}

/// Leaves IPVS mode for another one, which has made the chains `keeps` its own.
fn leave(kernel: &Kernel, drain: Option<Duration>, keeps: &[&str]) -> Removed {
    let tables = Some(kernel.tables(Duration::ZERO));
    let goes = |_, table, chain: &str| crate::is_chain(table, chain) && !keeps.contains(&chain);
    remove_from_tables(tables, &kernel.run(), &[], &goes, drain).unwrap()
}

#[test]
fn a_mode_that_is_left_keeps_its_connections_and_nothing_else() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    let by_node_port =
        service("np", vec![port_plan(&[A], &[], vec![at(Surface::NodePort, 30080, EXTERNAL)])]);
    sync(&mut backend, &plan([simple("web", VIP, &[A, B]), simple("b", "10.96.0.2", &[A]), by_node_port]));
    drop(backend);
    kernel.connected(key(VIP, 80), A, 1);
    kernel.connected(key("192.0.2.10", 30080), A, 1);
    let mut left = leave(&kernel, Some(Duration::from_secs(60)), &["KUBE-MARK-MASQ"]).draining.unwrap();
    assert_eq!(left.left(), 2);
    // What the new mode has no rule for goes to nobody, rather than to whoever was there once.
    assert_eq!(kernel.weights(key(VIP, 80)), [0, 0]);
    assert_eq!(kernel.weights(key("192.0.2.10", 30080)), [0]);
    assert_eq!(kernel.device.lock().addresses.clone().unwrap(), [ip(VIP)].into());
    let rules = || kernel.rules.rules();
    for gone in ["KUBE-SERVICES", "KUBE-PROXY-FIREWALL", "KUBE-IPVS-OUT-FILTER", "KUBE-CLUSTER-IP dst"] {
        assert!(!rules().contains(gone), "{gone} in {}", rules());
    }
    assert!(rules().contains("--match-set KUBE-IPVS-IPS dst -j REJECT"), "{}", rules());
    assert!(rules().contains("KUBE-MARK-MASQ"), "another mode has it");
    assert!(!left.tend().unwrap());
    // Killed meanwhile: whoever comes next goes on.
    let mut left = leave(&kernel, Some(Duration::from_secs(60)), &["KUBE-MARK-MASQ"]).draining.unwrap();
    assert_eq!(left.left(), 2);
    kernel.connected(key(VIP, 80), A, 0);
    assert!(!left.tend().unwrap());
    assert_eq!((left.left(), kernel.targets(key(VIP, 80))), (1, None));
    kernel.connected(key("192.0.2.10", 30080), A, 0);
    assert!(left.tend().unwrap());
    assert!(kernel.servers.lock().servers.is_empty() && kernel.sets.lock().sets.is_empty());
    assert_eq!(kernel.device.lock().addresses, None);
    assert!(!rules().contains("KUBE-IPVS-FILTER"), "{}", rules());
}

#[test]
fn a_mode_is_left_at_once_where_nothing_is_connected_or_nothing_may_wait() {
    for (active, drain) in [(0, Some(Duration::from_secs(60))), (1, None), (1, Some(Duration::ZERO))] {
        let kernel = Kernel::new();
        sync(&mut kernel.start(), &plan([simple("web", VIP, &[A, B])]));
        kernel.connected(key(VIP, 80), A, active);
        let Removed { objects, draining } = leave(&kernel, drain, &[]);
        assert!(objects > 0);
        if let Some(mut draining) = draining {
            assert!(draining.tend().unwrap(), "its time is over");
        }
        assert!(kernel.servers.lock().servers.is_empty() && kernel.sets.lock().sets.is_empty());
        assert!(!kernel.rules.rules().contains("KUBE-"), "{}", kernel.rules.rules());
    }
}
