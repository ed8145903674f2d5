//! Connections under sustained load while everything around them fails and changes: one node in
//! each mode that this kernel is sure to have, clients inside and outside. Needs root.
#![allow(clippy::print_stdout, reason = "what was measured belongs in the report")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{
    roll, roll_manifest, started, streams_to_roll, streams_to_web, web, web_pods,
};
use lockstep_integration::guest::{bearable, patient};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::load::{Load, Report, Stream};
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::traffic::Conversation;

/// Connections a second, all streams together.
const RATE: u32 = 200;
/// With more time than this from one connection to the next, the machine was too busy to show anything.
const APART: Duration = Duration::from_millis(20);
/// Connections that each stream makes between two events.
const BETWEEN: usize = 4;
const ROUNDS: u8 = 6;

/// Ends the load and fails unless every connection was answered by the right pod.
fn judge(load: Load) -> Result<Report> {
    let (report, rate) = load.finish()?;
    report.ensure_perfect()?;
    let slowest = report.answers.iter().map(|answer| answer.took).max().unwrap_or_default();
    println!(
        "{} connections at {rate:.0} a second, none lost or misdelivered, no SYN sent twice; slowest {slowest:.0?}",
        report.answers.len()
    );
    let apart = Duration::from_secs_f64(1.0 / rate);
    ensure!(apart <= patient(APART), "{rate:.0} connections a second are too few to show anything");
    Ok(report)
}

fn everything(product: &Product) -> Vec<Stream> {
    let mut streams = streams_to_web(product);
    streams.extend(streams_to_roll(product));
    streams
}

/// Endpoints of `roll` in a round: all second pods but one. Returns the one that is out.
fn roll_to(product: &Product, round: u8) -> Result<Place> {
    let pods = |node| Place::Pod(node, 2);
    let out = pods(1 + round % product.lab.nodes());
    let stay: Vec<Place> = (1..=product.lab.nodes()).map(pods).filter(|pod| *pod != out).collect();
    product.write_manifest("roll.yaml", &roll_manifest(&stay))?;
    Ok(out)
}

#[test]
fn agents_killed_and_restarted_lose_no_connection() -> Result<()> {
    let mut product = started(&Mode::here())?;
    let load = Load::start(&product.lab, streams_to_web(&product), bearable(RATE));
    for round in 0..ROUNDS {
        let node = 1 + round % product.lab.nodes();
        product.agent(node)?.kill()?;
        load.go_on(BETWEEN)?;
        product.start_agent(node)?;
        load.go_on(BETWEEN)?;
    }
    product.wait_verified(0)?;
    judge(load).map(drop)
}

#[test]
fn control_plane_killed_and_restarted_loses_no_connection() -> Result<()> {
    let mut product = started(&Mode::here())?;
    let load = Load::start(&product.lab, streams_to_web(&product), bearable(RATE));
    for _ in 0..3 {
        product.control_plane()?.kill()?;
        load.go_on(BETWEEN)?;
        product.start_control_plane()?;
        load.go_on(BETWEEN)?;
        product.wait_verified(1)?;
    }
    judge(load).map(drop)
}

#[test]
fn modes_switched_while_endpoints_roll_lose_no_connection() -> Result<()> {
    let mut product = started(&Mode::here())?;
    product.change(|product| roll_to(product, 0).map(drop))?;
    // The endpoint of some of these will leave: who is talking to it goes on.
    let mut open = conversations(&product)?;
    let load = Load::start(&product.lab, everything(&product), bearable(RATE));
    let all = Mode::here();
    let mut modes = all.clone();
    for round in 1..=2 * product.lab.nodes() {
        let node = 1 + round % product.lab.nodes();
        // Twice around, so that every node leaves and enters two modes.
        let mode = &mut modes[usize::from(node) - 1];
        let next = all.iter().position(|known| known == mode).unwrap_or_default() + 1;
        *mode = all[next % all.len()];
        product.set_mode(node, *mode);
        // One half ends as in an upgrade, the other as in a crash.
        if round % 2 == 0 {
            product.agent(node)?.terminate()?;
        } else {
            product.agent(node)?.kill()?;
        }
        load.go_on(BETWEEN)?;
        product.start_agent(node)?;
        // Verified is when the rules of the other mode are gone.
        product.change(|product| roll_to(product, round).map(drop))?;
        load.go_on(BETWEEN)?;
        open.iter_mut().try_for_each(|(from, to, open)| {
            open.go_on()
                .with_context(|| format!("round {round}: {from} -> {to}, node {node} is now {mode:?}"))
        })?;
    }
    let talked_to: BTreeSet<Place> = open.iter().map(|(.., open)| open.with).collect();
    println!("{} connections stayed open, with {talked_to:?}", open.len());
    judge(load).map(drop)
}

/// Open connections from everywhere a client can be, to `web` and `roll`.
fn conversations(product: &Product) -> Result<Vec<(Place, SocketAddr, Conversation)>> {
    let mut open = Vec::new();
    let nodes = (1..=product.lab.nodes()).flat_map(|node| [Place::Pod(node, 1), Place::Node(node)]);
    for from in nodes.chain([Place::Outside]) {
        // Two each: with luck they have different endpoints.
        for to in [web(Family::V4), web(Family::V6), roll(), roll()] {
            open.push((from, to, Conversation::begin(&product.lab, from, to)?));
        }
    }
    Ok(open)
}

#[test]
fn changes_to_one_service_lose_no_connection_to_it_or_to_another() -> Result<()> {
    let product = started(&Mode::here())?;
    product.change(|product| roll_to(product, 0).map(drop))?;
    let load = Load::start(&product.lab, everything(&product), bearable(RATE));
    for round in 1..=ROUNDS {
        roll_to(&product, round)?;
        load.go_on(BETWEEN)?;
    }
    judge(load).map(drop)
}

#[test]
fn everything_killed_while_endpoints_roll_loses_no_connection() -> Result<()> {
    let mut product = started(&Mode::here())?;
    product.change(|product| roll_to(product, 0).map(drop))?;
    let load = Load::start(&product.lab, everything(&product), bearable(RATE));
    for round in 1..=ROUNDS {
        let node = 1 + round % product.lab.nodes();
        roll_to(&product, round)?;
        product.agent(node)?.kill()?;
        if round % 2 == 0 {
            product.control_plane()?.kill()?;
        }
        load.go_on(BETWEEN)?;
        // The agent is first: where there is no control plane yet, it goes by its cache.
        product.start_agent(node)?;
        if round % 2 == 0 {
            product.start_control_plane()?;
        }
        load.go_on(BETWEEN)?;
    }
    let out = roll_to(&product, ROUNDS + 1)?;
    let converged = Instant::now();
    product.wait_verified(1)?;
    println!("verified everywhere {:.0?} after the last change", converged.elapsed());
    load.go_on(BETWEEN)?;
    let report = judge(load)?;
    ensure!(
        report.answers.iter().any(|answer| web_pods(&product).contains(&answer.by)),
        "nobody reached web"
    );
    ensure!(report.answers.iter().any(|answer| answer.by == out), "{out} was an endpoint and got nothing");
    Ok(())
}

#[test]
fn after_wait_returns_no_new_connection_reaches_a_removed_endpoint() -> Result<()> {
    let product = started(&Mode::here())?;
    product.change(|product| roll_to(product, 0).map(drop))?;
    let load = Load::start(&product.lab, streams_to_roll(&product), bearable(RATE));
    // From when to when which pod must not be reached.
    let mut absences: Vec<(Instant, Instant, Place)> = Vec::new();
    let mut waits = Vec::new();
    for round in 1..=2 * ROUNDS {
        let mut out = None;
        product.take_in(|product| roll_to(product, round).map(|pod| out = Some(pod)))?;
        let asked = Instant::now();
        let wait =
            product.ctl(&["wait", "default/roll", "--level", "verified", "--timeout", "120s"])?.output()?;
        let gone = Instant::now();
        ensure!(wait.status.success(), "wait: {}", String::from_utf8_lossy(&wait.stderr));
        waits.push(asked.elapsed());
        load.go_on(BETWEEN)?;
        absences.extend(out.map(|pod| (gone, Instant::now(), pod)));
    }
    let report = judge(load)?;
    let mut looked_at = 0;
    for (gone, back, pod) in absences {
        let meanwhile = report.answers.iter().filter(|answer| answer.begun > gone && answer.begun < back);
        for answer in meanwhile {
            looked_at += 1;
            ensure!(answer.by != pod, "{pod} was reached {:?} after wait returned", answer.begun - gone);
        }
    }
    let longest = waits.into_iter().max().unwrap_or_default();
    println!("{looked_at} connections begun after a wait returned; longest wait {longest:.0?}");
    ensure!(looked_at > 100, "only {looked_at} connections were begun after a wait returned");
    ensure!(longest < patient(Duration::from_secs(30)), "a wait took {longest:?}");
    Ok(())
}
