//! The file system that a guest starts with: an archive that its kernel unpacks into memory.
//!
//! The format is cpio's "newc", as the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`
//! has it: one header of hexadecimal fields per file, names and contents padded to four bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::process::{Failure, broken};

/// Files by their absolute paths. A directory comes before what is in it.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug)]
enum Entry {
    Directory,
    Link(PathBuf),
    /// A file of this machine, read when the archive is written.
    File(PathBuf),
    /// A program made here.
    Text(String),
}

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const LAST: &str = "TRAILER!!!";

impl Archive {
    /// True where something has this path.
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.entries.contains_key(path)
    }

    /// A directory and those it is in.
    pub(crate) fn directory(&mut self, path: &Path) {
        for above in path.ancestors() {
            self.entries.entry(above.to_path_buf()).or_insert(Entry::Directory);
        }
    }

    /// A file as `source` is, with its mode.
    pub(crate) fn file(&mut self, path: &Path, source: PathBuf) {
        self.put(path, Entry::File(source));
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &Path, target: PathBuf) {
        self.put(path, Entry::Link(target));
    }

    /// A file with this text, which may be run.
    pub(crate) fn text(&mut self, path: &Path, text: String) {
        self.put(path, Entry::Text(text));
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        if let Some(above) = path.parent() {
            self.directory(above);
        }
        self.entries.insert(path.to_path_buf(), entry);
    }

    /// Writes the archive to a file.
    pub(crate) fn write(&self, to: &Path) -> Result<(), Failure> {
        match File::create(to).and_then(|file| self.write_into(BufWriter::new(file))) {
            Ok(()) => Ok(()),
            Err(error) => broken(format!("{}: {error}", to.display())),
        }
    }

    fn write_into(&self, mut out: impl Write) -> io::Result<()> {
        let mut number = 0;
        for (path, entry) in &self.entries {
            let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
            if name.is_empty() {
                // The root is there already.
                continue;
            }
            number += 1;
            let (mode, contents) = entry.read()?;
            member(&mut out, number, mode, &name, &contents)?;
        }
        member(&mut out, 0, 0, LAST, &[])?;
        out.flush()
    }
}

impl Entry {
    /// Its mode with the kind of file, and its contents.
    fn read(&self) -> io::Result<(u32, Vec<u8>)> {
        Ok(match self {
            Entry::Directory => (DIRECTORY, Vec::new()),
            Entry::Link(target) => (LINK, target.to_string_lossy().into_owned().into_bytes()),
            Entry::Text(text) => (FILE | 0o755, text.clone().into_bytes()),
            Entry::File(source) => {
                let named = |error| io::Error::other(format!("{}: {error}", source.display()));
                let mode = fs::metadata(source).map_err(named)?.permissions().mode();
                (FILE | (mode & 0o7777), fs::read(source).map_err(named)?)
            }
        })
    }
}

/// One member; everything in it is root's.
fn member(out: &mut impl Write, number: u32, mode: u32, name: &str, contents: &[u8]) -> io::Result<()> {
    let size = u32::try_from(contents.len())
        .map_err(|_| io::Error::other(format!("{name}: larger than an archive can have it")))?;
    let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
    // ino, mode, uid, gid, nlink, mtime, filesize, four numbers of devices, namesize, check.
    let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    let mut header = "070701".to_owned();
    for field in fields {
        header.push_str(&format!("{field:08X}"));
    }
    out.write_all(header.as_bytes())?;
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    padding(out, header.len() + name.len() + 1)?;
    out.write_all(contents)?;
    padding(out, contents.len())
}

fn padding(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..written.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them_and_everything_is_padded() {
        let mut archive = Archive::default();
        archive.text(Path::new("/a/b"), "abcde".to_owned());
        archive.link(Path::new("/a/c"), PathBuf::from("b"));
        let mut bytes = Vec::new();
        archive.write_into(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let magic: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(magic.len(), 4, "the directory, two files and the end: {text:?}");
        assert!(magic.iter().all(|at| at % 4 == 0), "{magic:?}");
        let names: Vec<&str> = magic.iter().filter_map(|at| text[at + 110..].split('\0').next()).collect();
        assert_eq!(names, ["a", "a/b", "a/c", LAST]);
        let file = &text[magic[1]..magic[2]];
        assert_eq!(&file[14..22], "000081ED", "a regular file that may be run");
        assert_eq!(&file[54..62], "00000005");
        assert_eq!(&file[116..], "abcde\0\0\0");
    }
}
