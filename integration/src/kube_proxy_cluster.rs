//! A cluster whose nodes run the real kube-proxy, once per mode, all at one API server: every
//! change of objects is made once and looked at in all modes.
//!
//! In the guest that is IPVS alone, which other kernels may lack, and the API server is outside of it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::apiserver::Server;
use crate::guest;
use crate::kube_proxy;
use crate::lab::{Family, Lab, Place};
use crate::objects::Objects;
use crate::product::{Mode, PATIENCE, Process, binaries, node_manifest, start_pods, wait_until};
use crate::relay::Relay;
use crate::scenario::{Network, Proxy, Subject};
use crate::traffic::{Outcome, POD_PORT, Transport, probe_within};

/// How long the marker's answer is waited for before it is asked again.
const MARKER_PATIENCE: Duration = Duration::from_millis(50);
/// How long those who wait rest in IPVS mode: they are many, and a go takes seconds.
const IPVS_POLL: Duration = Duration::from_millis(250);
/// Connections in a row that end in the node's own zone: of three, the odds that they do so by
/// chance are 1 in 500,000.
const IN_ZONE: usize = 12;
/// How long a kube-proxy may take to learn the zone of its node, which takes it a second.
const ZONE_PATIENCE: Duration = Duration::from_secs(10);
/// The same in IPVS mode, where the first programming takes most of it.
const ZONE_PATIENCE_IN_IPVS: Duration = Duration::from_secs(30);
/// How often one that does not is started again.
const ZONE_RESTARTS: u8 = 3;

/// Networks of the same shape, one per mode. Fields end in order: who asks before who answers.
#[derive(Debug)]
pub struct KubeProxyCluster {
    networks: Vec<ProxyNetwork>,
    _always: Objects,
    server: Server,
    runtime: Runtime,
}

/// The network of one mode.
#[derive(Debug)]
struct ProxyNetwork {
    mode: Mode,
    proxies: Vec<Process>,
    relay: Relay,
    _pods: Vec<Process>,
    lab: Lab,
}

/// Somebody's share of the cluster: objects of its own, beside those of others.
#[derive(Debug)]
pub struct Share<'a> {
    cluster: &'a KubeProxyCluster,
    objects: Objects,
    marker: Marker,
}

/// A Service that changes after all else, so that who sees its change has everything before.
///
/// kube-proxy acknowledges nothing. It takes Services and EndpointSlices from two watches, each
/// in order, and programs all it has in one go. So the marker changes in both: its port is of
/// the Service, its endpoint of the slice.
///
/// In IPVS mode a go has many steps, and new virtual servers are among the first. So once a change is seen
/// the port moves again: who sees that has begun another go, and is done with the one before.
#[derive(Debug)]
struct Marker {
    number: u8,
    objects: Objects,
    port: u16,
    pod: Place,
}

impl KubeProxyCluster {
    /// The modes that it has here.
    pub fn modes() -> Vec<Mode> {
        if guest::is_here() { vec![Mode::Ipvs] } else { Mode::ALL.to_vec() }
    }

    /// Starts everything: `nodes` nodes with `pods` pods each, in every mode. `always` are
    /// objects beside everybody's.
    pub fn start(nodes: u8, pods: u8, always: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let server = runtime.block_on(Server::find())?;
        let mut objects = Objects::new(runtime.block_on(server.cluster())?);
        // A node finds its own addresses once, at the start.
        runtime.block_on(objects.make(&format!("{}---\n{always}", node_manifest(nodes))))?;
        let start = |mode| ProxyNetwork::start(mode, Lab::new(nodes, pods)?, &server);
        let networks = Self::modes().into_iter().map(start).collect::<Result<_>>()?;
        let mut this = Self { networks, _always: objects, server, runtime };
        this.wait_for_zones(nodes)?;
        Ok(this)
    }

    /// Waits until every kube-proxy knows the zone of its node, which comes by a watch that no
    /// marker is in: a Service whose endpoints are meant for their own zones is answered by the
    /// node's own pod alone. Now and then one never learns it, having read its Node too early; that
    /// one is started again.
    fn wait_for_zones(&mut self, nodes: u8) -> Result<()> {
        let addresses = ["10.96.254.1", "fd00:96::fe01"];
        let mut manifests = vec![service("zones", addresses, 80)];
        for family in [Family::V4, Family::V6] {
            let endpoint = |node| {
                json!({
                    "addresses": [Place::Pod(node, 1).address(family)],
                    "nodeName": Place::Node(node).to_string(),
                    "hints": {"forZones": [{"name": format!("zone{node}")}]},
                })
            };
            manifests.push(slice("zones", family, (1..=nodes).map(endpoint).collect()));
        }
        let mut objects = Objects::new(self.runtime.block_on(self.server.cluster())?);
        self.runtime.block_on(objects.make(&manifests.join("\n---\n")))?;
        for network in &mut self.networks {
            for node in 1..=nodes {
                let mut restarts = 0;
                let asked = &addresses[..kube_proxy::families(network.mode).len()];
                while let Err(error) = asked.iter().try_for_each(|address| network.knows_zone(node, address))
                {
                    ensure!(restarts < ZONE_RESTARTS, "{error:#}\n{}", network.logs());
                    restarts += 1;
                    network.restart(node)?;
                }
            }
        }
        self.runtime.block_on(objects.make(""))
    }

    /// That many shares, their markers known everywhere.
    pub fn shares(&self, count: u8) -> Result<Vec<Share<'_>>> {
        let objects = || anyhow::Ok(Objects::new(self.runtime.block_on(self.server.cluster())?));
        let mut shares = Vec::new();
        for number in 1..=count {
            let mut marker = Marker { number, objects: objects()?, port: 1024, pod: Place::Pod(1, 1) };
            self.runtime.block_on(marker.make())?;
            shares.push(Share { cluster: self, objects: objects()?, marker });
        }
        shares.iter().try_for_each(|share| self.wait_for(&share.marker))?;
        Ok(shares)
    }

    /// Waits until every node of every mode has the last change of a marker, in both families.
    fn wait_for(&self, marker: &Marker) -> Result<()> {
        for network in &self.networks {
            for node in 1..=network.lab.nodes() {
                for &family in kube_proxy::families(network.mode) {
                    let place = Place::Node(node);
                    wait_until("kube-proxy has what was changed", PATIENCE, || {
                        Ok(marker.is_seen(network, place, family)?.then_some(()))
                    })
                    .with_context(|| format!("{}, {place}, {family}", network.mode.name()))
                    .with_context(|| network.logs())?;
                }
            }
        }
        Ok(())
    }
}

impl Share<'_> {
    /// Moves the marker's port, and waits until that is seen everywhere.
    fn await_go(&mut self) -> Result<()> {
        self.marker.port += 1;
        self.cluster.runtime.block_on(self.marker.make())?;
        self.cluster.wait_for(&self.marker)
    }
}

impl Subject for Share<'_> {
    fn make(&mut self, objects: &str) -> Result<()> {
        self.cluster.runtime.block_on(self.objects.make(objects))?;
        self.marker.move_pod();
        self.await_go()?;
        if KubeProxyCluster::modes().contains(&Mode::Ipvs) {
            self.await_go()?;
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.cluster.runtime.block_on(self.objects.make(""))
    }

    fn networks(&self) -> Vec<Network<'_>> {
        let all = self.cluster.networks.iter();
        all.map(|it| Network { lab: &it.lab, proxy: Proxy::KubeProxy, mode: it.mode }).collect()
    }
}

impl ProxyNetwork {
    fn start(mode: Mode, lab: Lab, server: &Server) -> Result<Self> {
        let pods = start_pods(&lab, &binaries()?)?;
        let relay = Relay::open(&lab, server.kubeconfig())?;
        let start = |node| kube_proxy::start_prompt(&lab, node, mode, relay.kubeconfig());
        let proxies = (1..=lab.nodes()).map(start).collect::<Result<_>>()?;
        Ok(Self { mode, proxies, relay, _pods: pods, lab })
    }

    /// Waits until a node's own pod alone answers at an address that all zones have.
    fn knows_zone(&self, node: u8, address: &str) -> Result<()> {
        let to = SocketAddr::new(address.parse()?, 80);
        let own = || -> Result<bool> {
            let outcome = probe_within(&self.lab, Place::Node(node), Transport::Tcp, to, MARKER_PATIENCE)?;
            Ok(matches!(outcome, Outcome::Answered { by, .. } if by == Place::Pod(node, 1)))
        };
        let patience = if self.mode == Mode::Ipvs { ZONE_PATIENCE_IN_IPVS } else { ZONE_PATIENCE };
        wait_until("kube-proxy knows the zone of its node", patience, || {
            for _ in 0..IN_ZONE {
                if !own()? {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .with_context(|| format!("{}, node{node}, {address}", self.mode.name()))
    }

    fn restart(&mut self, node: u8) -> Result<()> {
        let proxy = &mut self.proxies[usize::from(node) - 1];
        proxy.kill()?;
        *proxy = kube_proxy::start_prompt(&self.lab, node, self.mode, self.relay.kubeconfig())?;
        Ok(())
    }

    fn logs(&self) -> String {
        self.proxies.iter().map(|process| format!("{}\n", process.tail())).collect()
    }
}

impl Marker {
    fn address(&self, family: Family) -> String {
        match family {
            Family::V4 => format!("10.96.255.{}", self.number),
            Family::V6 => format!("fd00:96::ff{:02x}", self.number),
        }
    }

    fn move_pod(&mut self) {
        self.pod = if self.pod == Place::Pod(1, 1) { Place::Pod(2, 1) } else { Place::Pod(1, 1) };
    }

    async fn make(&mut self) -> Result<()> {
        let name = format!("marker-{}", self.number);
        let addresses = [Family::V4, Family::V6].map(|family| self.address(family));
        let mut manifests = vec![service(&name, [&addresses[0], &addresses[1]], self.port)];
        for family in [Family::V4, Family::V6] {
            let endpoint = json!({"addresses": [self.pod.address(family)]});
            manifests.push(slice(&name, family, vec![endpoint]));
        }
        self.objects.make(&manifests.join("\n---\n")).await
    }

    fn is_seen(&self, network: &ProxyNetwork, from: Place, family: Family) -> Result<bool> {
        if network.mode == Mode::Ipvs {
            std::thread::sleep(guest::patient(IPVS_POLL));
        }
        let to = SocketAddr::new(self.address(family).parse()?, self.port);
        let outcome = probe_within(&network.lab, from, Transport::Tcp, to, MARKER_PATIENCE)?;
        Ok(matches!(outcome, Outcome::Answered { by, .. } if by == self.pod))
    }
}

fn service(name: &str, addresses: [&str; 2], port: u16) -> String {
    let service = json!({
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "tcp", "port": port}],
        },
    });
    service.to_string()
}

fn slice(service: &str, family: Family, endpoints: Vec<Value>) -> String {
    let slice = json!({
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_string().to_lowercase()),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family.to_string(),
        "ports": [{"name": "tcp", "port": POD_PORT}],
        "endpoints": endpoints,
    });
    slice.to_string()
}
