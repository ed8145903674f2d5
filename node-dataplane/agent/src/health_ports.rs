//! Health-check node ports: one HTTP server per Service that load balancers ask whether this
//! node has an endpoint.
//!
//! ```text
//! reconcile thread ──committed: bind or close, set counts──> sockets
//!                                                              └──> tokio: answers from the counts
//! ```
//!
//! A port is bound in the pass that brings its Service, so that an Ack which follows knows
//! whether that worked. Counts change after the commit of the rules they speak of, never before.
//! A port that somebody else has is tried again; nothing but that Service's health check is
//! concerned.

mod answer;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_model::{Family, Port, ServiceKey};
use lockstep_view::{ForwardingPlan, HealthCheck, NodePlan, NodePortScope};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::follow_up::{Complaint, ComplaintKind, FollowUp};
use crate::status::Status;
use answer::Count;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// A port that is taken is tried again: first, and at most.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Servers of all health-check node ports.
#[derive(Debug)]
pub struct HealthPorts {
    runtime: Handle,
    status: Arc<Status>,
    /// Families that Services are planned for.
    families: Vec<Family>,
    services: BTreeMap<ServiceKey, Served>,
    /// Where node ports answer, as of the last pass.
    addresses: Vec<IpAddr>,
    changed: bool,
}

/// The health check of one Service.
#[derive(Debug)]
struct Served {
    port: Port,
    count: Arc<Count>,
    open: BTreeMap<IpAddr, Open>,
    fault: Option<Fault>,
}

/// A socket that listens. Dropping it closes it.
#[derive(Debug)]
struct Open {
    socket: Socket,
    /// Dropped with this, which ends the task that answers, and its connections.
    _task: oneshot::Sender<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // The task ends in its own time, but the port is free for another Service at once. A
        // socket that is not connected has nothing that could fail here.
        let _ = self.socket.shutdown(Shutdown::Read);
    }
}

#[derive(Debug)]
struct Fault {
    kind: ComplaintKind,
    message: String,
    attempts: u32,
    retry_at: Instant,
}

impl HealthPorts {
    /// None yet. Answers are given by `runtime`; the network namespace is that of whoever calls.
    pub fn new(runtime: Handle, status: Arc<Status>, families: Vec<Family>) -> Self {
        let services = BTreeMap::new();
        Self { runtime, status, families, services, addresses: Vec::new(), changed: false }
    }

    /// Closes the port of a Service that has none any more, or another.
    fn close(&mut self, key: &ServiceKey, plan: &ForwardingPlan) {
        let wanted = health_check(plan, key).map(|check| check.port);
        if self.services.get(key).is_some_and(|served| Some(served.port) != wanted) {
            self.changed |= self.services.remove(key).is_some_and(|served| served.fault.is_some());
        }
    }

    /// Brings a Service whose port is not another's any more to what the plan says.
    fn place(&mut self, key: &ServiceKey, plan: &ForwardingPlan, now: Instant) {
        let Some(check) = health_check(plan, key) else { return };
        let served = self.services.entry(key.clone()).or_insert_with(|| Served {
            port: check.port,
            count: Arc::new(Count::new(key)),
            open: BTreeMap::new(),
            fault: None,
        });
        served.count.set(check.local_endpoints);
        served.open.retain(|address, _| self.addresses.contains(address));
        self.open(key, now);
    }

    /// Opens what is not open of a Service.
    fn open(&mut self, key: &ServiceKey, now: Instant) {
        let Some(served) = self.services.get_mut(key) else { return };
        let before = served.fault.take();
        for address in &self.addresses {
            if served.open.contains_key(address) {
                continue;
            }
            let at = SocketAddr::new(*address, served.port.get());
            match listen(at) {
                Ok((socket, listener)) => {
                    let (task, closed) = oneshot::channel();
                    let (count, status) = (served.count.clone(), self.status.clone());
                    self.runtime.spawn(answer::serve(listener, count, status, closed));
                    served.open.insert(*address, Open { socket, _task: task });
                }
                // This machine has none of that family at all.
                Err(error) if address.is_unspecified() && error.raw_os_error() == Some(EAFNOSUPPORT) => {}
                Err(error) => {
                    let attempts = before.as_ref().map_or(1, |before| before.attempts.saturating_add(1));
                    let wait = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(attempts - 1)).min(LAST_RETRY);
                    let kind = match error.kind() {
                        io::ErrorKind::AddrInUse => ComplaintKind::Conflict,
                        _ => ComplaintKind::Kernel,
                    };
                    let message = format!(
                        "spec.healthCheckNodePort of {key}: cannot listen at {at}, so load balancers are not answered: {error}"
                    );
                    served.fault = Some(Fault { kind, message, attempts, retry_at: now + wait });
                }
            }
        }
        self.changed |= before.is_some() || served.fault.is_some();
    }
}

impl FollowUp for HealthPorts {
    fn committed(
        &mut self,
        plan: &ForwardingPlan,
        changed: Option<&[ServiceKey]>,
        failed: &dyn Fn(&ServiceKey) -> bool,
    ) {
        let now = Instant::now();
        let concerned: Vec<ServiceKey> = match changed {
            None => {
                self.addresses = addresses(&plan.node, &self.families);
                let wanted = plan.services.keys().filter(|key| health_check(plan, key).is_some());
                let all: BTreeSet<&ServiceKey> = wanted.chain(self.services.keys()).collect();
                all.into_iter().filter(|key| !failed(key)).cloned().collect()
            }
            Some(changed) => {
                let concerned = |key: &&ServiceKey| {
                    (self.services.contains_key(*key) || health_check(plan, key).is_some()) && !failed(key)
                };
                changed.iter().filter(concerned).cloned().collect()
            }
        };
        // A port that one Service gives up may be another's.
        concerned.iter().for_each(|key| self.close(key, plan));
        concerned.iter().for_each(|key| self.place(key, plan, now));
    }

    fn complaints(&mut self) -> Option<Vec<Complaint>> {
        let now = Instant::now();
        let due = |served: &Served| served.fault.as_ref().is_some_and(|fault| fault.retry_at <= now);
        let due: Vec<ServiceKey> =
            self.services.iter().filter(|(_, served)| due(served)).map(|(key, _)| key.clone()).collect();
        due.iter().for_each(|key| self.open(key, now));
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let faults = self.services.iter().filter_map(|(key, served)| Some((key, served.fault.as_ref()?)));
        let complaint = |(key, fault): (&ServiceKey, &Fault)| Complaint {
            service: key.clone(),
            kind: fault.kind,
            message: fault.message.clone(),
        };
        Some(faults.map(complaint).collect())
    }
}

/// `EAFNOSUPPORT`.
const EAFNOSUPPORT: i32 = 97;

fn health_check(plan: &ForwardingPlan, key: &ServiceKey) -> Option<HealthCheck> {
    plan.services.get(key)?.health_check
}

/// Where node ports answer. Unspecified = at every address of the family.
fn addresses(node: &NodePlan, families: &[Family]) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for family in families {
        match node.node_ports(*family) {
            NodePortScope::AllLocal => addresses.push(match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            }),
            NodePortScope::Addresses(some) => addresses.extend(some),
        }
    }
    addresses
}

/// A socket of one family alone, so that both can listen at every address.
fn listen(at: SocketAddr) -> io::Result<(Socket, TcpListener)> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // As Go's: connections of an earlier process that are not forgotten yet are no obstacle.
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok((socket.try_clone()?, socket.into()))
}
