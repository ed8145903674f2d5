//! Node ports at loopback addresses: the guard and `route_localnet`, with both in memory.

use std::path::PathBuf;
use std::time::Duration;

use lockstep_kernel::sysctl::Tree;
use lockstep_view::backend::Applied;

use super::*;

/// Sysctls in a directory of this test's own, which goes with the value.
struct Sysctls(PathBuf);

impl Sysctls {
    const KEY: &str = "net/ipv4/conf/all/route_localnet";

    fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("lockstep-{name}-{}", std::process::id()));
        let this = Self(root);
        std::fs::create_dir_all(this.0.join("net/ipv4/conf/all")).unwrap();
        this.set("0");
        this
    }

    fn set(&self, value: &str) {
        std::fs::write(self.0.join(Self::KEY), format!("{value}\n")).unwrap();
    }

    fn get(&self) -> String {
        std::fs::read_to_string(self.0.join(Self::KEY)).unwrap().trim().to_owned()
    }

    fn open(&self, fake: &Arc<Fake>) -> Iptables {
        Iptables::open_on(Arc::clone(fake) as Arc<dyn Run>, Flavour::Legacy, Tree::at(&self.0)).unwrap()
    }
}

impl Drop for Sysctls {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn at_localhost() -> ForwardingPlan {
    let mut plan = plan([
        service("web", load_balancer(&["10.244.0.5"], &[], [CLUSTER_MASQUERADED; 3])),
        service("inner", vec![simple(1).ports.remove(0)]),
    ]);
    plan.node.localhost_node_ports = true;
    plan
}

#[test]
fn the_sysctl_is_set_by_whoever_has_read_the_guard_back() {
    let (fake, sysctls) = (Arc::new(Fake::default()), Sysctls::new("guard"));
    let mut backend = sysctls.open(&fake);
    assert_eq!(backend.describe().localhost_node_ports, Ok(()));
    assert_eq!(sysctls.get(), "0", "opening writes nothing");
    fake.refuse(Some("block incoming localnet"));
    // IPv6 is written.
    assert_eq!(backend.sync(&at_localhost()).unwrap().failures.len(), 2);
    assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "0"), "no guard, no sysctl");
    fake.refuse(None);
    assert_eq!(backend.sync(&at_localhost()).unwrap().failures, []);
    assert_eq!(sysctls.get(), "0", "what is written is not yet what is there");
    assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "1"));
    assert_eq!(backend.sync(&at_localhost()).unwrap().objects_changed, 0);
    // A plan without them leaves both as they are: others may count on them by now.
    assert_eq!(backend.sync(&plan([])).unwrap().failures, []);
    assert_eq!((sysctls.get().as_str(), fake.rules().contains("block incoming localnet")), ("1", true));
}

#[test]
fn no_change_opens_a_loopback_whose_guard_others_took_away() {
    for damage in [
        "-D INPUT -j KUBE-FIREWALL".to_owned(),
        format!("-D KUBE-FIREWALL {}", guard::RULE),
        "-I KUBE-FIREWALL -i eth1 -j RETURN".to_owned(),
    ] {
        let (fake, sysctls) = (Arc::new(Fake::default()), Sysctls::new("taken"));
        let mut backend = sysctls.open(&fake);
        backend.sync(&at_localhost()).unwrap();
        assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "1"));
        let input = format!("*filter\n{damage}\nCOMMIT\n");
        fake.run("iptables-legacy-restore", &[], input.as_bytes(), Duration::ZERO).unwrap();
        sysctls.set("0");
        let mut plan = at_localhost();
        let inner = service("inner", vec![simple(2).ports.remove(0)]);
        plan.services.insert(inner.key.clone(), Arc::new(inner.clone()));
        backend.apply(&plan, &[inner.key]).unwrap();
        assert_eq!(backend.verify().unwrap().len(), 1, "{damage}");
        assert_eq!(sysctls.get(), "0", "{damage}");
        assert!(backend.disturbed().unwrap(), "{damage}: nobody waits with this");
        assert!(backend.sync(&plan).unwrap().objects_changed > 0, "{damage}");
        assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "1"), "{damage}");
    }
}

#[test]
fn a_sysctl_that_others_turn_off_is_found_and_turned_on_again() {
    let (fake, sysctls) = (Arc::new(Fake::default()), Sysctls::new("drift"));
    let mut backend = sysctls.open(&fake);
    let audited = |backend: &mut Iptables| -> Vec<String> {
        let steps = [(); 2].map(|()| backend.audit(Duration::from_secs(3600)).unwrap().drift);
        steps.iter().flatten().map(ToString::to_string).collect()
    };
    backend.sync(&at_localhost()).unwrap();
    assert_eq!(backend.verify().unwrap(), []);
    sysctls.set("0");
    assert_eq!(audited(&mut backend), [format!("sysctl {}: 0 instead of 1", Sysctls::KEY)]);
    assert_eq!(backend.sync(&at_localhost()).unwrap().objects_changed, 1);
    assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "1"));
    // Where there are none, nobody looks.
    backend.sync(&plan([])).unwrap();
    sysctls.set("0");
    assert_eq!((backend.verify().unwrap(), audited(&mut backend)), (Vec::new(), Vec::new()));
    assert_eq!(sysctls.get(), "0");
}

fn failed(applied: &Applied) -> Vec<(String, bool)> {
    applied.failures.iter().map(|it| (it.service.to_string(), it.previous_in_force)).collect()
}

#[test]
fn a_sysctl_that_cannot_be_written_concerns_services_with_node_ports_alone() {
    let (fake, sysctls) = (Arc::new(Fake::default()), Sysctls::new("gone"));
    let mut backend = sysctls.open(&fake);
    std::fs::remove_file(sysctls.0.join(Sysctls::KEY)).unwrap();
    let why = backend.describe().localhost_node_ports.unwrap_err();
    assert!(why.contains(Sysctls::KEY), "{why}");
    // It could be written when the plan was made.
    let applied = backend.sync(&at_localhost()).unwrap();
    assert_eq!(failed(&applied), [("default/web".to_owned(), true)]);
    let message = &applied.failures[0].message;
    assert!(message.starts_with("its node ports do not answer at 127.0.0.1: sysctl net/"), "{message}");
    assert_eq!(backend.verify().unwrap(), [], "the rules are in force, and the rest is said");
    sysctls.set("0");
    assert_eq!(backend.apply(&at_localhost(), &[]).unwrap().failures, [], "the next write tries again");
    assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "1"));
}

/// Nothing counts as verified that is not in force and not said to be so.
#[test]
fn a_sysctl_that_only_looks_writable_is_told_before_anything_is_verified() {
    let (fake, sysctls) = (Arc::new(Fake::default()), Sysctls::new("looks"));
    let path = sysctls.0.join(Sysctls::KEY);
    std::fs::remove_file(&path).unwrap();
    // It can be opened for writing, and the kernel takes no second mapping.
    std::os::unix::fs::symlink("/proc/self/uid_map", &path).unwrap();
    let mut backend = sysctls.open(&fake);
    assert_eq!(failed(&backend.sync(&at_localhost()).unwrap()), []);
    let drift: Vec<String> = backend.verify().unwrap().iter().map(ToString::to_string).collect();
    assert!(drift.len() == 1 && drift[0].contains("write 1"), "{drift:?}");
    assert_eq!(failed(&backend.sync(&at_localhost()).unwrap()), [("default/web".to_owned(), true)]);
    assert_eq!(backend.verify().unwrap(), [], "said");
    std::fs::remove_file(&path).unwrap();
    sysctls.set("0");
    backend.apply(&at_localhost(), &[]).unwrap();
    assert_eq!((backend.verify().unwrap(), sysctls.get().as_str()), (Vec::new(), "1"));
    assert_eq!(failed(&backend.apply(&at_localhost(), &[]).unwrap()), []);
}
