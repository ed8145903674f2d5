//! What was measured, against what is aimed at.

use std::time::Duration;

use super::{COUNTED, Duel, Times};
use crate::bench::report::{Report, text};
use crate::bench::{median, ratio};
use crate::kube_proxy::PROMPT;
use crate::product::Mode;

/// The size that the goals of nftables mode are for.
const GOALS_FOR: u32 = 10_000;
/// Two medians of connections that nothing tells apart differ by this much from run to run.
const NOISE: f64 = 1.05;

/// How many times less Lockstep is to take. `None` = shown, and nothing is asked of it.
struct Goals {
    beside: Option<f64>,
    cold: Option<f64>,
    change: Option<f64>,
    worst: Option<f64>,
    cpu: Option<f64>,
    node: Option<f64>,
    control_plane: Option<f64>,
    connects: bool,
}

fn goals(mode: Mode, services: u32) -> Goals {
    let of = |times: f64| match mode {
        Mode::Nftables => Some(times).filter(|_| services == GOALS_FOR),
        // The tool decides there; we are not to be the slower one.
        Mode::IptablesLegacy | Mode::IptablesNft | Mode::Ipvs => Some(1.0),
    };
    Goals {
        beside: of(20.0),
        cold: of(4.0),
        change: of(200.0),
        worst: of(100.0),
        cpu: of(10.0),
        node: of(10.0),
        control_plane: of(4.0),
        connects: of(1.0).is_some(),
    }
}

/// Adds the lines of one mode and size.
pub(super) fn judge(report: &mut Report, duel: &Duel) {
    let Duel { services, mode, kube_proxy, lockstep } = duel;
    let goals = goals(*mode, *services);
    let mut line = |work: &str, goal: Option<f64>, theirs: f64, ours: f64, unit: &str| {
        let work = format!("{}, {services} x 10: {work}", mode.name());
        let detail = format!(" less (kube-proxy {theirs:.1}{unit}, Lockstep {ours:.1}{unit})");
        let times = theirs / ours.max(f64::MIN_POSITIVE);
        match goal {
            Some(goal) => report.at_least(work, times, goal, "x", &detail),
            None => report.shown(work, format!("{times:.2}x{detail}")),
        }
    };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let cold = ms(median(&kube_proxy.cold));
    line("node started -> last Service reachable", goals.beside, cold, ms(median(&lockstep.beside)), " ms");
    line("control plane and node started -> the same", goals.cold, cold, ms(median(&lockstep.cold)), " ms");
    let (theirs, ours) = (&kube_proxy.change, &lockstep.change);
    let changed = "endpoint changed -> connection at the new one";
    line(
        &format!("{changed}, p50 of {}", ours.len()),
        goals.change,
        ms(median(theirs)),
        ms(median(ours)),
        " ms",
    );
    line(&format!("{changed}, worst"), goals.worst, ms(worst(theirs)), ms(worst(ours)), " ms");
    let cpu = format!("CPU of {COUNTED} endpoint changes, control plane included");
    line(&cpu, goals.cpu, ms(kube_proxy.cpu), ms(lockstep.cpu), " ms");
    line("peak RSS of the node's process", goals.node, kube_proxy.peaks.0, lockstep.peaks.0, " MiB");
    if let Some(peak) = lockstep.peaks.1 {
        let work = "peak RSS of the control plane, against kube-proxy's";
        line(work, goals.control_plane, kube_proxy.peaks.0, peak, " MiB");
    }
    for (at, which) in ["first", "last"].into_iter().enumerate() {
        let (theirs, ours) = (median(&kube_proxy.connects[at]), median(&lockstep.connects[at]));
        let work = format!("{}, {services} x 10: new connection to the {which} Service, p50", mode.name());
        let detail = format!(" of kube-proxy's ({} : {})", text(ours), text(theirs));
        if goals.connects {
            report.at_most(work, ratio(ours, theirs), NOISE, "x", &detail);
        } else {
            report.shown(work, format!("{:.2}x{detail}", ratio(ours, theirs)));
        }
    }
}

/// Adds what kube-proxy does with a shorter period, beside nothing of ours.
pub(super) fn prompt(report: &mut Report, services: u32, times: &Times) {
    report.shown(
        format!("kube-proxy with minSyncPeriod {PROMPT}, nftables, {services} x 10"),
        format!(
            "start {}, endpoint changed p50 {} and worst {}, CPU of {COUNTED} changes {}, peak RSS {:.1} MiB",
            text(times.cold.first().copied().unwrap_or_default()),
            text(median(&times.change)),
            text(worst(&times.change)),
            text(times.cpu),
            times.peaks.0
        ),
    );
}

fn worst(times: &[Duration]) -> Duration {
    times.iter().max().copied().unwrap_or_default()
}
