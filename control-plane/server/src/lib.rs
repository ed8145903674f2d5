//! The control plane's gRPC side: service state out, reports back in.
//!
//! ```text
//! Input ──> intake (pacing) ──> Hub::publish ──> Store ──> frame of (prev -> head), made once
//!                                  │                              │
//!                                  └── watch: there is a new head ─┴──> sync session: a cursor
//! Ack, Refetch <── sync inbound <──────────── node <── frames, when the transport asks ──┘
//!      └──> Nodes ──> StatusService: lists, Wait, WatchConvergence
//! ```
//!
//! A stream has no queue. It is a cursor; when the transport has room for another message, the
//! session asks for what leads from its cursor to the head, whatever happened in between. All
//! streams at the same cursor get the same bytes, encoded and compressed once.
//!
//! This crate knows no Kubernetes: whoever owns the source feeds it [`Input`]s.
#![forbid(unsafe_code)]

mod connections;
mod convert;
mod counters;
mod frames;
mod hub;
mod identity;
mod intake;
mod link;
mod serve;
mod status;
mod sync;
#[cfg(test)]
mod testing;
mod tls;

pub use counters::{Counters, Histogram, LATENCY_BUCKETS};
pub use hub::{Config, Hub, Overview};
pub use intake::{Input, NodeInput, QuarantineInput, run as run_intake};
pub use serve::{ServeError, serve};
pub use tls::{Acceptor, Tls, TlsError};
