use std::sync::Arc;

use crate::{EndpointSet, Key, Service, ServiceCidr, Version, canonical};

/// One object of the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// A Service.
    Service(Arc<Service>),
    /// Endpoints of a Service.
    EndpointSet(Arc<EndpointSet>),
    /// Ranges that cluster IPs come from.
    ServiceCidr(Arc<ServiceCidr>),
}

impl Resource {
    /// What names it.
    pub fn key(&self) -> Key {
        match self {
            Resource::Service(service) => Key::Service(service.key.clone()),
            Resource::EndpointSet(set) => Key::EndpointSet(set.key.clone()),
            Resource::ServiceCidr(cidr) => Key::ServiceCidr(cidr.key.clone()),
        }
    }

    /// Its canonical bytes.
    pub fn canonical(&self) -> Vec<u8> {
        match self {
            Resource::Service(service) => canonical::service(service),
            Resource::EndpointSet(set) => canonical::endpoint_set(set),
            Resource::ServiceCidr(cidr) => canonical::service_cidr(cidr),
        }
    }

    /// Its content version. Encodes the object: where the canonical bytes are at hand, hash those.
    pub fn version(&self) -> Version {
        Version::of(&self.canonical())
    }
}

impl From<Service> for Resource {
    fn from(service: Service) -> Self {
        Resource::Service(Arc::new(service))
    }
}

impl From<EndpointSet> for Resource {
    fn from(set: EndpointSet) -> Self {
        Resource::EndpointSet(Arc::new(set))
    }
}

impl From<ServiceCidr> for Resource {
    fn from(cidr: ServiceCidr) -> Self {
        Resource::ServiceCidr(Arc::new(cidr))
    }
}
