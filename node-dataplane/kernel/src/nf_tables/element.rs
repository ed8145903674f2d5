//! Elements of sets and maps: the hot path of every transaction.
//!
//! The encoder appends to a buffer that is reused, and allocates nothing. Keys and data are
//! given in the kernel's form: fields padded to four bytes, in network order.

use super::Verdict;
use crate::netlink::attr::{self, Attributes, aligned};

const LIST_ELEMENT: u16 = 1;
const KEY: u16 = 1;
const DATA: u16 = 2;
const FLAGS: u16 = 3;
const TIMEOUT: u16 = 4;
const EXPIRATION: u16 = 5;
const KEY_END: u16 = 10;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

/// `NFT_SET_ELEM_INTERVAL_END`.
const INTERVAL_END: u32 = 1;
/// `NFT_SET_ELEM_CATCHALL`.
const CATCHALL: u32 = 2;

/// What a map says about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Bytes, as they go into registers.
    Bytes(Vec<u8>),
    /// A verdict.
    Verdict(Verdict),
}

/// One element as the kernel reports it.
#[derive(Debug, Clone)]
pub struct Element<'a> {
    /// The key, or the first key of a range. Empty: what holds for every other key.
    pub key: &'a [u8],
    /// The last key of a range.
    pub key_end: Option<&'a [u8]>,
    /// The key is the first one after a range, in a set whose ranges are two elements.
    pub ends_interval: bool,
    /// How long it lives, and how much of that is left.
    pub lifetime: Option<Lifetime>,
    data: Option<Attributes<'a>>,
}

/// How long an element lives that ends by itself, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// In all.
    pub timeout: u64,
    /// From now on.
    pub left: u64,
}

impl<'a> Element<'a> {
    /// Reads one element; `None` where it has no key and does not stand for every other one.
    pub(super) fn decode(attributes: &Attributes<'a>) -> Option<Self> {
        let value = |kind| attributes.get(kind).and_then(|key| key.nested().get(DATA_VALUE));
        let flags = attributes.get(FLAGS).map_or(0, |flags| flags.u32_be());
        let key = value(KEY).map(|key| key.value).or((flags & CATCHALL != 0).then_some(&[][..]))?;
        Some(Self {
            key,
            key_end: value(KEY_END).map(|end| end.value),
            ends_interval: flags & INTERVAL_END != 0,
            lifetime: attributes.get(TIMEOUT).map(|timeout| Lifetime {
                timeout: timeout.u64_be(),
                left: attributes.get(EXPIRATION).map_or(0, |left| left.u64_be()),
            }),
            data: attributes.get(DATA).map(|data| data.nested()),
        })
    }

    /// The data as bytes; `None` where there is none, or a verdict.
    pub fn bytes(&self) -> Option<&'a [u8]> {
        self.data.as_ref()?.get(DATA_VALUE).map(|value| value.value)
    }

    /// The data as a verdict's code and chain; `None` where there is none, or bytes.
    pub fn verdict(&self) -> Option<(i32, Option<&'a str>)> {
        let verdict = self.data.as_ref()?.get(DATA_VERDICT)?.nested();
        let code = verdict.get(VERDICT_CODE)?.u32_be().cast_signed();
        Some((code, verdict.get(VERDICT_CHAIN).map(|chain| chain.text())))
    }

    /// The data; `None` where the element has none.
    pub fn value(&self) -> Option<Value> {
        if let Some(bytes) = self.bytes() {
            return Some(Value::Bytes(bytes.to_owned()));
        }
        Verdict::decode(&self.data.as_ref()?.get(DATA_VERDICT)?.nested()).map(Value::Verdict)
    }
}

/// Length of a nest around one value.
const fn boxed(value: usize) -> usize {
    2 * attr::HEADER + aligned(value)
}

fn put_boxed(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attr::put_nest(out, kind, boxed(value.len()) - attr::HEADER);
    attr::put(out, DATA_VALUE, value);
}

/// Appends an element of a set.
pub fn put_key(out: &mut Vec<u8>, key: &[u8]) {
    attr::put_nest(out, LIST_ELEMENT, boxed(key.len()));
    put_boxed(out, KEY, key);
}

/// Appends a range of a set of intervals, which is two elements: the first key, and the one after
/// the last. `None` = the last key is the last there is.
pub fn put_interval(out: &mut Vec<u8>, first: &[u8], after: Option<&[u8]>) {
    put_key(out, first);
    if let Some(after) = after {
        attr::put_nest(out, LIST_ELEMENT, boxed(after.len()) + attr::HEADER + 4);
        put_boxed(out, KEY, after);
        attr::put_u32_be(out, FLAGS, INTERVAL_END);
    }
}

/// Appends an element of a set of concatenated ranges, both ends included.
pub fn put_range(out: &mut Vec<u8>, first: &[u8], last: &[u8]) {
    attr::put_nest(out, LIST_ELEMENT, boxed(first.len()) + boxed(last.len()));
    put_boxed(out, KEY, first);
    put_boxed(out, KEY_END, last);
}

/// Appends an element of a map to bytes.
pub fn put_mapping(out: &mut Vec<u8>, key: &[u8], data: &[u8]) {
    attr::put_nest(out, LIST_ELEMENT, boxed(key.len()) + boxed(data.len()));
    put_boxed(out, KEY, key);
    put_boxed(out, DATA, data);
}

/// Appends an element of a map to bytes that ends by itself.
pub fn put_passing(out: &mut Vec<u8>, key: &[u8], data: &[u8], lifetime: Lifetime) {
    let times = 2 * (attr::HEADER + 8);
    attr::put_nest(out, LIST_ELEMENT, boxed(key.len()) + boxed(data.len()) + times);
    put_boxed(out, KEY, key);
    put_boxed(out, DATA, data);
    attr::put(out, TIMEOUT, &lifetime.timeout.to_be_bytes());
    attr::put(out, EXPIRATION, &lifetime.left.to_be_bytes());
}

/// Appends an element of a map to verdicts: the verdict's code, and the chain that it names.
pub fn put_verdict(out: &mut Vec<u8>, key: &[u8], code: i32, chain: Option<&str>) {
    let chain_length = chain.map_or(0, |name| attr::HEADER + aligned(name.len() + 1));
    let verdict = attr::HEADER + 4 + chain_length;
    attr::put_nest(out, LIST_ELEMENT, boxed(key.len()) + 2 * attr::HEADER + verdict);
    put_boxed(out, KEY, key);
    attr::put_nest(out, DATA, attr::HEADER + verdict);
    attr::put_nest(out, DATA_VERDICT, verdict);
    attr::put_u32_be(out, VERDICT_CODE, code.cast_unsigned());
    if let Some(name) = chain {
        attr::put_text(out, VERDICT_CHAIN, name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(bytes: &[u8]) -> Element<'_> {
        let mut all = Attributes::of(bytes);
        let first = all.next().unwrap();
        assert_eq!(first.kind, LIST_ELEMENT);
        assert!(all.next().is_none(), "the lengths add up");
        Element::decode(&first.nested()).unwrap()
    }

    #[test]
    fn elements_are_read_back() {
        let mut out = Vec::new();
        put_key(&mut out, &[10, 0, 0, 1]);
        assert_eq!(only(&out).key, [10, 0, 0, 1]);
        assert_eq!(only(&out).value(), None);

        out.clear();
        put_mapping(&mut out, &[1; 16], &[2; 8]);
        assert_eq!(only(&out).key, [1; 16]);
        assert_eq!(only(&out).value(), Some(Value::Bytes(vec![2; 8])));

        out.clear();
        let lifetime = Lifetime { timeout: 60_000, left: 59_000 };
        put_passing(&mut out, &[1; 16], &[2; 4], lifetime);
        assert_eq!(only(&out).value(), Some(Value::Bytes(vec![2; 4])));
        assert_eq!(only(&out).lifetime, Some(lifetime));

        out.clear();
        put_range(&mut out, &[1; 4], &[9; 4]);
        assert_eq!(only(&out).key_end, Some(&[9; 4][..]));

        out.clear();
        put_interval(&mut out, &[1; 4], None);
        assert_eq!((only(&out).key, only(&out).ends_interval), (&[1; 4][..], false));
        let start = out.len();
        out.clear();
        put_interval(&mut out, &[1; 4], Some(&[9; 4]));
        assert!(!only(&out[..start]).ends_interval);
        assert_eq!((only(&out[start..]).key, only(&out[start..]).ends_interval), (&[9; 4][..], true));
    }

    #[test]
    fn verdicts_are_read_back() {
        for verdict in [Verdict::Drop, Verdict::Return, Verdict::Goto("svc.c10".to_owned())] {
            let mut out = Vec::new();
            put_verdict(&mut out, &[7; 12], verdict.code(), verdict.chain());
            assert_eq!(only(&out).verdict(), Some((verdict.code(), verdict.chain())));
            assert_eq!(only(&out).value(), Some(Value::Verdict(verdict)));
        }
    }
}
