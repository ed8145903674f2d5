//! The programs of the control plane.
//!
//! ```text
//! lockstep-control-plane:  source ── Event ──> feed ── Input ──> intake ──> Hub <── gRPC, HTTP
//! lockstepctl:             command line ──> StatusService ──> table | JSON | YAML, exit code
//! ```
//!
//! Here is only wiring and text: what is served is decided in `lockstep-server`, what is read in
//! `lockstep-source`.
#![forbid(unsafe_code)]

pub mod ctl;
pub mod serve;
