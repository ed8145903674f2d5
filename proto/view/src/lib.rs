//! Every Service rule, decided once.
//!
//! ```text
//! cluster state + facts of this node + configuration ──> ForwardingPlan ──> a Backend
//! ```
//!
//! Pure and synchronous: no kernel, no network, no clock. The agent and the control plane's
//! explanations use the same code.
#![forbid(unsafe_code)]

pub mod backend;
pub mod plan;

pub use backend::Backend;
pub use plan::*;
