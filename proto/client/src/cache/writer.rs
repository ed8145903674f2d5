//! The thread that writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use lockstep_model::{NodeContext, State};

use super::format::{self, Loaded, WriteError};
use super::progress::{Files, Progress};
use crate::Position;
use crate::session::Change;

/// Least time between two syncs of what was appended.
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// A file that grew by less is not worth writing anew.
const MIN_GROWTH: u64 = 1024 * 1024;

/// What the writer is asked to keep, with the number of the request.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) what: What,
    pub(super) position: Position,
    pub(super) node: Option<NodeContext>,
}

#[derive(Debug)]
pub(super) enum What {
    /// Changes to what it has.
    Append(Vec<Change>),
    /// All of it.
    Replace(Box<State>),
}

pub(super) struct Writer {
    files: Files,
    progress: Arc<Progress>,
    node_name: String,
    /// A copy of its own: the resources are shared with the session, the table is not, so a
    /// rewrite needs nobody's leave.
    state: State,
    position: Position,
    node: NodeContext,
    /// `None` = the file must be written anew before anything can be appended.
    file: Option<File>,
    /// Size after the last rewrite, and growth since.
    base: u64,
    growth: u64,
    unsynced: Option<Instant>,
    /// When a rewrite failed last: one log line per change, not per transaction.
    failed: Option<Instant>,
    /// Least time between two tries to write the file anew after an error.
    retry_every: Duration,
}

impl Writer {
    pub(super) fn new(
        files: Files,
        progress: Arc<Progress>,
        node_name: &str,
        loaded: Option<&Loaded>,
        retry_every: Duration,
    ) -> Self {
        let mut writer = Self {
            files,
            progress,
            node_name: node_name.to_owned(),
            state: State::default(),
            position: Position::default(),
            node: NodeContext::unknown(node_name),
            file: None,
            base: 0,
            growth: 0,
            unsynced: None,
            failed: None,
            retry_every,
        };
        if let Some(loaded) = loaded {
            writer.state = loaded.held.state.clone();
            writer.position = loaded.held.position;
            writer.node = loaded.held.node.clone();
            let path = writer.files.named(writer.progress.is_outdated());
            // A transaction that follows what was passed over would add up here only, and not for
            // the release that wrote it.
            if !loaded.passed_over {
                writer.file = reopen(path, loaded.good_bytes).ok();
            }
            writer.base = loaded.base_bytes;
            writer.growth = loaded.good_bytes - loaded.base_bytes;
        }
        writer
    }

    /// Writes until nobody can ask any more.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            self.trust();
            let sync = self.unsynced.map(|since| SYNC_EVERY.saturating_sub(since.elapsed()));
            let retry = self.failed.map(|since| self.retry_every.saturating_sub(since.elapsed()));
            let job = match sync.into_iter().chain(retry).min() {
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wait) => jobs.recv_timeout(wait),
            };
            match job {
                Ok(job) => {
                    let number = job.number;
                    self.write(job);
                    self.progress.wrote(number);
                }
                Err(RecvTimeoutError::Timeout) if self.failed.is_some() => self.rewrite(),
                Err(RecvTimeoutError::Timeout) => {
                    // Whoever waits for what follows does not wait for the disk.
                    self.distrust();
                    self.sync();
                }
                Err(RecvTimeoutError::Disconnected) => {
                    if self.failed.is_some() {
                        self.retry_every = Duration::ZERO;
                        self.rewrite();
                    }
                    self.sync();
                    self.trust();
                    return;
                }
            }
        }
    }

    fn write(&mut self, job: Job) {
        let Job { what, position, node, number: _ } = job;
        let appended = match what {
            What::Append(changes) => {
                let appended = self.append(&changes, position, node.as_ref());
                for change in changes {
                    match change {
                        Change::Upsert(version, resource) => self.state.upsert(version, resource),
                        Change::Remove(key) => self.state.remove(&key),
                    };
                }
                appended
            }
            What::Replace(state) => {
                self.state = *state;
                Ok(false)
            }
        };
        self.position = position;
        self.node = node.unwrap_or_else(|| self.node.clone());
        match appended {
            Ok(true) if self.growth <= self.base.max(MIN_GROWTH) => {}
            Ok(_) => self.rewrite(),
            Err(error) => {
                self.report(&error);
                self.rewrite();
            }
        }
    }

    /// The file is older than what may be in force by now: its name says so, and nobody waits.
    fn distrust(&self) {
        if self.progress.is_outdated() {
            return;
        }
        if let Err(error) = self.files.distrust() {
            tracing::warn!(
                path = %self.files.current.display(), %error,
                "cannot rename the outdated cache: a restart without control plane would program it"
            );
        }
        self.progress.outdated();
    }

    /// Where everything that was handed over is in the file, its name says that.
    fn trust(&self) {
        if self.file.is_none() || !self.progress.caught_up() {
            return;
        }
        // From here on everybody waits again, and until the name is right it errs towards old.
        if let Err(error) = fs::rename(&self.files.outdated, &self.files.current) {
            tracing::warn!(path = %self.files.outdated.display(), %error, "cannot rename the cache");
            self.progress.outdated();
        }
    }

    /// True = it is in the file; false = there is no file to append to, or it is not worth it.
    fn append(
        &mut self,
        changes: &[Change],
        position: Position,
        node: Option<&NodeContext>,
    ) -> Result<bool, WriteError> {
        let many = changes.len() as u64 > self.state.len();
        let Some(file) = self.file.as_mut().filter(|_| !many) else { return Ok(false) };
        let mut records = Vec::new();
        if let Some(node) = node {
            format::node_record(&mut records, node);
        }
        // The number of resources is for people; the digest is what is checked.
        format::change_records(&mut records, changes, position, self.state.len())?;
        if let Err(error) = file.write_all(&records) {
            self.file = None;
            return Err(error.into());
        }
        self.growth += records.len() as u64;
        self.unsynced.get_or_insert_with(Instant::now);
        Ok(true)
    }

    fn rewrite(&mut self) {
        self.distrust();
        if self.failed.is_some_and(|failed| failed.elapsed() < self.retry_every) {
            return;
        }
        match self.write_anew() {
            Ok((file, bytes)) => {
                if self.failed.take().is_some() {
                    tracing::info!(path = %self.files.current.display(), "the state is kept on disk again");
                }
                self.file = Some(file);
                self.base = bytes;
                self.growth = 0;
                self.unsynced = None;
            }
            Err(error) => {
                self.report(&error);
                self.failed = Some(Instant::now());
                // What was on disk stays: after a reboot, an old state is better than none.
                self.file = None;
                self.unsynced = None;
            }
        }
    }

    fn report(&self, error: &WriteError) {
        if self.failed.is_none() {
            tracing::warn!(path = %self.files.outdated.display(), %error, "cannot keep the state on disk, what was there stays");
        }
    }

    fn write_anew(&self) -> Result<(File, u64), WriteError> {
        let mut begin = format::header(&self.node_name);
        format::node_record(&mut begin, &self.node);
        let mut file = File::create(&self.files.temporary)?;
        file.write_all(&begin)?;
        let bytes = begin.len() as u64 + format::write_state(&mut file, &self.state, self.position)?;
        file.sync_all()?;
        fs::rename(&self.files.temporary, &self.files.outdated)?;
        if let Some(directory) = self.files.outdated.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok((file, bytes))
    }

    fn sync(&mut self) {
        if self.unsynced.take().is_some()
            && let Some(file) = &self.file
            && let Err(error) = file.sync_data()
        {
            self.report(&error.into());
            self.failed = Some(Instant::now());
            self.file = None;
        }
    }
}

/// Opens a file for appending after its last good record.
fn reopen(path: &Path, good_bytes: u64) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.set_len(good_bytes)?;
    io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    Ok(file)
}
