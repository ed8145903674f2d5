//! Connections that go on at endpoints that are no longer wanted.
//!
//! Such an endpoint gets weight 0: no new connection goes there, the others go on. It leaves when
//! they have ended, or when it has had long enough. A virtual server that is no longer wanted stays
//! in the same way, with its address, and refuses what is new.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use lockstep_kernel::ipvs::{Key, VirtualServer};

use crate::render::Rendered;

/// Address and port of an endpoint.
pub(crate) type Target = (IpAddr, u16);

/// What stays for its connections.
#[derive(Debug)]
pub(crate) struct Drains {
    of: BTreeMap<Key, Drain>,
    /// When what stayed before everything is compared has to go, until it has been.
    earlier: BTreeMap<(Key, Target), Instant>,
    limit: Duration,
}

#[derive(Debug, Default)]
pub(crate) struct Drain {
    /// Each with when it has to go.
    pub(crate) targets: BTreeMap<Target, Instant>,
    /// No Service wants the virtual server any more.
    pub(crate) ghost: Option<Ghost>,
}

/// A virtual server that nobody wants.
#[derive(Debug)]
pub(crate) struct Ghost {
    pub(crate) server: VirtualServer,
    /// What stays with it.
    pub(crate) kept: Rendered,
}

impl Drains {
    /// `limit`: how long an endpoint may stay for its connections.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { of: BTreeMap::new(), earlier: BTreeMap::new(), limit }
    }

    /// Nothing stays, until it is said again: then no longer than was said before.
    pub(crate) fn restart(&mut self) {
        for (key, drain) in std::mem::take(&mut self.of) {
            let all = drain.targets.into_iter();
            self.earlier.extend(all.map(|(target, end)| ((key, target), end)));
        }
    }

    /// All that stays has been said.
    pub(crate) fn restarted(&mut self) {
        self.earlier.clear();
    }

    pub(crate) fn get(&self, key: Key) -> Option<&Drain> {
        self.of.get(&key)
    }

    /// True where the endpoint stays for its connections only.
    pub(crate) fn has(&self, key: Key, target: Target) -> bool {
        self.of.get(&key).is_some_and(|drain| drain.targets.contains_key(&target))
    }

    pub(crate) fn ghosts(&self) -> impl Iterator<Item = &Ghost> {
        self.of.values().filter_map(|drain| drain.ghost.as_ref())
    }

    pub(crate) fn begin(&mut self, key: Key, target: Target, now: Instant) {
        let end = self.earlier.remove(&(key, target)).unwrap_or(now + self.limit);
        self.of.entry(key).or_default().targets.entry(target).or_insert(end);
    }

    /// Nobody wants the virtual server any more; it has endpoints that stay.
    pub(crate) fn abandon(&mut self, ghost: Ghost) {
        let key = ghost.server.key;
        self.of.entry(key).or_default().ghost = Some(ghost);
    }

    /// The endpoint is wanted again, or gone. True where it stayed.
    pub(crate) fn end(&mut self, key: Key, target: Target) -> bool {
        let Some(drain) = self.of.get_mut(&key) else { return false };
        let stayed = drain.targets.remove(&target).is_some();
        if drain.targets.is_empty() && drain.ghost.is_none() {
            self.of.remove(&key);
        }
        stayed
    }

    /// The virtual server is wanted again, or goes.
    pub(crate) fn take_ghost(&mut self, key: Key) -> Option<Ghost> {
        let drain = self.of.get_mut(&key)?;
        let ghost = drain.ghost.take();
        if drain.targets.is_empty() {
            self.of.remove(&key);
        }
        ghost
    }

    /// The virtual servers that have something that stays.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.of.keys().copied().collect()
    }
}
