//! The iptables backend: a plan becomes chains of kube-proxy's names and shape.
//!
//! ```text
//! ServicePlan ──render──> ServiceRules ──diff (memory, or iptables-save)──> Change
//!                                                    │
//!            iptables-restore --noflush <──input─────┘
//!
//! iptables-save, or in the nft flavour -S of the touched chains ──check──> Drift
//! ```
//!
//! The tools, what they print, and the chains that are the same whatever Services there are, are
//! `lockstep_xtables`'s.
//!
//! Rules are rendered in the very form in which `iptables-save` prints them, so comparing
//! is comparing text. A change writes the chains of the Services it touches and single lines of
//! the shared chains, never a shared chain as a whole.
//!
//! What is ours, also to a process that starts anew: in nat and filter the chains that
//! kube-proxy makes (see `names`), and jumps from built-in chains into them. `KUBE-KUBELET-CANARY` and
//! `KUBE-IPTABLES-HINT` are kubelet's and never touched; `KUBE-FIREWALL` is shared with kubelet, see
//! `guard`: what is missing of it is added, and what else is there stays. A fresh process
//! reads `iptables-save` once and writes what differs; a kube-proxy's rules are adopted alike.
//!
//! Where the rules differ from kube-proxy's, on purpose:
//! * filter `KUBE-EXTERNAL-SERVICES` is also entered from OUTPUT, so the node's own connections
//!   to an external address without endpoints are refused and do not leave the node.
//! * Node ports at loopback addresses of IPv4 answer the node itself and nobody else; where the
//!   plan has none, they neither forward there nor refuse. IPv6 never has them.
//! * Lines of single endpoints have no comments, however few there are: what kube-proxy drops
//!   above 1,000 endpoints. So the rules of a Service do not depend on how many others there are.
//! * A source that is refused while others are forwarded meets rules that test the source.
//! * There are no canary chains: generations and table sizes tell of a flush, and the audit
//!   of everything else.
//!
//! Where the nft flavour gets much at once it commits in sections (see `input`): what can be
//! reached of a Service is whole at every moment, but not all Services change at one instant.
//!
//! It does not know traffic policies, readiness or topology: it looks at the plan's actions
//! only.
#![forbid(unsafe_code)]

mod backend;
mod check;
mod choose;
mod diff;
mod family;
mod fixed;
mod guard;
mod input;
mod localnet;
mod names;
mod read_back;
mod render;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_xtables::{Flavour, Table, ToolError};

pub use backend::Iptables;
pub use choose::{detect, probe};

/// True for the chains of this mode, some of which IPVS mode has under the same name.
pub fn is_chain(table: Table, chain: &str) -> bool {
    names::is_ours(table, chain)
}

/// Removes what is ours in a flavour, which is everything of a kube-proxy too, and nothing else. Tries
/// nothing out and makes no table: a host that does not use this flavour is left without a trace. Returns
/// the number of rules and chains that are gone.
pub fn remove(run: &Arc<dyn Run>, flavour: Flavour) -> Result<usize, ToolError> {
    lockstep_xtables::remove(run, flavour, &names::is_ours)
}
