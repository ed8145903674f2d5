//! Benchmarks: ratios to a raw limit, measured side by side in one run.
//!
//! ```text
//! cluster ──> Upstream: Store, frames as the server makes them ──> Node: Session, View, nftables
//!                                                                        │ reads the kernel
//!                                                                        v
//!                                                    raw::Copy: the same kernel state, by hand
//! ```
//!
//! A time in milliseconds says more of the machine than of the program, so what counts is how
//! many times longer Lockstep takes than a program that does nothing but write the same kernel
//! objects with one batch. Repetitions of both alternate, so that a slow moment meets both.
//! [`kube_proxy`] compares the real programs with the real kube-proxy, in the same way.
//! In iptables mode the limit is the tool itself: what counts is the part of the time in which
//! none runs.

pub mod brain;
pub mod cluster;
pub mod drift;
pub mod iptables;
pub mod ipvs;
pub mod kube_proxy;
pub mod memory;
pub mod node;
pub mod programs;
pub mod raw;
pub mod report;

use std::time::Duration;

/// The middle value; zero of nothing.
pub fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// How many times longer `this` is than `that`.
pub fn ratio(this: Duration, that: Duration) -> f64 {
    this.as_secs_f64() / that.as_secs_f64().max(f64::MIN_POSITIVE)
}
