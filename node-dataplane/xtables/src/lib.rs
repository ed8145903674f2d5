//! iptables and ip6tables in one flavour, as far as more than one backend needs them.
//!
//! ```text
//! FixedChains ──missing(Snapshot)──> Steps ──Input──> iptables-restore --noflush
//!     │
//!     └────────drift(Snapshot)─────> Drift      Snapshot <── iptables-save, -S of some chains
//! ```
//!
//! It knows tables, chains and rules as text, and the ways in which versions and flavours of the
//! tools spell one rule. Which chains are whose, and what is in them, the backends know. It knows no
//! Service.
//!
//! Rules are given in the very form in which `iptables-save` prints them, so comparing is comparing
//! text.
#![forbid(unsafe_code)]

mod choose;
pub mod fake;
mod fixed;
mod input;
mod observe;
mod pods;
mod remove;
mod table;
mod tool;
mod watch;

pub use choose::{Abilities, Choice, SCRATCH, Unusable, abilities, can, detect, probe};
pub use fixed::{FixedChains, Jumps, drift};
pub use input::{Input, Step, line, section};
pub use observe::{Snapshot, canonical, comment, print_probability, target};
pub use pods::{PodMatch, host};
pub use remove::{remove, remove_from};
pub use table::Table;
pub use tool::{Flavour, Tool, ToolError};
pub use watch::Watch;
