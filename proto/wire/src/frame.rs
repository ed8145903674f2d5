//! Responses that were encoded beforehand.
//!
//! A frame is made once, by [`batch`](crate::batch) or from a typed message, and shared by every
//! stream that sends it. On the wire it is an ordinary `SyncResponse` or `FetchSnapshotResponse`.

use std::marker::PhantomData;

use bytes::{BufMut, Bytes};
use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// A gRPC server for `lockstep.v1.SyncService` whose responses are [`Frame`]s.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/frame/lockstep.v1.SyncService.rs"));
}

pub use generated::sync_service_server;

/// One encoded message. Cloning shares the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame(Bytes);

impl Frame {
    /// Encodes a message.
    pub fn of(message: &impl Message) -> Self {
        Self(message.encode_to_vec().into())
    }

    /// Takes bytes that are an encoded message.
    pub fn from_encoded(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The encoded message.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }
}

impl From<Frame> for Bytes {
    fn from(frame: Frame) -> Self {
        frame.0
    }
}

/// Sends [`Frame`]s, receives `Request`s.
#[derive(Debug)]
pub struct FrameCodec<Request>(PhantomData<fn() -> Request>);

impl<Request> Default for FrameCodec<Request> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Request: Message + Default + 'static> Codec for FrameCodec<Request> {
    type Encode = Frame;
    type Decode = Request;
    type Encoder = FrameEncoder;
    type Decoder = RequestDecoder<Request>;

    fn encoder(&mut self) -> FrameEncoder {
        FrameEncoder(())
    }

    fn decoder(&mut self) -> RequestDecoder<Request> {
        RequestDecoder(PhantomData)
    }
}

/// The sending half of a [`FrameCodec`].
#[derive(Debug)]
pub struct FrameEncoder(());

/// The receiving half of a [`FrameCodec`].
#[derive(Debug)]
pub struct RequestDecoder<Request>(PhantomData<fn() -> Request>);

/// A control plane holds one buffer of each kind per node, most of them idle: 1 KiB instead of
/// the 8 KiB that are usual saves 70 MB at 5,000 nodes. Both grow with what passes through.
fn small_buffers() -> BufferSettings {
    BufferSettings::new(1024, 32 * 1024)
}

impl Encoder for FrameEncoder {
    type Item = Frame;
    type Error = Status;

    fn encode(&mut self, frame: Frame, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(frame.0.len());
        out.put(frame.0);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        small_buffers()
    }
}

impl<Request: Message + Default + 'static> Decoder for RequestDecoder<Request> {
    type Item = Request;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Request>, Status> {
        // The peer's bytes are at fault, not the server.
        Request::decode(bytes)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("the request cannot be decoded: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        small_buffers()
    }
}
