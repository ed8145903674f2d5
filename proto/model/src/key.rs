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

/// Names a ServiceCidr: the name of the object, which has no namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceCidrKey(pub Arc<str>);

/// Kind of a resource. The discriminant is the kind byte of the [digest](crate::Digest).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A [`Service`](crate::Service).
    Service = 1,
    /// An [`EndpointSet`](crate::EndpointSet).
    EndpointSet = 2,
    /// A [`ServiceCidr`](crate::ServiceCidr).
    ServiceCidr = 3,
}

/// Names any resource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A Service.
    Service(ServiceKey),
    /// An EndpointSet.
    EndpointSet(EndpointSetKey),
    /// A ServiceCidr.
    ServiceCidr(ServiceCidrKey),
}

impl Kind {
    /// Every kind, by number.
    pub const ALL: [Kind; 3] = [Kind::Service, Kind::EndpointSet, Kind::ServiceCidr];

    /// The parts of the text form of a key, as documented: `namespace/name`.
    pub fn key_form(self) -> &'static str {
        match self {
            Kind::Service => "namespace/name",
            Kind::EndpointSet => "namespace/service/slice",
            Kind::ServiceCidr => "name",
        }
    }
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
            Key::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// The Service that the resource is, or belongs to; `None` = it is of no Service.
    pub fn service(&self) -> Option<&ServiceKey> {
        match self {
            Key::Service(key) => Some(key),
            Key::EndpointSet(key) => Some(&key.service),
            Key::ServiceCidr(_) => None,
        }
    }

    /// The names that the text form joins with `/`.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names: [Option<&str>; 3] = match self {
            Key::Service(key) => [Some(&key.namespace), Some(&key.name), None],
            Key::EndpointSet(EndpointSetKey { service, slice }) => {
                [Some(&service.namespace), Some(&service.name), Some(slice)]
            }
            Key::ServiceCidr(ServiceCidrKey(name)) => [Some(name), None, None],
        };
        names.into_iter().flatten()
    }

    /// Reads the text form back. `None` where the text has not exactly the parts the kind
    /// needs, none of them empty.
    pub fn parse(kind: Kind, text: &str) -> Option<Key> {
        let mut parts = text.split('/');
        let mut part = || parts.next().filter(|part| !part.is_empty());
        let key = match kind {
            Kind::Service => Key::Service(ServiceKey::new(part()?, part()?)),
            Kind::EndpointSet => {
                Key::EndpointSet(EndpointSetKey::new(ServiceKey::new(part()?, part()?), part()?))
            }
            Kind::ServiceCidr => Key::ServiceCidr(ServiceCidrKey(part()?.into())),
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
            Key::ServiceCidr(ServiceCidrKey(name)) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_goes_both_ways() {
        let web = ServiceKey::new("default", "web");
        for (kind, text, service) in [
            (Kind::Service, "default/web", Some(&web)),
            (Kind::EndpointSet, "default/web/web-x7k2p", Some(&web)),
            (Kind::ServiceCidr, "kubernetes", None),
        ] {
            let key = Key::parse(kind, text).unwrap();
            assert_eq!((key.kind(), key.to_string()), (kind, text.to_owned()));
            assert_eq!(key.service(), service);
            assert_eq!(key.names().collect::<Vec<_>>().join("/"), text);
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
        for text in ["", "/", "a/", "a/b"] {
            assert_eq!(Key::parse(Kind::ServiceCidr, text), None, "{text:?}");
        }
    }
}
