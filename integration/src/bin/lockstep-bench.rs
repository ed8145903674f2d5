//! Measures Lockstep against raw limits and prints the table; exits with 1 where one is missed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use lockstep_integration::bench::report::{Report, text};
use lockstep_integration::bench::{brain, median, memory, node, ratio};

const USAGE: &str =
    "usage: lockstep-bench [node] [control-plane] [memory]   (all where none is named; needs root)";
/// Sizes over which a time must not grow.
const SIZES: [u32; 3] = [1_000, 10_000, 30_000];

fn main() -> Result<ExitCode> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(other) = wanted.iter().find(|it| !["node", "control-plane", "memory"].contains(&it.as_str()))
    {
        bail!("{other}: unknown part\n{USAGE}");
    }
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|it| it == part);
    let mut report = Report::default();
    if wants("node") {
        on_node(&mut report)?;
    }
    if wants("control-plane") {
        in_control_plane(&mut report)?;
    }
    if wants("memory") {
        in_memory(&mut report);
    }
    let mut out = std::io::stdout().lock();
    write!(out, "{}", report.table())?;
    out.flush()?;
    Ok(if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn on_node(report: &mut Report) -> Result<()> {
    let mut swaps = Vec::new();
    for services in SIZES {
        let main = services == 10_000;
        let (loads, bursts) = if main { (7, 15) } else { (1, 0) };
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
            let (burst, limit) = (median(&measured.burst.lockstep), median(&measured.burst.raw));
            let detail = format!(" ({} : {})", text(burst), text(limit));
            report.at_most("burst of 1,000 endpoints, 10,000 x 10", ratio(burst, limit), 2.0, "x", &detail);
        }
        let work = format!("one endpoint replaced, {services} x 10, p50");
        let detail = format!(" ({} : {})", text(swap), text(raw));
        report.at_most(work, ratio(swap, raw), 5.0, "x", &detail);
    }
    flat(report, "one endpoint replaced", &swaps);
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
    flat(report, "event to frame", &times);
    Ok(())
}

/// The time at the largest size against the one at the smallest.
fn flat(report: &mut Report, work: &str, times: &[std::time::Duration]) {
    if let [first, .., last] = times {
        report.at_most(format!("{work}, 30,000 against 1,000 services"), ratio(*last, *first), 1.5, "x", "");
    }
}

fn in_memory(report: &mut Report) {
    match binaries().and_then(|binaries| memory::measure(10_000, &binaries)) {
        Ok(memory) => {
            let peak = |(_, peak): (f64, f64)| format!(" (peak {peak:.0} MiB)");
            let agent = memory.agent;
            report.at_most("agent RSS after load, 10,000 x 10", agent.0, 64.0, " MiB", &peak(agent));
            let control_plane = memory.control_plane;
            let work = "control plane RSS after load, 10,000 x 10";
            report.at_most(work, control_plane.0, 128.0, " MiB", &peak(control_plane));
        }
        Err(error) => report.missed("agent and control plane RSS after load", format!("{error:#}")),
    }
}

/// Builds both programs where cargo runs this one. They are beside it.
fn binaries() -> Result<PathBuf> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let built = Command::new(cargo)
            .args(["build", "--release", "--package", "lockstep-control-plane", "--package", "lockstep-node"])
            .status()
            .context("cargo")?;
        ensure!(built.success(), "the programs do not build");
    }
    let this = std::env::current_exe()?;
    Ok(this.parent().map(Path::to_path_buf).unwrap_or_default())
}
