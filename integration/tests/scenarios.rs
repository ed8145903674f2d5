//! Every scenario, in every mode and family, with real packets. Needs root.
//!
//! One network per mode, built once; the modes run at the same time. Arguments choose: those
//! cases run whose name (`nftables/IPv4/cluster-ip`) has all of them in it.

#![allow(clippy::print_stdout, reason = "its report is its output")]

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use lockstep_integration::guest;
use lockstep_integration::lab::Lab;
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::scenario::{ALWAYS, cases, play_all};

/// Scenarios that are played at the same time, in each mode.
const AT_ONCE: usize = 3;

fn main() -> ExitCode {
    let filters: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let start = Instant::now();
    let (mut passed, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        let modes: Vec<_> = Mode::here()
            .into_iter()
            .map(|mode| {
                scope.spawn({
                    let filters = &filters;
                    move || play(mode, filters)
                })
            })
            .collect();
        for mode in modes {
            let (good, bad) = mode.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            passed += good;
            failed += bad;
        }
    });
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; finished in {:.1}s",
        start.elapsed().as_secs_f64()
    );
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plays the cases of one mode; returns how many passed and failed.
fn play(mode: Mode, filters: &[String]) -> (usize, usize) {
    let cases = match cases(&format!("{}/", mode.name()), filters) {
        Ok(cases) if cases.is_empty() => return (0, 0),
        Ok(cases) => cases,
        Err(error) => return failed_to_start(mode, &error),
    };
    let product = match start(mode) {
        Ok(product) => product,
        Err(error) => return failed_to_start(mode, &error),
    };
    play_all(&cases, product.shares(AT_ONCE))
}

fn failed_to_start(mode: Mode, error: &anyhow::Error) -> (usize, usize) {
    println!("{}: {error:#}", mode.name());
    println!("test {} ... FAILED", mode.name());
    (0, 1)
}

fn start(mode: Mode) -> Result<Product> {
    // Where everything is slow, all at once would be slower than anything waits for.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = guest::is_here().then(|| TURN.lock());
    let mut product = Product::new(Lab::new(3, 2)?, &[mode; 3])?;
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.write_manifest("always.yaml", ALWAYS)?;
    product.start().context("start the product")?;
    Ok(product)
}
