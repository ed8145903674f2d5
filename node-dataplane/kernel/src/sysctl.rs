//! Sysctls: files under `/proc/sys`, read before they are written.
//!
//! Keys are paths: `net/ipv4/ip_forward`. What lies under `net/` is that of the network
//! namespace of the calling thread.

use std::io;
use std::path::{Path, PathBuf};

/// A sysctl that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("sysctl {key}: {doing}: {source}")]
pub struct SysctlError {
    /// The key.
    pub key: String,
    /// `read`, or what was to be written.
    pub doing: String,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// What [`ensure`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ensured {
    /// It had the value already; nothing was written.
    Kept,
    /// It was written.
    Written {
        /// The value before.
        before: String,
    },
    /// It has another value and `/proc/sys` is read-only, as in an unprivileged container.
    ReadOnly {
        /// The value that stays.
        stays: String,
    },
}

const ROOT: &str = "/proc/sys";

/// Where sysctls are: of the kernel, or files in a directory that stand for them.
#[derive(Debug, Clone)]
pub struct Tree(PathBuf);

impl Tree {
    /// The kernel's.
    pub fn kernel() -> Self {
        Self(ROOT.into())
    }

    /// A directory with a file for each.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The value, trimmed; `None` where there is no such key.
    pub fn read(&self, key: &str) -> Result<Option<String>, SysctlError> {
        read_at(&self.0.join(key), key)
    }

    /// Makes the sysctl have this value.
    pub fn ensure(&self, key: &str, value: &str) -> Result<Ensured, SysctlError> {
        ensure_at(self.0.join(key), key, value)
    }

    /// Fails where [`ensure`](Self::ensure) could not make it have this value. Writes nothing.
    pub fn try_out(&self, key: &str, value: &str) -> Result<(), SysctlError> {
        if self.read(key)?.as_deref() == Some(value) {
            return Ok(());
        }
        let opened = std::fs::OpenOptions::new().write(true).open(self.0.join(key));
        let failed = |source| SysctlError { key: key.to_owned(), doing: format!("write {value}"), source };
        opened.map(drop).map_err(failed)
    }
}

/// The kernel's value, trimmed; `None` where this kernel has no such key.
pub fn read(key: &str) -> Result<Option<String>, SysctlError> {
    Tree::kernel().read(key)
}

/// Makes the kernel's sysctl have this value.
pub fn ensure(key: &str, value: &str) -> Result<Ensured, SysctlError> {
    Tree::kernel().ensure(key, value)
}

/// Raises a number under `/sys/module`, which is never lowered: `nf_conntrack`, `hashsize`.
pub fn raise_module_parameter(module: &str, parameter: &str, at_least: u64) -> Result<Ensured, SysctlError> {
    let key = format!("module/{module}/parameters/{parameter}");
    raise_at(Path::new("/sys").join(&key), &key, at_least)
}

fn raise_at(path: PathBuf, key: &str, at_least: u64) -> Result<Ensured, SysctlError> {
    let now = read_at(&path, key)?.and_then(|value| value.parse::<u64>().ok());
    if now.is_some_and(|now| now >= at_least) {
        return Ok(Ensured::Kept);
    }
    ensure_at(path, key, &at_least.to_string())
}

fn read_at(path: &Path, key: &str) -> Result<Option<String>, SysctlError> {
    match std::fs::read_to_string(path) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SysctlError { key: key.to_owned(), doing: "read".to_owned(), source }),
    }
}

fn ensure_at(path: PathBuf, key: &str, value: &str) -> Result<Ensured, SysctlError> {
    let failed = |source| SysctlError { key: key.to_owned(), doing: format!("write {value}"), source };
    let before = read_at(&path, key)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    if before == value {
        return Ok(Ensured::Kept);
    }
    match std::fs::write(&path, value) {
        Ok(()) => Ok(Ensured::Written { before }),
        Err(source) if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            Ok(Ensured::ReadOnly { stays: before })
        }
        Err(source) => Err(failed(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_before_it_writes() {
        let path = std::env::temp_dir().join(format!("lockstep-sysctl-{}", std::process::id()));
        std::fs::write(&path, "0\n").unwrap();
        let ensure = |value| ensure_at(path.clone(), "a/b", value).unwrap();
        assert_eq!(ensure("0"), Ensured::Kept);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "0\n", "an equal value is not written again");
        assert_eq!(ensure("1"), Ensured::Written { before: "0".to_owned() });
        assert_eq!(read_at(&path, "a/b").unwrap().as_deref(), Some("1"));
        std::fs::remove_file(&path).unwrap();
        let error = ensure_at(path.clone(), "a/b", "1").unwrap_err();
        assert!(error.to_string().starts_with("sysctl a/b: write 1: "), "{error}");
        assert_eq!(read_at(&path, "a/b").unwrap(), None);
    }

    #[test]
    fn what_could_be_written_is_tried_out_without_writing() {
        let root = std::env::temp_dir().join(format!("lockstep-tree-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("a"), "0\n").unwrap();
        let tree = Tree::at(&root);
        tree.try_out("a", "1").unwrap();
        assert_eq!(tree.read("a").unwrap().as_deref(), Some("0"));
        let error = tree.try_out("none", "1").unwrap_err();
        assert!(error.to_string().starts_with("sysctl none: write 1: "), "{error}");
        std::fs::remove_dir_all(&root).unwrap();
        // Nobody can write this one of the kernel's, whoever runs this, and it need not be.
        let kernel = Tree::kernel();
        kernel.try_out("kernel/ostype", "Linux").unwrap();
        assert!(kernel.try_out("kernel/ostype", "Unix").is_err());
    }

    #[test]
    fn a_number_is_raised_and_never_lowered() {
        let path = std::env::temp_dir().join(format!("lockstep-raised-{}", std::process::id()));
        std::fs::write(&path, "100\n").unwrap();
        let raise = |value| raise_at(path.clone(), "a/b", value).unwrap();
        assert_eq!(raise(99), Ensured::Kept);
        assert_eq!(raise(101), Ensured::Written { before: "100".to_owned() });
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "101");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn reads_the_kernel() {
        assert!(read("kernel/ostype").unwrap().is_some_and(|value| value == "Linux"));
        assert_eq!(read("lockstep/none").unwrap(), None);
    }
}
