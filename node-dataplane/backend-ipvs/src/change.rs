//! From one rendering of a Service to another: what has to come first, and what leaves after it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use lockstep_kernel::ipvs::{Ipvs, Key, RealServer, Request, VirtualServer};
use lockstep_kernel::netlink::Error;

use crate::drain::{Drains, Ghost, Target};
use crate::render::{Rendered, Server};

/// What one Service's change asks of the tables of IPVS.
#[derive(Debug, Default)]
pub(crate) struct Change {
    /// Nothing in here takes anything away.
    pub(crate) first: Vec<Request>,
    pub(crate) leaving: Vec<Leaving>,
    /// Virtual servers that stayed for their connections only, and are wanted again.
    pub(crate) revived: Vec<Ghost>,
}

/// What leaves a virtual server.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) server: VirtualServer,
    pub(crate) targets: Vec<Target>,
    /// The virtual server itself, too.
    pub(crate) whole: bool,
}

/// An endpoint as a real server.
pub(crate) fn real((address, port): Target, weight: u32) -> RealServer {
    RealServer { address, port, weight, forwarding: 0 }
}

/// Endpoints that come back from draining, and virtual servers that do, leave `drains`.
pub(crate) fn between(old: &Rendered, new: &Rendered, drains: &mut Drains) -> Change {
    let mut change = Change::default();
    for server in &new.servers {
        let key = server.server.key;
        let ghost = drains.take_ghost(key);
        let standing = match (old.server(key), &ghost) {
            (Some(old), _) => Some((&old.server, &old.targets[..])),
            // All that it has is draining.
            (None, Some(ghost)) => Some((&ghost.server, &[][..])),
            (None, None) => None,
        };
        change.server(standing, server, drains);
        change.revived.extend(ghost);
    }
    for server in &old.servers {
        if new.server(server.server.key).is_none() {
            let Server { server, targets } = server.clone();
            change.leaving.push(Leaving { server, targets, whole: true });
        }
    }
    change
}

impl Change {
    fn server(&mut self, old: Option<(&VirtualServer, &[Target])>, new: &Server, drains: &mut Drains) {
        let key = new.server.key;
        match old {
            None => self.first.push(Request::Add(new.server.clone())),
            Some((old, _)) if *old != new.server => self.first.push(Request::Set(new.server.clone())),
            Some(_) => {}
        }
        let had = old.map_or(&[][..], |(_, targets)| targets);
        for target in new.targets.iter().filter(|target| had.binary_search(target).is_err()) {
            self.first.push(match drains.end(key, *target) {
                true => Request::SetReal(key, real(*target, 1)),
                false => Request::AddReal(key, real(*target, 1)),
            });
        }
        let targets: Vec<Target> =
            had.iter().filter(|target| new.targets.binary_search(target).is_err()).copied().collect();
        if !targets.is_empty() {
            self.leaving.push(Leaving { server: new.server.clone(), targets, whole: false });
        }
    }
}

/// What the kernel has under one key of ours.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) server: VirtualServer,
    pub(crate) targets: Vec<(Target, Weight)>,
}

/// What matters of a real server beside where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weight {
    pub(crate) weight: u32,
    pub(crate) forwarding: u32,
}

impl Weight {
    /// True where it is as we write it. The kernel may say of an endpoint that is the node itself
    /// that it is one (`IP_VS_CONN_F_LOCALNODE`).
    pub(crate) fn is_ours(self) -> bool {
        self.weight == 1 && self.forwarding <= 1
    }
}

impl Found {
    /// What the kernel has under a key; `None` = nothing.
    pub(crate) fn read(servers: &mut dyn Ipvs, key: Key) -> Result<Option<Self>, Error> {
        let Some(server) = servers.virtual_server(key)? else { return Ok(None) };
        Ok(Some(Self { server, targets: Self::targets(servers, key)? }))
    }

    /// Where a virtual server leads.
    pub(crate) fn targets(servers: &mut dyn Ipvs, key: Key) -> Result<Vec<(Target, Weight)>, Error> {
        let all = servers.real_servers(key)?.into_iter();
        let weight = |real: &RealServer| Weight { weight: real.weight, forwarding: real.forwarding };
        Ok(all.map(|(real, _)| ((real.address, real.port), weight(&real))).collect())
    }
}

/// From what the kernel has to what is wanted. `new`: `None` = nobody wants it.
pub(crate) fn from_kernel(found: Option<&Found>, new: Option<&Server>) -> Change {
    let mut change = Change::default();
    let Some(Found { server: standing, targets: had }) = found else {
        if let Some(new) = new {
            change.first.push(Request::Add(new.server.clone()));
            let all = new.targets.iter();
            change.first.extend(all.map(|target| Request::AddReal(new.server.key, real(*target, 1))));
        }
        return change;
    };
    let Some(new) = new else {
        let targets = had.iter().map(|(target, _)| *target).collect();
        change.leaving.push(Leaving { server: standing.clone(), targets, whole: true });
        return change;
    };
    let key = new.server.key;
    if *standing != new.server {
        change.first.push(Request::Set(new.server.clone()));
    }
    let known: BTreeSet<Target> = had.iter().map(|(target, _)| *target).collect();
    for target in &new.targets {
        if !known.contains(target) {
            change.first.push(Request::AddReal(key, real(*target, 1)));
        }
    }
    let mut targets = Vec::new();
    for (target, weight) in had {
        if new.targets.binary_search(target).is_err() {
            targets.push(*target);
        } else if !weight.is_ours() {
            change.first.push(Request::SetReal(key, real(*target, 1)));
        }
    }
    if !targets.is_empty() {
        change.leaving.push(Leaving { server: new.server.clone(), targets, whole: false });
    }
    change
}

/// `TCP 10.96.0.1:80`.
pub(crate) fn text(key: Key) -> String {
    let protocol = match key.protocol {
        6 => "TCP",
        17 => "UDP",
        132 => "SCTP",
        _ => "?",
    };
    format!("{protocol} {}", socket((key.address, key.port)))
}

/// `10.0.0.1:80`, `[fd00::1]:80`.
pub(crate) fn socket((address, port): (IpAddr, u16)) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

/// What a request does, for people.
pub(crate) fn describe(request: &Request) -> String {
    let at = text(request.key());
    match request {
        Request::Add(server) => format!("add virtual server {at} with scheduler {}", server.scheduler),
        Request::Set(server) => format!("change virtual server {at} to scheduler {}", server.scheduler),
        Request::Remove(_) => format!("remove virtual server {at}"),
        Request::AddReal(_, real) => format!("add {} to {at}", socket((real.address, real.port))),
        Request::SetReal(_, real) => {
            format!("give {} of {at} weight {}", socket((real.address, real.port)), real.weight)
        }
        Request::RemoveReal(_, address, port) => format!("remove {} from {at}", socket((*address, *port))),
    }
}
