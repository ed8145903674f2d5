//! Every Service rule, decided once.
//!
//! ```text
//! cluster state + facts of this node + configuration ──> ForwardingPlan ──> a Backend
//! ```
//!
//! Pure and synchronous: no kernel, no network, no clock. The agent programs what it says. What a
//! plan does with a packet, and why, [`trace`] and [`explain`] say: `lockstepctl explain` makes the
//! plan of a node once more and asks them. The control plane's server knows no rule.
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
pub mod trace;
mod view;

pub use backend::Backend;
pub use config::{DetectLocal, Facts, NodePortAddresses, ViewConfig, load_balancers_may_use};
pub use interface::{InterfaceName, InvalidInterface};
pub use plan::*;
pub use view::{Changed, View};
