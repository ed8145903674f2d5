//! Between typed messages and the model.
//!
//! Objects go through their canonical bytes both ways: one encoding, one set of rules, whoever
//! asks. The hot paths use the bytes as they are and [`decode_resource`](crate::decode_resource).

use bytes::Bytes;
use lockstep_model::{
    Digest, EndpointPatch, EndpointSet, EndpointSetKey, Interner, InvalidField, Key, Kind, NodeContext,
    Resource, Service, ServiceCidr, Version, canonical, check_name,
};
use prost::Message;

use crate::decode::{
    DecodeError, decode_endpoint_set, decode_service, decode_service_cidr, fault, parse_address, parse_cidr,
};
use crate::{raw, v1};

/// The typed message of a Service.
pub fn service_to_wire(service: &Service) -> v1::Service {
    typed(&canonical::service(service))
}

/// The Service of a typed message; the message need not come from canonical bytes, its content
/// must be canonical.
pub fn service_from_wire(message: &v1::Service, interner: &mut Interner) -> Result<Service, DecodeError> {
    decode_service(&message.encode_to_vec(), interner)
}

/// The typed message of an EndpointSet.
pub fn endpoint_set_to_wire(set: &EndpointSet) -> v1::EndpointSet {
    typed(&canonical::endpoint_set(set))
}

/// The EndpointSet of a typed message, as [`service_from_wire`].
pub fn endpoint_set_from_wire(
    message: &v1::EndpointSet,
    interner: &mut Interner,
) -> Result<EndpointSet, DecodeError> {
    decode_endpoint_set(&message.encode_to_vec(), interner)
}

/// The ServiceCidr of a typed message, as [`service_from_wire`].
pub fn service_cidr_from_wire(
    message: &v1::ServiceCidr,
    interner: &mut Interner,
) -> Result<ServiceCidr, DecodeError> {
    decode_service_cidr(&message.encode_to_vec(), interner)
}

/// A resource in a typed message cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {fault}")]
pub struct UnreadableResource {
    /// Kind and name, as the message has them: `Service default/web`.
    pub object: String,
    /// What is wrong with it.
    pub fault: DecodeError,
}

/// The resource of a typed message with its version, as [`service_from_wire`]; `None` = of a kind
/// that this release does not know.
pub fn resource_from_wire(
    message: &v1::Resource,
    interner: &mut Interner,
) -> Result<Option<(Version, Resource)>, UnreadableResource> {
    let Some(body) = &message.body else { return Ok(None) };
    let mut read = || {
        let version = version_from_wire("version", &message.version)?;
        let resource = match body {
            v1::resource::Body::Service(service) => service_from_wire(service, interner)?.into(),
            v1::resource::Body::EndpointSet(set) => endpoint_set_from_wire(set, interner)?.into(),
            v1::resource::Body::ServiceCidr(cidr) => service_cidr_from_wire(cidr, interner)?.into(),
        };
        Ok((version, resource))
    };
    read().map(Some).map_err(|fault| UnreadableResource { object: object(body), fault })
}

fn object(body: &v1::resource::Body) -> String {
    match body {
        v1::resource::Body::Service(it) => format!("Service {}/{}", it.namespace, it.name),
        v1::resource::Body::EndpointSet(it) => {
            format!("EndpointSet {}/{}/{}", it.namespace, it.service, it.slice)
        }
        v1::resource::Body::ServiceCidr(it) => format!("ServiceCIDR {}", it.name),
    }
}

/// The typed message of a resource with its version.
pub fn resource_to_wire(version: Version, resource: &Resource) -> v1::Resource {
    let body = match resource {
        Resource::Service(service) => v1::resource::Body::Service(service_to_wire(service)),
        Resource::EndpointSet(set) => v1::resource::Body::EndpointSet(endpoint_set_to_wire(set)),
        Resource::ServiceCidr(cidr) => v1::resource::Body::ServiceCidr(typed(&canonical::service_cidr(cidr))),
    };
    v1::Resource { version: version_to_wire(version), body: Some(body) }
}

/// A resource with the canonical bytes of its body as they are.
pub fn raw_resource(kind: Kind, version: Version, canonical: Bytes) -> raw::Resource {
    let body = match kind {
        Kind::Service => raw::resource::Body::Service(canonical),
        Kind::EndpointSet => raw::resource::Body::EndpointSet(canonical),
        Kind::ServiceCidr => raw::resource::Body::ServiceCidr(canonical),
    };
    raw::Resource { version: version_to_wire(version), body: Some(body) }
}

/// The message of a difference between two versions of an EndpointSet.
pub fn patch_to_wire(
    key: &EndpointSetKey,
    base: Version,
    version: Version,
    patch: &EndpointPatch,
) -> raw::EndpointPatch {
    raw::EndpointPatch {
        key: key.to_string(),
        base_version: version_to_wire(base),
        version: version_to_wire(version),
        upserts: patch.upserts.iter().map(|endpoint| canonical::endpoint(endpoint).into()).collect(),
        removed_addresses: patch.removed.iter().map(|address| address.to_string()).collect(),
    }
}

/// The message of a node's facts.
pub fn node_context_to_wire(node: &NodeContext) -> v1::NodeContext {
    typed(&canonical::node_context(node))
}

/// The facts about a node in a message.
pub fn node_context_from_wire(message: &v1::NodeContext) -> Result<NodeContext, InvalidField> {
    let optional = |text: &str| (!text.is_empty()).then(|| text.into());
    let fault = |field: &str, index: usize, text: &str, reason: &str| {
        fault(&format!("{field}[{index}]"), text, reason)
    };
    check_name("name", &message.name)?;
    let mut node = NodeContext {
        name: message.name.as_str().into(),
        uid: optional(&message.uid),
        zone: optional(&message.zone),
        region: optional(&message.region),
        addresses: Vec::with_capacity(message.addresses.len()),
        pod_cidrs: Vec::with_capacity(message.pod_cidrs.len()),
        being_removed: message.being_removed,
        node_addresses: Vec::with_capacity(message.node_addresses.len()),
    };
    for (index, text) in message.addresses.iter().enumerate() {
        let address = parse_address(text).map_err(|reason| fault("addresses", index, text, reason))?;
        if node.addresses.contains(&address) {
            return Err(fault("addresses", index, text, "is there twice"));
        }
        node.addresses.push(address);
    }
    for (index, text) in message.pod_cidrs.iter().enumerate() {
        let cidr = parse_cidr(text).map_err(|reason| fault("pod_cidrs", index, text, reason))?;
        node.pod_cidrs.push(cidr);
    }
    if node.uid.is_none() && node != NodeContext::unknown(node.name.clone()) {
        let reason = "is missing, though there are facts about the node";
        return Err(InvalidField { field: "uid".into(), value: String::new(), reason: reason.into() });
    }
    for (index, text) in message.node_addresses.iter().enumerate() {
        let address = parse_address(text).map_err(|reason| fault("node_addresses", index, text, reason))?;
        if node.node_addresses.last().is_some_and(|last| *last >= address) {
            return Err(fault("node_addresses", index, text, "is not in order, or is there twice"));
        }
        node.node_addresses.push(address);
    }
    Ok(node)
}

/// The message that names a resource, in one version or (`None`) whichever.
pub fn key_to_wire(key: &Key, version: Option<Version>) -> v1::ResourceRef {
    v1::ResourceRef {
        kind: kind_to_wire(key.kind()).into(),
        key: key.to_string(),
        version: version.map_or_else(Bytes::new, version_to_wire),
    }
}

/// The resource that a message names.
pub fn key_from_wire(message: &v1::ResourceRef) -> Result<(Key, Option<Version>), InvalidField> {
    let kind = kind_from_wire("kind", message.kind)?;
    let key = key_from_text(kind, &message.key)?;
    let version = match &message.version[..] {
        [] => None,
        bytes => Some(version_from_wire("version", bytes)?),
    };
    Ok((key, version))
}

/// Reads the text form of a key, checking each name in it.
pub fn key_from_text(kind: Kind, text: &str) -> Result<Key, InvalidField> {
    text.split('/').try_for_each(|name| check_name("key", name))?;
    Key::parse(kind, text).ok_or_else(|| fault("key", text, &format!("is not {}", kind.key_form())))
}

/// The number of a kind of resource.
pub fn kind_to_wire(kind: Kind) -> v1::ResourceKind {
    match kind {
        Kind::Service => v1::ResourceKind::Service,
        Kind::EndpointSet => v1::ResourceKind::EndpointSet,
        Kind::ServiceCidr => v1::ResourceKind::ServiceCidr,
    }
}

/// The kind of resource that `field` has the number of.
pub fn kind_from_wire(field: &str, number: i32) -> Result<Kind, InvalidField> {
    let known = Kind::ALL.into_iter().find(|kind| i32::from(kind_to_wire(*kind)) == number);
    known.ok_or_else(|| fault(field, &number.to_string(), "is not a kind this release knows"))
}

/// The bytes of a version.
pub fn version_to_wire(version: Version) -> Bytes {
    Bytes::copy_from_slice(&version.0)
}

/// The version in `field`.
pub fn version_from_wire(field: &str, bytes: &[u8]) -> Result<Version, InvalidField> {
    Version::from_bytes(bytes).ok_or_else(|| wrong_length(field, bytes, "is not 16 bytes"))
}

/// The bytes of a digest.
pub fn digest_to_wire(digest: Digest) -> Bytes {
    Bytes::copy_from_slice(&digest.to_bytes())
}

/// The digest of a position.
pub fn digest_from_wire(position: &v1::Position) -> Result<Digest, InvalidField> {
    let bytes = &position.digest;
    Digest::from_bytes(bytes).ok_or_else(|| wrong_length("digest", bytes, "is not 32 bytes"))
}

fn wrong_length(field: &str, bytes: &[u8], reason: &str) -> InvalidField {
    fault(field, &format!("{} bytes", bytes.len()), reason)
}

/// Canonical bytes are valid protobuf by construction, which the tests of this crate hold.
fn typed<M: Message + Default>(canonical: &[u8]) -> M {
    M::decode(canonical).expect("canonical bytes are a protobuf message")
}
