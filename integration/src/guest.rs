//! The machine of `cargo xtask vm`: its kernel has more than the host's, and everything takes longer.

use std::sync::LazyLock;
use std::time::Duration;

/// How often a limit of time fits into the one that is meant; 1 where unset, or no number.
const PATIENCE: &str = "LOCKSTEP_PATIENCE";

/// True inside it.
pub fn is_here() -> bool {
    std::env::var_os("LOCKSTEP_GUEST").is_some()
}

/// A limit of time that suits this machine.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        let factor = std::env::var(PATIENCE).ok().and_then(|factor| factor.parse().ok());
        factor.filter(|factor| *factor > 0).unwrap_or(1)
    });
    limit * *FACTOR
}
