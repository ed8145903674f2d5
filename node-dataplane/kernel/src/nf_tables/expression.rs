use crate::netlink::attr::Attributes;

/// One expression of a rule: the kernel's own instruction set, as far as it is used here.
///
/// Registers are numbered as the kernel reports them: 1 to 4 for the 16-byte ones, 9 to 23
/// for the 4-byte ones inside them that do not begin one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    /// Loads bytes of the packet.
    Payload {
        /// Which header.
        base: PayloadBase,
        /// First byte in it.
        offset: u32,
        /// How many.
        length: u32,
        /// Register to load.
        to: u32,
    },
    /// Loads packet metadata.
    Meta {
        /// `NFT_META_*`.
        key: u32,
        /// Register to load.
        to: u32,
    },
    /// Sets packet metadata.
    SetMeta {
        /// `NFT_META_*`.
        key: u32,
        /// Register to read.
        from: u32,
    },
    /// Loads a property of the connection.
    Ct {
        /// `NFT_CT_*`.
        key: u32,
        /// Register to load.
        to: u32,
    },
    /// Goes on only where the comparison holds.
    Cmp {
        /// Register to read.
        from: u32,
        /// How to compare.
        op: CmpOp,
        /// What with.
        data: Vec<u8>,
    },
    /// `to = (from & mask) ^ xor`.
    Bitwise {
        /// Register to read.
        from: u32,
        /// Register to load.
        to: u32,
        /// The mask.
        mask: Vec<u8>,
        /// The bits to flip.
        xor: Vec<u8>,
    },
    /// Goes on only where the set has the key; loads the data of a map.
    Lookup {
        /// Name of the set or map.
        set: String,
        /// First register of the key.
        from: u32,
        /// First register for the data; 0 = the data is a verdict.
        to: Option<u32>,
        /// Goes on where the set does *not* have the key.
        invert: bool,
    },
    /// Loads a constant.
    Immediate {
        /// Register to load.
        to: u32,
        /// What to load.
        data: Vec<u8>,
    },
    /// Changes an element of a map on the way: what packets teach the rules.
    Learn {
        /// Name of the map.
        map: String,
        /// What happens to the element.
        op: LearnOp,
        /// First register of the key.
        key: u32,
        /// First register of the data.
        data: u32,
        /// How long the element lives, in milliseconds; 0 = as the map says.
        timeout: u64,
    },
    /// Ends with a verdict.
    Verdict(Verdict),
    /// Loads a random number below `modulus`.
    Random {
        /// Register to load.
        to: u32,
        /// Upper limit, not reached.
        modulus: u32,
    },
    /// Loads the type of an address as routing sees it.
    FibAddressType {
        /// Register to load.
        to: u32,
        /// `NFTA_FIB_F_*`: which address.
        flags: u32,
    },
    /// Destination NAT.
    Dnat {
        /// `NFPROTO_*`.
        family: u32,
        /// Register with the address.
        address: u32,
        /// Register with the port.
        port: u32,
    },
    /// Source NAT to the address of the outgoing interface.
    Masquerade {
        /// `NF_NAT_RANGE_*`.
        flags: u32,
    },
    /// Answers with an ICMP error of type "unreachable".
    RejectIcmp {
        /// Its code.
        code: u8,
    },
    /// Anything else, as the kernel reports it. Can be compared, not written.
    Other {
        /// Its name.
        name: String,
        /// Its attributes.
        data: Vec<u8>,
    },
}

/// A header of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PayloadBase {
    /// The IP header.
    Network = 1,
    /// The TCP, UDP or SCTP header.
    Transport = 2,
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CmpOp {
    /// Equal.
    Eq = 0,
    /// Not equal.
    Neq = 1,
}

/// What a packet does to an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LearnOp {
    /// Adds it, or lets it live longer where it is there; then its data stays.
    Update = 1,
    /// Deletes it where it is there.
    Delete = 2,
}

/// Where a packet goes from a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Dropped.
    Drop,
    /// Accepted by this base chain.
    Accept,
    /// Back to the calling chain.
    Return,
    /// Into a chain, and back here after it.
    Jump(String),
    /// Into a chain, and not back here.
    Goto(String),
}

impl Verdict {
    /// The kernel's number for it.
    pub fn code(&self) -> i32 {
        match self {
            Verdict::Drop => libc::NF_DROP,
            Verdict::Accept => libc::NF_ACCEPT,
            Verdict::Return => libc::NFT_RETURN,
            Verdict::Jump(_) => libc::NFT_JUMP,
            Verdict::Goto(_) => libc::NFT_GOTO,
        }
    }

    /// The chain that it names.
    pub fn chain(&self) -> Option<&str> {
        match self {
            Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
            _ => None,
        }
    }

    pub(super) fn decode(attributes: &Attributes<'_>) -> Option<Self> {
        let code = attributes.get(1)?.u32_be().cast_signed();
        let chain = || attributes.get(2).map(|name| name.text().to_owned());
        match code {
            libc::NF_DROP => Some(Verdict::Drop),
            libc::NF_ACCEPT => Some(Verdict::Accept),
            libc::NFT_RETURN => Some(Verdict::Return),
            libc::NFT_JUMP => chain().map(Verdict::Jump),
            libc::NFT_GOTO => chain().map(Verdict::Goto),
            _ => None,
        }
    }
}

/// `NFT_FIB_RESULT_ADDRTYPE`.
pub(super) const FIB_ADDRESS_TYPE: u32 = 3;
/// `NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED`: the kernel sets both where both
/// registers are given, and reports them.
pub(super) const NAT_FLAGS: u32 = 3;

impl Expression {
    /// Reads one expression as the kernel reports it.
    pub(super) fn decode(attributes: &Attributes<'_>) -> Option<Self> {
        let name = attributes.get(1)?.text();
        let raw = attributes.get(2).map_or(&[][..], |data| data.value);
        let data = Attributes::of(raw);
        let other = || Expression::Other { name: name.to_owned(), data: raw.to_owned() };
        Some(Self::known(name, &data).unwrap_or_else(other))
    }

    fn known(name: &str, data: &Attributes<'_>) -> Option<Self> {
        let number = |kind| data.get(kind).map(|attribute| attribute.u32_be());
        let value = |kind| Some(data.get(kind)?.nested().get(1)?.value.to_owned());
        Some(match name {
            "payload" => Expression::Payload {
                base: match number(2)? {
                    1 => PayloadBase::Network,
                    2 => PayloadBase::Transport,
                    _ => return None,
                },
                offset: number(3)?,
                length: number(4)?,
                to: number(1)?,
            },
            "meta" => match (number(1), number(3)) {
                (Some(to), None) => Expression::Meta { key: number(2)?, to },
                (None, Some(from)) => Expression::SetMeta { key: number(2)?, from },
                _ => return None,
            },
            "ct" if number(3).is_none() && number(4).is_none() => {
                Expression::Ct { key: number(2)?, to: number(1)? }
            }
            "cmp" => Expression::Cmp {
                from: number(1)?,
                op: match number(2)? {
                    0 => CmpOp::Eq,
                    1 => CmpOp::Neq,
                    _ => return None,
                },
                data: value(3)?,
            },
            "bitwise" if number(6).unwrap_or(0) == 0 => {
                Expression::Bitwise { from: number(1)?, to: number(2)?, mask: value(4)?, xor: value(5)? }
            }
            "lookup" => Expression::Lookup {
                set: data.get(1)?.text().to_owned(),
                from: number(2)?,
                to: number(3),
                invert: number(5).unwrap_or(0) & 1 != 0,
            },
            "immediate" if number(1)? == 0 => {
                Expression::Verdict(Verdict::decode(&data.get(2)?.nested().get(2)?.nested())?)
            }
            "immediate" => Expression::Immediate { to: number(1)?, data: value(2)? },
            // Neither expressions per element (7) nor an inverted match (9).
            "dynset" if data.get(7).is_none() && number(9).unwrap_or(0) == 0 => Expression::Learn {
                map: data.get(1)?.text().to_owned(),
                op: match number(3)? {
                    1 => LearnOp::Update,
                    2 => LearnOp::Delete,
                    _ => return None,
                },
                key: number(4)?,
                data: number(5)?,
                timeout: data.get(6).map_or(0, |timeout| timeout.u64_be()),
            },
            "numgen" if number(3)? == 1 && number(4).unwrap_or(0) == 0 => {
                Expression::Random { to: number(1)?, modulus: number(2)? }
            }
            "fib" if number(2)? == FIB_ADDRESS_TYPE => {
                Expression::FibAddressType { to: number(1)?, flags: number(3)? }
            }
            "nat" if number(1)? == 1 && number(7).unwrap_or(0) == NAT_FLAGS => {
                // Where only one end is given, the kernel reports it as the other one too.
                let one_value = |first, last| number(last).is_none_or(|last| Some(last) == number(first));
                if !one_value(3, 4) || !one_value(5, 6) {
                    return None;
                }
                Expression::Dnat { family: number(2)?, address: number(3)?, port: number(5)? }
            }
            "masq" => Expression::Masquerade { flags: number(1).unwrap_or(0) },
            "reject" if number(1)? == 0 => Expression::RejectIcmp { code: *data.get(2)?.value.first()? },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Messages, attr::Attribute};
    use crate::nf_tables::{Batch, Family, Rule};

    fn every_kind() -> Vec<Expression> {
        vec![
            Expression::Payload { base: PayloadBase::Network, offset: 16, length: 4, to: 1 },
            Expression::Payload { base: PayloadBase::Transport, offset: 2, length: 2, to: 10 },
            Expression::Meta { key: 16, to: 9 },
            Expression::SetMeta { key: 3, from: 1 },
            Expression::Ct { key: 0, to: 1 },
            Expression::Cmp { from: 1, op: CmpOp::Neq, data: vec![0; 4] },
            Expression::Cmp { from: 1, op: CmpOp::Eq, data: vec![7; 16] },
            Expression::Bitwise { from: 1, to: 1, mask: vec![255, 0, 0, 0], xor: vec![0; 4] },
            Expression::Lookup { set: "s".to_owned(), from: 1, to: None, invert: false },
            Expression::Lookup { set: "s".to_owned(), from: 1, to: None, invert: true },
            Expression::Lookup { set: "m".to_owned(), from: 1, to: Some(0), invert: false },
            Expression::Verdict(Verdict::Drop),
            Expression::Verdict(Verdict::Return),
            Expression::Verdict(Verdict::Goto("svc.c10".to_owned())),
            Expression::Immediate { to: 1, data: vec![0; 4] },
            Expression::Learn {
                map: "m".to_owned(),
                op: LearnOp::Update,
                key: 1,
                data: 2,
                timeout: 86_400_000,
            },
            Expression::Learn { map: "m".to_owned(), op: LearnOp::Delete, key: 1, data: 18, timeout: 0 },
            Expression::Random { to: 11, modulus: 10 },
            Expression::FibAddressType { to: 1, flags: 2 },
            Expression::Dnat { family: 2, address: 1, port: 9 },
            Expression::Masquerade { flags: 16 },
            Expression::RejectIcmp { code: 3 },
        ]
    }

    #[test]
    fn what_libnftnl_encodes_our_decoder_reads() {
        let mut batch = Batch::new();
        let rule = Rule { chain: "c".to_owned(), expressions: every_kind() };
        batch.add_rule(Family::Ipv4, "t", &rule);
        let message = Messages::of(batch.finish()).find(|message| message.kind == 10 << 8 | 6).unwrap();
        let list = Attributes::of(&message.payload[4..]).get(4).unwrap();
        let decode = |one: Attribute<'_>| Expression::decode(&one.nested()).unwrap();
        assert_eq!(list.nested().map(decode).collect::<Vec<_>>(), every_kind());
    }

    #[test]
    fn what_is_not_known_is_kept_as_it_is() {
        let mut bytes = Vec::new();
        crate::netlink::attr::put_text(&mut bytes, 1, "counter");
        crate::netlink::attr::put(&mut bytes, 2, &[1, 2, 3, 4]);
        assert_eq!(
            Expression::decode(&Attributes::of(&bytes)),
            Some(Expression::Other { name: "counter".to_owned(), data: vec![1, 2, 3, 4] })
        );
    }
}
