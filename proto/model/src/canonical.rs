//! Canonical bytes: the protobuf encoding of `lockstep.v1.Service`, `.EndpointSet`,
//! `.ServiceCidr` and `.NodeContext` with fields in ascending number and defaults left out.
//!
//! Written by hand rather than with prost, so that the pure side of the house needs no
//! protobuf, and so that the bytes a version is hashed from are the bytes a server sends.
//! `lockstep-wire` tests that prost encodes the same objects to the same bytes.

use std::net::IpAddr;

use crate::{Endpoint, EndpointSet, NodeContext, Service, ServiceCidr};

/// Largest canonical form of a resource, so that one always fits into a message of 1 MiB. The
/// source keeps larger objects in quarantine.
pub const MAX_BYTES: usize = 512 * 1024;

/// Canonical bytes of a Service.
pub fn service(service: &Service) -> Vec<u8> {
    let mut out = Encoder::default();
    out.text(1, &service.key.namespace);
    out.text(2, &service.key.name);
    out.number(3, service.service_type as u64);
    service.cluster_ips.iter().for_each(|ip| out.address(4, *ip));
    service.external_ips.iter().for_each(|ip| out.address(5, *ip));
    for ingress in &service.load_balancer_ingress {
        out.message(6, |out| {
            out.address(1, ingress.ip);
            out.number(2, u64::from(ingress.proxy_mode));
        });
    }
    for port in &service.ports {
        out.message(7, |out| {
            out.text(1, &port.name);
            out.number(2, port.protocol as u64);
            out.number(3, u64::from(port.port.get()));
            out.number(4, port.node_port.map_or(0, |port| u64::from(port.get())));
            out.text(5, port.app_protocol.as_deref().unwrap_or_default());
        });
    }
    out.number(8, service.internal_traffic_policy as u64);
    out.number(9, service.external_traffic_policy as u64);
    out.number(10, service.traffic_distribution.map_or(0, |distribution| distribution as u64));
    if let Some(seconds) = service.client_ip_affinity_seconds {
        out.message(11, |out| out.number(1, u64::from(seconds)));
    }
    service.load_balancer_source_ranges.iter().for_each(|range| out.text(12, &range.to_string()));
    out.number(13, service.health_check_node_port.map_or(0, |port| u64::from(port.get())));
    out.number(14, u64::from(service.publish_not_ready_addresses));
    let features = service.required_features();
    if !features.is_empty() {
        out.message(15, |out| features.iter().for_each(|feature| out.varint(*feature as u64)));
    }
    out.0
}

/// Canonical bytes of an EndpointSet.
pub fn endpoint_set(set: &EndpointSet) -> Vec<u8> {
    let mut out = Encoder(Vec::with_capacity(64 + set.endpoints.len() * 64));
    out.text(1, &set.key.service.namespace);
    out.text(2, &set.key.service.name);
    out.text(3, &set.key.slice);
    out.number(4, set.family as u64);
    for port in &set.ports {
        out.message(5, |out| {
            out.text(1, &port.name);
            out.number(2, port.protocol as u64);
            out.number(3, u64::from(port.port.get()));
        });
    }
    set.endpoints.iter().for_each(|endpoint| out.message(6, |out| out.endpoint(endpoint)));
    out.0
}

/// Canonical bytes of a ServiceCidr.
pub fn service_cidr(cidr: &ServiceCidr) -> Vec<u8> {
    let mut out = Encoder::default();
    out.text(1, &cidr.key.0);
    cidr.cidrs.iter().for_each(|range| out.text(2, &range.to_string()));
    out.0
}

/// Canonical bytes of one endpoint, as they stand in those of its set.
pub fn endpoint(endpoint: &Endpoint) -> Vec<u8> {
    let mut out = Encoder(Vec::with_capacity(64));
    out.endpoint(endpoint);
    out.0
}

/// Canonical bytes of a node's facts.
pub fn node_context(node: &NodeContext) -> Vec<u8> {
    let mut out = Encoder::default();
    out.text(1, &node.name);
    out.text(2, node.uid.as_deref().unwrap_or_default());
    out.text(3, node.zone.as_deref().unwrap_or_default());
    out.text(4, node.region.as_deref().unwrap_or_default());
    node.addresses.iter().for_each(|ip| out.address(5, *ip));
    node.pod_cidrs.iter().for_each(|cidr| out.text(6, &cidr.to_string()));
    out.number(7, u64::from(node.being_removed));
    node.node_addresses.iter().for_each(|ip| out.address(8, *ip));
    out.0
}

/// Longest decimal text of an octet with a dot after it.
const OCTET_ROOM: usize = 4;

/// Decimal text of every octet with a dot after it, and the length of both.
const OCTETS: [([u8; OCTET_ROOM], u8); 256] = {
    let mut texts = [([b'.'; OCTET_ROOM], 0); 256];
    let mut octet: u8 = 0;
    loop {
        let (text, length) = &mut texts[octet as usize];
        let mut divisor = if octet >= 100 {
            100
        } else if octet >= 10 {
            10
        } else {
            1
        };
        while divisor > 0 {
            text[*length as usize] = b'0' + octet / divisor % 10;
            *length += 1;
            divisor /= 10;
        }
        *length += 1;
        if octet == u8::MAX {
            break texts;
        }
        octet += 1;
    }
};

/// The few protobuf constructs the model needs. Scalars at their default are left out.
#[derive(Default)]
struct Encoder(Vec<u8>);

const VARINT: u32 = 0;
const LENGTH_DELIMITED: u32 = 2;

impl Encoder {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push((value & 0x7f) as u8);
    }

    fn tag(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    fn number(&mut self, field: u32, value: u64) {
        if value != 0 {
            self.tag(field, VARINT);
            self.varint(value);
        }
    }

    fn text(&mut self, field: u32, text: &str) {
        if !text.is_empty() {
            self.bytes(field, text.as_bytes());
        }
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        match (u8::try_from(bytes.len()), u8::try_from(field << 3 | LENGTH_DELIMITED)) {
            // Nearly all of them.
            (Ok(length @ ..0x80), Ok(tag @ ..0x80)) => self.0.extend_from_slice(&[tag, length]),
            _ => {
                self.tag(field, LENGTH_DELIMITED);
                self.varint(bytes.len() as u64);
            }
        }
        self.0.extend_from_slice(bytes);
    }

    /// Addresses are the bulk of all bytes: written without an allocation of their own, and the
    /// IPv4 ones without the formatting machinery, which costs ten times as much.
    fn address(&mut self, field: u32, address: IpAddr) {
        use std::io::Write;
        match address {
            IpAddr::V4(v4) => {
                let mut text = [0; 4 * OCTET_ROOM];
                let mut end = 0;
                for octet in v4.octets() {
                    let (room, length) = &OCTETS[usize::from(octet)];
                    text[end..end + OCTET_ROOM].copy_from_slice(room);
                    end += usize::from(*length);
                }
                // The last one has no dot after it.
                self.bytes(field, &text[..end - 1]);
            }
            IpAddr::V6(v6) => {
                self.message(field, |out| write!(out.0, "{v6}").expect("writing to memory cannot fail"));
            }
        }
    }

    /// A length-delimited field with whatever `body` writes. The length is one byte for
    /// nearly every body, so room for one is left and the rest moved in the rare case.
    fn message(&mut self, field: u32, body: impl FnOnce(&mut Self)) {
        self.tag(field, LENGTH_DELIMITED);
        let at = self.0.len();
        self.0.push(0);
        body(self);
        let length = self.0.len() - at - 1;
        if let Ok(short @ ..0x80) = u8::try_from(length) {
            self.0[at] = short;
        } else {
            let mut prefix = Encoder::default();
            prefix.varint(length as u64);
            self.0.splice(at..=at, prefix.0);
        }
    }

    fn endpoint(&mut self, endpoint: &Endpoint) {
        self.address(1, endpoint.address);
        self.text(2, endpoint.node_name.as_deref().unwrap_or_default());
        self.text(3, endpoint.zone.as_deref().unwrap_or_default());
        self.number(4, u64::from(endpoint.conditions.ready));
        self.number(5, u64::from(endpoint.conditions.serving));
        self.number(6, u64::from(endpoint.conditions.terminating));
        if let Some(hints) = &endpoint.hints {
            hints.zones.iter().for_each(|zone| self.text(7, zone));
            hints.nodes.iter().for_each(|node| self.text(8, node));
        }
    }
}
