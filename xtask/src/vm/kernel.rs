//! The kernel of the guest: Debian's for clouds, unpacked in the cache. It is never this machine's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archive::Archive;
use crate::process::{Failure, broken, output, run};
use crate::setup;

/// Depends on the newest of its kind.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Modules a guest can load, by their paths in the directory of modules or how these begin;
/// what they need comes along.
const MODULES: &[&str] = &[
    "kernel/net/",
    "kernel/drivers/net/dummy.ko",
    "kernel/drivers/net/veth.ko",
    "kernel/drivers/net/virtio_net.ko",
    "kernel/drivers/block/virtio_blk.ko",
    "kernel/drivers/virtio/",
];

/// A kernel that can be started.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What a machine starts.
    pub(crate) image: PathBuf,
    /// Its release, as `uname -r` says it.
    pub(crate) release: String,
    /// Its modules with their indices.
    modules: PathBuf,
}

impl Kernel {
    /// The one in the cache, after it was put there.
    pub(crate) fn get() -> Result<Self, Failure> {
        let directory = setup::cache()?.join("guest-kernel");
        if !directory.exists() {
            download(&directory)?;
        }
        Self::in_directory(&directory)
    }

    fn in_directory(directory: &Path) -> Result<Self, Failure> {
        let begins = "vmlinuz-";
        let image = one(&directory.join("boot"), |name| name.starts_with(begins))?;
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        let release = name.trim_start_matches(begins).to_owned();
        let modules = directory.join("lib/modules").join(&release);
        Ok(Self { image, release, modules })
    }

    /// Puts the modules in their place.
    pub(crate) fn add_modules(&self, archive: &mut Archive) -> Result<(), Failure> {
        let place = Path::new("/usr/lib/modules").join(&self.release);
        let dependencies = read(&self.modules.join("modules.dep"))?;
        for module in closure(&dependencies) {
            archive.file(&place.join(module), self.modules.join(module));
        }
        // Whatever modprobe looks up: names, aliases, what is built in.
        for index in entries(&self.modules)? {
            let name = index.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("modules.") {
                archive.file(&place.join(name), index);
            }
        }
        Ok(())
    }
}

/// Wanted modules and what they need, from the text of `modules.dep`: `module: needed needed ...`.
fn closure(dependencies: &str) -> BTreeSet<&str> {
    let needs: BTreeMap<&str, Vec<&str>> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needed)| (module, needed.split_whitespace().collect()))
        .collect();
    let wanted = |module: &&&str| MODULES.iter().any(|begin| module.starts_with(begin));
    let mut queue: Vec<&str> = needs.keys().filter(wanted).copied().collect();
    let mut chosen = BTreeSet::new();
    while let Some(module) = queue.pop() {
        if chosen.insert(module) {
            queue.extend(needs.get(module).into_iter().flatten());
        }
    }
    chosen
}

/// Fetches the package and unpacks it; the machine's own kernel stays what it is.
fn download(directory: &Path) -> Result<(), Failure> {
    let package = match newest() {
        Some(package) => package,
        None => {
            run(Command::new("apt-get").args(["update", "--quiet"]))?;
            match newest() {
                Some(package) => package,
                None => return broken(format!("apt knows no {PACKAGE}: the guest needs Debian's kernel")),
            }
        }
    };
    println!("setup: downloading {package} into {} (once; not installed)", directory.display());
    let partial = directory.with_extension("partial");
    // Of a run that was interrupted.
    let _ = fs::remove_dir_all(&partial);
    let tree = partial.join("tree");
    setup::create(&tree)?;
    run(Command::new("apt-get").args(["download", "--quiet", &package]).current_dir(&partial))?;
    let deb = one(&partial, |name| name.ends_with(".deb"))?;
    run(Command::new("dpkg-deb").arg("--extract").arg(&deb).arg(&tree))?;
    let kernel = Kernel::in_directory(&tree)?;
    let depmod = setup::find_program("depmod").unwrap_or_else(|| PathBuf::from("depmod"));
    run(Command::new(depmod).arg("-b").arg(&tree).arg(&kernel.release))?;
    if let Err(error) = fs::rename(&tree, directory) {
        return broken(format!("{}: {error}", directory.display()));
    }
    // Only the package is left in it.
    let _ = fs::remove_dir_all(&partial);
    Ok(())
}

/// The package with the kernel itself, where apt knows it.
fn newest() -> Option<String> {
    let depends = output(Command::new("apt-cache").args(["depends", PACKAGE])).unwrap_or_default();
    let mut packages = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    packages.find(|package| package.starts_with("linux-image-")).map(str::to_owned)
}

/// The one file in a directory whose name is so.
fn one(directory: &Path, is_it: impl Fn(&str) -> bool) -> Result<PathBuf, Failure> {
    let named = |path: &PathBuf| is_it(&path.file_name().unwrap_or_default().to_string_lossy());
    let mut found = entries(directory)?;
    found.retain(named);
    match found.pop() {
        Some(path) if found.is_empty() => Ok(path),
        _ => broken(format!("{}: not exactly one such file", directory.display())),
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    match fs::read_dir(directory) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) => broken(format!("{}: {error}", directory.display())),
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => broken(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::closure;

    #[test]
    fn a_wanted_module_brings_what_it_needs() {
        let dependencies = "kernel/net/netfilter/ipvs/ip_vs.ko: kernel/lib/libcrc32c.ko\n\
                            kernel/lib/libcrc32c.ko: kernel/crypto/crc32c.ko\n\
                            kernel/crypto/crc32c.ko:\n\
                            kernel/sound/beep.ko: kernel/lib/libcrc32c.ko\n";
        let chosen: Vec<&str> = closure(dependencies).into_iter().collect();
        assert_eq!(
            chosen,
            ["kernel/crypto/crc32c.ko", "kernel/lib/libcrc32c.ko", "kernel/net/netfilter/ipvs/ip_vs.ko"]
        );
    }
}
