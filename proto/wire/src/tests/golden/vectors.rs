//! The golden vectors of `vectors/`, which third parties test against too. The given half of
//! each entry is written by hand, the other half filled in with `LOCKSTEP_BLESS=1`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::LazyLock;

use lockstep_model::{Digest, EndpointSet, Interner, Key, Kind, Resource, State, Version};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, EnumDescriptor, MessageDescriptor, ReflectMessage};
use serde_json::Value;

use super::{check, read};
use crate::{FILE_DESCRIPTOR_SET, ReceivedPatch, convert, decode_body};

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).unwrap());

/// One entry of `objects.json`.
struct Object {
    kind: Kind,
    message: DynamicMessage,
    bytes: Vec<u8>,
    resource: Resource,
    version: Version,
}

fn entries(file: &str) -> Vec<Value> {
    let text = read(file).unwrap_or_else(|| panic!("{file} is missing"));
    let json: Value = serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
    json.as_array().unwrap_or_else(|| panic!("{file}: not a list")).clone()
}

fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry[field].as_str().unwrap_or_else(|| panic!("no {field} in {entry}"))
}

fn texts(entry: &Value, field: &str) -> Vec<String> {
    let list = entry[field].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

fn descriptor(name: &str) -> MessageDescriptor {
    POOL.get_message_by_name(&format!("lockstep.v1.{name}")).unwrap()
}

fn kind(entry: &Value) -> (Kind, MessageDescriptor) {
    match text(entry, "kind") {
        "RESOURCE_KIND_SERVICE" => (Kind::Service, descriptor("Service")),
        "RESOURCE_KIND_ENDPOINT_SET" => (Kind::EndpointSet, descriptor("EndpointSet")),
        "RESOURCE_KIND_SERVICE_CIDR" => (Kind::ServiceCidr, descriptor("ServiceCidr")),
        other => panic!("no kind {other}"),
    }
}

fn decode(kind: Kind, bytes: &[u8]) -> Result<Resource, crate::DecodeError> {
    decode_body(kind, bytes, &mut Interner::default())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn objects() -> BTreeMap<String, Object> {
    let mut objects = BTreeMap::new();
    for entry in entries("vectors/objects.json") {
        let name = text(&entry, "name").to_owned();
        let (kind, descriptor) = kind(&entry);
        let message = DynamicMessage::deserialize(descriptor, &entry["message"])
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let bytes = message.encode_to_vec();
        let resource = decode(kind, &bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(resource.canonical(), bytes, "{name}");
        let version = resource.version();
        let twice = objects.insert(name.clone(), Object { kind, message, bytes, resource, version });
        assert!(twice.is_none(), "{name} is there twice");
    }
    objects
}

/// JSON of one entry: the fields in the order given, nested JSON indented below them.
fn entry_text(fields: &[(&str, String)]) -> String {
    let fields: Vec<_> = fields
        .iter()
        .map(|(name, json)| format!("    \"{name}\": {}", json.replace('\n', "\n    ")))
        .collect();
    format!("  {{\n{}\n  }}", fields.join(",\n"))
}

fn list_text(entries: &[String]) -> Vec<u8> {
    format!("[\n{}\n]\n", entries.join(",\n")).into_bytes()
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn pretty(message: &DynamicMessage) -> String {
    serde_json::to_string_pretty(message).unwrap()
}

fn kind_text(kind: Kind) -> String {
    quoted(convert::kind_to_wire(kind).as_str_name())
}

#[test]
fn objects_have_their_bytes_versions_and_digests() {
    let objects = objects();
    let text: Vec<_> = entries("vectors/objects.json")
        .iter()
        .map(|entry| {
            let name = text(entry, "name");
            let object = &objects[name];
            let key = object.resource.key();
            let mut digest = Digest::EMPTY;
            digest.add(&key, object.version);
            entry_text(&[
                ("name", quoted(name)),
                ("about", quoted(text(entry, "about"))),
                ("kind", kind_text(object.kind)),
                ("message", pretty(&object.message)),
                ("key", quoted(&key.to_string())),
                ("canonical", quoted(&hex(&object.bytes))),
                ("version", quoted(&object.version.to_string())),
                ("digest", quoted(&digest.to_string())),
            ])
        })
        .collect();
    check("vectors/objects.json", &list_text(&text));
}

#[test]
fn states_have_their_digests() {
    let objects = objects();
    let mut state = State::default();
    let text: Vec<_> = entries("vectors/states.json")
        .iter()
        .map(|entry| {
            let (upsert, remove) = (texts(entry, "upsert"), texts(entry, "remove"));
            for name in &upsert {
                let object = &objects[name];
                state.upsert(object.version, object.resource.clone());
            }
            for name in &remove {
                assert!(state.remove(&objects[name].resource.key()), "{name} is not in the state");
            }
            let list = |names: &[String]| Value::from(names.to_vec()).to_string();
            entry_text(&[
                ("about", quoted(text(entry, "about"))),
                ("upsert", list(&upsert)),
                ("remove", list(&remove)),
                ("resourceCount", state.len().to_string()),
                ("digest", quoted(&state.digest().to_string())),
            ])
        })
        .collect();
    check("vectors/states.json", &list_text(&text));
}

#[test]
fn patches_have_their_bytes() {
    let objects = objects();
    let set = |name: &str| match &objects[name].resource {
        Resource::EndpointSet(set) => EndpointSet::clone(set),
        _ => panic!("{name} is no endpoint set"),
    };
    let text: Vec<_> = entries("vectors/patches.json")
        .iter()
        .map(|entry| {
            let (from, to) = (text(entry, "from"), text(entry, "to"));
            let (old, new) = (set(from), set(to));
            let patch = old.patch_to(&new).unwrap();
            let bytes = convert::patch_to_wire(&old.key, objects[from].version, objects[to].version, &patch)
                .encode_to_vec();
            let received = ReceivedPatch::read(&bytes).unwrap();
            assert_eq!(old.patched(received.decode(&mut Interner::default()).unwrap()), new);
            let message = DynamicMessage::decode(descriptor("EndpointPatch"), &bytes[..]).unwrap();
            entry_text(&[
                ("about", quoted(text(entry, "about"))),
                ("from", quoted(from)),
                ("to", quoted(to)),
                ("patch", pretty(&message)),
                ("bytes", quoted(&hex(&bytes))),
            ])
        })
        .collect();
    check("vectors/patches.json", &list_text(&text));
}

#[test]
fn what_is_not_canonical_is_refused() {
    let text: Vec<_> = entries("vectors/refused.json")
        .iter()
        .map(|entry| {
            let about = text(entry, "about");
            let (kind, descriptor) = kind(entry);
            let given = &entry["message"];
            // Where JSON can say what is wrong, it does; else the bytes are given.
            let message = (!given.is_null()).then(|| DynamicMessage::deserialize(descriptor, given).unwrap());
            let bytes =
                message.as_ref().map_or_else(|| unhex(text(entry, "bytes")), DynamicMessage::encode_to_vec);
            let error = decode(kind, &bytes).expect_err(about);
            let mut fields = vec![("about", quoted(about)), ("kind", kind_text(kind))];
            fields.extend(message.map(|message| ("message", pretty(&message))));
            fields.push(("bytes", quoted(&hex(&bytes))));
            fields.push(("error", quoted(&error.to_string())));
            entry_text(&fields)
        })
        .collect();
    check("vectors/refused.json", &list_text(&text));
}

/// Names of the fields and enum values that a message sets, in it and below.
fn used(message: &DynamicMessage, out: &mut BTreeSet<String>) {
    for (field, content) in message.fields() {
        out.insert(field.full_name().to_owned());
        used_in(content, field.kind().as_enum(), out);
    }
}

fn used_in(value: &prost_reflect::Value, enumeration: Option<&EnumDescriptor>, out: &mut BTreeSet<String>) {
    use prost_reflect::Value::{EnumNumber, List, Message};
    match (value, enumeration) {
        (Message(message), _) => used(message, out),
        (EnumNumber(number), Some(enumeration)) => {
            out.insert(enumeration.get_value(*number).unwrap().full_name().to_owned());
        }
        (List(list), _) => list.iter().for_each(|item| used_in(item, enumeration, out)),
        _ => {}
    }
}

/// Names of all fields and enum values that a message can set, in it and below.
fn possible(message: &MessageDescriptor, out: &mut BTreeSet<String>) {
    for field in message.fields() {
        out.insert(field.full_name().to_owned());
        match field.kind() {
            prost_reflect::Kind::Message(inner) => possible(&inner, out),
            prost_reflect::Kind::Enum(inner) => {
                let values = inner.values().filter(|value| value.number() != 0);
                out.extend(values.map(|value| value.full_name().to_owned()));
            }
            _ => {}
        }
    }
}

#[test]
fn vectors_set_every_field() {
    let (mut seen, mut wanted) = (BTreeSet::new(), BTreeSet::new());
    for object in objects().values() {
        used(&object.message, &mut seen);
        possible(&object.message.descriptor(), &mut wanted);
    }
    // Whole seconds only, and features that no Service needs.
    for never in
        ["google.protobuf.Duration.nanos", "lockstep.v1.FEATURE_ENDPOINT_PATCH", "lockstep.v1.FEATURE_ZSTD"]
    {
        assert!(wanted.remove(never), "{never}");
    }
    let mut missing = String::new();
    for name in wanted.difference(&seen) {
        writeln!(missing, "{name}").unwrap();
    }
    assert!(missing.is_empty(), "no vector has\n{missing}");
    assert!(objects().values().any(|object| object.bytes.len() > 127), "lengths of two bytes");
    let keys: BTreeSet<Key> = objects().values().map(|object| object.resource.key()).collect();
    assert!(keys.len() < objects().len(), "two versions of one resource");
}

/// The document works one vector out by hand.
#[test]
fn the_document_says_what_the_vectors_say() {
    let document = String::from_utf8(read("../../docs/protocol.md").unwrap()).unwrap();
    let vector =
        entries("vectors/objects.json").into_iter().find(|entry| text(entry, "name") == "no-address-no-port");
    let vector = vector.unwrap();
    for field in ["version", "digest"] {
        assert!(document.contains(&format!("`{}`", text(&vector, field))), "{field} of no-address-no-port");
    }
    let start = document.find("| bytes | field |").unwrap();
    let table = document[start..].lines().take_while(|line| line.starts_with('|'));
    let cell = |line: &str| line.split('`').nth(1).unwrap_or_default().replace(' ', "");
    assert_eq!(table.skip(2).map(cell).collect::<String>(), text(&vector, "canonical"));
}
