//! A dummy device in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Device, is_link_local, no_dummy, sorted};
use crate::Errno;
use crate::netlink::{Error, fail_on_purpose};

/// A device, and how it will misbehave. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct FakeDevice(Arc<Mutex<Inside>>);

/// The inside of a [`FakeDevice`].
#[derive(Debug, Default)]
pub struct Inside {
    /// The addresses of the device; `None` where there is none.
    pub addresses: Option<BTreeSet<IpAddr>>,
    /// The addresses of other interfaces.
    pub others: Vec<IpAddr>,
    /// An interface of another type has the name.
    pub taken: bool,
    /// News that [`Device::changed`] has not told yet.
    pub news: bool,
    /// Addresses added or removed so far.
    pub changes: usize,
    /// Listings so far, of its own addresses or the others'.
    pub lists: usize,
    /// These addresses are refused.
    pub refuse: BTreeMap<IpAddr, Errno>,
    /// So many calls, of any kind, fail with this.
    pub fail: Option<(usize, Errno)>,
}

impl FakeDevice {
    /// Its inside.
    pub fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self) -> Result<MutexGuard<'_, Inside>, Error> {
        let mut inside = self.lock();
        if inside.taken {
            return Err(no_dummy("find a fake".to_owned()));
        }
        fail_on_purpose(&mut inside.fail)?;
        Ok(inside)
    }
}

impl Device for FakeDevice {
    fn ensure(&mut self) -> Result<bool, Error> {
        let mut inside = self.call()?;
        if inside.addresses.is_some() {
            return Ok(false);
        }
        inside.addresses = Some(BTreeSet::new());
        inside.news = true;
        Ok(true)
    }

    fn addresses(&mut self) -> Result<Option<Vec<IpAddr>>, Error> {
        let mut inside = self.call()?;
        inside.lists += 1;
        let own = inside.addresses.as_ref();
        Ok(own.map(|own| own.iter().copied().collect()))
    }

    fn others(&mut self) -> Result<Vec<IpAddr>, Error> {
        let mut inside = self.call()?;
        inside.lists += 1;
        Ok(sorted(inside.others.iter().copied().filter(|address| !is_link_local(*address))))
    }

    fn change(&mut self, add: &[IpAddr], remove: &[IpAddr]) -> Result<Vec<(IpAddr, Errno)>, Error> {
        let mut inside = self.call()?;
        let Inside { addresses, refuse, changes, news, .. } = &mut *inside;
        let Some(addresses) = addresses else {
            let request = "find a fake".to_owned();
            return Err(Error::Refused { request, message: None, errno: Errno(libc::ENODEV) });
        };
        let mut refused = Vec::new();
        let both =
            add.iter().map(|address| (address, true)).chain(remove.iter().map(|address| (address, false)));
        for (address, adds) in both {
            *changes += 1;
            if let Some(errno) = refuse.get(address) {
                refused.push((*address, *errno));
                continue;
            }
            *news |= if adds { addresses.insert(*address) } else { addresses.remove(address) };
        }
        Ok(refused)
    }

    fn remove(&mut self) -> Result<bool, Error> {
        let mut inside = self.call()?;
        let was = inside.addresses.take().is_some();
        inside.news |= was;
        Ok(was)
    }

    fn changed(&mut self) -> Result<bool, Error> {
        let mut inside = self.lock();
        Ok(std::mem::take(&mut inside.news))
    }
}
