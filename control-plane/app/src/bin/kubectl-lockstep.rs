//! `lockstepctl` as a kubectl plugin: `kubectl lockstep`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep_control_plane::ctl::main("kubectl lockstep")
}
