//! EndpointSlices.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as discovery;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, Hints, Interner, InvalidField,
    Protocol, ServiceKey, canonical,
};

use super::field::{self, Use, at, invalid};
use super::{
    Conversion, HEADLESS_LABEL, MAX_ENDPOINTS, Outcome, PROXY_NAME_LABEL, SERVICE_NAME_LABEL, Skip,
    within_size,
};

/// A Kubernetes EndpointSlice as the model has it. A missing namespace is `default`. Names
/// of nodes, zones and namespaces are shared through `names`.
pub fn endpoint_slice(object: &discovery::EndpointSlice, names: &mut Interner) -> Conversion<EndpointSet> {
    let label =
        |label| object.metadata.labels.as_ref().and_then(|labels| labels.get(label)).map(String::as_str);
    let service = label(SERVICE_NAME_LABEL).unwrap_or_default();
    let skip = if label(PROXY_NAME_LABEL).is_some() {
        Some(Skip::OtherProxy)
    } else if label(HEADLESS_LABEL).is_some() {
        Some(Skip::Headless)
    } else if object.address_type == "FQDN" {
        Some(Skip::Fqdn)
    } else if service.is_empty() {
        Some(Skip::NoService)
    } else {
        None
    };
    if let Some(skip) = skip {
        return Ok(Outcome::Skip(skip));
    }
    let key = key(object, service, names)?;
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        other => return Err(invalid("addressType", other, "is not IPv4, IPv6 or FQDN")),
    };
    let ports = ports(object.ports.as_deref().unwrap_or_default(), names)?;
    let given = object.endpoints.as_deref().unwrap_or_default();
    if given.len() > MAX_ENDPOINTS {
        let count = format!("{} endpoints", given.len());
        return Err(invalid("endpoints", count, format!("is more than {MAX_ENDPOINTS}")));
    }
    let endpoints = given.iter().enumerate();
    let endpoints: Result<_, _> =
        endpoints.map(|(index, given)| endpoint(index, given, family, names)).collect();
    let mut set = EndpointSet { key, family, ports, endpoints: endpoints? };
    set.canonicalise();
    within_size(&canonical::endpoint_set(&set))?;
    Ok(Outcome::Object(set))
}

fn key(
    object: &discovery::EndpointSlice,
    service: &str,
    names: &mut Interner,
) -> Result<EndpointSetKey, InvalidField> {
    let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
    let slice = object.metadata.name.as_deref().unwrap_or_default();
    let namespace = at(field::label(namespace), namespace, || "metadata.namespace".into())?;
    let slice = at(field::subdomain(slice), slice, || "metadata.name".into())?;
    let service = at(field::label(service), service, || format!("metadata.labels[{SERVICE_NAME_LABEL}]"))?;
    Ok(EndpointSetKey::new(ServiceKey::new(names.intern(namespace), service), slice))
}

/// A port without a number stands for every port, which no Service port can be sent to.
fn ports(given: &[discovery::EndpointPort], names: &mut Interner) -> Result<Vec<EndpointPort>, InvalidField> {
    let mut ports = Vec::with_capacity(given.len());
    let mut seen: BTreeMap<(&str, Protocol), usize> = BTreeMap::new();
    for (index, given) in given.iter().enumerate() {
        let path = |field: &str| format!("ports[{index}].{field}");
        let name = given.name.as_deref().unwrap_or_default();
        if !name.is_empty() {
            at(field::label(name), name, || path("name"))?;
        }
        let protocol = given.protocol.as_deref();
        let protocol = at(field::protocol(protocol), protocol.unwrap_or_default(), || path("protocol"))?;
        if let Some(other) = seen.insert((name, protocol), index) {
            let reason = format!("is the name of the {protocol} port ports[{other}] too");
            return Err(invalid(path("name"), name, reason));
        }
        let Some(number) = given.port else { continue };
        let port = at(field::port(number), number, || path("port"))?;
        ports.push(EndpointPort { name: names.intern(name), protocol, port });
    }
    Ok(ports)
}

/// Only the first address counts; the others are aliases of it.
fn endpoint(
    index: usize,
    given: &discovery::Endpoint,
    family: Family,
    names: &mut Interner,
) -> Result<Endpoint, InvalidField> {
    let path = |field: &str| format!("endpoints[{index}].{field}");
    let Some(text) = given.addresses.first() else {
        return Err(invalid(path("addresses"), "", "has no address"));
    };
    let address = at(field::usable_address(text, Use::Routable), text, || path("addresses[0]"))?;
    if Family::of(address) != family {
        return Err(invalid(path("addresses[0]"), text, "is not of the slice's addressType"));
    }
    let node_name = optional(given.node_name.as_deref(), field::subdomain, || path("nodeName"), names)?;
    let zone = optional(given.zone.as_deref(), field::label_value, || path("zone"), names)?;
    let conditions = given.conditions.as_ref();
    let conditions = Conditions {
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
    };
    let hints = hints(given, path, names)?;
    Ok(Endpoint { address, node_name, zone, conditions, hints })
}

/// A name that may be missing; empty is missing.
fn optional(
    text: Option<&str>,
    check: impl Fn(&str) -> Result<&str, field::Reason>,
    path: impl FnOnce() -> String,
    names: &mut Interner,
) -> Result<Option<Arc<str>>, InvalidField> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    Ok(Some(names.intern(at(check(text), text, path)?)))
}

fn hints(
    given: &discovery::Endpoint,
    path: impl Fn(&str) -> String,
    names: &mut Interner,
) -> Result<Option<Box<Hints>>, InvalidField> {
    let Some(hints) = &given.hints else { return Ok(None) };
    let mut zones = Vec::new();
    for (index, zone) in hints.for_zones.iter().flatten().enumerate() {
        let name = || path(&format!("hints.forZones[{index}].name"));
        zones.push(names.intern(at(field::label_value(&zone.name), &zone.name, name)?));
    }
    let mut nodes = Vec::new();
    for (index, node) in hints.for_nodes.iter().flatten().enumerate() {
        let name = || path(&format!("hints.forNodes[{index}].name"));
        nodes.push(names.intern(at(field::subdomain(&node.name), &node.name, name)?));
    }
    for list in [&mut zones, &mut nodes] {
        list.sort_unstable();
        list.dedup();
    }
    let any = !(zones.is_empty() && nodes.is_empty());
    Ok(any.then(|| Box::new(Hints { zones: zones.into(), nodes: nodes.into() })))
}
