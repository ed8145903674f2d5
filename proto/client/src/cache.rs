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
//! Kinds of resources that only a newer release knows are passed over: then what is held has a digest
//! of its own and no place in history, and the file is written anew instead of added to.
//!
//! **Cost.** A transaction appends what it changed. When the file has doubled it is written
//! anew: to a second file, synced, renamed over the first. All of that happens on a thread of its
//! own; the caller hands over references. If the disk falls behind, changes are dropped and the
//! whole state is handed over when it has caught up. After an error the file of before stays, and
//! the writer tries again by itself.
//!
//! **What a killed process leaves.** `held.log` is at least as new as everything that is *settled*,
//! and nothing is reported as verified before it is settled: a new process never goes back behind
//! what was reported. For that it is enough that the kernel has the pages, so nobody waits for a
//! sync. While a sync or a rewrite runs, or cannot be done, the file is called `held.outdated`
//! instead: then everything is settled at once, and a new process knows that the rules it finds in
//! the kernel may be newer.
//!
//! **What is synced when.** A rewrite before its rename, always: a file with the right name is
//! whole. Appends at most every 5 s, and at the end: a machine that loses power loses some seconds
//! of history, which is what it would have lost while it was off.

mod format;
mod progress;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use lockstep_model::{Digest, NodeContext, State};

use crate::Position;
use crate::session::{Committed, Held};
use progress::{Files, Progress};
use writer::{Job, What, Writer};

const LOG: &str = "held.log";
const LOCK: &str = "lock";
/// Transactions that may wait for the disk.
const QUEUE: usize = 64;
/// Least time between two tries to write the file anew after an error.
const RETRY_EVERY: Duration = Duration::from_secs(30);

/// Keeps what a session holds on disk.
#[derive(Debug)]
pub struct Cache {
    jobs: Option<SyncSender<Job>>,
    files: Files,
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
    /// Something was not handed over: the next job is the whole state.
    behind: bool,
    /// The file was found outdated, and nothing has been handed over since.
    doubted: bool,
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
    /// The earlier process may have programmed something newer.
    pub outdated: bool,
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
        Self::open_retrying(directory, node_name, RETRY_EVERY)
    }

    fn open_retrying(
        directory: &Path,
        node_name: &str,
        retry_every: Duration,
    ) -> Result<(Self, Option<Restored>), CacheError> {
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
        let files = Files::new(directory.join(LOG));
        let load = |path: &Path| format::load(path, node_name).map_err(failed(path));
        let (loaded, outdated) = match load(&files.current)? {
            Some(loaded) => (Some(loaded), false),
            None => (load(&files.outdated)?, true),
        };
        let progress = Arc::new(Progress::new(outdated));
        let writer = Writer::new(files.clone(), progress.clone(), node_name, loaded.as_ref(), retry_every);
        let (jobs, queue) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("cache".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(failed(directory))?;
        let restored =
            loaded.map(|loaded| Restored { held: loaded.held, saved_at: loaded.saved_at, outdated });
        let cache = Self {
            jobs: Some(jobs),
            files,
            progress,
            thread: Some(thread),
            behind: false,
            doubted: outdated && restored.is_some(),
            node: restored.as_ref().map(|restored| restored.held.node.clone()),
            _lock: lock,
        };
        Ok((cache, restored))
    }

    /// Waits until a process that is killed now leaves nothing on disk that passes for newer than it
    /// is: what was handed over is in the file, or the file is called outdated. False where that is
    /// not so in time, which is no error: it may be asked again.
    pub fn settled(&self, patience: Duration) -> bool {
        self.progress.settled(patience)
    }

    /// Hands transactions over, in the order of their commits. Never waits for a disk. `state` is the state
    /// after the last one.
    pub fn record(&mut self, committed: Vec<Committed>, node: &NodeContext, state: &State) {
        if self.behind {
            let position = committed.last().map(|last| last.position);
            return position.map_or((), |position| self.replace(position, node, state));
        }
        for committed in committed {
            let position = honest(committed.position, committed.held);
            let facts = self.news(node);
            if !self.hand_over(What::Append(committed.changes), position, facts, node) {
                return;
            }
        }
    }

    /// Hands over what could not be before, and the node's facts. For idle moments; `position` is
    /// that of `state`, every transaction up to it has been recorded, and it has been programmed.
    pub fn catch_up(&mut self, position: Position, node: &NodeContext, state: &State) {
        if self.behind {
            self.replace(position, node, state);
            return;
        }
        let facts = self.news(node);
        if facts.is_some() || self.doubted {
            let position = honest(position, state.digest());
            self.hand_over(What::Append(Vec::new()), position, facts, node);
        }
    }

    fn replace(&mut self, position: Position, node: &NodeContext, state: &State) {
        let position = honest(position, state.digest());
        let node_facts = self.news(node);
        self.hand_over(What::Replace(Box::new(state.clone())), position, node_facts, node);
    }

    /// The node's facts, where they are not the ones handed over last.
    fn news(&self, node: &NodeContext) -> Option<NodeContext> {
        (self.node.as_ref() != Some(node)).then(|| node.clone())
    }

    /// False where it could not be handed over.
    fn hand_over(
        &mut self,
        what: What,
        position: Position,
        facts: Option<NodeContext>,
        node: &NodeContext,
    ) -> bool {
        let Some(jobs) = &self.jobs else { return false };
        let job = Job { number: self.progress.hand(), what, position, node: facts };
        self.behind = match jobs.try_send(job) {
            Ok(()) => false,
            Err(TrySendError::Full(_)) => true,
            Err(TrySendError::Disconnected(_)) => {
                tracing::error!("the cache writer is gone: the state is not kept on disk any more");
                self.jobs = None;
                if let Err(error) = self.files.distrust() {
                    tracing::error!(path = %self.files.current.display(), %error, "cannot rename the outdated cache");
                }
                self.progress.outdated();
                return false;
            }
        };
        if !self.behind {
            self.doubted = false;
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
