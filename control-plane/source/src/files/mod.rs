//! A directory of Kubernetes manifests as the source.
//!
//! ```text
//! inotify, or a second gone by ──> look: which files changed? ──> parse, convert, track ──> events
//! ```
//!
//! * Files ending in `.yaml`, `.yml` or `.json` are read: Services, EndpointSlices, Nodes and
//!   ServiceCIDRs, in several documents or in lists, as `kubectl get -o yaml` writes them. Other kinds are
//!   passed over; so are directories in the directory and names that begin with a dot.
//! * A file counts as a whole: one that is no manifest keeps its last good content. Write it
//!   elsewhere and rename it, and no half of it is ever read; one that is written in place is
//!   read when it has been quiet for a moment.
//! * An object that is wrong in a file that is right is in quarantine by itself. Of two
//!   definitions of one object that of the first file by name is in force.
//! * A manifest has no allocator behind it: a Service needs its `spec.clusterIP`.

mod directory;
mod manifest;
#[cfg(test)]
mod tests;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, mpsc};

use self::directory::{Directory, Look, QUIET};
use crate::Event;

/// Where inotify tells nothing (network file systems, a directory that is not there yet),
/// this often tells.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// [`Event::Alive`] is told at most this often.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// Why a directory cannot be a source at all. What is wrong *in* it is an event, not an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is there and is no directory.
    #[error("source directory {path}: is not a directory")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
}

/// Reads and watches `directory` until the receiver of `events` is gone, then returns `Ok`.
///
/// A directory that does not exist (yet) is waited for, and one that goes away later takes
/// nothing with it. [`Event::Synced`] comes when every file in it could be read; until then
/// [`Event::NotSynced`] names the one that could not.
pub async fn run(directory: PathBuf, events: mpsc::Sender<Event>) -> Result<(), Error> {
    if directory.exists() && !directory.is_dir() {
        return Err(Error::NotADirectory { path: directory });
    }
    let bell = Arc::new(Notify::new());
    let mut watch = Watch::new(bell.clone());
    let mut report = Report::default();
    let mut directory = Directory::new(directory);
    loop {
        watch.keep(directory.path());
        let looked = tokio::task::spawn_blocking(move || {
            let look = directory.look();
            (directory, look)
        });
        let look = match looked.await {
            Ok((back, look)) => {
                directory = back;
                look
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let pause = if look.unsettled { QUIET / 2 } else { LOOK_EVERY };
        for event in report.events(look) {
            let Ok(()) = events.send(event).await else { return Ok(()) };
        }
        tokio::select! {
            () = events.closed() => return Ok(()),
            () = bell.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// What has been told.
#[derive(Default)]
struct Report {
    synced: bool,
    not_synced: Option<String>,
    unreadable: bool,
    alive: Option<Instant>,
}

impl Report {
    fn events(&mut self, look: Look) -> Vec<Event> {
        let mut events = Vec::new();
        events.extend(look.changes.map(Event::Changes));
        if look.readable == self.unreadable {
            self.unreadable = !look.readable;
            match &look.incomplete {
                Some(reason) if self.unreadable => tracing::warn!("{reason}; what was read stays"),
                _ => tracing::info!("the source directory can be read again"),
            }
        }
        match look.incomplete {
            None if !self.synced => {
                self.synced = true;
                events.push(Event::Synced);
            }
            Some(reason) if !self.synced && self.not_synced.as_ref() != Some(&reason) => {
                events.push(Event::NotSynced(reason.clone()));
                self.not_synced = Some(reason);
            }
            _ => {}
        }
        if look.readable && self.alive.is_none_or(|told| told.elapsed() >= ALIVE_EVERY) {
            self.alive = Some(Instant::now());
            events.push(Event::Alive);
        }
        events
    }
}

/// Rings the bell when something happens in the directory.
struct Watch {
    bell: Arc<Notify>,
    /// Device and inode of the directory it is set on.
    set: Option<((u64, u64), RecommendedWatcher)>,
    failed: bool,
}

impl Watch {
    fn new(bell: Arc<Notify>) -> Self {
        Self { bell, set: None, failed: false }
    }

    /// Sets the watch on what is at `path` now. Without one the directory is still looked at
    /// every [`LOOK_EVERY`].
    fn keep(&mut self, path: &Path) {
        let Ok(metadata) = std::fs::metadata(path) else {
            self.set = None;
            return;
        };
        let identity = (metadata.dev(), metadata.ino());
        if self.set.as_ref().is_some_and(|(set, _)| *set == identity) {
            return;
        }
        let bell = self.bell.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let read = |event: &notify::Event| match event.kind {
                EventKind::Access(kind) => kind != AccessKind::Close(AccessMode::Write),
                _ => false,
            };
            if !event.as_ref().is_ok_and(read) {
                bell.notify_one();
            }
        });
        let watcher = watcher.and_then(|mut watcher| {
            watcher.watch(path, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => {
                self.set = Some((identity, watcher));
                self.failed = false;
            }
            Err(error) => {
                self.set = None;
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!(path = %path.display(), "no inotify watch, looking every second: {error}");
                }
            }
        }
    }
}
