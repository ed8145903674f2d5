//! The protobuf wire format, as far as canonical bytes use it.

use super::{DecodeError, Result};

/// The fields of one message, in ascending number. Known fields that are out of order, or twice
/// though not repeated, or at their default are errors; unknown ones come out too and may be
/// anything.
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    /// Number of the field before; stays 0 where the order does not matter.
    last: u64,
    ordered: bool,
    repeated: u64,
    known: u64,
}

/// Content of one field.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Four or eight bytes; no known field is of this kind.
    Fixed,
}

fn malformed(reason: &'static str) -> DecodeError {
    DecodeError::Malformed { field: String::new(), reason }
}

/// Takes a varint off the front. Canonical ones have no more bytes than they need.
#[inline]
pub(super) fn varint(bytes: &mut &[u8]) -> Result<u64> {
    match bytes {
        // Nearly all of them.
        [byte @ ..0x80, rest @ ..] => {
            let value = u64::from(*byte);
            *bytes = rest;
            Ok(value)
        }
        _ => long_varint(bytes),
    }
}

fn long_varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        if index == 9 && bits > 1 {
            return Err(malformed("has a number of more than 64 bits"));
        }
        value |= bits << (7 * index);
        if byte & 0x80 == 0 {
            if *byte == 0 && index > 0 {
                return Err(malformed("has a number with needless bytes"));
            }
            *bytes = &bytes[index + 1..];
            return Ok(value);
        }
    }
    Err(malformed("ends inside a number"))
}

impl<'a> Fields<'a> {
    /// Fields 1 to `known` are known, of which `repeated` may repeat.
    pub(super) fn new(bytes: &'a [u8], repeated: &[u32], known: u32) -> Self {
        let repeated = repeated.iter().fold(0, |mask, field| mask | 1 << field);
        Self { bytes, last: 0, ordered: true, repeated, known: u64::from(known) }
    }

    /// The fields of a message that nobody hashes: in any order, as protobuf has it.
    pub(super) fn in_any_order(bytes: &'a [u8]) -> Self {
        Self { bytes, last: 0, ordered: false, repeated: 0, known: 0 }
    }

    /// Number of bytes that follow.
    pub(super) fn rest(&self) -> usize {
        self.bytes.len()
    }

    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<(u32, Value<'a>)>> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = varint(&mut self.bytes)?;
        let number = tag >> 3;
        let known = number <= self.known;
        if number < self.last || (number == self.last && known && self.repeated & 1 << number == 0) {
            return Err(malformed("has a field out of order, or twice"));
        }
        if self.ordered {
            self.last = number;
        }
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut self.bytes)?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = usize::try_from(varint(&mut self.bytes)?);
                Value::Bytes(self.take(length.unwrap_or(usize::MAX))?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            _ => return Err(malformed("has a field of no known kind")),
        };
        match (u32::try_from(number), value) {
            (Ok(1..0x2000_0000), Value::Number(0)) if known => Err(malformed("has a default written out")),
            (Ok(number @ 1..0x2000_0000), value) => Ok(Some((number, value))),
            _ => Err(malformed("has a field number out of range")),
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) =
            self.bytes.split_at_checked(length).ok_or_else(|| malformed("ends inside a field"))?;
        self.bytes = rest;
        Ok(taken)
    }
}

impl<'a> Value<'a> {
    /// Length of the content; 0 for what has none of its own.
    pub(super) fn len(self) -> usize {
        match self {
            Value::Bytes(bytes) => bytes.len(),
            Value::Number(_) | Value::Fixed => 0,
        }
    }

    pub(super) fn number(self, field: &str) -> Result<u64> {
        match self {
            Value::Number(number) => Ok(number),
            _ => Err(DecodeError::Malformed { field: field.into(), reason: "is not a number" }),
        }
    }

    pub(super) fn bytes(self, field: &str) -> Result<&'a [u8]> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(DecodeError::Malformed { field: field.into(), reason: "is neither text nor a message" }),
        }
    }

    /// Text that is not empty: an empty one is a default, or has no place in a list.
    pub(super) fn text(self, field: &str) -> Result<&'a str> {
        let wrong = |reason| DecodeError::Malformed { field: field.into(), reason };
        match std::str::from_utf8(self.bytes(field)?) {
            Ok("") => Err(wrong("is empty")),
            Ok(text) => Ok(text),
            Err(_) => Err(wrong("is not UTF-8")),
        }
    }
}
