//! Chains, rules and set declarations as messages, encoded by libnftnl.
//!
//! The messages are written into a scratch buffer of libnftnl's largest message and from
//! there into the batch. The flags are ours: no acknowledgement per message, because
//! thousands of them would overflow the receive queue.

use std::ffi::CString;
use std::ptr::NonNull;

use nftnl::expr::Expression as ToExpression;
use nftnl::nftnl_sys as sys;
use nftnl::{MsgType, NlMsg, ProtoFamily};

use super::expression::{FIB_ADDRESS_TYPE, NAT_FLAGS};
use super::{Chain, ChainKind, Expression, Family, HookPoint, Rule, Set};
use crate::netlink::attr;

/// Appends the message that adds a chain.
pub(super) fn chain(out: &mut Vec<u8>, seq: u32, family: Family, table: &str, chain: &Chain) {
    let table = nftnl_table(family, table);
    let mut built = nftnl::Chain::new(text(&chain.name), &table);
    if let Some(hook) = &chain.hook {
        built.set_hook(
            match hook.point {
                HookPoint::Prerouting => nftnl::Hook::PreRouting,
                HookPoint::Input => nftnl::Hook::In,
                HookPoint::Forward => nftnl::Hook::Forward,
                HookPoint::Output => nftnl::Hook::Out,
                HookPoint::Postrouting => nftnl::Hook::PostRouting,
            },
            hook.priority,
        );
        built.set_type(match hook.kind {
            ChainKind::Filter => nftnl::ChainType::Filter,
            ChainKind::Nat => nftnl::ChainType::Nat,
        });
        built.set_policy(nftnl::Policy::Accept);
    }
    append(out, &built, seq, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
}

/// Appends the message that adds a rule at the end of its chain.
pub(super) fn rule(out: &mut Vec<u8>, seq: u32, family: Family, table: &str, rule: &Rule) {
    let table = nftnl_table(family, table);
    let chain = nftnl::Chain::new(text(&rule.chain), &table);
    let mut built = nftnl::Rule::new(&chain);
    for expression in &rule.expressions {
        built.add_expr(expression);
    }
    append(out, &built, seq, libc::NLM_F_CREATE | libc::NLM_F_APPEND);
}

/// Appends the message that adds a set or map.
pub(super) fn set(out: &mut Vec<u8>, seq: u32, family: Family, table: &str, set: &Set) {
    append(out, &Declaration { family, table: text(table), set }, seq, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
}

/// Names come from this workspace and have no zero bytes; one that had would be cut there.
fn text(name: &str) -> CString {
    let end = name.bytes().position(|byte| byte == 0).unwrap_or(name.len());
    CString::new(&name[..end]).unwrap_or_default()
}

fn nftnl_table(family: Family, name: &str) -> nftnl::Table {
    let family = match family {
        Family::Ipv4 => ProtoFamily::Ipv4,
        Family::Ipv6 => ProtoFamily::Ipv6,
    };
    nftnl::Table::new(text(name), family)
}

fn append(out: &mut Vec<u8>, message: &impl NlMsg, seq: u32, flags: libc::c_int) {
    let mut scratch = vec![0_u8; usize::try_from(nftnl::nft_nlmsg_maxsize()).unwrap_or(1 << 17)];
    // SAFETY: the buffer has the size that NlMsg asks for, the largest of any message.
    unsafe { message.write(scratch.as_mut_ptr().cast(), seq, MsgType::Add) };
    let length = usize::try_from(attr::u32_ne(&scratch)).unwrap_or_default().min(scratch.len());
    let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or_default();
    scratch[6..8].copy_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&scratch[..length]);
    out.resize(attr::aligned(out.len()), 0);
}

/// A set declaration. `nftnl::set::Set` has neither maps, nor sizes, nor user data.
struct Declaration<'a> {
    family: Family,
    table: CString,
    set: &'a Set,
}

// SAFETY: `write` stays within the message that libnftnl builds, which is at most
// `nft_nlmsg_maxsize` long: a set declaration has a few hundred bytes.
unsafe impl NlMsg for Declaration<'_> {
    unsafe fn write(&self, buffer: *mut libc::c_void, seq: u32, _: MsgType) {
        let Some(set) = NonNull::new(
            // SAFETY: takes nothing; null (out of memory) is handled.
            unsafe { sys::nftnl_set_alloc() },
        ) else {
            std::process::abort();
        };
        let number = |kind: sys::nftnl_set_attr, value: u32| {
            // SAFETY: `set` is alive; the attribute is a number.
            unsafe { sys::nftnl_set_set_u32(set.as_ptr(), attribute(kind), value) };
        };
        let bytes = |kind: sys::nftnl_set_attr, data: &[u8]| {
            let length = u32::try_from(data.len()).unwrap_or_default();
            // SAFETY: `set` is alive; libnftnl copies `length` bytes of `data`.
            unsafe {
                sys::nftnl_set_set_data(set.as_ptr(), attribute(kind), data.as_ptr().cast(), length);
            }
        };
        bytes(sys::NFTNL_SET_TABLE, self.table.as_bytes_with_nul());
        bytes(sys::NFTNL_SET_NAME, text(&self.set.name).as_bytes_with_nul());
        number(sys::NFTNL_SET_FAMILY, u32::from(self.family as u8));
        number(sys::NFTNL_SET_ID, seq);
        number(sys::NFTNL_SET_KEY_TYPE, self.set.key_type);
        number(sys::NFTNL_SET_KEY_LEN, self.set.key_length);
        number(sys::NFTNL_SET_DESC_SIZE, self.set.size);
        let map = if self.set.data.is_some() { Set::MAP } else { 0 };
        number(sys::NFTNL_SET_FLAGS, self.set.flags | map);
        if let Some((kind, length)) = self.set.data {
            number(sys::NFTNL_SET_DATA_TYPE, kind);
            number(sys::NFTNL_SET_DATA_LEN, length);
        }
        if !self.set.fields.is_empty() {
            let lengths: Vec<u8> =
                self.set.fields.iter().map(|length| u8::try_from(*length).unwrap_or_default()).collect();
            bytes(sys::NFTNL_SET_DESC_CONCAT, &lengths);
        }
        if !self.set.userdata.is_empty() {
            bytes(sys::NFTNL_SET_USERDATA, &self.set.userdata);
        }
        let (kind, family) = (libc::NFT_MSG_NEWSET, u16::from(self.family as u8));
        // SAFETY: the caller gives a buffer of `nft_nlmsg_maxsize` bytes; `set` is alive and
        // freed exactly once, after its last use.
        unsafe {
            let header = sys::nftnl_nlmsg_build_hdr(
                buffer.cast(),
                u16::try_from(kind).unwrap_or_default(),
                family,
                0,
                seq,
            );
            sys::nftnl_set_nlmsg_build_payload(header, set.as_ptr());
            sys::nftnl_set_free(set.as_ptr());
        }
    }
}

fn attribute(kind: u32) -> u16 {
    u16::try_from(kind).unwrap_or(u16::MAX)
}

/// An expression of libnftnl while its attributes are set.
struct Building(NonNull<sys::nftnl_expr>);

impl Building {
    fn new(name: &str) -> Self {
        let name = text(name);
        // SAFETY: `name` is terminated and outlives the call; null is handled.
        match NonNull::new(unsafe { sys::nftnl_expr_alloc(name.as_ptr()) }) {
            Some(expression) => Self(expression),
            None => std::process::abort(),
        }
    }

    fn number(self, kind: u32, value: u32) -> Self {
        // SAFETY: the expression is alive; the attribute is a number of 32 bits.
        unsafe { sys::nftnl_expr_set_u32(self.0.as_ptr(), attribute(kind), value) };
        self
    }

    fn long(self, kind: u32, value: u64) -> Self {
        // SAFETY: the expression is alive; the attribute is a number of 64 bits.
        unsafe { sys::nftnl_expr_set_u64(self.0.as_ptr(), attribute(kind), value) };
        self
    }

    fn byte(self, kind: u32, value: u8) -> Self {
        // SAFETY: the expression is alive; the attribute is a number of 8 bits.
        unsafe { sys::nftnl_expr_set_u8(self.0.as_ptr(), attribute(kind), value) };
        self
    }

    fn bytes(self, kind: u32, value: &[u8]) -> Self {
        let length = u32::try_from(value.len()).unwrap_or_default();
        // SAFETY: the expression is alive; libnftnl copies `length` bytes of `value`.
        unsafe { sys::nftnl_expr_set(self.0.as_ptr(), attribute(kind), value.as_ptr().cast(), length) };
        self
    }

    fn text(self, kind: u32, value: &str) -> Self {
        let value = text(value);
        // SAFETY: the expression is alive; `value` is terminated, and libnftnl copies it.
        unsafe { sys::nftnl_expr_set_str(self.0.as_ptr(), attribute(kind), value.as_ptr()) };
        self
    }
}

impl ToExpression for Expression {
    fn to_expr(&self, _: &nftnl::Rule<'_>) -> NonNull<sys::nftnl_expr> {
        self.build().0
    }
}

impl Expression {
    fn build(&self) -> Building {
        match self {
            Expression::Payload { base, offset, length, to } => Building::new("payload")
                .number(sys::NFTNL_EXPR_PAYLOAD_BASE, *base as u32)
                .number(sys::NFTNL_EXPR_PAYLOAD_OFFSET, *offset)
                .number(sys::NFTNL_EXPR_PAYLOAD_LEN, *length)
                .number(sys::NFTNL_EXPR_PAYLOAD_DREG, *to),
            Expression::Meta { key, to } => Building::new("meta")
                .number(sys::NFTNL_EXPR_META_KEY, *key)
                .number(sys::NFTNL_EXPR_META_DREG, *to),
            Expression::SetMeta { key, from } => Building::new("meta")
                .number(sys::NFTNL_EXPR_META_KEY, *key)
                .number(sys::NFTNL_EXPR_META_SREG, *from),
            Expression::Ct { key, to } => {
                Building::new("ct").number(sys::NFTNL_EXPR_CT_KEY, *key).number(sys::NFTNL_EXPR_CT_DREG, *to)
            }
            Expression::Cmp { from, op, data } => Building::new("cmp")
                .number(sys::NFTNL_EXPR_CMP_SREG, *from)
                .number(sys::NFTNL_EXPR_CMP_OP, *op as u32)
                .bytes(sys::NFTNL_EXPR_CMP_DATA, data),
            Expression::Bitwise { from, to, mask, xor } => Building::new("bitwise")
                .number(sys::NFTNL_EXPR_BITWISE_SREG, *from)
                .number(sys::NFTNL_EXPR_BITWISE_DREG, *to)
                .number(sys::NFTNL_EXPR_BITWISE_LEN, u32::try_from(mask.len()).unwrap_or_default())
                .bytes(sys::NFTNL_EXPR_BITWISE_MASK, mask)
                .bytes(sys::NFTNL_EXPR_BITWISE_XOR, xor),
            Expression::Lookup { set, from, to, invert } => {
                let lookup = Building::new("lookup")
                    .text(sys::NFTNL_EXPR_LOOKUP_SET, set)
                    .number(sys::NFTNL_EXPR_LOOKUP_SREG, *from);
                let lookup = match to {
                    Some(to) => lookup.number(sys::NFTNL_EXPR_LOOKUP_DREG, *to),
                    None => lookup,
                };
                if *invert { lookup.number(sys::NFTNL_EXPR_LOOKUP_FLAGS, 1) } else { lookup }
            }
            Expression::Verdict(verdict) => {
                let immediate = Building::new("immediate")
                    .number(sys::NFTNL_EXPR_IMM_DREG, 0)
                    .number(sys::NFTNL_EXPR_IMM_VERDICT, verdict.code().cast_unsigned());
                match verdict.chain() {
                    Some(chain) => immediate.text(sys::NFTNL_EXPR_IMM_CHAIN, chain),
                    None => immediate,
                }
            }
            Expression::Immediate { to, data } => Building::new("immediate")
                .number(sys::NFTNL_EXPR_IMM_DREG, *to)
                .bytes(sys::NFTNL_EXPR_IMM_DATA, data),
            Expression::Learn { map, op, key, data, timeout } => {
                let learn = Building::new("dynset")
                    .text(sys::NFTNL_EXPR_DYNSET_SET_NAME, map)
                    .number(sys::NFTNL_EXPR_DYNSET_OP, *op as u32)
                    .number(sys::NFTNL_EXPR_DYNSET_SREG_KEY, *key)
                    .number(sys::NFTNL_EXPR_DYNSET_SREG_DATA, *data);
                match timeout {
                    0 => learn,
                    timeout => learn.long(sys::NFTNL_EXPR_DYNSET_TIMEOUT, *timeout),
                }
            }
            Expression::Random { to, modulus } => Building::new("numgen")
                .number(sys::NFTNL_EXPR_NG_DREG, *to)
                .number(sys::NFTNL_EXPR_NG_TYPE, 1)
                .number(sys::NFTNL_EXPR_NG_MODULUS, *modulus),
            Expression::FibAddressType { to, flags } => Building::new("fib")
                .number(sys::NFTNL_EXPR_FIB_DREG, *to)
                .number(sys::NFTNL_EXPR_FIB_RESULT, FIB_ADDRESS_TYPE)
                .number(sys::NFTNL_EXPR_FIB_FLAGS, *flags),
            Expression::Dnat { family, address, port } => Building::new("nat")
                .number(sys::NFTNL_EXPR_NAT_TYPE, 1)
                .number(sys::NFTNL_EXPR_NAT_FAMILY, *family)
                .number(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, *address)
                .number(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, *port)
                .number(sys::NFTNL_EXPR_NAT_FLAGS, NAT_FLAGS),
            Expression::Masquerade { flags } => {
                Building::new("masq").number(sys::NFTNL_EXPR_MASQ_FLAGS, *flags)
            }
            Expression::RejectIcmp { code } => Building::new("reject")
                .number(sys::NFTNL_EXPR_REJECT_TYPE, 0)
                .byte(sys::NFTNL_EXPR_REJECT_CODE, *code),
            // Never declared by us; the kernel refuses the empty expression if it were.
            Expression::Other { .. } => Building::new("immediate"),
        }
    }
}
