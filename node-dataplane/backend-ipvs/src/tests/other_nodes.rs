//! Addresses of nodes that Services name.

use super::*;

const OTHERS: &str = "192.0.2.20";
const OWN: &str = "192.0.2.10";

/// A Service at a node's address, and what the plan says of addresses of nodes.
fn at_node(address: &str, named: &[&str]) -> ForwardingPlan {
    let frontends = vec![
        at(Surface::ClusterIp(ip(VIP)), 80, INTERNAL),
        at(Surface::ExternalIp(ip(address)), 80, EXTERNAL),
        at(Surface::LoadBalancerIp(ip("203.0.113.1")), 80, EXTERNAL),
    ];
    let mut plan = plan([service("web", vec![port_plan(&[A], &[], frontends)])]);
    plan.node.node_addresses = named.iter().map(|address| ip(address)).collect();
    plan
}

#[test]
fn an_address_of_another_node_is_left_alone_whole() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &at_node(OTHERS, &[OWN, OTHERS]));
    assert!(kernel.is_bound(VIP) && kernel.is_bound("203.0.113.1") && !kernel.is_bound(OTHERS));
    assert!(kernel.targets(key(VIP, 80)).is_some() && kernel.targets(key(OTHERS, 80)).is_none());
    assert!(!kernel.has(Purpose::ExternalIp, Entry::IpPort(ip(OTHERS), 6, 80)));
    assert!(!kernel.has(Purpose::Bound, Entry::Ip(ip(OTHERS))));
    // So also where a Service alone changes.
    let next = at_node(OTHERS, &[OWN, OTHERS]);
    apply(&mut backend, &plan_without(&next), &["web"]);
    apply(&mut backend, &next, &["web"]);
    assert!(kernel.is_bound(VIP) && !kernel.is_bound(OTHERS));
    assert!(kernel.targets(key(OTHERS, 80)).is_none());
}

fn plan_without(plan: &ForwardingPlan) -> ForwardingPlan {
    ForwardingPlan { services: Default::default(), ..plan.clone() }
}

#[test]
fn the_node_that_has_the_address_has_the_virtual_server_and_does_not_bind_it() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &at_node(OWN, &[OWN, OTHERS]));
    assert_eq!(kernel.targets(key(OWN, 80)).unwrap(), [(A.to_owned(), 1)]);
    assert!(!kernel.is_bound(OWN) && kernel.has(Purpose::ExternalIp, Entry::IpPort(ip(OWN), 6, 80)));
    // Whoever has the address has the Service, whatever Node objects say by then.
    let mut inside = kernel.device.lock();
    inside.others.push(ip(OTHERS));
    inside.others.sort_unstable();
    inside.news = true;
    drop(inside);
    let plan = at_node(OTHERS, &[OWN, OTHERS]);
    sync(&mut backend, &plan);
    assert!(kernel.targets(key(OTHERS, 80)).is_some() && !kernel.is_bound(OTHERS));
    let mut inside = kernel.device.lock();
    inside.others.retain(|other| *other != ip(OTHERS));
    inside.news = true;
    drop(inside);
    assert!(backend.disturbed().unwrap());
    sync(&mut backend, &plan);
    assert!(kernel.targets(key(OTHERS, 80)).is_none() && !kernel.is_bound(OTHERS));
}

#[test]
fn an_address_that_turns_out_to_be_another_nodes_is_given_up_at_once() {
    let kernel = Kernel::new();
    let mut backend = kernel.start();
    sync(&mut backend, &at_node(OTHERS, &[]));
    assert!(kernel.is_bound(OTHERS), "nobody has said that it is a node's");
    // What is connected would keep the whole address of the other node here for an hour.
    kernel.connected(key(OTHERS, 80), A, 1);
    sync(&mut backend, &at_node(OTHERS, &[OTHERS]));
    assert!(!kernel.is_bound(OTHERS) && kernel.targets(key(OTHERS, 80)).is_none());
    let mut anew = kernel.start();
    assert_eq!(sync(&mut anew, &at_node(OTHERS, &[OTHERS])).objects_changed, 0);
    // The same where an earlier release left it.
    kernel.device.lock().addresses.as_mut().unwrap().insert(ip(OTHERS));
    sync(&mut anew, &at_node(OTHERS, &[OTHERS]));
    assert!(!kernel.is_bound(OTHERS));
    sync(&mut anew, &at_node(OTHERS, &[]));
    assert!(kernel.is_bound(OTHERS) && kernel.targets(key(OTHERS, 80)).is_some());
}
