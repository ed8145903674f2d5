//! Where the state comes from: Kubernetes, or a directory of manifests.
//!
//! ```text
//! API server ── kubernetes::run ──┐                 ┌── Event::Changes ──┐
//!                                 ├── convert, Sent ─┤   Synced, Alive    ├── bounded channel ──> store
//! directory  ── files::run ───────┘                 └── quarantine ──────┘
//! ```
//!
//! A source is one task that sends [`Event`]s until nobody listens any more. It speaks of
//! objects as the model knows them: an object that is broken never reaches the model, it is
//! put in quarantine by name, and its last good content stays in force.
//!
//! This crate knows neither versions and digests of a store, nor gRPC, nor nodes' kernels.
#![forbid(unsafe_code)]

pub mod convert;
mod event;
pub mod files;
mod intake;
pub mod kubernetes;

pub use event::{Changes, Event, NodeChange, ObjectName, QuarantineChange};
