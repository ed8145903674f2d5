//! What a guest has: this machine's programs with the libraries they need, at the same places.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archive::Archive;
use super::kernel::Kernel;
use crate::build;
use crate::process::{Failure, broken, output, root, run};
use crate::setup;

/// Programs that tests call, and those that help whoever looks around. What is not here is busybox's.
const PROGRAMS: &[&str] = &[
    "bash",
    "bridge",
    "busybox",
    "conntrack",
    "dash",
    "depmod",
    "ip",
    "ipset",
    "ipvsadm",
    "lsmod",
    "modprobe",
    "nft",
    "rmmod",
    "sh",
    "ss",
    "sysctl",
    "tc",
    "timeout",
];

/// Whatever is called like this in the directories of system programs.
const FAMILIES: &[&str] = &["iptables", "ip6tables", "xtables", "ipset", "ebtables", "arptables"];

/// Directories and files of this machine that programs read, where it has them.
const FILES: &[&str] = &[
    "/etc/group",
    "/etc/iproute2",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/services",
    "/usr/lib/x86_64-linux-gnu/xtables",
    "/usr/share/iproute2",
];

/// Where links may lead to `/usr`.
const MERGED: &[&str] = &["/bin", "/sbin", "/lib", "/lib64"];

const BINARIES: &[&str] = &["/usr/bin", "/usr/sbin"];

/// A guest's file system in the making.
#[derive(Debug)]
pub(crate) struct Contents {
    archive: Archive,
    /// Programs and libraries whose own libraries are still to be added.
    elf: BTreeSet<PathBuf>,
    /// Where copies without debugging information are kept.
    stripped: PathBuf,
}

impl Contents {
    /// Tools, modules, and the files of this checkout that are under version control or could be.
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, Failure> {
        let stripped = build::target().join("vm/stripped");
        setup::create(&stripped)?;
        let mut this = Self { archive: Archive::default(), elf: BTreeSet::new(), stripped };
        for merged in MERGED.iter().map(Path::new) {
            if let Ok(target) = fs::read_link(merged) {
                this.archive.link(merged, target);
            }
        }
        for name in PROGRAMS {
            match setup::find_program(name) {
                Some(program) => this.add(&program)?,
                None => return broken(format!("{name} is not on this machine: cargo xtask setup")),
            }
        }
        for directory in BINARIES {
            this.add_entries(Path::new(directory), |name| FAMILIES.iter().any(|it| name.starts_with(it)))?;
        }
        for file in FILES.iter().map(Path::new).filter(|file| file.exists()) {
            this.add(file)?;
        }
        this.add_busybox()?;
        this.archive.text(Path::new("/etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n".to_owned());
        let files = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        for name in output(Command::new("git").args(files).current_dir(root()))?.split('\0') {
            let path = root().join(name);
            if !name.is_empty() && path.exists() {
                this.add(&path)?;
            }
        }
        kernel.add_modules(&mut this.archive)?;
        Ok(this)
    }

    /// A file of this machine with the links on the way to it, or all that is in a directory.
    pub(crate) fn add(&mut self, path: &Path) -> Result<(), Failure> {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return broken(format!("{}: not to be copied into a guest", path.display()));
        };
        let place = match fs::canonicalize(above) {
            Ok(above) => above.join(name),
            Err(error) => return broken(format!("{}: {error}", path.display())),
        };
        if self.archive.has(&place) && !place.is_dir() {
            return Ok(());
        }
        if let Ok(target) = fs::read_link(&place) {
            self.archive.link(&place, target.clone());
            return self.add(&place.parent().unwrap_or(&place).join(target));
        }
        if place.is_dir() {
            self.archive.directory(&place);
            return self.add_entries(&place, |_| true);
        }
        let mut source = place.clone();
        if is_elf(&place) {
            self.elf.insert(place.clone());
            if place.starts_with(build::target()) {
                source = self.strip(&place)?;
            }
        }
        self.archive.file(&place, source);
        Ok(())
    }

    /// A program made here.
    pub(crate) fn add_text(&mut self, path: &Path, text: String) {
        self.archive.text(path, text);
    }

    /// An empty directory.
    pub(crate) fn add_directory(&mut self, path: &Path) {
        self.archive.directory(path);
    }

    /// Writes everything, with the libraries.
    pub(crate) fn write(mut self, to: &Path) -> Result<(), Failure> {
        // Of a library it lists all that comes with it, so once is enough. It complains of what is
        // linked statically, and is right.
        let listed = Command::new("ldd").args(&self.elf).output();
        let listed = match listed {
            Ok(listed) => String::from_utf8_lossy(&listed.stdout).into_owned(),
            Err(error) => return broken(format!("ldd: {error}")),
        };
        for library in libraries(&listed)? {
            self.add(Path::new(library))?;
        }
        self.archive.write(to)
    }

    fn add_entries(&mut self, directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) => return broken(format!("{}: {error}", directory.display())),
        };
        for entry in entries.flatten() {
            // A link that leads nowhere is of no use there either.
            if wanted(&entry.file_name().to_string_lossy()) && entry.path().exists() {
                self.add(&entry.path())?;
            }
        }
        Ok(())
    }

    /// The small tools, where the real one is not there: busybox's `ip` lacks most of what the real one can.
    fn add_busybox(&mut self) -> Result<(), Failure> {
        let Some(busybox) = setup::find_program("busybox") else { return broken("busybox is missing") };
        for name in output(Command::new(&busybox).arg("--list"))?.lines() {
            let is_there = |directory: &&str| self.archive.has(&Path::new(directory).join(name));
            if !BINARIES.iter().any(is_there) {
                self.archive.link(&Path::new(BINARIES[0]).join(name), PathBuf::from("/bin/busybox"));
            }
        }
        Ok(())
    }

    /// A copy of a program of this workspace a tenth in size; line numbers are all it lacks.
    fn strip(&self, program: &Path) -> Result<PathBuf, Failure> {
        let name =
            program.strip_prefix(build::target()).unwrap_or(program).to_string_lossy().replace('/', "-");
        let copy = self.stripped.join(name);
        let written = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        if written(&copy) <= written(program) {
            run(Command::new("strip").arg("-g").arg("-o").arg(&copy).arg(program))?;
        }
        Ok(copy)
    }
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// Paths in what `ldd` prints: `name => path (address)`, or `path (address)`.
fn libraries(listed: &str) -> Result<BTreeSet<&str>, Failure> {
    let mut found = BTreeSet::new();
    for line in listed.lines().filter(|line| line.starts_with(char::is_whitespace)) {
        if line.ends_with("not found") {
            return broken(format!("a library is missing: {}", line.trim()));
        }
        let library = line.split_once(" => ").map_or(line, |(_, path)| path).trim();
        let path = library.split_once(" (").map_or(library, |(path, _)| path);
        if path.starts_with('/') {
            found.insert(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::libraries;

    #[test]
    fn libraries_are_read_from_what_ldd_prints() {
        let listed = "/usr/sbin/nft:\n\tlinux-vdso.so.1 (0x7ffc)\n\tlibmnl.so.0 => /lib/libmnl.so.0 (0x7f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n/bin/busybox:\n\tnot a dynamic executable\n";
        let found: Vec<&str> = libraries(listed).unwrap().into_iter().collect();
        assert_eq!(found, ["/lib/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(libraries("a:\n\tlibgone.so => not found\n").is_err());
    }
}
