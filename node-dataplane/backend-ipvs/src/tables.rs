//! The tables in the kernel, written step by step: IPVS knows no transactions, so the order is what
//! keeps a Service from answering wrongly while it is half written.
//!
//! What comes: sets, virtual servers with their endpoints, addresses. So what a packet meets is
//! complete before the packet can. What leaves goes the other way round: addresses, endpoints and
//! virtual servers, sets. Everything that comes is there before anything leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use lockstep_kernel::Errno;
use lockstep_kernel::dummy::Device;
use lockstep_kernel::ipset::{self, Declaration, Entry, Kind, Sets};
use lockstep_kernel::ipvs::{Ipvs, Key, Request};
use lockstep_kernel::netlink::Error;
use lockstep_model::Family;
use rustc_hash::FxHashSet;

use crate::change::{self, Leaving};
use crate::drain::{Drains, Ghost, Target};
use crate::holdings::{Holdings, Moved};
use crate::names::Set;
use crate::render::{Rendered, number};

/// Room that a set has at least.
const ROOM: u32 = 65_536;
/// Behind the name of a set while it is made anew with more room.
const ANEW: &str = "KUBE-LOCKSTEP-ANEW";

/// Everything that IPVS mode writes but its chains.
pub(crate) struct Tables {
    pub(crate) servers: Box<dyn Ipvs>,
    pub(crate) sets: Box<dyn Sets>,
    pub(crate) device: Box<dyn Device>,
    pub(crate) holdings: Holdings,
    pub(crate) drains: Drains,
    /// Room of each set.
    rooms: BTreeMap<Set, u32>,
}

/// A request that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Which of the requests.
    pub(crate) index: usize,
    pub(crate) errno: Errno,
}

impl Tables {
    pub(crate) fn new(
        servers: Box<dyn Ipvs>,
        sets: Box<dyn Sets>,
        device: Box<dyn Device>,
        drains: Drains,
    ) -> Self {
        let (holdings, rooms) = (Holdings::default(), BTreeMap::new());
        Self { servers, sets, device, holdings, drains, rooms }
    }

    /// Makes the sets that are missing, and returns how many these were. A set of our name and another
    /// type is an error: it is somebody else's.
    pub(crate) fn make_sets(&mut self, wanted: impl Iterator<Item = Set>) -> Result<usize, Error> {
        let headers = self.sets.headers()?;
        let mut made = 0;
        self.rooms.clear();
        for set in wanted {
            if let Some(header) = headers.iter().find(|header| header.name == set.name()) {
                let v6 = set.family == Family::V6;
                // A bitmap of ports has no family.
                if header.type_name != set.purpose.kind().type_name()
                    || (header.v6 != v6 && set.purpose.kind() != Kind::BitmapPort)
                {
                    let request = format!("use ipset {}, which is a {}", set.name(), header.type_name);
                    return Err(Error::Refused { request, message: None, errno: Errno::EXIST });
                }
                self.rooms.insert(set, header.max_elements);
                continue;
            }
            self.sets.create(&declaration(set, set.name(), ROOM))?;
            self.rooms.insert(set, ROOM);
            made += 1;
        }
        Ok(made)
    }

    /// Adds entries, in the order of the sets; one that has no room for them is made anew with more.
    /// `holdings` has them already.
    pub(crate) fn enter(&mut self, entries: &BTreeMap<Set, Vec<Entry>>) -> Result<(), Error> {
        for (set, entries) in entries {
            let (size, room) = (self.holdings.size(*set), self.rooms.get(set).copied().unwrap_or(ROOM));
            if size <= room {
                match self.sets.change(set.name(), entries, &[]) {
                    // Somebody else's entries fill it.
                    Err(error) if ipset::is_full(&error) => {}
                    other => {
                        other?;
                        continue;
                    }
                }
            }
            self.enlarge(*set, size.max(room))?;
        }
        Ok(())
    }

    /// Makes a set anew under another name, with twice the room and what it should have, and swaps
    /// the two: rules see the one or the other whole.
    fn enlarge(&mut self, set: Set, beyond: u32) -> Result<(), Error> {
        let room = beyond.saturating_add(1).next_power_of_two().max(ROOM);
        self.sets.destroy(ANEW)?;
        self.sets.create(&declaration(set, ANEW, room))?;
        self.sets.change(ANEW, &self.holdings.of_set(set), &[])?;
        self.sets.swap(ANEW, set.name())?;
        self.rooms.insert(set, room);
        tracing::info!(set = set.name(), room, "made anew with more room");
        self.sets.destroy(ANEW).map(drop)
    }

    /// Takes entries away, in the opposite order.
    pub(crate) fn withdraw(&mut self, entries: &BTreeMap<Set, Vec<Entry>>) -> Result<(), Error> {
        entries.iter().rev().try_for_each(|(set, entries)| self.sets.change(set.name(), &[], entries))
    }

    /// Takes away of these what lets packets by to an address that stays bound, and returns the rest.
    /// It is for before its virtual server goes: after that the node's own listeners would answer.
    pub(crate) fn close(
        &mut self,
        entries: BTreeMap<Set, Vec<Entry>>,
    ) -> Result<BTreeMap<Set, Vec<Entry>>, Error> {
        let (mut first, mut rest) = (BTreeMap::new(), BTreeMap::new());
        for (set, entries) in entries {
            let stays_bound = |entry: &Entry| match entry {
                Entry::IpPort(ip, ..) => set.purpose.lets_by() && self.holdings.has_address(*ip),
                _ => false,
            };
            let (open, others): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(stays_bound);
            for (part, entries) in [(&mut first, open), (&mut rest, others)] {
                if !entries.is_empty() {
                    part.insert(set, entries);
                }
            }
        }
        self.withdraw(&first)?;
        Ok(rest)
    }

    /// Hands requests to the kernel, in order. What it refuses is left out.
    pub(crate) fn commit(&mut self, requests: &[Request]) -> Result<Vec<Refusal>, Error> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let refused = self.servers.commit(requests)?;
        Ok(refused
            .into_iter()
            .map(|refused| Refusal { index: refused.index, errno: refused.errno })
            .collect())
    }

    /// Binds addresses. Returns those that the kernel refuses.
    pub(crate) fn bind(&mut self, addresses: &[IpAddr]) -> Result<BTreeMap<IpAddr, Errno>, Error> {
        if addresses.is_empty() {
            return Ok(BTreeMap::new());
        }
        Ok(self.device.change(addresses, &[])?.into_iter().collect())
    }

    /// Unbinds addresses. Fails at the first that the kernel refuses.
    pub(crate) fn unbind(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        if addresses.is_empty() {
            return Ok(());
        }
        match self.device.change(&[], addresses)?.first() {
            None => Ok(()),
            Some((ip, errno)) => {
                let request = format!("remove {ip} from {}", crate::names::DEVICE);
                Err(Error::Refused { request, message: None, errno: *errno })
            }
        }
    }

    /// Ends new connections to what leaves. Returns what can be removed at once; what has
    /// connections stays in `drains`, and with it what `keep` says of a whole virtual server. Refusals
    /// at `suspects` mean nothing: they may have been refused before.
    pub(crate) fn quiesce(
        &mut self,
        leaving: &[Leaving],
        keep: impl Fn(Key) -> Rendered,
        suspects: &FxHashSet<Key>,
        now: Instant,
    ) -> Result<Vec<Request>, Error> {
        let mut quiet = Vec::new();
        for leaving in leaving.iter().filter(|leaving| drains(leaving.server.key)) {
            let key = leaving.server.key;
            let fresh = leaving.targets.iter().filter(|target| !self.drains.has(key, **target));
            quiet.extend(fresh.map(|target| Request::SetReal(key, change::real(*target, 0))));
        }
        self.commit_all(&quiet, suspects)?;
        let mut removals = Vec::new();
        for leaving in leaving {
            let key = leaving.server.key;
            let busy = if drains(key) { self.busy(key)? } else { BTreeSet::new() };
            let (stay, go): (Vec<Target>, Vec<Target>) =
                leaving.targets.iter().copied().partition(|target| busy.contains(target));
            for target in &stay {
                self.drains.begin(key, *target, now);
            }
            let stays = !stay.is_empty() || self.drains.get(key).is_some();
            if leaving.whole && !stays {
                removals.push(Request::Remove(key));
                continue;
            }
            if leaving.whole {
                let kept = keep(key);
                self.holdings.take(&kept, &mut Moved::default());
                self.drains.abandon(Ghost { server: leaving.server.clone(), kept });
            }
            removals.extend(go.into_iter().map(|(address, port)| Request::RemoveReal(key, address, port)));
        }
        Ok(removals)
    }

    /// Endpoints of a virtual server that have connections.
    pub(crate) fn busy(&mut self, key: Key) -> Result<BTreeSet<Target>, Error> {
        let all = self.servers.real_servers(key)?;
        let busy = all.into_iter().filter(|(_, connections)| connections.active + connections.inactive > 0);
        Ok(busy.map(|(real, _)| (real.address, real.port)).collect())
    }

    /// Hands requests to the kernel that take something away. What is gone already is no fault, and
    /// what is refused at `suspects` is none.
    pub(crate) fn commit_all(
        &mut self,
        requests: &[Request],
        suspects: &FxHashSet<Key>,
    ) -> Result<(), Error> {
        let suspect = |refusal: &Refusal| {
            requests.get(refusal.index).is_some_and(|request| suspects.contains(&request.key()))
        };
        let refusals = self.commit(requests)?;
        match refusals.iter().find(|refusal| !is_gone(refusal.errno) && !suspect(refusal)) {
            None => Ok(()),
            Some(refusal) => Err(refused(requests, refusal)),
        }
    }

    /// The same without suspects.
    pub(crate) fn remove(&mut self, requests: &[Request]) -> Result<(), Error> {
        self.commit_all(requests, &FxHashSet::default())
    }

    /// Removes what has no connections left, or has had its time. Looks at so many virtual servers.
    /// Returns how many endpoints and virtual servers went.
    pub(crate) fn drain(&mut self, keys: &[Key], now: Instant) -> Result<usize, Error> {
        let (mut removals, mut gone) = (Vec::new(), Moved::default());
        for key in keys {
            let Some(drain) = self.drains.get(*key) else { continue };
            let targets = drain.targets.clone();
            let busy = self.busy(*key)?;
            let over = targets.into_iter().filter(|(target, end)| *end <= now || !busy.contains(target));
            for ((address, port), _) in over {
                self.drains.end(*key, (address, port));
                removals.push(Request::RemoveReal(*key, address, port));
            }
            if self.drains.get(*key).is_some_and(|drain| drain.targets.is_empty())
                && let Some(ghost) = self.drains.take_ghost(*key)
            {
                self.holdings.release(&ghost.kept, &mut gone);
                removals.push(Request::Remove(*key));
            }
        }
        self.unbind(&gone.addresses)?;
        self.remove(&removals)?;
        self.withdraw(&gone.entries)?;
        Ok(removals.len())
    }
}

/// True where there is no such real server, or no such virtual server.
pub(crate) fn is_gone(errno: Errno) -> bool {
    errno == Errno::NOENT || errno == Errno::SRCH
}

/// True where connections are worth waiting for. A UDP client has none: it goes elsewhere with its
/// next packet.
pub(crate) fn drains(key: Key) -> bool {
    key.protocol != number(lockstep_model::Protocol::Udp)
}

pub(crate) fn refused(requests: &[Request], refusal: &Refusal) -> Error {
    let request = requests.get(refusal.index).map(change::describe).unwrap_or_default();
    Error::Refused { request, message: None, errno: refusal.errno }
}

fn declaration(set: Set, name: &str, room: u32) -> Declaration {
    let v6 = set.family == Family::V6;
    Declaration { name: name.to_owned(), kind: set.purpose.kind(), v6, max_elements: room }
}
