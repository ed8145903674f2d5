//! IPVS in memory: the same requests, the same refusals.
//!
//! What it does not model: packets, and that the kernel keeps a removed real server in mind while
//! it has connections.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Connections, Ipvs, Key, RealServer, Refused, Request, Timeouts, VirtualServer};
use crate::Errno;
use crate::netlink::{Error, fail_on_purpose};

/// What the kernel says where there is no such virtual server.
const NO_SERVER: Errno = Errno(libc::ESRCH);

/// Real servers by address and port.
pub type RealServers = BTreeMap<(IpAddr, u16), RealServer>;

/// Virtual servers, and how it will misbehave. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct FakeIpvs(Arc<Mutex<Inside>>);

/// The inside of a [`FakeIpvs`].
#[derive(Debug, Default)]
pub struct Inside {
    /// All virtual servers, with their real servers by address and port.
    pub servers: BTreeMap<Key, (VirtualServer, RealServers)>,
    /// Connections of real servers, which a test sets: by virtual server, address and port.
    pub connections: BTreeMap<(Key, IpAddr, u16), Connections>,
    /// Timeouts in force.
    pub timeouts: Timeouts,
    /// Schedulers that the kernel has; any, where it is empty.
    pub schedulers: Vec<Arc<str>>,
    /// Requests so far, refused ones among them.
    pub requests: usize,
    /// Listings so far, of virtual or of real servers.
    pub lists: usize,
    /// A listing leaves these out, as the kernel does now and then.
    pub unlisted: BTreeSet<Key>,
    /// Every request about these virtual servers is refused.
    pub refuse: BTreeMap<Key, Errno>,
    /// So many calls, of any kind, fail with this.
    pub fail: Option<(usize, Errno)>,
}

impl FakeIpvs {
    /// Its inside.
    pub fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self) -> Result<MutexGuard<'_, Inside>, Error> {
        let mut inside = self.lock();
        fail_on_purpose(&mut inside.fail)?;
        Ok(inside)
    }
}

impl Inside {
    fn request(&mut self, request: &Request) -> Result<(), Errno> {
        self.requests += 1;
        let key = request.key();
        if let Some(errno) = self.refuse.get(&key) {
            return Err(*errno);
        }
        match request {
            Request::Add(server) => {
                self.accept(server)?;
                if self.servers.contains_key(&key) {
                    return Err(Errno::EXIST);
                }
                self.servers.insert(key, (server.clone(), BTreeMap::new()));
            }
            Request::Set(server) => {
                self.accept(server)?;
                self.servers.get_mut(&key).ok_or(NO_SERVER)?.0 = server.clone();
            }
            Request::Remove(_) => {
                self.servers.remove(&key).ok_or(NO_SERVER)?;
            }
            Request::AddReal(_, real) => {
                let (_, reals) = self.servers.get_mut(&key).ok_or(NO_SERVER)?;
                let name = (real.address, real.port);
                if reals.contains_key(&name) {
                    return Err(Errno::EXIST);
                }
                reals.insert(name, *real);
            }
            Request::SetReal(_, real) => {
                let (_, reals) = self.servers.get_mut(&key).ok_or(NO_SERVER)?;
                *reals.get_mut(&(real.address, real.port)).ok_or(Errno::NOENT)? = *real;
            }
            Request::RemoveReal(_, address, port) => {
                let (_, reals) = self.servers.get_mut(&key).ok_or(NO_SERVER)?;
                reals.remove(&(*address, *port)).ok_or(Errno::NOENT)?;
            }
        }
        Ok(())
    }

    /// Refuses what the kernel would: a scheduler it does not have, a netmask that is none.
    fn accept(&self, server: &VirtualServer) -> Result<(), Errno> {
        if !self.schedulers.is_empty() && !self.schedulers.contains(&server.scheduler) {
            return Err(Errno::NOENT);
        }
        let prefix = server.key.address.is_ipv6().then_some(server.netmask);
        if prefix.is_some_and(|prefix| prefix == 0 || prefix > 128) {
            return Err(Errno::INVAL);
        }
        Ok(())
    }
}

impl Ipvs for FakeIpvs {
    fn virtual_servers(&mut self) -> Result<Vec<VirtualServer>, Error> {
        let mut inside = self.call()?;
        inside.lists += 1;
        let listed = inside.servers.iter().filter(|(key, _)| !inside.unlisted.contains(key));
        Ok(listed.map(|(_, (server, _))| server.clone()).collect())
    }

    fn virtual_server(&mut self, key: Key) -> Result<Option<VirtualServer>, Error> {
        Ok(self.call()?.servers.get(&key).map(|(server, _)| server.clone()))
    }

    fn real_servers(&mut self, key: Key) -> Result<Vec<(RealServer, Connections)>, Error> {
        let mut inside = self.call()?;
        inside.lists += 1;
        let Some((_, reals)) = inside.servers.get(&key) else { return Ok(Vec::new()) };
        let connections = |real: &RealServer| {
            inside.connections.get(&(key, real.address, real.port)).copied().unwrap_or_default()
        };
        Ok(reals.values().map(|real| (*real, connections(real))).collect())
    }

    fn commit(&mut self, requests: &[Request]) -> Result<Vec<Refused>, Error> {
        let mut inside = self.call()?;
        let mut refused = Vec::new();
        for (index, request) in requests.iter().enumerate() {
            if let Err(errno) = inside.request(request) {
                refused.push(Refused { index, errno });
            }
        }
        Ok(refused)
    }

    fn count(&mut self) -> Result<u32, Error> {
        let inside = self.call()?;
        let count = inside.servers.keys().filter(|key| key.address.is_ipv4()).count();
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    fn timeouts(&mut self) -> Result<Timeouts, Error> {
        Ok(self.call()?.timeouts)
    }

    fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error> {
        let mut inside = self.call()?;
        let kept = inside.timeouts;
        let or = |new, old| if new == 0 { old } else { new };
        inside.timeouts = Timeouts {
            tcp: or(timeouts.tcp, kept.tcp),
            tcp_fin: or(timeouts.tcp_fin, kept.tcp_fin),
            udp: or(timeouts.udp, kept.udp),
        };
        Ok(())
    }
}
