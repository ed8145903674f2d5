//! The real kube-proxy in a lab, as what Lockstep is compared with.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use crate::apiserver::peer;
use crate::lab::{Family, Lab, POD_CIDRS, Place};
use crate::product::{Mode, Process};

/// Shortest time between two programmings of [`start_prompt`]. 0 would be taken for unset.
pub const PROMPT: &str = "20ms";

/// Starts kube-proxy on a node, so that it programs a change at once: by itself it waits for up
/// to a second, to take in more. Which that is, only a file of settings can say.
pub fn start_prompt(lab: &Lab, node: u8, mode: Mode, kubeconfig: &Path) -> Result<Process> {
    let place = Place::Node(node);
    let name = format!("kube-proxy-{}-{place}", mode.name());
    let settings = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": proxy_mode(mode),
        "hostnameOverride": place.to_string(),
        "clusterCIDR": POD_CIDRS,
        "clientConnection": {"kubeconfig": kubeconfig},
        "iptables": {"minSyncPeriod": PROMPT, "syncPeriod": "30s"},
        "nftables": {"minSyncPeriod": PROMPT, "syncPeriod": "30s"},
        "ipvs": {"minSyncPeriod": PROMPT, "syncPeriod": "30s"},
        "conntrack": {"maxPerCore": 0, "min": 0},
    });
    let path = lab.directory().join(format!("{name}.json"));
    std::fs::write(&path, settings.to_string())?;
    let mut command = lab.command(place, peer("kube-proxy")?);
    command.arg("--config").arg(path);
    spawn(lab, &name, mode, command)
}

/// Starts kube-proxy on a node, with kubeadm's settings.
pub fn start(lab: &Lab, node: u8, mode: Mode, kubeconfig: &Path) -> Result<Process> {
    let place = Place::Node(node);
    let name = format!("kube-proxy-{}-{place}", mode.name());
    let mut command = lab.command(place, peer("kube-proxy")?);
    command.args(["--hostname-override", &place.to_string(), "--proxy-mode", proxy_mode(mode)]);
    command.arg("--kubeconfig").arg(kubeconfig);
    command.args(["--cluster-cidr", POD_CIDRS]);
    // The limit is one of the whole machine, which is not the lab's to change.
    command.args(["--conntrack-max-per-core", "0", "--conntrack-min", "0"]);
    spawn(lab, &name, mode, command)
}

/// kube-proxy knows no flavours of iptables.
fn proxy_mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Nftables => "nftables",
        Mode::IptablesLegacy | Mode::IptablesNft => "iptables",
        Mode::Ipvs => "ipvs",
    }
}

fn spawn(lab: &Lab, name: &str, mode: Mode, mut command: Command) -> Result<Process> {
    let flavour = match mode {
        Mode::Nftables => None,
        Mode::IptablesLegacy | Mode::Ipvs => Some("legacy"),
        Mode::IptablesNft => Some("nft"),
    };
    if let Some(flavour) = flavour {
        command.env("PATH", programs_of(lab, flavour, mode)?);
    }
    Process::spawn(lab, name, command)
}

/// The families that kube-proxy programs. In IPVS mode it starts hundreds of programs for every change, as
/// many again for IPv6, and does nothing about the first change before it is done with the last: where each
/// takes as long as in the guest, one family is enough.
pub fn families(mode: Mode) -> &'static [Family] {
    if mode == Mode::Ipvs { &[Family::V4] } else { &[Family::V4, Family::V6] }
}

/// A PATH on which `iptables` and its kin are those of one flavour: kube-proxy takes whichever
/// it finds by that name, and leaves a family alone whose programs it does not find.
fn programs_of(lab: &Lab, flavour: &str, mode: Mode) -> Result<std::ffi::OsString> {
    let directory = lab.directory().join(format!("iptables-{flavour}"));
    let mut path = vec![directory.clone()];
    let others: &[&str] = if mode == Mode::Ipvs {
        &["ip", "ipset", "modprobe"]
    } else {
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        &[]
    };
    if !directory.exists() {
        std::fs::create_dir(&directory)?;
        for family in families(mode) {
            let family = if *family == Family::V4 { "iptables" } else { "ip6tables" };
            for verb in ["", "-save", "-restore"] {
                let real = format!("/usr/sbin/{family}-{flavour}{verb}");
                symlink(real, directory.join(format!("{family}{verb}")))?;
            }
        }
        for name in others {
            symlink(format!("/sbin/{name}"), directory.join(name))?;
        }
    }
    Ok(std::env::join_paths(path)?)
}
