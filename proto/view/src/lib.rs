//! Every Service rule, decided once.
//!
//! ```text
//! cluster state + facts of this node + configuration ──> ForwardingPlan ──> a Backend
//! ```
//!
//! Pure and synchronous: no kernel, no network, no clock. The agent programs what it says, and
//! [`explain`] reads its plans; the control plane knows no rule and does not use it.
#![forbid(unsafe_code)]

pub mod backend;
mod claims;
mod config;
pub mod decide;
pub mod explain;
mod interface;
pub mod plan;
pub mod select;
mod service;
pub mod stale;
#[cfg(test)]
mod tests;
mod view;

pub use backend::Backend;
pub use config::{DetectLocal, Facts, NodePortAddresses, ViewConfig, load_balancers_may_use};
pub use interface::{InterfaceName, InvalidInterface};
pub use plan::*;
pub use view::{Changed, View};
