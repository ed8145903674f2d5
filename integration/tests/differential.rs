//! Every scenario with the real kube-proxy in the place of Lockstep: what a scenario expects is
//! what kube-proxy does, or the scenario says which difference it is. Needs root.
//!
//! One API server; all modes of kube-proxy watch it at the same time. Arguments choose, as with
//! the scenarios: those cases run whose name (`IPv4/cluster-ip`) has all of them in it.

#![allow(clippy::print_stdout, reason = "its report is its output")]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Result;
use lockstep_integration::kube_proxy_cluster::KubeProxyCluster;
use lockstep_integration::scenario::{ALWAYS, Case, Scenario, cases};

/// Scenarios that are played at the same time. They have nothing in common, so they do not
/// disturb each other, and while one waits for kube-proxy another sends packets.
const AT_ONCE: u8 = 4;

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
    let cases = cases("", filters)?;
    let cluster = KubeProxyCluster::start(3, 2, ALWAYS)?;
    // The two families of one scenario have names and node ports in common.
    let turns: BTreeMap<_, _> = cases.iter().map(|case| (case.path.clone(), Mutex::new(()))).collect();
    let (next, passed, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let players: Vec<_> = (1..=AT_ONCE)
            .map(|number| {
                let (cluster, cases, turns) = (&cluster, &cases, &turns);
                let (next, passed, failed) = (&next, &passed, &failed);
                scope.spawn(move || -> Result<()> {
                    let mut share = cluster.share(number)?;
                    while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let turn = turns[&case.path].lock();
                        let result = play(case, &mut share);
                        drop(turn);
                        let counter = if result.is_ok() { passed } else { failed };
                        counter.fetch_add(1, Ordering::Relaxed);
                        report(case, result);
                    }
                    Ok(())
                })
            })
            .collect();
        players
            .into_iter()
            .try_for_each(|player| player.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok((passed.into_inner(), failed.into_inner()))
}

fn play(case: &Case, share: &mut lockstep_integration::kube_proxy_cluster::Share<'_>) -> Result<()> {
    Scenario::read(&case.path, case.family)?.play(share)
}

fn report(case: &Case, result: Result<()>) {
    match result {
        Ok(()) => println!("test kube-proxy/{} ... ok", case.name),
        Err(error) => {
            println!("kube-proxy/{}: {error:#}\ntest kube-proxy/{} ... FAILED", case.name, case.name);
        }
    }
}
