//! The contract documents everything and keeps to the usual names (those of buf's STANDARD set).

use std::collections::HashSet;

use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet};

use crate::FILE_DESCRIPTOR_SET;

fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    set.file.into_iter().filter(|file| file.package() == "lockstep.v1").collect()
}

/// Name and source path of everything that is declared in a file.
fn declarations(file: &FileDescriptorProto) -> Vec<(String, Vec<i32>)> {
    let mut all = Vec::new();
    let index = |index: usize| i32::try_from(index).unwrap();
    for (at, message) in file.message_type.iter().enumerate() {
        all.push((message.name().to_owned(), vec![4, index(at)]));
        for (inner, field) in message.field.iter().enumerate() {
            all.push((format!("{}.{}", message.name(), field.name()), vec![4, index(at), 2, index(inner)]));
        }
        for (inner, oneof) in message.oneof_decl.iter().enumerate() {
            all.push((format!("{}.{}", message.name(), oneof.name()), vec![4, index(at), 8, index(inner)]));
        }
    }
    for (at, enumeration) in file.enum_type.iter().enumerate() {
        all.push((enumeration.name().to_owned(), vec![5, index(at)]));
        for (inner, value) in enumeration.value.iter().enumerate() {
            all.push((value.name().to_owned(), vec![5, index(at), 2, index(inner)]));
        }
    }
    for (at, service) in file.service.iter().enumerate() {
        all.push((service.name().to_owned(), vec![6, index(at)]));
        for (inner, method) in service.method.iter().enumerate() {
            all.push((format!("{}.{}", service.name(), method.name()), vec![6, index(at), 2, index(inner)]));
        }
    }
    all
}

#[test]
fn everything_is_documented() {
    let mut seen = 0;
    for file in files() {
        let info = file.source_code_info.as_ref().unwrap();
        for (name, path) in declarations(&file) {
            let comment =
                info.location.iter().find(|location| location.path == path).unwrap().leading_comments();
            let text = comment.trim();
            assert!(!text.is_empty(), "{}: {name} has no comment", file.name());
            assert!(
                text.ends_with(['.', '?']),
                "{}: the comment of {name} is no sentence: {text:?}",
                file.name()
            );
            seen += 1;
        }
    }
    assert!(seen > 300, "only {seen} declarations were looked at");
}

fn is_pascal(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn is_lower_snake(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// `ServiceType` -> `SERVICE_TYPE`.
fn upper_snake(pascal: &str) -> String {
    let mut out = String::new();
    for (at, letter) in pascal.char_indices() {
        if at > 0 && letter.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(letter.to_ascii_uppercase());
    }
    out
}

#[test]
fn names_are_the_usual_ones() {
    for file in files() {
        assert!(
            file.name().starts_with("lockstep/v1/"),
            "{}: not in the directory of its package",
            file.name()
        );
        for message in &file.message_type {
            assert!(is_pascal(message.name()), "message {}", message.name());
            let oneofs = message.oneof_decl.iter().map(|it| it.name());
            for name in message.field.iter().map(|it| it.name()).chain(oneofs) {
                assert!(is_lower_snake(name), "{}.{name}", message.name());
            }
        }
        for enumeration in &file.enum_type {
            assert!(is_pascal(enumeration.name()), "enum {}", enumeration.name());
            let prefix = upper_snake(enumeration.name()) + "_";
            for value in &enumeration.value {
                assert!(value.name().starts_with(&prefix), "{} does not start with {prefix}", value.name());
            }
            let zero = enumeration.value.iter().find(|value| value.number() == 0).map(|value| value.name());
            assert_eq!(zero, Some(&*format!("{prefix}UNSPECIFIED")));
        }
    }
}

#[test]
fn every_rpc_has_messages_of_its_own() {
    let mut used = HashSet::new();
    for file in files() {
        for service in &file.service {
            assert!(is_pascal(service.name()) && service.name().ends_with("Service"), "{}", service.name());
            for method in &service.method {
                assert!(is_pascal(method.name()), "{}", method.name());
                let expected = |suffix: &str| format!(".lockstep.v1.{}{suffix}", method.name());
                assert_eq!(method.input_type(), expected("Request"));
                assert_eq!(method.output_type(), expected("Response"));
                assert!(used.insert(method.input_type().to_owned()), "{} is used twice", method.input_type());
            }
        }
    }
    assert!(used.len() >= 10, "only {} calls were looked at", used.len());
}
