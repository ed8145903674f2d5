//! Every chore of the project as `cargo xtask VERB`.
//!
//! Builds with nothing but Rust and has no dependencies, so that on a bare machine it can
//! install what everything else needs:
//!
//! ```text
//! setup: system packages, peers (etcd, kube-apiserver, grpcurl), cargo tools
//!   -> build: the whole workspace, once -> parts: each one a list of steps -> summary
//!                                                 └─> vm: some of them with another kernel
//! ```
//!
//! Knows the names of crates, tests and tools; knows nothing of what is inside them.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod build;
mod layering;
mod parts;
mod process;
mod setup;
mod summary;
mod tidy;
mod vm;

use std::path::Path;
use std::process::{Command, ExitCode};

use process::{Failure, cargo, root};

const USAGE: &str = "\
Every chore of the project.

Usage: cargo xtask VERB [ARGUMENTS]

  setup            install what demo and tests need; says first what that is
  demo [--keep]    the whole product on this machine: three nodes, real traffic
  demo --ipvs      the same in a guest, with a fourth node in IPVS mode
  test [PART...]   set-up and every test, or only these parts
  tidy             the same as `test tidy`: formatting, lints, layering, file sizes
  bless            write the golden files anew from what the code does now
  bench [ARGS]     measure; arguments go to lockstep-bench
  vm run CMD...    a command in a machine with a kernel of its own, which needs no root here
  vm shell         a terminal in it
  vm test [PART...] [-- FILTER...]
                   tests in it; parts are below
                   options of all three: --memory MIB, --time SECONDS, --silence SECONDS, --with PATH
  help             this text

Parts of `test`, each runnable alone:
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (verb, rest) = match arguments.split_first() {
        Some((verb, rest)) => (verb.as_str(), rest),
        None => ("", [].as_slice()),
    };
    let outcome = match verb {
        "setup" => setup::everything().map(drop),
        "demo" => demo(rest),
        "test" => parts::test(rest),
        "tidy" => parts::test(&["tidy".to_owned()]),
        "bless" => parts::bless(),
        "bench" => bench(rest),
        "vm" => vm::main(rest),
        "help" | "--help" | "-h" => {
            print!("{}", usage());
            return ExitCode::SUCCESS;
        }
        "" => {
            eprint!("{}", usage());
            return ExitCode::from(2);
        }
        unknown => {
            eprintln!("unknown verb `{unknown}`\n\n{}", usage());
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            eprintln!("{message}\n\n{}", usage());
            ExitCode::from(2)
        }
        Err(failure) => {
            eprintln!("cargo xtask {verb}: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> String {
    let mut text = USAGE.to_owned();
    for part in parts::PARTS {
        let extra = if part.in_everything { "" } else { " (only when asked for)" };
        text.push_str(&format!("  {:<16} {}{extra}\n", part.name, part.about));
    }
    text.push_str("\nParts of `vm test`:\n");
    for part in vm::PARTS {
        text.push_str(&format!("  {:<16} {}\n", part.name, part.about));
    }
    text
}

/// Builds and runs the demo.
fn demo(arguments: &[String]) -> Result<(), Failure> {
    setup::packages()?;
    if arguments == ["--ipvs"] {
        println!("demo: building the product (a few minutes the first time)");
        build::programs()?;
        let starts = vm::STARTED.map(build::program);
        return vm::start(&build::program("lockstep-demo"), &["--ipvs"], &starts);
    }
    let tools = setup::peers(&["grpcurl"])?;
    println!("demo: building the product (a few minutes the first time)");
    build::programs()?;
    run_demo(arguments, &tools)
}

/// Runs the demo that is built, unbuffered, with this terminal and its signals.
fn run_demo(arguments: &[String], tools: &Path) -> Result<(), Failure> {
    process::run(
        Command::new(build::program("lockstep-demo"))
            .args(arguments)
            .env("LOCKSTEP_PEERS_DIR", tools)
            .current_dir(root()),
    )
}

fn bench(arguments: &[String]) -> Result<(), Failure> {
    setup::packages()?;
    // One part alone runs against other programs than Lockstep's own.
    let others: &[&str] = match arguments.first() {
        Some(part) if part == "kube-proxy" => &["etcd", "kube-apiserver", "kube-proxy"],
        _ => &[],
    };
    let peers = setup::peers(others)?;
    process::run(cargo().args(["build", "--release", "--workspace", "--bins"]).current_dir(root()))?;
    let program = build::optimised("lockstep-bench");
    if arguments == ["ipvs"] {
        return vm::start(&program, &["ipvs"], &[]);
    }
    if !others.is_empty() && arguments.iter().any(|word| word == "ipvs") {
        return vm::start_with_kube_proxy(&program, arguments, &vm::STARTED.map(build::optimised));
    }
    // Not by `cargo run`: of one crate alone it would make another copy of every dependency.
    let mut bench = Command::new(program);
    process::run(bench.args(arguments).env("LOCKSTEP_PEERS_DIR", peers).current_dir(root()))
}
