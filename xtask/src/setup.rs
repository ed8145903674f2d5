//! What a bare machine lacks: found out first, said, then installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::process::{Failure, broken, cargo, root, run};
use crate::vm::Kernel;

/// Something the build, the product or the tests need from the system.
struct Need {
    /// How its presence is recognised.
    sign: Sign,
    /// The Debian package that brings it.
    package: &'static str,
    /// Who needs it.
    reason: &'static str,
}

enum Sign {
    Program(&'static str),
    File(&'static str),
}

const NEEDS: &[Need] = &[
    Need {
        sign: Sign::Program("cc"),
        package: "build-essential",
        reason: "linking, and the C parts of ring and zstd",
    },
    Need { sign: Sign::Program("pkg-config"), package: "pkg-config", reason: "finds libnftnl and libmnl" },
    Need {
        sign: Sign::File("/usr/include/libnftnl/common.h"),
        package: "libnftnl-dev",
        reason: "the nftables backend",
    },
    Need {
        sign: Sign::File("/usr/include/libmnl/libmnl.h"),
        package: "libmnl-dev",
        reason: "the nftables backend",
    },
    Need {
        sign: Sign::Program("iptables-legacy-restore"),
        package: "iptables",
        reason: "the iptables backend",
    },
    Need { sign: Sign::Program("iptables-nft-restore"), package: "iptables", reason: "the iptables backend" },
    Need { sign: Sign::Program("nft"), package: "nftables", reason: "tests and demo show rules with it" },
    Need { sign: Sign::Program("ip"), package: "iproute2", reason: "tests and demo make network namespaces" },
    Need {
        sign: Sign::Program("conntrack"),
        package: "conntrack",
        reason: "tests look at connection tracking",
    },
    Need { sign: Sign::Program("ipset"), package: "ipset", reason: "tests look at sets" },
    Need {
        sign: Sign::File("/etc/ssl/certs/ca-certificates.crt"),
        package: "ca-certificates",
        reason: "downloads",
    },
];

/// What `cargo xtask vm` needs beside.
const GUEST_NEEDS: &[Need] = &[
    Need {
        sign: Sign::Program("qemu-system-x86_64"),
        package: "qemu-system-x86",
        reason: "runs the guest kernel",
    },
    Need { sign: Sign::Program("busybox"), package: "busybox-static", reason: "small tools of the guest" },
    Need { sign: Sign::Program("modprobe"), package: "kmod", reason: "the guest loads modules" },
    Need { sign: Sign::Program("ipvsadm"), package: "ipvsadm", reason: "tests look at virtual servers" },
    Need { sign: Sign::Program("sysctl"), package: "procps", reason: "whoever looks around in the guest" },
    Need {
        sign: Sign::Program("nft"),
        package: "nftables",
        reason: "hooks that the guest has from the start",
    },
];

/// A real program that tests run against, pinned by `integration/peers/go.sum`.
struct Peer {
    name: &'static str,
    package: &'static str,
}

const PEERS: &[Peer] = &[
    Peer { name: "etcd", package: "go.etcd.io/etcd/server/v3" },
    Peer { name: "kube-apiserver", package: "k8s.io/kubernetes/cmd/kube-apiserver" },
    Peer { name: "kube-proxy", package: "k8s.io/kubernetes/cmd/kube-proxy" },
    Peer { name: "grpcurl", package: "github.com/fullstorydev/grpcurl/cmd/grpcurl" },
];

/// Names of all peers.
pub(crate) const ALL_PEERS: [&str; 4] = ["etcd", "kube-apiserver", "kube-proxy", "grpcurl"];

const CARGO_DENY: &str = "0.20.2";

/// Everything that all tests need. Returns the directory of the peers.
pub(crate) fn everything() -> Result<PathBuf, Failure> {
    packages()?;
    components()?;
    cargo_deny()?;
    guest_packages()?;
    Kernel::get()?;
    let directory = peers(&ALL_PEERS)?;
    println!("setup: everything is here");
    Ok(directory)
}

/// System packages.
pub(crate) fn packages() -> Result<(), Failure> {
    install(NEEDS)
}

/// System packages for guests.
pub(crate) fn guest_packages() -> Result<(), Failure> {
    install(GUEST_NEEDS)
}

fn install(needs: &[Need]) -> Result<(), Failure> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut names: Vec<&str> = Vec::new();
    println!("setup: missing on this machine:");
    for need in missing {
        println!("  {:<16} {}", need.package, need.reason);
        if !names.contains(&need.package) {
            names.push(need.package);
        }
    }
    let install = format!("apt-get install --yes --no-install-recommends {}", names.join(" "));
    if find_program("apt-get").is_none() {
        return broken(format!("no apt-get here; install by other means: {}", names.join(" ")));
    }
    if !is_root() {
        return broken(format!("installing needs root; run as root: apt-get update && {install}"));
    }
    println!("setup: installing with: {install}");
    run(Command::new("apt-get").args(["update", "--quiet"]))?;
    run(Command::new("apt-get")
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(&names)
        .env("DEBIAN_FRONTEND", "noninteractive"))?;
    let still: Vec<&str> = needs.iter().filter(|need| !need.is_met()).map(|need| need.package).collect();
    if still.is_empty() { Ok(()) } else { broken(format!("installed, but not found: {}", still.join(" "))) }
}

/// rustfmt and clippy, which a minimal Rust lacks.
pub(crate) fn components() -> Result<(), Failure> {
    for (component, subcommand) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        let present = cargo()
            .args([subcommand, "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !present {
            println!("setup: adding {component} with rustup");
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// Builds those of the named peers that are not in the cache. Returns their directory.
pub(crate) fn peers(names: &[&str]) -> Result<PathBuf, Failure> {
    let source = root().join("integration/peers");
    let directory = cache()?.join("peers").join(pin_of(&source)?);
    let missing: Vec<&Peer> = PEERS
        .iter()
        .filter(|peer| names.contains(&peer.name) && !directory.join(peer.name).exists())
        .collect();
    if missing.is_empty() {
        return Ok(directory);
    }
    if find_program("go").is_none() {
        return broken(
            "Go is not installed; the programs tests run against are built with it: https://go.dev/dl",
        );
    }
    println!("setup: building with Go, into {} (minutes, once):", directory.display());
    for peer in &missing {
        println!("  {:<16} {}", peer.name, peer.package);
    }
    create(&directory)?;
    for peer in missing {
        // Built beside and renamed, so that an interrupted build leaves no half program.
        let partial = directory.join(format!("{}.partial", peer.name));
        run(Command::new("go")
            .args(["build", "-trimpath", "-o"])
            .arg(&partial)
            .arg(peer.package)
            .current_dir(&source)
            .env("GOFLAGS", "-mod=readonly"))?;
        if let Err(error) = fs::rename(&partial, directory.join(peer.name)) {
            return broken(format!("{}: {error}", partial.display()));
        }
    }
    Ok(directory)
}

/// cargo-deny in the cache. Returns the program.
pub(crate) fn cargo_deny() -> Result<PathBuf, Failure> {
    let tools = cache()?.join("tools").join(format!("cargo-deny-{CARGO_DENY}"));
    let program = tools.join("bin/cargo-deny");
    if program.exists() {
        return Ok(program);
    }
    println!("setup: building cargo-deny {CARGO_DENY} into {} (minutes, once)", tools.display());
    run(cargo()
        .args(["install", "--locked", "--quiet", "cargo-deny", "--version", CARGO_DENY, "--root"])
        .arg(&tools)
        .env("CARGO_TARGET_DIR", cache()?.join("tools/target")))?;
    // Half a gigabyte that nothing needs again; what stays if this fails does no harm.
    let _ = fs::remove_dir_all(cache()?.join("tools/target"));
    Ok(program)
}

/// `${XDG_CACHE_HOME:-~/.cache}/lockstep`.
pub(crate) fn cache() -> Result<PathBuf, Failure> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if Path::new(&cache).is_absolute() => PathBuf::from(cache),
        (_, Some(home)) => Path::new(&home).join(".cache"),
        _ => return broken("neither XDG_CACHE_HOME nor HOME is set: no place for built tools"),
    };
    Ok(base.join("lockstep"))
}

/// Names the exact sources of the peers: a hash over go.mod and go.sum.
fn pin_of(source: &Path) -> Result<String, Failure> {
    // FNV-1a: a cache key that stays the same across Rust releases, not a seal.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for name in ["go.mod", "go.sum"] {
        let path = source.join(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) => return broken(format!("{}: {error}", path.display())),
        };
        for byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(format!("{hash:016x}"))
}

/// A directory and those above it.
pub(crate) fn create(directory: &Path) -> Result<(), Failure> {
    match fs::create_dir_all(directory) {
        Ok(()) => Ok(()),
        Err(error) => broken(format!("{}: {error}", directory.display())),
    }
}

/// Where a program is, by PATH and the system directories that a user's PATH often lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.into_iter().map(|place| place.join(OsStr::new(name))).find(|file| file.is_file())
}

/// True where this process may change the system.
pub(crate) fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    // Uid: real, effective, saved, file system.
    status.lines().find_map(|line| line.strip_prefix("Uid:")).and_then(|ids| ids.split_whitespace().nth(1))
        == Some("0")
}

impl Need {
    fn is_met(&self) -> bool {
        match self.sign {
            Sign::Program(name) => find_program(name).is_some(),
            Sign::File(path) => Path::new(path).exists(),
        }
    }
}
