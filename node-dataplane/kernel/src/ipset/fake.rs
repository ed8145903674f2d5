//! Sets in memory: the same changes, the same refusals.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Declaration, Entry, FULL, Header, Kind, Sets, entering, is_full, to_do, worded};
use crate::Errno;
use crate::netlink::{Error, Refusal, fail_on_purpose};

/// `IPSET_ERR_PROTOCOL`, of an entry of another type.
const OTHER_TYPE: Errno = Errno(4097);
/// `IPSET_ERR_IPADDR_IPV4` and `IPSET_ERR_IPADDR_IPV6`, of an entry of the other family.
const NO_IPV4: Errno = Errno(4109);
const NO_IPV6: Errno = Errno(4110);
/// `IPSET_ERR_TYPE_MISMATCH`, of a swap.
const MISMATCH: Errno = Errno(4102);
/// `IPSET_MAXNAMELEN`, less the terminating zero.
const NAME: usize = 31;
const PORTS: u32 = 65_536;

/// Sets, and how they will misbehave. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct FakeSets(Arc<Mutex<Inside>>);

/// The inside of a [`FakeSets`].
#[derive(Debug, Default)]
pub struct Inside {
    /// All sets by name.
    pub sets: BTreeMap<String, Set>,
    /// Entries asked to be added or removed so far.
    pub changed: usize,
    /// Sets created, destroyed or swapped so far.
    pub declared: usize,
    /// Listings of entries so far.
    pub lists: usize,
    /// These entries are refused in every set.
    pub refuse: BTreeMap<Entry, Errno>,
    /// So many calls, of any kind, fail with this.
    pub fail: Option<(usize, Errno)>,
}

/// One set in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// What it was made as.
    pub declaration: Declaration,
    /// Its entries.
    pub entries: BTreeSet<Entry>,
    /// Rules that refer to it, which a test sets.
    pub references: u32,
}

impl FakeSets {
    /// Its inside.
    pub fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self) -> Result<MutexGuard<'_, Inside>, Error> {
        let mut inside = self.lock();
        fail_on_purpose(&mut inside.fail)?;
        Ok(inside)
    }
}

impl Inside {
    fn set(&mut self, name: &str) -> Result<&mut Set, Errno> {
        self.sets.get_mut(name).ok_or(Errno::NOENT)
    }

    fn enter(&mut self, add: bool, name: &str, entries: &[Entry]) -> Result<(), Error> {
        for entry in entries {
            self.changed += 1;
            let refused = self.refuse.get(entry).copied().map_or(Ok(()), Err);
            refused
                .and_then(|()| self.set(name)?.enter(add, entry))
                .map_err(|errno| error(entering(add, Some(entry), name), errno))?;
        }
        Ok(())
    }
}

impl Set {
    fn enter(&mut self, add: bool, entry: &Entry) -> Result<(), Errno> {
        let Declaration { kind, v6, max_elements, .. } = self.declaration;
        if entry.kind() != kind {
            return Err(OTHER_TYPE);
        }
        if address(entry).is_some_and(|address| address.is_ipv6() != v6) {
            return Err(if v6 { NO_IPV6 } else { NO_IPV4 });
        }
        if !add {
            self.entries.remove(entry);
            return Ok(());
        }
        let full = self.entries.len() >= usize::try_from(max_elements).unwrap_or(usize::MAX);
        if full && kind != Kind::BitmapPort && !self.entries.contains(entry) {
            return Err(FULL);
        }
        self.entries.insert(*entry);
        Ok(())
    }
}

impl Set {
    /// True for a single address that a network has in it: for the kernel it is there.
    fn covers(&self, entry: &Entry) -> bool {
        let Entry::IpPortNet(.., net) = entry else { return false };
        net.prefix_len() == net.max_prefix_len() && self.entries.iter().any(|held| held.covers(entry))
    }
}

fn address(entry: &Entry) -> Option<IpAddr> {
    match entry {
        Entry::Ip(address)
        | Entry::IpPort(address, ..)
        | Entry::IpPortIp(address, ..)
        | Entry::IpPortNet(address, ..) => Some(*address),
        Entry::Port(_) => None,
    }
}

fn error(request: String, errno: Errno) -> Error {
    worded(Refusal { seq: 0, errno, message: None }).of(request)
}

impl Sets for FakeSets {
    fn headers(&mut self) -> Result<Vec<Header>, Error> {
        let inside = self.call()?;
        let header = |set: &Set| {
            let Declaration { name, kind, v6, max_elements } = &set.declaration;
            let bitmap = *kind == Kind::BitmapPort;
            Header {
                name: name.clone(),
                type_name: kind.type_name().to_owned(),
                v6: *v6 && !bitmap,
                elements: u32::try_from(set.entries.len()).unwrap_or(u32::MAX),
                max_elements: if bitmap { PORTS } else { *max_elements },
                references: set.references,
            }
        };
        Ok(inside.sets.values().map(header).collect())
    }

    fn entries(&mut self, name: &str, kind: Kind) -> Result<Option<Vec<Entry>>, Error> {
        let mut inside = self.call()?;
        inside.lists += 1;
        let Some(set) = inside.sets.get(name) else { return Ok(None) };
        if set.declaration.kind != kind && !set.entries.is_empty() {
            return Err(Error::Malformed { what: "an entry of an ipset" });
        }
        Ok(Some(set.entries.iter().copied().collect()))
    }

    fn contains(&mut self, name: &str, entry: &Entry) -> Result<bool, Error> {
        let mut inside = self.call()?;
        let refused = |errno| error(format!("test {entry} in ipset {name}"), errno);
        let set = inside.set(name).map_err(refused)?;
        Ok(entry.stored().all(|stored| set.entries.contains(&stored) || set.covers(&stored)))
    }

    fn create(&mut self, declaration: &Declaration) -> Result<(), Error> {
        let mut inside = self.call()?;
        let name = &declaration.name;
        let refused = |errno| error(format!("create ipset {name}"), errno);
        if name.is_empty() || name.len() > NAME {
            return Err(refused(Errno::INVAL));
        }
        if inside.sets.contains_key(name) {
            return Err(refused(Errno::EXIST));
        }
        inside.declared += 1;
        let set = Set { declaration: declaration.clone(), entries: BTreeSet::new(), references: 0 };
        inside.sets.insert(name.clone(), set);
        Ok(())
    }

    fn destroy(&mut self, name: &str) -> Result<bool, Error> {
        let mut inside = self.call()?;
        let Some(set) = inside.sets.get(name) else { return Ok(false) };
        if set.references > 0 {
            return Err(error(format!("destroy ipset {name}"), Errno::BUSY));
        }
        inside.declared += 1;
        Ok(inside.sets.remove(name).is_some())
    }

    fn swap(&mut self, one: &str, other: &str) -> Result<(), Error> {
        let mut inside = self.call()?;
        let refused = |errno| error(format!("swap ipsets {one} and {other}"), errno);
        let mut first = inside.set(one).map_err(refused)?.clone();
        let mut second = inside.set(other).map_err(refused)?.clone();
        let same = |a: &Declaration, b: &Declaration| {
            a.kind == b.kind && (a.v6 == b.v6 || a.kind == Kind::BitmapPort)
        };
        if !same(&first.declaration, &second.declaration) {
            return Err(refused(MISMATCH));
        }
        // Rules refer to the name's place in the kernel's table, so their number stays with the name.
        std::mem::swap(&mut first.declaration.name, &mut second.declaration.name);
        std::mem::swap(&mut first.references, &mut second.references);
        inside.declared += 1;
        inside.sets.insert(other.to_owned(), first);
        inside.sets.insert(one.to_owned(), second);
        Ok(())
    }

    fn change(&mut self, name: &str, add: &[Entry], remove: &[Entry]) -> Result<(), Error> {
        let mut inside = self.call()?;
        let (add, remove) = to_do(add, remove);
        match inside.enter(true, name, &add) {
            Err(error) if is_full(&error) && !remove.is_empty() => {
                inside.enter(false, name, &remove)?;
                inside.enter(true, name, &add)
            }
            other => {
                other?;
                inside.enter(false, name, &remove)
            }
        }
    }
}
