//! `lockstep-node cleanup`: everything of ours out of the kernel, nothing else.

use std::process::ExitCode;

use crate::config::{CleanupArguments, EXIT_FAILED, Mode};
use crate::mode;

/// The chore, from its flags to its exit code. Goes on after a failure, so that one mode does
/// not keep the rules of another.
pub fn main(arguments: &CleanupArguments) -> ExitCode {
    arguments.log_format.install();
    let mut failed = false;
    for (what, outcome) in mode::remove(arguments.mode.unwrap_or(Mode::Auto), &arguments.ipvs.exclude_cidrs) {
        match outcome {
            Ok(0) => tracing::info!("{what}: nothing of ours was there"),
            Ok(objects) => tracing::info!(objects, "{what}: removed everything of ours"),
            Err(error) => {
                failed = true;
                tracing::error!("{what}: {error:#}");
            }
        }
    }
    if failed { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS }
}
