use crate::InvalidField;

/// Longest name: that of a DNS subdomain, the longest that Kubernetes has.
const MAX_NAME_BYTES: usize = 253;

/// Refuses what cannot be a Kubernetes name (of an object, a port, a node, a zone): the empty
/// text, more than 253 bytes, and anything but ASCII letters, digits, `-`, `.` and `_`.
///
/// Wider than Kubernetes' own rules, which differ per kind and change: this keeps keys free of
/// ambiguity (no `/`, no NUL) and texts fit for logs and kernel comments.
pub fn check_name(field: &str, text: &str) -> Result<(), InvalidField> {
    let reason = if text.is_empty() {
        "is empty"
    } else if text.len() > MAX_NAME_BYTES {
        "is longer than 253 bytes"
    } else if !is_plain(text) {
        "has a character other than letters, digits, '-', '.' and '_'"
    } else {
        return Ok(());
    };
    // The value may be the thing that is too long.
    let value = text.chars().take(128).collect();
    Err(InvalidField { field: field.into(), value, reason: reason.into() })
}

/// Without branches, so that the compiler checks sixteen bytes at a time: a node checks three
/// names per endpoint.
fn is_plain(text: &str) -> bool {
    text.bytes().fold(true, |plain, byte| {
        let letter = (byte | 0x20).wrapping_sub(b'a') < 26;
        let digit = byte.wrapping_sub(b'0') < 10;
        plain & (letter | digit | (byte == b'-') | (byte == b'.') | (byte == b'_'))
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_is_judged() {
        for letter in (0..=u8::MAX).map(char::from) {
            let plain = letter.is_ascii_alphanumeric() || "-._".contains(letter);
            assert_eq!(super::is_plain(&format!("a{letter}")), plain, "{letter:?}");
        }
    }

    use super::check_name;

    #[test]
    fn names_are_kubernetes_names() {
        for good in ["a", "kube-dns", "web-7xk2p", "ip-10-0-0-1.eu-west-1.compute.internal", "zone_A"] {
            assert_eq!(check_name("name", good), Ok(()), "{good}");
        }
        for bad in ["", "a/b", "a\0b", "a b", "ä", "a\n", &"x".repeat(254)] {
            let fault = check_name("name", bad).expect_err(bad);
            assert_eq!(fault.field, "name");
            assert!(fault.value.len() <= 128, "{fault}");
        }
    }
}
