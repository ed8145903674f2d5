//! IPVS mode, from a frame's bytes to what the kernel has, against a program that writes the same
//! virtual servers, sets, addresses and chains with one batch each and knows nothing of Services. What it
//! writes is read from the kernel after Lockstep wrote it.
//!
//! Its namespaces have their loopback: without a local route IPVS takes no endpoint.
//!
//! Needs a kernel with IPVS: `cargo xtask vm run` has one. Times are those of an emulated machine, so
//! only ratios within one run say anything.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_backend_ipvs::{Ipvs, Options};
use lockstep_kernel::dummy::{self, Device as _};
use lockstep_kernel::exec::{Processes, Run};
use lockstep_kernel::ipset::{self, Declaration, Entry, Kind, Sets as _};
use lockstep_kernel::ipvs::{self, Ipvs as _, Key, RealServer, Request, VirtualServer};
use lockstep_model::Family;
use lockstep_view::Backend as _;
use lockstep_xtables::{Flavour, Tool};

use super::cluster::{Replaced, Upstream};
use super::node::{Node, Times, program, session};
use super::programs::in_network;

/// The flavour of the fixed chains.
const FLAVOUR: Flavour = Flavour::Nft;

/// Times that one set-up of a size gives.
#[derive(Debug, Default)]
pub struct Measured {
    /// From decoded state to the whole in the kernel, the fixed chains of iptables included.
    pub full: Times,
    /// One endpoint replaced, from the frame's bytes to done.
    pub swap: Times,
    /// Reading back what that touched.
    pub verify: Times,
    /// One endpoint replaced raw, whatever connections the old one has.
    pub cut: Vec<Duration>,
    /// Virtual servers in the kernel.
    pub servers: usize,
}

/// What the kernel has.
#[derive(Debug, PartialEq, Eq)]
struct Copy {
    servers: Vec<(VirtualServer, Vec<RealServer>)>,
    sets: Vec<(Declared, Vec<Entry>)>,
    addresses: Vec<IpAddr>,
    /// As the tool of each family prints them.
    chains: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Declared {
    name: String,
    kind: Kind,
    v6: bool,
    max_elements: u32,
}

/// Every interface to the kernel.
struct Kernel {
    servers: ipvs::Kernel,
    sets: ipset::Kernel,
    device: dummy::Kernel,
    tools: Vec<Tool>,
}

impl Kernel {
    fn open() -> Result<Self> {
        let (servers, sets) = (ipvs::Kernel::open()?, ipset::Kernel::open()?);
        let run: Arc<dyn Run> = Arc::new(Processes);
        let tools = Family::ALL.map(|family| Tool::new(Arc::clone(&run), FLAVOUR, family));
        Ok(Self { servers, sets, device: dummy::Kernel::open("kube-ipvs0")?, tools: tools.into() })
    }
}

impl Copy {
    fn read(kernel: &mut Kernel) -> Result<Self> {
        let kinds =
            [Kind::HashIp, Kind::HashIpPort, Kind::HashIpPortIp, Kind::HashIpPortNet, Kind::BitmapPort];
        let mut servers = Vec::new();
        for server in kernel.servers.virtual_servers()? {
            let mut reals: Vec<RealServer> =
                kernel.servers.real_servers(server.key)?.into_iter().map(|(real, _)| real).collect();
            reals.sort_unstable();
            servers.push((server, reals));
        }
        servers.sort_by_key(|(server, _)| server.key);
        let mut sets = Vec::new();
        for header in kernel.sets.headers()? {
            let kind = kinds.into_iter().find(|kind| kind.type_name() == header.type_name);
            let kind = kind.with_context(|| format!("set {} is a {}", header.name, header.type_name))?;
            let mut entries = kernel.sets.entries(&header.name, kind)?.context("a set went away")?;
            entries.sort_unstable();
            let (name, v6, max_elements) = (header.name, header.v6, header.max_elements);
            sets.push((Declared { name, kind, v6, max_elements }, entries));
        }
        sets.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        let addresses = kernel.device.addresses()?.context("no interface")?;
        let saved = kernel.tools.iter().map(Tool::save).collect::<Result<Vec<_>, _>>()?;
        // The comments have the time in them.
        let rules = |text: &String| {
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(|line| format!("{line}\n")).collect()
        };
        Ok(Self { servers, sets, addresses, chains: saved.iter().map(rules).collect() })
    }

    fn write(&self, kernel: &mut Kernel) -> Result<()> {
        kernel.device.ensure()?;
        for (set, entries) in &self.sets {
            let Declared { name, kind, v6, max_elements } = set;
            let (kind, v6, max_elements) = (*kind, *v6, *max_elements);
            kernel.sets.create(&Declaration { name: name.clone(), kind, v6, max_elements })?;
            kernel.sets.change(name, entries, &[])?;
        }
        let mut requests = Vec::new();
        for (server, reals) in &self.servers {
            requests.push(Request::Add(server.clone()));
            requests.extend(reals.iter().map(|real| Request::AddReal(server.key, *real)));
        }
        commit(kernel, &requests)?;
        let refused = kernel.device.change(&self.addresses, &[])?;
        ensure!(refused.is_empty(), "{:?}", refused.first());
        for (tool, chains) in kernel.tools.iter().zip(&self.chains) {
            tool.restore(chains)?;
        }
        Ok(())
    }
}

/// Replaces one endpoint after the other.
struct Swaps {
    at: usize,
    servers: Vec<(Key, RealServer)>,
}

impl Swaps {
    /// Returns the virtual server, the endpoint that goes and the one that comes.
    fn next(&mut self) -> (Key, RealServer, RealServer) {
        self.at = (self.at + 7919) % self.servers.len();
        let (key, real) = &mut self.servers[self.at];
        let old = *real;
        real.port ^= 0x4000;
        (*key, old, *real)
    }

    /// As it must be where connections are to go on: no new ones to the old endpoint, and it goes only
    /// once it is known to have none.
    fn swap(&mut self, kernel: &mut Kernel) -> Result<Duration> {
        let start = Instant::now();
        let (key, old, new) = self.next();
        commit(
            kernel,
            &[Request::AddReal(key, new), Request::SetReal(key, RealServer { weight: 0, ..old })],
        )?;
        let all = kernel.servers.real_servers(key)?;
        let found = all.iter().find(|(real, _)| (real.address, real.port) == (old.address, old.port));
        let (_, connections) = found.context("the old endpoint")?;
        ensure!(connections.active + connections.inactive == 0, "somebody talks to {}", old.address);
        commit(kernel, &[Request::RemoveReal(key, old.address, old.port)])?;
        Ok(start.elapsed())
    }

    /// As it is done where connections are cut.
    fn cut(&mut self, kernel: &mut Kernel) -> Result<Duration> {
        let start = Instant::now();
        let (key, old, new) = self.next();
        commit(kernel, &[Request::AddReal(key, new), Request::RemoveReal(key, old.address, old.port)])?;
        Ok(start.elapsed())
    }
}

fn commit(kernel: &mut Kernel, requests: &[Request]) -> Result<()> {
    let refused = kernel.servers.commit(requests)?;
    ensure!(refused.is_empty(), "{:?}", refused.first());
    Ok(())
}

fn open() -> Result<Ipvs> {
    let run: Arc<dyn Run> = Arc::new(Processes);
    Ok(Ipvs::open(&run, FLAVOUR, Options::default())?)
}

/// Measures everything at one size, in namespaces that end with it.
pub fn measure(services: u32, loads: usize, swaps: usize) -> Result<Measured> {
    let mut upstream = Upstream::new(services);
    let session = session(upstream.greeting()?)?;
    let mut measured = Measured::default();
    let mut copy = None;
    for repetition in 0..=loads {
        let total = in_network(|| {
            let mut backend = open()?;
            let (_, total, _) = program(session.state(), session.node().clone(), &mut backend)?;
            if copy.is_none() {
                copy = Some(Copy::read(&mut Kernel::open()?)?);
            }
            Ok(total)
        })?;
        let copy = copy.as_ref().context("no copy")?;
        let raw = in_network(|| {
            let mut kernel = Kernel::open()?;
            let start = Instant::now();
            copy.write(&mut kernel)?;
            let raw = start.elapsed();
            if repetition == 0 {
                ensure!(Copy::read(&mut kernel)? == *copy, "the raw limit wrote another state");
            }
            Ok(raw)
        })?;
        // The first pair warms the caches of both.
        if repetition > 0 || loads == 0 {
            measured.full.lockstep.push(total);
            measured.full.raw.push(raw);
        }
    }
    let copy = copy.context("nothing was loaded")?;
    measured.servers = copy.servers.len();
    in_network(|| {
        let mut backend = open()?;
        let (view, ..) = program(session.state(), session.node().clone(), &mut backend)?;
        ensure!(backend.verify()?.is_empty(), "not as written");
        let mut node = Node { session, view, backend };
        in_network(|| {
            let mut kernel = Kernel::open()?;
            copy.write(&mut kernel)?;
            let pairs =
                copy.servers.iter().flat_map(|(server, reals)| reals.iter().map(|real| (server.key, *real)));
            let mut raw = Swaps { at: 0, servers: pairs.collect() };
            for _ in 0..swaps {
                let event = upstream.replace(Replaced::ONE);
                let frames = upstream.publish(event)?;
                node.receive(frames, &mut measured.swap)?;
                measured.swap.raw.push(raw.swap(&mut kernel)?);
                measured.cut.push(raw.cut(&mut kernel)?);
                let start = Instant::now();
                ensure!(node.backend.verify()?.is_empty(), "not as written");
                measured.verify.lockstep.push(start.elapsed());
            }
            Ok(())
        })
    })?;
    Ok(measured)
}
