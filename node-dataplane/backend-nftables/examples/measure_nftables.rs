//! Times the backend in a network namespace of its own: `measure_nftables [SERVICES] [ENDPOINTS]`.
//! Needs root. For design decisions; the benchmark that is reported is `cargo xtask bench`.
#![allow(clippy::print_stdout)] // a table on the terminal is all it does

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::netns;
use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::{
    Action, Backend, ForwardingPlan, Frontend, NodePlan, NodePortScope, PodSources, Pool, PortPlan,
    ServicePlan, Surface, Target,
};

fn address(base: u32, n: u32) -> IpAddr {
    Ipv4Addr::from(base + n).into()
}

/// A Service whose last endpoint is `variant`.
fn service(n: u32, endpoints: u32, variant: u32) -> Arc<ServicePlan> {
    let port = Port::MIN.saturating_add(79);
    let pods = 0x0af0_0000; // 10.240.0.0
    let mut cluster: Vec<Target> = (0..endpoints)
        .map(|e| if e + 1 == endpoints { 0x0100_0000 + variant * 0x10_0000 + n } else { n * endpoints + e })
        .map(|offset| Target { address: address(pods, offset), port })
        .collect();
    cluster.sort_unstable();
    let forward = |masquerade| Action::Forward { pool: Pool::Cluster, masquerade };
    let frontend = Frontend {
        surface: Surface::ClusterIp(address(0x0a60_0000, n)),
        port,
        from_pod: forward(false),
        from_node: forward(true),
        from_elsewhere: forward(true),
        allowed_sources: None,
    };
    let port = PortPlan {
        family: Family::V4,
        protocol: Protocol::Tcp,
        port,
        name: "".into(),
        cluster,
        local: Vec::new(),
        hairpin: Vec::new(),
        serving: Vec::new(),
        frontends: vec![frontend],
        affinity_seconds: None,
    };
    Arc::new(ServicePlan {
        key: ServiceKey::new("default", format!("service-{n}")),
        ports: vec![port],
        required_features: Vec::new(),
        health_check: None,
        conflicts: Vec::new(),
        cluster_ips: Vec::new(),
    })
}

fn measure(services: u32, endpoints: u32) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let node = NodePlan {
        pods: Some(PodSources::Cidrs(vec!["10.240.0.0/12".parse()?])),
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::AllLocal,
        localhost_node_ports: false,
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        node_addresses: Vec::new(),
    };
    let all = (0..services).map(|n| service(n, endpoints, 0)).map(|plan| (plan.key.clone(), plan)).collect();
    let mut plan = ForwardingPlan { node, services: all };
    let mut backend = Nftables::open()?;
    let timed = |what: &str, from: Instant| println!("{what:<34} {:>12.3?}", from.elapsed());

    let start = Instant::now();
    backend.sync(&plan)?;
    timed("full programming", start);
    let start = Instant::now();
    let drift = backend.verify()?;
    timed("read back of everything", start);
    println!("drift: {}", drift.len());
    let start = Instant::now();
    backend.sync(&plan)?;
    timed("sync, nothing to write", start);

    let (mut applies, mut reads) = (Vec::new(), Vec::new());
    for round in 0..400_u32 {
        let changed = service((round * 37) % services, endpoints, 1 + round / services + round % 2);
        let keys = [changed.key.clone()];
        plan.services.insert(changed.key.clone(), changed);
        let start = Instant::now();
        backend.apply(&plan, &keys)?;
        applies.push(start.elapsed());
        let start = Instant::now();
        backend.verify()?;
        reads.push(start.elapsed());
    }
    println!("one endpoint replaced, p50         {:>12.3?}", median(&mut applies));
    println!("its read back, p50                 {:>12.3?}", median(&mut reads));
    for round in 0..3 {
        let keys: Vec<ServiceKey> = (0..services.min(1000))
            .map(|n| service(n, endpoints, 5 + round))
            .map(|changed| {
                let key = changed.key.clone();
                plan.services.insert(key.clone(), changed);
                key
            })
            .collect();
        let start = Instant::now();
        backend.apply(&plan, &keys)?;
        timed("1,000 endpoints replaced", start);
    }
    let start = Instant::now();
    backend.disturbed()?;
    timed("disturbed", start);
    let added = service(services, endpoints, 0);
    let keys = [added.key.clone()];
    plan.services.insert(added.key.clone(), added);
    let start = Instant::now();
    backend.apply(&plan, &keys)?;
    timed("one service added", start);
    let status = std::fs::read_to_string("/proc/self/status")?;
    for line in status.lines().filter(|line| line.starts_with("VmRSS") || line.starts_with("VmHWM")) {
        println!("{line}");
    }
    Ok(())
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u32>());
    let services = numbers.next().transpose()?.unwrap_or(10_000);
    let endpoints = numbers.next().transpose()?.unwrap_or(10);
    netns::run_in_new(|| measure(services, endpoints))?
}
