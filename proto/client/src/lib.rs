//! The node's end of the stream: what any program needs to follow a Lockstep control plane.
//!
//! ```text
//!                       ┌───────────── transport (tokio, tonic) ─────────────┐
//! control plane ~~gRPC~~│ dial, TLS, backoff, failover; moves frames, decides │
//!                       │ nothing about them                                 │
//!                       └──Connected, Frame, Lost──┐    ┌──Hello, Ack, Refetch┘
//!                                                  v    │
//!  disk ──cache::load──> Held ──> Session (pure): staged until commit, digest checked
//!                                                  │
//!                                                  ├──> Committed: changes, changed Services, position
//!                                                  └──> cache::Cache: the same changes, appended to a file
//! ```
//!
//! * [`Session`] is a synchronous state machine: bytes and time go in, state and requests come
//!   out. It has no clock, no task and no socket, so it behaves the same in an agent, in a
//!   simulator with thousands of nodes and in a test.
//! * [`transport`] is the edge: everything that needs tokio.
//! * [`cache`] keeps the held state on disk.
//!
//! This crate knows nothing of kernels, plans or proxies: what a report means for traffic is the
//! caller's business.
#![forbid(unsafe_code)]

pub mod cache;
mod position;
pub mod report;
pub mod session;
#[cfg(test)]
mod testing;
pub mod transport;

pub use position::Position;
pub use report::{Failure, FailureReason, InForce, Report};
pub use session::{Change, Committed, Held, Identity, Now, Session, Step};
