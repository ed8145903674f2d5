//! The `lockstep-node` program, see the library of this crate.

use std::process::ExitCode;

use clap::Parser;
use lockstep_node::config::{Arguments, Command};
use lockstep_node::{cleanup, run};

fn main() -> ExitCode {
    // Usage errors end here, with exit code 2.
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Cleanup(cleanup)) => cleanup::main(&cleanup),
        None => run::main(&arguments.run),
    }
}
