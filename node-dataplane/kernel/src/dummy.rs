//! The dummy device whose addresses make packets to virtual servers the node's own, over
//! rtnetlink.
//!
//! The device stays down: its addresses count as the node's all the same, and nothing is sent or
//! answered by it.

pub mod fake;
mod message;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use crate::netlink::{Error, Socket};
use crate::{Errno, sysctl};

/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`, `RTNLGRP_IPV6_IFADDR`: all changes of links and addresses.
const CHANGES: [libc::c_int; 3] = [1, 5, 9];
/// The kernel's word for the type of the device.
const TYPE: &str = "dummy";

/// A dummy device and its addresses.
///
/// Implemented by [`Kernel`] and by [`fake::FakeDevice`]. Where an interface of its name is of
/// another type, every call but `changed` fails with `EEXIST`.
pub trait Device: Send {
    /// Makes the device, down, where it is missing; true where it did. IPv6 is turned on at it, where
    /// the kernel has IPv6 and lets it.
    fn ensure(&mut self) -> Result<bool, Error>;

    /// Its addresses, sorted, without IPv6 link-local ones that the kernel makes by itself; `None` where
    /// there is no device.
    fn addresses(&mut self) -> Result<Option<Vec<IpAddr>>, Error>;

    /// The addresses of all other interfaces, sorted, each once, without IPv6 link-local ones: those are
    /// no node's alone, and come and go with every pod.
    fn others(&mut self) -> Result<Vec<IpAddr>, Error>;

    /// Adds and then removes addresses; those that are there already, or are gone, are no errors.
    /// An address is a /32 or /128 of its own. Returns those that were refused. An error leaves
    /// open which were done; `ENODEV` where there is no device.
    fn change(&mut self, add: &[IpAddr], remove: &[IpAddr]) -> Result<Vec<(IpAddr, Errno)>, Error>;

    /// Removes the device with its addresses; false where there is none.
    fn remove(&mut self) -> Result<bool, Error>;

    /// True where links or addresses, of whatever interface, may have changed since the last call.
    /// That includes changes made here.
    fn changed(&mut self) -> Result<bool, Error>;
}

/// A device in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Kernel {
    name: String,
    requests: Socket,
    changes: Socket,
    seq: u32,
}

/// An address of some interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listed {
    index: u32,
    prefix: u8,
    address: IpAddr,
}

/// What of this name there is.
#[derive(Debug, Clone, Copy)]
struct Found {
    index: u32,
    dummy: bool,
}

impl Kernel {
    /// Opens the sockets, which live as long as this; from now on changes are heard. The device of
    /// this name, of at most 15 bytes, need not be there.
    pub fn open(name: &str) -> Result<Self, Error> {
        let changes = Socket::open(libc::NETLINK_ROUTE)?;
        for group in CHANGES {
            changes.membership(group, true)?;
        }
        let requests = Socket::open(libc::NETLINK_ROUTE)?;
        Ok(Self { name: name.to_owned(), requests, changes, seq: 0 })
    }

    /// The index of the device; `None` where there is none.
    fn index(&mut self) -> Result<Option<u32>, Error> {
        self.seq = self.seq.wrapping_add(1);
        let mut request = Vec::new();
        message::put_get_link(&mut request, &self.name, self.seq);
        let what = format!("find {}", self.name);
        match self.requests.ask(&what, self.seq, &request, message::read_link) {
            Ok(Some(Found { index, dummy: true })) => Ok(Some(index)),
            Ok(Some(Found { dummy: false, .. })) => Err(no_dummy(what)),
            Ok(None) => Err(Error::Malformed { what: "an interface" }),
            Err(Error::Refused { errno: Errno(libc::ENODEV), .. }) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// All addresses of all interfaces.
    fn list(&mut self) -> Result<Vec<Listed>, Error> {
        self.requests.list("list addresses", &mut self.seq, message::put_list, message::read_address)
    }
}

/// What stands in for the device is not one.
fn no_dummy(request: String) -> Error {
    let message = Some("an interface of this name is there and is no dummy device".to_owned());
    Error::Refused { request, message, errno: Errno::EXIST }
}

fn sorted(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut sorted: Vec<_> = addresses.collect();
    sorted.sort_unstable();
    sorted.dedup();
    sorted
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

impl Device for Kernel {
    fn ensure(&mut self) -> Result<bool, Error> {
        let missing = self.index()?.is_none();
        if missing {
            let name = &self.name;
            let put = |out: &mut Vec<u8>, (): &(), seq| message::put_new_link(out, name, seq);
            if let Some((_, refusal)) = self.requests.request_all(&mut self.seq, &[()], put)?.pop() {
                return Err(refusal.of(format!("make {}", self.name)));
            }
        }
        // Where it cannot be, addresses are refused, which says so.
        let _ = sysctl::ensure(&format!("net/ipv6/conf/{}/disable_ipv6", self.name), "0");
        Ok(missing)
    }

    fn addresses(&mut self) -> Result<Option<Vec<IpAddr>>, Error> {
        let Some(device) = self.index()? else { return Ok(None) };
        // Ours has a prefix of full length, whatever it is; the kernel's has not.
        let made = |listed: &Listed| is_link_local(listed.address) && listed.prefix < 128;
        let mine = self.list()?.into_iter().filter(|listed| listed.index == device && !made(listed));
        Ok(Some(sorted(mine.map(|listed| listed.address))))
    }

    fn others(&mut self) -> Result<Vec<IpAddr>, Error> {
        let device = self.index()?;
        let others = self.list()?.into_iter().filter(|listed| Some(listed.index) != device);
        Ok(sorted(others.map(|listed| listed.address).filter(|address| !is_link_local(*address))))
    }

    fn change(&mut self, add: &[IpAddr], remove: &[IpAddr]) -> Result<Vec<(IpAddr, Errno)>, Error> {
        let Some(device) = self.index()? else {
            let request = format!("find {}", self.name);
            return Err(Error::Refused { request, message: None, errno: Errno(libc::ENODEV) });
        };
        let mut refused = Vec::new();
        for (addresses, adds, done) in [(add, true, Errno::EXIST), (remove, false, GONE)] {
            let put = |out: &mut Vec<u8>, address: &IpAddr, seq| {
                message::put_address(out, device, *address, adds, seq);
            };
            let refusals = self.requests.request_all(&mut self.seq, addresses, put)?;
            let found = refusals.into_iter().filter(|(_, refusal)| refusal.errno != done);
            refused
                .extend(found.filter_map(|(index, refusal)| Some((*addresses.get(index)?, refusal.errno))));
        }
        Ok(refused)
    }

    fn remove(&mut self) -> Result<bool, Error> {
        let Some(device) = self.index()? else { return Ok(false) };
        let put = |out: &mut Vec<u8>, (): &(), seq| message::put_remove_link(out, device, seq);
        match self.requests.request_all(&mut self.seq, &[()], put)?.pop() {
            None => Ok(true),
            Some((_, refusal)) if refusal.errno.0 == libc::ENODEV => Ok(false),
            Some((_, refusal)) => Err(refusal.of(format!("remove {}", self.name))),
        }
    }

    fn changed(&mut self) -> Result<bool, Error> {
        let mut changed = false;
        loop {
            match self.changes.receive(false) {
                Ok(None) => return Ok(changed),
                Ok(Some(_)) | Err(Error::Call { errno: Errno(libc::ENOBUFS), .. }) => changed = true,
                Err(other) => return Err(other),
            }
        }
    }
}

/// What the kernel says where an address that is to be removed is not there.
const GONE: Errno = Errno(libc::EADDRNOTAVAIL);
