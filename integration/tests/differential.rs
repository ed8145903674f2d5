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
use lockstep_integration::product::Mode;
use lockstep_integration::scenario::{self, ALWAYS, Proxy, Scenario, cases};

/// Scenarios that are played at the same time. In the guest a change takes kube-proxy that long that
/// many must share one.
const AT_ONCE: u8 = 4;
const AT_ONCE_IN_THE_GUEST: u8 = 56;

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
        let scenario = Scenario::read(&case.path, case.family)?;
        let is_played = |mode: &Mode| {
            kube_proxy::families(*mode).contains(&case.family) && scenario.is_decided(Proxy::KubeProxy, *mode)
        };
        if modes.iter().all(is_played) {
            played.push(case);
        }
    }
    let cluster = KubeProxyCluster::start(3, 2, ALWAYS)?;
    let at_once = if guest::is_here() { AT_ONCE_IN_THE_GUEST } else { AT_ONCE };
    Ok(scenario::play_all(&played, cluster.shares(at_once)?))
}
