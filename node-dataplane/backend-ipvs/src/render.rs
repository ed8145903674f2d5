//! A plan becomes what the kernel should have of it: virtual servers, entries of sets, addresses.
//!
//! A virtual server has one pool, whoever asks, and so has a frontend of the plan, because the backend
//! says that it knows no other (`Description::one_pool`).

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_kernel::ipset::{Entry, Kind};
use lockstep_kernel::ipvs::{Key, PERSISTENT, SCHED_MH_FALLBACK, SCHED_MH_PORT, VirtualServer};
use lockstep_model::{Family, Protocol};
use lockstep_view::{Action, Frontend, Pool, PortPlan, ServicePlan, Surface};

use crate::names::{Purpose, Set};
use crate::terms::Terms;

/// What the kernel should have of one Service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rendered {
    /// Sorted by key, each once.
    pub(crate) servers: Vec<Server>,
    /// Sorted, each once.
    pub(crate) entries: Vec<(Set, Entry)>,
    /// To be bound, sorted, each once.
    pub(crate) addresses: Vec<IpAddr>,
}

/// A virtual server and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) server: VirtualServer,
    /// Address and port of each endpoint, sorted, each once.
    pub(crate) targets: Vec<(IpAddr, u16)>,
}

/// A frontend whose verdicts IPVS has no way to give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{surface:?} port {port}: pods, node and others are treated in a way that IPVS cannot")]
pub(crate) struct Inexpressible {
    surface: Surface,
    port: u16,
}

/// How a frontend treats its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// By the kernel, as it does for a virtual server that leads nowhere.
    Refused,
    Dropped,
    Forwarded {
        pool: Pool,
        hides: Hides,
        drops_external: bool,
    },
}

/// Whose address an endpoint does not see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hides {
    Everybody,
    AllButPods,
    /// The node, which asks from an address that every node has.
    Node,
}

impl Rendered {
    pub(crate) fn new(plan: &ServicePlan, terms: &Terms) -> Result<Self, Inexpressible> {
        let mut this = Self::default();
        for port in &plan.ports {
            for target in &port.hairpin {
                let (ip, protocol, port) = (target.address, number(port.protocol), target.port.get());
                this.enter(Purpose::LoopBack, Entry::IpPortIp(ip, protocol, port, ip), Family::of(ip));
            }
            for frontend in &port.frontends {
                this.frontend(port, frontend, terms)?;
            }
        }
        if let Some(check) = &plan.health_check {
            for family in &terms.families {
                this.enter(Purpose::HealthCheck, Entry::Port(check.port.get()), *family);
            }
        }
        this.servers.sort_by_key(|server| server.server.key);
        this.entries.sort_unstable();
        this.entries.dedup();
        this.addresses.sort_unstable();
        this.addresses.dedup();
        Ok(this)
    }

    fn frontend(&mut self, port: &PortPlan, frontend: &Frontend, terms: &Terms) -> Result<(), Inexpressible> {
        let Some(treatment) = treatment(frontend) else {
            return Err(Inexpressible { surface: frontend.surface, port: frontend.port.get() });
        };
        if frontend.surface.address().is_some_and(|ip| terms.is_of_another_node(ip)) {
            return Ok(());
        }
        let (at, protocol) = (frontend.port.get(), number(port.protocol));
        let addresses: Vec<IpAddr> = match frontend.surface {
            Surface::NodePort => {
                let all = terms.node_ports(port.family).iter().copied();
                all.filter(|ip| !terms.taken.contains(&Key { protocol, address: *ip, port: at })).collect()
            }
            Surface::ClusterIp(ip) | Surface::ExternalIp(ip) | Surface::LoadBalancerIp(ip) => vec![ip],
        };
        for purpose in purposes(frontend.surface, port.protocol, treatment) {
            if purpose.kind() == Kind::BitmapPort {
                self.enter(purpose, Entry::Port(at), port.family);
                continue;
            }
            for ip in &addresses {
                self.enter(purpose, Entry::IpPort(*ip, protocol, at), port.family);
            }
        }
        for ip in addresses {
            if let Some(sources) = &frontend.allowed_sources {
                self.enter(Purpose::Firewall, Entry::IpPort(ip, protocol, at), port.family);
                for source in sources.iter().flat_map(|source| networks(*source)) {
                    self.enter(Purpose::SourceCidr, Entry::IpPortNet(ip, protocol, at, source), port.family);
                }
                if terms.visible().any(|own| sources.iter().any(|source| source.contains(own))) {
                    self.enter(Purpose::SourceIp, Entry::IpPortIp(ip, protocol, at, ip), port.family);
                }
            }
            if frontend.surface != Surface::NodePort && !terms.is_own(ip) {
                self.addresses.push(ip);
                self.enter(Purpose::Bound, Entry::Ip(ip), port.family);
            }
            let targets = match treatment {
                Treatment::Dropped => continue,
                Treatment::Refused => Vec::new(),
                Treatment::Forwarded { pool, .. } => {
                    port.pool(pool).iter().map(|target| (target.address, target.port.get())).collect()
                }
            };
            let key = Key { protocol, address: ip, port: at };
            self.servers.push(Server { server: virtual_server(key, port, &terms.scheduler), targets });
        }
        Ok(())
    }

    fn enter(&mut self, purpose: Purpose, entry: Entry, family: Family) {
        self.entries.push((Set { family, purpose }, entry));
    }

    /// The virtual server of a key.
    pub(crate) fn server(&self, key: Key) -> Option<&Server> {
        self.servers.binary_search_by_key(&key, |server| server.server.key).ok().map(|at| &self.servers[at])
    }

    /// What has to stay for connections to a virtual server that go on when it is no longer wanted:
    /// its address, and by what a process that starts anew knows it as ours.
    pub(crate) fn of_key(&self, key: Key) -> Self {
        let concerns = |(set, entry): &&(Set, Entry)| match (set.purpose, entry) {
            (Purpose::Drop | Purpose::DropExternal | Purpose::Firewall, _) => false,
            (_, Entry::IpPort(ip, protocol, port)) => {
                (*ip, *protocol, *port) == (key.address, key.protocol, key.port)
            }
            (Purpose::Bound, Entry::Ip(ip)) => *ip == key.address,
            (purpose, Entry::Port(port)) => {
                let protocol = match purpose {
                    Purpose::NodePortTcp | Purpose::NodePortLocalTcp => Protocol::Tcp,
                    Purpose::NodePortUdp | Purpose::NodePortLocalUdp => Protocol::Udp,
                    _ => return false,
                };
                set.family == Family::of(key.address) && (*port, number(protocol)) == (key.port, key.protocol)
            }
            _ => false,
        };
        Self {
            servers: Vec::new(),
            entries: self.entries.iter().filter(concerns).copied().collect(),
            addresses: self.addresses.iter().copied().filter(|ip| *ip == key.address).collect(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.entries.is_empty() && self.addresses.is_empty()
    }
}

/// A range as sets can have it: they take no network of length 0, so that is its two halves.
fn networks(range: IpNet) -> Vec<IpNet> {
    match range.prefix_len() {
        0 => range.subnets(1).map(Iterator::collect).unwrap_or_default(),
        _ => vec![range.trunc()],
    }
}

/// Protocol number.
pub(crate) fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn virtual_server(key: Key, port: &PortPlan, scheduler: &Arc<str>) -> VirtualServer {
    // The whole address: a client is one address.
    let netmask = match port.family {
        Family::V4 => u32::MAX,
        Family::V6 => 128,
    };
    let persistent = if port.affinity_seconds.is_some() { PERSISTENT } else { 0 };
    // Without these two, mh sends whoever hashes to a server of weight 0 nowhere, and all
    // connections of a client to one server.
    let hashing = if **scheduler == *"mh" { SCHED_MH_FALLBACK | SCHED_MH_PORT } else { 0 };
    VirtualServer {
        key,
        scheduler: Arc::clone(scheduler),
        flags: persistent | hashing,
        timeout: port.affinity_seconds.unwrap_or(0),
        netmask,
    }
}

/// `None` = a mix that the plan of a backend with one pool does not have.
fn treatment(frontend: &Frontend) -> Option<Treatment> {
    use Action::{Drop, Forward, Reject};
    let forwarded = |pool, hides, drops_external| Treatment::Forwarded { pool, hides, drops_external };
    match (frontend.from_pod, frontend.from_node, frontend.from_elsewhere) {
        (Reject, Reject, Reject) => Some(Treatment::Refused),
        (Drop, Drop, Drop) => Some(Treatment::Dropped),
        (
            Forward { pool: of_pods, masquerade: pods },
            Forward { pool: of_node, masquerade: node },
            Forward { pool, masquerade },
        ) if of_pods == pool && of_node == pool => match (pods, node, masquerade) {
            (true, true, true) => Some(forwarded(pool, Hides::Everybody, false)),
            (false, true, true) => Some(forwarded(pool, Hides::AllButPods, false)),
            // The node asks from an address that is everywhere, so it is hidden all the same.
            (false, _, false) => Some(forwarded(pool, Hides::Node, false)),
            _ => None,
        },
        (Forward { pool: of_pods, masquerade: false }, Forward { pool, .. }, Drop) if of_pods == pool => {
            Some(forwarded(pool, Hides::Node, true))
        }
        // Pods that are not told from others are dropped with them.
        (Drop, Forward { pool, .. }, Drop) => Some(forwarded(pool, Hides::Node, true)),
        _ => None,
    }
}

/// The sets that a frontend is in.
fn purposes(surface: Surface, protocol: Protocol, treatment: Treatment) -> Vec<Purpose> {
    let Treatment::Forwarded { hides, drops_external, .. } = treatment else {
        // Refused by its virtual server: whatever would refuse it before has to let it by.
        let refused = match surface {
            Surface::ClusterIp(_) => Purpose::ClusterIp,
            Surface::ExternalIp(_) => Purpose::ExternalIp,
            Surface::LoadBalancerIp(_) => Purpose::LoadBalancer,
            Surface::NodePort => Purpose::node_port(protocol, false),
        };
        return if treatment == Treatment::Dropped { vec![refused, Purpose::Drop] } else { vec![refused] };
    };
    let keeps = hides == Hides::Node;
    let mut purposes = match surface {
        Surface::ClusterIp(_) if hides == Hides::Everybody => {
            vec![Purpose::ClusterIp, Purpose::ClusterIpMasquerade]
        }
        Surface::ClusterIp(_) => vec![Purpose::ClusterIp],
        Surface::ExternalIp(_) if keeps => vec![Purpose::ExternalIpLocal],
        Surface::ExternalIp(_) => vec![Purpose::ExternalIp],
        Surface::LoadBalancerIp(_) if keeps => vec![Purpose::LoadBalancer, Purpose::LoadBalancerLocal],
        Surface::LoadBalancerIp(_) => vec![Purpose::LoadBalancer],
        Surface::NodePort => vec![Purpose::node_port(protocol, keeps)],
    };
    if drops_external {
        purposes.push(Purpose::DropExternal);
    }
    purposes
}
