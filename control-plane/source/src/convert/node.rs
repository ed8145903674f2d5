//! Nodes.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lockstep_model::{Interner, InvalidField, NodeContext};
use serde::Deserialize;

use super::field::{self, Use, at};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The taint of a node that the cluster autoscaler is about to remove.
const REMOVAL_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
const REGION_LABEL: &str = "topology.kubernetes.io/region";

/// The part of a Kubernetes Node that is read. The whole object is kept busy by the kubelet
/// (conditions, images) and many times as large.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Node {
    /// Name, uid, labels.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// `spec`.
    #[serde(default)]
    pub spec: NodeSpec,
    /// `status`.
    #[serde(default)]
    pub status: NodeStatus,
}

/// The part of a Node's `spec` that is read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeSpec {
    /// `podCIDR`, for which `podCIDRs` has been there since Kubernetes 1.16.
    #[serde(rename = "podCIDR", default)]
    pub pod_cidr: Option<String>,
    /// `podCIDRs`.
    #[serde(rename = "podCIDRs", default)]
    pub pod_cidrs: Option<Vec<String>>,
    /// `taints`.
    #[serde(default)]
    pub taints: Option<Vec<Taint>>,
}

/// One entry of `spec.taints`; its effect is the scheduler's business.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Taint {
    /// `key`.
    #[serde(default)]
    pub key: String,
}

/// The part of a Node's `status` that is read.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct NodeStatus {
    /// `addresses`.
    #[serde(default)]
    pub addresses: Option<Vec<NodeAddress>>,
}

/// One entry of `status.addresses`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// The address or name.
    pub address: String,
}

impl kube::Resource for Node {
    type DynamicType = ();
    type Scope = k8s_openapi::ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// A Kubernetes Node as the model has it. No Node is skipped.
pub fn node(object: &Node, names: &mut Interner) -> Result<NodeContext, InvalidField> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let name = names.intern(at(field::subdomain(name), name, || "metadata.name".into())?);
    let mut topology = |label: &str| {
        let value = object.metadata.labels.as_ref().and_then(|labels| labels.get(label));
        let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(None) };
        at(field::label_value(value), value, || format!("metadata.labels[{label}]"))
            .map(|value| Some(names.intern(value)))
    };
    let zone = topology(ZONE_LABEL)?;
    let region = topology(REGION_LABEL)?;
    let mut addresses = Vec::new();
    for wanted in ["InternalIP", "ExternalIP"] {
        for (index, given) in object.status.addresses.iter().flatten().enumerate() {
            if given.kind != wanted {
                continue;
            }
            let path = || format!("status.addresses[{index}].address");
            let address = at(field::usable_address(&given.address, Use::Node), &given.address, path)?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    let uid = object.metadata.uid.as_deref().filter(|uid| !uid.is_empty());
    let mut taints = object.spec.taints.iter().flatten();
    let being_removed =
        object.metadata.deletion_timestamp.is_some() || taints.any(|taint| taint.key == REMOVAL_TAINT);
    let (uid, pod_cidrs) = (uid.map(Into::into), pod_cidrs(object)?);
    // What the whole cluster says of nodes is not in the object of one.
    let node_addresses = Vec::new();
    Ok(NodeContext { name, uid, zone, region, addresses, pod_cidrs, being_removed, node_addresses })
}

fn pod_cidrs(object: &Node) -> Result<Vec<ipnet::IpNet>, InvalidField> {
    let all = object.spec.pod_cidrs.as_deref().unwrap_or_default();
    if all.is_empty() {
        let single = object.spec.pod_cidr.iter().filter(|text| !text.is_empty());
        return single.map(|text| at(field::cidr(text), text, || "spec.podCIDR".into())).collect();
    }
    let all = all.iter().enumerate();
    all.map(|(index, text)| at(field::cidr(text), text, || format!("spec.podCIDRs[{index}]"))).collect()
}
