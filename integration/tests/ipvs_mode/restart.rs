//! An agent that is killed and comes back.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{started, streams_to_web};
use lockstep_integration::guest::bearable;
use lockstep_integration::load::Load;
use lockstep_integration::product::Mode;

use crate::state;

/// Connections a second, all streams together.
const RATE: u32 = 100;

#[test]
fn an_agent_that_is_killed_under_load_loses_nothing_and_adopts_what_is_there() -> Result<()> {
    let mut product = started(&[Mode::Ipvs])?;
    let before = state(&product)?;
    let load = Load::start(&product.lab, streams_to_web(&product), bearable(RATE));
    for round in 1..=3 {
        let begun = Instant::now();
        product.agent(1)?.kill()?;
        load.go_on(4)?;
        product.start_agent(1)?;
        product.wait_verified(0)?;
        load.go_on(4)?;
        let node = product.list_nodes()?.nodes.into_iter().next().context("no node")?;
        let written = node.last_stats.context("no statistics")?.kernel_objects_changed;
        ensure!(written == 0, "{written} kernel objects written, expected none\n{}", product.logs());
        let after = state(&product)?;
        ensure!(after == before, "it is not as before:\n{before}\n{after}");
        println!("killed and back, {round}: {:.1?}", begun.elapsed());
    }
    let (report, rate) = load.finish()?;
    report.ensure_perfect()?;
    println!("{} connections at {rate:.0} a second, none lost", report.answers.len());
    Ok(())
}
