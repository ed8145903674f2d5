//! The guard of the loopback and `route_localnet`, and pods that are told by their interface, against
//! the real tools. Needs root and iptables; fails without.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

mod support;

use lockstep_backend_iptables::Flavour;
use lockstep_view::backend::Backend;
use lockstep_view::{ForwardingPlan, InterfaceName, PodSources};
use support::*;

const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf/all/route_localnet";

fn at_localhost() -> ForwardingPlan {
    let mut plan = three();
    plan.node.localhost_node_ports = true;
    plan
}

/// As kubelet makes it.
const OF_KUBELET: &str = "iptables-FLAVOUR -N KUBE-FIREWALL
    iptables-FLAVOUR -A KUBE-FIREWALL -m comment --comment 'block incoming localnet connections' --dst 127.0.0.0/8 ! --src 127.0.0.0/8 \
        -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
    iptables-FLAVOUR -I OUTPUT -j KUBE-FIREWALL
    iptables-FLAVOUR -I INPUT -j KUBE-FIREWALL";

#[test]
fn the_guard_of_the_loopback_is_shared_with_kubelet() {
    everywhere(|flavour| {
        let guards = |text: &str| text.lines().filter(|line| line.contains("KUBE-FIREWALL")).count();
        let on = || std::fs::read_to_string(ROUTE_LOCALNET).unwrap();
        assert_eq!(on(), "0\n");
        let flavoured = |script: &str| sh(&script.replace("FLAVOUR", flavour.name()));
        // Kubelet was first: nothing of it is missing, and nothing is made twice.
        let (mut backend, recorder) = open(flavour);
        flavoured(OF_KUBELET);
        let before = saved(flavour);
        backend.sync(&at_localhost()).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        assert!(recorder.take().iter().all(|input| !input.contains("KUBE-FIREWALL")));
        assert_eq!((guards(&saved(flavour)), on().as_str()), (4, "1\n"));
        backend.cleanup().unwrap();
        assert_eq!(saved(flavour), before);

        // What somebody takes away of it is seen and comes back.
        backend.sync(&at_localhost()).unwrap();
        for damage in [
            "iptables-FLAVOUR -D INPUT -j KUBE-FIREWALL",
            "iptables-FLAVOUR -F KUBE-FIREWALL",
            "iptables-FLAVOUR -F OUTPUT; iptables-FLAVOUR -F INPUT; iptables-FLAVOUR -F KUBE-FIREWALL; iptables-FLAVOUR -X KUBE-FIREWALL",
        ] {
            flavoured(damage);
            assert!(backend.disturbed().unwrap(), "{damage}");
            assert_ne!(backend.verify().unwrap(), [], "{damage}");
            assert!(backend.sync(&at_localhost()).unwrap().objects_changed > 0);
            assert_eq!(backend.verify().unwrap(), [], "{damage}");
            assert_eq!(guards(&saved(flavour)), 4, "{damage}");
        }

        // Ours was first: kubelet finds all of it, and cleanup leaves it.
        flavoured(
            &OF_KUBELET
                .lines()
                .skip(1)
                .collect::<Vec<_>>()
                .join("\n")
                .replace(" -A ", " -C ")
                .replace(" -I ", " -C "),
        );
        backend.cleanup().unwrap();
        let left = saved(flavour);
        assert_eq!((guards(&left), left.matches("KUBE-").count()), (4, 4), "{left}");
        assert_eq!(on(), "1\n");
        // A change is read back by the chains it touched, this one among them.
        let mut plan = at_localhost();
        backend.sync(&plan).unwrap();
        let changed = set(&mut plan, service("c", 9, 2));
        backend.apply(&plan, &changed).unwrap();
        recorder.take_saves();
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(recorder.take_saves() > 0, flavour == Flavour::Legacy);
    });
}

/// What the tools print for pods that are told by their interface is what is written.
#[test]
fn pods_told_by_interface_are_adopted_too() {
    everywhere(|flavour| {
        let name = InterfaceName::new("veth").unwrap();
        for pods in [PodSources::Interface(name.clone()), PodSources::InterfacePrefix(name)] {
            let mut plan = three();
            plan.node.pods = Some(pods);
            let (mut backend, _) = open(flavour);
            assert!(backend.sync(&plan).unwrap().objects_changed > 0);
            assert_eq!(backend.verify().unwrap(), []);
            let (mut next, _) = open(flavour);
            assert_eq!(next.sync(&plan).unwrap().objects_changed, 0);
        }
    });
}
