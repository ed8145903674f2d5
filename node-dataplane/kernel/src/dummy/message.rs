//! Messages of rtnetlink about links and addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Found, Listed, TYPE};
use crate::netlink::attr::{self, Attributes};
use crate::netlink::{Message, put_message};

/// Length of `struct ifinfomsg`, and the place of the index in it.
const IFINFOMSG: usize = 16;
const LINK_INDEX: usize = 4;
/// Length of `struct ifaddrmsg`, and the places of the index and the prefix length in it.
const IFADDRMSG: usize = 8;
const ADDRESS_INDEX: usize = 4;
const ADDRESS_PREFIX: usize = 1;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;

/// The address, or the other end of a point-to-point link.
const IFA_ADDRESS: u16 = 1;
/// The address, where the other says something else.
const IFA_LOCAL: u16 = 2;
/// No look for duplicates, which would keep the address from use until it is over.
const IFA_F_NODAD: u8 = 0x02;

/// Asks for the interface of a name.
pub(super) fn put_get_link(out: &mut Vec<u8>, name: &str, seq: u32) {
    put_message(out, libc::RTM_GETLINK, libc::NLM_F_REQUEST, seq, |out| {
        out.extend_from_slice(&[0; IFINFOMSG]);
        attr::put_text(out, IFLA_IFNAME, name);
    });
}

pub(super) fn put_new_link(out: &mut Vec<u8>, name: &str, seq: u32) {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    put_message(out, libc::RTM_NEWLINK, flags, seq, |out| {
        out.extend_from_slice(&[0; IFINFOMSG]);
        attr::put_text(out, IFLA_IFNAME, name);
        attr::nest(out, IFLA_LINKINFO, |out| attr::put(out, IFLA_INFO_KIND, TYPE.as_bytes()));
    });
}

pub(super) fn put_remove_link(out: &mut Vec<u8>, index: u32, seq: u32) {
    put_message(out, libc::RTM_DELLINK, libc::NLM_F_REQUEST, seq, |out| {
        let mut link = [0; IFINFOMSG];
        link[LINK_INDEX..LINK_INDEX + 4].copy_from_slice(&index.to_ne_bytes());
        out.extend_from_slice(&link);
    });
}

pub(super) fn read_link(answer: &Message<'_>) -> Option<Found> {
    if answer.kind != libc::RTM_NEWLINK {
        return None;
    }
    let index = attr::u32_ne(answer.payload.get(LINK_INDEX..)?);
    let info = Attributes::of(answer.payload.get(IFINFOMSG..)?).get(IFLA_LINKINFO);
    let kind = info.and_then(|info| info.nested().get(IFLA_INFO_KIND));
    Some(Found { index, dummy: kind.is_some_and(|kind| kind.text() == TYPE) })
}

/// Adds an address to an interface, or removes it.
pub(super) fn put_address(out: &mut Vec<u8>, index: u32, address: IpAddr, add: bool, seq: u32) {
    let (kind, flags) = match add {
        true => (libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL),
        false => (libc::RTM_DELADDR, 0),
    };
    let (family, octets) = match address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
    };
    put_message(out, kind, flags | libc::NLM_F_REQUEST, seq, |out| {
        let family = u8::try_from(family).unwrap_or_default();
        let prefix = u8::try_from(octets.len() * 8).unwrap_or_default();
        let flags = if add && address.is_ipv6() { IFA_F_NODAD } else { 0 };
        let [a, b, c, d] = index.to_ne_bytes();
        out.extend_from_slice(&[family, prefix, flags, 0, a, b, c, d]);
        attr::put(out, IFA_LOCAL, &octets);
        // Without it an IPv4 address is removed whatever its prefix length is.
        if add || address.is_ipv6() {
            attr::put(out, IFA_ADDRESS, &octets);
        }
    });
}

/// Asks for the addresses of all interfaces.
pub(super) fn put_list(out: &mut Vec<u8>, seq: u32) {
    put_message(out, libc::RTM_GETADDR, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, seq, |out| {
        out.extend_from_slice(&[0; IFADDRMSG]);
    });
}

/// An address, how long its prefix is, and the index of its interface.
pub(super) fn read_address(answer: &Message<'_>) -> Option<Listed> {
    if answer.kind != libc::RTM_NEWADDR {
        return None;
    }
    let index = attr::u32_ne(answer.payload.get(ADDRESS_INDEX..)?);
    let attributes = Attributes::of(answer.payload.get(IFADDRMSG..)?);
    let value = attributes.get(IFA_LOCAL).or_else(|| attributes.get(IFA_ADDRESS))?.value;
    let address = match i32::from(*answer.payload.first()?) {
        libc::AF_INET => Ipv4Addr::from(*value.first_chunk::<4>()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(*value.first_chunk::<16>()?).into(),
        _ => return None,
    };
    Some(Listed { index, prefix: *answer.payload.get(ADDRESS_PREFIX)?, address })
}
