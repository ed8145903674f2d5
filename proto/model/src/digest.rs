use std::fmt;

use crate::Key;

/// Content version of a resource: the first 16 bytes of BLAKE3 over its canonical bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub [u8; 16]);

/// Order-independent digest of a set of resources: the sum, modulo 2^256 and in
/// little-endian, of BLAKE3(kind byte, key text, 0x00, version) over all of them.
///
/// Equal digests mean equal sets, whatever order they were built in. It detects accidents;
/// authenticity comes from TLS.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digest([u64; 4]);

impl Version {
    /// Version of the resource with these canonical bytes.
    pub fn of(canonical: &[u8]) -> Self {
        let mut version = [0; 16];
        version.copy_from_slice(&blake3::hash(canonical).as_bytes()[..16]);
        Self(version)
    }

    /// From the wire form; `None` unless it has 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl Digest {
    /// Digest of the empty set.
    pub const EMPTY: Digest = Digest([0; 4]);

    /// From the wire form; `None` unless it has 32 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 32] = bytes.try_into().ok()?;
        let mut limbs = [0; 4];
        for (limb, chunk) in limbs.iter_mut().zip(bytes.chunks_exact(8)) {
            *limb = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        Some(Self(limbs))
    }

    /// The wire form.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, limb) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&limb.to_le_bytes());
        }
        bytes
    }

    /// Adds a resource. Adding one twice is the caller's fault and gives a digest that
    /// matches no set.
    pub fn add(&mut self, key: &Key, version: Version) {
        let mut carry = false;
        for (limb, add) in self.0.iter_mut().zip(term(key, version)) {
            let (sum, over_add) = limb.overflowing_add(add);
            let (sum, over_carry) = sum.overflowing_add(u64::from(carry));
            *limb = sum;
            carry = over_add || over_carry;
        }
    }

    /// Takes a resource away that was added.
    pub fn remove(&mut self, key: &Key, version: Version) {
        let mut borrow = false;
        for (limb, take) in self.0.iter_mut().zip(term(key, version)) {
            let (rest, under_take) = limb.overflowing_sub(take);
            let (rest, under_borrow) = rest.overflowing_sub(u64::from(borrow));
            *limb = rest;
            borrow = under_take || under_borrow;
        }
    }
}

/// One resource's share. Hashed from one buffer in one go: the incremental hasher costs as much
/// again as hashing so few bytes.
fn term(key: &Key, version: Version) -> [u64; 4] {
    let mut input = Input { bytes: [0; INLINE_INPUT], len: 0, spilled: None };
    input.push(&[key.kind() as u8]);
    for (position, name) in key.names().enumerate() {
        if position > 0 {
            input.push(b"/");
        }
        input.push(name.as_bytes());
    }
    input.push(&[0]);
    input.push(&version.0);
    let hash = input.hash();
    let mut limbs = [0; 4];
    for (limb, chunk) in limbs.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(chunk);
        *limb = u64::from_le_bytes(bytes);
    }
    limbs
}

/// Names of usual length fit; longer input goes to the incremental hasher.
const INLINE_INPUT: usize = 256;

/// What a term is the hash of.
struct Input {
    bytes: [u8; INLINE_INPUT],
    len: usize,
    spilled: Option<Box<blake3::Hasher>>,
}

impl Input {
    fn push(&mut self, part: &[u8]) {
        let end = self.len + part.len();
        if let Some(free) = self.bytes.get_mut(self.len..end) {
            free.copy_from_slice(part);
            self.len = end;
            return;
        }
        let hasher = self.spilled.get_or_insert_default();
        hasher.update(&self.bytes[..self.len]).update(part);
        self.len = 0;
    }

    fn hash(mut self) -> blake3::Hash {
        let rest = &self.bytes[..self.len];
        match &mut self.spilled {
            None => blake3::hash(rest),
            Some(hasher) => hasher.update(rest).finalize(),
        }
    }
}

fn hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Display for Version {
    /// Lower-case hex.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Display for Digest {
    /// Lower-case hex of the wire form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.to_bytes())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({self})")
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EndpointSetKey, ServiceKey};

    fn key(name: &str) -> Key {
        Key::Service(ServiceKey::new("default", name))
    }

    #[test]
    fn one_resource_is_its_own_hash() {
        let version = Version::of(b"content");
        let mut digest = Digest::EMPTY;
        digest.add(&key("web"), version);
        let mut input = b"\x01default/web\0".to_vec();
        input.extend_from_slice(&version.0);
        assert_eq!(digest.to_bytes(), *blake3::hash(&input).as_bytes());

        let service = ServiceKey::new("default", "web");
        let mut digest = Digest::EMPTY;
        digest.add(&Key::EndpointSet(EndpointSetKey::new(service, "web-x")), version);
        let mut input = b"\x02default/web/web-x\0".to_vec();
        input.extend_from_slice(&version.0);
        assert_eq!(digest.to_bytes(), *blake3::hash(&input).as_bytes());
    }

    #[test]
    fn a_term_is_the_same_hash_however_long_the_names_are() {
        let version = Version([7; 16]);
        for length in [1, 100, 117, 118, 119, 126, 127, 253] {
            let (namespace, name, slice) = ("n".repeat(63), "s".repeat(length), "x".repeat(length));
            let key = EndpointSetKey::new(ServiceKey::new(namespace.clone(), name.clone()), slice.clone());
            let mut digest = Digest::EMPTY;
            digest.add(&Key::EndpointSet(key), version);
            let mut input = format!("\x02{namespace}/{name}/{slice}\0").into_bytes();
            input.extend_from_slice(&version.0);
            assert_eq!(digest.to_bytes(), *blake3::hash(&input).as_bytes(), "{length}");
        }
    }

    #[test]
    fn carries_and_borrows_go_through_all_limbs() {
        // Every limb full: adding anything must carry through, and wrap at 2^256.
        let mut digest = Digest([u64::MAX; 4]);
        digest.add(&key("a"), Version([0; 16]));
        let one_less = digest;
        let mut expected = Digest::EMPTY;
        expected.add(&key("a"), Version([0; 16]));
        // -1 + x == x - 1
        expected.0[0] = expected.0[0].wrapping_sub(1);
        assert_eq!(one_less, expected);
        digest.remove(&key("a"), Version([0; 16]));
        assert_eq!(digest, Digest([u64::MAX; 4]));

        let mut digest = Digest::EMPTY;
        digest.remove(&key("a"), Version([0; 16]));
        digest.add(&key("a"), Version([0; 16]));
        assert_eq!(digest, Digest::EMPTY);
    }

    #[test]
    fn wire_form_goes_both_ways() {
        let digest = Digest([1, 2, 3, u64::MAX]);
        assert_eq!(Digest::from_bytes(&digest.to_bytes()), Some(digest));
        assert_eq!(digest.to_bytes()[..9], [1, 0, 0, 0, 0, 0, 0, 0, 2], "little-endian");
        assert_eq!(Digest::from_bytes(&[0; 31]), None);
        assert_eq!(Version::from_bytes(&[0; 17]), None);
        assert_eq!(Version([0xab; 16]).to_string(), "ab".repeat(16));
    }
}
