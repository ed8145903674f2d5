//! How far the writer is, and what the name of the file says about it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The names that the state may have on disk.
#[derive(Debug, Clone)]
pub(super) struct Files {
    /// At least as new as everything that is settled.
    pub(super) current: PathBuf,
    /// Older than what may be in force.
    pub(super) outdated: PathBuf,
    /// Not whole yet.
    pub(super) temporary: PathBuf,
}

impl Files {
    pub(super) fn new(current: PathBuf) -> Self {
        let (outdated, temporary) = (current.with_extension("outdated"), current.with_extension("new"));
        Self { current, outdated, temporary }
    }

    pub(super) fn named(&self, outdated: bool) -> &Path {
        if outdated { &self.outdated } else { &self.current }
    }

    /// Nothing that is outdated has the current name any more.
    pub(super) fn distrust(&self) -> io::Result<()> {
        match fs::rename(&self.current, &self.outdated) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Between whoever hands over and the writer.
#[derive(Debug)]
pub(super) struct Progress {
    inside: Mutex<Inside>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    /// Number of the last request that was made, also of one that found no room.
    handed: u64,
    /// Number of the last one that the writer has dealt with.
    written: u64,
    /// The file has the name that says that it is outdated, or there is none.
    outdated: bool,
}

impl Progress {
    pub(super) fn new(outdated: bool) -> Self {
        Self { inside: Mutex::new(Inside { outdated, ..Inside::default() }), moved: Condvar::new() }
    }

    /// The number of a new request.
    pub(super) fn hand(&self) -> u64 {
        let mut inside = self.lock();
        inside.handed += 1;
        inside.handed
    }

    /// Everything up to this number is in the file, or the file's name says that it is not.
    pub(super) fn wrote(&self, number: u64) {
        self.lock().written = number;
        self.moved.notify_all();
    }

    pub(super) fn outdated(&self) {
        self.lock().outdated = true;
        self.moved.notify_all();
    }

    pub(super) fn is_outdated(&self) -> bool {
        self.lock().outdated
    }

    /// True where the file was outdated and is not any more.
    pub(super) fn caught_up(&self) -> bool {
        let mut inside = self.lock();
        let caught_up = inside.outdated && inside.handed > 0 && inside.written == inside.handed;
        inside.outdated &= !caught_up;
        caught_up
    }

    /// Waits until nothing on disk can be mistaken for what has been handed over by now. False where
    /// that is not so in time.
    pub(super) fn settled(&self, patience: Duration) -> bool {
        let open = |inside: &mut Inside| !inside.outdated && inside.written != inside.handed;
        let waited = self.moved.wait_timeout_while(self.lock(), patience, open);
        let (mut inside, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !open(&mut inside)
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Numbers and a flag: whoever panicked has left them whole.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
