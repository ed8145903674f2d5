//! The addresses of a namespace's interfaces, and news of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Errno;
use crate::netlink::attr::Attributes;
use crate::netlink::{Dumped, Error, Message, Socket};

/// `RTNLGRP_IPV4_IFADDR` and `RTNLGRP_IPV6_IFADDR`: all changes of addresses.
const CHANGES: [libc::c_int; 2] = [5, 9];
/// Length of `struct ifaddrmsg`.
const IFADDRMSG: usize = 8;
/// `IFA_ADDRESS`: the address, or the other end of a point-to-point link.
const ADDRESS: u16 = 1;
/// `IFA_LOCAL`: the address, where the other says something else.
const LOCAL: u16 = 2;
/// Other changes may come between so often before a list is taken as it is: the news of them asks
/// for a new one.
const ATTEMPTS: u32 = 3;

/// Addresses in the network namespace of the thread that opened this.
#[derive(Debug)]
pub struct Addresses {
    requests: Socket,
    changes: Socket,
}

impl Addresses {
    /// Opens the two sockets; from now on changes are heard.
    pub fn open() -> Result<Self, Error> {
        let changes = Socket::open(libc::NETLINK_ROUTE)?;
        for group in CHANGES {
            changes.membership(group, true)?;
        }
        Ok(Self { requests: Socket::open(libc::NETLINK_ROUTE)?, changes })
    }

    /// Addresses of all interfaces, sorted, each once.
    pub fn list(&mut self) -> Result<Vec<IpAddr>, Error> {
        let mut found = Vec::new();
        for _ in 0..ATTEMPTS {
            found.clear();
            if self.dump(&mut found)? {
                break;
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// True where some may have changed since the last call.
    pub fn changed(&mut self) -> Result<bool, Error> {
        let mut changed = false;
        loop {
            match self.changes.receive(false) {
                Ok(None) => return Ok(changed),
                Ok(Some(_)) | Err(Error::Call { errno: Errno(libc::ENOBUFS), .. }) => changed = true,
                Err(other) => return Err(other),
            }
        }
    }

    /// False where other changes came between.
    fn dump(&mut self, found: &mut Vec<IpAddr>) -> Result<bool, Error> {
        let mut each = |message: Message<'_>| found.extend(address(&message));
        Ok(self.requests.dump("list addresses", &request(), &mut each)? == Dumped::Whole)
    }
}

/// A dump of `RTM_GETADDR`, of every family.
fn request() -> Vec<u8> {
    let length = u32::try_from(crate::netlink::HEADER + IFADDRMSG).unwrap_or_default();
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).unwrap_or_default();
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&libc::RTM_GETADDR.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    // Sequence number, port, and an empty ifaddrmsg.
    request.resize(crate::netlink::HEADER + IFADDRMSG, 0);
    request
}

fn address(message: &Message<'_>) -> Option<IpAddr> {
    if message.kind != libc::RTM_NEWADDR {
        return None;
    }
    let attributes = Attributes::of(message.payload.get(IFADDRMSG..)?);
    let value = attributes.get(LOCAL).or_else(|| attributes.get(ADDRESS))?.value;
    match i32::from(*message.payload.first()?) {
        libc::AF_INET => Some(Ipv4Addr::from(*value.first_chunk::<4>()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(*value.first_chunk::<16>()?).into()),
        _ => None,
    }
}
