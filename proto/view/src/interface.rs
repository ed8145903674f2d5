use std::fmt;
use std::sync::Arc;

/// Name of a network interface, or the beginning of one, as every backend can write it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(Arc<str>);

/// Why a text is no name of an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidInterface {
    /// Nothing is named.
    #[error("it is empty")]
    Empty,
    /// The kernel has no such names.
    #[error("it has {0} bytes, and the kernel takes {max} at most", max = InterfaceName::LONGEST)]
    Long(usize),
    /// A prefix of which only one name can begin, and for whose wildcard iptables has no room.
    #[error("it has {0} bytes, and a prefix has {max} at most", max = InterfaceName::LONGEST - 1)]
    LongPrefix(usize),
    /// The kernel or a tool takes the character for something else.
    #[error("{0:?} cannot be in it")]
    Character(char),
    /// Names of directories.
    #[error("the kernel has no interface of that name")]
    Dots,
}

impl InterfaceName {
    /// The kernel's `IFNAMSIZ`, less the byte that ends a name.
    pub const LONGEST: usize = 15;

    /// A whole name.
    pub fn new(text: &str) -> Result<Self, InvalidInterface> {
        if text.len() > Self::LONGEST {
            return Err(InvalidInterface::Long(text.len()));
        }
        if text == "." || text == ".." {
            return Err(InvalidInterface::Dots);
        }
        Self::checked(text)
    }

    /// The beginning of names.
    pub fn prefix(text: &str) -> Result<Self, InvalidInterface> {
        if text.len() >= Self::LONGEST {
            return Err(InvalidInterface::LongPrefix(text.len()));
        }
        Self::checked(text)
    }

    fn checked(text: &str) -> Result<Self, InvalidInterface> {
        if text.is_empty() {
            return Err(InvalidInterface::Empty);
        }
        // '/' and ':' are in no name of the kernel's; '+' and '*' are the tools' wildcards, quotes and
        // the backslash their quoting; '!' is iptables' word for "not".
        let fits = |letter: &char| letter.is_ascii_graphic() && !"/:+*\"'\\!".contains(*letter);
        match text.chars().find(|letter| !fits(letter)) {
            Some(letter) => Err(InvalidInterface::Character(letter)),
            None => Ok(Self(text.into())),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_backend_could_write_is_no_name() {
        for good in ["br0", "cali", "eth0.100", "a@b", "fifteen-letters"] {
            assert_eq!(InterfaceName::new(good).map(|name| name.to_string()), Ok(good.to_owned()));
        }
        let fault = |text: &str| InterfaceName::new(text).unwrap_err().to_string();
        assert_eq!(fault(""), "it is empty");
        assert_eq!(fault("sixteen-letters-"), "it has 16 bytes, and the kernel takes 15 at most");
        assert_eq!(fault(".."), "the kernel has no interface of that name");
        for text in ["br/0", "br 0", "br:0", "br+", "br*", "br\"", "!br", "br\n", "brü"] {
            assert!(fault(text).ends_with("cannot be in it"), "{text}: {}", fault(text));
        }
    }

    #[test]
    fn a_prefix_leaves_room_for_the_rest() {
        assert!(InterfaceName::prefix("fourteen-bytes").is_ok());
        assert!(InterfaceName::prefix(".").is_ok(), "names may begin like this");
        assert_eq!(
            InterfaceName::prefix("fifteen-letters").unwrap_err().to_string(),
            "it has 15 bytes, and a prefix has 14 at most"
        );
    }
}
