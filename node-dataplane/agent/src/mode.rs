//! Which backend, and why.

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use lockstep_backend_iptables::{Iptables, detect, probe};
use lockstep_backend_ipvs::{Draining, Goes, Ipvs, Options, Removed};
use lockstep_backend_nftables::Nftables;
use lockstep_kernel::exec::{Processes, Run};
use lockstep_kernel::nf_tables::{self, Batch, Kernel, Netfilter as _};
use lockstep_kernel::{Errno, netlink};
use lockstep_model::NodeContext;
use lockstep_view::backend::Description;
use lockstep_view::{Backend, ViewConfig};
use lockstep_xtables::{Choice, Flavour, Table, ToolError};

use crate::config::{Config, IptablesFlavour, Mode};

/// [`Description::mode`] of the backend to which the flags `--iptables-*` speak.
pub(crate) const IPTABLES: &str = "iptables";
/// [`Description::mode`] of IPVS.
pub(crate) const IPVS: &str = "ipvs";
/// The table of a kube-proxy in nftables mode, in each family.
const KUBE_PROXY_TABLE: &str = "kube-proxy";

/// A backend that has been tried on this kernel.
pub struct Chosen {
    /// The backend.
    pub backend: Box<dyn Backend + Send>,
    /// Where it writes.
    pub interface: Interface,
}

/// Where rules of ours may be, each with its own tool or socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// Our tables of nf_tables.
    Nftables,
    /// Chains of kube-proxy's names.
    Iptables(Flavour),
    /// IPVS, its sets and interface, and chains in one flavour of iptables.
    Ipvs(Flavour),
}

impl Interface {
    /// True for a chain that this mode writes, and so keeps when it removes another's.
    fn keeps(self, flavour: Flavour, table: Table, chain: &str) -> bool {
        match self {
            Interface::Nftables => false,
            Interface::Iptables(of) => of == flavour && lockstep_backend_iptables::is_chain(table, chain),
            Interface::Ipvs(of) => of == flavour && lockstep_backend_ipvs::is_written(table, chain),
        }
    }
}

/// What is removed by itself, each with its own tool or socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remains {
    /// Virtual servers, sets, the interface and their chains. Comes first: chains of it lead to
    /// chains that iptables mode has under the same name.
    Ipvs,
    /// Our tables of nf_tables.
    Nftables,
    /// Chains of kube-proxy's names.
    Iptables(Flavour),
    /// The tables of a kube-proxy in nftables mode. Only who takes over from it removes them.
    KubeProxy,
}

impl Remains {
    const ALL: [Remains; 5] = [
        Remains::Ipvs,
        Remains::Nftables,
        Remains::Iptables(Flavour::Legacy),
        Remains::Iptables(Flavour::Nft),
        Remains::KubeProxy,
    ];

    /// Removes it, but for chains of `chosen`. Returns the number of objects that are gone.
    fn remove(self, chosen: Option<Interface>, ipvs: &LeaveIpvs) -> anyhow::Result<usize> {
        let run: Arc<dyn Run> = Arc::new(Processes);
        let goes = |flavour, table, chain: &str| {
            let ours = lockstep_backend_iptables::is_chain(table, chain)
                || lockstep_backend_ipvs::is_chain(table, chain);
            ours && !chosen.is_some_and(|chosen| chosen.keeps(flavour, table, chain))
        };
        match self {
            Remains::Ipvs => ipvs.remove(&run, &goes),
            Remains::Nftables if kube_proxy_tables()?.is_none() => Ok(0),
            Remains::Nftables => Ok(Nftables::open()?.cleanup()?),
            Remains::KubeProxy => remove_kube_proxy(),
            Remains::Iptables(flavour) => {
                Ok(lockstep_xtables::remove(&run, flavour, &|table, chain| goes(flavour, table, chain))?)
            }
        }
    }
}

/// How IPVS mode is left.
#[derive(Debug, Clone)]
pub struct LeaveIpvs {
    /// Virtual servers in these ranges stay.
    pub exclude: Vec<IpNet>,
    /// How long connections may go on; `None` = they are cut.
    pub drain: Option<Duration>,
}

impl LeaveIpvs {
    fn remove(&self, run: &Arc<dyn Run>, goes: &Goes<'_>) -> anyhow::Result<usize> {
        let Removed { objects, draining } =
            lockstep_backend_ipvs::remove(run, &self.exclude, goes, self.drain)?;
        if let Some(draining) = draining {
            let virtual_servers = draining.left();
            tracing::info!(
                virtual_servers,
                "IPVS keeps its connections; new ones do not come to it any more"
            );
            let thread = std::thread::Builder::new().name("ipvs-drain".to_owned());
            thread.spawn(move || drain(draining)).context("thread that removes what is left of IPVS")?;
        }
        Ok(objects)
    }
}

/// Ends when nothing is left of IPVS, or with the process: the next one begins again.
fn drain(mut draining: Draining) {
    const EVERY: Duration = Duration::from_secs(1);
    let mut complained = false;
    loop {
        std::thread::sleep(EVERY);
        match draining.tend() {
            Ok(true) => {
                return tracing::info!("the last connection of IPVS has ended; nothing is left of it");
            }
            Ok(false) => complained = false,
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!("{:#}; tried again", anyhow::Error::new(error));
                }
            }
        }
    }
}

impl fmt::Display for Remains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remains::Ipvs => f.write_str("ipvs"),
            Remains::Nftables => f.write_str("nftables"),
            Remains::Iptables(flavour) => write!(f, "iptables {flavour}"),
            Remains::KubeProxy => f.write_str("kube-proxy's nftables"),
        }
    }
}

/// Picks the backend for a mode. Every candidate runs a real transaction in a scratch table;
/// the log says what was chosen and why.
pub fn choose(mode: Mode, flavour: IptablesFlavour, options: &Options) -> anyhow::Result<Chosen> {
    match mode {
        Mode::Nftables => {
            let chosen = nftables().context("nftables does not work on this node")?;
            tracing::info!(mode = "nftables", "asked for, and a real transaction works");
            Ok(chosen)
        }
        Mode::Auto => choose_auto(flavour),
        Mode::Iptables => match unless_locked(|| iptables(flavour)) {
            Ok(chosen) => {
                tracing::info!(
                    mode = "iptables",
                    version = chosen.backend.describe().version,
                    "asked for, and a real transaction works"
                );
                Ok(chosen)
            }
            Err(error) => {
                tracing::error!(
                    "iptables was asked for and does not work on this node: {error:#}; FALLING BACK TO NFTABLES"
                );
                nftables().context("nftables, instead of iptables, does not work on this node either")
            }
        },
        Mode::Ipvs => {
            let chosen = unless_locked(|| ipvs(flavour, options));
            let chosen = chosen.context("IPVS does not work on this node")?;
            tracing::info!(
                mode = "ipvs",
                version = chosen.backend.describe().version,
                "asked for, and a virtual server can be made"
            );
            Ok(chosen)
        }
    }
}

fn choose_auto(flavour: IptablesFlavour) -> anyhow::Result<Chosen> {
    let error = match nftables() {
        Ok(chosen) => {
            tracing::info!(mode = "nftables", "chosen: a real transaction works, and it is the fastest");
            return Ok(chosen);
        }
        Err(error) => error,
    };
    let chosen = unless_locked(|| iptables(flavour))
        .with_context(|| format!("no mode works on this node: nftables: {error:#}; iptables"))?;
    let version = chosen.backend.describe().version;
    tracing::warn!(mode = "iptables", version, "chosen, because nftables does not work: {error:#}");
    Ok(chosen)
}

/// Tries again where another program holds the lock of iptables: that says nothing about what works.
/// Each try waits for the lock by itself.
fn unless_locked(choose: impl Fn() -> anyhow::Result<Chosen>) -> anyhow::Result<Chosen> {
    const TRIES: usize = 6;
    let is_locked = |error: &anyhow::Error| {
        let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<ToolError>());
        causes.any(|error| matches!(error, ToolError::Locked { .. }))
    };
    for _ in 1..TRIES {
        match choose() {
            Err(error) if is_locked(&error) => tracing::warn!("{error:#}; trying again"),
            other => return other,
        }
    }
    choose()
}

fn nftables() -> anyhow::Result<Chosen> {
    let mut backend = Nftables::open()?;
    backend.probe()?;
    Ok(Chosen { backend: Box::new(backend), interface: Interface::Nftables })
}

fn iptables(flavour: IptablesFlavour) -> anyhow::Result<Chosen> {
    let run: Arc<dyn Run> = Arc::new(Processes);
    let flavour = pick(&run, flavour)?;
    let backend = Iptables::open(run, flavour)?;
    Ok(Chosen { backend: Box::new(backend), interface: Interface::Iptables(flavour) })
}

fn ipvs(flavour: IptablesFlavour, options: &Options) -> anyhow::Result<Chosen> {
    let run: Arc<dyn Run> = Arc::new(Processes);
    let flavour = pick(&run, flavour)?;
    let backend = Ipvs::open(&run, flavour, options.clone())?;
    Ok(Chosen { backend: Box::new(backend), interface: Interface::Ipvs(flavour) })
}

/// A flavour in which a real transaction works.
fn pick(run: &Arc<dyn Run>, flavour: IptablesFlavour) -> anyhow::Result<Flavour> {
    let choice = match flavour {
        IptablesFlavour::Auto => detect(run)?,
        IptablesFlavour::Legacy => asked_for(run, Flavour::Legacy)?,
        IptablesFlavour::Nft => asked_for(run, Flavour::Nft)?,
    };
    tracing::info!(flavour = %choice.flavour, reason = choice.reason, "iptables works");
    Ok(choice.flavour)
}

fn asked_for(run: &Arc<dyn Run>, flavour: Flavour) -> anyhow::Result<Choice> {
    probe(run, flavour)?;
    Ok(Choice { flavour, reason: "asked for".to_owned() })
}

/// How the view decides for a backend, where the operator leaves it to the backend.
pub fn view_config(config: &Config, description: &Description) -> ViewConfig {
    let node_port_addresses = config.nodeport_addresses.as_ref().unwrap_or(&description.node_port_addresses);
    let mut decided = ViewConfig {
        families: description.families.clone(),
        detect_local: config.detect_local.clone(),
        node_port_addresses: node_port_addresses.clone(),
        localhost_node_ports: config.localhost_nodeports,
        masquerade_all: config.masquerade_all,
        one_pool: description.one_pool,
        binds_addresses: description.binds_addresses,
        masquerade_bit: config.masquerade_bit,
        ..ViewConfig::new(config.node_name.as_str())
    };
    if let Err(why) = &description.localhost_node_ports {
        let unknown = NodeContext::unknown(config.node_name.as_str());
        let plan = decided.node_plan(&unknown, &[Ipv4Addr::LOCALHOST.into()], &[]);
        // That another mode has none is no news: the flag is on unless it is turned off.
        if description.mode == IPTABLES && plan.localhost_node_ports {
            tracing::warn!(
                cause = why,
                "node ports do not answer at 127.0.0.1, everything else goes on; \
                 --iptables-localhost-nodeports=false says that they need not"
            );
        }
        decided.localhost_node_ports = false;
    }
    decided
}

/// Removes what is ours: of one mode, or (auto) of each. One outcome per kernel interface: the
/// number of objects that were removed. `exclude`: virtual servers in these ranges stay.
pub fn remove(mode: Mode, exclude: &[IpNet]) -> Vec<(Remains, anyhow::Result<usize>)> {
    let wanted = |remains| match mode {
        Mode::Auto => remains != Remains::KubeProxy,
        Mode::Nftables => remains == Remains::Nftables,
        Mode::Iptables => matches!(remains, Remains::Iptables(_)),
        Mode::Ipvs => remains == Remains::Ipvs,
    };
    let ipvs = LeaveIpvs { exclude: exclude.to_vec(), drain: None };
    let all = Remains::ALL.into_iter().filter(|remains| wanted(*remains));
    all.map(|remains| (remains, remains.remove(None, &ipvs))).collect()
}

/// Removes what is ours everywhere but where `chosen` writes, and what a kube-proxy left.
///
/// Rules that an earlier process left in another mode translate the same addresses at the same
/// hooks, by a state that nobody keeps up to date any more. So do those of a kube-proxy that went away
/// without `kube-proxy --cleanup`. In iptables and IPVS its chains are not told from ours; its tables of
/// nf_tables are, and go too. It removes other modes' rules at its own start in the same way.
pub fn remove_others(chosen: Interface, ipvs: &LeaveIpvs) -> Vec<(Remains, anyhow::Result<usize>)> {
    let wanted = |remains| match chosen {
        Interface::Nftables => remains != Remains::Nftables,
        Interface::Iptables(flavour) => remains != Remains::Iptables(flavour),
        Interface::Ipvs(_) => remains != Remains::Ipvs,
    };
    let all = Remains::ALL.into_iter().filter(|remains| wanted(*remains));
    all.map(|remains| (remains, remains.remove(Some(chosen), ipvs))).collect()
}

/// Removes what a kube-proxy in nftables mode left.
fn remove_kube_proxy() -> anyhow::Result<usize> {
    let families = kube_proxy_tables()?.unwrap_or_default();
    if families.is_empty() {
        return Ok(0);
    }
    let mut batch = Batch::new();
    for family in &families {
        batch.delete_table(*family, KUBE_PROXY_TABLE);
    }
    Kernel::open()?.commit(batch.finish())?;
    tracing::warn!(
        "there were tables of a kube-proxy in nftables mode, which are gone now; if it still runs it makes them again, \
         and they translate the same addresses: end it"
    );
    Ok(families.len())
}

/// The families in which there is a table of a kube-proxy; `None` = this kernel has no nf_tables.
fn kube_proxy_tables() -> Result<Option<Vec<nf_tables::Family>>, netlink::Error> {
    let look = || -> Result<_, netlink::Error> {
        let mut kernel = Kernel::open()?;
        let mut found = Vec::new();
        for family in [nf_tables::Family::Ipv4, nf_tables::Family::Ipv6] {
            if nf_tables::table_exists(&mut kernel, family, KUBE_PROXY_TABLE)? {
                found.push(family);
            }
        }
        Ok(found)
    };
    match look() {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.errno().is_some_and(Errno::is_unsupported) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use lockstep_model::Family;
    use lockstep_view::NodePortAddresses;

    use super::*;
    use crate::config::Arguments;

    fn decided(mode: &'static str, able: Result<(), String>, flags: &[&str]) -> ViewConfig {
        let always =
            ["lockstep-node", "--node-name=a", "--state-dir=/x", "--control-plane=http://a:1", "--insecure"];
        let arguments = Arguments::try_parse_from([&always[..], flags].concat()).unwrap();
        let description = Description {
            mode,
            version: String::new(),
            families: Family::ALL.to_vec(),
            features: Vec::new(),
            node_port_addresses: NodePortAddresses::AllLocal,
            one_pool: false,
            binds_addresses: false,
            localhost_node_ports: able,
        };
        view_config(&arguments.run.check().unwrap(), &description)
    }

    #[test]
    fn a_lock_of_others_is_no_reason_to_take_another_mode() {
        let locked = || ToolError::Locked { program: "iptables".to_owned(), complaint: "held".to_owned() };
        let tries = std::cell::Cell::new(0);
        let choose = |until: usize, error: &dyn Fn() -> anyhow::Error| {
            tries.set(0);
            let outcome = unless_locked(|| {
                tries.set(tries.get() + 1);
                if tries.get() < until { Err(error()) } else { anyhow::bail!("something else") }
            });
            (outcome.err().unwrap().to_string(), tries.get())
        };
        let wrapped = || anyhow::Error::new(locked()).context("iptables");
        assert_eq!(choose(3, &wrapped), ("something else".to_owned(), 3));
        assert_eq!(choose(99, &wrapped), ("iptables".to_owned(), 6));
        assert_eq!(choose(99, &|| anyhow::anyhow!("refused")).1, 1);
    }

    #[test]
    fn node_ports_answer_at_localhost_where_operator_and_backend_want_it() {
        let cannot = || Err("read-only".to_owned());
        assert!(decided(IPTABLES, Ok(()), &[]).localhost_node_ports);
        assert!(!decided(IPTABLES, Ok(()), &["--iptables-localhost-nodeports=false"]).localhost_node_ports);
        assert!(!decided(IPTABLES, cannot(), &[]).localhost_node_ports);
        assert!(!decided("nftables", cannot(), &["--nodeport-addresses=0.0.0.0/0"]).localhost_node_ports);
    }
}
