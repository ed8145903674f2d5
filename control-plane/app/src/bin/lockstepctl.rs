//! Asks a control plane what is programmed where.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep_control_plane::ctl::main("lockstepctl")
}
