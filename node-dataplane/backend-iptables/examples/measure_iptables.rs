//! How much of the time is iptables' own: `measure_iptables SERVICES ENDPOINTS FLAVOUR`, as root.
//!
//! Everything happens in network namespaces of its own. The first sync is compared with the
//! same text fed to the same program by hand in a namespace without rules; every other pass shows
//! the time inside the programs and the time outside of them, which is ours.
#![allow(clippy::print_stdout)] // its results are its output

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lockstep_backend_iptables::Iptables;
use lockstep_kernel::exec::{ExecError, Output, Processes, Run};
use lockstep_kernel::netns;
use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::backend::{Applied, Backend};
use lockstep_view::{
    Action, ForwardingPlan, Frontend, NodePlan, NodePortScope, PodSources, Pool, PortPlan, ServicePlan,
    Surface, Target,
};
use lockstep_xtables::Flavour;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const LIMIT: Duration = Duration::from_secs(1800);
const ROUNDS: u32 = 5;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [services, endpoints, flavour] = &arguments[..] else {
        return Err("usage: measure SERVICES ENDPOINTS legacy|nft".into());
    };
    let flavour = Flavour::ALL
        .into_iter()
        .find(|known| known.name() == flavour.as_str())
        .ok_or_else(|| format!("{flavour}: neither legacy nor nft"))?;
    let (services, endpoints) = (services.parse()?, endpoints.parse()?);
    let input = netns::run_in_new(|| Bench::new(services, endpoints, flavour)?.run())??;
    if let Some(file) = std::env::var_os("DUMP") {
        std::fs::write(file, &input)?;
    }
    netns::run_in_new(|| raw(&input, flavour))??;
    Ok(())
}

/// One call of a program.
struct Call {
    program: String,
    input: Vec<u8>,
    took: Duration,
}

#[derive(Default)]
struct Watched(Mutex<Vec<Call>>);

impl Run for Watched {
    fn run(
        &self,
        program: &str,
        arguments: &[&str],
        stdin: &[u8],
        _: Duration,
    ) -> std::result::Result<Output, ExecError> {
        let started = Instant::now();
        let output = Processes.run(program, arguments, stdin, LIMIT);
        let (program, input, took) = (program.to_owned(), stdin.to_vec(), started.elapsed());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Call { program, input, took });
        output
    }
}

impl Watched {
    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Bench {
    watched: Arc<Watched>,
    backend: Iptables,
    plan: ForwardingPlan,
    services: u32,
    endpoints: u32,
}

impl Bench {
    fn new(services: u32, endpoints: u32, flavour: Flavour) -> Result<Self> {
        let watched = Arc::new(Watched::default());
        let backend = Iptables::open(Arc::clone(&watched) as Arc<dyn Run>, flavour)?;
        watched.take();
        let node = NodePlan {
            pods: Some(PodSources::Cidrs(vec!["10.128.0.0/9".parse()?])),
            node_ports_v4: NodePortScope::AllLocal,
            node_ports_v6: NodePortScope::AllLocal,
            localhost_node_ports: false,
            masquerade_mark: 0x4000,
            service_cidrs: Vec::new(),
            node_addresses: Vec::new(),
        };
        let all = (0..services).map(|index| service(index, endpoints, 0));
        let services_of_plan = all.map(|service| (service.key.clone(), Arc::new(service))).collect();
        let plan = ForwardingPlan { node, services: services_of_plan };
        Ok(Self { watched, backend, plan, services, endpoints })
    }

    /// Returns the input of the first sync.
    fn run(mut self) -> Result<Vec<u8>> {
        println!("{} services x {} endpoints", self.services, self.endpoints);
        let first = self.pass("first sync", |backend, plan| Ok(backend.sync(plan)?))?;
        self.pass("verify after sync", Self::verify)?;
        for round in 1..=ROUNDS {
            let service = service(self.services / 2, self.endpoints, round);
            self.change("one endpoint replaced", service)?;
        }
        for round in 0..ROUNDS {
            let service = service(self.services + round, self.endpoints, 0);
            self.change("one service added", service)?;
        }
        self.pass("sync without difference", |backend, plan| Ok(backend.sync(plan)?))?;
        let many: Vec<_> =
            (0..self.services / 2).map(|index| service(index * 2, self.endpoints, ROUNDS + 1)).collect();
        let keys: Vec<_> = many.iter().map(|service| service.key.clone()).collect();
        for service in many {
            self.plan.services.insert(service.key.clone(), Arc::new(service));
        }
        self.pass("half of all replaced", |backend, plan| Ok(backend.apply(plan, &keys)?))?;
        let more: Vec<_> = (0..self.services)
            .map(|index| service(self.services + ROUNDS + index, self.endpoints, 0))
            .collect();
        let keys: Vec<_> = more.iter().map(|service| service.key.clone()).collect();
        for service in more {
            self.plan.services.insert(service.key.clone(), Arc::new(service));
        }
        self.pass("as many again", |backend, plan| Ok(backend.apply(plan, &keys)?))?;
        self.pass("verify after that", Self::verify)?;
        let keys: Vec<_> = (0..self.services).map(|index| service(index, 0, 0).key).collect();
        keys.iter().for_each(|key| drop(self.plan.services.remove(key)));
        self.pass("half of all removed", |backend, plan| Ok(backend.apply(plan, &keys)?))?;
        self.pass("verify after that", Self::verify)?;
        let restore =
            first.into_iter().find(|call| call.program.starts_with("iptables-") && !call.input.is_empty());
        Ok(restore.ok_or("the first sync wrote nothing")?.input)
    }

    fn change(&mut self, what: &str, service: ServicePlan) -> Result<()> {
        let keys = [service.key.clone()];
        self.plan.services.insert(service.key.clone(), Arc::new(service));
        self.pass(what, |backend, plan| Ok(backend.apply(plan, &keys)?))?;
        self.pass("  and verify", Self::verify)?;
        Ok(())
    }

    fn verify(backend: &mut Iptables, _: &ForwardingPlan) -> Result<Applied> {
        match &backend.verify()?[..] {
            [] => Ok(Applied::default()),
            [first, ..] => Err(first.to_string().into()),
        }
    }

    fn pass(
        &mut self,
        what: &str,
        work: impl FnOnce(&mut Iptables, &ForwardingPlan) -> Result<Applied>,
    ) -> Result<Vec<Call>> {
        let started = Instant::now();
        let applied = work(&mut self.backend, &self.plan)?;
        let whole = started.elapsed();
        if let Some(failure) = applied.failures.first() {
            return Err(failure.message.clone().into());
        }
        // The families work side by side: what counts is the one that takes longer.
        let calls = self.watched.take();
        let inside = [false, true]
            .map(|v6| {
                calls.iter().filter(|call| call.program.starts_with("ip6") == v6).map(|call| call.took).sum()
            })
            .into_iter()
            .max()
            .unwrap_or(Duration::ZERO);
        let bytes: usize = calls.iter().map(|call| call.input.len()).sum();
        let own = whole.saturating_sub(inside);
        println!(
            "{what:24} {:9.1} ms  inside the tools {:9.1} ms  ours {:7.2} ms {:5.1} %  input {bytes} B",
            millis(whole),
            millis(inside),
            millis(own),
            100.0 * own.as_secs_f64() / whole.as_secs_f64(),
        );
        for call in &calls {
            if std::env::var_os("CALLS").is_some() {
                println!("    {} {} B {:.1} ms", call.program, call.input.len(), millis(call.took));
            }
        }
        Ok(calls)
    }
}

/// The same text, by hand.
fn raw(input: &[u8], flavour: Flavour) -> Result<()> {
    let program = format!("iptables-{flavour}-restore");
    let started = Instant::now();
    let output = Processes.run(&program, &["--noflush", "-w", "5"], input, LIMIT)?;
    if !output.success() {
        return Err(output.complaint().into());
    }
    println!("{:24} {:9.1} ms", "raw restore of the first", millis(started.elapsed()));
    Ok(())
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A Service with a cluster IP; `generation` chooses the address of its first endpoint.
fn service(index: u32, endpoints: u32, generation: u32) -> ServicePlan {
    const CLUSTER: Action = Action::Forward { pool: Pool::Cluster, masquerade: false };
    const MASQUERADED: Action = Action::Forward { pool: Pool::Cluster, masquerade: true };
    let port = |number| Port::new(number).unwrap_or(Port::MIN);
    let address = |base: u32, offset: u32| IpAddr::V4(Ipv4Addr::from_bits((base << 24) + offset));
    let mut cluster: Vec<Target> = (0..endpoints)
        .map(|nth| if nth == 0 { nth + 64 * generation } else { nth })
        .map(|nth| Target {
            address: address(10, (1 << 23) + index * 512 % (1 << 23) + nth),
            port: port(8080),
        })
        .collect();
    cluster.sort_unstable();
    let frontend = Frontend {
        surface: Surface::ClusterIp(address(172, (16 << 16) + index)),
        port: port(80),
        from_pod: CLUSTER,
        from_node: MASQUERADED,
        from_elsewhere: MASQUERADED,
        allowed_sources: None,
    };
    let plan = PortPlan {
        family: Family::V4,
        protocol: Protocol::Tcp,
        port: port(80),
        name: "http".into(),
        cluster,
        local: Vec::new(),
        hairpin: Vec::new(),
        serving: Vec::new(),
        frontends: vec![frontend],
        affinity_seconds: None,
    };
    ServicePlan {
        key: ServiceKey::new("default", format!("service-{index:05}")),
        ports: vec![plan],
        required_features: Vec::new(),
        health_check: None,
        conflicts: Vec::new(),
        cluster_ips: Vec::new(),
    }
}
