//! Random histories: what came step by step, with faults between, is what a fresh process would make.

use super::*;

const ADDRESSES: [&str; 3] = ["10.96.1.1", "10.96.1.2", "203.0.113.9"];
const ENDPOINTS: [&str; 4] = [A, B, C, "10.244.2.2"];
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn some_service(rng: &mut fastrand::Rng, name: &str) -> ServicePlan {
    let endpoints: Vec<&str> = ENDPOINTS.into_iter().filter(|_| rng.bool()).collect();
    let local: Vec<&str> = endpoints.iter().copied().filter(|_| rng.bool()).collect();
    let mut service = service(name, Vec::new());
    // The view gives an address to one Service only.
    let own = NAMES.iter().position(|other| *other == name).unwrap();
    for number in [80, 81] {
        let verdicts = match (endpoints.is_empty(), local.is_empty()) {
            (true, _) => [Action::Reject; 3],
            (_, true) => NONE_LOCAL,
            _ => EXTERNAL_LOCAL,
        };
        let internal = if endpoints.is_empty() { [Action::Reject; 3] } else { INTERNAL };
        let at_number = 100 * u16::try_from(own).unwrap() + number;
        let mut frontends = vec![
            at(Surface::ClusterIp(ip(ADDRESSES[own % 2])), at_number, internal),
            at(Surface::LoadBalancerIp(ip(ADDRESSES[2])), at_number, verdicts),
            at(Surface::NodePort, 30000 + at_number, verdicts),
        ];
        frontends.retain(|_| rng.u8(..4) > 0);
        if let Some(frontend) = frontends.first_mut().filter(|_| rng.bool()) {
            frontend.allowed_sources = Some(["10.0.0.0/8".parse().unwrap()].into());
        }
        let mut port = port_plan(&endpoints, &local, frontends);
        port.affinity_seconds = rng.bool().then_some(10);
        service.ports.push(port);
    }
    service
}

#[test]
fn a_history_with_faults_ends_where_a_fresh_start_does() {
    for seed in 0..300 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let kernel = Kernel::new();
        let mut backend = kernel.start();
        let mut services: BTreeMap<&str, ServicePlan> = BTreeMap::new();
        let mut behind: std::collections::BTreeSet<&str> = std::collections::BTreeSet::new();
        let mut whole = true;
        for _ in 0..rng.usize(5..25) {
            for _ in 0..rng.usize(1..3) {
                let name = NAMES[rng.usize(..NAMES.len())];
                behind.insert(name);
                match rng.u8(..4) {
                    0 => drop(services.remove(name)),
                    _ => drop(services.insert(name, some_service(&mut rng, name))),
                }
            }
            match rng.u8(..8) {
                0 => kernel.servers.lock().fail = Some((rng.usize(1..3), Errno::NOMEM)),
                1 => kernel.sets.lock().fail = Some((rng.usize(1..3), Errno::NOMEM)),
                2 => kernel.device.lock().fail = Some((1, Errno::NOMEM)),
                3 if whole => kernel.rules.lock_once(),
                4 => {
                    // Killed.
                    backend = kernel.start();
                    whole = true;
                }
                _ => {}
            }
            let plan = plan(services.values().cloned());
            let changed: Vec<ServiceKey> =
                behind.iter().map(|name| ServiceKey::new("default", *name)).collect();
            let written = if whole { backend.sync(&plan) } else { backend.apply(&plan, &changed) };
            whole = written.is_err();
            if let Ok(applied) = written {
                assert_eq!(applied.failures, [], "seed {seed}");
                behind.clear();
            }
            kernel.servers.lock().fail = None;
            kernel.sets.lock().fail = None;
            kernel.device.lock().fail = None;
        }
        let last = plan(services.values().cloned());
        if whole || !behind.is_empty() {
            sync(&mut backend, &last);
        }
        assert_eq!(backend.verify().unwrap(), [], "seed {seed}");
        assert_eq!(backend.audit(Duration::from_secs(60)).unwrap().drift, [], "seed {seed}");
        let fresh = Kernel::new();
        sync(&mut fresh.start(), &last);
        assert_eq!(kernel.contents(), fresh.contents(), "seed {seed}");
        assert_eq!(sync(&mut kernel.start(), &last).objects_changed, 0, "seed {seed}");
    }
}
