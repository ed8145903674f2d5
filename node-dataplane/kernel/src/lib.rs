//! The only crate that touches the kernel.
//!
//! ```text
//! backend-nftables ──> nf_tables: Batch, dumps ──> netlink: one long-lived socket
//!                             └── fake: the same kernel, in memory
//! backend-ipvs ──────> ipvs: virtual servers; ipset; dummy: the device with their addresses
//!                             ├── fake: each in memory
//!                             └──────────────────────────────> netlink
//! agent ─────────────> conntrack: flows listed and ended ──> netlink
//! ```
//!
//! It knows messages, attributes and errnos. It knows no Service, no plan and no policy.
#![allow(unsafe_code)] // the one crate that may; every block says why it is sound

pub mod addresses;
pub mod conntrack;
pub mod cpus;
pub mod dummy;
mod errno;
pub mod exec;
pub mod ipset;
pub mod ipvs;
pub mod memory;
pub mod netlink;
pub mod netns;
pub mod nf_tables;
pub mod refusals;
mod release;
pub mod route;
pub mod sysctl;
pub mod xtables;

pub use errno::Errno;
pub use release::release;
