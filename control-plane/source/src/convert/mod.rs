//! Kubernetes objects into the model, or the exact field that is wrong with them.
//!
//! ```text
//! Service, EndpointSlice, ─┬──> Ok(Object(..))    canonical, every field checked
//! Node, ServiceCIDR        ├──> Ok(Skip(..))      right as it is, and not for a service proxy
//!                          └──> Err(InvalidField) the first field that is wrong
//! ```
//!
//! An API server refuses most of what is refused here, but not all of it (it takes an
//! EndpointSlice with port 70000), and a manifest in a file has met no API server. Where
//! Kubernetes fills in a default, a missing field gets that default.

mod endpoint_slice;
mod field;
mod node;
mod service;
mod service_cidr;
#[cfg(test)]
mod tests;

use std::fmt;

use lockstep_model::InvalidField;

pub use endpoint_slice::endpoint_slice;
pub use node::{Node, node};
pub use service::service;
pub use service_cidr::service_cidr;

/// Label of an EndpointSlice that names its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Label that gives an object to another proxy.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label that marks a Service as headless.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Most canonical bytes that one object may have. A message holds 1 MiB, and an object never
/// spans two.
pub const MAX_OBJECT_BYTES: usize = lockstep_model::canonical::MAX_BYTES;
/// Most endpoints that one EndpointSlice may have; the API server's own limit.
pub const MAX_ENDPOINTS: usize = 1000;

/// What became of an object that is not wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T> {
    /// The object, for the model.
    Object(T),
    /// Not for a service proxy.
    Skip(Skip),
}

/// Why an object is not for a service proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// It has [`PROXY_NAME_LABEL`], with whatever value.
    OtherProxy,
    /// `clusterIP: None`, or [`HEADLESS_LABEL`] with whatever value.
    Headless,
    /// `type: ExternalName`.
    ExternalName,
    /// No cluster IP was allocated (yet).
    NoClusterIp,
    /// An EndpointSlice of no Service.
    NoService,
    /// `addressType: FQDN`.
    Fqdn,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Skip::OtherProxy => "belongs to another proxy (label service.kubernetes.io/service-proxy-name)",
            Skip::Headless => "is headless",
            Skip::ExternalName => "is of type ExternalName",
            Skip::NoClusterIp => "has no cluster IP",
            Skip::NoService => "belongs to no Service (label kubernetes.io/service-name)",
            Skip::Fqdn => "has names for addresses (addressType FQDN)",
        })
    }
}

/// An object as taken, skipped, or refused.
pub type Conversion<T> = Result<Outcome<T>, InvalidField>;

/// Refuses what no message can carry.
fn within_size(canonical: &[u8]) -> Result<(), InvalidField> {
    if canonical.len() <= MAX_OBJECT_BYTES {
        return Ok(());
    }
    Err(InvalidField {
        field: String::new(),
        value: format!("{} bytes", canonical.len()),
        reason: format!("is more than the {MAX_OBJECT_BYTES} bytes that one object may have"),
    })
}
