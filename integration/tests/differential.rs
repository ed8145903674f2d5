//! Every scenario with the real kube-proxy in the place of Lockstep: what a scenario expects is
//! what kube-proxy does, or the scenario says which difference it is. Needs root.
//!
//! One API server; all modes of kube-proxy watch it at the same time. Arguments choose, as with
//! the scenarios: those cases run whose name (`IPv4/cluster-ip`) has all of them in it.

#![allow(clippy::print_stdout, reason = "its report is its output")]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use lockstep_integration::guest;
use lockstep_integration::kube_proxy;
use lockstep_integration::kube_proxy_cluster::KubeProxyCluster;
use lockstep_integration::scenario::{self, ALWAYS, cases};

/// Scenarios that are played at the same time.
const AT_ONCE: u8 = 4;
/// The same in the guest, where a change takes kube-proxy so long that many must share one.
const AT_ONCE_IN_THE_GUEST: u8 = 16;
/// What the guest does not play, unless it is asked for by name: the last two name an address of a node,
/// which a kube-proxy in IPVS mode then takes for its own on every node, and no other scenario could go on.
const NOT_IN_THE_GUEST: [&str; 3] = ["dual-stack", "external-ip-of-a-node", "external-ip-of-a-node-refused"];

fn main() -> ExitCode {
    let filters: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let start = Instant::now();
    let (passed, failed) = match play_all(&filters) {
        Ok(counts) => counts,
        Err(error) => {
            println!("kube-proxy: {error:#}");
            println!("test kube-proxy ... FAILED");
            (0, 1)
        }
    };
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; finished in {:.1}s",
        start.elapsed().as_secs_f64()
    );
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Returns how many passed and failed.
fn play_all(filters: &[String]) -> Result<(usize, usize)> {
    let modes = KubeProxyCluster::modes();
    let mut played = Vec::new();
    for case in cases("kube-proxy/", filters)? {
        let stem = case.path.file_stem().unwrap_or_default().to_string_lossy();
        if guest::is_here() && filters.is_empty() && NOT_IN_THE_GUEST.contains(&stem.as_ref()) {
            continue;
        }
        if modes.iter().all(|mode| kube_proxy::families(*mode).contains(&case.family)) {
            played.push(case);
        }
    }
    let cluster = KubeProxyCluster::start(3, 2, ALWAYS)?;
    let at_once = if guest::is_here() { AT_ONCE_IN_THE_GUEST } else { AT_ONCE };
    let at_once = at_once.min(u8::try_from(played.len()).unwrap_or(at_once));
    Ok(scenario::play_all(&played, cluster.shares(at_once)?))
}
