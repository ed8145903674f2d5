//! Which backend, and why.

use std::sync::Arc;

use anyhow::{Context, bail};
use lockstep_backend_iptables::{Choice, Flavour, Iptables, detect, probe};
use lockstep_backend_nftables::Nftables;
use lockstep_kernel::exec::{Processes, Run};
use lockstep_view::backend::Description;
use lockstep_view::{Backend, NodePortAddresses, ViewConfig};

use crate::config::{Config, IptablesFlavour, Mode};

/// A backend that has been tried on this kernel.
pub type Chosen = Box<dyn Backend + Send>;

/// Picks the backend for a mode. Every candidate runs a real transaction in a scratch table;
/// the log says what was chosen and why.
pub fn choose(mode: Mode, flavour: IptablesFlavour) -> anyhow::Result<Chosen> {
    match mode {
        Mode::Nftables => {
            let backend = nftables().context("nftables does not work on this node")?;
            tracing::info!(mode = "nftables", "asked for, and a real transaction works");
            Ok(backend)
        }
        Mode::Auto => choose_auto(flavour),
        Mode::Iptables => match iptables(flavour) {
            Ok(backend) => {
                tracing::info!(
                    mode = "iptables",
                    version = backend.describe().version,
                    "asked for, and a real transaction works"
                );
                Ok(backend)
            }
            Err(error) => {
                tracing::error!(
                    "iptables was asked for and does not work on this node: {error:#}; FALLING BACK TO NFTABLES"
                );
                nftables().context("nftables, instead of iptables, does not work on this node either")
            }
        },
        Mode::Ipvs => bail!("ipvs is not built yet"),
    }
}

fn choose_auto(flavour: IptablesFlavour) -> anyhow::Result<Chosen> {
    let error = match nftables() {
        Ok(backend) => {
            tracing::info!(mode = "nftables", "chosen: a real transaction works, and it is the fastest");
            return Ok(backend);
        }
        Err(error) => error,
    };
    let backend = iptables(flavour)
        .with_context(|| format!("no mode works on this node: nftables: {error:#}; iptables"))?;
    let version = backend.describe().version;
    tracing::warn!(mode = "iptables", version, "chosen, because nftables does not work: {error:#}");
    Ok(backend)
}

fn nftables() -> anyhow::Result<Chosen> {
    let mut backend = Nftables::open()?;
    backend.probe()?;
    Ok(Box::new(backend))
}

fn iptables(flavour: IptablesFlavour) -> anyhow::Result<Chosen> {
    let run: Arc<dyn Run> = Arc::new(Processes);
    let choice = match flavour {
        IptablesFlavour::Auto => detect(&run)?,
        IptablesFlavour::Legacy => asked_for(&run, Flavour::Legacy)?,
        IptablesFlavour::Nft => asked_for(&run, Flavour::Nft)?,
    };
    let backend = Iptables::open(run, choice.flavour)?;
    tracing::info!(flavour = %choice.flavour, reason = choice.reason, "iptables works");
    Ok(Box::new(backend))
}

fn asked_for(run: &Arc<dyn Run>, flavour: Flavour) -> anyhow::Result<Choice> {
    probe(run, flavour)?;
    Ok(Choice { flavour, reason: "asked for".to_owned() })
}

/// How the view decides for a backend: node ports answer where kube-proxy's answer in that mode.
pub fn view_config(config: &Config, description: &Description) -> ViewConfig {
    ViewConfig {
        families: description.families.clone(),
        cluster_cidrs: config.cluster_cidrs.clone(),
        node_port_addresses: match description.mode {
            "iptables" => NodePortAddresses::AllLocal,
            _ => NodePortAddresses::Primary,
        },
        ..ViewConfig::new(config.node_name.as_str())
    }
}

/// Removes what is ours: of one mode, or (auto) of each. One outcome per kernel interface: the
/// number of objects that were removed.
pub fn remove(mode: Mode) -> Vec<(&'static str, anyhow::Result<usize>)> {
    let mut outcomes = Vec::new();
    if matches!(mode, Mode::Auto | Mode::Nftables) {
        outcomes.push(("nftables", remove_nftables()));
    }
    if matches!(mode, Mode::Auto | Mode::Iptables) {
        outcomes.push(("iptables legacy", remove_iptables(Flavour::Legacy)));
        outcomes.push(("iptables nft", remove_iptables(Flavour::Nft)));
    }
    outcomes
}

fn remove_nftables() -> anyhow::Result<usize> {
    Ok(Nftables::open()?.cleanup()?)
}

fn remove_iptables(flavour: Flavour) -> anyhow::Result<usize> {
    match Iptables::open(Arc::new(Processes), flavour) {
        Ok(mut backend) => Ok(backend.cleanup()?),
        Err(error) => {
            // Where its tools do not work, this agent has never written with them.
            tracing::info!(%flavour, %error, "this iptables cannot be used here");
            Ok(0)
        }
    }
}
