//! Messages of IPVS: generic netlink, numbers from `include/uapi/linux/ip_vs.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::{Connections, HASHED, Key, RealServer, Request, Timeouts, VirtualServer};
use crate::netlink::attr::{self, Attribute, Attributes};
use crate::netlink::{Message, put_message};

/// `GENL_ID_CTRL`: who knows the families' numbers.
const CONTROL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const FAMILY: &str = "IPVS";
/// `struct genlmsghdr`: command, version, two reserved bytes.
const GENERIC: usize = 4;
const VERSION: u8 = 1;

const NEW_SERVICE: u8 = 1;
const SET_SERVICE: u8 = 2;
const DEL_SERVICE: u8 = 3;
const GET_SERVICE: u8 = 4;
const NEW_DEST: u8 = 5;
const SET_DEST: u8 = 6;
const DEL_DEST: u8 = 7;
const GET_DEST: u8 = 8;
const SET_CONFIG: u8 = 12;
const GET_CONFIG: u8 = 13;

const CMD_ATTR_SERVICE: u16 = 1;
const CMD_ATTR_DEST: u16 = 2;
const CMD_ATTR_TIMEOUT_TCP: u16 = 4;
const CMD_ATTR_TIMEOUT_TCP_FIN: u16 = 5;
const CMD_ATTR_TIMEOUT_UDP: u16 = 6;

const SVC_ATTR_AF: u16 = 1;
const SVC_ATTR_PROTOCOL: u16 = 2;
const SVC_ATTR_ADDR: u16 = 3;
const SVC_ATTR_PORT: u16 = 4;
const SVC_ATTR_SCHED_NAME: u16 = 6;
const SVC_ATTR_FLAGS: u16 = 7;
const SVC_ATTR_TIMEOUT: u16 = 8;
const SVC_ATTR_NETMASK: u16 = 9;

const DEST_ATTR_ADDR: u16 = 1;
const DEST_ATTR_PORT: u16 = 2;
const DEST_ATTR_FWD_METHOD: u16 = 3;
const DEST_ATTR_WEIGHT: u16 = 4;
const DEST_ATTR_U_THRESH: u16 = 5;
const DEST_ATTR_L_THRESH: u16 = 6;
const DEST_ATTR_ACTIVE_CONNS: u16 = 7;
const DEST_ATTR_INACT_CONNS: u16 = 8;
const DEST_ATTR_PERSIST_CONNS: u16 = 9;
const DEST_ATTR_ADDR_FAMILY: u16 = 11;

/// Asks for the number of the family.
pub(super) fn put_family(out: &mut Vec<u8>, seq: u32) {
    generic(out, CONTROL, CTRL_CMD_GETFAMILY, 0, seq, |out| {
        attr::put_text(out, CTRL_ATTR_FAMILY_NAME, FAMILY)
    });
}

pub(super) fn read_family(answer: &Message<'_>) -> Option<u16> {
    let attributes = Attributes::of(answer.payload.get(GENERIC..)?);
    Some(attr::u16_ne(attributes.get(CTRL_ATTR_FAMILY_ID)?.value))
}

pub(super) fn put_list_servers(out: &mut Vec<u8>, family: u16, seq: u32) {
    generic(out, family, GET_SERVICE, libc::NLM_F_DUMP, seq, |_| {});
}

pub(super) fn put_get_server(out: &mut Vec<u8>, family: u16, key: Key, seq: u32) {
    generic(out, family, GET_SERVICE, 0, seq, |out| put_key(out, key));
}

pub(super) fn put_list_real_servers(out: &mut Vec<u8>, family: u16, key: Key, seq: u32) {
    generic(out, family, GET_DEST, libc::NLM_F_DUMP, seq, |out| put_key(out, key));
}

pub(super) fn put_get_timeouts(out: &mut Vec<u8>, family: u16, seq: u32) {
    generic(out, family, GET_CONFIG, 0, seq, |_| {});
}

pub(super) fn put_timeouts(out: &mut Vec<u8>, family: u16, timeouts: Timeouts, seq: u32) {
    generic(out, family, SET_CONFIG, 0, seq, |out| {
        // The kernel leaves what is 0.
        attr::put_u32(out, CMD_ATTR_TIMEOUT_TCP, timeouts.tcp);
        attr::put_u32(out, CMD_ATTR_TIMEOUT_TCP_FIN, timeouts.tcp_fin);
        attr::put_u32(out, CMD_ATTR_TIMEOUT_UDP, timeouts.udp);
    });
}

pub(super) fn read_timeouts(answer: &Message<'_>) -> Timeouts {
    let attributes = Attributes::of(answer.payload.get(GENERIC..).unwrap_or_default());
    Timeouts {
        tcp: number(&attributes, CMD_ATTR_TIMEOUT_TCP),
        tcp_fin: number(&attributes, CMD_ATTR_TIMEOUT_TCP_FIN),
        udp: number(&attributes, CMD_ATTR_TIMEOUT_UDP),
    }
}

/// Appends one change.
pub(super) fn put(out: &mut Vec<u8>, family: u16, request: &Request, seq: u32) {
    let command = match request {
        Request::Add(_) => NEW_SERVICE,
        Request::Set(_) => SET_SERVICE,
        Request::Remove(_) => DEL_SERVICE,
        Request::AddReal(..) => NEW_DEST,
        Request::SetReal(..) => SET_DEST,
        Request::RemoveReal(..) => DEL_DEST,
    };
    generic(out, family, command, 0, seq, |out| match request {
        Request::Add(server) | Request::Set(server) => put_server(out, server),
        Request::Remove(key) => put_key(out, *key),
        Request::AddReal(key, real) | Request::SetReal(key, real) => {
            put_key(out, *key);
            attr::nest(out, CMD_ATTR_DEST, |out| {
                put_real_name(out, real.address, real.port);
                attr::put_u32(out, DEST_ATTR_FWD_METHOD, real.forwarding);
                attr::put_u32(out, DEST_ATTR_WEIGHT, real.weight);
                // No limits of connections.
                attr::put_u32(out, DEST_ATTR_U_THRESH, 0);
                attr::put_u32(out, DEST_ATTR_L_THRESH, 0);
            });
        }
        Request::RemoveReal(key, address, port) => {
            put_key(out, *key);
            attr::nest(out, CMD_ATTR_DEST, |out| put_real_name(out, *address, *port));
        }
    });
}

fn put_key(out: &mut Vec<u8>, key: Key) {
    attr::nest(out, CMD_ATTR_SERVICE, |out| put_key_attributes(out, key));
}

fn put_server(out: &mut Vec<u8>, server: &VirtualServer) {
    attr::nest(out, CMD_ATTR_SERVICE, |out| {
        put_key_attributes(out, server.key);
        attr::put_text(out, SVC_ATTR_SCHED_NAME, &server.scheduler);
        // `struct ip_vs_flags`: the flags, and which of them are meant.
        let [a, b, c, d] = server.flags.to_ne_bytes();
        attr::put(out, SVC_ATTR_FLAGS, &[a, b, c, d, 0xff, 0xff, 0xff, 0xff]);
        attr::put_u32(out, SVC_ATTR_TIMEOUT, server.timeout);
        // A mask is in network order, a prefix length in the host's.
        match server.key.address {
            IpAddr::V4(_) => attr::put_u32_be(out, SVC_ATTR_NETMASK, server.netmask),
            IpAddr::V6(_) => attr::put_u32(out, SVC_ATTR_NETMASK, server.netmask),
        }
    });
}

fn put_key_attributes(out: &mut Vec<u8>, key: Key) {
    attr::put_u16(out, SVC_ATTR_AF, address_family(key.address));
    attr::put_u16(out, SVC_ATTR_PROTOCOL, key.protocol.into());
    put_address(out, SVC_ATTR_ADDR, key.address);
    attr::put(out, SVC_ATTR_PORT, &key.port.to_be_bytes());
}

fn put_real_name(out: &mut Vec<u8>, address: IpAddr, port: u16) {
    attr::put_u16(out, DEST_ATTR_ADDR_FAMILY, address_family(address));
    put_address(out, DEST_ATTR_ADDR, address);
    attr::put(out, DEST_ATTR_PORT, &port.to_be_bytes());
}

/// `union nf_inet_addr`: 16 bytes, whatever the family.
fn put_address(out: &mut Vec<u8>, kind: u16, address: IpAddr) {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => bytes = address.octets(),
    }
    attr::put(out, kind, &bytes);
}

fn address_family(address: IpAddr) -> u16 {
    let family = if address.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    u16::try_from(family).unwrap_or_default()
}

/// The virtual server in an answer; `None` where it is one of a firewall mark. Schedulers that
/// were seen before are shared.
pub(super) fn read_server(answer: &Message<'_>, schedulers: &mut Vec<Arc<str>>) -> Option<VirtualServer> {
    let nest = answered(answer, NEW_SERVICE, CMD_ATTR_SERVICE)?;
    let protocol = attr::u16_ne(nest.get(SVC_ATTR_PROTOCOL)?.value);
    let address = read_address(&nest.get(SVC_ATTR_ADDR)?, number16(&nest, SVC_ATTR_AF))?;
    let key =
        Key { protocol: u8::try_from(protocol).ok()?, address, port: nest.get(SVC_ATTR_PORT)?.u16_be() };
    let name = nest.get(SVC_ATTR_SCHED_NAME)?.text();
    let known = schedulers.iter().find(|scheduler| &***scheduler == name).cloned();
    let scheduler = known.unwrap_or_else(|| {
        let new: Arc<str> = name.into();
        schedulers.push(new.clone());
        new
    });
    let netmask = nest.get(SVC_ATTR_NETMASK)?;
    Some(VirtualServer {
        key,
        scheduler,
        flags: number(&nest, SVC_ATTR_FLAGS) & !HASHED,
        timeout: number(&nest, SVC_ATTR_TIMEOUT),
        netmask: if address.is_ipv4() { netmask.u32_be() } else { attr::u32_ne(netmask.value) },
    })
}

/// The real server in an answer to a dump.
pub(super) fn read_real(answer: &Message<'_>) -> Option<(RealServer, Connections)> {
    let nest = answered(answer, NEW_DEST, CMD_ATTR_DEST)?;
    let server = RealServer {
        address: read_address(&nest.get(DEST_ATTR_ADDR)?, number16(&nest, DEST_ATTR_ADDR_FAMILY))?,
        port: nest.get(DEST_ATTR_PORT)?.u16_be(),
        weight: number(&nest, DEST_ATTR_WEIGHT),
        forwarding: number(&nest, DEST_ATTR_FWD_METHOD),
    };
    let connections = Connections {
        active: number(&nest, DEST_ATTR_ACTIVE_CONNS),
        inactive: number(&nest, DEST_ATTR_INACT_CONNS),
        persistent: number(&nest, DEST_ATTR_PERSIST_CONNS),
    };
    Some((server, connections))
}

/// The attributes of the one nest of an answer.
fn answered<'a>(answer: &Message<'a>, command: u8, nest: u16) -> Option<Attributes<'a>> {
    if answer.payload.first() != Some(&command) {
        return None;
    }
    Some(Attributes::of(answer.payload.get(GENERIC..)?).get(nest)?.nested())
}

fn read_address(attribute: &Attribute<'_>, family: u16) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::from(*attribute.value.first_chunk::<4>()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(*attribute.value.first_chunk::<16>()?).into()),
        _ => None,
    }
}

fn number(attributes: &Attributes<'_>, kind: u16) -> u32 {
    attributes.get(kind).map_or(0, |attribute| attr::u32_ne(attribute.value))
}

fn number16(attributes: &Attributes<'_>, kind: u16) -> u16 {
    attributes.get(kind).map_or(0, |attribute| attr::u16_ne(attribute.value))
}

fn generic(
    out: &mut Vec<u8>,
    family: u16,
    command: u8,
    flags: libc::c_int,
    seq: u32,
    body: impl FnOnce(&mut Vec<u8>),
) {
    put_message(out, family, flags | libc::NLM_F_REQUEST, seq, |out| {
        out.extend_from_slice(&[command, VERSION, 0, 0]);
        body(out);
    });
}
