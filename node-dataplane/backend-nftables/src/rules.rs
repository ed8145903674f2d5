//! The rules, as clauses that have two forms: nft's text, and the kernel's expressions.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use lockstep_kernel::nf_tables::{CmpOp, Expression, LearnOp, PayloadBase, Verdict};
use lockstep_model::Family;
use lockstep_view::InterfaceName;

use crate::sets::{Field, SetId, TARGET};

/// A part of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Clause {
    /// First packet of a connection.
    New,
    /// The destination is an address of this node.
    ToThisNode,
    /// The source is an address of this node.
    FromThisNode,
    /// The destination is no loopback address.
    NotToLoopback,
    /// The source is in a network.
    From(IpNet),
    /// It came in by this interface.
    InBy(InterfaceName),
    /// It came in by an interface whose name begins like this.
    InByPrefix(InterfaceName),
    /// The key is in the set, or is not.
    In { set: SetId, not: bool },
    /// The map's verdict for the key.
    VerdictOf(SetId),
    /// DNAT to the map's entry for the key, with a random index below `count`.
    TranslateBy { set: SetId, count: u32 },
    /// Puts the map's serial number for the key into the priority; an index is random below
    /// `count`. Ends the rule where the map lacks the key.
    TakeSerial { map: SetId, count: u32 },
    /// The client is given the serial number in the priority, for so many seconds from now.
    Remember { map: SetId, seconds: u32 },
    /// The client is given nothing any more.
    Forget { map: SetId },
    /// DNAT to the map's entry for the key.
    Translate { map: SetId },
    /// The priority has all of these bits, as serial numbers do.
    PriorityHas(u32),
    /// Clears the priority.
    ClearPriority,
    /// The mark has this bit.
    Marked(u32),
    /// Sets this bit of the mark.
    SetMark(u32),
    /// Flips this bit of the mark.
    FlipMark(u32),
    /// Masquerade, with random source ports.
    Masquerade,
    /// ICMP port unreachable.
    Reject,
    /// A verdict.
    Then(Verdict),
}

const CT_STATE: u32 = 0;
const CT_STATE_NEW: u32 = 8;
const META_PRIORITY: u32 = 2;
const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_L4PROTO: u32 = 16;
/// `IFNAMSIZ`: how many bytes of a name the kernel loads, zeros behind it.
const NAME_BYTES: usize = 16;
const FIB_SADDR: u32 = 1;
const FIB_DADDR: u32 = 2;
const ADDRESS_TYPE_LOCAL: u32 = 2;
const FULLY_RANDOM: u32 = 0x10;
const PORT_UNREACHABLE_V4: u8 = 3;
const PORT_UNREACHABLE_V6: u8 = 4;

/// The kernel's number of the register that begins `words` four-byte words into the file.
fn register(words: u32) -> u32 {
    if words.is_multiple_of(4) { 1 + words / 4 } else { 8 + words }
}

impl Clause {
    /// Appends the kernel's expressions for it.
    pub(crate) fn expressions(&self, family: Family, out: &mut Vec<Expression>) {
        match self {
            Clause::New => {
                out.push(Expression::Ct { key: CT_STATE, to: 1 });
                out.push(mask(CT_STATE_NEW, 0));
                out.push(compare(CmpOp::Neq, &[0; 4]));
            }
            Clause::ToThisNode => local(FIB_DADDR, out),
            Clause::FromThisNode => local(FIB_SADDR, out),
            Clause::NotToLoopback => match family {
                Family::V4 => {
                    out.push(load(Field::Daddr, family, 1));
                    out.push(Expression::Bitwise {
                        from: 1,
                        to: 1,
                        mask: vec![255, 0, 0, 0],
                        xor: vec![0; 4],
                    });
                    out.push(compare(CmpOp::Neq, &[127, 0, 0, 0]));
                }
                Family::V6 => {
                    out.push(load(Field::Daddr, family, 1));
                    out.push(compare(CmpOp::Neq, &std::net::Ipv6Addr::LOCALHOST.octets()));
                }
            },
            Clause::From(network) => from(network, family, out),
            Clause::InBy(name) => {
                let mut data = name.as_str().as_bytes().to_vec();
                data.resize(NAME_BYTES, 0);
                in_by(&data, out);
            }
            // What is compared is as long as the prefix, so whatever follows matches.
            Clause::InByPrefix(prefix) => in_by(prefix.as_str().as_bytes(), out),
            Clause::In { set, not } => {
                load_key(set.key(), family, out);
                out.push(Expression::Lookup { set: set.name().to_owned(), from: 1, to: None, invert: *not });
            }
            Clause::VerdictOf(map) => {
                load_key(map.key(), family, out);
                out.push(look_up(*map, Some(0)));
            }
            Clause::TranslateBy { set, count } => {
                let (index, fields) = set
                    .key()
                    .split_last()
                    .map_or((0, &[][..]), |(_, fields)| (load_key(fields, family, out), fields));
                debug_assert!(!fields.is_empty(), "a map of endpoints has an index");
                out.push(Expression::Random { to: register(index), modulus: *count });
                translate(*set, family, out);
            }
            Clause::TakeSerial { map, count } => {
                load_key(map.key(), family, out);
                if let Some(Expression::Random { modulus, .. }) = out.last_mut() {
                    *modulus = *count;
                }
                out.push(look_up(*map, Some(1)));
                out.push(Expression::SetMeta { key: META_PRIORITY, from: 1 });
            }
            Clause::Remember { map, seconds } => {
                learn(*map, LearnOp::Update, u64::from(*seconds) * 1000, family, out);
            }
            Clause::Forget { map } => learn(*map, LearnOp::Delete, 0, family, out),
            Clause::Translate { map } => {
                load_key(map.key(), family, out);
                translate(*map, family, out);
            }
            Clause::PriorityHas(bits) => {
                out.push(Expression::Meta { key: META_PRIORITY, to: 1 });
                out.push(mask(*bits, 0));
                out.push(compare(CmpOp::Eq, &bits.to_ne_bytes()));
            }
            Clause::ClearPriority => {
                out.push(Expression::Immediate { to: 1, data: vec![0; 4] });
                out.push(Expression::SetMeta { key: META_PRIORITY, from: 1 });
            }
            Clause::Marked(bit) => {
                out.push(Expression::Meta { key: META_MARK, to: 1 });
                out.push(mask(*bit, 0));
                out.push(compare(CmpOp::Eq, &bit.to_ne_bytes()));
            }
            Clause::SetMark(bit) => set_mark(!*bit, *bit, out),
            Clause::FlipMark(bit) => set_mark(u32::MAX, *bit, out),
            Clause::Masquerade => out.push(Expression::Masquerade { flags: FULLY_RANDOM }),
            Clause::Reject => out.push(Expression::RejectIcmp {
                code: match family {
                    Family::V4 => PORT_UNREACHABLE_V4,
                    Family::V6 => PORT_UNREACHABLE_V6,
                },
            }),
            Clause::Then(verdict) => out.push(Expression::Verdict(verdict.clone())),
        }
    }

    /// Appends nft's text for it.
    pub(crate) fn text(&self, family: Family, out: &mut String) {
        let ip = kernel_family(family).word();
        // Writing to a String cannot fail.
        let _ = match self {
            Clause::New => write!(out, "ct state new"),
            Clause::ToThisNode => write!(out, "fib daddr type local"),
            Clause::FromThisNode => write!(out, "fib saddr type local"),
            Clause::NotToLoopback => match family {
                Family::V4 => write!(out, "ip daddr != 127.0.0.0/8"),
                Family::V6 => write!(out, "ip6 daddr != ::1"),
            },
            Clause::From(network) => write!(out, "{ip} saddr {network}"),
            Clause::InBy(name) => write!(out, "iifname \"{name}\""),
            Clause::InByPrefix(prefix) => write!(out, "iifname \"{prefix}*\""),
            Clause::In { set, not } => {
                let not = if *not { "!= " } else { "" };
                write!(out, "{} {not}@{}", key_text(set.key(), family, 0), set.name())
            }
            Clause::VerdictOf(map) => {
                write!(out, "{} vmap @{}", key_text(map.key(), family, 0), map.name())
            }
            Clause::TranslateBy { set, count } => {
                write!(out, "dnat {ip} to {} map @{}", key_text(set.key(), family, *count), set.name())
            }
            Clause::TakeSerial { map, count } => {
                write!(out, "meta priority set {} map @{}", key_text(map.key(), family, *count), map.name())
            }
            Clause::Remember { map, seconds } => {
                let (map, key) = (map.name(), key_text(map.key(), family, 0));
                write!(out, "update @{map} {{ {key} timeout {} : meta priority }}", duration(*seconds))
            }
            Clause::Forget { map } => {
                let key = key_text(map.key(), family, 0);
                write!(out, "delete @{} {{ {key} : meta priority }}", map.name())
            }
            Clause::Translate { map } => {
                write!(out, "dnat {ip} to {} map @{}", key_text(map.key(), family, 0), map.name())
            }
            Clause::PriorityHas(bits) => {
                let bits = format!("{:x}:{:x}", bits >> 16, bits & 0xffff);
                write!(out, "meta priority & {bits} == {bits}")
            }
            Clause::ClearPriority => write!(out, "meta priority set none"),
            Clause::Marked(bit) => write!(out, "meta mark & {bit:#010x} == {bit:#010x}"),
            Clause::SetMark(bit) => write!(out, "meta mark set meta mark | {bit:#010x}"),
            Clause::FlipMark(bit) => write!(out, "meta mark set meta mark ^ {bit:#010x}"),
            Clause::Masquerade => write!(out, "masquerade fully-random"),
            Clause::Reject => write!(out, "reject"),
            Clause::Then(verdict) => match verdict {
                Verdict::Drop => write!(out, "drop"),
                Verdict::Accept => write!(out, "accept"),
                Verdict::Return => write!(out, "return"),
                Verdict::Jump(chain) => write!(out, "jump {chain}"),
                Verdict::Goto(chain) => write!(out, "goto {chain}"),
            },
        };
    }
}

/// Text of a key; `count` is the modulus of an index.
pub(crate) fn key_text(fields: &[Field], family: Family, count: u32) -> String {
    let ip = kernel_family(family).word();
    let parts: Vec<String> = fields
        .iter()
        .map(|field| match field {
            Field::Saddr => format!("{ip} saddr"),
            Field::Daddr => format!("{ip} daddr"),
            Field::L4Proto => "meta l4proto".to_owned(),
            Field::Dport => "th dport".to_owned(),
            Field::Index => format!("numgen random mod {count}"),
            Field::Serial => "meta priority".to_owned(),
        })
        .collect();
    parts.join(" . ")
}

pub(crate) fn kernel_family(family: Family) -> lockstep_kernel::nf_tables::Family {
    match family {
        Family::V4 => lockstep_kernel::nf_tables::Family::Ipv4,
        Family::V6 => lockstep_kernel::nf_tables::Family::Ipv6,
    }
}

/// Loads the fields into consecutive registers; returns the word after the last.
fn load_key(fields: &[Field], family: Family, out: &mut Vec<Expression>) -> u32 {
    let mut words = 0;
    for field in fields {
        out.push(load(*field, family, register(words)));
        words += field.length(family) / 4;
    }
    words
}

fn load(field: Field, family: Family, to: u32) -> Expression {
    let address = |v4, v6| Expression::Payload {
        base: PayloadBase::Network,
        offset: if family == Family::V4 { v4 } else { v6 },
        length: field.length(family),
        to,
    };
    match field {
        Field::Saddr => address(12, 8),
        Field::Daddr => address(16, 24),
        Field::L4Proto => Expression::Meta { key: META_L4PROTO, to },
        Field::Dport => Expression::Payload { base: PayloadBase::Transport, offset: 2, length: 2, to },
        Field::Index => Expression::Random { to, modulus: 1 },
        Field::Serial => Expression::Meta { key: META_PRIORITY, to },
    }
}

fn look_up(set: SetId, to: Option<u32>) -> Expression {
    Expression::Lookup { set: set.name().to_owned(), from: 1, to, invert: false }
}

/// DNAT to what a map of endpoints says about the key in the registers.
fn translate(map: SetId, family: Family, out: &mut Vec<Expression>) {
    out.push(look_up(map, Some(1)));
    out.push(Expression::Dnat {
        family: u32::from(kernel_family(family) as u8),
        address: 1,
        port: register(TARGET[0].length(family) / 4),
    });
}

/// Changes what a client has been given; the serial number is in the priority.
fn learn(map: SetId, op: LearnOp, timeout: u64, family: Family, out: &mut Vec<Expression>) {
    let words = load_key(map.key(), family, out);
    // Behind the key, at the next 16 bytes, where nft has it too.
    let data = register(words.next_multiple_of(4));
    out.push(Expression::Meta { key: META_PRIORITY, to: data });
    out.push(Expression::Learn { map: map.name().to_owned(), op, key: 1, data, timeout });
}

/// Seconds as nft writes them.
fn duration(seconds: u32) -> String {
    let mut text = String::new();
    let units = [(86_400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')];
    let mut rest = seconds;
    for (length, unit) in units {
        if rest >= length {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{unit}", rest / length);
            rest %= length;
        }
    }
    text
}

fn from(network: &IpNet, family: Family, out: &mut Vec<Expression>) {
    out.push(load(Field::Saddr, family, 1));
    if network.prefix_len() != network.max_prefix_len() {
        let mask = octets(network.netmask());
        let xor = vec![0; mask.len()];
        out.push(Expression::Bitwise { from: 1, to: 1, mask, xor });
    }
    out.push(compare(CmpOp::Eq, &octets(network.network())));
}

/// A packet that came in by no interface has an empty name, which equals nothing here.
fn in_by(name: &[u8], out: &mut Vec<Expression>) {
    out.push(Expression::Meta { key: META_IIFNAME, to: 1 });
    out.push(compare(CmpOp::Eq, name));
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn local(flags: u32, out: &mut Vec<Expression>) {
    out.push(Expression::FibAddressType { to: 1, flags });
    out.push(compare(CmpOp::Eq, &ADDRESS_TYPE_LOCAL.to_ne_bytes()));
}

fn mask(mask: u32, xor: u32) -> Expression {
    Expression::Bitwise { from: 1, to: 1, mask: mask.to_ne_bytes().to_vec(), xor: xor.to_ne_bytes().to_vec() }
}

fn compare(op: CmpOp, data: &[u8]) -> Expression {
    Expression::Cmp { from: 1, op, data: data.to_vec() }
}

fn set_mark(keep: u32, flip: u32, out: &mut Vec<Expression>) {
    out.push(Expression::Meta { key: META_MARK, to: 1 });
    out.push(mask(keep, flip));
    out.push(Expression::SetMeta { key: META_MARK, from: 1 });
}
