//! The control plane of a cluster.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep_control_plane::serve::main()
}
