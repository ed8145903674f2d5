//! nf_tables over netlink: transactions, dumps, single elements, foreign changes.
//!
//! ```text
//! declarations ──(libnftnl)──┐
//! elements ──(our encoder)───┴─> Batch ──> Netfilter::commit        one transaction
//! Table, Chain, Rule, Set, Element <──(our decoder)── Netfilter::dump, ask
//! ```
//!
//! Skeleton objects are few and go through `nftnl`. Elements are many and are written
//! straight into the batch. Everything is read back by a decoder that shares no code with
//! either, so what compares equal was written right.

mod batch;
mod declare;
mod element;
mod expression;
pub mod fake;
mod query;
mod socket;

pub use batch::{Batch, ElementOp};
pub use element::{
    Element, Lifetime, Value, put_interval, put_key, put_mapping, put_passing, put_range, put_verdict,
};
pub use expression::{CmpOp, Expression, LearnOp, PayloadBase, Verdict};
pub use query::{
    Step, chain_exists, chains, element_values, elements, generation, rules, sets, table_exists,
};
pub use socket::Kernel;

pub use crate::netlink::Dumped;
use crate::netlink::{self, Message, Refusal};

/// Address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// `ip`.
    Ipv4 = 2,
    /// `ip6`.
    Ipv6 = 10,
}

impl Family {
    /// The word nft has for it.
    pub fn word(self) -> &'static str {
        match self {
            Family::Ipv4 => "ip",
            Family::Ipv6 => "ip6",
        }
    }
}

/// A chain: a base chain where it has a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where it is hooked in; policy accept.
    pub hook: Option<Hook>,
}

/// Where a base chain is hooked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// What its rules may do.
    pub kind: ChainKind,
    /// Which way of the packet.
    pub point: HookPoint,
    /// Order among the chains of the hook.
    pub priority: i32,
}

/// Type of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// `filter`.
    Filter,
    /// `nat`.
    Nat,
}

/// A netfilter hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum HookPoint {
    /// `prerouting`.
    Prerouting = 0,
    /// `input`.
    Input = 1,
    /// `forward`.
    Forward = 2,
    /// `output`.
    Output = 3,
    /// `postrouting`.
    Postrouting = 4,
}

impl HookPoint {
    /// The word nft has for it.
    pub fn word(self) -> &'static str {
        match self {
            HookPoint::Prerouting => "prerouting",
            HookPoint::Input => "input",
            HookPoint::Forward => "forward",
            HookPoint::Output => "output",
            HookPoint::Postrouting => "postrouting",
        }
    }
}

impl ChainKind {
    /// The word the kernel has for it.
    pub fn word(self) -> &'static str {
        match self {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        }
    }
}

/// A rule in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The chain.
    pub chain: String,
    /// What it does, in order.
    pub expressions: Vec<Expression>,
}

/// A set, or a map where it has data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// `NFT_SET_*` flags; `NFT_SET_MAP` is implied by `data`.
    pub flags: u32,
    /// nft's number for the key's data type.
    pub key_type: u32,
    /// Length of a key in bytes.
    pub key_length: u32,
    /// nft's number and the length of the data, for maps.
    pub data: Option<(u32, u32)>,
    /// How many elements fit.
    pub size: u32,
    /// Lengths of the key's fields; only where the set has intervals.
    pub fields: Vec<u32>,
    /// What nft notes about the types, that it needs for listing.
    pub userdata: Vec<u8>,
}

impl Set {
    /// Data type of maps to verdicts.
    pub const VERDICT: (u32, u32) = (0xffff_ff00, 16);
    /// Flag: keys may be ranges.
    pub const INTERVAL: u32 = 0x4;
    /// Flag: elements may end by themselves.
    pub const TIMEOUT: u32 = 0x10;
    /// Flag: packets change the elements.
    pub const DYNAMIC: u32 = 0x20;
    /// Flag: the key has several fields; needed beside `INTERVAL` where it has.
    pub const CONCATENATED: u32 = 0x80;
    /// Flag of maps.
    pub(crate) const MAP: u32 = 0x8;
}

/// Why a transaction was not made. Nothing of it is in force.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The kernel refused these messages, in batch order; sequence number 0 is the batch.
    #[error("kernel refused {} of the batch's messages: {}", .0.len(), first(.0))]
    Refused(Vec<Refusal>),
    /// The socket failed.
    #[error(transparent)]
    Link(#[from] netlink::Error),
}

fn first(refusals: &[Refusal]) -> String {
    match refusals.first() {
        Some(Refusal { errno, message: Some(message), .. }) => format!("{errno} ({message})"),
        Some(Refusal { errno, .. }) => errno.to_string(),
        None => "too many errors to report".to_owned(),
    }
}

/// nf_tables of one network namespace, at the level of messages.
///
/// Implemented by [`Kernel`] and by [`fake::FakeKernel`].
pub trait Netfilter {
    /// Makes one transaction of a finished [`Batch`]'s bytes: all of it or nothing.
    fn commit(&mut self, batch: &[u8]) -> Result<(), CommitError>;

    /// Sends one dump request and hands on the answers.
    fn dump(&mut self, request: &[u8], each: &mut dyn FnMut(Message<'_>)) -> Result<Dumped, netlink::Error>;

    /// Sends `count` requests that have one answer each, and hands on the answers, errors
    /// included, in order.
    fn ask(
        &mut self,
        requests: &[u8],
        count: usize,
        each: &mut dyn FnMut(Message<'_>),
    ) -> Result<(), netlink::Error>;

    /// Starts or stops listening to changes of anybody's. Cheap where nothing changes.
    fn listen(&mut self, on: bool) -> Result<(), netlink::Error>;

    /// Hands on the changes heard since the last call. `false`: some were lost.
    fn heard(&mut self, each: &mut dyn FnMut(Message<'_>)) -> Result<bool, netlink::Error>;
}
