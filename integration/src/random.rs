//! Random clusters and what must become of packets in them.
//!
//! ```text
//! seed ──> objects: Services, slices, as manifests ──> a Subject programs them
//!   └────> probes: who connects to what ──> expectation: the plan of the node that decides,
//!                                                        read aloud (lockstep-view's trace)
//! ```
//!
//! A seed says everything: the same seed is the same cluster and the same probes on every
//! machine, so a seed that once failed is kept and played for ever.

pub mod expectation;
pub mod objects;
pub mod probes;
