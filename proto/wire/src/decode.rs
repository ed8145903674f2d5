//! Canonical bytes -> model, in one pass and without intermediate messages.
//!
//! The mirror of `lockstep_model::canonical`, and as strict: what decodes here is in canonical
//! form, and encoding it again gives the same bytes (but for fields this release does not know,
//! which are passed over). Everything else is an error that names the field and the value;
//! nothing falls back to a default.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_model::{
    Conditions, Endpoint, EndpointPatch, EndpointPort, EndpointSet, EndpointSetKey, Family, Feature, Hints,
    Interner, InvalidField, LoadBalancerIngress, Port, Protocol, Service, ServiceCidr, ServiceCidrKey,
    ServiceKey, ServicePort, ServiceType, TrafficDistribution, TrafficPolicy, check_name,
};
use smallvec::SmallVec;

use fields::{Fields, Value};

mod fields;
mod resource;

pub use resource::{ResourceError, decode_body, decode_key, decode_resource, take_body};

/// Why bytes are not a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not the canonical encoding of any message. For an Ack: `FAILURE_REASON_DECODE`.
    #[error("{}: {reason}", if field.is_empty() { "body" } else { field })]
    Malformed {
        /// Path of the field, in the names of the `.proto` files; empty = the whole.
        field: String,
        /// What is wrong with it, as the end of a sentence.
        reason: &'static str,
    },
    /// A field has a value it may not have. For an Ack: `FAILURE_REASON_INVALID`.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The object needs a feature that this release does not know, by its number. For an Ack:
    /// `FAILURE_REASON_UNSUPPORTED`.
    #[error("required_features: {0} is not known to this release")]
    Unsupported(u64),
}

/// An `EndpointPatch` as it was received: what it is about, and the endpoints as bytes.
///
/// Read without prost: in a large batch the allocations of a message per patch cost as much as
/// all the rest of its decoding.
#[derive(Debug)]
pub struct ReceivedPatch<'a> {
    /// `namespace/service/slice`, not checked.
    pub key: &'a str,
    /// What it starts from, of any length.
    pub base_version: &'a [u8],
    /// What it leads to, of any length.
    pub version: &'a [u8],
    upserts: SmallVec<[&'a [u8]; 2]>,
    removed: SmallVec<[&'a str; 2]>,
}

/// How much of a value an error shows.
const MAX_SHOWN_CHARS: usize = 128;

type Result<T, E = DecodeError> = std::result::Result<T, E>;

impl DecodeError {
    /// The same error, seen from the message that has `field`.
    fn inside(self, outer: String) -> Self {
        let join = |inner: String| if inner.is_empty() { outer } else { format!("{outer}.{inner}") };
        match self {
            DecodeError::Malformed { field, reason } => DecodeError::Malformed { field: join(field), reason },
            DecodeError::Invalid(fault) => {
                DecodeError::Invalid(InvalidField { field: join(fault.field), ..fault })
            }
            unsupported @ DecodeError::Unsupported(_) => unsupported,
        }
    }
}

fn invalid(field: &str, value: impl ToString, reason: &str) -> DecodeError {
    fault(field, &value.to_string(), reason).into()
}

/// A fault with the value cut to what a log or an Ack can carry.
pub(crate) fn fault(field: &str, value: &str, reason: &str) -> InvalidField {
    let value = value.chars().take(MAX_SHOWN_CHARS).collect();
    InvalidField { field: field.into(), value, reason: reason.into() }
}

/// Decodes the canonical bytes of a Service.
pub fn decode_service(bytes: &[u8], interner: &mut Interner) -> Result<Service> {
    // An object of a later release may be invalid here *because* it uses a feature: say that.
    service(bytes, interner).map_err(|error| unknown_feature(bytes).map_or(error, DecodeError::Unsupported))
}

/// Decodes the canonical bytes of an EndpointSet.
pub fn decode_endpoint_set(bytes: &[u8], interner: &mut Interner) -> Result<EndpointSet> {
    let (mut namespace, mut name, mut slice, mut set_family) = (None, None, None, None);
    let (mut ports, mut endpoints) = (Vec::<EndpointPort>::new(), Vec::<Endpoint>::new());
    let mut fields = Fields::new(bytes, &[5, 6], 6);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => namespace = Some(value.name("namespace", interner)?),
            2 => name = Some(value.name("service", interner)?),
            3 => slice = Some(value.name("slice", interner)?),
            4 => set_family = Some(value.one_of("family", family)?),
            5 => {
                let at = || format!("ports[{}]", ports.len());
                let port = endpoint_port(value.bytes("ports")?, interner).map_err(|e| e.inside(at()))?;
                let in_order =
                    |last: &EndpointPort| (&last.name, last.protocol) < (&port.name, port.protocol);
                if !ports.last().is_none_or(in_order) {
                    let value = format!("{}/{}", port.name, port.protocol);
                    return Err(invalid(&at(), value, "is not in order by (name, protocol), or twice"));
                }
                ports.push(port);
            }
            6 => {
                if endpoints.is_empty() {
                    // Whoever has one endpoint has some, of about this size.
                    endpoints.reserve_exact(1 + fields.rest() / (value.len() + 2));
                }
                let at = || format!("endpoints[{}]", endpoints.len());
                let endpoint = endpoint(value.bytes("endpoints")?, interner).map_err(|e| e.inside(at()))?;
                let family = present("family", set_family)?;
                let wrong = if family != Family::of(endpoint.address) {
                    "is not of the family of the set"
                } else if endpoints.last().is_some_and(|last| last.address >= endpoint.address) {
                    "is not in order, or twice"
                } else {
                    endpoints.push(endpoint);
                    continue;
                };
                return Err(invalid(&format!("{}.address", at()), endpoint.address, wrong));
            }
            _ => {}
        }
    }
    let service = ServiceKey { namespace: present("namespace", namespace)?, name: present("service", name)? };
    let key = EndpointSetKey { service, slice: present("slice", slice)? };
    Ok(EndpointSet { key, family: present("family", set_family)?, ports, endpoints })
}

/// Decodes the canonical bytes of a ServiceCidr.
pub fn decode_service_cidr(bytes: &[u8], interner: &mut Interner) -> Result<ServiceCidr> {
    let (mut name, mut cidrs) = (None, Vec::new());
    let mut fields = Fields::new(bytes, &[2], 2);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => name = Some(value.name("name", interner)?),
            2 => push_sorted("cidrs", &mut cidrs, value, parse_cidr)?,
            _ => {}
        }
    }
    Ok(ServiceCidr { key: ServiceCidrKey(present("name", name)?), cidrs })
}

impl<'a> ReceivedPatch<'a> {
    /// Reads what a patch names; its endpoints wait for [`decode`](Self::decode).
    pub fn read(bytes: &'a [u8]) -> Result<Self> {
        let mut patch = Self {
            key: "",
            base_version: &[],
            version: &[],
            upserts: SmallVec::new(),
            removed: SmallVec::new(),
        };
        let mut fields = Fields::in_any_order(bytes);
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => patch.key = value.text("key")?,
                2 => patch.base_version = value.bytes("base_version")?,
                3 => patch.version = value.bytes("version")?,
                4 => patch.upserts.push(value.bytes("upserts")?),
                5 => patch.removed.push(value.text("removed_addresses")?),
                _ => {}
            }
        }
        Ok(patch)
    }

    /// Decodes the endpoints. Key and versions are for the caller to judge, with what it holds.
    pub fn decode(&self, interner: &mut Interner) -> Result<EndpointPatch> {
        let mut upserts = Vec::<Endpoint>::with_capacity(self.upserts.len());
        for (index, bytes) in self.upserts.iter().enumerate() {
            let at = || format!("upserts[{index}]");
            let endpoint = endpoint(bytes, interner).map_err(|error| error.inside(at()))?;
            if upserts.last().is_some_and(|last| last.address >= endpoint.address) {
                let field = format!("{}.address", at());
                return Err(invalid(&field, endpoint.address, "is not in order, or twice"));
            }
            upserts.push(endpoint);
        }
        let mut removed = Vec::<IpAddr>::with_capacity(self.removed.len());
        for (index, text) in self.removed.iter().enumerate() {
            let field = || format!("removed_addresses[{index}]");
            let gone = parse_address(text).map_err(|reason| invalid(&field(), text, reason))?;
            if removed.last().is_some_and(|last| *last >= gone) {
                return Err(invalid(&field(), text, "is not in order, or twice"));
            }
            if upserts.binary_search_by_key(&gone, |endpoint| endpoint.address).is_ok() {
                return Err(invalid(&field(), text, "is in upserts too"));
            }
            removed.push(gone);
        }
        Ok(EndpointPatch { upserts, removed })
    }
}

fn service(bytes: &[u8], interner: &mut Interner) -> Result<Service> {
    let (mut namespace, mut name, mut service_type) = (None, None, None);
    let (mut internal, mut external) = (None, None);
    let mut features = Vec::new();
    let mut out = Service {
        key: ServiceKey { namespace: interner.intern(""), name: interner.intern("") },
        service_type: ServiceType::ClusterIp,
        cluster_ips: Vec::new(),
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: Vec::new(),
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        traffic_distribution: None,
        client_ip_affinity_seconds: None,
        load_balancer_source_ranges: Vec::new(),
        health_check_node_port: None,
        publish_not_ready_addresses: false,
    };
    let mut fields = Fields::new(bytes, &[4, 5, 6, 7, 12], 15);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => namespace = Some(value.name("namespace", interner)?),
            2 => name = Some(value.name("name", interner)?),
            3 => service_type = Some(value.one_of("type", self::service_type)?),
            4 => push_cluster_ip(&mut out.cluster_ips, value)?,
            5 => push_sorted("external_ips", &mut out.external_ips, value, parse_address)?,
            6 => push_ingress(&mut out.load_balancer_ingress, value)?,
            7 => push_port(&mut out.ports, value, interner)?,
            8 => internal = Some(value.one_of("internal_traffic_policy", policy)?),
            9 => external = Some(value.one_of("external_traffic_policy", policy)?),
            10 => out.traffic_distribution = distribution(value.number("traffic_distribution")?),
            11 => {
                let field = "client_ip_affinity_timeout";
                let timeout = value.bytes(field)?;
                let seconds = affinity_seconds(timeout).map_err(|error| error.inside(field.into()))?;
                out.client_ip_affinity_seconds = Some(seconds);
            }
            12 => {
                push_sorted(
                    "load_balancer_source_ranges",
                    &mut out.load_balancer_source_ranges,
                    value,
                    parse_cidr,
                )?;
            }
            13 => out.health_check_node_port = Some(value.port("health_check_node_port")?),
            14 => out.publish_not_ready_addresses = value.flag("publish_not_ready_addresses")?,
            15 => features = numbers(value.bytes("required_features")?)?,
            _ => {}
        }
    }
    out.key = ServiceKey { namespace: present("namespace", namespace)?, name: present("name", name)? };
    out.service_type = present("type", service_type)?;
    out.internal_traffic_policy = present("internal_traffic_policy", internal)?;
    out.external_traffic_policy = present("external_traffic_policy", external)?;
    let needed: Vec<u64> = out.required_features().into_iter().map(|feature| feature as u64).collect();
    if needed != features {
        let (needed, features) = (format!("{needed:?}"), format!("{features:?}"));
        return Err(invalid(
            "required_features",
            features,
            &format!("should be {needed}, by the other fields"),
        ));
    }
    check_port_names(&out.ports)?;
    Ok(out)
}

fn push_cluster_ip(ips: &mut Vec<IpAddr>, value: Value<'_>) -> Result<()> {
    let field = format!("cluster_ips[{}]", ips.len());
    let ip = value.address(&field)?;
    if ips.iter().any(|other| Family::of(*other) == Family::of(ip)) {
        return Err(invalid(&field, ip, "is a second address of its family"));
    }
    ips.push(ip);
    Ok(())
}

fn push_sorted<T: Ord>(
    field: &str,
    list: &mut Vec<T>,
    value: Value<'_>,
    parse: fn(&str) -> Result<T, &'static str>,
) -> Result<()> {
    let at = || format!("{field}[{}]", list.len());
    let text = value.text(field)?;
    let item = parse(text).map_err(|reason| invalid(&at(), text, reason))?;
    if list.last().is_some_and(|last| *last >= item) {
        return Err(invalid(&at(), text, "is not in order, or twice"));
    }
    list.push(item);
    Ok(())
}

fn push_ingress(list: &mut Vec<LoadBalancerIngress>, value: Value<'_>) -> Result<()> {
    let at = || format!("load_balancer_ingress[{}]", list.len());
    let decode = |bytes| -> Result<LoadBalancerIngress> {
        let (mut ip, mut proxy_mode) = (None, false);
        let mut fields = Fields::new(bytes, &[], 2);
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => ip = Some(value.address("ip")?),
                2 => proxy_mode = value.flag("proxy_mode")?,
                _ => {}
            }
        }
        Ok(LoadBalancerIngress { ip: present("ip", ip)?, proxy_mode })
    };
    let ingress = decode(value.bytes("load_balancer_ingress")?).map_err(|error| error.inside(at()))?;
    if list.last().is_some_and(|last| last.ip >= ingress.ip) {
        return Err(invalid(&format!("{}.ip", at()), ingress.ip, "is not in order, or twice"));
    }
    list.push(ingress);
    Ok(())
}

fn push_port(list: &mut Vec<ServicePort>, value: Value<'_>, interner: &mut Interner) -> Result<()> {
    let at = || format!("ports[{}]", list.len());
    let mut decode = |bytes| -> Result<ServicePort> {
        let (mut name, mut protocol, mut port, mut node_port, mut app_protocol) =
            (None, None, None, None, None);
        let mut fields = Fields::new(bytes, &[], 5);
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => name = Some(value.name("name", interner)?),
                2 => protocol = Some(value.one_of("protocol", self::protocol)?),
                3 => port = Some(value.port("port")?),
                4 => node_port = Some(value.port("node_port")?),
                5 => app_protocol = Some(interner.intern(value.text("app_protocol")?)),
                _ => {}
            }
        }
        let name = name.unwrap_or_else(|| interner.intern(""));
        let (protocol, port) = (present("protocol", protocol)?, present("port", port)?);
        Ok(ServicePort { protocol, port, name, node_port, app_protocol })
    };
    let port = decode(value.bytes("ports")?).map_err(|error| error.inside(at()))?;
    if list.last().is_some_and(|last| (last.protocol, last.port) >= (port.protocol, port.port)) {
        let value = format!("{}/{}", port.port, port.protocol);
        return Err(invalid(&at(), value, "is not in order by (protocol, port), or twice"));
    }
    list.push(port);
    Ok(())
}

fn check_port_names(ports: &[ServicePort]) -> Result<()> {
    let mut names: Vec<&str> = ports.iter().map(|port| &*port.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(twice) => Err(invalid("ports", twice[0], "is the name of two ports")),
        None => Ok(()),
    }
}

fn affinity_seconds(bytes: &[u8]) -> Result<u32> {
    let mut seconds = 0;
    let mut fields = Fields::new(bytes, &[], 2);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => seconds = value.number("seconds")?,
            2 => return Err(invalid("nanos", value.number("nanos")?, "is not 0")),
            _ => {}
        }
    }
    match u32::try_from(seconds) {
        Ok(whole @ 1..=86_400) => Ok(whole),
        _ => Err(invalid("seconds", seconds, "is not from 1 to 86400")),
    }
}

fn endpoint_port(bytes: &[u8], interner: &mut Interner) -> Result<EndpointPort> {
    let (mut name, mut protocol, mut port) = (None, None, None);
    let mut fields = Fields::new(bytes, &[], 3);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => name = Some(value.name("name", interner)?),
            2 => protocol = Some(value.one_of("protocol", self::protocol)?),
            3 => port = Some(value.port("port")?),
            _ => {}
        }
    }
    let name = name.unwrap_or_else(|| interner.intern(""));
    Ok(EndpointPort { name, protocol: present("protocol", protocol)?, port: present("port", port)? })
}

fn endpoint(bytes: &[u8], interner: &mut Interner) -> Result<Endpoint> {
    let mut out = Endpoint {
        address: IpAddr::from([0; 4]),
        node_name: None,
        zone: None,
        conditions: Conditions { ready: false, serving: false, terminating: false },
        hints: None,
    };
    let mut address = None;
    let (mut zones, mut nodes) = (Vec::new(), Vec::new());
    let mut fields = Fields::new(bytes, &[7, 8], 8);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => address = Some(value.address("address")?),
            2 => out.node_name = Some(value.name("node_name", interner)?),
            3 => out.zone = Some(value.name("zone", interner)?),
            4 => out.conditions.ready = value.flag("ready")?,
            5 => out.conditions.serving = value.flag("serving")?,
            6 => out.conditions.terminating = value.flag("terminating")?,
            7 => push_hint("hint_zones", &mut zones, value, interner)?,
            8 => push_hint("hint_nodes", &mut nodes, value, interner)?,
            _ => {}
        }
    }
    out.address = present("address", address)?;
    if !zones.is_empty() || !nodes.is_empty() {
        out.hints = Some(Box::new(Hints { zones: zones.into(), nodes: nodes.into() }));
    }
    Ok(out)
}

fn push_hint(field: &str, list: &mut Vec<Arc<str>>, value: Value<'_>, interner: &mut Interner) -> Result<()> {
    let hint = value.name(field, interner)?;
    if list.last().is_some_and(|last| *last >= hint) {
        return Err(invalid(&format!("{field}[{}]", list.len()), hint, "is not in order, or twice"));
    }
    if list.is_empty() {
        // One hint is the rule, and lists are kept without room to grow.
        list.reserve_exact(1);
    }
    list.push(hint);
    Ok(())
}

/// A packed list of varints.
fn numbers(mut bytes: &[u8]) -> Result<Vec<u64>> {
    let mut numbers = Vec::new();
    while !bytes.is_empty() {
        let number = fields::varint(&mut bytes);
        numbers.push(number.map_err(|error| error.inside("required_features".into()))?);
    }
    Ok(numbers)
}

/// The first required feature that this release does not know.
fn unknown_feature(bytes: &[u8]) -> Option<u64> {
    let mut fields = Fields::new(bytes, &[4, 5, 6, 7, 12], 15);
    while let Ok(Some((number, value))) = fields.next() {
        if number == 15 {
            let known = |feature: &u64| (1..=Feature::SourceRanges as u64).contains(feature);
            return numbers(value.bytes("").ok()?).ok()?.into_iter().find(|feature| !known(feature));
        }
    }
    None
}

fn present<T>(field: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| invalid(field, "", "is missing"))
}

fn service_type(number: u64) -> Option<ServiceType> {
    [ServiceType::ClusterIp, ServiceType::NodePort, ServiceType::LoadBalancer]
        .into_iter()
        .find(|it| *it as u64 == number)
}

fn protocol(number: u64) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|it| *it as u64 == number)
}

fn family(number: u64) -> Option<Family> {
    Family::ALL.into_iter().find(|it| *it as u64 == number)
}

fn policy(number: u64) -> Option<TrafficPolicy> {
    [TrafficPolicy::Cluster, TrafficPolicy::Local].into_iter().find(|it| *it as u64 == number)
}

/// For display only, so a value of a later release is no reason to refuse the Service.
fn distribution(number: u64) -> Option<TrafficDistribution> {
    [TrafficDistribution::PreferSameZone, TrafficDistribution::PreferSameNode]
        .into_iter()
        .find(|it| *it as u64 == number)
}

/// Reads an address in canonical text; else says why not.
pub(crate) fn parse_address(text: &str) -> Result<IpAddr, &'static str> {
    let address = IpAddr::from_str(text).map_err(|_| "is not an IP address")?;
    if let IpAddr::V6(v6) = address {
        if v6.to_ipv4_mapped().is_some() {
            return Err("is an IPv4-mapped IPv6 address");
        }
        if !is_canonical(text, v6) {
            return Err("is not the canonical text of the address");
        }
    }
    Ok(address)
}

/// Reads a CIDR in canonical text with its host bits zero; else says why not.
pub(crate) fn parse_cidr(text: &str) -> Result<IpNet, &'static str> {
    let cidr = IpNet::from_str(text).map_err(|_| "is not a CIDR")?;
    if let IpNet::V6(v6) = cidr
        && v6.addr().to_ipv4_mapped().is_some()
    {
        return Err("is an IPv4-mapped IPv6 range");
    }
    if cidr.trunc() != cidr {
        return Err("has host bits set");
    }
    if !is_canonical(text, cidr) {
        return Err("is not the canonical text of the range");
    }
    Ok(cidr)
}

/// True where `value` is written as `text`. Compares without an allocation.
fn is_canonical(text: &str, value: impl std::fmt::Display) -> bool {
    use std::io::Write;
    let mut room = [0u8; 64];
    let mut rest = &mut room[..];
    let fits = write!(rest, "{value}").is_ok();
    let left = rest.len();
    fits && &room[..room.len() - left] == text.as_bytes()
}

impl Value<'_> {
    fn address(self, field: &str) -> Result<IpAddr> {
        let text = self.text(field)?;
        parse_address(text).map_err(|reason| invalid(field, text, reason))
    }

    fn name(self, field: &str, interner: &mut Interner) -> Result<Arc<str>> {
        let text = self.text(field)?;
        check_name(field, text)?;
        Ok(interner.intern(text))
    }

    fn port(self, field: &str) -> Result<Port> {
        let number = self.number(field)?;
        let port = u16::try_from(number).ok().and_then(Port::new);
        port.ok_or_else(|| invalid(field, number, "is not a port from 1 to 65535"))
    }

    fn flag(self, field: &str) -> Result<bool> {
        match self.number(field)? {
            1 => Ok(true),
            _ => Err(DecodeError::Malformed { field: field.into(), reason: "is not a boolean" }),
        }
    }

    fn one_of<T>(self, field: &str, known: fn(u64) -> Option<T>) -> Result<T> {
        let number = self.number(field)?;
        known(number).ok_or_else(|| invalid(field, number, "is not a value this release knows"))
    }
}
