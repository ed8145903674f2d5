//! The IPVS backend: a plan becomes virtual servers, sets, and addresses of an interface of its own.
//!
//! ```text
//! ServicePlan ──render──> Rendered ──change (memory) or sync (kernel)──> requests, entries, addresses
//!                                                                          │ tables: in order
//!      IPVS (generic netlink), ipset (nfnetlink), kube-ipvs0 (rtnetlink) <─┘
//!
//! what these list, by key, by entry, by address ──read_back──> Drift
//! ```
//!
//! Beside them are chains of iptables, always the same ones (`fixed`): they mark what is to be
//! masqueraded, keep sources out, and keep whatever listens on the node from answering at addresses of
//! Services, which are all the node's own here.
//!
//! IPVS knows no transaction. What comes is whole before packets can meet it, and is there before
//! anything leaves (`tables`). An endpoint that leaves keeps its connections (`drain`).
//!
//! What is ours, also to a process that starts anew: sets and chains of kube-proxy's names and the few
//! in `names` that it does not have; the interface `kube-ipvs0`; virtual servers whose address is
//! bound there, or that are in one of the sets. Any other virtual server is somebody else's, and so is
//! one by firewall mark.
//!
//! It does not know traffic policies, readiness or topology: it looks at the plan's actions only.
#![forbid(unsafe_code)]

mod api;
mod backend;
mod chains;
mod change;
mod cleanup;
mod drain;
mod fixed;
mod holdings;
mod names;
mod open;
mod options;
mod read_back;
mod render;
mod sync;
mod tables;
mod terms;
#[cfg(test)]
mod tests;

pub use backend::Ipvs;
pub use cleanup::{Draining, Goes, NotRemoved, Removed, remove};
pub use fixed::{is_ours as is_chain, is_written};
pub use open::Unusable;
pub use options::{Options, SCHEDULERS};
