//! The control plane's memory: what every node must program, and how far every node has come.
//!
//! ```text
//! Changes ──> Store::apply ──> seq, digest ──┬──> delta(cursor), snapshot, get   (what to send)
//!                                            ├──> services                       (what to show)
//!                                            └──> node_addresses                 (what nodes must leave alone)
//! streams, reports ──> Nodes ──────────────────> counts, states, progress        (who is where)
//! faults of the source ──> Quarantine
//! ```
//!
//! [`Store`] is an index of the latest content by key and by the transaction that changed it
//! last. A stream is a cursor into the second one: whatever happened between a cursor and the
//! head, [`Store::delta`] names every key once, with its latest content. So a slow node
//! coalesces for free, and what is kept here depends on the state, never on the slowest node.
//! A change costs what it touches: digest, counters and indices are kept, not recomputed.
//!
//! Everything here is synchronous and takes the time as an argument. This crate knows no
//! Kubernetes, no protobuf, no gRPC and no lock: whoever owns a [`Store`] guards it.
#![forbid(unsafe_code)]

mod changes;
mod history;
mod node_addresses;
mod nodes;
mod quarantine;
mod services;
mod store;

pub use changes::Changes;
pub use nodes::{
    AckError, BackendFacts, ConnectError, Connected, Convergence, Counts, Facts, Failure, FailureClass,
    InForce, Level, Levels, Node, NodeSettings, NodeState, Nodes, Outcome, Pass, Progress, Report, Resume,
    StreamId, Streaming,
};
pub use quarantine::{Quarantine, Quarantined};
pub use services::{PageEntry, ServiceView};
pub use store::{Delta, Entry, HELD_HISTORY, Patch, Position, Snapshot, Store, TOMBSTONES};
