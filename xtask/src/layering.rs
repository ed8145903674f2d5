//! The arrows between crates, as ARCHITECTURE.md states them.

use std::path::Path;

use crate::process::{Failure, cargo, output, root};

/// `(user, used)`: directly or through others, `user` must not be built with `used`.
const FORBIDDEN: &[(&str, &str)] = &[
    ("lockstep-view", "lockstep-kernel"),
    ("lockstep-view", "lockstep-wire"),
    ("lockstep-backend-nftables", "lockstep-backend-iptables"),
    ("lockstep-backend-iptables", "lockstep-backend-nftables"),
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

/// A crate of the workspace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    /// The directory at the top that it is in: `proto`.
    pub(crate) part: String,
    /// Its name.
    pub(crate) name: String,
}

/// Crates of the workspace, sorted.
pub(crate) fn packages() -> Result<Vec<Package>, Failure> {
    let list =
        output(cargo().args(["tree", "--workspace", "--depth", "0", "--prefix", "none", "--format", "{p}"]))?;
    let mut packages: Vec<Package> = list.lines().filter_map(|line| package(line, &root())).collect();
    packages.sort();
    packages.dedup();
    Ok(packages)
}

/// Reads `lockstep-model v0.1.0 (/somewhere/proto/model)`.
fn package(line: &str, root: &Path) -> Option<Package> {
    let directory = Path::new(line.split_once(" (")?.1.split(')').next()?);
    let part = directory.strip_prefix(root).ok()?.components().next()?;
    Some(Package { part: part.as_os_str().to_string_lossy().into_owned(), name: name(line)?.to_owned() })
}

/// True where every arrow is allowed.
pub(crate) fn check(packages: &[Package]) -> Result<bool, Failure> {
    let mut good = true;
    for Package { name: package, .. } in packages {
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
    use std::path::Path;

    use super::{Package, faults, package};

    #[test]
    fn a_crate_is_known_by_name_and_part() {
        let found = package("lockstep-model v0.1.0 (/src/proto/model)", Path::new("/src"));
        assert_eq!(found, Some(Package { part: "proto".to_owned(), name: "lockstep-model".to_owned() }));
        assert_eq!(package("serde v1.0.0", Path::new("/src")), None);
    }

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
    }
}
