//! Measures Lockstep against raw limits and prints the table; exits with 1 where one is missed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lockstep_integration::bench::memory::Stages;
use lockstep_integration::bench::node::Times;
use lockstep_integration::bench::report::{Report, text};
use lockstep_integration::bench::{brain, drift, iptables, ipvs, kube_proxy, median, memory, node, ratio};
use lockstep_xtables::Flavour;

const USAGE: &str = "usage: lockstep-bench [PART...]   (all where none is named; needs root)
parts: node, iptables, control-plane, memory, drift
       lockstep-bench ipvs   (needs a kernel with IPVS: `cargo xtask vm` has one)
       lockstep-bench kube-proxy [--services N,...] [--mode MODE,...] [--changes N] [--rounds N]
needs the real programs: `cargo xtask bench kube-proxy` builds them";
const PARTS: [&str; 5] = ["node", "iptables", "control-plane", "memory", "drift"];
const AUTOGROUP: &str = "/proc/self/autogroup";
/// Sizes over which a time must not grow.
const SIZES: [u32; 3] = [1_000, 10_000, 30_000];

fn main() -> Result<ExitCode> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let beside_kube_proxy = match wanted.split_first() {
        Some((part, options)) if part == "kube-proxy" => {
            Some(kube_proxy::Options::read(options).with_context(|| USAGE)?)
        }
        _ => None,
    };
    let in_ipvs = wanted == ["ipvs"];
    if beside_kube_proxy.is_none()
        && !in_ipvs
        && let Some(other) = wanted.iter().find(|it| !PARTS.contains(&it.as_str()))
    {
        bail!("{other}: unknown part\n{USAGE}");
    }
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|it| it == part);
    let _priority = Priority::highest();
    let mut report = Report::default();
    if wants("node") {
        on_node(&mut report)?;
    }
    if wants("iptables") {
        in_iptables_mode(&mut report)?;
    }
    if wants("control-plane") {
        in_control_plane(&mut report)?;
    }
    if wants("memory") || wants("drift") {
        let binaries = binaries()?;
        if wants("memory") {
            in_memory(&mut report, &binaries);
        }
        if wants("drift") {
            in_drift(&mut report, &binaries);
        }
    }
    if in_ipvs {
        in_ipvs_mode(&mut report)?;
    }
    if let Some(options) = beside_kube_proxy {
        kube_proxy::run(&mut report, &options)?;
    }
    let mut out = std::io::stdout().lock();
    write!(out, "{}", report.table())?;
    out.flush()?;
    Ok(if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The session's share of the CPU, as it was before.
struct Priority(Option<String>);

impl Priority {
    /// Others on this machine then disturb less; where it is not granted, they just do.
    fn highest() -> Self {
        let this = std::process::id().to_string();
        let _ = Command::new("renice").args(["-n", "-20", "-p", &this]).stdout(Stdio::null()).status();
        // With autogroups, that counts among the programs of one session only.
        let before = std::fs::read_to_string(AUTOGROUP).ok();
        let before = before.and_then(|text| Some(text.trim().rsplit_once(' ')?.1.to_owned()));
        let _ = std::fs::write(AUTOGROUP, "-20");
        Self(before)
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Whoever comes after in this session has more than before, at worst.
            let _ = std::fs::write(AUTOGROUP, before);
        }
    }
}

fn on_node(report: &mut Report) -> Result<()> {
    let mut swaps = Vec::new();
    for services in SIZES {
        let main = services == 10_000;
        let (loads, bursts) = if main { (7, 61) } else { (1, 0) };
        let measured = node::measure(services, loads, 300, bursts)
            .with_context(|| format!("node, {services} services"))?;
        let (swap, raw) = (median(&measured.swap.lockstep), median(&measured.swap.raw));
        swaps.push(swap);
        if main {
            let (full, limit) = (median(&measured.full.lockstep), median(&measured.full.raw));
            let planning = text(median(&measured.planning));
            let detail = format!(
                " ({} : {}, planning {planning}, {} elements)",
                text(full),
                text(limit),
                measured.elements
            );
            report.at_most("full programming, 10,000 x 10", ratio(full, limit), 1.5, "x", &detail);
            let raw = &measured.raw_alone;
            let alone = format!(
                "; raw back to back {}, in the order of the map {}",
                text(median(&raw.scattered)),
                text(median(&raw.in_order))
            );
            burst(report, "100 Services, 10,000 x 10", &measured.dense, "");
            burst(report, "1,000 Services, 10,000 x 10", &measured.spread, &alone);
        }
        let work = format!("one endpoint replaced, {services} x 10, p50");
        let detail = format!(" ({} : {})", text(swap), text(raw));
        report.at_most(work, ratio(swap, raw), 5.0, "x", &detail);
    }
    flat(report, "one endpoint replaced, 30,000 against 1,000 services", &swaps);
    Ok(())
}

/// A burst starts where its bytes are received. What comes after the session is shown by itself,
/// because that is where full programming starts.
fn burst(report: &mut Report, of: &str, burst: &Times, alone: &str) {
    let raw = median(&burst.raw);
    let programming = median(&burst.programming());
    let node::Stages { session, view, backend } = &burst.stages;
    let detail = format!(
        " ({} : {}; planning {}, backend {})",
        text(programming),
        text(raw),
        text(median(view)),
        text(median(backend))
    );
    let work = format!("burst of 1,000 endpoints of {of}, decoded to committed");
    report.at_most(work, ratio(programming, raw), 2.0, "x", &detail);
    let whole = median(&burst.lockstep);
    let detail = format!(" ({} : {}; session {}{alone})", text(whole), text(raw), text(median(session)));
    let work = format!("burst of 1,000 endpoints of {of}, received to committed");
    report.at_most(work, ratio(whole, raw), 2.0, "x", &detail);
}

fn in_ipvs_mode(report: &mut Report) -> Result<()> {
    let mut swaps = Vec::new();
    for (services, loads, count) in [(1_000, 3, 200), (10_000, 0, 200)] {
        let measured =
            ipvs::measure(services, loads, count).with_context(|| format!("IPVS, {services} services"))?;
        let (full, limit) = (median(&measured.full.lockstep), median(&measured.full.raw));
        let detail = format!(" ({} : {}, {} virtual servers)", text(full), text(limit), measured.servers);
        let work = format!("IPVS: full programming, {services} x 10");
        report.at_most(work, ratio(full, limit), 2.0, "x", &detail);
        let (swap, raw) = (median(&measured.swap.lockstep), median(&measured.swap.raw));
        swaps.push(swap);
        let node::Stages { session, view, backend } = &measured.swap.stages;
        let detail = format!(
            " ({} : {}, where connections are cut {}; session {}, planning {}, backend {}, and reading back {})",
            text(swap),
            text(raw),
            text(median(&measured.cut)),
            text(median(session)),
            text(median(view)),
            text(median(backend)),
            text(median(&measured.verify.lockstep))
        );
        let work = format!("IPVS: one endpoint replaced, {services} x 10, p50");
        report.at_most(work, ratio(swap, raw), 5.0, "x", &detail);
    }
    flat(report, "IPVS: one endpoint replaced, 10,000 against 1,000 services", &swaps);
    Ok(())
}

fn in_iptables_mode(report: &mut Report) -> Result<()> {
    for flavour in [Flavour::Legacy, Flavour::Nft] {
        let (mut inputs, mut verifies) = (Vec::new(), Vec::new());
        for services in [100, 1_000, 5_000] {
            let loads = if services > 1_000 { 1 } else { 5 };
            let measured = iptables::measure(services, flavour, loads, 5)
                .with_context(|| format!("iptables {flavour}, {services} services"))?;
            let full = iptables::median(measured.full);
            let change = iptables::median(measured.change);
            inputs.push(change.bytes);
            verifies.push(median(&measured.verify));
            for (work, share) in [("full programming", full), ("one endpoint replaced", change)] {
                let detail = format!(" ({} of {})", text(share.own), text(share.total));
                let work = format!("iptables-{flavour}: {work}, {services} x 10, our own share");
                report.at_most(work, share.percent(), 10.0, " %", &detail);
            }
        }
        if let [small, .., large] = inputs[..] {
            let growth = f64::from(u32::try_from(large)?) / f64::from(u32::try_from(small)?);
            let work = format!("iptables-{flavour}: input for one endpoint, largest against 100 services");
            report.at_most(work, growth, 1.5, "x", &format!(" ({large} : {small} bytes)"));
        }
        // The kernel of the legacy flavour hands out whole tables only.
        if let (Flavour::Nft, [small, .., large]) = (flavour, &verifies[..]) {
            let work = "iptables-nft: one endpoint read back, largest against 100 services";
            let detail = format!(" ({} : {})", text(*large), text(*small));
            report.at_most(work, ratio(*large, *small), 3.0, "x", &detail);
        }
    }
    Ok(())
}

fn in_control_plane(report: &mut Report) -> Result<()> {
    let mut times = Vec::new();
    for services in SIZES {
        let time = median(&brain::measure(services, 1000)?);
        times.push(time);
        let work = format!("event to frame, {services} x 10, p50");
        report.at_most(work, time.as_secs_f64() * 1000.0, 1.0, " ms", "");
    }
    flat(report, "event to frame, 30,000 against 1,000 services", &times);
    Ok(())
}

/// The time at the largest size against the one at the smallest.
fn flat(report: &mut Report, work: &str, times: &[Duration]) {
    if let [first, .., last] = times {
        report.at_most(work.to_owned(), ratio(*last, *first), 1.5, "x", "");
    }
}

fn in_memory(report: &mut Report, binaries: &Path) {
    let memory = match memory::measure(10_000, binaries) {
        Ok(memory) => memory,
        Err(error) => return report.missed("agent and control plane RSS", format!("{error:#}")),
    };
    for (program, limit, stages) in
        [("agent", 64.0, memory.agent), ("control plane", 128.0, memory.control_plane)]
    {
        let peak = format!(" (peak {:.0} MiB)", stages.load.peak);
        let work = format!("{program} RSS after load, 10,000 x 10");
        report.at_most(work, stages.load.now, limit, " MiB", &peak);
        let Stages { burst, after_burst, .. } = stages;
        let detail = format!(" (right after {:.0} MiB, peak {:.0} MiB)", burst.now, after_burst.peak);
        let work = format!("{program} RSS after a burst of 10,000 endpoints, 10,000 x 10");
        report.at_most(work, after_burst.now, limit, " MiB", &detail);
    }
}

/// Times of repairs, the longest of each kind.
fn in_drift(report: &mut Report, binaries: &Path) {
    let mut repairs = match drift::measure(10_000, binaries, 5) {
        Ok(repairs) => repairs,
        Err(error) => return report.missed("repair of foreign changes", format!("{error:#}")),
    };
    repairs.sort_by_key(|repair| (repair.change, repair.reported));
    for kind in repairs.chunk_by(|a, b| a.change == b.change) {
        let (median, Some(longest)) = (&kind[kind.len() / 2], kind.last()) else { continue };
        let detail = format!(
            " (median {}, in the kernel after {}; nft itself {})",
            text(median.reported),
            text(median.repaired),
            text(median.tool)
        );
        let work =
            format!("{}, 10,000 x 10: until repaired and reported, longest of {}", median.change, kind.len());
        report.at_most(work, longest.reported.as_secs_f64(), 1.0, " s", &detail);
    }
}

/// Builds both programs where cargo runs this one. They are beside it.
fn binaries() -> Result<PathBuf> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let built = Command::new(cargo)
            .args(["build", "--release", "--workspace", "--bins"])
            .status()
            .context("cargo")?;
        ensure!(built.success(), "the programs do not build");
    }
    let this = std::env::current_exe()?;
    Ok(this.parent().map(Path::to_path_buf).unwrap_or_default())
}
