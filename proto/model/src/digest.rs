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

fn term(key: &Key, version: Version) -> [u64; 4] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[key.kind() as u8]);
    match key {
        Key::Service(key) => {
            hasher.update(key.namespace.as_bytes()).update(b"/").update(key.name.as_bytes());
        }
        Key::EndpointSet(key) => {
            hasher.update(key.service.namespace.as_bytes()).update(b"/");
            hasher.update(key.service.name.as_bytes()).update(b"/").update(key.slice.as_bytes());
        }
    }
    hasher.update(&[0]).update(&version.0);
    let hash = hasher.finalize();
    let mut limbs = [0; 4];
    for (limb, chunk) in limbs.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(chunk);
        *limb = u64::from_le_bytes(bytes);
    }
    limbs
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
