use std::fmt;
use std::sync::Arc;

/// Names a Service: `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes name.
    pub name: Arc<str>,
}

/// Names an EndpointSet: `namespace/service/slice`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointSetKey {
    /// The Service it belongs to.
    pub service: ServiceKey,
    /// Name of the EndpointSlice.
    pub slice: Arc<str>,
}

/// Kind of a resource. The discriminant is the kind byte of the [digest](crate::Digest).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A [`Service`](crate::Service).
    Service = 1,
    /// An [`EndpointSet`](crate::EndpointSet).
    EndpointSet = 2,
}

/// Names any resource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A Service.
    Service(ServiceKey),
    /// An EndpointSet.
    EndpointSet(EndpointSetKey),
}

impl ServiceKey {
    /// A key from its two names, taken as they are.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl EndpointSetKey {
    /// A key from the Service's and the slice's name, taken as they are.
    pub fn new(service: ServiceKey, slice: impl Into<Arc<str>>) -> Self {
        Self { service, slice: slice.into() }
    }
}

impl Key {
    /// Kind of the resource.
    pub fn kind(&self) -> Kind {
        match self {
            Key::Service(_) => Kind::Service,
            Key::EndpointSet(_) => Kind::EndpointSet,
        }
    }

    /// The Service that the resource is, or belongs to.
    pub fn service(&self) -> &ServiceKey {
        match self {
            Key::Service(key) => key,
            Key::EndpointSet(key) => &key.service,
        }
    }

    /// Reads the text form back. `None` where the text has not exactly the parts the kind
    /// needs, none of them empty.
    pub fn parse(kind: Kind, text: &str) -> Option<Key> {
        let mut parts = text.split('/');
        let mut part = || parts.next().filter(|part| !part.is_empty());
        let service = ServiceKey::new(part()?, part()?);
        let key = match kind {
            Kind::Service => Key::Service(service),
            Kind::EndpointSet => Key::EndpointSet(EndpointSetKey::new(service, part()?)),
        };
        parts.next().is_none().then_some(key)
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for EndpointSetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.slice)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Service(key) => key.fmt(f),
            Key::EndpointSet(key) => key.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_goes_both_ways() {
        for (kind, text) in [(Kind::Service, "default/web"), (Kind::EndpointSet, "default/web/web-x7k2p")] {
            let key = Key::parse(kind, text).unwrap();
            assert_eq!((key.kind(), key.to_string()), (kind, text.to_owned()));
            assert_eq!(key.service(), &ServiceKey::new("default", "web"));
        }
    }

    #[test]
    fn keys_have_exactly_their_parts() {
        for text in ["", "web", "default/", "/web", "default/web/", "default/web/x"] {
            assert_eq!(Key::parse(Kind::Service, text), None, "{text:?}");
        }
        for text in ["default/web", "default/web/", "default//x", "a/b/c/d"] {
            assert_eq!(Key::parse(Kind::EndpointSet, text), None, "{text:?}");
        }
    }
}
