//! A node that goes from one mode to another, any two that this kernel is sure to have: connections
//! go on, new ones find an endpoint at any moment, and nothing of the old mode decides about a new one
//! any more. Needs root.
#![allow(clippy::print_stdout, reason = "what was measured belongs in the report")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{self, conversations, go_on, only_answer, product};
use lockstep_integration::foreign::{self, has_rules_of, rules, rules_of_others, same};
use lockstep_integration::guest::{self, bearable};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::load::Load;
use lockstep_integration::product::Mode;

/// Connections a second while the mode changes.
const LOAD: u32 = 100;

/// To those that [`Mode::here`] has later.
#[test]
fn every_mode_takes_over_from_those_before_it() -> Result<()> {
    switches(|from, to| from < to)
}

#[test]
fn every_mode_takes_over_from_those_after_it() -> Result<()> {
    switches(|from, to| from > to)
}

/// Goes over from one mode to another wherever this is true of their places among all. In the guest one
/// of the two is IPVS: every kernel shows the others.
fn switches(wanted: impl Fn(usize, usize) -> bool) -> Result<()> {
    let modes = Mode::here();
    for (at, from) in modes.iter().enumerate() {
        for (_, to) in modes.iter().enumerate().filter(|(other, _)| wanted(at, *other)) {
            if guest::is_here() && ![from, to].contains(&&Mode::Ipvs) {
                continue;
            }
            let begun = Instant::now();
            let what = || format!("{} -> {}", from.name(), to.name());
            goes_over(*from, *to).with_context(what)?;
            println!("{}: {:.1?}", what(), begun.elapsed());
        }
    }
    Ok(())
}

/// An agent that comes back in another mode: the old mode's rules would go on sending to an endpoint
/// that is gone, whatever the new mode's say.
fn goes_over(from: Mode, to: Mode) -> Result<()> {
    let mut product = product(&[from])?;
    foreign::add(&product)?;
    let others = rules_of_others(&product, 1)?;
    product.start()?;
    ensure!(
        has_rules_of(&product, from)? && !has_rules_of(&product, to)?,
        "not only {} at first",
        from.name()
    );
    only_answer(&product, Place::Pod(1, 2))?;
    let mut open = conversations(&product, &[Family::V4, Family::V6])?;

    product.agent(1)?.kill()?;
    product.set_mode(1, to);
    let load = Load::start(&product.lab, fixture::streams_to_web(&product), bearable(LOAD));
    product.start_agent(1)?;
    product.agent(1)?.wait_for_log("removed the rules of a mode")?;
    load.go_on(3)?;
    go_on(&mut open, "after the switch")?;
    let moved = fixture::roll_manifest(&[Place::Pod(1, 1)]);
    product.change(|product| product.write_manifest("roll.yaml", &moved))?;
    only_answer(&product, Place::Pod(1, 1))?;
    go_on(&mut open, "after the endpoint left")?;
    ensure!(!has_rules_of(&product, from)?, "rules of {} are left:\n{}", from.name(), rules(&product, 1)?);
    ensure!(has_rules_of(&product, to)?, "no rules of {}", to.name());
    same(1, "after the switch", &others, &rules_of_others(&product, 1)?)?;
    let (report, _) = load.finish()?;
    ensure!(!report.answers.is_empty() && report.faults.is_empty(), "a gap: {:?}", report.faults);
    Ok(())
}
