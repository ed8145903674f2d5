//! The real kube-proxy in a lab, as what Lockstep is compared with.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use crate::apiserver::peer;
use crate::lab::{Lab, POD_CIDRS, Place};
use crate::product::{Mode, Process};

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

impl From<Mode> for ProxyMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Nftables => ProxyMode::Nftables,
            Mode::IptablesLegacy => ProxyMode::IptablesLegacy,
            Mode::IptablesNft => ProxyMode::IptablesNft,
        }
    }
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

/// Shortest time between two programmings. 0 would be taken for unset.
const PROMPT: &str = "20ms";

/// Starts kube-proxy on a node, so that it programs a change at once: by itself it waits for up
/// to a second, to take in more. Which that is, only a file of settings can say.
pub fn start_prompt(lab: &Lab, node: u8, mode: Mode, kubeconfig: &Path) -> Result<Process> {
    let place = Place::Node(node);
    let mode = ProxyMode::from(mode);
    let name = format!("{}-{place}", mode.name());
    let settings = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode.flag(),
        "hostnameOverride": place.to_string(),
        "clusterCIDR": POD_CIDRS,
        "clientConnection": {"kubeconfig": kubeconfig},
        "iptables": {"minSyncPeriod": PROMPT, "syncPeriod": "30s"},
        "nftables": {"minSyncPeriod": PROMPT, "syncPeriod": "30s"},
        "conntrack": {"maxPerCore": 0, "min": 0},
    });
    let path = lab.directory().join(format!("{name}.json"));
    std::fs::write(&path, settings.to_string())?;
    let mut command = lab.command(place, peer("kube-proxy")?);
    command.arg("--config").arg(path);
    spawn(lab, &name, mode, command)
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
    spawn(lab, &name, mode, command)
}

fn spawn(lab: &Lab, name: &str, mode: ProxyMode, mut command: Command) -> Result<Process> {
    if let Some(flavour) = mode.flavour() {
        command.env("PATH", programs_of(lab, flavour)?);
    }
    Process::spawn(lab, name, command)
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
