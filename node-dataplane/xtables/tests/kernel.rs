//! Fixed chains, their removal and the watch against the real tools. Needs root and iptables; fails
//! without.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::process::Command;
use std::sync::Arc;

use lockstep_kernel::exec::{Processes, Run};
use lockstep_kernel::netns;
use lockstep_model::Family;
use lockstep_xtables::{FixedChains, Flavour, Jumps, Table, Tool, Watch, can, probe, remove};

fn everywhere(test: impl Fn(Flavour) + Sync) {
    for flavour in Flavour::ALL {
        netns::run_in_new(|| test(flavour)).expect("these tests make network namespaces and need root");
    }
}

fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Everything in both families, without what changes by itself.
fn saved(flavour: Flavour) -> String {
    let all = sh(&format!("iptables-{flavour}-save; ip6tables-{flavour}-save"));
    all.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
}

fn sample() -> FixedChains {
    let rules = |all: &[&str]| all.iter().map(|rule| (*rule).to_owned()).collect::<Vec<_>>();
    let jump = "-m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES";
    let at = |table, chain, jump| Jumps { table, chain, rules: rules(&[jump]) };
    FixedChains {
        chains: vec![
            (Table::Nat, "KUBE-MARK-MASQ", rules(&["-j MARK --set-xmark 0x4000/0x4000"])),
            (
                Table::Nat,
                "KUBE-SERVICES",
                rules(&["-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ", "-p tcp -j ACCEPT"]),
            ),
            (Table::Filter, "KUBE-NODE-PORT", rules(&["-p tcp -m tcp --dport 32001 -j ACCEPT"])),
            (Table::Mangle, "KUBE-IPVS-OUT-FILTER", rules(&["-m mark --mark 0x4000/0x4000 -j RETURN"])),
        ],
        others: Vec::new(),
        jumps: vec![
            at(Table::Nat, "PREROUTING", jump),
            at(Table::Nat, "OUTPUT", jump),
            at(Table::Filter, "INPUT", "-j KUBE-NODE-PORT"),
            at(Table::Mangle, "OUTPUT", "-j KUBE-IPVS-OUT-FILTER"),
        ],
    }
}

fn is_kubes(_: Table, chain: &str) -> bool {
    chain.starts_with("KUBE-")
}

#[test]
fn fixed_chains_are_written_read_back_and_removed_among_others() {
    everywhere(|flavour| {
        let run: Arc<dyn Run> = Arc::new(Processes);
        probe(&run, flavour, &[]).unwrap();
        // Another mode's content under the same names, and somebody else's rules.
        for command in [
            "-t nat -N KUBE-SERVICES",
            "-t nat -N KUBE-SVC-A",
            "-t nat -N KUBE-MARK-MASQ",
            "-t nat -A KUBE-SERVICES -j KUBE-SVC-A",
            "-t nat -A KUBE-SVC-A -j KUBE-MARK-MASQ",
            "-t nat -A PREROUTING -j KUBE-SVC-A",
            "-t nat -A OUTPUT -m comment --comment old -j KUBE-SERVICES",
            "-t filter -N THEIRS",
            "-t filter -A INPUT -j THEIRS",
            "-t mangle -A OUTPUT -j RETURN",
        ] {
            sh(&format!("iptables-{flavour} {command}; ip6tables-{flavour} {command}"));
        }
        let fixed = sample();
        for family in Family::ALL {
            let tool = Tool::new(Arc::clone(&run), flavour, family);
            assert!(can(&tool, Table::Mangle, "-j RETURN").unwrap());
            assert!(!can(&tool, Table::Filter, "-j NOSUCHTARGET").unwrap());
            assert!(!fixed.read_back(&tool).unwrap().is_empty());
            assert!(fixed.ensure(&tool).unwrap() > 0);
            assert_eq!(fixed.read_back(&tool).unwrap(), [], "{flavour} {family:?}");
            assert_eq!(fixed.ensure(&tool).unwrap(), 0, "the tools print what was written");
        }
        // The other mode goes, what is shared with it stays.
        let others = |table: Table, chain: &str| {
            is_kubes(table, chain) && !sample().places().iter().any(|(of, own)| *of == table && *own == chain)
        };
        assert_eq!(remove(&run, flavour, &others).unwrap(), 6, "a chain, its rule and a jump per family");
        for family in Family::ALL {
            let tool = Tool::new(Arc::clone(&run), flavour, family);
            assert_eq!(fixed.read_back(&tool).unwrap(), []);
        }
        assert!(!saved(flavour).contains("KUBE-SVC-A"));
        // Everything goes but what somebody else made.
        remove(&run, flavour, &is_kubes).unwrap();
        let rest = saved(flavour);
        assert!(!rest.contains("KUBE-") && !rest.contains("LOCKSTEP"), "{rest}");
        assert_eq!(rest.matches("-A INPUT -j THEIRS").count(), 2, "{rest}");
        assert_eq!(rest.matches("-A OUTPUT -j RETURN").count(), 2, "{rest}");
    });
}

#[test]
fn damage_is_seen_and_mended() {
    everywhere(|flavour| {
        let fixed = sample();
        let tool = Tool::new(Arc::new(Processes), flavour, Family::V4);
        let mut watch = Watch::new(flavour, &Table::ALL, is_kubes);
        fixed.ensure(&tool).unwrap();
        watch.settle();
        for (damage, object) in [
            ("-t nat -F KUBE-SERVICES", "iptables nat chain KUBE-SERVICES"),
            ("-t filter -D INPUT -j KUBE-NODE-PORT", "iptables filter chain INPUT"),
            ("-t mangle -A KUBE-IPVS-OUT-FILTER -j DROP", "iptables mangle chain KUBE-IPVS-OUT-FILTER"),
        ] {
            sh(&format!("iptables-{flavour} {damage}"));
            // A built-in chain is not among those that this watch was told of.
            assert_eq!(watch.look(), flavour == Flavour::Legacy || !damage.contains("INPUT"), "{damage}");
            let drift = fixed.read_back(&tool).unwrap();
            assert_eq!(drift.iter().map(|drift| drift.object.as_str()).collect::<Vec<_>>(), [object]);
            assert!(fixed.ensure(&tool).unwrap() > 0);
            watch.settle();
            assert!(!watch.look());
            assert_eq!(fixed.read_back(&tool).unwrap(), [], "{damage}");
        }
        // Of what happens in chains of all, what others have there for their pods is no sign.
        sh(&format!("iptables-{flavour} -t nat -A POSTROUTING -s 10.244.0.8 -j MASQUERADE"));
        let mut watch = Watch::new(flavour, &Table::ALL, |_, _| true);
        watch.settle();
        let legacy = flavour == Flavour::Legacy;
        for (line, is_sign) in [
            ("-t nat -A POSTROUTING -s 10.244.0.9 -j MASQUERADE", legacy),
            ("-t nat -D POSTROUTING -s 10.244.0.9 -j MASQUERADE", legacy),
            ("-t filter -D INPUT -j KUBE-NODE-PORT", true),
        ] {
            sh(&format!("iptables-{flavour} {line}"));
            assert_eq!(watch.look(), is_sign, "{line}");
        }
        fixed.ensure(&tool).unwrap();
        watch.settle();
        sh(&format!("iptables-{flavour} -t filter -F INPUT"));
        assert!(watch.look(), "our jump is gone");
    });
}
