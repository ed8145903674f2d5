//! Memory of the real programs, after a whole cluster was loaded and programmed, and after all
//! of its Services changed.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;

use super::programs::{self, Program, Resident};

/// How long both programs go on after the last endpoint is in the kernel: what follows takes
/// memory too (reading back, acknowledging, writing the cache), and is to be over.
const SETTLING: Duration = Duration::from_secs(10);

/// Resident memory of both programs.
#[derive(Debug)]
pub struct Memory {
    /// The agent's.
    pub agent: Stages,
    /// The control plane's.
    pub control_plane: Stages,
}

/// Resident memory of one program over time.
#[derive(Debug)]
pub struct Stages {
    /// Settled after the load.
    pub load: Resident,
    /// As soon as one endpoint of every Service was replaced in the kernel.
    pub burst: Resident,
    /// Settled after that; the peak is that of the burst.
    pub after_burst: Resident,
}

/// Loads this many Services, then replaces one endpoint of each.
pub fn measure(services: u32, binaries: &Path) -> Result<Memory> {
    programs::run(services, binaries, |programs| {
        let both = |programs: &programs::Programs| -> Result<[Resident; 2]> {
            Ok([programs.agent.resident()?, programs.control_plane.resident()?])
        };
        sleep(SETTLING);
        let load = both(programs)?;
        [&programs.agent, &programs.control_plane].into_iter().try_for_each(Program::forget_peak)?;
        programs.burst()?;
        let burst = both(programs)?;
        sleep(SETTLING);
        let after_burst = both(programs)?;
        let stages = |at: usize| Stages { load: load[at], burst: burst[at], after_burst: after_burst[at] };
        Ok(Memory { agent: stages(0), control_plane: stages(1) })
    })
}
