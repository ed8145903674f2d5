//! The held state on disk, so that a node that starts without its control plane programs what it
//! knew last.
//!
//! ```text
//! reconcile thread: Committed ──try_send──> writer thread: append to held.log ── compaction ──> held.log
//! start:            held.log ──load──> Held (or nothing, and why)
//! ```
//!
//! One file, `held.log`: a header with format and node name, then records. A record is a
//! length, a checksum and a `SyncResponse` of the protocol: the file is the transcript of a
//! server that sends a full snapshot and then what changed. It is read back by the code that
//! reads the stream, with the same digest check at every commit, so nothing half-written and
//! nothing damaged is ever taken for a state: reading ends at the last commit that adds up.
//!
//! **Cost.** A transaction appends what it changed. When the file has doubled it is written
//! anew: to a second file, synced, renamed over the first. All of that happens on a thread of its
//! own; the caller hands over references and never waits for a disk. If the disk falls behind,
//! changes are dropped and the whole state is handed over when it has caught up.
//!
//! **What is synced when.** A rewrite before its rename, always: a file with the right name is
//! whole. Appends at most every 5 s, and at the end: a killed process loses nothing (the kernel
//! has the pages), a machine that loses power loses some seconds of history, which is what it
//! would have lost while it was off.

mod format;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::SystemTime;

use lockstep_model::{Digest, NodeContext, State};

use crate::Position;
use crate::session::{Committed, Held};
use writer::{Job, Writer};

const LOG: &str = "held.log";
const LOCK: &str = "lock";
/// Transactions that may wait for the disk.
const QUEUE: usize = 64;

/// Keeps what a session holds on disk.
#[derive(Debug)]
pub struct Cache {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Something was not handed over: the next job is the whole state.
    behind: bool,
    /// The node's facts as last handed over.
    node: Option<NodeContext>,
    /// Held for as long as the cache is open.
    _lock: File,
}

/// What an earlier process left.
#[derive(Debug)]
pub struct Restored {
    /// The state.
    pub held: Held,
    /// When it was last written.
    pub saved_at: SystemTime,
}

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Another process has the directory.
    #[error("{}: another process uses this state directory", path.display())]
    InUse {
        /// The lock file.
        path: PathBuf,
    },
    /// The directory or a file in it cannot be used.
    #[error("{}: cannot be used", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Cache {
    /// Locks the directory (made if needed), reads what is there for this node and starts the
    /// writer. What cannot be used is logged and left out, up to nothing at all; an error means
    /// that the directory itself is of no use.
    pub fn open(directory: &Path, node_name: &str) -> Result<(Self, Option<Restored>), CacheError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CacheError::Io { path, source }
        };
        std::fs::create_dir_all(directory).map_err(failed(directory))?;
        let lock_path = directory.join(LOCK);
        let lock = File::create(&lock_path).map_err(failed(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(CacheError::InUse { path: lock_path }),
            Err(std::fs::TryLockError::Error(source)) => {
                return Err(CacheError::Io { path: lock_path, source });
            }
        }
        let log = directory.join(LOG);
        let loaded = format::load(&log, node_name).map_err(failed(&log))?;
        let writer = Writer::new(log, node_name, loaded.as_ref());
        let (jobs, queue) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("cache".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(failed(directory))?;
        let restored = loaded.map(|loaded| Restored { held: loaded.held, saved_at: loaded.saved_at });
        let node = restored.as_ref().map(|restored| restored.held.node.clone());
        Ok((Self { jobs: Some(jobs), thread: Some(thread), behind: false, node, _lock: lock }, restored))
    }

    /// Hands transactions over, in the order of their commits. Never waits. `state` is the state
    /// after the last one.
    pub fn record(&mut self, committed: Vec<Committed>, node: &NodeContext, state: &State) {
        if self.behind {
            let position = committed.last().map(|last| last.position);
            return position.map_or((), |position| self.replace(position, node, state));
        }
        for committed in committed {
            let position = honest(committed.position, committed.held);
            let facts = self.news(node);
            if !self.hand_over(Job::Append { changes: committed.changes, position, node: facts }, node) {
                return;
            }
        }
    }

    /// Hands over what could not be before, and the node's facts. For idle moments; `position` is
    /// that of `state`, and every transaction up to it has been recorded.
    pub fn catch_up(&mut self, position: Position, node: &NodeContext, state: &State) {
        if self.behind {
            self.replace(position, node, state);
        } else if let Some(facts) = self.news(node) {
            let position = honest(position, state.digest());
            self.hand_over(Job::Append { changes: Vec::new(), position, node: Some(facts) }, node);
        }
    }

    fn replace(&mut self, position: Position, node: &NodeContext, state: &State) {
        let position = honest(position, state.digest());
        let node_facts = self.news(node);
        self.hand_over(Job::Replace { state: Box::new(state.clone()), position, node: node_facts }, node);
    }

    /// The node's facts, where they are not the ones handed over last.
    fn news(&self, node: &NodeContext) -> Option<NodeContext> {
        (self.node.as_ref() != Some(node)).then(|| node.clone())
    }

    /// False where it could not be handed over.
    fn hand_over(&mut self, job: Job, node: &NodeContext) -> bool {
        let Some(jobs) = &self.jobs else { return false };
        self.behind = match jobs.try_send(job) {
            Ok(()) => false,
            Err(TrySendError::Full(_)) => true,
            Err(TrySendError::Disconnected(_)) => {
                tracing::error!("the cache writer is gone: the state is not kept on disk any more");
                self.jobs = None;
                return false;
            }
        };
        if !self.behind {
            self.node = self.news(node).or_else(|| self.node.take());
        }
        !self.behind
    }
}

impl Drop for Cache {
    /// Waits until everything handed over is on disk.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the cache writer panicked");
        }
    }
}

/// A state that lacks something the server sent has no place in the server's history: a
/// process that starts from it must be sent everything.
fn honest(position: Position, held: Digest) -> Position {
    if position.digest == held { position } else { Position { digest: held, ..Position::default() } }
}
