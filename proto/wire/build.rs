//! Compiles `proto/lockstep/v1` without `protoc` and generates three modules of one contract:
//! typed messages (`v1`), their twin with undecoded bodies (`raw`), and a Sync server that
//! sends frames encoded beforehand (`frame`).

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};

use prost::Message;
use prost_types::field_descriptor_proto::Type;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use tonic_prost_build::manual;

const PACKAGE: &str = "lockstep.v1";
const FILES: [&str; 3] =
    ["lockstep/v1/model.proto", "lockstep/v1/sync_service.proto", "lockstep/v1/status_service.proto"];

/// The fields that the raw twin leaves undecoded: (message, field).
const UNDECODED: [(&str, &str); 5] = [
    ("Resource", "service"),
    ("Resource", "endpoint_set"),
    ("Resource", "service_cidr"),
    ("ResourceBatch", "patches"),
    ("EndpointPatch", "upserts"),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    let set = compiler.open_files(FILES)?.file_descriptor_set();

    std::fs::write(out.join("descriptor.binpb"), set.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").out_dir(module(&out, "v1")?).compile_fds(set.clone())?;
    generate_raw(set, &module(&out, "raw")?)?;
    generate_frame_server(&module(&out, "frame")?);
    Ok(())
}

fn module(out: &Path, name: &str) -> std::io::Result<PathBuf> {
    let path = out.join(name);
    std::fs::create_dir_all(&path)?;
    Ok(path)
}

/// The messages with undecoded fields and those that hold them, with these fields as bytes;
/// every other type is the one of `v1`. On the wire a message and bytes look the same.
fn generate_raw(mut set: FileDescriptorSet, out: &Path) -> Result<(), Box<dyn Error>> {
    let ours = || FILES.into_iter();
    let affected = affected_messages(set.file.iter().filter(|file| ours().any(|name| name == file.name())));
    let mut builder = tonic_prost_build::configure().bytes(".").build_server(false).out_dir(out);
    for file in set.file.iter_mut().filter(|file| ours().any(|name| name == file.name())) {
        let messages = file.message_type.iter().map(|message| message.name());
        let types = messages.chain(file.enum_type.iter().map(|enumeration| enumeration.name()));
        for name in types.filter(|name| !affected.contains(&full_name(name))) {
            builder = builder.extern_path(full_name(name), format!("crate::v1::{name}"));
        }
        file.service.retain(|service| service.name() == "SyncService");
        for message in &mut file.message_type {
            let name = message.name().to_owned();
            let undecoded = |field: &str| UNDECODED.contains(&(name.as_str(), field));
            for field in message.field.iter_mut().filter(|field| undecoded(field.name())) {
                field.set_type(Type::Bytes);
                field.type_name = None;
            }
        }
    }
    // Status answers are for people, who want them decoded.
    set.file.retain(|file| !file.name().ends_with("status_service.proto"));
    Ok(builder.compile_fds(set)?)
}

fn full_name(name: &str) -> String {
    format!(".{PACKAGE}.{name}")
}

/// Full names of the messages with undecoded fields and of all that reach them. The contract
/// has no nested messages.
fn affected_messages<'a>(files: impl Iterator<Item = &'a FileDescriptorProto>) -> BTreeSet<String> {
    let messages: Vec<_> = files.flat_map(|file| &file.message_type).collect();
    let mut affected: BTreeSet<_> = UNDECODED.iter().map(|(message, _)| full_name(message)).collect();
    loop {
        let before = affected.len();
        for message in &messages {
            if message.field.iter().any(|field| affected.contains(field.type_name())) {
                affected.insert(full_name(message.name()));
            }
        }
        if affected.len() == before {
            return affected;
        }
    }
}

/// A server for `lockstep.v1.SyncService` whose responses are frames, encoded once for all
/// streams.
fn generate_frame_server(out: &Path) {
    let method = |name: &str, route: &str, request: &str| {
        manual::Method::builder()
            .name(name)
            .route_name(route)
            .input_type(request)
            .output_type("crate::frame::Frame")
            .codec_path("crate::frame::FrameCodec")
            .server_streaming()
    };
    let service = manual::Service::builder()
        .name("SyncService")
        .package(PACKAGE)
        .comment("Service state as frames that are encoded already.")
        .method(
            method("sync", "Sync", "crate::v1::SyncRequest")
                .client_streaming()
                .comment("A node's resumable, acknowledged stream of service state.")
                .build(),
        )
        .method(
            method("fetch_snapshot", "FetchSnapshot", "crate::v1::FetchSnapshotRequest")
                .comment("One consistent snapshot.")
                .build(),
        )
        .build();
    manual::Builder::new().build_client(false).out_dir(out).compile(&[service]);
}
