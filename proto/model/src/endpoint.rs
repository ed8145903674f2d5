use std::net::IpAddr;
use std::sync::Arc;

use crate::{EndpointSetKey, Family, Port, Protocol};

/// One EndpointSlice of a Service, in canonical form, see [`EndpointSet::canonicalise`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSet {
    /// Namespace, Service and slice.
    pub key: EndpointSetKey,
    /// Family of every address.
    pub family: Family,
    /// Target ports, sorted by (name, protocol), unique in those.
    pub ports: Vec<EndpointPort>,
    /// Endpoints, sorted by address, unique in it.
    pub endpoints: Vec<Endpoint>,
}

/// One target port of an [`EndpointSet`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EndpointPort {
    /// Name of the Service port this is the target of; empty = the unnamed port.
    pub name: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port at the endpoint.
    pub port: Port,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// First address of the endpoint.
    pub address: IpAddr,
    /// Node it runs on; `None` = unknown: usable, but local nowhere.
    pub node_name: Option<Arc<str>>,
    /// Zone it runs in.
    pub zone: Option<Arc<str>>,
    /// Kubernetes' conditions.
    pub conditions: Conditions,
    /// Topology hints; `None` = none at all.
    pub hints: Option<Box<Hints>>,
}

/// Kubernetes' endpoint conditions, defaults resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Conditions {
    /// May get new connections.
    pub ready: bool,
    /// Answers, whether or not it is terminating.
    pub serving: bool,
    /// Is shutting down.
    pub terminating: bool,
}

/// For whom an endpoint is meant. At least one list is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hints {
    /// Zones, sorted, unique.
    pub zones: Box<[Arc<str>]>,
    /// Nodes, sorted, unique.
    pub nodes: Box<[Arc<str>]>,
}

/// The difference between two versions of an [`EndpointSet`] with equal key, family and ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPatch {
    /// New and changed endpoints, sorted by address.
    pub upserts: Vec<Endpoint>,
    /// Addresses that are gone, sorted.
    pub removed: Vec<IpAddr>,
}

impl Conditions {
    /// Ready and serving, not terminating: the usual state.
    pub const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
}

impl EndpointSet {
    /// Brings ports and endpoints into canonical order and drops duplicates. Of endpoints
    /// with one address the one that is not terminating stays (a new pod that took over the
    /// address of a dying one), else the first; of ports with one name and protocol the first.
    pub fn canonicalise(&mut self) {
        self.ports.sort_by(|a, b| (&a.name, a.protocol).cmp(&(&b.name, b.protocol)));
        self.ports.dedup_by(|b, a| (&a.name, a.protocol) == (&b.name, b.protocol));
        self.endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.conditions.terminating));
        self.endpoints.dedup_by_key(|endpoint| endpoint.address);
    }

    /// What turns `self` into `new`; `None` where family or ports differ, because a patch
    /// carries endpoints only.
    pub fn patch_to(&self, new: &EndpointSet) -> Option<EndpointPatch> {
        if self.family != new.family || self.ports != new.ports {
            return None;
        }
        let mut patch = EndpointPatch { upserts: Vec::new(), removed: Vec::new() };
        let mut old = self.endpoints.iter().peekable();
        for endpoint in &new.endpoints {
            while let Some(gone) = old.next_if(|old| old.address < endpoint.address) {
                patch.removed.push(gone.address);
            }
            match old.next_if(|old| old.address == endpoint.address) {
                Some(same) if same == endpoint => {}
                _ => patch.upserts.push(endpoint.clone()),
            }
        }
        patch.removed.extend(old.map(|gone| gone.address));
        Some(patch)
    }

    /// Applies a patch made by [`patch_to`](Self::patch_to). Endpoints stay sorted, whatever
    /// the order inside the patch.
    pub fn apply_patch(&mut self, patch: &EndpointPatch) {
        for address in &patch.removed {
            if let Ok(at) = self.endpoints.binary_search_by_key(address, |endpoint| endpoint.address) {
                self.endpoints.remove(at);
            }
        }
        for endpoint in &patch.upserts {
            match self.endpoints.binary_search_by_key(&endpoint.address, |endpoint| endpoint.address) {
                Ok(at) => self.endpoints[at] = endpoint.clone(),
                Err(at) => self.endpoints.insert(at, endpoint.clone()),
            }
        }
    }
}
