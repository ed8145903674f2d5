//! Netlink attributes: reading them, and writing them into a reused buffer.

/// Set on attributes that hold attributes.
const NESTED: u16 = 0x8000;
/// To be set on attributes whose value is in network order, where a subsystem asks for it.
pub const NETWORK_ORDER: u16 = 0x4000;
/// Length of an attribute's header.
pub const HEADER: usize = 4;

/// Rounds a length up to netlink's alignment.
pub const fn aligned(length: usize) -> usize {
    (length + 3) & !3
}

/// The first two bytes as a number in host order; 0 where there are fewer.
pub fn u16_ne(bytes: &[u8]) -> u16 {
    bytes.first_chunk().copied().map_or(0, u16::from_ne_bytes)
}

/// The first four bytes as a number in host order; 0 where there are fewer.
pub fn u32_ne(bytes: &[u8]) -> u32 {
    bytes.first_chunk().copied().map_or(0, u32::from_ne_bytes)
}

/// One attribute.
#[derive(Debug, Clone, Copy)]
pub struct Attribute<'a> {
    /// Its type, without the flag bits.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The value as a number in network order; 0 where it is shorter.
    pub fn u16_be(&self) -> u16 {
        u16::from_be(u16_ne(self.value))
    }

    /// The value as a number in network order; 0 where it is shorter.
    pub fn u32_be(&self) -> u32 {
        u32::from_be(u32_ne(self.value))
    }

    /// The value as a number in network order; 0 where it is shorter.
    pub fn u64_be(&self) -> u64 {
        self.value.first_chunk().copied().map_or(0, u64::from_be_bytes)
    }

    /// The value as text up to its terminating zero; empty where it is not UTF-8.
    pub fn text(&self) -> &'a str {
        let end = self.value.iter().position(|byte| *byte == 0).unwrap_or(self.value.len());
        std::str::from_utf8(&self.value[..end]).unwrap_or_default()
    }

    /// The attributes in the value.
    pub fn nested(&self) -> Attributes<'a> {
        Attributes::of(self.value)
    }
}

/// Walks a run of attributes and ends at the first that does not fit.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// The attributes in `bytes`.
    pub fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The first attribute of a type.
    pub fn get(&self, kind: u16) -> Option<Attribute<'a>> {
        self.clone().find(|attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let header = self.rest.get(..HEADER)?;
        let length = usize::from(u16_ne(header));
        let value = self.rest.get(HEADER..length)?;
        let kind = u16_ne(&header[2..]) & 0x3fff;
        self.rest = self.rest.get(aligned(length)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

/// Appends an attribute. A value over 65,531 bytes does not fit and must not be given.
pub fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    put_header(out, kind, value.len());
    out.extend_from_slice(value);
    out.resize(aligned(out.len()), 0);
}

/// Appends the header of an attribute whose value of `length` bytes follows.
pub fn put_header(out: &mut Vec<u8>, kind: u16, length: usize) {
    let length = u16::try_from(HEADER + length).unwrap_or(u16::MAX);
    let [a, b] = length.to_ne_bytes();
    let [c, d] = kind.to_ne_bytes();
    out.extend_from_slice(&[a, b, c, d]);
}

/// Appends the header of a nest whose attributes of `length` bytes, padding included, follow.
pub fn put_nest(out: &mut Vec<u8>, kind: u16, length: usize) {
    put_header(out, kind | NESTED, length);
}

/// Appends a nest and what `fill` appends to it, which must be attributes of at most 65,531 bytes.
pub fn nest(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put_nest(out, kind, 0);
    fill(out);
    let length = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
}

/// Appends a number in host order.
pub fn put_u16(out: &mut Vec<u8>, kind: u16, value: u16) {
    put(out, kind, &value.to_ne_bytes());
}

/// Appends a number in host order.
pub fn put_u32(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_ne_bytes());
}

/// Appends a number in network order.
pub fn put_u32_be(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends text with its terminating zero.
pub fn put_text(out: &mut Vec<u8>, kind: u16, text: &str) {
    put_header(out, kind, text.len() + 1);
    out.extend_from_slice(text.as_bytes());
    out.push(0);
    out.resize(aligned(out.len()), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read_back() {
        let mut out = Vec::new();
        put_text(&mut out, 1, "lockstep");
        put_u32_be(&mut out, 2, 77);
        nest(&mut out, 3, |out| put(out, 4, &[1, 2, 3, 4, 5]));
        let all = Attributes::of(&out);
        assert_eq!(all.get(1).unwrap().text(), "lockstep");
        assert_eq!(all.get(2).unwrap().u32_be(), 77);
        assert_eq!(all.get(3).unwrap().nested().get(4).unwrap().value, [1, 2, 3, 4, 5]);
        assert_eq!(all.count(), 3);
    }

    #[test]
    fn a_walk_ends_at_what_does_not_fit() {
        assert_eq!(Attributes::of(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(Attributes::of(&[200, 0, 1, 0, 9]).count(), 0);
        assert_eq!(Attributes::of(&[0, 0]).count(), 0);
    }
}
