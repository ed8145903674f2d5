//! Virtual servers of the kernel (IPVS), over generic netlink.
//!
//! IPVS has no transactions, no notifications and no marks of ownership: requests are done one by
//! one, and somebody else's changes are found by listing. [`Ipvs::count`] tells a flush for the
//! price of one system call.

pub mod fake;
mod message;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::Errno;
use crate::netlink::{Error, Message, Socket};

/// Flag of a virtual server: a client stays with its real server.
pub const PERSISTENT: u32 = 0x1;
/// Flag of scheduler `mh`: where the chosen real server is out of service, another is taken.
pub const SCHED_MH_FALLBACK: u32 = 0x8;
/// Flag of scheduler `mh`: the client's port counts, too.
pub const SCHED_MH_PORT: u32 = 0x10;
/// The kernel's own flag: the virtual server is in its table.
const HASHED: u32 = 0x2;

/// Listings are made until two agree, at most so many more.
const LISTINGS: u32 = 5;

/// What names a virtual server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Number of the transport protocol: 6 = TCP, 17 = UDP, 132 = SCTP.
    pub protocol: u8,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// A virtual server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualServer {
    /// Its name.
    pub key: Key,
    /// How real servers are chosen: `rr`, `mh`.
    pub scheduler: Arc<str>,
    /// [`PERSISTENT`] and flags of the scheduler.
    pub flags: u32,
    /// How long a client stays with its real server, in seconds.
    pub timeout: u32,
    /// Which clients count as one: a mask (`0xffff_ffff`) for IPv4, a prefix length (128) for IPv6.
    pub netmask: u32,
}

/// A real server of a virtual server; address and port name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RealServer {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its share; 0 = no new connections.
    pub weight: u32,
    /// How packets get there: 0 = masquerade, which translates the destination.
    pub forwarding: u32,
}

/// Connections of a real server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Connections {
    /// Established ones.
    pub active: u32,
    /// Others that the kernel still knows.
    pub inactive: u32,
    /// Clients that stay with it.
    pub persistent: u32,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Makes a virtual server. `EEXIST` where there is one, `ENOENT` without such a scheduler.
    Add(VirtualServer),
    /// Changes a virtual server. `ESRCH` where there is none.
    Set(VirtualServer),
    /// Removes a virtual server with its real servers. `ESRCH` where there is none.
    Remove(Key),
    /// Adds a real server. `EEXIST` where there is one, `ESRCH` without the virtual server.
    AddReal(Key, RealServer),
    /// Changes weight or forwarding. `ENOENT` where there is none, `ESRCH` without the virtual server.
    SetReal(Key, RealServer),
    /// Removes a real server, by address and port. Errors as for `SetReal`.
    RemoveReal(Key, IpAddr, u16),
}

impl Request {
    /// The virtual server that it is about.
    pub fn key(&self) -> Key {
        match self {
            Self::Add(server) | Self::Set(server) => server.key,
            Self::Remove(key) | Self::AddReal(key, _) | Self::SetReal(key, _) | Self::RemoveReal(key, ..) => {
                *key
            }
        }
    }
}

/// A request that the kernel did not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// Its place among the requests.
    pub index: usize,
    /// Why.
    pub errno: Errno,
}

/// How long the kernel keeps idle connections, in seconds. Those of the network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeouts {
    /// Established TCP.
    pub tcp: u32,
    /// TCP after a FIN.
    pub tcp_fin: u32,
    /// UDP.
    pub udp: u32,
}

/// IPVS of one network namespace.
///
/// Implemented by [`Kernel`] and by [`fake::FakeIpvs`].
pub trait Ipvs: Send {
    /// All virtual servers but those of firewall marks, sorted by key. Two listings in a row agree
    /// on it; an error where changes do not let them. Where virtual servers of another network
    /// namespace change all the time, some may be missing even so:
    /// [`virtual_server`](Self::virtual_server) says for certain whether one is there.
    fn virtual_servers(&mut self) -> Result<Vec<VirtualServer>, Error>;

    /// One virtual server; `None` where there is none.
    fn virtual_server(&mut self, key: Key) -> Result<Option<VirtualServer>, Error>;

    /// The real servers of a virtual server, sorted; empty where there is no such virtual server.
    fn real_servers(&mut self, key: Key) -> Result<Vec<(RealServer, Connections)>, Error>;

    /// Makes requests in order, and goes on after a refusal. Returns what was refused, in order. An
    /// error leaves open what was done.
    fn commit(&mut self, requests: &[Request]) -> Result<Vec<Refused>, Error>;

    /// How many IPv4 virtual servers there are, those of firewall marks among them.
    fn count(&mut self) -> Result<u32, Error>;

    /// The timeouts in force.
    fn timeouts(&mut self) -> Result<Timeouts, Error>;

    /// Changes the timeouts that are not 0.
    fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error>;
}

/// IPVS of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    /// Answers [`Ipvs::count`], which netlink does not.
    raw: OwnedFd,
    family: u16,
    seq: u32,
}

impl Kernel {
    /// Opens the sockets, which live as long as this. `ENOENT` where `ip_vs` is not loaded.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(libc::NETLINK_GENERIC)?;
        let mut request = Vec::new();
        message::put_family(&mut request, 1);
        let family = socket.ask("find IPVS", 1, &request, message::read_family)?;
        let family = family.ok_or(Error::Malformed { what: "a netlink family without number" })?;
        Ok(Self { socket, raw: raw_socket()?, family, seq: 1 })
    }

    /// One listing, by key. From one datagram to the next the kernel goes on where it was by
    /// counting, through one table for all network namespaces: where somebody removes a virtual
    /// server meanwhile, of whatever namespace, another is left out, and it says nothing.
    fn list(&mut self) -> Result<Vec<VirtualServer>, Error> {
        let family = self.family;
        let mut schedulers = Vec::new();
        let mut servers = self.socket.list(
            "list virtual servers",
            &mut self.seq,
            |out, seq| message::put_list_servers(out, family, seq),
            |answer| message::read_server(answer, &mut schedulers),
        )?;
        servers.sort_unstable_by_key(|server| server.key);
        // And where one is added, another is listed twice.
        servers.dedup_by_key(|server| server.key);
        Ok(servers)
    }

    fn next(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }
}

impl Ipvs for Kernel {
    fn virtual_servers(&mut self) -> Result<Vec<VirtualServer>, Error> {
        let mut before = self.list()?;
        for _ in 0..LISTINGS {
            let now = self.list()?;
            if now.iter().map(|server| server.key).eq(before.iter().map(|server| server.key)) {
                return Ok(now);
            }
            before = now;
        }
        Err(Error::Interrupted { request: "list virtual servers".to_owned(), times: LISTINGS })
    }

    fn virtual_server(&mut self, key: Key) -> Result<Option<VirtualServer>, Error> {
        let mut request = Vec::new();
        let seq = self.next();
        message::put_get_server(&mut request, self.family, key, seq);
        let read = |answer: &Message<'_>| message::read_server(answer, &mut Vec::new());
        match self.socket.ask("get a virtual server", seq, &request, read) {
            Ok(None) => Err(Error::Malformed { what: "a virtual server" }),
            Err(Error::Refused { errno: Errno(libc::ESRCH), .. }) => Ok(None),
            other => other,
        }
    }

    fn real_servers(&mut self, key: Key) -> Result<Vec<(RealServer, Connections)>, Error> {
        let family = self.family;
        let mut servers = self.socket.list(
            "list real servers",
            &mut self.seq,
            |out, seq| message::put_list_real_servers(out, family, key, seq),
            message::read_real,
        )?;
        servers.sort_unstable_by_key(|(server, _)| *server);
        servers.dedup_by_key(|(server, _)| (server.address, server.port));
        Ok(servers)
    }

    fn commit(&mut self, requests: &[Request]) -> Result<Vec<Refused>, Error> {
        let family = self.family;
        let put = |out: &mut Vec<u8>, request: &Request, seq| message::put(out, family, request, seq);
        let refused = self.socket.request_all(&mut self.seq, requests, put)?;
        Ok(refused.into_iter().map(|(index, refusal)| Refused { index, errno: refusal.errno }).collect())
    }

    fn count(&mut self) -> Result<u32, Error> {
        let mut info = GetInfo::default();
        let mut size = libc::socklen_t::try_from(size_of::<GetInfo>()).unwrap_or_default();
        // SAFETY: `info` is valid for writes of `size` bytes, which is its own size, and outlives
        // the call.
        let result = unsafe {
            libc::getsockopt(
                self.raw.as_raw_fd(),
                libc::IPPROTO_IP,
                GET_INFO,
                (&raw mut info).cast(),
                &raw mut size,
            )
        };
        if result < 0 {
            return Err(Error::Call { call: "getsockopt", errno: Errno::last() });
        }
        Ok(info.virtual_servers)
    }

    fn timeouts(&mut self) -> Result<Timeouts, Error> {
        let mut request = Vec::new();
        let seq = self.next();
        message::put_get_timeouts(&mut request, self.family, seq);
        self.socket.ask("get the timeouts of IPVS", seq, &request, message::read_timeouts)
    }

    fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error> {
        let family = self.family;
        let put = |out: &mut Vec<u8>, timeouts: &Timeouts, seq| {
            message::put_timeouts(out, family, *timeouts, seq);
        };
        let refused = self.socket.request_all(&mut self.seq, &[timeouts], put)?.pop();
        refused.map_or(Ok(()), |(_, refusal)| Err(refusal.of("set the timeouts of IPVS")))
    }
}

/// `struct ip_vs_getinfo`.
#[derive(Debug, Default)]
#[repr(C)]
struct GetInfo {
    version: u32,
    connection_table: u32,
    virtual_servers: u32,
}

/// `IP_VS_SO_GET_INFO`.
const GET_INFO: libc::c_int = 64 + 1024 + 64 + 1;

fn raw_socket() -> Result<OwnedFd, Error> {
    // SAFETY: socket(2) takes no pointers.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if raw < 0 {
        return Err(Error::Call { call: "socket", errno: Errno::last() });
    }
    // SAFETY: `raw` was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
