//! Transactions as frames: building, splitting, compressing, and the way back.

use bytes::Bytes;
use lockstep_model::{EndpointPatch, EndpointSetKey, Key, Kind, Version};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::frame::Frame;
use crate::raw::update::Payload;
use crate::{convert, raw, v1};

/// Largest message, as it is sent.
pub const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

/// Largest body of one resource; leaves room in a message for all else.
pub const MAX_RESOURCE_BYTES: usize = lockstep_model::canonical::MAX_BYTES;

/// Largest batch after decompression that a client accepts.
pub const MAX_UNCOMPRESSED_BYTES: usize = 4 * 1024 * 1024;

/// Smaller batches are not worth compressing.
const MIN_COMPRESSED_BYTES: usize = 1024;

/// zstd's own default: a full snapshot shrinks to a quarter at some 100 MB/s.
const COMPRESSION_LEVEL: i32 = 3;

/// Tags and lengths around a batch: `SyncResponse.update`, `Update.payload` and, compressed,
/// `CompressedBatch`, at most 5 bytes of length each; and `Update.commit`.
const ENVELOPE_BYTES: usize = 64;

/// What every message of a transaction says.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    /// What the client must hold; `None` = anything.
    pub from: Option<v1::Position>,
    /// What the client holds afterwards.
    pub to: v1::Position,
    /// Whatever is not listed is gone.
    pub full: bool,
    /// Oldest cause.
    pub trigger_time: Option<prost_types::Timestamp>,
}

/// A resource or patch that does not fit into a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {bytes} bytes are too many for one message")]
pub struct TooLarge {
    /// Text form of the key; empty for an upsert, whose bytes the caller holds the key of.
    pub key: String,
    /// Its size.
    pub bytes: usize,
}

/// Writes one transaction as encoded `SyncResponse`s.
pub struct UpdateWriter {
    /// An encoded `Update` without payload and commit.
    head: Vec<u8>,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    batch: BatchWriter,
    frames: Vec<Frame>,
}

/// Writes one snapshot as encoded `FetchSnapshotResponse`s.
pub struct SnapshotWriter {
    /// An encoded `FetchSnapshotResponse` without batch.
    head: Vec<u8>,
    batch: BatchWriter,
    frames: Vec<Frame>,
}

/// An encoded `ResourceBatch`.
struct BatchWriter {
    bytes: Vec<u8>,
    room: usize,
}

impl UpdateWriter {
    /// Begins a transaction. With `zstd`, batches of more than 1 KiB are compressed; only for
    /// clients with `FEATURE_ZSTD`.
    pub fn new(transaction: Transaction, zstd: bool) -> std::io::Result<Self> {
        let Transaction { from, to, full, trigger_time } = transaction;
        let head =
            v1::Update { from, to: Some(to), full, trigger_time, ..Default::default() }.encode_to_vec();
        let compressor = zstd.then(|| zstd::bulk::Compressor::new(COMPRESSION_LEVEL)).transpose()?;
        Ok(Self { batch: BatchWriter::new(head.len()), head, compressor, frames: Vec::new() })
    }

    /// Adds a new or changed resource.
    pub fn upsert(&mut self, kind: Kind, version: Version, canonical: &[u8]) -> Result<(), TooLarge> {
        let start = self.batch.upsert(kind, version, canonical)?;
        self.flush_before(start);
        Ok(())
    }

    /// Adds the removal of a resource.
    pub fn remove(&mut self, key: &Key) {
        let start = self.batch.part(2, &convert::key_to_wire(key, None));
        self.flush_before(start);
    }

    /// Adds a changed EndpointSet as a difference; only for clients with
    /// `FEATURE_ENDPOINT_PATCH`.
    pub fn patch(
        &mut self,
        key: &EndpointSetKey,
        base: Version,
        version: Version,
        patch: &EndpointPatch,
    ) -> Result<(), TooLarge> {
        let message = convert::patch_to_wire(key, base, version, patch);
        let bytes = message.encoded_len();
        if bytes > self.batch.room - ENVELOPE_BYTES {
            return Err(TooLarge { key: message.key, bytes });
        }
        let start = self.batch.part(3, &message);
        self.flush_before(start);
        Ok(())
    }

    /// Takes the frames out that are full, so that a large transaction need not be held as a whole.
    pub fn take_full(&mut self) -> impl Iterator<Item = Frame> {
        self.frames.drain(..)
    }

    /// Ends the transaction: the frames that were not taken out, at least one; the last commits.
    pub fn finish(mut self) -> Vec<Frame> {
        let batch = std::mem::take(&mut self.batch.bytes);
        self.push(batch, true);
        self.frames
    }

    fn flush_before(&mut self, start: usize) {
        if let Some(full) = self.batch.split_full(start) {
            self.push(full, false);
        }
    }

    fn push(&mut self, batch: Vec<u8>, commit: bool) {
        let mut update = Vec::with_capacity(self.head.len() + batch.len() + ENVELOPE_BYTES);
        update.extend_from_slice(&self.head);
        match self.compress(&batch) {
            Some(compressed) => put_bytes(&mut update, 5, &compressed.encode_to_vec()),
            None if batch.is_empty() => {}
            None => put_bytes(&mut update, 4, &batch),
        }
        if commit {
            encode_key(6, WireType::Varint, &mut update);
            encode_varint(1, &mut update);
        }
        let mut response = Vec::with_capacity(update.len() + 8);
        put_bytes(&mut response, 2, &update);
        self.frames.push(Frame::from_encoded(response));
    }

    /// `None` where it is not asked for or does not pay.
    fn compress(&mut self, batch: &[u8]) -> Option<v1::CompressedBatch> {
        let compressor = self.compressor.as_mut().filter(|_| batch.len() > MIN_COMPRESSED_BYTES)?;
        let data = compressor.compress(batch).ok().filter(|data| data.len() < batch.len())?;
        let uncompressed_bytes = u32::try_from(batch.len()).ok()?;
        let compression = v1::Compression::Zstd.into();
        Some(v1::CompressedBatch { compression, data: data.into(), uncompressed_bytes })
    }
}

impl SnapshotWriter {
    /// Begins a snapshot.
    pub fn new(position: v1::Position) -> Self {
        let message = v1::FetchSnapshotResponse { position: Some(position), batch: None };
        let head = message.encode_to_vec();
        Self { batch: BatchWriter::new(head.len()), head, frames: Vec::new() }
    }

    /// Adds a resource. Callers add them sorted by (kind, key).
    pub fn upsert(&mut self, kind: Kind, version: Version, canonical: &[u8]) -> Result<(), TooLarge> {
        let start = self.batch.upsert(kind, version, canonical)?;
        if let Some(full) = self.batch.split_full(start) {
            self.push(&full);
        }
        Ok(())
    }

    /// Ends the snapshot: at least one frame, also where it is empty.
    pub fn finish(mut self) -> Vec<Frame> {
        let batch = std::mem::take(&mut self.batch.bytes);
        if !batch.is_empty() || self.frames.is_empty() {
            self.push(&batch);
        }
        self.frames
    }

    fn push(&mut self, batch: &[u8]) {
        let mut response = Vec::with_capacity(self.head.len() + batch.len() + 8);
        response.extend_from_slice(&self.head);
        if !batch.is_empty() {
            put_bytes(&mut response, 2, batch);
        }
        self.frames.push(Frame::from_encoded(response));
    }
}

impl BatchWriter {
    fn new(head: usize) -> Self {
        let room = MAX_MESSAGE_BYTES.saturating_sub(head + ENVELOPE_BYTES);
        Self { bytes: Vec::new(), room: room.max(MAX_RESOURCE_BYTES + ENVELOPE_BYTES) }
    }

    /// Adds a resource; returns where it starts.
    fn upsert(&mut self, kind: Kind, version: Version, canonical: &[u8]) -> Result<usize, TooLarge> {
        if canonical.len() > MAX_RESOURCE_BYTES {
            return Err(TooLarge { key: String::new(), bytes: canonical.len() });
        }
        let start = self.bytes.len();
        let body = match kind {
            Kind::Service => 2,
            Kind::EndpointSet => 3,
            Kind::ServiceCidr => 4,
        };
        let length = 2 + version.0.len() + 1 + prost::length_delimiter_len(canonical.len()) + canonical.len();
        encode_key(1, WireType::LengthDelimited, &mut self.bytes);
        encode_varint(length as u64, &mut self.bytes);
        put_bytes(&mut self.bytes, 1, &version.0);
        put_bytes(&mut self.bytes, body, canonical);
        Ok(start)
    }

    /// Adds a part that has a message of its own; returns where it starts.
    fn part(&mut self, field: u32, message: &impl Message) -> usize {
        let start = self.bytes.len();
        prost::encoding::message::encode(field, message, &mut self.bytes);
        start
    }

    /// The batch before the part at `start`, if that part was one too many.
    fn split_full(&mut self, start: usize) -> Option<Vec<u8>> {
        (self.bytes.len() > self.room && start > 0).then(|| {
            let part = self.bytes.split_off(start);
            std::mem::replace(&mut self.bytes, part)
        })
    }
}

fn put_bytes(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// Reads a message of the server that was kept as bytes. The bodies share the buffer.
pub fn decode_response(bytes: Bytes) -> Result<raw::SyncResponse, prost::DecodeError> {
    raw::SyncResponse::decode(bytes)
}

/// Why the payload of an update is no batch.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Compressed in a way that this release does not know.
    #[error("compression: {0} is not a value this release knows")]
    UnknownCompression(i32),
    /// Stated to be larger than a client accepts.
    #[error("uncompressed_bytes: {0} is more than 4 MiB")]
    TooLarge(u32),
    /// Not what the compression makes, or of another size than stated.
    #[error("data: cannot be decompressed: {0}")]
    Decompress(#[from] std::io::Error),
    /// Of another size than stated.
    #[error("uncompressed_bytes: {stated} is wrong, it is {actual}")]
    WrongSize {
        /// As stated.
        stated: u32,
        /// As it is.
        actual: usize,
    },
    /// Not an encoded `ResourceBatch`.
    #[error("data: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Turns payloads back into batches. Keeps its working memory between calls.
pub struct Unpacker(zstd::bulk::Decompressor<'static>);

impl Unpacker {
    /// A new one, with working memory of some 100 KiB.
    pub fn new() -> std::io::Result<Self> {
        zstd::bulk::Decompressor::new().map(Self)
    }

    /// The batch in a payload. Never takes more memory than stated there, nor than 4 MiB.
    pub fn unpack(&mut self, payload: Payload) -> Result<raw::ResourceBatch, UnpackError> {
        let compressed = match payload {
            Payload::Batch(batch) => return Ok(batch),
            Payload::Compressed(compressed) => compressed,
        };
        if compressed.compression() != v1::Compression::Zstd {
            return Err(UnpackError::UnknownCompression(compressed.compression));
        }
        let stated = compressed.uncompressed_bytes;
        let capacity = stated as usize;
        if capacity > MAX_UNCOMPRESSED_BYTES {
            return Err(UnpackError::TooLarge(stated));
        }
        let batch = self.0.decompress(&compressed.data, capacity)?;
        if batch.len() != capacity {
            return Err(UnpackError::WrongSize { stated, actual: batch.len() });
        }
        Ok(raw::ResourceBatch::decode(Bytes::from(batch))?)
    }
}
