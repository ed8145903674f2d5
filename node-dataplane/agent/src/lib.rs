//! `lockstep-node`: the agent that puts Service state in force on one node.
//!
//! ```text
//! tokio, one thread                          reconcile thread (owns everything that changes)
//! ┌──────────────────────┐   Event, bounded  ┌───────────────────────────────────────────────┐
//! │ transport (gRPC)     ├──────────────────>│ Session ──changed──> View ──plan──> Backend    │
//! │ tick every 200 ms    │                   │    │                              apply, verify │
//! │ signals              │<──Outbox: Acks────┤    └──────────changes──> Cache (own thread)     │
//! │ health, metrics HTTP │<──Status──────────┤                                               │
//! └──────────────────────┘                   └───────────────────┬───────────────────────────┘
//!                          thread `conntrack`: stale UDP flows <─┤ after each commit
//!   health-check node ports, answered by tokio: counts <──────────┘
//! ```
//!
//! One thread makes every decision, in order: take in what is there, merge it, program once, hand
//! over to the cache, acknowledge, read back, acknowledge. A programming pass is never cut short.
//! The kernel comes before the cache, and the cache before VERIFIED; nothing waits for a sync.
//!
//! The agent decides no Service rule (that is `lockstep-view`), knows no protocol state (that is
//! `lockstep-client`) and no kernel object (those are the backends').
#![forbid(unsafe_code)]

pub mod cleanup;
pub mod config;
pub mod conntrack;
pub mod follow_up;
pub mod health_ports;
pub mod http;
pub mod metrics;
pub mod mode;
pub mod reconcile;
pub mod run;
mod settings;
pub mod status;
