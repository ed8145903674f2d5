//! Where the state comes from: Kubernetes, or a directory of manifests.
//!
//! ```text
//! API server ── kubernetes::run ──┐                 ┌── Event::Changes ──┐
//!                                 ├── convert, track ┤   Synced, Alive    ├── bounded channel ──> store
//! directory  ── files::run ───────┘                 └── quarantine ──────┘
//! ```
//!
//! A source is one task that sends [`Event`]s until nobody listens any more. It speaks of
//! objects as the model knows them, and nothing is lost by what it cannot read:
//!
//! * An object that is broken goes into quarantine by name, with the field that is wrong. Its
//!   last good content stays in force until the object is mended or deleted; everything else
//!   goes on. A new object of the same name (another uid) inherits nothing.
//! * A source that cannot be reached takes nothing away. After a new list only that is gone
//!   which the complete list does not have.
//! * What changed together, or waits together, is told together; what came and went meanwhile
//!   is not told at all. No timer holds anything back.
//!
//! This crate knows neither versions and digests of a store, nor gRPC, nor nodes' kernels.
#![forbid(unsafe_code)]

pub mod convert;
mod event;
pub mod files;
mod intake;
pub mod kubernetes;

pub use event::{Changes, Event, NodeChange, ObjectName, QuarantineChange};
