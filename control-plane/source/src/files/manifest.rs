//! The text of one manifest file into objects.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use lockstep_model::{Interner, InvalidField};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

use crate::convert::{self, Conversion, Outcome, Skip};
use crate::intake::Object;

/// The kinds that are read, in the order of the trackers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
}

impl Kind {
    pub(super) const ALL: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
        }
    }

    /// API group and the version of it that is read.
    fn group_version(self) -> (&'static str, &'static str) {
        match self {
            Kind::Service | Kind::Node => ("", "v1"),
            Kind::EndpointSlice => ("discovery.k8s.io", "v1"),
            Kind::ServiceCidr => ("networking.k8s.io", "v1"),
        }
    }
}

/// Kind and `namespace/name`, or the name alone of what has no namespace.
pub(super) type Id = (Kind, String);

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Manifest {
    /// Every object of a kind that is read, in the order of the file.
    pub(super) objects: Vec<(Id, Conversion<Object>)>,
    /// How many objects of which other kinds there are.
    pub(super) ignored: BTreeMap<String, usize>,
}

/// Why a text is no manifest, as the end of a sentence.
pub(super) type Broken = String;

/// Reads YAML, or JSON where `json`. Either may hold several documents, which are converted
/// one by one: as plain values all together would take ten times the room of the text.
pub(super) fn parse(text: &str, json: bool, names: &mut Interner) -> Result<Manifest, Broken> {
    let mut manifest = Manifest::default();
    let mut count = 0;
    let mut take = |document: Value| {
        count += 1;
        manifest.add(&document, &format!("document {count}"), ("", ""), names)
    };
    if json {
        for document in serde_json::Deserializer::from_str(text).into_iter() {
            take(document.map_err(|error| format!("is not valid JSON: {error}"))?)?;
        }
    } else {
        let mut reader = text.as_bytes();
        for document in serde_saphyr::read_with_options(&mut reader, yaml_options()) {
            take(document.map_err(|error| not_yaml(&error))?)?;
        }
    }
    Ok(manifest)
}

/// Only `true` and `false` are booleans: `name: no` means a text, whatever YAML 1.1 said.
/// The bounds are those of a file with all Services of a large cluster.
fn yaml_options() -> serde_saphyr::Options {
    let budget = serde_saphyr::budget! {
        max_events: 100_000_000,
        max_nodes: 50_000_000,
        max_documents: 1_000_000,
        max_total_scalar_bytes: 1 << 30,
    };
    serde_saphyr::options! {
        strict_booleans: true,
        with_snippet: false,
        budget: budget,
    }
}

fn not_yaml(error: &serde_saphyr::Error) -> Broken {
    let place = error.location().map(|at| format!(" at line {} column {}", at.line(), at.column()));
    format!("is not valid YAML{}: {}", place.unwrap_or_default(), error.to_string().replace('\n', " "))
}

impl Manifest {
    /// Adds an object, or the items of a list of them. Items of a `ServiceList` and its like
    /// may leave out what `inherited` says: (apiVersion, kind).
    fn add(
        &mut self,
        value: &Value,
        place: &str,
        inherited: (&str, &str),
        names: &mut Interner,
    ) -> Result<(), Broken> {
        let text = |field| value.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
        let api_version = text("apiVersion").unwrap_or(inherited.0);
        let kind = text("kind").unwrap_or(inherited.1);
        if !value.is_object() || api_version.is_empty() || kind.is_empty() {
            return Err(format!("is not a manifest: {place} has no apiVersion and kind"));
        }
        if let Some(item_kind) = kind.strip_suffix("List")
            && let Some(items) = value.get("items")
        {
            let items = match items {
                Value::Null => &[],
                Value::Array(items) => items.as_slice(),
                _ => return Err(format!("is not a manifest: the items of {place} are no list")),
            };
            let inherited = if item_kind.is_empty() { ("", "") } else { (api_version, item_kind) };
            for (index, item) in items.iter().enumerate() {
                self.add(item, &format!("{place} items[{index}]"), inherited, names)?;
            }
            return Ok(());
        }
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let known =
            Kind::ALL.into_iter().find(|known| known.name() == kind && known.group_version().0 == group);
        let Some(kind) = known else {
            *self.ignored.entry(format!("{api_version} {kind}")).or_default() += 1;
            return Ok(());
        };
        let id = (
            kind,
            name(kind, value).ok_or_else(|| format!("is not a manifest: {place} has no metadata.name"))?,
        );
        let wanted = kind.group_version().1;
        let conversion = if version == wanted {
            convert(kind, value, names)
        } else {
            Err(InvalidField {
                field: "apiVersion".into(),
                value: api_version.into(),
                reason: format!("is not version {wanted}, the one that is read"),
            })
        };
        self.objects.push((id, conversion));
        Ok(())
    }
}

fn name(kind: Kind, value: &Value) -> Option<String> {
    let metadata = value.get("metadata")?;
    let name = metadata.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let namespace = metadata.get("namespace").and_then(Value::as_str).filter(|text| !text.is_empty());
    Some(match kind {
        Kind::Node | Kind::ServiceCidr => name.to_owned(),
        Kind::Service | Kind::EndpointSlice => format!("{}/{name}", namespace.unwrap_or("default")),
    })
}

fn convert(kind: Kind, value: &Value, names: &mut Interner) -> Conversion<Object> {
    match kind {
        Kind::Service => match convert::service(&typed::<Service>(value)?)? {
            Outcome::Object(service) => Ok(Outcome::Object(Object::Resource(service.into()))),
            Outcome::Skip(Skip::NoClusterIp) => Err(InvalidField {
                field: "spec.clusterIP".into(),
                value: String::new(),
                reason: "is missing: there is nobody to allocate one to a manifest".into(),
            }),
            Outcome::Skip(skip) => Ok(Outcome::Skip(skip)),
        },
        Kind::EndpointSlice => match convert::endpoint_slice(&typed::<EndpointSlice>(value)?, names)? {
            Outcome::Object(set) => Ok(Outcome::Object(Object::Resource(set.into()))),
            Outcome::Skip(skip) => Ok(Outcome::Skip(skip)),
        },
        Kind::ServiceCidr => match convert::service_cidr(&typed::<ServiceCIDR>(value)?)? {
            Outcome::Object(cidr) => Ok(Outcome::Object(Object::Resource(cidr.into()))),
            Outcome::Skip(skip) => Ok(Outcome::Skip(skip)),
        },
        Kind::Node => {
            let mut node = convert::node(&typed::<convert::Node>(value)?, names)?;
            // In the model no uid means that there is no such Node.
            node.uid.get_or_insert_with(|| node.name.clone());
            Ok(Outcome::Object(Object::Node(node)))
        }
    }
}

/// A Kubernetes type; what does not fit is named by its path, which only a second reading
/// keeps track of.
fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, InvalidField> {
    if let Ok(good) = T::deserialize(value) {
        return Ok(good);
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let found = error.path().iter().try_fold(value, |value, segment| match segment {
            Segment::Seq { index } => value.get(index),
            Segment::Map { key } => value.get(key),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        let shown = match found {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(_) | Value::Array(_)) | None => String::new(),
            Some(other) => other.to_string(),
        };
        let field = error.path().to_string();
        let field = if field == "." { String::new() } else { field };
        InvalidField { field, value: shown, reason: format!("does not fit: {}", error.inner()) }
    })
}
