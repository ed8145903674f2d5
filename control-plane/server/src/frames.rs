//! Transactions as frames, each made once for all streams that need it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lockstep_model::Key;
use lockstep_store::{Delta, Entry, Position, Snapshot};
use lockstep_wire::batch::{Transaction, UpdateWriter};
use lockstep_wire::frame::Frame;
use lockstep_wire::v1;
use tokio::sync::OnceCell;

/// How many transactions are kept. Streams that keep up share the newest; a few more are for
/// those that are a step behind.
const KEPT: usize = 8;

/// How long a full snapshot is good for streams that start. When a whole cluster reconnects
/// during churn, this is one encoding per second instead of one per publication; what is
/// missing follows as a delta, which is shared too.
const SNAPSHOT_FRESH: Duration = Duration::from_secs(1);

/// What a client understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Dialect {
    pub(crate) zstd: bool,
    pub(crate) patches: bool,
}

impl Dialect {
    /// What our own node speaks.
    pub(crate) const USUAL: Dialect = Dialect { zstd: true, patches: true };
}

/// One encoded transaction. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    pub(crate) to: Position,
    pub(crate) frames: Arc<[Frame]>,
}

/// Why a transaction cannot be sent.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("{key}: {bytes} bytes are too many for one message")]
    TooLarge { key: String, bytes: usize },
    #[error("zstd: {0}")]
    Compressor(String),
    #[error("the encoder stopped")]
    Stopped,
}

type Cell = Arc<OnceCell<Built>>;

/// The newest transactions.
#[derive(Debug, Default)]
pub(crate) struct FrameCache {
    steps: Mutex<VecDeque<(Step, Cell)>>,
    snapshots: Mutex<VecDeque<(Dialect, Instant, Cell)>>,
}

/// From where to where, for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) from: Position,
    pub(crate) to: u64,
    pub(crate) dialect: Dialect,
}

impl FrameCache {
    /// The cell of a step; whoever finds it empty fills it.
    pub(crate) fn step(&self, step: Step) -> Cell {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cell)) = steps.iter().find(|(known, _)| *known == step) {
            return cell.clone();
        }
        if steps.len() == KEPT {
            steps.pop_front();
        }
        let cell = Cell::default();
        steps.push_back((step, cell.clone()));
        cell
    }

    /// The cell of a snapshot that is not older than `at_least` and as new as `head`, or fresh.
    pub(crate) fn snapshot(&self, dialect: Dialect, at_least: u64, head: u64, now: Instant) -> Cell {
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.retain(|(_, at, cell)| {
            let current = cell.get().is_some_and(|built| built.to.seq == head);
            current || now.saturating_duration_since(*at) < SNAPSHOT_FRESH
        });
        let usable = |cell: &Cell| cell.get().is_none_or(|built| built.to.seq >= at_least);
        if let Some((.., cell)) = snapshots.iter().find(|(known, _, cell)| *known == dialect && usable(cell))
        {
            return cell.clone();
        }
        snapshots.retain(|(known, ..)| *known != dialect);
        let cell = Cell::default();
        snapshots.push_back((dialect, now, cell.clone()));
        cell
    }

    /// Lets go of snapshots that are neither current nor fresh: they are the largest thing
    /// that a control plane without starting streams would hold.
    pub(crate) fn trim(&self, head: u64, now: Instant) {
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.retain(|(_, at, cell)| {
            let current = cell.get().is_some_and(|built| built.to.seq == head);
            current || now.saturating_duration_since(*at) < SNAPSHOT_FRESH
        });
    }
}

/// What every message of a transaction says about where it leads.
pub(crate) struct Heading {
    pub(crate) from: Option<v1::Position>,
    pub(crate) to: v1::Position,
}

pub(crate) fn delta(
    heading: Heading,
    delta: &Delta,
    extra: &[Entry],
    zstd: bool,
) -> Result<Built, BuildError> {
    let mut writer = writer(heading, false, delta.trigger.map(prost_types::Timestamp::from), zstd)?;
    upsert_all(&mut writer, &delta.upserts)?;
    upsert_all(&mut writer, extra)?;
    for patch in &delta.patches {
        writer
            .patch(&patch.key, patch.base, patch.version, &patch.patch)
            .map_err(|error| BuildError::TooLarge { key: error.key, bytes: error.bytes })?;
    }
    delta.removals.iter().for_each(|key| writer.remove(key));
    Ok(Built { to: delta.to, frames: writer.finish().into() })
}

pub(crate) fn snapshot(heading: Heading, snapshot: &Snapshot, zstd: bool) -> Result<Built, BuildError> {
    let mut writer = writer(heading, true, None, zstd)?;
    upsert_all(&mut writer, &snapshot.entries)?;
    Ok(Built { to: snapshot.position, frames: writer.finish().into() })
}

fn writer(
    heading: Heading,
    full: bool,
    trigger_time: Option<prost_types::Timestamp>,
    zstd: bool,
) -> Result<UpdateWriter, BuildError> {
    let transaction = Transaction { from: heading.from, to: heading.to, full, trigger_time };
    UpdateWriter::new(transaction, zstd).map_err(|error| BuildError::Compressor(error.to_string()))
}

fn upsert_all(writer: &mut UpdateWriter, entries: &[Entry]) -> Result<(), BuildError> {
    entries.iter().try_for_each(|entry| {
        writer
            .upsert(entry.key.kind(), entry.version, &entry.body)
            .map_err(|error| too_large(&entry.key, error.bytes))
    })
}

pub(crate) fn too_large(key: &Key, bytes: usize) -> BuildError {
    BuildError::TooLarge { key: key.to_string(), bytes }
}
