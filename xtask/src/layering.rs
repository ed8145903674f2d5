//! The arrows between crates, as ARCHITECTURE.md states them.

use crate::process::{Failure, cargo, output};

/// `(user, used)`: directly or through others, `user` must not be built with `used`.
const FORBIDDEN: &[(&str, &str)] = &[
    ("lockstep-view", "lockstep-kernel"),
    ("lockstep-view", "lockstep-wire"),
    ("lockstep-view", "lockstep-xtables"),
    ("lockstep-kernel", "lockstep-xtables"),
    ("lockstep-xtables", "lockstep-backend-nftables"),
    ("lockstep-xtables", "lockstep-backend-iptables"),
    ("lockstep-xtables", "lockstep-backend-ipvs"),
    ("lockstep-backend-nftables", "lockstep-xtables"),
    ("lockstep-backend-nftables", "lockstep-backend-iptables"),
    ("lockstep-backend-nftables", "lockstep-backend-ipvs"),
    ("lockstep-backend-iptables", "lockstep-backend-nftables"),
    ("lockstep-backend-iptables", "lockstep-backend-ipvs"),
    ("lockstep-backend-ipvs", "lockstep-backend-nftables"),
    ("lockstep-backend-ipvs", "lockstep-backend-iptables"),
    ("lockstep-store", "lockstep-wire"),
    ("lockstep-store", "tokio"),
    ("lockstep-server", "kube"),
    ("lockstep-server", "k8s-openapi"),
    ("lockstep-server", "lockstep-source"),
    ("lockstep-client", "lockstep-kernel"),
    ("lockstep-model", "prost"),
];

/// Crates that stand at the top: nothing of the product uses them.
const TOPS: &[&str] = &["lockstep-control-plane", "lockstep-node"];
/// Tests and benchmarks of the whole may use everything.
const ABOVE_TOPS: &[&str] = &["lockstep-integration"];

/// Crates of the workspace, sorted.
pub(crate) fn packages() -> Result<Vec<String>, Failure> {
    let list =
        output(cargo().args(["tree", "--workspace", "--depth", "0", "--prefix", "none", "--format", "{p}"]))?;
    let mut packages: Vec<String> = list.lines().filter_map(name).map(str::to_owned).collect();
    packages.sort();
    packages.dedup();
    Ok(packages)
}

/// True where every arrow is allowed.
pub(crate) fn check(packages: &[String]) -> Result<bool, Failure> {
    let mut good = true;
    for package in packages {
        let tree = output(cargo().args([
            "tree",
            "--package",
            package,
            "--edges",
            "normal,build",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ]))?;
        let used: Vec<&str> = tree.lines().filter_map(name).filter(|used| used != package).collect();
        for fault in faults(package, &used) {
            eprintln!("tidy: {fault}; see ARCHITECTURE.md");
            good = false;
        }
    }
    Ok(good)
}

fn faults(package: &str, used: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    for (user, target) in FORBIDDEN {
        if *user == package && used.contains(target) {
            faults.push(format!("{user} must not use {target}"));
        }
    }
    for top in TOPS {
        if used.contains(top) && !ABOVE_TOPS.contains(&package) {
            faults.push(format!("{package} must not use {top}"));
        }
    }
    if package == "xtask" && !used.is_empty() {
        faults.push("xtask must have no dependencies".to_owned());
    }
    faults
}

fn name(line: &str) -> Option<&str> {
    line.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::faults;

    #[test]
    fn a_forbidden_arrow_is_found() {
        assert_eq!(
            faults("lockstep-store", &["blake3", "lockstep-wire"]),
            ["lockstep-store must not use lockstep-wire"]
        );
    }

    #[test]
    fn nothing_uses_a_top_but_the_tests_of_the_whole() {
        assert_eq!(faults("lockstep-server", &["lockstep-node"]).len(), 1);
        assert!(faults("lockstep-integration", &["lockstep-node"]).is_empty());
    }

    #[test]
    fn an_allowed_arrow_is_allowed() {
        assert!(faults("lockstep-server", &["lockstep-wire", "lockstep-store"]).is_empty());
        assert!(faults("lockstep-backend-ipvs", &["lockstep-xtables", "lockstep-kernel"]).is_empty());
    }
}
