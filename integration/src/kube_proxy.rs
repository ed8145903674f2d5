//! The real kube-proxy in a lab, as what Lockstep is compared with.

use std::path::Path;

use anyhow::Result;

use crate::apiserver::peer;
use crate::lab::{Lab, POD_CIDRS, Place};
use crate::product::Process;

/// How kube-proxy programs its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProxyMode {
    /// `--proxy-mode nftables`.
    Nftables,
    /// `--proxy-mode iptables`, with iptables-legacy.
    IptablesLegacy,
    /// `--proxy-mode iptables`, with iptables-nft.
    IptablesNft,
}

impl ProxyMode {
    /// All of them.
    pub const ALL: [ProxyMode; 3] = [ProxyMode::Nftables, ProxyMode::IptablesLegacy, ProxyMode::IptablesNft];

    /// For people and test names.
    pub fn name(self) -> &'static str {
        match self {
            ProxyMode::Nftables => "kube-proxy-nftables",
            ProxyMode::IptablesLegacy => "kube-proxy-iptables-legacy",
            ProxyMode::IptablesNft => "kube-proxy-iptables-nft",
        }
    }

    fn flag(self) -> &'static str {
        match self {
            ProxyMode::Nftables => "nftables",
            ProxyMode::IptablesLegacy | ProxyMode::IptablesNft => "iptables",
        }
    }

    /// Suffix of the iptables programs of its flavour.
    fn flavour(self) -> Option<&'static str> {
        match self {
            ProxyMode::Nftables => None,
            ProxyMode::IptablesLegacy => Some("legacy"),
            ProxyMode::IptablesNft => Some("nft"),
        }
    }
}

/// Starts kube-proxy on a node. `flags` come after, and so before, those that every run has.
pub fn start(lab: &Lab, node: u8, mode: ProxyMode, kubeconfig: &Path, flags: &[&str]) -> Result<Process> {
    let place = Place::Node(node);
    let name = format!("{}-{place}", mode.name());
    let mut command = lab.command(place, peer("kube-proxy")?);
    command.args(["--hostname-override", &place.to_string(), "--proxy-mode", mode.flag()]);
    command.arg("--kubeconfig").arg(kubeconfig);
    command.args(["--cluster-cidr", POD_CIDRS]);
    // The limit is one of the whole machine, which is not the lab's to change.
    command.args(["--conntrack-max-per-core", "0", "--conntrack-min", "0"]);
    command.args(flags);
    if let Some(flavour) = mode.flavour() {
        command.env("PATH", programs_of(lab, flavour)?);
    }
    Process::spawn(lab, &name, command)
}

/// A PATH on which `iptables` and its kin are those of one flavour: kube-proxy takes whichever
/// it finds by that name.
fn programs_of(lab: &Lab, flavour: &str) -> Result<std::ffi::OsString> {
    let directory = lab.directory().join(format!("iptables-{flavour}"));
    if !directory.exists() {
        std::fs::create_dir(&directory)?;
        for family in ["iptables", "ip6tables"] {
            for verb in ["", "-save", "-restore"] {
                let real = format!("/usr/sbin/{family}-{flavour}{verb}");
                std::os::unix::fs::symlink(real, directory.join(format!("{family}{verb}")))?;
            }
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(directory).chain(std::env::split_paths(&path));
    Ok(std::env::join_paths(all)?)
}
