//! Which backend, and why.

use anyhow::{Context, bail};
use lockstep_backend_nftables::Nftables;
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

fn iptables(_flavour: IptablesFlavour) -> anyhow::Result<Chosen> {
    bail!("it is not built yet")
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

/// Removes what is ours: of one mode, or (auto) of each. One outcome per mode: the number of
/// objects that were removed.
pub fn remove(mode: Mode) -> Vec<(&'static str, anyhow::Result<usize>)> {
    let mut outcomes = Vec::new();
    if matches!(mode, Mode::Auto | Mode::Nftables) {
        outcomes.push(("nftables", remove_nftables()));
    }
    outcomes
}

fn remove_nftables() -> anyhow::Result<usize> {
    Ok(Nftables::open()?.cleanup()?)
}
