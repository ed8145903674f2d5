//! Resources of whatever kind, as they are received.

use bytes::Bytes;
use lockstep_model::{Interner, Key, Kind, Resource, Version, check_name};

use super::fields::Fields;
use super::{DecodeError, decode_endpoint_set, decode_service, decode_service_cidr};
use crate::raw;
use crate::raw::resource::Body;

/// Why a received resource cannot be taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourceError {
    /// No body, or one of a kind that this release does not know.
    #[error("body: is of no known kind")]
    UnknownKind,
    /// The version is not the hash of the body: the bytes were damaged on the way.
    #[error("version: {0} is not the hash of the body, which is {1}")]
    VersionMismatch(String, Version),
    /// The body is not a resource.
    #[error(transparent)]
    Body(#[from] DecodeError),
}

/// Kind and canonical bytes of a body.
pub fn take_body(body: Body) -> (Kind, Bytes) {
    match body {
        Body::Service(bytes) => (Kind::Service, bytes),
        Body::EndpointSet(bytes) => (Kind::EndpointSet, bytes),
        Body::ServiceCidr(bytes) => (Kind::ServiceCidr, bytes),
    }
}

/// Decodes the canonical bytes of a resource of a kind.
pub fn decode_body(kind: Kind, bytes: &[u8], interner: &mut Interner) -> Result<Resource, DecodeError> {
    match kind {
        Kind::Service => decode_service(bytes, interner).map(Resource::from),
        Kind::EndpointSet => decode_endpoint_set(bytes, interner).map(Resource::from),
        Kind::ServiceCidr => decode_service_cidr(bytes, interner).map(Resource::from),
    }
}

/// Decodes a resource as received, after checking that its version is the hash of its body.
pub fn decode_resource(
    resource: &raw::Resource,
    interner: &mut Interner,
) -> Result<(Version, Resource), ResourceError> {
    let body = resource.body.clone().ok_or(ResourceError::UnknownKind)?;
    let (kind, bytes) = take_body(body);
    let version = Version::of(&bytes);
    if resource.version != version.0[..] {
        let stated = resource.version.iter().map(|byte| format!("{byte:02x}")).collect();
        return Err(ResourceError::VersionMismatch(stated, version));
    }
    Ok((version, decode_body(kind, &bytes, interner)?))
}

/// Reads nothing but the key of a resource: to name one whose body is at fault. `None` where not
/// even the key can be read. The names of a key are the first fields of every kind.
pub fn decode_key(kind: Kind, bytes: &[u8]) -> Option<Key> {
    let count = kind.key_form().split('/').count();
    let mut names = Vec::with_capacity(count);
    let mut fields = Fields::new(bytes, &[], 3);
    for wanted in (1..).take(count) {
        let (_, value) = fields.next().ok()?.filter(|(field, _)| *field == wanted)?;
        let name = value.text("").ok()?;
        check_name("", name).ok()?;
        names.push(name);
    }
    Key::parse(kind, &names.join("/"))
}
