//! One look at the flows.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use lockstep_kernel::conntrack::{self, Conntrack};
use lockstep_kernel::{netlink, route};
use lockstep_model::{Family, Port};
use lockstep_view::Target;
use lockstep_view::stale::{Fate, Flow, UdpFrontends};

use super::{Metrics, Sweep, Work};

const UDP: u8 = 17;

/// Sweeps the kernel of the network namespace of the thread that does it. Its sockets are
/// opened with the first sweep, and anew after a failure.
pub fn kernel(metrics: Metrics) -> Sweep {
    let mut open = None;
    Box::new(move |work| {
        let (mut flows, mut routes) = match open.take() {
            Some(open) => open,
            None => (conntrack::Kernel::open()?, route::Kernel::open()?),
        };
        sweep(&mut flows, &mut |address| routes.is_local(address), work, &metrics)?;
        open = Some((flows, routes));
        Ok(())
    })
}

/// Lists the UDP flows once per family that is concerned, and cuts what is stale.
pub(super) fn sweep(
    kernel: &mut dyn Conntrack,
    is_local: &mut dyn FnMut(IpAddr) -> Result<bool, netlink::Error>,
    work: &Work,
    metrics: &Metrics,
) -> Result<(), netlink::Error> {
    let frontends = UdpFrontends::of(&work.node, work.services.iter().map(|service| &**service));
    for family in frontends.families() {
        let started = Instant::now();
        let result = sweep_family(kernel, is_local, &frontends, family);
        metrics.swept(family, started.elapsed(), &result);
        let cut = result?;
        if cut > 0 {
            tracing::info!(cut, ?family, "cut stale UDP flows");
        }
    }
    Ok(())
}

fn sweep_family(
    kernel: &mut dyn Conntrack,
    is_local: &mut dyn FnMut(IpAddr) -> Result<bool, netlink::Error>,
    frontends: &UdpFrontends<'_>,
    family: Family,
) -> Result<usize, netlink::Error> {
    let (mut stale, mut perhaps) = (Vec::new(), Vec::new());
    kernel.flows(family == Family::V6, UDP, &mut |tracked| {
        let Some(flow) = flow(tracked) else { return };
        match frontends.fate(&flow) {
            Fate::Keep => {}
            Fate::Cut => stale.push(*tracked),
            Fate::CutIfLocal => perhaps.push(*tracked),
        }
    })?;
    // Asked once per address, of which a node has few.
    let mut known = HashMap::new();
    for tracked in perhaps {
        let address = tracked.destination.ip();
        let local = match known.get(&address) {
            Some(local) => *local,
            None => *known.entry(address).or_insert(is_local(address)?),
        };
        if local {
            stale.push(tracked);
        }
    }
    kernel.end(&stale)
}

fn flow(tracked: &conntrack::Flow) -> Option<Flow> {
    let target = |at: SocketAddr| Some(Target { address: at.ip(), port: Port::new(at.port())? });
    Some(Flow { destination: target(tracked.destination)?, answers: target(tracked.answers_from)? })
}
