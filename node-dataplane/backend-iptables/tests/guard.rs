//! The guard of the loopback and `route_localnet`, and pods that are told by their interface, against
//! the real tools. Needs root and iptables; fails without.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

mod support;

use lockstep_view::backend::Backend;
use lockstep_view::{ForwardingPlan, InterfaceName, PodSources};
use lockstep_xtables::Flavour;
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
            "iptables-FLAVOUR -F KUBE-FIREWALL; iptables-FLAVOUR -F INPUT; echo 0 >/proc/sys/net/ipv4/conf/all/route_localnet",
            "iptables-FLAVOUR -F OUTPUT; iptables-FLAVOUR -F INPUT; iptables-FLAVOUR -F KUBE-FIREWALL; iptables-FLAVOUR -X KUBE-FIREWALL",
        ] {
            flavoured(damage);
            assert!(backend.disturbed().unwrap(), "{damage}");
            assert_ne!(backend.verify().unwrap(), [], "{damage}");
            assert!(backend.sync(&at_localhost()).unwrap().objects_changed > 0);
            assert_eq!(backend.verify().unwrap(), [], "{damage}");
            assert_eq!((guards(&saved(flavour)), on().as_str()), (4, "1\n"), "{damage}");
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

#[test]
fn no_change_sets_the_sysctl_while_the_guard_is_gone() {
    everywhere(|flavour| {
        let (mut backend, _) = open(flavour);
        let mut plan = at_localhost();
        backend.sync(&plan).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        sh(&format!("iptables-{flavour} -F KUBE-FIREWALL; echo 0 >{ROUTE_LOCALNET}"));
        let changed = set(&mut plan, service("c", 9, 2));
        backend.apply(&plan, &changed).unwrap();
        assert_eq!(std::fs::read_to_string(ROUTE_LOCALNET).unwrap(), "0\n", "the write");
        assert_ne!(backend.verify().unwrap(), []);
        assert_eq!(std::fs::read_to_string(ROUTE_LOCALNET).unwrap(), "0\n", "the read-back");
        assert!(backend.disturbed().unwrap());
        backend.sync(&plan).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(std::fs::read_to_string(ROUTE_LOCALNET).unwrap(), "1\n");
    });
}

/// Whatever stands in its chain before the rule of the guard may not take packets past it.
#[test]
fn the_guard_is_put_before_what_lets_packets_by() {
    everywhere(|flavour| {
        let lines = |chain: &str| -> Vec<String> {
            let all = sh(&format!("iptables-{flavour} -S {chain} 2>/dev/null"));
            all.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
        };
        sh(&format!(
            "iptables-{flavour} -N KUBE-FIREWALL; iptables-{flavour} -A KUBE-FIREWALL -i eth1 -j RETURN"
        ));
        let (mut backend, _) = open(flavour);
        backend.sync(&at_localhost()).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        let guarded = lines("KUBE-FIREWALL");
        assert!(guarded.len() == 2 && guarded[0].ends_with("-j DROP"), "{guarded:?}");
        sh(&format!("iptables-{flavour} -I KUBE-FIREWALL -i eth2 -j ACCEPT"));
        let drift = backend.verify().unwrap();
        assert!(drift.len() == 1 && drift[0].fault == "lets packets by: -i eth2 -j ACCEPT", "{drift:?}");
        backend.sync(&at_localhost()).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        let guarded = lines("KUBE-FIREWALL");
        assert!(guarded.len() == 3 && guarded[0].ends_with("-j DROP"), "moved, not doubled: {guarded:?}");
        // In INPUT others' order stands.
        sh(&format!("iptables-{flavour} -I INPUT -i eth1 -j ACCEPT"));
        let before = lines("INPUT");
        assert_eq!(backend.sync(&at_localhost()).unwrap().objects_changed, 0);
        assert_eq!((lines("INPUT"), backend.verify().unwrap()), (before, Vec::new()));
    });
}

/// Both start at boot: whatever kubelet does between a read and a write of ours, all of it stays, and
/// nothing is there twice.
#[test]
fn kubelet_may_come_at_the_same_moment() {
    const MARKED: &str = "iptables-FLAVOUR -A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP";
    everywhere(|flavour| {
        let flavoured = |script: &str| script.replace("FLAVOUR", flavour.name());
        let whole = flavoured(&format!("{OF_KUBELET}\n{MARKED}"));
        let but_the_chain = whole.lines().skip(1).collect::<Vec<_>>().join("\n");
        type Moment = fn(&Recorder, String);
        let moments: [(Moment, &String); 2] = [
            // Between our first look and the making of the chain.
            (|recorder, script| *recorder.behind_save.lock().unwrap() = Some(script), &whole),
            // When we have made the chain, and wrote nothing into it yet.
            (|recorder, script| *recorder.beside.lock().unwrap() = Some(script), &but_the_chain),
        ];
        for (set_up, script) in moments {
            let (mut backend, recorder) = open(flavour);
            // Then nothing is to be written for IPv6, which has its own thread.
            backend.sync(&at_localhost()).unwrap();
            sh(&format!("iptables-{flavour} -F; iptables-{flavour} -X"));
            set_up(&recorder, script.clone());
            backend.sync(&at_localhost()).unwrap();
            assert_eq!(backend.verify().unwrap(), []);
            let all = saved(flavour);
            let count = |text: &str| all.matches(text).count();
            assert_eq!((count("-j KUBE-FIREWALL"), count("-A KUBE-FIREWALL")), (2, 2), "{script}\n{all}");
            assert_eq!(count("-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP"), 1, "{script}\n{all}");
        }
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
