//! What the kernel has against what it was given: `verify`, `audit` and the cheap signs.
//!
//! What should be there is rendered anew from the plans in force, not taken from what was written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use lockstep_kernel::ipvs::{Key, VirtualServer};
use lockstep_kernel::netlink;
use lockstep_model::{Family, ServiceKey};
use lockstep_view::backend::{Audit, Drift};

use crate::backend::{Fault, Ipvs, Touched};
use crate::change::text;
use crate::drain::Target;
use crate::names::{DEVICE, Set};
use crate::render::{Rendered, Server};

/// Where an audit goes on.
#[derive(Debug, Default)]
pub(crate) enum Walk {
    /// A new walk begins: with what is on the interface, and the chains.
    #[default]
    Start,
    Sets(Vec<Set>),
    /// Virtual servers are listed as a whole, and what they lead to one by one.
    Servers(Vec<Key>),
}

impl Ipvs {
    /// Reads back what was touched; after a comparison with everything, everything.
    pub(crate) fn read_back(&mut self) -> Result<Vec<Drift>, Fault> {
        match self.touched.take() {
            None => self.read_all(),
            Some(touched) => {
                let found = self.read_touched(&touched);
                if found.is_err() {
                    self.touched = Some(touched);
                }
                Ok(found?)
            }
        }
    }

    fn read_all(&mut self) -> Result<Vec<Drift>, Fault> {
        let mut drift = self.read_device()?;
        drift.extend(self.read_chains()?);
        for set in self.sets() {
            drift.extend(self.read_set(set)?);
        }
        drift.extend(self.read_list()?);
        let mut last = None;
        for key in self.wanted_keys() {
            drift.extend(self.read_server(key, &mut last)?);
        }
        self.touched = Some(Touched::default());
        Ok(drift)
    }

    fn read_touched(&mut self, touched: &Touched) -> Result<Vec<Drift>, netlink::Error> {
        let (mut drift, mut last) = (Vec::new(), None);
        for key in &touched.keys {
            drift.extend(self.read_server(*key, &mut last)?);
        }
        let mut wrong: BTreeMap<Set, usize> = BTreeMap::new();
        for (set, entry) in &touched.entries {
            let there = self.tables.sets.contains(set.name(), entry)?;
            let has = self.tables.holdings.has(*set, *entry);
            // A single address is there for the kernel, too, where a network has it.
            if there != has && !(there && self.tables.holdings.covers(*set, *entry)) {
                *wrong.entry(*set).or_default() += 1;
            }
        }
        drift.extend(wrong.into_iter().map(|(set, wrong)| of_set(set, &format!("{wrong} entries differ"))));
        if !touched.addresses.is_empty() {
            drift.extend(self.read_device()?);
        }
        Ok(drift)
    }

    fn sets(&self) -> Vec<Set> {
        self.families().into_iter().flat_map(Set::of_family).collect()
    }

    fn read_device(&mut self) -> Result<Vec<Drift>, netlink::Error> {
        let object = format!("interface {DEVICE}");
        let Some(found) = self.tables.device.addresses()? else {
            return Ok(vec![Drift { object, fault: "missing".to_owned() }]);
        };
        let families = self.families();
        let ours = |ip: &IpAddr| families.contains(&Family::of(*ip));
        let found: BTreeSet<IpAddr> = found.into_iter().filter(ours).collect();
        let wanted: BTreeSet<IpAddr> = self.tables.holdings.addresses().into_iter().collect();
        let (missing, surplus) = (wanted.difference(&found).count(), found.difference(&wanted).count());
        Ok(counted(missing, surplus).map(|fault| Drift { object, fault }).into_iter().collect())
    }

    fn read_chains(&mut self) -> Result<Vec<Drift>, Fault> {
        let mut drift = Vec::new();
        for chains in &self.chains {
            drift.extend(chains.drift()?);
        }
        Ok(drift)
    }

    fn read_set(&mut self, set: Set) -> Result<Option<Drift>, netlink::Error> {
        let Some(found) = self.tables.sets.entries(set.name(), set.purpose.kind())? else {
            return Ok(Some(of_set(set, "missing")));
        };
        let known = found.iter().filter(|entry| self.tables.holdings.has(set, **entry)).count();
        let wanted = usize::try_from(self.tables.holdings.size(set)).unwrap_or(usize::MAX);
        let fault = counted(wanted.saturating_sub(known), found.len() - known);
        Ok(fault.map(|fault| of_set(set, &fault)))
    }

    /// Every virtual server that should be there, sorted.
    fn wanted_keys(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.owners.keys().copied().collect();
        keys.extend(self.tables.drains.ghosts().map(|ghost| ghost.server.key));
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// The list of virtual servers, without what they lead to. What is not ours is passed over.
    fn read_list(&mut self) -> Result<Vec<Drift>, netlink::Error> {
        let found: BTreeSet<Key> =
            self.tables.servers.virtual_servers()?.into_iter().map(|server| server.key).collect();
        let wanted = self.wanted_keys();
        let mut missing = 0;
        // The kernel's list may lack some while servers come and go anywhere on this host.
        for key in wanted.iter().filter(|key| !found.contains(key)) {
            missing += usize::from(self.tables.servers.virtual_server(*key)?.is_none());
        }
        let surplus = found
            .iter()
            .filter(|key| self.tables.holdings.has_address(key.address))
            .filter(|key| wanted.binary_search(key).is_err() && !self.is_excluded(**key))
            .count();
        let fault = counted(missing, surplus);
        Ok(fault
            .map(|fault| Drift { object: "IPVS virtual servers".to_owned(), fault })
            .into_iter()
            .collect())
    }

    fn is_excluded(&self, key: Key) -> bool {
        self.options.exclude.iter().any(|range| range.contains(&key.address))
    }

    /// One virtual server as it should be. `last`: what was rendered for the one before, which is
    /// often of the same Service.
    fn expected(&self, key: Key, last: &mut Option<(ServiceKey, Rendered)>) -> Option<Server> {
        let (terms, owner) = (self.terms.as_ref()?, self.owners.get(&key)?);
        if last.as_ref().is_none_or(|(of, _)| of != owner) {
            let rendered = Rendered::new(self.in_force.get(owner)?, terms).ok()?;
            *last = Some((owner.clone(), rendered));
        }
        last.as_ref()?.1.server(key).cloned()
    }

    fn read_server(
        &mut self,
        key: Key,
        last: &mut Option<(ServiceKey, Rendered)>,
    ) -> Result<Option<Drift>, netlink::Error> {
        let drift =
            |fault: String| Some(Drift { object: format!("IPVS virtual server {}", text(key)), fault });
        let found = self.tables.servers.virtual_server(key)?;
        let (wanted, targets) = match (self.expected(key, last), self.tables.drains.get(key)) {
            (Some(Server { server, targets }), _) => (server, targets),
            (None, Some(drain)) => match &drain.ghost {
                Some(ghost) => (ghost.server.clone(), Vec::new()),
                None => return Ok(None),
            },
            (None, None) => {
                let is_ours = self.tables.holdings.has_address(key.address);
                return Ok(found.filter(|_| is_ours).and_then(|_| drift("is there still".to_owned())));
            }
        };
        let Some(found) = found else { return Ok(drift("missing".to_owned())) };
        if found != wanted {
            return Ok(drift(differs(&found, &wanted)));
        }
        let (mut known, mut surplus, mut weights) = (0, 0, 0);
        for (real, _) in self.tables.servers.real_servers(key)? {
            let target: Target = (real.address, real.port);
            let is_target = targets.binary_search(&target).is_ok();
            known += usize::from(is_target);
            if !is_target {
                surplus += usize::from(real.weight != 0 || !self.tables.drains.has(key, target));
            } else if real.weight != 1 || real.forwarding > 1 {
                weights += 1;
            }
        }
        let fault = counted(targets.len().saturating_sub(known), surplus)
            .or_else(|| (weights > 0).then(|| format!("{weights} endpoints have another weight")));
        Ok(fault.and_then(drift))
    }

    /// A further part of the whole.
    pub(crate) fn walk_on(&mut self, budget: Duration) -> Result<Audit, Fault> {
        let started = Instant::now();
        let (mut audit, mut last) = (Audit::default(), None);
        if self.terms.is_none() {
            return Ok(audit);
        }
        loop {
            self.walk = match std::mem::take(&mut self.walk) {
                Walk::Start => {
                    audit.drift.extend(self.read_device()?);
                    audit.drift.extend(self.read_chains()?);
                    Walk::Sets(self.sets())
                }
                Walk::Sets(mut left) => match left.pop() {
                    Some(set) => {
                        audit.drift.extend(self.read_set(set)?);
                        Walk::Sets(left)
                    }
                    None => {
                        audit.drift.extend(self.read_list()?);
                        Walk::Servers(self.wanted_keys())
                    }
                },
                Walk::Servers(mut left) => match left.pop() {
                    // It may have gone since the walk began.
                    Some(key) => {
                        audit.drift.extend(self.read_server(key, &mut last)?);
                        Walk::Servers(left)
                    }
                    None => {
                        audit.completed = true;
                        return Ok(audit);
                    }
                },
            };
            if started.elapsed() >= budget {
                return Ok(audit);
            }
        }
    }

    /// Cheap signs of changes by others: numbers of entries and of virtual servers, news of
    /// interfaces and addresses, and what the chains' own watch says.
    pub(crate) fn signs(&mut self) -> Result<bool, netlink::Error> {
        if self.watch.look() {
            return Ok(true);
        }
        let Some(terms) = &self.terms else { return Ok(false) };
        let mut moved = false;
        if self.tables.device.changed()? | std::mem::take(&mut self.news) {
            // Most news is of our own addresses, or of pods.
            let own = self.tables.device.others()?;
            moved = own != terms.own;
            self.own = Some(own);
            moved |= !self.read_device()?.is_empty();
        }
        let headers = self.tables.sets.headers()?;
        let size = |set: &Set| headers.iter().find(|it| it.name == set.name()).map(|it| it.elements);
        let wanted = |set: &Set| Some(self.tables.holdings.size(*set));
        if moved || self.sets().iter().any(|set| size(set) != wanted(set)) {
            return Ok(true);
        }
        // Others' count too, and may come and go: fewer than ours is what matters.
        let v4 = self.owners.keys().filter(|key| key.address.is_ipv4()).count();
        Ok(usize::try_from(self.tables.servers.count()?).is_ok_and(|found| found < v4))
    }
}

fn of_set(set: Set, fault: &str) -> Drift {
    Drift { object: format!("ipset {}", set.name()), fault: fault.to_owned() }
}

/// `None` where nothing is wrong.
fn counted(missing: usize, surplus: usize) -> Option<String> {
    match (missing, surplus) {
        (0, 0) => None,
        (missing, 0) => Some(format!("{missing} missing")),
        (0, surplus) => Some(format!("{surplus} too many")),
        (missing, surplus) => Some(format!("{missing} missing, {surplus} too many")),
    }
}

fn differs(found: &VirtualServer, wanted: &VirtualServer) -> String {
    if found.scheduler != wanted.scheduler {
        return format!("scheduler {} instead of {}", found.scheduler, wanted.scheduler);
    }
    format!(
        "flags {:#x} and timeout {} s instead of {:#x} and {} s",
        found.flags, found.timeout, wanted.flags, wanted.timeout
    )
}
