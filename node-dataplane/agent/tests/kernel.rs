//! The loop, the stream and a real kernel together: each mode in a network namespace that ends
//! with its test. Needs root, nft and iptables; fails without.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

mod support;

use std::time::{Duration, Instant};

use lockstep_node::config::{IptablesFlavour, Mode};
use lockstep_node::mode;
use support::{Agent, ControlPlane, in_namespace, sh, until};

/// What a host already has, which is nobody's business but its own.
const FOREIGN: &str = "nft 'add table ip foreign; add chain ip foreign c; add rule ip foreign c counter';
    iptables-legacy -A INPUT -s 192.0.2.7 -j DROP; iptables-nft -A INPUT -s 192.0.2.8 -j DROP;
    for flavour in legacy nft; do iptables-$flavour -t nat -A POSTROUTING -s 192.0.2.9 -j RETURN; done";

struct Flavour {
    mode: Mode,
    flavour: IptablesFlavour,
    /// Prints what is in the kernel, without what changes by itself.
    dump: &'static str,
    /// Somebody else breaks it.
    disturb: &'static str,
    /// Most objects that a replaced endpoint is.
    replaced: u64,
    /// How long a repair may take.
    repair: Duration,
}

const NFTABLES: Flavour = Flavour {
    mode: Mode::Nftables,
    flavour: IptablesFlavour::Auto,
    dump: "nft -s list ruleset",
    disturb: "nft flush map ip lockstep frontends",
    replaced: 2,
    repair: Duration::from_secs(1),
};

const LEGACY: Flavour = Flavour {
    mode: Mode::Iptables,
    flavour: IptablesFlavour::Legacy,
    dump: "iptables-legacy-save | grep -v '^#' | sed 's/\\[.*//'",
    disturb: "iptables-legacy -t nat -F KUBE-SERVICES",
    replaced: 10,
    repair: Duration::from_secs(10),
};

const NFT: Flavour = Flavour {
    mode: Mode::Iptables,
    flavour: IptablesFlavour::Nft,
    dump: "iptables-nft-save | grep -v '^#' | sed 's/\\[.*//'",
    disturb: "iptables-nft -t nat -F KUBE-SERVICES",
    replaced: 10,
    repair: Duration::from_secs(10),
};

#[test]
fn nftables_from_the_stream_to_the_kernel_and_back() {
    in_namespace(|| whole_life(&NFTABLES));
}

#[test]
fn iptables_legacy_from_the_stream_to_the_kernel_and_back() {
    in_namespace(|| whole_life(&LEGACY));
}

#[test]
fn iptables_nft_from_the_stream_to_the_kernel_and_back() {
    in_namespace(|| whole_life(&NFT));
}

fn whole_life(flavour: &Flavour) {
    sh(FOREIGN);
    let untouched = sh(flavour.dump);
    let directory = tempfile::tempdir().unwrap();
    let control_plane = ControlPlane::start();
    let start = || Agent::start(flavour.mode, flavour.flavour, directory.path(), control_plane.address);

    // Nothing is written before the first complete state.
    let agent = start();
    until("the control plane to say that it has nothing yet", || agent.was_turned_away());
    assert_eq!(sh(flavour.dump), untouched);
    (1..6).for_each(|index| control_plane.service(index, &[1, 2, 3]));
    control_plane.synced();
    agent.is_verified_at(control_plane.seq());
    let objects = agent.objects();
    assert!(objects > flavour.replaced, "{objects} objects");
    for index in 1..6 {
        assert!(sh(flavour.dump).contains(&format!("10.244.{index}.3")));
    }

    // A change is what it touches.
    control_plane.service(2, &[1, 2, 9]);
    agent.is_verified_at(control_plane.seq());
    let changed = agent.objects() - objects;
    assert!((1..=flavour.replaced).contains(&changed), "{changed} objects for one endpoint");
    let programmed = sh(flavour.dump);
    assert!(programmed.contains("10.244.2.9") && !programmed.contains("10.244.2.3"));

    // A restart adopts what is there.
    agent.stop();
    assert_eq!(sh(flavour.dump), programmed, "the rules stay when the agent goes");
    let agent = start();
    agent.is_verified_at(control_plane.seq());
    assert_eq!(agent.objects(), 0, "adopting is not writing");
    assert_eq!(sh(flavour.dump), programmed);

    // What changed while it was away is all that it writes.
    agent.stop();
    control_plane.service(4, &[1, 2, 8]);
    let agent = start();
    agent.is_verified_at(control_plane.seq());
    assert!((1..=flavour.replaced).contains(&agent.objects()), "{} objects", agent.objects());
    let programmed = sh(flavour.dump);
    assert!(programmed.contains("10.244.4.8") && !programmed.contains("10.244.4.3"));

    // Drift is repaired and counted.
    sh(flavour.disturb);
    let disturbed = Instant::now();
    until("the repair", || agent.repairs() == 1);
    assert!(disturbed.elapsed() < flavour.repair, "repaired after {:?}", disturbed.elapsed());
    agent.is_verified_at(control_plane.seq());
    assert_eq!(sorted(&sh(flavour.dump)), sorted(&programmed));

    // The control plane goes, the rules stay; cleanup leaves what others made.
    drop(control_plane);
    until("the loss to be noticed", || !agent.status.snapshot().connected);
    assert_eq!(sorted(&sh(flavour.dump)), sorted(&programmed));
    agent.stop();
    let removed: usize =
        mode::remove(flavour.mode, &[]).into_iter().map(|(_, outcome)| outcome.unwrap()).sum();
    assert!(removed > 0);
    assert_eq!(sh(flavour.dump), untouched);
}

/// Line by line, in no order: a repaired rule may stand elsewhere among its equals.
fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}
