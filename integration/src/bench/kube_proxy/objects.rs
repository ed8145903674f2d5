//! The objects that both proxies watch, at a real API server.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::apiserver::{Cluster, Kind};
use crate::lab::{Family, Place};
use crate::traffic::POD_PORT;

/// Endpoints of a Service.
pub(super) const ENDPOINTS: u8 = 10;
/// Services whose endpoints answer, spread over all names, the first and the last among them.
const ANSWERING: u32 = 10;
const PER_NAMESPACE: u32 = 100;
/// Nodes that the endpoints which nobody asks for are spread over.
const NODES: u32 = 100;
/// Objects that are created at a time.
const AT_ONCE: u32 = 48;
/// Cluster IPs count from here, 10.96.16.0: below the part that the API server chooses from.
const SERVICES_FROM: u32 = 0x0a60_1000;
/// Pods that do not answer count from here, 10.128.0.0.
const PODS_FROM: u32 = 0x0a80_0000;
/// Pods that take the place of others count from here, 10.192.0.0.
const REPLACED_FROM: u32 = 0x0ac0_0000;
/// The Service with one endpoint.
const MOVED: &str = "moved";

/// What was created, and the way to change it.
#[derive(Debug)]
pub(super) struct Objects {
    cluster: Cluster,
    services: u32,
    /// Number of the last pod that took another's place.
    pods: u32,
    /// Pod of node 1 that is the one endpoint of [`MOVED`].
    pod: u8,
}

impl Objects {
    /// Creates so many Services with ten endpoints each, one more with one endpoint, and node 1.
    pub(super) async fn create(cluster: Cluster, services: u32) -> Result<Self> {
        let this = Self { cluster, services, pods: 0, pod: 1 };
        this.create_node().await?;
        let namespaces = Api::<Namespace>::all(this.cluster.client().clone());
        for number in 0..services.div_ceil(PER_NAMESPACE) {
            let namespace: Namespace =
                serde_json::from_value(json!({"metadata": {"name": namespace(number * PER_NAMESPACE)}}))?;
            namespaces.create(&PostParams::default(), &namespace).await?;
        }
        let mut workers = JoinSet::new();
        for first in 0..AT_ONCE {
            let cluster = this.cluster.clone();
            workers.spawn(async move {
                for index in (first..services).step_by(AT_ONCE as usize) {
                    let (namespace, name) = (namespace(index), name(index));
                    cluster.create(Kind::Service, service(&namespace, &name, index)).await?;
                    let slice = slice(&namespace, &name, endpoints(services, index, None));
                    cluster.create(Kind::EndpointSlice, slice).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = workers.join_next().await {
            done??;
        }
        this.cluster.create(Kind::Service, service("default", MOVED, services)).await?;
        let only = vec![endpoint(Place::Pod(1, 1).address(Family::V4), "node1")];
        this.cluster.create(Kind::EndpointSlice, slice("default", MOVED, only)).await?;
        Ok(this)
    }

    async fn create_node(&self) -> Result<()> {
        let node = json!({"metadata": {"name": "node1"}, "spec": {"podCIDR": "10.244.1.0/24"}});
        self.cluster.create(Kind::Node, node).await?;
        let address = Place::Node(1).address(Family::V4);
        let status = json!({"addresses": [{"type": "InternalIP", "address": address}]});
        self.cluster.patch_status(Kind::Node, "", "node1", json!({"status": status})).await?;
        Ok(())
    }

    /// Where the Services with answering endpoints are reached, by name.
    pub(super) fn answering(&self) -> Vec<SocketAddr> {
        (0..ANSWERING).map(|at| address(nth_answering(self.services, at))).collect()
    }

    /// Where the Service with one endpoint is reached, and the pod that will be it next.
    pub(super) fn moved(&self) -> (SocketAddr, Place) {
        (address(self.services), Place::Pod(1, self.next_pod()))
    }

    fn next_pod(&self) -> u8 {
        self.pod % ENDPOINTS + 1
    }

    /// Gives that Service its next pod. Returns when the API server has it; the time is the one
    /// before it was told.
    pub(super) async fn move_endpoint(&mut self) -> Result<Instant> {
        self.pod = self.next_pod();
        let endpoint = endpoint(Place::Pod(1, self.pod).address(Family::V4), "node1");
        let patch = json!({"endpoints": [endpoint]});
        let start = Instant::now();
        self.cluster.patch(Kind::EndpointSlice, "default", &format!("{MOVED}-x"), patch).await?;
        Ok(start)
    }

    /// Replaces one endpoint each of so many Services by another pod, one change every `pace`.
    pub(super) async fn replace(&mut self, changes: u32, pace: Duration) -> Result<()> {
        let mut clock = tokio::time::interval(pace);
        clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut patches = JoinSet::new();
        let mut left = changes;
        while left > 0 {
            self.pods += 1;
            let index = self.pods.wrapping_mul(7919) % self.services;
            if is_answering(self.services, index) {
                continue;
            }
            left -= 1;
            clock.tick().await;
            let patch = json!({"endpoints": endpoints(self.services, index, Some(self.pods))});
            let cluster = self.cluster.clone();
            patches.spawn(async move {
                let slice = format!("{}-x", name(index));
                cluster.patch(Kind::EndpointSlice, &namespace(index), &slice, patch).await
            });
        }
        while let Some(done) = patches.join_next().await {
            done?.context("replace an endpoint")?;
        }
        Ok(())
    }
}

fn nth_answering(services: u32, at: u32) -> u32 {
    at * (services - 1) / (ANSWERING - 1)
}

fn is_answering(services: u32, index: u32) -> bool {
    (0..ANSWERING).any(|at| nth_answering(services, at) == index)
}

fn address(index: u32) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::from(SERVICES_FROM + index).into(), 80)
}

fn namespace(index: u32) -> String {
    format!("team-{:03}", index / PER_NAMESPACE)
}

fn name(index: u32) -> String {
    format!("service-{index:05}")
}

fn service(namespace: &str, name: &str, index: u32) -> Value {
    json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": name}},
        "spec": {
            "clusterIP": address(index).ip(),
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": POD_PORT}],
            "selector": {"app": name},
        },
    })
}

fn slice(namespace: &str, name: &str, endpoints: Vec<Value>) -> Value {
    json!({
        "metadata": {
            "namespace": namespace,
            "name": format!("{name}-x"),
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": POD_PORT}],
        "endpoints": endpoints,
    })
}

/// The endpoints of a Service; the first is another pod where that has a number.
fn endpoints(services: u32, index: u32, replaced: Option<u32>) -> Vec<Value> {
    let of = |at: u8| {
        if is_answering(services, index) {
            return endpoint(Place::Pod(1, at).address(Family::V4), "node1");
        }
        let number = index * u32::from(ENDPOINTS) + u32::from(at);
        let address = match replaced.filter(|_| at == 1) {
            Some(pod) => REPLACED_FROM + pod,
            None => PODS_FROM + number,
        };
        endpoint(Ipv4Addr::from(address).into(), &format!("node-{}", number % NODES))
    };
    (1..=ENDPOINTS).map(of).collect()
}

/// As the controller of EndpointSlices writes it.
fn endpoint(address: IpAddr, node: &str) -> Value {
    json!({
        "addresses": [address],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": node,
        "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("pod-{address}")},
    })
}
