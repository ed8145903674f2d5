//! Messages of ipset: nfnetlink, numbers from `include/uapi/linux/netfilter/ipset/ip_set.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{Declaration, Entry, Header, Kind};
use crate::netlink::attr::{self, Attribute, Attributes, NETWORK_ORDER};
use crate::netlink::{HEADER, Message, put_message};

/// The newest version of the protocol that is spoken here; Linux 4.20 brought it.
pub(super) const PROTOCOL: u8 = 7;
/// The oldest one, which is the same in all that is used here.
pub(super) const PROTOCOL_MIN: u8 = 6;

/// `NFNL_SUBSYS_IPSET` in the upper half of a message's type.
const SUBSYSTEM: u16 = 6 << 8;
/// `struct nfgenmsg`: family, version, two bytes of resource.
const GENERIC: usize = 4;

const CMD_PROTOCOL: u16 = 1;
const CMD_CREATE: u16 = 2;
const CMD_DESTROY: u16 = 3;
const CMD_SWAP: u16 = 6;
const CMD_LIST: u16 = 7;
const CMD_ADD: u16 = 9;
const CMD_DEL: u16 = 10;
const CMD_TEST: u16 = 11;

const ATTR_PROTOCOL: u16 = 1;
const ATTR_SETNAME: u16 = 2;
const ATTR_TYPENAME: u16 = 3;
const ATTR_SETNAME2: u16 = 3;
const ATTR_REVISION: u16 = 4;
const ATTR_FAMILY: u16 = 5;
const ATTR_FLAGS: u16 = 6;
const ATTR_DATA: u16 = 7;
const ATTR_ADT: u16 = 8;
const ATTR_LINENO: u16 = 9;

/// List without entries.
const FLAG_LIST_HEADER: u32 = 1 << 2;
/// The entry is an exception: what it covers does not match.
const FLAG_NOMATCH: u32 = 1 << 2;

/// In [`ATTR_DATA`]: of entries and of sets.
const IP: u16 = 1;
const PORT: u16 = 4;
const PORT_TO: u16 = 5;
const PROTO: u16 = 7;
const CADT_FLAGS: u16 = 8;
/// Of sets.
const HASHSIZE: u16 = 18;
const MAXELEM: u16 = 19;
const ELEMENTS: u16 = 24;
const REFERENCES: u16 = 25;
/// Of entries.
const IP2: u16 = 20;
const CIDR2: u16 = 21;

const IPADDR_IPV4: u16 = 1;
const IPADDR_IPV6: u16 = 2;

/// Buckets of a new hash; the kernel makes more when it takes them.
const BUCKETS: u32 = 1024;
const LAST_PORT: u16 = u16::MAX;

/// Revision of a set's type, which says what the set may have. Kernels of 4.19 and later have
/// these and higher ones, which are about time-outs, counters and comments; SCTP came with 1.
fn revision(kind: Kind) -> u8 {
    match kind {
        Kind::HashIp | Kind::BitmapPort => 0,
        Kind::HashIpPort | Kind::HashIpPortIp | Kind::HashIpPortNet => 1,
    }
}

/// Asks for the version of the protocol.
pub(super) fn put_protocol(out: &mut Vec<u8>, seq: u32) {
    message(out, CMD_PROTOCOL, 0, PROTOCOL, seq, |_| {});
}

pub(super) fn read_protocol(answer: &Message<'_>) -> Option<u8> {
    attributes(answer)?.get(ATTR_PROTOCOL)?.value.first().copied()
}

pub(super) fn put_create(out: &mut Vec<u8>, protocol: u8, declaration: &Declaration, seq: u32) {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    message(out, CMD_CREATE, flags, protocol, seq, |out| {
        let Declaration { name, kind, v6, max_elements } = declaration;
        let family = match (kind, v6) {
            (Kind::BitmapPort, _) => libc::AF_UNSPEC,
            (_, false) => libc::AF_INET,
            (_, true) => libc::AF_INET6,
        };
        attr::put_text(out, ATTR_SETNAME, name);
        attr::put_text(out, ATTR_TYPENAME, kind.type_name());
        attr::put(out, ATTR_REVISION, &[revision(*kind)]);
        attr::put(out, ATTR_FAMILY, &[u8::try_from(family).unwrap_or_default()]);
        attr::nest(out, ATTR_DATA, |out| match kind {
            Kind::BitmapPort => {
                put_u16(out, PORT, 0);
                put_u16(out, PORT_TO, LAST_PORT);
            }
            _ => {
                attr::put_u32_be(out, HASHSIZE | NETWORK_ORDER, BUCKETS);
                attr::put_u32_be(out, MAXELEM | NETWORK_ORDER, *max_elements);
            }
        });
    });
}

pub(super) fn put_destroy(out: &mut Vec<u8>, protocol: u8, name: &str, seq: u32) {
    // Without the flag, newer kernels say nothing where there is no such set.
    message(out, CMD_DESTROY, libc::NLM_F_EXCL, protocol, seq, |out| attr::put_text(out, ATTR_SETNAME, name));
}

pub(super) fn put_swap(out: &mut Vec<u8>, protocol: u8, one: &str, other: &str, seq: u32) {
    message(out, CMD_SWAP, 0, protocol, seq, |out| {
        attr::put_text(out, ATTR_SETNAME, one);
        attr::put_text(out, ATTR_SETNAME2, other);
    });
}

/// Adds or removes entries, which must fit one attribute. That an entry is there already, or is
/// not there, is no error, because `NLM_F_EXCL` is missing.
pub(super) fn put_entries(
    out: &mut Vec<u8>,
    protocol: u8,
    add: bool,
    name: &str,
    entries: &[Entry],
    seq: u32,
) {
    message(out, if add { CMD_ADD } else { CMD_DEL }, 0, protocol, seq, |out| {
        attr::put_text(out, ATTR_SETNAME, name);
        // The kernel writes the line of a refused entry here when it sends the message back.
        attr::put_u32_be(out, ATTR_LINENO | NETWORK_ORDER, 1);
        attr::nest(out, ATTR_ADT, |out| {
            for (line, entry) in (1..).zip(entries) {
                attr::nest(out, ATTR_DATA, |out| {
                    put_entry(out, entry);
                    attr::put_u32_be(out, ATTR_LINENO | NETWORK_ORDER, line);
                });
            }
        });
    });
}

/// The line of the entry that a refusal is about; 0 where it does not say.
pub(super) fn read_line(refusal: &Message<'_>) -> u32 {
    // An errno, and the refused message: its headers alone where the kernel's words follow.
    let whole = i32::from(refusal.flags) & libc::NLM_F_ACK_TLVS == 0;
    let attributes = refusal.payload.get(4 + HEADER + GENERIC..).filter(|_| whole);
    attributes
        .map(Attributes::of)
        .and_then(|all| all.get(ATTR_LINENO).filter(|line| line.value.len() == 4))
        .map_or(0, |line| line.u32_be())
}

pub(super) fn put_test(out: &mut Vec<u8>, protocol: u8, name: &str, entry: &Entry, seq: u32) {
    message(out, CMD_TEST, 0, protocol, seq, |out| {
        attr::put_text(out, ATTR_SETNAME, name);
        attr::nest(out, ATTR_DATA, |out| put_entry(out, entry));
    });
}

/// Asks for all sets without their entries.
pub(super) fn put_list_headers(out: &mut Vec<u8>, protocol: u8, seq: u32) {
    message(out, CMD_LIST, libc::NLM_F_DUMP, protocol, seq, |out| {
        attr::put_u32_be(out, ATTR_FLAGS | NETWORK_ORDER, FLAG_LIST_HEADER);
    });
}

/// Asks for one set with its entries.
pub(super) fn put_list_entries(out: &mut Vec<u8>, protocol: u8, name: &str, seq: u32) {
    message(out, CMD_LIST, libc::NLM_F_DUMP, protocol, seq, |out| attr::put_text(out, ATTR_SETNAME, name));
}

pub(super) fn read_header(answer: &Message<'_>) -> Option<Header> {
    let all = attributes(answer)?;
    let data = all.get(ATTR_DATA)?.nested();
    let number = |kind| data.get(kind).map_or(0, |attribute| attribute.u32_be());
    let family = all.get(ATTR_FAMILY)?.value.first().copied();
    Some(Header {
        name: all.get(ATTR_SETNAME)?.text().to_owned(),
        type_name: all.get(ATTR_TYPENAME)?.text().to_owned(),
        v6: family.is_some_and(|family| i32::from(family) == libc::AF_INET6),
        elements: number(ELEMENTS),
        max_elements: match (data.get(PORT), data.get(PORT_TO)) {
            (Some(first), Some(last)) => u32::from(last.u16_be().saturating_sub(first.u16_be())) + 1,
            _ => number(MAXELEM),
        },
        references: number(REFERENCES),
    })
}

/// The entries in one answer, without exceptions; `None` where one is not of this type.
pub(super) fn read_entries(answer: &Message<'_>, kind: Kind) -> Option<Vec<Entry>> {
    let all = attributes(answer)?;
    // A set without entries, or the end of its entries.
    let Some(list) = all.get(ATTR_ADT) else { return Some(Vec::new()) };
    let flags = |data: &Attribute<'_>| data.nested().get(CADT_FLAGS).map_or(0, |flags| flags.u32_be());
    list.nested()
        .filter(|data| flags(data) & FLAG_NOMATCH == 0)
        .map(|data| read_entry(&data.nested(), kind))
        .collect()
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    match *entry {
        Entry::Ip(address) => put_address(out, IP, address),
        Entry::IpPort(address, protocol, port) => put_port(out, address, protocol, port),
        Entry::IpPortIp(address, protocol, port, second) => {
            put_port(out, address, protocol, port);
            put_address(out, IP2, second);
        }
        Entry::IpPortNet(address, protocol, port, net) => {
            put_port(out, address, protocol, port);
            put_address(out, IP2, net.addr());
            attr::put(out, CIDR2, &[net.prefix_len()]);
        }
        Entry::Port(port) => put_u16(out, PORT, port),
    }
}

fn put_port(out: &mut Vec<u8>, address: IpAddr, protocol: u8, port: u16) {
    put_address(out, IP, address);
    put_u16(out, PORT, port);
    attr::put(out, PROTO, &[protocol]);
}

fn put_u16(out: &mut Vec<u8>, kind: u16, value: u16) {
    attr::put(out, kind | NETWORK_ORDER, &value.to_be_bytes());
}

fn put_address(out: &mut Vec<u8>, kind: u16, address: IpAddr) {
    attr::nest(out, kind, |out| match address {
        IpAddr::V4(address) => attr::put(out, IPADDR_IPV4 | NETWORK_ORDER, &address.octets()),
        IpAddr::V6(address) => attr::put(out, IPADDR_IPV6 | NETWORK_ORDER, &address.octets()),
    });
}

fn read_entry(data: &Attributes<'_>, kind: Kind) -> Option<Entry> {
    let port = || data.get(PORT).map(|port| port.u16_be());
    let protocol = || data.get(PROTO)?.value.first().copied();
    Some(match kind {
        Kind::HashIp => Entry::Ip(read_address(data, IP)?),
        Kind::HashIpPort => Entry::IpPort(read_address(data, IP)?, protocol()?, port()?),
        Kind::HashIpPortIp => {
            Entry::IpPortIp(read_address(data, IP)?, protocol()?, port()?, read_address(data, IP2)?)
        }
        Kind::HashIpPortNet => {
            let prefix = *data.get(CIDR2)?.value.first()?;
            let net = IpNet::new(read_address(data, IP2)?, prefix).ok()?;
            Entry::IpPortNet(read_address(data, IP)?, protocol()?, port()?, net)
        }
        Kind::BitmapPort => Entry::Port(port()?),
    })
}

fn read_address(data: &Attributes<'_>, kind: u16) -> Option<IpAddr> {
    let nest = data.get(kind)?.nested();
    match (nest.get(IPADDR_IPV4), nest.get(IPADDR_IPV6)) {
        (Some(it), _) => Some(Ipv4Addr::from(*it.value.first_chunk::<4>()?).into()),
        (None, it) => Some(Ipv6Addr::from(*it?.value.first_chunk::<16>()?).into()),
    }
}

fn attributes<'a>(answer: &Message<'a>) -> Option<Attributes<'a>> {
    answer.payload.get(GENERIC..).map(Attributes::of)
}

fn message(
    out: &mut Vec<u8>,
    command: u16,
    flags: libc::c_int,
    protocol: u8,
    seq: u32,
    body: impl FnOnce(&mut Vec<u8>),
) {
    put_message(out, SUBSYSTEM | command, flags | libc::NLM_F_REQUEST, seq, |out| {
        let family = u8::try_from(libc::AF_INET).unwrap_or_default();
        out.extend_from_slice(&[family, 0, 0, 0]);
        attr::put(out, ATTR_PROTOCOL, &[protocol]);
        body(out);
    });
}
