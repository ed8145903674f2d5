//! Sets that iptables rules match (ipset), over nfnetlink.
//!
//! Sets have no transactions, no notifications and no marks of ownership. A set that a rule refers
//! to cannot be destroyed, but swapped for another of its type.

pub mod fake;
mod message;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Errno;
use crate::netlink::{Error, Message, Refusal, Socket};

/// Entries of one message. So many of the largest kind are 42 KB, and fit the receive buffer where
/// the kernel sends the message back.
const ENTRIES: usize = 500;

/// Type of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Addresses.
    HashIp,
    /// Address, protocol and port.
    HashIpPort,
    /// Address, protocol and port, address.
    HashIpPortIp,
    /// Address, protocol and port, network.
    HashIpPortNet,
    /// Ports of all protocols: 0-65535.
    BitmapPort,
}

impl Kind {
    /// The kernel's word for it.
    pub fn type_name(self) -> &'static str {
        match self {
            Kind::HashIp => "hash:ip",
            Kind::HashIpPort => "hash:ip,port",
            Kind::HashIpPortIp => "hash:ip,port,ip",
            Kind::HashIpPortNet => "hash:ip,port,net",
            Kind::BitmapPort => "bitmap:port",
        }
    }
}

/// An entry of a set. Protocols are numbers: 6 = TCP, 17 = UDP, 132 = SCTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// Of [`Kind::HashIp`].
    Ip(IpAddr),
    /// Of [`Kind::HashIpPort`]: address, protocol, port.
    IpPort(IpAddr, u8, u16),
    /// Of [`Kind::HashIpPortIp`]: address, protocol, port, second address.
    IpPortIp(IpAddr, u8, u16, IpAddr),
    /// Of [`Kind::HashIpPortNet`]: address, protocol, port, network. The kernel has no network of
    /// prefix length 0: such an entry is stored as its two halves, and these are listed.
    IpPortNet(IpAddr, u8, u16, IpNet),
    /// Of [`Kind::BitmapPort`].
    Port(u16),
}

impl Entry {
    /// The type of the sets that it may be in.
    pub fn kind(&self) -> Kind {
        match self {
            Entry::Ip(_) => Kind::HashIp,
            Entry::IpPort(..) => Kind::HashIpPort,
            Entry::IpPortIp(..) => Kind::HashIpPortIp,
            Entry::IpPortNet(..) => Kind::HashIpPortNet,
            Entry::Port(_) => Kind::BitmapPort,
        }
    }

    /// True for a network that has all of another one in it, for the same address and port.
    pub fn covers(&self, other: &Entry) -> bool {
        match (self, other) {
            (Entry::IpPortNet(ip, by, at, wider), Entry::IpPortNet(of, protocol, port, net)) => {
                (ip, by, at) == (of, protocol, port) && wider.contains(net)
            }
            _ => false,
        }
    }

    /// The entries that the kernel has for it: itself without host bits, or two halves.
    fn stored(&self) -> impl Iterator<Item = Self> {
        let (first, second) = match *self {
            Entry::IpPortNet(address, protocol, port, net) if net.prefix_len() == 0 => {
                let mut halves = net.subnets(1).into_iter().flatten();
                let mut half = || halves.next().map(|net| Entry::IpPortNet(address, protocol, port, net));
                (half(), half())
            }
            Entry::IpPortNet(address, protocol, port, net) => {
                (Some(Entry::IpPortNet(address, protocol, port, net.trunc())), None)
            }
            other => (Some(other), None),
        };
        first.into_iter().chain(second)
    }
}

/// As `ipset` writes it: `10.0.0.1,tcp:80`.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Ip(address) => address.fmt(f),
            Entry::IpPort(address, protocol, port) => write!(f, "{address},{}:{port}", Protocol(*protocol)),
            Entry::IpPortIp(address, protocol, port, second) => {
                write!(f, "{address},{}:{port},{second}", Protocol(*protocol))
            }
            Entry::IpPortNet(address, protocol, port, net) => {
                write!(f, "{address},{}:{port},{net}", Protocol(*protocol))
            }
            Entry::Port(port) => port.fmt(f),
        }
    }
}

struct Protocol(u8);

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i32::from(self.0) {
            libc::IPPROTO_TCP => f.write_str("tcp"),
            libc::IPPROTO_UDP => f.write_str("udp"),
            libc::IPPROTO_SCTP => f.write_str("sctp"),
            other => other.fmt(f),
        }
    }
}

/// A set to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declaration {
    /// Its name, of at most 31 bytes.
    pub name: String,
    /// Its type.
    pub kind: Kind,
    /// IPv6 entries instead of IPv4 ones. Bitmaps have no family.
    pub v6: bool,
    /// How many entries fit; bitmaps have all ports, whatever this says.
    pub max_elements: u32,
}

/// A set that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Its name.
    pub name: String,
    /// The kernel's word for its type; [`Kind::type_name`], or another.
    pub type_name: String,
    /// IPv6 entries; never for bitmaps, which have no family.
    pub v6: bool,
    /// How many entries it has.
    pub elements: u32,
    /// How many fit: 65,536 for the bitmaps of [`Sets::create`].
    pub max_elements: u32,
    /// How many rules refer to it.
    pub references: u32,
}

/// The sets of one network namespace. Errors name the set, and the entry where one is refused.
///
/// Implemented by [`Kernel`] and by [`fake::FakeSets`].
pub trait Sets: Send {
    /// All sets, without entries, sorted by name.
    fn headers(&mut self) -> Result<Vec<Header>, Error>;

    /// The entries of a set of this type, sorted; `None` where there is no such set. What somebody
    /// marked `nomatch` is not among them; adding it takes the mark away.
    fn entries(&mut self, name: &str, kind: Kind) -> Result<Option<Vec<Entry>>, Error>;

    /// True where the set has the entry. An entry whose network is a single address counts as
    /// there, too, where a wider network of the set covers it. `ENOENT` where there is no such set.
    fn contains(&mut self, name: &str, entry: &Entry) -> Result<bool, Error>;

    /// Makes a set. `EEXIST` where there is one of the name.
    fn create(&mut self, declaration: &Declaration) -> Result<(), Error>;

    /// Destroys a set with its entries; false where there is none. `EBUSY` while rules refer to it.
    fn destroy(&mut self, name: &str) -> Result<bool, Error>;

    /// Gives each of two sets of one type the other's name. `ENOENT` where one is missing.
    fn swap(&mut self, one: &str, other: &str) -> Result<(), Error>;

    /// Adds entries, then removes entries. To add what is there, and to remove what is not, is no
    /// error; what is in both lists stays. An error leaves open which were done. `ENOENT` where
    /// there is no such set, [`is_full`] where they do not fit.
    fn change(&mut self, name: &str, add: &[Entry], remove: &[Entry]) -> Result<(), Error>;
}

/// `IPSET_ERR_HASH_FULL`, of the sets that are hashes.
const FULL: Errno = Errno(4352);
/// `IPSET_ERR_EXIST`: what is to be added is there; what is to be tested is not.
const EXIST: Errno = Errno(4103);

/// True where a set had no room for an entry.
pub fn is_full(error: &Error) -> bool {
    error.errno() == Some(FULL)
}

/// The sets of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    /// Version of the protocol that the kernel speaks, 6 or 7.
    protocol: u8,
    seq: u32,
}

impl Kernel {
    /// Opens a socket; it lives as long as this. Fails where the kernel has no ipset.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
        let mut request = Vec::new();
        message::put_protocol(&mut request, 1);
        let spoken = socket.ask("find ipset", 1, &request, message::read_protocol)?;
        let protocol = spoken.map(|spoken| spoken.min(message::PROTOCOL));
        let protocol = protocol.filter(|protocol| *protocol >= message::PROTOCOL_MIN);
        let protocol = protocol.ok_or(Error::Malformed { what: "an unknown protocol of ipset" })?;
        Ok(Self { socket, protocol, seq: 1 })
    }

    /// Sends one request that is answered only where it is refused.
    fn tell(
        &mut self,
        put: impl FnOnce(&mut Vec<u8>, u8, u32),
        refused: impl FnOnce(Refusal, u32) -> Error,
    ) -> Result<(), Error> {
        self.seq = self.seq.wrapping_add(1);
        let (mut request, mut refusal, seq) = (Vec::new(), None, self.seq);
        put(&mut request, self.protocol, seq);
        self.socket.send(&request)?;
        self.socket.refusals(&mut |answer: &Message<'_>| {
            let said = answer.refusal().filter(|said| said.seq == seq && said.errno.0 != 0);
            refusal = refusal.take().or(said.map(|said| (said, message::read_line(answer))));
        })?;
        refusal.map_or(Ok(()), |(refusal, line)| Err(refused(worded(refusal), line)))
    }

    fn enter(&mut self, add: bool, name: &str, entries: &[Entry]) -> Result<(), Error> {
        for part in entries.chunks(ENTRIES) {
            self.tell(
                |out, protocol, seq| message::put_entries(out, protocol, add, name, part, seq),
                |refusal, line| {
                    let entry = usize::try_from(line).ok().and_then(|line| part.get(line.checked_sub(1)?));
                    refusal.of(entering(add, entry, name))
                },
            )?;
        }
        Ok(())
    }
}

impl Sets for Kernel {
    fn headers(&mut self) -> Result<Vec<Header>, Error> {
        let protocol = self.protocol;
        let mut headers = self.socket.list(
            "list ipsets",
            &mut self.seq,
            |out, seq| message::put_list_headers(out, protocol, seq),
            message::read_header,
        )?;
        headers.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(headers)
    }

    fn entries(&mut self, name: &str, kind: Kind) -> Result<Option<Vec<Entry>>, Error> {
        let protocol = self.protocol;
        let listed = self.socket.list(
            &format!("list ipset {name}"),
            &mut self.seq,
            |out, seq| message::put_list_entries(out, protocol, name, seq),
            |answer| Some(message::read_entries(answer, kind)),
        );
        let parts = match listed {
            Err(Error::Refused { errno: Errno::NOENT, .. }) => return Ok(None),
            other => other?,
        };
        let mut entries = Vec::new();
        for part in parts {
            entries.extend(part.ok_or(Error::Malformed { what: "an entry of an ipset" })?);
        }
        entries.sort_unstable();
        entries.dedup();
        Ok(Some(entries))
    }

    fn contains(&mut self, name: &str, entry: &Entry) -> Result<bool, Error> {
        for stored in entry.stored() {
            let found = self.tell(
                |out, protocol, seq| message::put_test(out, protocol, name, &stored, seq),
                |refusal, _| refusal.of(format!("test {stored} in ipset {name}")),
            );
            match found {
                Err(Error::Refused { errno: EXIST, .. }) => return Ok(false),
                other => other?,
            }
        }
        Ok(true)
    }

    fn create(&mut self, declaration: &Declaration) -> Result<(), Error> {
        self.tell(
            |out, protocol, seq| message::put_create(out, protocol, declaration, seq),
            |refusal, _| refusal.of(format!("create ipset {}", declaration.name)),
        )
    }

    fn destroy(&mut self, name: &str) -> Result<bool, Error> {
        let destroyed = self.tell(
            |out, protocol, seq| message::put_destroy(out, protocol, name, seq),
            |refusal, _| refusal.of(format!("destroy ipset {name}")),
        );
        match destroyed {
            Ok(()) => Ok(true),
            Err(Error::Refused { errno: Errno::NOENT, .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    fn swap(&mut self, one: &str, other: &str) -> Result<(), Error> {
        self.tell(
            |out, protocol, seq| message::put_swap(out, protocol, one, other, seq),
            |refusal, _| refusal.of(format!("swap ipsets {one} and {other}")),
        )
    }

    fn change(&mut self, name: &str, add: &[Entry], remove: &[Entry]) -> Result<(), Error> {
        let (add, remove) = to_do(add, remove);
        // First what is new, so that an entry can take another's place without a gap.
        match self.enter(true, name, &add) {
            Err(error) if is_full(&error) && !remove.is_empty() => {
                self.enter(false, name, &remove)?;
                self.enter(true, name, &add)
            }
            other => {
                other?;
                self.enter(false, name, &remove)
            }
        }
    }
}

/// The entries to add and to remove, as the kernel stores them; one that is to be added stays.
fn to_do(add: &[Entry], remove: &[Entry]) -> (Vec<Entry>, Vec<Entry>) {
    let add: Vec<_> = add.iter().flat_map(Entry::stored).collect();
    let stays: BTreeSet<_> = if remove.is_empty() { BTreeSet::new() } else { add.iter().collect() };
    let remove = remove.iter().flat_map(Entry::stored).filter(|entry| !stays.contains(entry)).collect();
    (add, remove)
}

/// Words for a request to add or remove an entry, or several.
fn entering(add: bool, entry: Option<&Entry>, name: &str) -> String {
    let entry = entry.map_or_else(|| "entries".to_owned(), Entry::to_string);
    match add {
        true => format!("add {entry} to ipset {name}"),
        false => format!("remove {entry} from ipset {name}"),
    }
}

/// The refusal in the errnos that everybody knows, where there is one, and in words.
fn worded(refusal: Refusal) -> Refusal {
    let (errno, words) = match refusal.errno.0 {
        4097 => (refusal.errno, "the kernel does not understand it"),
        4098 => (refusal.errno, "no such type of set"),
        4099 => (refusal.errno, "too many sets"),
        4100 | 4108 => (Errno::BUSY, "something refers to it"),
        4101 => (Errno::NOENT, "the second set is missing"),
        4102 => (refusal.errno, "the sets are of different types"),
        4103 => (refusal.errno, "the entry is not there"),
        4104 => (refusal.errno, "no such prefix length"),
        4106 | 4109 | 4110 => (refusal.errno, "the address is of the other family"),
        4352 => (refusal.errno, "the set is full"),
        _ => return refusal,
    };
    Refusal { errno, message: refusal.message.or_else(|| Some(words.to_owned())), ..refusal }
}
