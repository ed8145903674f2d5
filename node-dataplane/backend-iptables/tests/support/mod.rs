//! The backend on the real tools, in network namespaces that end with each test, and plans for it.
#![allow(dead_code)] // every test binary uses a part
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockstep_backend_iptables::Iptables;
use lockstep_kernel::exec::{ExecError, Output, Processes, Run};
use lockstep_kernel::netns;
use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::{
    Action, ForwardingPlan, Frontend, NodePlan, NodePortScope, PodSources, Pool, PortPlan, ServicePlan,
    Surface, Target,
};
use lockstep_xtables::Flavour;

/// The real programs; remembers what was fed to restore, and how often everything was read.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) inputs: Mutex<Vec<String>>,
    pub(crate) saves: AtomicUsize,
    /// A command that somebody else gives right after the next restore.
    pub(crate) beside: Mutex<Option<String>>,
    /// A command that somebody else gives right after everything of IPv4 was read.
    pub(crate) behind_save: Mutex<Option<String>>,
}

impl Run for Recorder {
    fn run(
        &self,
        program: &str,
        arguments: &[&str],
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Output, ExecError> {
        if !stdin.is_empty() {
            self.inputs.lock().unwrap().push(String::from_utf8(stdin.to_vec()).unwrap());
        }
        self.saves.fetch_add(usize::from(program.ends_with("-save")), Ordering::Relaxed);
        let output = Processes.run(program, arguments, stdin, limit);
        if !stdin.is_empty()
            && let Some(command) = self.beside.lock().unwrap().take()
        {
            sh(&command);
        }
        if program.ends_with("-save")
            && program.starts_with("iptables")
            && let Some(command) = self.behind_save.lock().unwrap().take()
        {
            sh(&command);
        }
        output
    }
}

impl Recorder {
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.inputs.lock().unwrap())
    }

    pub(crate) fn take_saves(&self) -> usize {
        self.saves.swap(0, Ordering::Relaxed)
    }
}

pub(crate) fn everywhere(test: impl Fn(Flavour) + Sync) {
    for flavour in Flavour::ALL {
        netns::run_in_new(|| {
            sh("ip link set lo up");
            test(flavour);
        })
        .expect("these tests make network namespaces and need root");
    }
}

pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Everything in both families, without what changes by itself.
pub(crate) fn saved(flavour: Flavour) -> String {
    let all = sh(&format!("iptables-{flavour}-save; ip6tables-{flavour}-save"));
    all.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
}

pub(crate) fn open(flavour: Flavour) -> (Iptables, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let backend = Iptables::open(recorder.clone() as Arc<dyn Run>, flavour).unwrap();
    recorder.take();
    (backend, recorder)
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

pub(crate) const CLUSTER: Action = Action::Forward { pool: Pool::Cluster, masquerade: false };
pub(crate) const CLUSTER_MASQUERADED: Action = Action::Forward { pool: Pool::Cluster, masquerade: true };

pub(crate) fn frontend(surface: Surface, number: u16, actions: [Action; 3]) -> Frontend {
    let [from_pod, from_node, from_elsewhere] = actions;
    Frontend { surface, port: port(number), from_pod, from_node, from_elsewhere, allowed_sources: None }
}

/// A Service with a cluster IP and a node port in both families.
pub(crate) fn service(name: &str, index: u16, endpoints: u8) -> ServicePlan {
    let ports = Family::ALL
        .into_iter()
        .map(|family| {
            let (high, low) = (index >> 8, index & 255);
            let (vip, prefix) = match family {
                Family::V4 => (format!("10.96.{high}.{low}"), format!("10.244.{low}.")),
                Family::V6 => (format!("fd00:96::{index:x}"), format!("fd00:244::{index:x}:")),
            };
            let target = |last| Target { address: ip(&format!("{prefix}{last}")), port: port(8080) };
            let actions = match endpoints {
                0 => [Action::Reject; 3],
                _ => [CLUSTER, CLUSTER_MASQUERADED, CLUSTER_MASQUERADED],
            };
            let outside = if endpoints == 0 { Action::Reject } else { CLUSTER_MASQUERADED };
            PortPlan {
                family,
                protocol: Protocol::Tcp,
                port: port(80),
                name: "http".into(),
                cluster: (1..=endpoints).map(target).collect(),
                local: Vec::new(),
                hairpin: Vec::new(),
                serving: Vec::new(),
                frontends: vec![
                    frontend(Surface::ClusterIp(ip(&vip)), 80, actions),
                    frontend(Surface::NodePort, 30000 + index, [outside; 3]),
                ],
                affinity_seconds: None,
            }
        })
        .collect();
    ServicePlan {
        key: ServiceKey::new("default", name),
        ports,
        required_features: Vec::new(),
        health_check: None,
        conflicts: Vec::new(),
        cluster_ips: Vec::new(),
    }
}

pub(crate) fn plan(services: impl IntoIterator<Item = ServicePlan>) -> ForwardingPlan {
    let cidrs = ["10.244.0.0/16", "fd00:244::/32"].map(|cidr| cidr.parse().unwrap());
    let node = NodePlan {
        pods: Some(PodSources::Cidrs(cidrs.into())),
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::AllLocal,
        localhost_node_ports: false,
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        node_addresses: Vec::new(),
    };
    let services = services.into_iter().map(|service| (service.key.clone(), Arc::new(service))).collect();
    ForwardingPlan { node, services }
}

pub(crate) fn set(plan: &mut ForwardingPlan, service: ServicePlan) -> [ServiceKey; 1] {
    let key = service.key.clone();
    plan.services.insert(key.clone(), Arc::new(service));
    [key]
}

pub(crate) fn three() -> ForwardingPlan {
    plan([service("a", 1, 3), service("b", 2, 0), service("nginx-basic", 3, 1)])
}
