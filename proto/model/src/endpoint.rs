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

impl Hints {
    /// Hints in canonical order, without duplicates and empty names; `None` where nothing is left.
    pub fn new(zones: Vec<Arc<str>>, nodes: Vec<Arc<str>>) -> Option<Box<Hints>> {
        let canonical = |mut names: Vec<Arc<str>>| {
            names.retain(|name| !name.is_empty());
            names.sort_unstable();
            names.dedup();
            names.into_boxed_slice()
        };
        let hints = Hints { zones: canonical(zones), nodes: canonical(nodes) };
        (!hints.zones.is_empty() || !hints.nodes.is_empty()).then(|| Box::new(hints))
    }
}

impl Conditions {
    /// Ready and serving, not terminating: the usual state.
    pub const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
}

impl EndpointSet {
    /// Brings ports and endpoints into canonical order and drops duplicates. Of endpoints
    /// with one address the one that is not terminating stays (a new pod that took over the
    /// address of a dying one), else the first; of ports with one name and protocol the first.
    /// An empty name means the same as none.
    pub fn canonicalise(&mut self) {
        for endpoint in &mut self.endpoints {
            endpoint.node_name.take_if(|name| name.is_empty());
            endpoint.zone.take_if(|zone| zone.is_empty());
            if let Some(hints) = endpoint.hints.take() {
                endpoint.hints = Hints::new(hints.zones.into_vec(), hints.nodes.into_vec());
            }
        }
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

    /// The set with a patch made by [`patch_to`](Self::patch_to). Both lists of the patch are
    /// sorted, and no address is in both.
    #[must_use]
    pub fn patched(&self, patch: EndpointPatch) -> EndpointSet {
        let EndpointPatch { upserts, removed } = patch;
        let room = self.endpoints.len() + upserts.len();
        let mut endpoints = Vec::with_capacity(room - removed.len().min(room));
        let (mut upserts, mut removed) = (upserts.into_iter().peekable(), removed.iter().peekable());
        for old in &self.endpoints {
            while let Some(new) = upserts.next_if(|new| new.address < old.address) {
                endpoints.push(new);
            }
            while removed.next_if(|gone| **gone < old.address).is_some() {}
            if let Some(new) = upserts.next_if(|new| new.address == old.address) {
                endpoints.push(new);
            } else if removed.next_if(|gone| **gone == old.address).is_none() {
                endpoints.push(old.clone());
            }
        }
        endpoints.extend(upserts);
        EndpointSet { key: self.key.clone(), family: self.family, ports: self.ports.clone(), endpoints }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ServiceKey;

    fn endpoint(address: &str) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            node_name: None,
            zone: None,
            conditions: Conditions::READY,
            hints: None,
        }
    }

    fn set(endpoints: Vec<Endpoint>) -> EndpointSet {
        let key = EndpointSetKey::new(ServiceKey::new("default", "web"), "web-x");
        EndpointSet { key, family: Family::V4, ports: Vec::new(), endpoints }
    }

    fn addresses(set: &EndpointSet) -> Vec<String> {
        set.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect()
    }

    #[test]
    fn canonical_order_is_numeric() {
        let mut set = set(["10.0.0.10", "10.0.0.9", "9.255.0.1"].map(endpoint).to_vec());
        set.canonicalise();
        assert_eq!(addresses(&set), ["9.255.0.1", "10.0.0.9", "10.0.0.10"]);
    }

    #[test]
    fn of_two_with_one_address_the_living_one_stays() {
        let dying = Endpoint {
            conditions: Conditions { ready: false, serving: true, terminating: true },
            ..endpoint("10.0.0.1")
        };
        let living = endpoint("10.0.0.1");
        for order in [[dying.clone(), living.clone()], [living.clone(), dying.clone()]] {
            let mut set = set(order.to_vec());
            set.canonicalise();
            assert_eq!(set.endpoints, std::slice::from_ref(&living));
        }
        let other = Endpoint { node_name: Some("b".into()), ..living.clone() };
        let mut set = set(vec![living.clone(), other]);
        set.canonicalise();
        assert_eq!(set.endpoints, [living], "the first of two alike");
    }

    #[test]
    fn ports_sort_by_name_and_protocol_and_the_first_stays() {
        let port = |name: &str, protocol, port| EndpointPort {
            name: name.into(),
            protocol,
            port: Port::new(port).unwrap(),
        };
        let mut set = set(Vec::new());
        set.ports =
            vec![port("b", Protocol::Tcp, 1), port("a", Protocol::Udp, 2), port("a", Protocol::Tcp, 3)];
        set.ports.push(port("a", Protocol::Tcp, 4));
        set.canonicalise();
        let expected =
            [port("a", Protocol::Tcp, 3), port("a", Protocol::Udp, 2), port("b", Protocol::Tcp, 1)];
        assert_eq!(set.ports, expected);
    }

    #[test]
    fn empty_names_are_none() {
        let mut set = set(vec![Endpoint {
            node_name: Some("".into()),
            zone: Some("".into()),
            hints: Some(Box::new(Hints { zones: ["".into()].into(), nodes: [].into() })),
            ..endpoint("10.0.0.1")
        }]);
        set.canonicalise();
        assert_eq!(set.endpoints, [endpoint("10.0.0.1")]);
    }

    #[test]
    fn hints_are_sorted_and_unique() {
        let names = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect::<Vec<_>>();
        let hints = Hints::new(names(&["b", "a", "b", ""]), names(&[])).unwrap();
        assert_eq!((hints.zones.to_vec(), hints.nodes.to_vec()), (names(&["a", "b"]), names(&[])));
        assert_eq!(Hints::new(names(&[""]), Vec::new()), None);
    }

    #[test]
    fn a_patch_carries_only_the_difference() {
        let old = set(["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(endpoint).to_vec());
        let moved = Endpoint { zone: Some("b".into()), ..endpoint("10.0.0.3") };
        let new = set(vec![endpoint("10.0.0.2"), moved.clone(), endpoint("10.0.0.4")]);
        let patch = old.patch_to(&new).unwrap();
        assert_eq!(patch.removed, [endpoint("10.0.0.1").address]);
        assert_eq!(patch.upserts, [moved, endpoint("10.0.0.4")]);
        assert_eq!(old.patched(patch), new);
        let empty = EndpointPatch { upserts: Vec::new(), removed: Vec::new() };
        assert_eq!(new.patch_to(&new), Some(empty));
    }

    #[test]
    fn no_patch_where_ports_or_family_differ() {
        let old = set(Vec::new());
        let mut ports = old.clone();
        ports.ports.push(EndpointPort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: Port::new(80).unwrap(),
        });
        assert_eq!(old.patch_to(&ports), None);
        assert_eq!(old.patch_to(&EndpointSet { family: Family::V6, ..old.clone() }), None);
    }
}
