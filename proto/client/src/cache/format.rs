//! The bytes of the cache file.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes};
use lockstep_model::{Interner, NodeContext, Resource, State, Version};
use lockstep_wire::batch::{TooLarge, UpdateWriter};
use lockstep_wire::frame::Frame;
use lockstep_wire::{batch, convert, raw, v1};

use super::honest;
use crate::Position;
use crate::session::{Change, Held, Replay};

/// Of the file as a whole; the records are versioned by the protocol.
const MAGIC: &[u8; 16] = b"lockstep-held-1\n";
const CHECKSUM: usize = 16;
/// A record is a message of the protocol, which has at most 1 MiB.
const MAX_RECORD: usize = 2 * 1024 * 1024;

/// A state read from a file.
pub(super) struct Loaded {
    pub(super) held: Held,
    pub(super) saved_at: SystemTime,
    /// Bytes of the file up to and with the first commit.
    pub(super) base_bytes: u64,
    /// Bytes of the file up to and with the last commit.
    pub(super) good_bytes: u64,
    /// The file has resources of kinds that this release does not know.
    pub(super) passed_over: bool,
}

/// Reads a file. `None` where there is none, or none that is of use; that is logged.
pub(super) fn load(path: &Path, node_name: &str) -> io::Result<Option<Loaded>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => Bytes::from(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let saved_at = fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap_or(UNIX_EPOCH);
    let total = bytes.len();
    match parse(bytes, node_name) {
        Ok(Parsed { held, base_bytes, good_bytes, passed_over, ended }) => {
            if let Some(why) = ended {
                tracing::warn!(
                    path = %path.display(), why, good_bytes, total_bytes = total,
                    "the cache ends in something unreadable, using what is before it"
                );
            }
            if passed_over {
                tracing::warn!(
                    path = %path.display(),
                    "the cache is of a newer release: kinds of resources that this one does not know are left out"
                );
            }
            let (base_bytes, good_bytes) = (base_bytes as u64, good_bytes as u64);
            Ok(Some(Loaded { held, saved_at, base_bytes, good_bytes, passed_over }))
        }
        Err(why) => {
            tracing::warn!(path = %path.display(), why, "the cache is of no use, starting with nothing");
            Ok(None)
        }
    }
}

struct Parsed {
    held: Held,
    base_bytes: usize,
    good_bytes: usize,
    passed_over: bool,
    /// What ended the reading before the end.
    ended: Option<String>,
}

fn parse(bytes: Bytes, node_name: &str) -> Result<Parsed, String> {
    let mut rest = bytes.clone();
    check_header(&mut rest, node_name)?;
    let mut replay = Replay::default();
    let mut node = NodeContext::unknown(node_name);
    let mut good = None;
    let mut interner = Interner::default();
    let ended = loop {
        if rest.is_empty() {
            break None;
        }
        let kind = match record(&mut rest) {
            Ok(message) => message.kind,
            Err(why) => break Some(why),
        };
        match kind {
            Some(raw::sync_response::Kind::NodeContext(facts)) => {
                match convert::node_context_from_wire(&facts) {
                    Ok(facts) => node = facts,
                    Err(error) => break Some(error.to_string()),
                }
            }
            Some(raw::sync_response::Kind::Update(update)) => match replay.update(update, &mut interner) {
                Ok(Some(position)) => {
                    let read = bytes.len() - rest.len();
                    let base = good.map_or(read, |(_, base, _)| base);
                    good = Some((position, base, read));
                }
                Ok(None) => {}
                Err(why) => break Some(why),
            },
            _ => break Some("a record of an unknown kind".to_owned()),
        }
    };
    let (position, base_bytes, good_bytes) =
        good.ok_or_else(|| ended.clone().unwrap_or("it holds no state".to_owned()))?;
    let state = replay.into_state();
    let passed_over = state.digest() != position.digest;
    let position = honest(position, state.digest());
    let held = Held { state, position, node, names: interner };
    let ended = ended.or_else(|| (good_bytes < bytes.len()).then(|| "a commit is missing".to_owned()));
    Ok(Parsed { held, base_bytes, good_bytes, passed_over, ended })
}

fn check_header(rest: &mut Bytes, node_name: &str) -> Result<(), String> {
    let expected = header(node_name);
    if rest.len() >= expected.len() && rest[..expected.len()] == expected[..] {
        rest.advance(expected.len());
        return Ok(());
    }
    if !rest.starts_with(MAGIC) {
        return Err("it is not a cache file of this format".to_owned());
    }
    let name = rest
        .get(MAGIC.len()..MAGIC.len() + 2)
        .map(|length| usize::from(u16::from_le_bytes([length[0], length[1]])))
        .and_then(|length| rest.get(MAGIC.len() + 2..MAGIC.len() + 2 + length))
        .and_then(|name| std::str::from_utf8(name).ok());
    match name {
        Some(name) if name != node_name => Err(format!("it belongs to node {name:?}")),
        _ => Err("its header is damaged".to_owned()),
    }
}

/// Magic, length and text of the node's name, checksum.
pub(super) fn header(node_name: &str) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&u16::try_from(node_name.len()).unwrap_or(u16::MAX).to_le_bytes());
    header.extend_from_slice(node_name.as_bytes());
    let checksum = Version::of(&header);
    header.extend_from_slice(&checksum.0);
    header
}

/// Takes one record off.
fn record(rest: &mut Bytes) -> Result<raw::SyncResponse, String> {
    let torn = || "a record is cut off".to_owned();
    let prefix = rest.get(..4 + CHECKSUM).ok_or_else(torn)?;
    let length_bytes = [prefix[0], prefix[1], prefix[2], prefix[3]];
    let length = u32::from_le_bytes(length_bytes) as usize;
    if length > MAX_RECORD {
        return Err("a record has an impossible length".to_owned());
    }
    let body = rest.get(4 + CHECKSUM..4 + CHECKSUM + length).ok_or_else(torn)?;
    if checksum(length_bytes, body).0[..] != prefix[4..] {
        return Err("a record's checksum is wrong".to_owned());
    }
    rest.advance(4 + CHECKSUM);
    let body = rest.split_to(length);
    batch::decode_response(body).map_err(|error| error.to_string())
}

fn checksum(length: [u8; 4], body: &[u8]) -> Version {
    // The length is covered too: hashing the body's hash with it avoids a copy.
    let mut both = [0; 4 + CHECKSUM];
    both[..4].copy_from_slice(&length);
    both[4..].copy_from_slice(&Version::of(body).0);
    Version::of(&both)
}

pub(super) fn push_record(out: &mut Vec<u8>, frame: &Frame) {
    out.extend_from_slice(&record_prefix(frame.bytes()));
    out.extend_from_slice(frame.bytes());
}

/// Length and checksum of a record.
fn record_prefix(body: &[u8]) -> [u8; 4 + CHECKSUM] {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes();
    let mut prefix = [0; 4 + CHECKSUM];
    prefix[..4].copy_from_slice(&length);
    prefix[4..].copy_from_slice(&checksum(length, body).0);
    prefix
}

/// The record of a node's facts.
pub(super) fn node_record(out: &mut Vec<u8>, node: &NodeContext) {
    let kind = v1::sync_response::Kind::NodeContext(convert::node_context_to_wire(node));
    push_record(out, &Frame::of(&v1::SyncResponse { kind: Some(kind) }));
}

/// The records of a transaction.
pub(super) fn change_records(
    out: &mut Vec<u8>,
    changes: &[Change],
    position: Position,
    resources: u64,
) -> Result<(), WriteError> {
    let mut writer = update_writer(position, resources, false)?;
    for change in changes {
        match change {
            Change::Upsert(version, resource) => upsert(&mut writer, *version, resource)?,
            Change::Remove(key) => writer.remove(key),
        }
    }
    writer.finish().iter().for_each(|frame| push_record(out, frame));
    Ok(())
}

/// Writes the records of a whole state, each as soon as it is full: all of them are as large as
/// the state. Returns how many bytes they have.
pub(super) fn write_state(
    out: &mut impl io::Write,
    state: &State,
    position: Position,
) -> Result<u64, WriteError> {
    let mut writer = update_writer(position, state.len(), true)?;
    let mut written = 0;
    for (version, resource) in state.resources() {
        upsert(&mut writer, version, &resource)?;
        for frame in writer.take_full() {
            written += write_record(out, &frame)?;
        }
    }
    for frame in writer.finish() {
        written += write_record(out, &frame)?;
    }
    Ok(written)
}

fn write_record(out: &mut impl io::Write, frame: &Frame) -> io::Result<u64> {
    let prefix = record_prefix(frame.bytes());
    out.write_all(&prefix)?;
    out.write_all(frame.bytes())?;
    Ok((prefix.len() + frame.bytes().len()) as u64)
}

/// Why something cannot be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
}

fn update_writer(position: Position, resources: u64, full: bool) -> io::Result<UpdateWriter> {
    let to = position.to_wire(resources);
    UpdateWriter::new(batch::Transaction { from: None, to, full, trigger_time: None }, false)
}

fn upsert(writer: &mut UpdateWriter, version: Version, resource: &Resource) -> Result<(), TooLarge> {
    writer.upsert(resource.key().kind(), version, &resource.canonical())
}
