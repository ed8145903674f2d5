//! What the routing tables say about an address.

use std::net::IpAddr;

use crate::netlink::{Error, HEADER, Socket, attr};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
/// Place of `rtm_type` in `struct rtmsg`, and its value for an address of this node.
const ROUTE_TYPE: usize = 7;
const RTN_LOCAL: u8 = 2;
const ROUTE_MESSAGE: usize = 12;

/// The routing tables of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    seq: u32,
}

impl Kernel {
    /// Opens a socket; it lives as long as this.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(libc::NETLINK_ROUTE)?, seq: 0 })
    }

    /// True where the address is one of this node: on an interface, or by a `local` route. What
    /// rules know as `addrtype LOCAL` or `fib daddr type local`.
    pub fn is_local(&mut self, address: IpAddr) -> Result<bool, Error> {
        self.seq = self.seq.wrapping_add(1);
        let request = request(address, self.seq);
        self.socket.send(&request)?;
        loop {
            let Some(answers) = self.socket.receive(true)? else { continue };
            for answer in answers.filter(|answer| answer.seq == self.seq) {
                if answer.kind == RTM_NEWROUTE {
                    return Ok(answer.payload.get(ROUTE_TYPE) == Some(&RTN_LOCAL));
                }
                if answer.refusal().is_some() {
                    // No way there at all.
                    return Ok(false);
                }
            }
        }
    }
}

fn request(address: IpAddr, seq: u32) -> Vec<u8> {
    let (family, octets) = match address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
    };
    let mut route = [0; ROUTE_MESSAGE];
    route[0] = u8::try_from(family).unwrap_or_default();
    route[1] = u8::try_from(octets.len() * 8).unwrap_or_default();
    let mut out = Vec::new();
    let length = HEADER + ROUTE_MESSAGE + attr::HEADER + octets.len();
    out.extend_from_slice(&u32::try_from(length).unwrap_or_default().to_ne_bytes());
    out.extend_from_slice(&RTM_GETROUTE.to_ne_bytes());
    out.extend_from_slice(&u16::try_from(libc::NLM_F_REQUEST).unwrap_or_default().to_ne_bytes());
    out.extend_from_slice(&seq.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&route);
    attr::put(&mut out, RTA_DST, &octets);
    out
}
