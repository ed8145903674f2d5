//! The model: what a Kubernetes service proxy needs to know, as plain Rust types.
//!
//! ```text
//! Kubernetes objects ──(source)──┐                         ┌──(view)── ForwardingPlan
//!                                ├── Service, EndpointSet,   ──┤
//! wire messages ──(wire)─────────┘   ServiceCidr, NodeContext └──(store)── versions, digest
//! ```
//!
//! Every type here is a value in canonical form: the constructors sort, drop duplicates
//! and refuse what is out of range, so two equal objects have equal fields, equal
//! [canonical bytes](canonical) and therefore an equal [`Version`].
//!
//! This crate does no I/O and knows neither Kubernetes' types, nor protobuf's, nor gRPC.
#![forbid(unsafe_code)]

pub mod canonical;
mod digest;
mod endpoint;
mod intern;
mod key;
mod name;
mod node;
mod resource;
mod service;
mod service_cidr;
mod state;

pub use digest::{Digest, Version};
pub use endpoint::{Conditions, Endpoint, EndpointPatch, EndpointPort, EndpointSet, Hints};
pub use intern::Interner;
pub use key::{EndpointSetKey, Key, Kind, ServiceCidrKey, ServiceKey};
pub use name::check_name;
pub use node::NodeContext;
pub use resource::Resource;
pub use service::{
    Family, Feature, LoadBalancerIngress, Protocol, Service, ServicePort, ServiceType, TrafficDistribution,
    TrafficPolicy,
};
pub use service_cidr::ServiceCidr;
pub use state::{Held, Put, State};

/// A port number; never 0.
pub type Port = std::num::NonZeroU16;

/// A value that an object may not have: which field, what it was, and why not.
///
/// The object itself is named by whoever holds it (the source, the node's decoder).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} {reason}")]
pub struct InvalidField {
    /// Path of the field in the object it came from: `spec.ports[1].port`.
    pub field: String,
    /// The value, as text.
    pub value: String,
    /// What is wrong with it, as the end of a sentence: `is not an IP address`.
    pub reason: String,
}
