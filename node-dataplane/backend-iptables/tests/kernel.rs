//! The backend against the real tools, in network namespaces that end with each test. Needs
//! root and iptables; fails without.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

mod support;

use std::sync::Arc;
use std::time::Duration;

use lockstep_backend_iptables::{detect, probe};
use lockstep_kernel::exec::{Processes, Run};
use lockstep_kernel::netns;
use lockstep_model::ServiceKey;
use lockstep_view::backend::Backend;
use lockstep_xtables::Flavour;
use support::*;

const FOREIGN: &str = "for t in iptables ip6tables; do
    $t-FLAVOUR -N KUBE-FIREWALL
    $t-FLAVOUR -A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
    $t-FLAVOUR -A INPUT -j KUBE-FIREWALL
    $t-FLAVOUR -t nat -N CNI-MINE
    $t-FLAVOUR -t nat -A POSTROUTING -m comment --comment mine -j CNI-MINE
    $t-FLAVOUR -t mangle -N KUBE-KUBELET-CANARY
    done";

fn foreign(flavour: Flavour) -> String {
    sh(&FOREIGN.replace("FLAVOUR", flavour.name()));
    saved(flavour)
}

#[test]
fn a_new_process_adopts_what_is_there() {
    everywhere(|flavour| {
        let plan = three();
        let (mut backend, recorder) = open(flavour);
        let applied = backend.sync(&plan).unwrap();
        assert!(applied.objects_changed > 0 && applied.failures.is_empty(), "{applied:?}");
        assert_eq!(recorder.take().len(), 2, "one restore per family");
        assert_eq!(backend.verify().unwrap(), []);
        let text = saved(flavour);
        assert!(text.contains(":KUBE-SVC-WWRFY3PZ7W3FGMQW - "), "{text}");

        let (mut next, recorder) = open(flavour);
        assert_eq!(next.sync(&plan).unwrap().objects_changed, 0);
        assert_eq!(recorder.take(), Vec::<String>::new(), "equal state is not written");
        assert_eq!(saved(flavour), text);
    });
}

/// What makes *verified* an honest word.
#[test]
fn the_read_back_tells_of_every_change_made_after_the_write() {
    let changes = [
        "iptables-FLAVOUR -t nat -F KUBE-SERVICES",
        "ip6tables-FLAVOUR -t nat -F KUBE-SVC-WWRFY3PZ7W3FGMQW",
        "iptables-FLAVOUR -t nat -A KUBE-SVC-WWRFY3PZ7W3FGMQW -j RETURN",
        "iptables-FLAVOUR -t nat -D PREROUTING 1",
        "ip6tables-FLAVOUR -t filter -F",
    ];
    for change in changes {
        everywhere(|flavour| {
            let (mut backend, _) = open(flavour);
            backend.sync(&three()).unwrap();
            assert_eq!(backend.verify().unwrap(), []);
            sh(&change.replace("FLAVOUR", flavour.name()));
            assert_ne!(backend.verify().unwrap(), [], "{flavour}: {change}");
        });
    }
}

/// In the nft flavour a change is read back without reading everything, and is read all the same.
#[test]
fn a_change_is_read_back_by_the_chains_it_touched() {
    everywhere(|flavour| {
        let (mut backend, recorder) = open(flavour);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        backend.verify().unwrap();
        recorder.take_saves();
        let whole = match flavour {
            Flavour::Nft => 0,
            Flavour::Legacy => 2, // both families
        };
        for (service, what) in [
            (service("a", 1, 2), "an endpoint goes"),
            (service("a", 1, 0), "all go, and lines of shared chains come and go"),
            (service("c", 9, 2), "a Service comes"),
        ] {
            let changed = set(&mut plan, service);
            backend.apply(&plan, &changed).unwrap();
            let before = saved(flavour);
            assert_eq!(backend.verify().unwrap(), [], "{flavour}: {what}");
            assert_eq!(recorder.take_saves(), whole, "{flavour}: {what}");
            assert_eq!(saved(flavour), before, "{flavour}: reading writes nothing");
        }
        let gone = ServiceKey::new("default", "c");
        plan.services.remove(&gone);
        backend.apply(&plan, &[gone]).unwrap();
        assert_eq!(
            (backend.verify().unwrap(), recorder.take_saves()),
            (Vec::new(), whole),
            "{flavour}: it goes"
        );
    });
}

#[test]
fn the_read_back_of_a_change_tells_of_every_change_to_it() {
    const SERVICE: &str = "KUBE-SVC-WWRFY3PZ7W3FGMQW";
    let lost =
        "line=$(iptables-FLAVOUR -t nat -S KUBE-SERVICES | grep default/nginx-basic: | sed 's/^-A/-D/');
        eval iptables-FLAVOUR -t nat $line";
    let endpoint = format!("iptables-FLAVOUR -t nat -S {SERVICE} | grep -o 'KUBE-SEP-.*'");
    let changes = [
        format!("iptables-FLAVOUR -t nat -F {SERVICE}"),
        format!("ip6tables-FLAVOUR -t nat -A {SERVICE} -j RETURN"),
        format!("iptables-FLAVOUR -t nat -F $({endpoint})"),
        "iptables-FLAVOUR -D FORWARD 1".to_owned(),
        "ip6tables-FLAVOUR -t nat -F KUBE-MARK-MASQ".to_owned(),
        lost.to_owned(),
    ];
    for change in changes {
        everywhere(|flavour| {
            let (mut backend, _) = open(flavour);
            let mut plan = three();
            set(&mut plan, service("nginx-basic", 3, 0));
            backend.sync(&plan).unwrap();
            let changed = set(&mut plan, service("nginx-basic", 3, 1));
            backend.apply(&plan, &changed).unwrap();
            assert_eq!(backend.verify().unwrap(), []);
            sh(&change.replace("FLAVOUR", flavour.name()));
            assert_ne!(backend.verify().unwrap(), [], "{flavour}: {change}");
        });
    }
}

#[test]
fn a_chain_that_should_be_gone_is_seen() {
    everywhere(|flavour| {
        let (mut backend, recorder) = open(flavour);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        let changed = set(&mut plan, service("a", 1, 2));
        recorder.take();
        backend.apply(&plan, &changed).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        let input = recorder.take().concat();
        let gone = input.lines().find_map(|line| line.strip_prefix("-X ")).unwrap();
        sh(&format!("iptables-{flavour} -t nat -N {gone}; ip6tables-{flavour} -t nat -N {gone}"));
        let drift = backend.verify().unwrap();
        assert!(drift.iter().any(|it| it.object.ends_with(gone) && it.fault == "still there"), "{drift:?}");
    });
}

#[test]
fn what_is_read_back_later_is_read_with_what_follows() {
    everywhere(|flavour| {
        let (mut backend, recorder) = open(flavour);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        // Chains go with the first change and are back with the second.
        for endpoints in [0, 2] {
            let changed = set(&mut plan, service("a", 1, endpoints));
            backend.apply(&plan, &changed).unwrap();
            assert!(backend.read_back_later());
        }
        let changed = set(&mut plan, service("nginx-basic", 3, 1));
        backend.apply(&plan, &changed).unwrap();
        recorder.take();
        recorder.take_saves();
        assert_eq!(backend.verify().unwrap(), []);
        let whole = if flavour == Flavour::Nft { 0 } else { 2 };
        assert_eq!(recorder.take_saves(), whole, "{flavour}: as cheap as one change");
        // A difference in what the first of two touched is found, and one in a chain that it deleted.
        let lost = |service: &str| {
            let shared = format!("iptables-{flavour} -t nat -S KUBE-SERVICES | grep default/{service}:");
            format!("eval iptables-{flavour} -t nat $({shared} | sed 's/^-A/-D/' | head -1)")
        };
        for (endpoints, damage) in [(1, Some(lost("a"))), (0, None)] {
            let changed = set(&mut plan, service("a", 1, endpoints));
            backend.apply(&plan, &changed).unwrap();
            let input = recorder.take().concat();
            assert!(backend.read_back_later());
            let changed = set(&mut plan, service("c", 9, 1 + endpoints));
            backend.apply(&plan, &changed).unwrap();
            recorder.take();
            let gone = input.lines().find_map(|line| line.strip_prefix("-X ")).unwrap();
            sh(&damage.clone().unwrap_or_else(|| format!("iptables-{flavour} -t nat -N {gone}")));
            assert_ne!(backend.verify().unwrap(), [], "{flavour}: {damage:?}");
            backend.sync(&plan).unwrap();
        }
        // Once read, it is read no more.
        let changed = set(&mut plan, service("nginx-basic", 3, 2));
        backend.apply(&plan, &changed).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        sh(&lost("c"));
        let changed = set(&mut plan, service("nginx-basic", 3, 3));
        backend.apply(&plan, &changed).unwrap();
        assert_eq!(backend.verify().unwrap(), [], "{flavour}: not what this write touched");
    });
}

#[test]
fn a_change_made_while_down_is_the_only_difference() {
    everywhere(|flavour| {
        let mut plan = three();
        open(flavour).0.sync(&plan).unwrap();
        set(&mut plan, service("a", 1, 4));
        plan.services.remove(&ServiceKey::new("default", "b"));
        let (mut next, recorder) = open(flavour);
        next.sync(&plan).unwrap();
        for input in recorder.take() {
            assert!(!input.contains("nginx-basic"), "{input}");
            assert!(input.contains("default/b:http has no endpoints"), "{input}");
        }
        assert_eq!(next.verify().unwrap(), []);
        let adopted = saved(flavour);
        next.cleanup().unwrap();
        next.sync(&plan).unwrap();
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort_unstable();
            lines
        };
        assert_eq!(sorted(&saved(flavour)), sorted(&adopted), "as if written at once");
    });
}

#[test]
fn foreign_rules_stay_and_cleanup_leaves_nothing() {
    everywhere(|flavour| {
        let before = foreign(flavour);
        let (mut backend, _) = open(flavour);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        let changed = set(&mut plan, service("c", 9, 2));
        backend.apply(&plan, &changed).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        assert!(backend.cleanup().unwrap() > 0);
        assert_eq!(saved(flavour), before);
        assert_eq!(backend.cleanup().unwrap(), 0);
    });
}

#[test]
fn one_poisoned_service_hurts_nobody_else() {
    everywhere(|flavour| {
        let (mut backend, _) = open(flavour);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        // The tools refuse a timeout of 0.
        let mut poison = service("poison", 7, 2);
        poison.ports[0].affinity_seconds = Some(0);
        let mut changed: Vec<ServiceKey> = set(&mut plan, poison).into();
        changed.extend(set(&mut plan, service("d", 8, 2)));
        changed.extend(set(&mut plan, service("a", 1, 5)));
        let applied = backend.apply(&plan, &changed).unwrap();
        let failed: Vec<&ServiceKey> = applied.failures.iter().map(|failure| &failure.service).collect();
        assert_eq!(failed, [&changed[0]], "{:?}", applied.failures);
        assert!(!applied.failures[0].previous_in_force);
        assert_eq!(backend.verify().unwrap(), []);
        let text = saved(flavour);
        assert!(text.contains("default/d:http cluster IP") && text.contains("10.244.1.5:8080"), "{text}");

        let (mut next, recorder) = open(flavour);
        let applied = next.sync(&plan).unwrap();
        assert_eq!((applied.objects_changed, applied.failures.len()), (0, 1), "{:?}", recorder.take());
        assert_eq!(saved(flavour), text);
    });
}

#[test]
fn a_chain_that_somebody_else_uses_is_left_to_them() {
    everywhere(|flavour| {
        let (mut backend, _) = open(flavour);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        let mine = format!("iptables-{flavour} -t nat -A PREROUTING -j KUBE-SVC-WWRFY3PZ7W3FGMQW");
        sh(&mine);
        let mut changed = vec![ServiceKey::new("default", "nginx-basic")];
        plan.services.remove(&changed[0]);
        changed.extend(set(&mut plan, service("d", 8, 2)));
        let applied = backend.apply(&plan, &changed).unwrap();
        assert_eq!(applied.failures.len(), 1, "{:?}", applied.failures);
        assert_eq!(applied.failures[0].service, changed[0]);
        assert!(applied.failures[0].previous_in_force);
        assert!(saved(flavour).contains("10.244.3.1:8080"), "still whole");
        assert!(saved(flavour).contains("default/d:http cluster IP"), "the other is there");
        sh(&mine.replace("-A", "-D"));
        let applied = backend.sync(&plan).unwrap();
        assert_eq!(applied.failures, []);
        assert!(!saved(flavour).contains("nginx-basic"));
        assert_eq!(backend.verify().unwrap(), []);
    });
}

#[test]
fn drift_is_found_and_mended() {
    everywhere(|flavour| {
        let (mut backend, _) = open(flavour);
        let plan = three();
        backend.sync(&plan).unwrap();
        let whole = saved(flavour);
        assert!(!backend.disturbed().unwrap(), "our own write is no disturbance");
        for damage in [
            "iptables-FLAVOUR -t nat -F KUBE-SVC-WWRFY3PZ7W3FGMQW",
            "ip6tables-FLAVOUR -t nat -F",
            "iptables-FLAVOUR -D FORWARD 1",
            "iptables-FLAVOUR -t nat -A KUBE-SERVICES -j RETURN",
            "ip6tables-FLAVOUR -F KUBE-SERVICES",
        ] {
            sh(&damage.replace("FLAVOUR", flavour.name()));
            assert!(backend.disturbed().unwrap(), "{damage}");
            let mut drift = Vec::new();
            loop {
                let audit = backend.audit(Duration::from_secs(1)).unwrap();
                drift.extend(audit.drift);
                if audit.completed {
                    break;
                }
            }
            assert!(!drift.is_empty(), "{damage}");
            assert!(backend.sync(&plan).unwrap().objects_changed > 0, "{damage}");
            assert_eq!(backend.verify().unwrap(), [], "{damage}");
        }
        assert_eq!(saved(flavour), whole);
    });
}

#[test]
fn what_others_do_while_we_write_is_not_taken_for_ours() {
    netns::run_in_new(|| {
        let (mut backend, recorder) = open(Flavour::Nft);
        let mut plan = three();
        backend.sync(&plan).unwrap();
        for (endpoints, command, disturbs) in [
            (4, "true", false),
            (3, "iptables-nft -t nat -N CNI-MINE", false),
            (4, "iptables-nft -t nat -F KUBE-SVC-WWRFY3PZ7W3FGMQW", true),
        ] {
            let changed = set(&mut plan, service("a", 1, endpoints));
            *recorder.beside.lock().unwrap() = Some(command.to_owned());
            backend.apply(&plan, &changed).unwrap();
            assert_eq!(backend.verify().unwrap(), [], "{command}: not what was touched");
            assert_eq!(backend.disturbed().unwrap(), disturbs, "{command}");
        }
    })
    .expect("these tests make network namespaces and need root");
}

/// Neither the size of the table nor the number of its entries tells of it.
#[test]
fn a_jump_that_is_moved_to_another_built_in_chain_disturbs() {
    everywhere(|flavour| {
        let (mut backend, _) = open(flavour);
        backend.sync(&three()).unwrap();
        assert!(!backend.disturbed().unwrap());
        sh(&format!(
            "rule=$(iptables-{flavour} -S OUTPUT | grep -m1 KUBE-SERVICES | sed 's/^-A OUTPUT //')
            printf '*filter\n-D OUTPUT %s\n-A INPUT %s\nCOMMIT\n' \"$rule\" \"$rule\" |
                iptables-{flavour}-restore --noflush"
        ));
        assert!(backend.disturbed().unwrap(), "{flavour}");
    });
}

#[test]
fn input_is_as_large_as_the_change() {
    everywhere(|flavour| {
        let sizes = [100, 2000].map(|count| {
            let (mut backend, recorder) = open(flavour);
            let services = (0..count).map(|index| service(&format!("s{index:04}"), index + 1, 2));
            let mut plan = plan(services);
            backend.sync(&plan).unwrap();
            recorder.take();
            let changed = set(&mut plan, service("s0050", 51, 3));
            backend.apply(&plan, &changed).unwrap();
            let bytes: usize = recorder.take().iter().map(String::len).sum();
            backend.cleanup().unwrap();
            bytes
        });
        assert_eq!(sizes[0], sizes[1]);
        assert!(sizes[0] < 6_000, "{sizes:?}");
    });
}

#[test]
fn the_flavour_in_use_is_taken() {
    netns::run_in_new(|| {
        let run: Arc<dyn Run> = Arc::new(Processes);
        for flavour in Flavour::ALL {
            probe(&run, flavour).unwrap();
        }
        assert_eq!(saved(Flavour::Nft).matches("LOCKSTEP").count(), 0);
        sh("iptables-legacy -A INPUT -j ACCEPT");
        assert_eq!(detect(&run).unwrap().flavour, Flavour::Legacy);
        sh("iptables-nft -t mangle -N KUBE-IPTABLES-HINT");
        let choice = detect(&run).unwrap();
        assert_eq!(choice.flavour, Flavour::Nft);
        assert_eq!(choice.reason, "kubelet's hint chains are in nft");
    })
    .expect("these tests make network namespaces and need root");
}

#[test]
fn what_others_do_elsewhere_does_not_disturb() {
    netns::run_in_new(|| {
        let (mut backend, _) = open(Flavour::Nft);
        backend.sync(&three()).unwrap();
        foreign(Flavour::Nft);
        assert!(backend.disturbed().unwrap(), "a jump was put before ours");
        for harmless in [
            "iptables-nft -t nat -A CNI-MINE -j RETURN",
            "iptables-nft -t mangle -A FORWARD -j RETURN",
            "nft add table inet mine; nft add chain inet mine KUBE-SERVICES",
        ] {
            sh(harmless);
            assert!(!backend.disturbed().unwrap(), "{harmless}");
        }
        sh("iptables-nft -t nat -F KUBE-SVC-WWRFY3PZ7W3FGMQW");
        assert!(backend.disturbed().unwrap());
        assert!(!backend.disturbed().unwrap(), "said once");
    })
    .expect("these tests make network namespaces and need root");
}
