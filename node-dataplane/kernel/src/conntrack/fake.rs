//! Connection tracking in memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Conntrack, Flow};
use crate::Errno;
use crate::netlink;

/// What it tracks, and how it will misbehave. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct FakeConntrack(Arc<Mutex<Inside>>);

/// The inside of a [`FakeConntrack`].
#[derive(Debug, Default)]
pub struct Inside {
    /// All flows, of every protocol and family.
    pub flows: Vec<Flow>,
    /// Listings so far: one per family.
    pub dumps: usize,
    /// So many listings are refused with this.
    pub refuse: Option<(usize, Errno)>,
}

impl FakeConntrack {
    /// Its inside.
    pub fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Conntrack for FakeConntrack {
    fn flows(&mut self, v6: bool, protocol: u8, each: &mut dyn FnMut(&Flow)) -> Result<(), netlink::Error> {
        let mut inside = self.lock();
        inside.dumps += 1;
        if let Some((left, errno)) = &mut inside.refuse
            && *left > 0
        {
            *left -= 1;
            let (request, errno) = ("conntrack dump".to_owned(), *errno);
            return Err(netlink::Error::Refused { request, message: None, errno });
        }
        let wanted = |flow: &&Flow| flow.protocol == protocol && flow.source.is_ipv6() == v6;
        inside.flows.iter().filter(wanted).for_each(each);
        Ok(())
    }

    fn end(&mut self, flows: &[Flow]) -> Result<usize, netlink::Error> {
        let mut inside = self.lock();
        let before = inside.flows.len();
        // As the kernel finds one: by what began it, then by its id.
        let same = |a: &Flow, b: &Flow| {
            (a.protocol, a.source, a.destination, a.zone, a.id)
                == (b.protocol, b.source, b.destination, b.zone, b.id)
        };
        inside.flows.retain(|tracked| !flows.iter().any(|flow| same(tracked, flow)));
        Ok(before - inside.flows.len())
    }
}
