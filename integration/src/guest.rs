//! The machine of `cargo xtask vm`: its kernel has more than the host's, and everything takes longer.

use std::sync::LazyLock;
use std::time::Duration;

/// The variable that says how patient to be; 1 where unset, or no number.
const PATIENCE: &str = "LOCKSTEP_PATIENCE";

/// True inside it.
pub fn is_here() -> bool {
    std::env::var_os("LOCKSTEP_GUEST").is_some()
}

/// How often a limit of time fits into the one that is meant.
static FACTOR: LazyLock<u32> = LazyLock::new(|| {
    let factor = std::env::var(PATIENCE).ok().and_then(|factor| factor.parse().ok());
    factor.filter(|factor| *factor > 0).unwrap_or(1)
});

/// A limit of time that suits this machine.
pub fn patient(limit: Duration) -> Duration {
    limit * *FACTOR
}

/// A load that suits this machine, in things a second.
pub fn bearable(per_second: u32) -> u32 {
    (per_second / *FACTOR).max(1)
}
