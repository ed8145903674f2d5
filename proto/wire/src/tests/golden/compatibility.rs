//! The contract only grows: what was in `descriptor.binpb`, the committed descriptor set, must
//! still mean the same, on the wire and as JSON.

use std::collections::BTreeMap;

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
};

use super::{check, read};
use crate::FILE_DESCRIPTOR_SET;

/// The contract without comments, so that editing one is no change.
fn current() -> FileDescriptorSet {
    let mut set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    set
}

/// Every type and service of our package, by name.
#[derive(Default)]
struct Contract<'a> {
    messages: BTreeMap<&'a str, &'a DescriptorProto>,
    enums: BTreeMap<&'a str, &'a EnumDescriptorProto>,
    services: BTreeMap<&'a str, &'a ServiceDescriptorProto>,
}

impl<'a> Contract<'a> {
    fn of(set: &'a FileDescriptorSet) -> Self {
        let mut contract = Self::default();
        for file in set.file.iter().filter(|file| file.package() == "lockstep.v1") {
            contract.messages.extend(file.message_type.iter().map(|it| (it.name(), it)));
            contract.enums.extend(file.enum_type.iter().map(|it| (it.name(), it)));
            contract.services.extend(file.service.iter().map(|it| (it.name(), it)));
        }
        for message in contract.messages.values() {
            let nested = message.nested_type.len() + message.enum_type.len();
            assert_eq!(nested, 0, "{}: nested types are not compared, so there are none", message.name());
        }
        contract
    }
}

/// What `new` breaks of `old`, one line each.
fn breaks(old: &FileDescriptorSet, new: &FileDescriptorSet) -> Vec<String> {
    let (old, new) = (Contract::of(old), Contract::of(new));
    let mut breaks = Vec::new();
    for (name, message) in &old.messages {
        match new.messages.get(name) {
            Some(now) => message_breaks(message, now, &mut breaks),
            None => breaks.push(format!("message {name} is gone")),
        }
    }
    for (name, enumeration) in &old.enums {
        let Some(now) = new.enums.get(name) else {
            breaks.push(format!("enum {name} is gone"));
            continue;
        };
        for value in &enumeration.value {
            let there = now.value.iter().find(|it| it.number() == value.number());
            if there.is_none_or(|it| it.name() != value.name()) {
                breaks.push(format!("value {} = {} is gone or renamed", value.name(), value.number()));
            }
        }
    }
    for (name, service) in &old.services {
        let Some(now) = new.services.get(name) else {
            breaks.push(format!("service {name} is gone"));
            continue;
        };
        for method in &service.method {
            match now.method.iter().find(|it| it.name() == method.name()) {
                None => breaks.push(format!("rpc {name}.{} is gone", method.name())),
                Some(it) if it != method => breaks.push(format!("rpc {name}.{} has changed", method.name())),
                Some(_) => {}
            }
        }
    }
    breaks
}

fn message_breaks(old: &DescriptorProto, new: &DescriptorProto, breaks: &mut Vec<String>) {
    for field in &old.field {
        let path = format!("{}.{} = {}", old.name(), field.name(), field.number());
        let Some(now) = new.field.iter().find(|it| it.number() == field.number()) else {
            breaks.push(format!("field {path} is gone or has another number"));
            continue;
        };
        if (now.name(), now.json_name()) != (field.name(), field.json_name()) {
            breaks.push(format!("field {path} is renamed"));
        }
        let kind =
            |field: &FieldDescriptorProto| (field.r#type(), field.type_name().to_owned(), field.label());
        if kind(now) != kind(field) || now.proto3_optional() != field.proto3_optional() {
            breaks.push(format!("field {path} has another type"));
        }
        let oneof = |message: &DescriptorProto, field: &FieldDescriptorProto| {
            let index = usize::try_from(field.oneof_index?).unwrap();
            Some(message.oneof_decl[index].name().to_owned())
        };
        if oneof(new, now) != oneof(old, field) {
            breaks.push(format!("field {path} is in another oneof"));
        }
    }
}

#[test]
fn the_contract_only_grows() {
    let current = current();
    if let Some(committed) = read("descriptor.binpb") {
        let committed = FileDescriptorSet::decode(&committed[..]).unwrap();
        let breaks = breaks(&committed, &current);
        assert!(breaks.is_empty(), "these changes break peers of earlier releases:\n{}", breaks.join("\n"));
    }
    check("descriptor.binpb", &current.encode_to_vec());
}

/// Applies an edit to the contract, and says what it breaks.
fn breaks_of(edit: impl FnOnce(&mut FileDescriptorSet)) -> Vec<String> {
    let mut edited = current();
    edit(&mut edited);
    breaks(&current(), &edited)
}

fn message<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
    let mut messages = set.file.iter_mut().flat_map(|file| &mut file.message_type);
    messages.find(|message| message.name() == name).unwrap()
}

fn field<'a>(set: &'a mut FileDescriptorSet, name: &str, field: &str) -> &'a mut FieldDescriptorProto {
    message(set, name).field.iter_mut().find(|it| it.name() == field).unwrap()
}

fn enumeration<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut EnumDescriptorProto {
    set.file.iter_mut().flat_map(|file| &mut file.enum_type).find(|it| it.name() == name).unwrap()
}

fn service<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut ServiceDescriptorProto {
    set.file.iter_mut().flat_map(|file| &mut file.service).find(|it| it.name() == name).unwrap()
}

#[test]
fn additions_break_nothing() {
    let breaks = breaks_of(|set| {
        let added = FieldDescriptorProto { number: Some(1000), ..field(set, "Ack", "received_seq").clone() };
        let added = FieldDescriptorProto { name: Some("added".into()), ..added };
        message(set, "Ack").field.push(added);
        let mut value = enumeration(set, "Protocol").value[1].clone();
        (value.name, value.number) = (Some("PROTOCOL_ADDED".into()), Some(1000));
        enumeration(set, "Protocol").value.push(value);
        let mut method = service(set, "StatusService").method[0].clone();
        method.name = Some("GetMore".into());
        service(set, "StatusService").method.push(method);
        let mut more = message(set, "Heartbeat").clone();
        more.name = Some("More".into());
        set.file.last_mut().unwrap().message_type.push(more);
        // The order of declarations is nobody's business.
        message(set, "Hello").field.reverse();
        set.file.reverse();
    });
    assert_eq!(breaks, Vec::<String>::new());
}

#[test]
fn every_kind_of_break_is_caught() {
    use prost_types::field_descriptor_proto::{Label, Type};
    let remove = |set: &mut FileDescriptorSet, name: &str, gone: &str| {
        message(set, name).field.retain(|field| field.name() != gone);
    };
    type Edit<'a> = Box<dyn FnOnce(&mut FileDescriptorSet) + 'a>;
    let edits: Vec<(&str, Edit<'_>)> = vec![
        ("field Ack.applied_seq = 2 is gone", Box::new(|set| remove(set, "Ack", "applied_seq"))),
        (
            "field Ack.applied_seq = 2 is gone",
            Box::new(|set| field(set, "Ack", "applied_seq").number = Some(99)),
        ),
        (
            "field Ack.applied_seq = 2 has another type",
            Box::new(|set| field(set, "Ack", "applied_seq").set_type(Type::Sint64)),
        ),
        (
            "field Ack.failures = 6 has another type",
            Box::new(|set| field(set, "Ack", "failures").set_label(Label::Optional)),
        ),
        (
            "field Ack.position = 4 has another type",
            Box::new(|set| field(set, "Ack", "position").type_name = Some(".lockstep.v1.Hello".into())),
        ),
        (
            "field Hello.boot_id = 3 is renamed",
            Box::new(|set| field(set, "Hello", "boot_id").name = Some("boot".into())),
        ),
        (
            "field Hello.boot_id = 3 is renamed",
            Box::new(|set| field(set, "Hello", "boot_id").json_name = Some("boot".into())),
        ),
        (
            "field Update.batch = 4 is in another oneof",
            Box::new(|set| field(set, "Update", "batch").oneof_index = None),
        ),
        (
            "field Update.commit = 6 is in another oneof",
            Box::new(|set| field(set, "Update", "commit").oneof_index = Some(0)),
        ),
        (
            "field Update.batch = 4 is in another oneof",
            Box::new(|set| message(set, "Update").oneof_decl[0].name = Some("content".into())),
        ),
        (
            "message Goodbye is gone",
            Box::new(|set| {
                set.file.iter_mut().for_each(|file| file.message_type.retain(|it| it.name() != "Goodbye"));
            }),
        ),
        (
            "value PROTOCOL_SCTP = 3 is gone or renamed",
            Box::new(|set| enumeration(set, "Protocol").value.retain(|it| it.number() != 3)),
        ),
        (
            "value PROTOCOL_SCTP = 3 is gone or renamed",
            Box::new(|set| enumeration(set, "Protocol").value[3].name = Some("PROTOCOL_OTHER".into())),
        ),
        (
            "enum Protocol is gone",
            Box::new(|set| {
                set.file.iter_mut().for_each(|file| file.enum_type.retain(|it| it.name() != "Protocol"));
            }),
        ),
        (
            "rpc StatusService.GetServerInfo is gone",
            Box::new(|set| drop(service(set, "StatusService").method.remove(0))),
        ),
        (
            "rpc SyncService.FetchSnapshot has changed",
            Box::new(|set| service(set, "SyncService").method[1].server_streaming = Some(false)),
        ),
        (
            "rpc SyncService.FetchSnapshot has changed",
            Box::new(|set| {
                service(set, "SyncService").method[1].input_type = Some(".lockstep.v1.Hello".into())
            }),
        ),
        (
            "service SyncService is gone",
            Box::new(|set| {
                set.file.iter_mut().for_each(|file| file.service.retain(|it| it.name() != "SyncService"))
            }),
        ),
        (
            "message Service is gone",
            Box::new(|set| set.file.iter_mut().for_each(|file| file.package = Some("lockstep.v2".into()))),
        ),
    ];
    for (expected, edit) in edits {
        let breaks = breaks_of(edit);
        assert!(breaks.iter().any(|line| line.starts_with(expected)), "{expected}: {breaks:?}");
    }
}
