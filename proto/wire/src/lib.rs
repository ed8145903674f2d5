//! The wire: `lockstep.v1` as generated code, and the way between it and the model.
//!
//! ```text
//!              store ── version, canonical bytes ──> batch ──> Frame ──> frame::SyncServiceServer
//!                                                                              ┊ gRPC
//! model <── decode ── body bytes ── batch::Unpacker <── raw::Update <── raw::SyncServiceClient
//! ```
//!
//! One contract, three views of it, all the same on the wire:
//! * [`v1`]: every message typed, every service with client and server. For people, for tests and
//!   for third parties.
//! * [`raw`]: the messages that carry resources, with the bodies left as bytes. A node hashes
//!   exactly what it received and decodes it once, straight into the model.
//! * [`frame`]: a Sync server that sends encoded frames, so that a change is encoded and compressed
//!   once for all streams.
//!
//! This is the only crate with protobuf types. It knows no store, no session and no kernel.
#![forbid(unsafe_code)]

pub mod batch;
pub mod convert;
mod decode;
pub mod frame;
#[cfg(test)]
mod tests;

pub use decode::{
    DecodeError, ReceivedPatch, ResourceError, decode_body, decode_endpoint_set, decode_key, decode_resource,
    decode_service, decode_service_cidr, take_body,
};

/// `lockstep.v1`, every message typed.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/v1/lockstep.v1.rs"));
}

/// The messages of `lockstep.v1` that carry resources, with the bodies as bytes; and a client
/// that receives them.
///
/// The bytes share the buffer the message was received in: copy what is kept for long.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod raw {
    include!(concat!(env!("OUT_DIR"), "/raw/lockstep.v1.rs"));
}

/// Encoded `FileDescriptorSet` of the contract and what it imports, with comments: for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.binpb"));
