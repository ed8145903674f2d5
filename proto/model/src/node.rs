use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// Facts about one node: from its Kubernetes Node object, and what it must know of other nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeContext {
    /// Name of the node.
    pub name: Arc<str>,
    /// `metadata.uid`; `None` = the cluster has no such Node (yet), and the rest is empty, but for
    /// `node_addresses`.
    pub uid: Option<Arc<str>>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Label `topology.kubernetes.io/region`.
    pub region: Option<Arc<str>>,
    /// IP addresses: InternalIP first, then ExternalIP, each in status order, unique.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, in spec order.
    pub pod_cidrs: Vec<IpNet>,
    /// The node is on its way out: `metadata.deletionTimestamp` is set, or it has the taint
    /// `ToBeDeletedByClusterAutoscaler`.
    pub being_removed: bool,
    /// Addresses of nodes, this one or others, that Services name as external or load-balancer
    /// addresses, sorted, unique. Not of the Node object: the whole cluster has the same.
    pub node_addresses: Vec<IpAddr>,
}

impl NodeContext {
    /// What is known of a node whose Node object has not been seen: its name.
    pub fn unknown(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            uid: None,
            zone: None,
            region: None,
            addresses: Vec::new(),
            pod_cidrs: Vec::new(),
            being_removed: false,
            node_addresses: Vec::new(),
        }
    }
}
