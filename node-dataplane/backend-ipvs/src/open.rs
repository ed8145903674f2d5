//! Opening the backend: what this kernel and its tools can do.

use std::net::IpAddr;
use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_kernel::ipset::{self, Declaration, Kind};
use lockstep_kernel::ipvs::{self, Key, Request, VirtualServer};
use lockstep_kernel::sysctl::{SysctlError, Tree};
use lockstep_kernel::{dummy, netlink};
use lockstep_model::{Family, Feature, Protocol};
use lockstep_xtables::{Flavour, Table, Tool, ToolError, Watch, abilities};

use crate::backend::{Ipvs, Touched};
use crate::chains::Chains;
use crate::drain::Drains;
use crate::fixed;
use crate::names::DEVICE;
use crate::options::{self, Options};
use crate::render::number;
use crate::tables::Tables;

/// Why IPVS mode does not work here.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The kernel has no IPVS.
    #[error("the kernel has no IPVS: is the module ip_vs there? `modprobe ip_vs` says")]
    NoIpvs(#[source] netlink::Error),
    /// The kernel has no sets.
    #[error("the kernel has no ipset: are the modules ip_set and ip_set_hash_ipport there?")]
    NoSets(#[source] netlink::Error),
    /// The kernel has no interface of type dummy.
    #[error("cannot make {DEVICE}: is the module dummy there?")]
    NoDevice(#[source] netlink::Error),
    /// The interface takes no address of the family.
    #[error("cannot bind an address to {DEVICE}: is net.ipv6.conf.{DEVICE}.disable_ipv6 0?")]
    NoAddress(#[source] netlink::Error),
    /// The scheduler is not there, or a virtual server cannot be made with it.
    #[error(
        "cannot make a virtual server with scheduler {scheduler}: is the module ip_vs_{scheduler} there?"
    )]
    NoScheduler {
        /// Its name.
        scheduler: String,
        /// What the kernel says.
        #[source]
        source: netlink::Error,
    },
    /// iptables does not work, or cannot match sets.
    #[error("iptables {flavour}")]
    Tool {
        /// Which.
        flavour: Flavour,
        /// What it says.
        #[source]
        source: ToolError,
    },
    /// A setting that IPVS mode needs cannot be written.
    #[error(transparent)]
    Setting(#[from] SysctlError),
    /// Timeouts cannot be written.
    #[error("set timeouts of IPVS")]
    Timeouts(#[source] netlink::Error),
}

/// An address that is nobody's (RFC 5737, RFC 3849), for what is made to see whether it can be.
const SCRATCH: [&str; 2] = ["198.51.100.0", "2001:db8::"];
const SCRATCH_PORT: u16 = 20_000;
const SCRATCH_SET: &str = "KUBE-LOCKSTEP-PROBE";

impl Ipvs {
    /// Opens IPVS mode with the chains in one flavour of iptables. Writes nothing that stays but
    /// sysctls and timeouts. A family in which it does not work is left out, and that is logged;
    /// without IPv4 it fails.
    pub fn open(run: &Arc<dyn Run>, flavour: Flavour, options: Options) -> Result<Self, Unusable> {
        let servers = ipvs::Kernel::open().map_err(Unusable::NoIpvs)?;
        let sets = ipset::Kernel::open().map_err(Unusable::NoSets)?;
        let device = dummy::Kernel::open(DEVICE).map_err(Unusable::NoDevice)?;
        let release = release(&lockstep_kernel::release());
        options::set(&Tree::kernel(), release, options.strict_arp)?;
        let (servers, sets, device) = (Box::new(servers), Box::new(sets), Box::new(device));
        let tables = Tables::new(servers, sets, device, Drains::new(options.drain));
        Self::open_on(tables, run, flavour, options)
    }

    pub(crate) fn open_on(
        mut tables: Tables,
        run: &Arc<dyn Run>,
        flavour: Flavour,
        options: Options,
    ) -> Result<Self, Unusable> {
        let timeouts = options.timeouts;
        if timeouts.tcp > 0 || timeouts.tcp_fin > 0 || timeouts.udp > 0 {
            tables.servers.set_timeouts(timeouts).map_err(Unusable::Timeouts)?;
        }
        let (mut chains, mut sctp) = (Vec::new(), true);
        for family in Family::ALL {
            match try_out(&mut tables, run, flavour, family, &options.scheduler) {
                Ok((one, has_sctp)) => {
                    chains.push(one);
                    sctp &= has_sctp;
                }
                // A lock that is held says nothing about what works.
                Err(error @ Unusable::Tool { source: ToolError::Locked { .. }, .. }) => return Err(error),
                Err(error) if family == Family::V4 => return Err(error),
                Err(error) => {
                    let error = crate::backend::error_text(&error);
                    tracing::warn!(error, "IPv4 only: IPVS mode does not work in IPv6");
                }
            }
        }
        let mut features = vec![Feature::SessionAffinity, Feature::LbProxyMode, Feature::SourceRanges];
        if sctp {
            features.insert(0, Feature::Sctp);
        }
        let watch = Watch::new(flavour, &Table::ALL, concerns);
        let version = format!("{}, chains in iptables {flavour}", options.scheduler);
        Ok(Self {
            options,
            tables,
            chains,
            watch,
            features,
            version,
            terms: None,
            in_force: rustc_hash::FxHashMap::default(),
            left_out: std::collections::BTreeMap::new(),
            owners: rustc_hash::FxHashMap::default(),
            touched: Some(Touched::default()),
            walk: crate::read_back::Walk::default(),
            own: None,
            news: false,
            turn: crate::backend::Turn::default(),
        })
    }
}

fn concerns(table: Table, chain: &str) -> bool {
    const HOOKED: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    fixed::is_ours(table, chain) || HOOKED.contains(&chain)
}

/// Makes and takes away what one family needs. Returns its chains, and whether it has SCTP.
fn try_out(
    tables: &mut Tables,
    run: &Arc<dyn Run>,
    flavour: Flavour,
    family: Family,
    scheduler: &Arc<str>,
) -> Result<(Chains, bool), Unusable> {
    try_device(tables, family)?;
    let no_scheduler = |source| Unusable::NoScheduler { scheduler: scheduler.to_string(), source };
    try_server(tables, family, scheduler, Protocol::Tcp).map_err(no_scheduler)?;
    let sctp = try_server(tables, family, scheduler, Protocol::Sctp).is_ok();
    let v6 = family == Family::V6;
    let declaration =
        Declaration { name: SCRATCH_SET.to_owned(), kind: Kind::HashIpPortNet, v6, max_elements: 16 };
    // One of a process that was killed here.
    tables.sets.destroy(SCRATCH_SET).map_err(Unusable::NoSets)?;
    tables.sets.create(&declaration).map_err(Unusable::NoSets)?;
    let needs = [
        (Table::Filter, format!("-m set --match-set {SCRATCH_SET} dst,dst,src -j RETURN")),
        (Table::Mangle, "-j DROP".to_owned()),
    ];
    let tool = Tool::new(Arc::clone(run), flavour, family);
    let able = abilities(&tool, &needs);
    tables.sets.destroy(SCRATCH_SET).map_err(Unusable::NoSets)?;
    let able = able.map_err(|source| Unusable::Tool { flavour, source })?;
    Ok((Chains::new(tool, able.random_fully), sctp))
}

/// Binds an address and takes it away again.
fn try_device(tables: &mut Tables, family: Family) -> Result<(), Unusable> {
    let made = tables.device.ensure().map_err(Unusable::NoDevice)?;
    let refused = match scratch(family) {
        Some(ip) => tables.device.change(&[ip], &[ip]).map_err(Unusable::NoAddress)?.pop(),
        None => None,
    };
    if made {
        tables.device.remove().map_err(Unusable::NoDevice)?;
    }
    match refused {
        None => Ok(()),
        Some((ip, errno)) => {
            let request = format!("bind {ip}");
            Err(Unusable::NoAddress(netlink::Error::Refused { request, message: None, errno }))
        }
    }
}

fn scratch(family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => SCRATCH[0].parse().ok(),
        Family::V6 => SCRATCH[1].parse().ok(),
    }
}

fn try_server(
    tables: &mut Tables,
    family: Family,
    scheduler: &Arc<str>,
    protocol: Protocol,
) -> Result<(), netlink::Error> {
    let netmask = match family {
        Family::V4 => u32::MAX,
        Family::V6 => 128,
    };
    let Some(address) = scratch(family) else { return Ok(()) };
    let key = Key { protocol: number(protocol), address, port: SCRATCH_PORT };
    let server = VirtualServer { key, scheduler: Arc::clone(scheduler), flags: 0, timeout: 0, netmask };
    let requests = [Request::Add(server), Request::Remove(key)];
    match tables.servers.commit(&requests)?.first() {
        Some(refused) if refused.index == 0 => Err(netlink::Error::Refused {
            request: crate::change::describe(&requests[0]),
            message: None,
            errno: refused.errno,
        }),
        _ => Ok(()),
    }
}

/// `6.1.0-56-cloud-amd64` -> (6, 1).
fn release(text: &str) -> (u32, u32) {
    let mut numbers = text.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::release;

    #[test]
    fn reads_the_version_of_the_kernel() {
        assert_eq!(release("6.1.0-56-cloud-amd64"), (6, 1));
        assert_eq!(release("5.10.0"), (5, 10));
        assert_eq!(release("?"), (0, 0));
    }
}
