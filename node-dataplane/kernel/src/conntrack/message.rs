//! Messages of ctnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Flow;
use crate::netlink::attr::{self, Attribute};
use crate::netlink::{Message, put_message};

/// `NFNL_SUBSYS_CTNETLINK` in the upper half of a message's type.
const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
/// `struct nfgenmsg`.
const GENERIC: usize = 4;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

const CTA_FILTER_ORIG_FLAGS: u16 = 1;
/// Compare the protocol's number, of all that a tuple says.
const CTA_FILTER_F_PROTO_NUM: u32 = 1 << 3;

const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;

const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// Asks for all flows of a family, where `filter` is set only those of this protocol.
pub(super) fn put_dump(out: &mut Vec<u8>, v6: bool, filter: Option<u8>, seq: u32) {
    message(out, GET, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, v6, seq, |out| {
        let Some(protocol) = filter else { return };
        let mut wanted = Vec::new();
        attr::put(&mut wanted, CTA_PROTO_NUM, &[protocol]);
        let mut tuple = Vec::new();
        nest(&mut tuple, CTA_TUPLE_PROTO, &wanted);
        nest(out, CTA_TUPLE_ORIG, &tuple);
        let mut flags = Vec::new();
        attr::put(&mut flags, CTA_FILTER_ORIG_FLAGS, &CTA_FILTER_F_PROTO_NUM.to_ne_bytes());
        nest(out, CTA_FILTER, &flags);
    });
}

/// Ends a flow. Answered only where it cannot be.
pub(super) fn put_delete(out: &mut Vec<u8>, flow: &Flow, seq: u32) {
    message(out, DELETE, libc::NLM_F_REQUEST, flow.source.is_ipv6(), seq, |out| {
        put_tuple(out, CTA_TUPLE_ORIG, flow.protocol, flow.source, flow.destination);
        if flow.zone != 0 {
            attr::put(out, CTA_ZONE, &flow.zone.to_be_bytes());
        }
        attr::put(out, CTA_ID, &flow.id.to_be_bytes());
    });
}

/// The flow in an answer to a dump; `None` where it is none with ports.
pub(super) fn read_flow(answer: &Message<'_>) -> Option<Flow> {
    if answer.kind != NEW {
        return None;
    }
    let attributes = attr::Attributes::of(answer.payload.get(GENERIC..)?);
    let (protocol, source, destination) = read_tuple(&attributes.get(CTA_TUPLE_ORIG)?)?;
    let (_, answers_from, _) = read_tuple(&attributes.get(CTA_TUPLE_REPLY)?)?;
    let zone = attributes.get(CTA_ZONE).map_or(Some(0), |zone| u16_be(&zone))?;
    Some(Flow { protocol, source, destination, answers_from, zone, id: attributes.get(CTA_ID)?.u32_be() })
}

fn put_tuple(out: &mut Vec<u8>, kind: u16, protocol: u8, source: SocketAddr, destination: SocketAddr) {
    let mut addresses = Vec::new();
    for (address, v4, v6) in
        [(source.ip(), CTA_IP_V4_SRC, CTA_IP_V6_SRC), (destination.ip(), CTA_IP_V4_DST, CTA_IP_V6_DST)]
    {
        match address {
            IpAddr::V4(address) => attr::put(&mut addresses, v4, &address.octets()),
            IpAddr::V6(address) => attr::put(&mut addresses, v6, &address.octets()),
        }
    }
    let mut transport = Vec::new();
    attr::put(&mut transport, CTA_PROTO_NUM, &[protocol]);
    attr::put(&mut transport, CTA_PROTO_SRC_PORT, &source.port().to_be_bytes());
    attr::put(&mut transport, CTA_PROTO_DST_PORT, &destination.port().to_be_bytes());
    let mut tuple = Vec::new();
    nest(&mut tuple, CTA_TUPLE_IP, &addresses);
    nest(&mut tuple, CTA_TUPLE_PROTO, &transport);
    nest(out, kind, &tuple);
}

/// Protocol, source and destination.
fn read_tuple(tuple: &Attribute<'_>) -> Option<(u8, SocketAddr, SocketAddr)> {
    let (addresses, transport) =
        (tuple.nested().get(CTA_TUPLE_IP)?.nested(), tuple.nested().get(CTA_TUPLE_PROTO)?.nested());
    let address = |v4: u16, v6: u16| match (addresses.get(v4), addresses.get(v6)) {
        (Some(it), _) => Some(IpAddr::from(Ipv4Addr::from(*it.value.first_chunk()?))),
        (None, it) => Some(IpAddr::from(Ipv6Addr::from(*it?.value.first_chunk::<16>()?))),
    };
    let source =
        SocketAddr::new(address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, u16_be(&transport.get(CTA_PROTO_SRC_PORT)?)?);
    let destination =
        SocketAddr::new(address(CTA_IP_V4_DST, CTA_IP_V6_DST)?, u16_be(&transport.get(CTA_PROTO_DST_PORT)?)?);
    Some((*transport.get(CTA_PROTO_NUM)?.value.first()?, source, destination))
}

fn u16_be(attribute: &Attribute<'_>) -> Option<u16> {
    attribute.value.first_chunk().copied().map(u16::from_be_bytes)
}

fn nest(out: &mut Vec<u8>, kind: u16, attributes: &[u8]) {
    attr::put_nest(out, kind, attributes.len());
    out.extend_from_slice(attributes);
}

fn message(
    out: &mut Vec<u8>,
    kind: u16,
    flags: libc::c_int,
    v6: bool,
    seq: u32,
    body: impl FnOnce(&mut Vec<u8>),
) {
    put_message(out, kind, flags, seq, |out| {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        out.extend_from_slice(&[u8::try_from(family).unwrap_or_default(), 0, 0, 0]);
        body(out);
    });
}

/// What the kernel answers, for tests without one.
#[cfg(test)]
pub(super) fn put_new(out: &mut Vec<u8>, flow: &Flow, seq: u32) {
    message(out, NEW, 0, flow.source.is_ipv6(), seq, |out| {
        put_tuple(out, CTA_TUPLE_ORIG, flow.protocol, flow.source, flow.destination);
        put_tuple(out, CTA_TUPLE_REPLY, flow.protocol, flow.answers_from, flow.source);
        attr::put(out, CTA_ZONE, &flow.zone.to_be_bytes());
        attr::put(out, CTA_ID, &flow.id.to_be_bytes());
    });
}
