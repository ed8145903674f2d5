//! The whole: what the kernel has against what it should have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use ipnet::IpNet;
use lockstep_kernel::ipset::{Entry, Kind};
use lockstep_kernel::ipvs::{Key, Request};
use lockstep_kernel::{Errno, netlink};
use lockstep_model::{Family, ServiceKey};
use lockstep_view::ForwardingPlan;
use lockstep_xtables::{Table, ToolError};
use rustc_hash::FxHashSet;

use crate::backend::{Fault, Ipvs, LeftOut, blame, not_bound};
use crate::chains::Chains;
use crate::change::{self, Found};
use crate::holdings::{Holdings, Moved};
use crate::names::{Purpose, Set};
use crate::render::{Rendered, Server};
use crate::tables::{Refusal, Tables};
use crate::terms::Terms;

/// What the kernel has that is ours.
#[derive(Default)]
pub(crate) struct Standing {
    pub(crate) servers: BTreeMap<Key, Found>,
    pub(crate) entries: FxHashSet<(Set, Entry)>,
    pub(crate) addresses: BTreeSet<IpAddr>,
    families: Vec<Family>,
    /// Of the node's other interfaces, sorted.
    own: Vec<IpAddr>,
}

impl Ipvs {
    /// Compares everything and writes the difference. Returns the objects written.
    pub(crate) fn compare(&mut self, plan: &ForwardingPlan) -> Result<usize, Fault> {
        (self.terms, self.touched) = (None, None);
        self.left_out.clear();
        self.in_force.clear();
        let ghosts = self.tables.drains.ghosts().map(|ghost| ghost.server.key);
        let known: FxHashSet<Key> = self.owners.keys().copied().chain(ghosts).collect();
        self.tables.holdings = Holdings::default();
        self.tables.drains.restart();
        let mut objects = usize::from(self.tables.device.ensure()?);
        let families = self.families();
        objects += self.tables.make_sets(families.iter().copied().flat_map(Set::of_family))?;
        let mut terms = self.terms_now(plan)?;
        let taken = plan.services.values().flat_map(|service| terms.takes(service)).collect();
        terms.taken = Arc::new(taken);
        let mut standing = Standing::read(&mut self.tables, &families, terms.own.clone())?;

        let mut wanted: Vec<(&ServiceKey, Rendered)> = Vec::with_capacity(plan.services.len());
        let mut unable = Vec::new();
        for (key, service) in &plan.services {
            match self.wanted(service, &terms) {
                Ok(new) => wanted.push((key, new)),
                Err(left) => unable.push((key, service, left)),
            }
        }
        wanted.sort_unstable_by_key(|(key, _)| *key);
        for (_, rendered) in &wanted {
            self.tables.holdings.take(rendered, &mut Moved::default());
        }
        let holdings = &self.tables.holdings;
        let bound = standing.addresses.iter().copied().chain(holdings.addresses()).collect();
        standing.read_servers(&mut *self.tables.servers, &bound, &known, &self.options.exclude)?;
        let mut kept: FxHashSet<Key> = FxHashSet::default();
        for (key, service, left) in unable {
            let stays = Rendered::new(service, &terms).unwrap_or_default();
            let previous_in_force = self.keep(&stays, &standing, &mut kept);
            self.leave_out(key, LeftOut { previous_in_force, ..left });
        }
        let lacking = self.tables.holdings.by_set();
        let lacking: BTreeMap<Set, Vec<Entry>> = lacking
            .into_iter()
            .map(|(set, mut entries)| {
                entries.retain(|entry| !standing.entries.contains(&(set, *entry)));
                (set, entries)
            })
            .filter(|(_, entries)| !entries.is_empty())
            .collect();
        self.tables.enter(&lacking)?;
        objects += lacking.values().map(Vec::len).sum::<usize>();
        // Before any address is bound: what they say is about addresses that are.
        objects += self.write_chains(&terms, &[Table::Filter, Table::Mangle])?;

        let (mut requests, mut owners, mut leaving) = (Vec::new(), Vec::new(), Vec::new());
        let mut removals = Vec::new();
        let mut claimed: FxHashSet<Key> = kept;
        for (at, (_, rendered)) in wanted.iter().enumerate() {
            for server in &rendered.servers {
                claimed.insert(server.server.key);
                let change = change::from_kernel(standing.servers.get(&server.server.key), Some(server));
                owners.extend(std::iter::repeat_n(at, change.first.len()));
                requests.extend(change.first);
                leaving.extend(change.leaving);
            }
        }
        for (key, found) in standing.servers.iter().filter(|(key, _)| !claimed.contains(*key)) {
            if terms.is_of_another_node(key.address) || standing.is_nowhere(key.address) {
                // Whoever has it is not kept from its packets for as long as connections go on here.
                removals.push(Request::Remove(*key));
            } else {
                leaving.extend(change::from_kernel(Some(found), None).leaving);
            }
        }
        let mut refusals = self.tables.commit(&requests)?;
        // The kernel's list may lack some while servers come and go anywhere on this host.
        let unlisted = refusals.extract_if(.., |refusal| is_there(&requests, refusal));
        let unlisted: Vec<(Key, usize)> = unlisted
            .filter_map(|refusal| Some((requests.get(refusal.index)?.key(), *owners.get(refusal.index)?)))
            .collect();
        for (key, owner) in unlisted {
            let found = Found::read(&mut *self.tables.servers, key)?;
            let wanted = wanted.get(owner).and_then(|(_, rendered)| rendered.server(key));
            let change = change::from_kernel(found.as_ref(), wanted);
            // What was added to it by the way is there twice in this, which is no fault.
            self.tables.commit(&change.first)?;
            requests.extend(change.first);
            leaving.extend(change.leaving);
            standing.servers.extend(found.map(|found| (key, found)));
        }
        refusals.retain(|refusal| {
            let key = requests.get(refusal.index).map(Request::key);
            refusal.errno != Errno::EXIST || !key.is_some_and(|key| standing.servers.contains_key(&key))
        });
        let has = |rendered: &Rendered| {
            rendered.servers.iter().any(|server| standing.servers.contains_key(&server.server.key))
        };
        let mut refused =
            blame(&requests, &owners, &refusals, |at| wanted.get(at).is_some_and(|(_, new)| has(new)));
        let addresses = self.tables.holdings.addresses();
        let unbound: Vec<IpAddr> =
            addresses.iter().copied().filter(|ip| !standing.addresses.contains(ip)).collect();
        let unbindable = self.tables.bind(&unbound)?;
        let mut fault = None;
        for (at, (_, rendered)) in wanted.iter().enumerate().filter(|_| !unbindable.is_empty()) {
            let Some(left) = not_bound(rendered, &unbindable) else { continue };
            if has(rendered) {
                // It had that address. What else it has goes on.
                fault = Some(left.message);
            } else {
                refused.entry(at).or_insert(left);
            }
        }
        let mut suspects = FxHashSet::default();
        for (at, left) in &refused {
            let Some((key, rendered)) = wanted.get(*at) else { continue };
            if !left.previous_in_force {
                self.tables.holdings.release(rendered, &mut Moved::default());
                let all = rendered.servers.iter();
                let keys = all.map(|server: &Server| server.server.key);
                suspects.extend(keys.clone());
                removals.extend(keys.map(Request::Remove));
            }
            self.leave_out(key, left.clone());
        }
        // From here on packets come to IPVS that another mode's rules translated so far.
        objects += self.write_chains(&terms, &[Table::Nat])?;

        removals.extend(self.tables.quiesce(
            &leaving,
            |key| standing.of_key(key),
            &FxHashSet::default(),
            Instant::now(),
        )?);
        let bound_now =
            standing.addresses.iter().chain(unbound.iter().filter(|ip| !unbindable.contains_key(ip)));
        let gone: Vec<IpAddr> =
            bound_now.copied().filter(|ip| !self.tables.holdings.has_address(*ip)).collect();
        self.tables.unbind(&gone)?;
        let mut surplus: BTreeMap<Set, Vec<Entry>> = BTreeMap::new();
        let entered = lacking.iter().flat_map(|(set, entries)| entries.iter().map(|entry| (*set, *entry)));
        for (set, entry) in standing.entries.iter().copied().chain(entered) {
            if !self.tables.holdings.has(set, entry) {
                surplus.entry(set).or_default().push(entry);
            }
        }
        let withdrawn = surplus.values().map(Vec::len).sum::<usize>();
        let surplus = self.tables.close(surplus)?;
        self.tables.commit_all(&removals, &suspects)?;
        self.tables.withdraw(&surplus)?;
        objects += requests.len() + removals.len() + unbound.len() + gone.len();
        objects += withdrawn;

        self.owners.clear();
        self.tables.drains.restarted();
        for (at, (key, rendered)) in wanted.iter().enumerate() {
            if !refused.contains_key(&at) {
                self.own(key, rendered);
                let plan = plan.services.get(*key).map(Arc::clone);
                self.in_force.extend(plan.map(|plan| ((*key).clone(), plan)));
            }
        }
        if let Some(fault) = fault {
            return Err(Fault::Unbound(fault));
        }
        self.terms = Some(terms);
        Ok(objects)
    }

    /// What an earlier process has in force of a Service that is left out stays. True where that is
    /// anything.
    fn keep(&mut self, rendered: &Rendered, standing: &Standing, kept: &mut FxHashSet<Key>) -> bool {
        let servers = rendered.servers.iter().map(|server| server.server.key);
        let servers: Vec<Key> = servers.filter(|key| standing.servers.contains_key(key)).collect();
        if servers.is_empty() {
            return false;
        }
        kept.extend(servers);
        let entries = rendered.entries.iter().copied().filter(|held| standing.entries.contains(held));
        let addresses = rendered.addresses.iter().copied().filter(|ip| standing.addresses.contains(ip));
        let stays =
            Rendered { servers: Vec::new(), entries: entries.collect(), addresses: addresses.collect() };
        self.tables.holdings.take(&stays, &mut Moved::default());
        true
    }

    fn write_chains(&mut self, terms: &Terms, tables: &[Table]) -> Result<usize, Fault> {
        // Most of it is the time that the tools take, so both families write at the same time.
        let written: Vec<Result<usize, ToolError>> = thread::scope(|scope| {
            let write = |chains| scope.spawn(move || Chains::write(chains, terms, tables));
            let running: Vec<_> = self.chains.iter_mut().map(write).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(join).collect()
        });
        // Where nothing was written, nobody reads back: what others do meanwhile is still to be seen.
        if written.iter().any(|written| !matches!(written, Ok(0))) {
            self.watch.settle();
        }
        written.into_iter().try_fold(0, |objects, written| Ok(objects + written?))
    }
}

/// True where a virtual server was to be added that there is.
fn is_there(requests: &[Request], refusal: &Refusal) -> bool {
    matches!(requests.get(refusal.index), Some(Request::Add(_))) && refusal.errno == Errno::EXIST
}

impl Standing {
    /// Reads sets and addresses. `own`: addresses of the node's other interfaces, sorted.
    pub(crate) fn read(
        tables: &mut Tables,
        families: &[Family],
        own: Vec<IpAddr>,
    ) -> Result<Self, netlink::Error> {
        let mut standing = Standing { families: families.to_vec(), own, ..Standing::default() };
        for set in families.iter().copied().flat_map(Set::of_family) {
            let entries = tables.sets.entries(set.name(), set.purpose.kind())?.unwrap_or_default();
            standing.entries.extend(entries.into_iter().map(|entry| (set, entry)));
        }
        let addresses = tables.device.addresses()?.unwrap_or_default();
        standing.addresses.extend(addresses.into_iter().filter(|ip| families.contains(&Family::of(*ip))));
        Ok(standing)
    }

    /// Reads the virtual servers that are ours: those that are `known`, by their address, where it is one
    /// of `bound`, or by what is in our sets. The number of a node port says so at the node's own addresses
    /// only.
    pub(crate) fn read_servers(
        &mut self,
        servers: &mut dyn lockstep_kernel::ipvs::Ipvs,
        bound: &BTreeSet<IpAddr>,
        known: &FxHashSet<Key>,
        exclude: &[IpNet],
    ) -> Result<(), netlink::Error> {
        for server in servers.virtual_servers()? {
            let key = server.key;
            let excluded = exclude.iter().any(|range| range.contains(&key.address));
            let own = self.own.binary_search(&key.address).is_ok();
            let names = |(set, _): &(Set, Entry)| own || set.purpose.kind() != Kind::BitmapPort;
            let ours = known.contains(&key)
                || bound.contains(&key.address)
                || self.of_key(key).entries.iter().any(names);
            if excluded || !ours || !self.families.contains(&Family::of(key.address)) {
                continue;
            }
            let targets = Found::targets(servers, key)?;
            self.servers.insert(key, Found { server, targets });
        }
        Ok(())
    }

    /// What ends new connections to a virtual server.
    pub(crate) fn quiet(&self, key: Key) -> Vec<Request> {
        let targets = self.servers.get(&key).map(|found| &found.targets[..]).unwrap_or_default();
        let open = targets.iter().filter(|(_, weight)| weight.weight != 0);
        open.map(|(target, _)| Request::SetReal(key, change::real(*target, 0))).collect()
    }

    /// True where the address is on no interface: the node has lost it.
    fn is_nowhere(&self, ip: IpAddr) -> bool {
        !self.addresses.contains(&ip) && self.own.binary_search(&ip).is_err()
    }

    /// What belongs to a virtual server, see [`Rendered::of_key`].
    pub(crate) fn of_key(&self, key: Key) -> Rendered {
        let family = Family::of(key.address);
        let candidates = Purpose::ALL.into_iter().filter_map(|purpose| {
            let entry = match purpose.kind() {
                Kind::HashIp => Entry::Ip(key.address),
                Kind::HashIpPort => Entry::IpPort(key.address, key.protocol, key.port),
                Kind::BitmapPort => Entry::Port(key.port),
                Kind::HashIpPortIp | Kind::HashIpPortNet => return None,
            };
            Some((Set { family, purpose }, entry))
        });
        let all = Rendered {
            servers: Vec::new(),
            entries: candidates.filter(|held| self.entries.contains(held)).collect(),
            addresses: self.addresses.get(&key.address).copied().into_iter().collect(),
        };
        all.of_key(key)
    }
}
