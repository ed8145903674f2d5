//! Messages that other programs were seen to send, for tests to hold ours against.

use super::attr::Attributes;

/// `NLM_F_ACK`, which those programs set and we do not.
const ACK: u8 = 0x04;

/// The bytes of hexadecimal digits.
pub(crate) fn bytes(digits: &str) -> Vec<u8> {
    let digits: Vec<_> = digits.chars().filter(char::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(&String::from_iter(pair), 16).unwrap()).collect()
}

/// A message without what differs each time: acknowledgement, sequence number, port.
pub(crate) fn plain(mut message: Vec<u8>) -> Vec<u8> {
    message[6] &= !ACK;
    message[8..16].fill(0);
    message
}

/// What `put` appends to nothing, plain.
pub(crate) fn written(put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    plain(out)
}

/// Types and values of the attributes in a message, after `header` bytes.
pub(crate) fn attributes(message: &[u8], header: usize) -> Vec<(u16, Vec<u8>)> {
    let all = Attributes::of(&message[header..]);
    all.map(|attribute| (attribute.kind, attribute.value.to_vec())).collect()
}
