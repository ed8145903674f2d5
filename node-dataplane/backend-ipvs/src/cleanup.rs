//! Removing what is ours, and nothing else: at once, or as connections end.
//!
//! A node that goes to another mode has that mode's rules in force when this begins. They translate new
//! connections before IPVS sees them. What IPVS already has goes on, so its virtual servers and their
//! addresses stay until it has ended, and so does the one rule that keeps the node's own listeners
//! from answering at these addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use lockstep_kernel::dummy::{self, Device as _};
use lockstep_kernel::exec::Run;
use lockstep_kernel::ipset::{self, Entry, Sets as _};
use lockstep_kernel::ipvs::{self, Key, Request};
use lockstep_kernel::{Errno, netlink};
use lockstep_model::Family;
use lockstep_xtables::{Flavour, Snapshot, Table, Tool, remove as remove_chains, remove_from};
use rustc_hash::FxHashSet;

use crate::backend::Fault;
use crate::chains::Chains;
use crate::drain::Drains;
use crate::fixed;
use crate::names::{self, DEVICE, Set};
use crate::sync::Standing;
use crate::tables::{Tables, drains};

/// What is ours could not be removed, or not all of it.
#[derive(Debug, thiserror::Error)]
#[error("remove what IPVS mode left")]
pub struct NotRemoved(#[source] Box<dyn std::error::Error + Send + Sync>);

impl From<Fault> for NotRemoved {
    fn from(fault: Fault) -> Self {
        Self(Box::new(fault))
    }
}

/// Whether a chain goes.
pub type Goes<'a> = dyn Fn(Flavour, Table, &str) -> bool + 'a;

/// What was removed, and what is still there.
pub struct Removed {
    /// Objects that are gone.
    pub objects: usize,
    /// What stays for its connections.
    pub draining: Option<Draining>,
}

/// What stays of IPVS mode for connections that go on.
pub struct Draining {
    run: Arc<dyn Run>,
    tables: Tables,
    exclude: Vec<IpNet>,
    /// Each with when it has to go.
    keys: BTreeMap<Key, Instant>,
}

/// Removes what a process in IPVS mode left, a kube-proxy too: addresses and the interface, virtual
/// servers, chains, sets. Loads no module: what a kernel does not have it holds nothing in.
///
/// `exclude`: virtual servers in these ranges stay. `goes`: which chains go, in a flavour that has
/// chains of IPVS mode at all. `drain`: how long what has connections may stay; `None` = it does not.
pub fn remove(
    run: &Arc<dyn Run>,
    exclude: &[IpNet],
    goes: &Goes<'_>,
    drain: Option<Duration>,
) -> Result<Removed, NotRemoved> {
    remove_from_tables(open().map_err(Fault::from)?, run, exclude, goes, drain)
}

/// `tables`: `None` where there is nothing of ours in any.
pub(crate) fn remove_from_tables(
    mut tables: Option<Tables>,
    run: &Arc<dyn Run>,
    exclude: &[IpNet],
    goes: &Goes<'_>,
    drain: Option<Duration>,
) -> Result<Removed, NotRemoved> {
    let mut removed = Removed { objects: 0, draining: None };
    let mut busy = BTreeSet::new();
    if let Some(tables) = &mut tables {
        let standing = read(tables, exclude).map_err(Fault::from)?;
        if drain.is_some() {
            busy = busy_servers(tables, &standing).map_err(Fault::from)?;
            // Where the new mode has no rule for it, nothing new goes to an endpoint that nobody looks after.
            let quiet: Vec<Request> = busy.iter().flat_map(|key| standing.quiet(*key)).collect();
            tables.remove(&quiet).map_err(Fault::from)?;
        }
        removed.objects += remove_servers(tables, &standing, &busy).map_err(Fault::from)?;
    }
    for flavour in Flavour::ALL {
        removed.objects += remove_flavour(run, flavour, goes, !busy.is_empty())?;
    }
    let (Some(mut tables), limit) = (tables, drain.unwrap_or_default()) else { return Ok(removed) };
    if busy.is_empty() {
        removed.objects += remove_sets(&mut tables).map_err(Fault::from)?;
        return Ok(removed);
    }
    let end = Instant::now() + limit;
    let keys = busy.into_iter().map(|key| (key, end)).collect();
    removed.draining = Some(Draining { run: Arc::clone(run), tables, exclude: exclude.to_vec(), keys });
    Ok(removed)
}

impl Draining {
    /// Virtual servers that stay.
    pub fn left(&self) -> usize {
        self.keys.len()
    }

    /// Removes what has no connections any more, or has had its time. True where nothing is left.
    pub fn tend(&mut self) -> Result<bool, NotRemoved> {
        let now = Instant::now();
        let standing = read(&mut self.tables, &self.exclude).map_err(Fault::from)?;
        let busy = busy_servers(&mut self.tables, &standing).map_err(Fault::from)?;
        let before = self.keys.len();
        self.keys.retain(|key, end| busy.contains(key) && *end > now);
        if self.keys.len() == before {
            return Ok(false);
        }
        let stay = self.keys.keys().copied().collect();
        remove_servers(&mut self.tables, &standing, &stay).map_err(Fault::from)?;
        if !stay.is_empty() {
            return Ok(false);
        }
        let goes = |_, table, chain: &str| table == Table::Filter && chain == names::FILTER;
        for flavour in Flavour::ALL {
            remove_flavour(&self.run, flavour, &goes, false)?;
        }
        remove_sets(&mut self.tables).map_err(Fault::from)?;
        Ok(true)
    }
}

/// The same at once, by a backend that is open.
pub(crate) fn remove_all(tables: &mut Tables, chains: &[Chains], exclude: &[IpNet]) -> Result<usize, Fault> {
    let standing = read(tables, exclude)?;
    let mut objects = remove_servers(tables, &standing, &BTreeSet::new())?;
    for chains in chains {
        objects += remove_from(&chains.tool, &fixed::is_ours)?;
    }
    tables.drains.restart();
    tables.drains.restarted();
    Ok(objects + remove_sets(tables)?)
}

/// `None` where there is nothing of ours: no interface, and none of our sets.
fn open() -> Result<Option<Tables>, netlink::Error> {
    let mut device = dummy::Kernel::open(DEVICE)?;
    let mut sets = match ipset::Kernel::open() {
        Ok(sets) => sets,
        Err(error) if error.errno().is_some_and(Errno::is_unsupported) => return Ok(None),
        Err(error) => return Err(error),
    };
    let ours = |name: &str| Set::all().any(|set| set.name() == name);
    let has_sets = sets.headers()?.iter().any(|header| ours(&header.name));
    if !has_sets && device.addresses()?.is_none() {
        return Ok(None);
    }
    let servers = ipvs::Kernel::open()?;
    let drains = Drains::new(Duration::ZERO);
    Ok(Some(Tables::new(Box::new(servers), Box::new(sets), Box::new(device), drains)))
}

fn read(tables: &mut Tables, exclude: &[IpNet]) -> Result<Standing, netlink::Error> {
    let own = tables.device.others()?;
    let mut standing = Standing::read(tables, &Family::ALL, own)?;
    let bound = standing.addresses.clone();
    standing.read_servers(&mut *tables.servers, &bound, &FxHashSet::default(), exclude)?;
    Ok(standing)
}

fn busy_servers(tables: &mut Tables, standing: &Standing) -> Result<BTreeSet<Key>, netlink::Error> {
    let mut busy = BTreeSet::new();
    for key in standing.servers.keys().copied().filter(|key| drains(*key)) {
        if !tables.busy(key)?.is_empty() {
            busy.insert(key);
        }
    }
    Ok(busy)
}

/// Removes virtual servers but those that stay, with their addresses and what is in sets of them.
/// Addresses first: nobody is to reach the node's own listeners at one.
fn remove_servers(
    tables: &mut Tables,
    standing: &Standing,
    stay: &BTreeSet<Key>,
) -> Result<usize, netlink::Error> {
    let kept: Vec<_> = stay.iter().map(|key| standing.of_key(*key)).collect();
    let kept_addresses: BTreeSet<IpAddr> = kept.iter().flat_map(|kept| &kept.addresses).copied().collect();
    let kept_entries: BTreeSet<(Set, Entry)> = kept.iter().flat_map(|kept| &kept.entries).copied().collect();
    let mut objects = 0;
    let gone: Vec<IpAddr> = standing.addresses.difference(&kept_addresses).copied().collect();
    if stay.is_empty() {
        objects += usize::from(tables.device.remove()?);
    } else {
        tables.unbind(&gone)?;
    }
    let keys = standing.servers.keys().copied();
    let removals: Vec<Request> = keys.filter(|key| !stay.contains(key)).map(Request::Remove).collect();
    tables.remove(&removals)?;
    let mut surplus: BTreeMap<Set, Vec<Entry>> = BTreeMap::new();
    for (set, entry) in standing.entries.iter().filter(|held| !kept_entries.contains(held)) {
        surplus.entry(*set).or_default().push(*entry);
    }
    // Without anything that stays the sets go whole.
    if !stay.is_empty() {
        tables.withdraw(&surplus)?;
    }
    objects += gone.len() + removals.len();
    Ok(objects)
}

/// Removes chains in one flavour, where it has any of IPVS mode. `protected`: addresses stay, and
/// with them the rule for what the node itself listens at.
fn remove_flavour(
    run: &Arc<dyn Run>,
    flavour: Flavour,
    goes: &Goes<'_>,
    protected: bool,
) -> Result<usize, NotRemoved> {
    let mut found = false;
    for family in Family::ALL {
        let tool = Tool::new(Arc::clone(run), flavour, family);
        // A flavour that does not work has none.
        let Ok(saved) = tool.save() else { continue };
        if Snapshot::parse(&saved).body(Table::Filter, names::FILTER).is_none() {
            continue;
        }
        found = true;
        if protected {
            fixed::protection(family).ensure(&tool).map_err(Fault::from)?;
        }
    }
    if !found {
        return Ok(0);
    }
    let goes = |table, chain: &str| {
        let stays = protected && table == Table::Filter && chain == names::FILTER;
        !stays && goes(flavour, table, chain)
    };
    Ok(remove_chains(run, flavour, &goes).map_err(Fault::from)?)
}

fn remove_sets(tables: &mut Tables) -> Result<usize, netlink::Error> {
    let mut objects = 0;
    for set in Set::all() {
        objects += usize::from(tables.sets.destroy(set.name())?);
    }
    Ok(objects)
}
