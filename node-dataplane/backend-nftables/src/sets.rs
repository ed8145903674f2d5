//! The sets and maps: their declarations, keys and data.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lockstep_kernel::nf_tables::{Set, Verdict};
use lockstep_model::{Family, Port, Protocol};
use lockstep_view::{Frontend, Pool, Target};

use crate::names::{SharedChain, Via};

/// A set or map of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum SetId {
    Frontends,
    NodePorts,
    Endpoints,
    LocalEndpoints,
    NodeEndpoints,
    LocalNodeEndpoints,
    NoEndpoints,
    NoEndpointsNodePorts,
    Serials,
    LocalSerials,
    NodeSerials,
    LocalNodeSerials,
    AffineEndpoints,
    LocalAffineEndpoints,
    AffineNodeEndpoints,
    LocalAffineNodeEndpoints,
    Affinity,
    NodeAffinity,
    Hairpin,
    NodeIps,
    Restricted,
    Allowed,
    ClusterIps,
    ServiceCidrs,
}

impl SetId {
    pub(crate) const ALL: [SetId; 24] = [
        SetId::Frontends,
        SetId::NodePorts,
        SetId::Endpoints,
        SetId::LocalEndpoints,
        SetId::NodeEndpoints,
        SetId::LocalNodeEndpoints,
        SetId::NoEndpoints,
        SetId::NoEndpointsNodePorts,
        SetId::Serials,
        SetId::LocalSerials,
        SetId::NodeSerials,
        SetId::LocalNodeSerials,
        SetId::AffineEndpoints,
        SetId::LocalAffineEndpoints,
        SetId::AffineNodeEndpoints,
        SetId::LocalAffineNodeEndpoints,
        SetId::Affinity,
        SetId::NodeAffinity,
        SetId::Hairpin,
        SetId::NodeIps,
        SetId::Restricted,
        SetId::Allowed,
        SetId::ClusterIps,
        SetId::ServiceCidrs,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            SetId::Frontends => "frontends",
            SetId::NodePorts => "nodeports",
            SetId::Endpoints => "endpoints",
            SetId::LocalEndpoints => "local_endpoints",
            SetId::NodeEndpoints => "node_endpoints",
            SetId::LocalNodeEndpoints => "local_node_endpoints",
            SetId::NoEndpoints => "no_endpoints",
            SetId::NoEndpointsNodePorts => "no_endpoints_nodeports",
            SetId::Serials => "serials",
            SetId::LocalSerials => "local_serials",
            SetId::NodeSerials => "node_serials",
            SetId::LocalNodeSerials => "local_node_serials",
            SetId::AffineEndpoints => "affine_endpoints",
            SetId::LocalAffineEndpoints => "local_affine_endpoints",
            SetId::AffineNodeEndpoints => "affine_node_endpoints",
            SetId::LocalAffineNodeEndpoints => "local_affine_node_endpoints",
            SetId::Affinity => "affinity",
            SetId::NodeAffinity => "node_affinity",
            SetId::Hairpin => "hairpin",
            SetId::NodeIps => "node_ips",
            SetId::Restricted => "restricted",
            SetId::Allowed => "allowed",
            SetId::ClusterIps => "cluster_ips",
            SetId::ServiceCidrs => "service_cidrs",
        }
    }

    /// The map of verdicts for a kind of frontend.
    pub(crate) fn frontends(via: Via) -> Self {
        match via {
            Via::Address => SetId::Frontends,
            Via::NodePort => SetId::NodePorts,
        }
    }

    /// The map of refusals for a kind of frontend.
    pub(crate) fn refusals(via: Via) -> Self {
        match via {
            Via::Address => SetId::NoEndpoints,
            Via::NodePort => SetId::NoEndpointsNodePorts,
        }
    }

    /// The map of endpoints for a kind of frontend and a pool.
    pub(crate) fn endpoints(via: Via, pool: Pool) -> Self {
        match (via, pool) {
            (Via::Address, Pool::Cluster) => SetId::Endpoints,
            (Via::Address, Pool::Local) => SetId::LocalEndpoints,
            (Via::NodePort, Pool::Cluster) => SetId::NodeEndpoints,
            (Via::NodePort, Pool::Local) => SetId::LocalNodeEndpoints,
        }
    }

    /// The map of serial numbers for a kind of frontend and a pool, where there is affinity.
    pub(crate) fn serials(via: Via, pool: Pool) -> Self {
        match (via, pool) {
            (Via::Address, Pool::Cluster) => SetId::Serials,
            (Via::Address, Pool::Local) => SetId::LocalSerials,
            (Via::NodePort, Pool::Cluster) => SetId::NodeSerials,
            (Via::NodePort, Pool::Local) => SetId::LocalNodeSerials,
        }
    }

    /// The map of endpoints by serial number for a kind of frontend and a pool: whoever was given an
    /// endpoint of the one is not sent there by the other.
    pub(crate) fn affine_endpoints(via: Via, pool: Pool) -> Self {
        match (via, pool) {
            (Via::Address, Pool::Cluster) => SetId::AffineEndpoints,
            (Via::Address, Pool::Local) => SetId::LocalAffineEndpoints,
            (Via::NodePort, Pool::Cluster) => SetId::AffineNodeEndpoints,
            (Via::NodePort, Pool::Local) => SetId::LocalAffineNodeEndpoints,
        }
    }

    /// True for those.
    pub(crate) fn is_affine(self) -> bool {
        self.has_endpoints() && self.key().contains(&Field::Serial)
    }

    /// What clients have been given, for a kind of frontend.
    pub(crate) fn affinity(via: Via) -> Self {
        match via {
            Via::Address => SetId::Affinity,
            Via::NodePort => SetId::NodeAffinity,
        }
    }

    /// Packets fill it, not we: its elements are neither compared nor written.
    pub(crate) fn is_learned(self) -> bool {
        matches!(self, SetId::Affinity | SetId::NodeAffinity)
    }

    /// It says which endpoint an index or a serial number is.
    pub(crate) fn has_endpoints(self) -> bool {
        !self.is_learned() && matches!(self.data(), Data::Fields(_))
    }

    /// How it holds ranges.
    pub(crate) fn ranges(self) -> Ranges {
        match self {
            SetId::Allowed => Ranges::Whole,
            SetId::ServiceCidrs => Ranges::ByEnds,
            _ => Ranges::None,
        }
    }

    /// How many elements of the kernel one of ours is, at most.
    pub(crate) fn kernel_elements(self) -> usize {
        if self.ranges() == Ranges::ByEnds { 2 } else { 1 }
    }

    pub(crate) fn is_map(self) -> bool {
        self.data() != Data::None
    }

    /// What it says about a key.
    pub(crate) fn data(self) -> Data {
        match self {
            SetId::Hairpin
            | SetId::NodeIps
            | SetId::Restricted
            | SetId::Allowed
            | SetId::ClusterIps
            | SetId::ServiceCidrs => Data::None,
            SetId::Frontends | SetId::NodePorts | SetId::NoEndpoints | SetId::NoEndpointsNodePorts => {
                Data::Verdict
            }
            SetId::Endpoints
            | SetId::LocalEndpoints
            | SetId::NodeEndpoints
            | SetId::LocalNodeEndpoints
            | SetId::AffineEndpoints
            | SetId::LocalAffineEndpoints
            | SetId::AffineNodeEndpoints
            | SetId::LocalAffineNodeEndpoints => Data::Fields(&TARGET),
            SetId::Serials
            | SetId::LocalSerials
            | SetId::NodeSerials
            | SetId::LocalNodeSerials
            | SetId::Affinity
            | SetId::NodeAffinity => Data::Fields(&[Field::Serial]),
        }
    }

    /// The fields of its key.
    pub(crate) fn key(self) -> &'static [Field] {
        match self {
            SetId::Frontends | SetId::NoEndpoints | SetId::Restricted => {
                &[Field::Daddr, Field::L4Proto, Field::Dport]
            }
            SetId::NodePorts | SetId::NoEndpointsNodePorts => &[Field::L4Proto, Field::Dport],
            SetId::Endpoints | SetId::LocalEndpoints | SetId::Serials | SetId::LocalSerials => {
                &[Field::Daddr, Field::L4Proto, Field::Dport, Field::Index]
            }
            SetId::NodeEndpoints
            | SetId::LocalNodeEndpoints
            | SetId::NodeSerials
            | SetId::LocalNodeSerials => &[Field::L4Proto, Field::Dport, Field::Index],
            SetId::AffineEndpoints | SetId::LocalAffineEndpoints => {
                &[Field::Daddr, Field::L4Proto, Field::Dport, Field::Serial]
            }
            SetId::AffineNodeEndpoints | SetId::LocalAffineNodeEndpoints => {
                &[Field::L4Proto, Field::Dport, Field::Serial]
            }
            SetId::Affinity => &[Field::Saddr, Field::Daddr, Field::L4Proto, Field::Dport],
            SetId::NodeAffinity => &[Field::Saddr, Field::L4Proto, Field::Dport],
            SetId::Hairpin => &[Field::Saddr, Field::Daddr],
            SetId::NodeIps | SetId::ClusterIps | SetId::ServiceCidrs => &[Field::Daddr],
            SetId::Allowed => &[Field::Daddr, Field::L4Proto, Field::Dport, Field::Saddr],
        }
    }

    /// Length of a key in bytes.
    pub(crate) fn key_length(self, family: Family) -> usize {
        self.key().iter().map(|field| field.length(family) as usize).sum()
    }

    /// The declaration, for up to `size` elements.
    pub(crate) fn declare(self, family: Family, size: u32) -> Set {
        let ids = |fields: &[Field]| {
            fields.iter().fold(0, |all, field| all << 6 | field.type_id(family)) // TYPE_BITS of nft
        };
        let length = |fields: &[Field]| fields.iter().map(|field| field.length(family)).sum();
        let data = match self.data() {
            Data::None => None,
            Data::Verdict => Some(Set::VERDICT),
            Data::Fields(fields) => Some((ids(fields), length(fields))),
        };
        Set {
            name: self.name().to_owned(),
            flags: match self.ranges() {
                _ if self.is_learned() => Set::DYNAMIC | Set::TIMEOUT,
                Ranges::None => 0,
                Ranges::Whole => Set::INTERVAL | Set::CONCATENATED,
                Ranges::ByEnds => Set::INTERVAL,
            },
            key_type: ids(self.key()),
            key_length: length(self.key()),
            data,
            size,
            fields: if self.ranges() == Ranges::Whole {
                self.key().iter().map(|field| field.significant(family)).collect()
            } else {
                Vec::new()
            },
            userdata: crate::userdata::of(self, family),
        }
    }
}

/// How a set holds ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ranges {
    /// Not at all.
    None,
    /// An element has the first and the last key.
    Whole,
    /// Two elements: the first key, and the one after the last. All that a key of one field can have.
    ByEnds,
}

/// What sets and maps say about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    /// That it is there.
    None,
    /// Where its packets go.
    Verdict,
    /// Values for registers.
    Fields(&'static [Field]),
}

/// Data of the maps of endpoints.
pub(crate) const TARGET: [Field; 2] = [Field::Daddr, Field::Dport];

/// A field of a key, padded to four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Saddr,
    Daddr,
    L4Proto,
    Dport,
    /// Index among the endpoints.
    Index,
    /// Serial number of an endpoint. nft has no register of its own between two look-ups, so
    /// it travels in the packet's priority, which `layout` clears again.
    Serial,
}

impl Field {
    /// Length in a key.
    pub(crate) fn length(self, family: Family) -> u32 {
        self.significant(family).next_multiple_of(4)
    }

    /// Length without padding.
    pub(crate) fn significant(self, family: Family) -> u32 {
        match self {
            Field::Saddr | Field::Daddr => match family {
                Family::V4 => 4,
                Family::V6 => 16,
            },
            Field::L4Proto => 1,
            Field::Dport => 2,
            Field::Index | Field::Serial => 4,
        }
    }

    /// nft's number of the data type.
    fn type_id(self, family: Family) -> u32 {
        match self {
            Field::Saddr | Field::Daddr => match family {
                Family::V4 => 7,
                Family::V6 => 8,
            },
            Field::L4Proto => 12,
            Field::Dport => 13,
            Field::Index => 4,
            Field::Serial => 23,
        }
    }
}

/// The bits that every serial number has. As a priority, it is then the handle of nobody's
/// queueing discipline: `tc` counts handles from 1 up, the kernel from 0x8001 up.
pub(crate) const SERIALS: u32 = 0xf000_0000;

/// A key of any of the sets, as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    length: u8,
    bytes: [u8; 40],
}

// The rest is zeros: a key of IPv4 is hashed in less than half the time.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bytes().hash(state);
    }
}

impl Key {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    /// A key that the kernel reported; `None` where it is longer than any of ours.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let mut key = Self::empty();
        if bytes.len() > key.bytes.len() {
            return None;
        }
        key.push(bytes);
        Some(key)
    }

    fn empty() -> Self {
        Self { length: 0, bytes: [0; 40] }
    }

    fn push(&mut self, bytes: &[u8]) {
        let start = usize::from(self.length);
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.length += u8::try_from(bytes.len().next_multiple_of(4)).unwrap_or(0);
    }

    fn push_address(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.push(&address.octets()),
            IpAddr::V6(address) => self.push(&address.octets()),
        }
    }

    /// Key of a frontend.
    pub(crate) fn frontend(protocol: Protocol, frontend: &Frontend) -> Self {
        let mut key = Self::empty();
        if let Some(address) = frontend.surface.address() {
            key.push_address(address);
        }
        key.push(&[protocol_number(protocol)]);
        key.push(&frontend.port.get().to_be_bytes());
        key
    }

    /// Key of one of a frontend's endpoints.
    pub(crate) fn endpoint(frontend: &Key, index: usize) -> Self {
        let mut key = *frontend;
        // The index comes out of a register, so it is in host order.
        key.push(&u32::try_from(index).unwrap_or(u32::MAX).to_ne_bytes());
        key
    }

    /// Key of one of a frontend's endpoints, by its serial number.
    pub(crate) fn affine_endpoint(frontend: &Key, serial: u32) -> Self {
        let mut key = *frontend;
        key.push(&serial.to_ne_bytes());
        key
    }

    /// The last field of a key that ends with a serial number.
    pub(crate) fn last_number(&self) -> u32 {
        self.bytes().last_chunk().copied().map_or(0, u32::from_ne_bytes)
    }

    /// Key of an address.
    pub(crate) fn address(address: IpAddr) -> Self {
        let mut key = Self::empty();
        key.push_address(address);
        key
    }

    /// Key of an endpoint that meets itself.
    pub(crate) fn hairpin(address: IpAddr) -> Self {
        let mut key = Self::address(address);
        key.push_address(address);
        key
    }

    /// First key of a range of sources, and the last address.
    pub(crate) fn allowed(frontend: &Key, sources: &IpNet) -> (Self, Datum) {
        let mut key = *frontend;
        key.push_address(sources.network());
        (key, Datum::UpTo(sources.broadcast()))
    }

    /// The address before that of a key of one address; `None` where it is the first.
    pub(crate) fn before(&self) -> Option<IpAddr> {
        match read_address(self.bytes())? {
            IpAddr::V4(address) => {
                address.to_bits().checked_sub(1).map(|bits| Ipv4Addr::from_bits(bits).into())
            }
            IpAddr::V6(address) => {
                address.to_bits().checked_sub(1).map(|bits| Ipv6Addr::from_bits(bits).into())
            }
        }
    }

    /// Key of the address after this one; `None` where it is the last.
    pub(crate) fn after(address: IpAddr) -> Option<Self> {
        following(address).map(Self::address)
    }

    /// Last key of a range that begins with this one.
    pub(crate) fn range_end(&self, last: IpAddr) -> Self {
        let mut key = *self;
        key.length -= if last.is_ipv4() { 4 } else { 16 };
        key.push_address(last);
        key
    }
}

/// What a set or map says about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Datum {
    /// That it is there.
    Present,
    /// That it is the first of a range up to this address.
    UpTo(IpAddr),
    /// An endpoint.
    Target(Target),
    /// The serial number of an endpoint.
    Serial(u32),
    /// `goto`.
    Goto(SharedChain),
    /// `drop`.
    Drop,
    /// What we never write.
    Foreign,
}

impl Datum {
    /// Reads what the kernel reports.
    pub(crate) fn read(
        set: SetId,
        bytes: Option<&[u8]>,
        verdict: Option<(i32, Option<&str>)>,
        key_end: Option<&[u8]>,
    ) -> Self {
        match (bytes, verdict, key_end) {
            (None, None, None) if !set.is_map() && set.ranges() == Ranges::None => Datum::Present,
            (None, None, Some(end)) if set.ranges() == Ranges::Whole => {
                read_last_address(end).map_or(Datum::Foreign, Datum::UpTo)
            }
            (Some(bytes), None, None) if set.data() == Data::Fields(&TARGET) => {
                read_target(bytes).map_or(Datum::Foreign, Datum::Target)
            }
            (Some(bytes), None, None) if set.is_map() => {
                read_serial(bytes).map_or(Datum::Foreign, Datum::Serial)
            }
            (None, Some((code, chain)), None) if set.data() == Data::Verdict => {
                match (code == Verdict::Drop.code(), chain.and_then(SharedChain::parse)) {
                    (true, None) => Datum::Drop,
                    (false, Some(chain)) if code == GOTO => Datum::Goto(chain),
                    _ => Datum::Foreign,
                }
            }
            _ => Datum::Foreign,
        }
    }
}

/// Code of `goto`.
pub(crate) const GOTO: i32 = -4;

/// Data of an endpoint, as the kernel has it: address, port, padding.
pub(crate) fn target_bytes(target: &Target) -> ([u8; 20], usize) {
    let mut bytes = [0; 20];
    let end = match target.address {
        IpAddr::V4(address) => {
            bytes[..4].copy_from_slice(&address.octets());
            4
        }
        IpAddr::V6(address) => {
            bytes[..16].copy_from_slice(&address.octets());
            16
        }
    };
    bytes[end..end + 2].copy_from_slice(&target.port.get().to_be_bytes());
    (bytes, end + 4)
}

pub(crate) fn read_serial(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn read_target(bytes: &[u8]) -> Option<Target> {
    let (address, port) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    let port = Port::new(u16::from_be_bytes([port[0], port[1]]))?;
    Some(Target { address: read_address(address)?, port })
}

fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
        16 => Some(IpAddr::from(*bytes.first_chunk::<16>()?)),
        _ => None,
    }
}

fn read_last_address(key: &[u8]) -> Option<IpAddr> {
    let address = if key.len() > 16 { 16 } else { 4 };
    read_address(key.get(key.len().checked_sub(address)?..)?)
}

/// The address after this one; `None` where it is the last.
pub(crate) fn following(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => address.to_bits().checked_add(1).map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(address) => address.to_bits().checked_add(1).map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
}

/// The number of a protocol in IP headers.
pub(crate) fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}
