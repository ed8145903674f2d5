//! The thread that writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use lockstep_model::{NodeContext, State};

use super::format::{self, Loaded, WriteError};
use crate::Position;
use crate::session::Change;

/// Least time between two syncs of what was appended.
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// Least time between two tries to write the file anew after an error.
const RETRY_EVERY: Duration = Duration::from_secs(30);
/// A file that grew by less is not worth writing anew.
const MIN_GROWTH: u64 = 1024 * 1024;

/// What the writer is asked to keep.
#[derive(Debug)]
pub(super) enum Job {
    /// Changes to what it has.
    Append { changes: Vec<Change>, position: Position, node: Option<NodeContext> },
    /// All of it.
    Replace { state: Box<State>, position: Position, node: Option<NodeContext> },
}

pub(super) struct Writer {
    path: PathBuf,
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
}

impl Writer {
    pub(super) fn new(path: PathBuf, node_name: &str, loaded: Option<&Loaded>) -> Self {
        let mut writer = Self {
            path,
            node_name: node_name.to_owned(),
            state: State::default(),
            position: Position::default(),
            node: NodeContext::unknown(node_name),
            file: None,
            base: 0,
            growth: 0,
            unsynced: None,
            failed: None,
        };
        if let Some(loaded) = loaded {
            writer.state = loaded.held.state.clone();
            writer.position = loaded.held.position;
            writer.node = loaded.held.node.clone();
            writer.file = reopen(&writer.path, loaded.good_bytes).ok();
            writer.base = loaded.base_bytes;
            writer.growth = loaded.good_bytes - loaded.base_bytes;
        }
        writer
    }

    /// Writes until nobody can ask any more.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            let wait = self.unsynced.map(|since| SYNC_EVERY.saturating_sub(since.elapsed()));
            let job = match wait {
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wait) => jobs.recv_timeout(wait),
            };
            match job {
                Ok(job) => self.write(job),
                Err(RecvTimeoutError::Timeout) => self.sync(),
                Err(RecvTimeoutError::Disconnected) => {
                    self.sync();
                    return;
                }
            }
        }
    }

    fn write(&mut self, job: Job) {
        let appended = match job {
            Job::Append { changes, position, node } => {
                let appended = self.append(&changes, position, node.as_ref());
                self.node = node.unwrap_or_else(|| self.node.clone());
                self.position = position;
                for change in changes {
                    match change {
                        Change::Upsert(version, resource) => self.state.upsert(version, resource),
                        Change::Remove(key) => self.state.remove(&key),
                    };
                }
                appended
            }
            Job::Replace { state, position, node } => {
                self.state = *state;
                self.position = position;
                self.node = node.unwrap_or_else(|| self.node.clone());
                Ok(false)
            }
        };
        match appended {
            Ok(true) if self.growth <= self.base.max(MIN_GROWTH) => {}
            Ok(_) => self.rewrite(),
            Err(error) => {
                self.report(&error);
                self.rewrite();
            }
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
        if self.failed.is_some_and(|failed| failed.elapsed() < RETRY_EVERY) {
            return;
        }
        match self.write_anew() {
            Ok((file, bytes)) => {
                if self.failed.take().is_some() {
                    tracing::info!(path = %self.path.display(), "the state is kept on disk again");
                }
                self.file = Some(file);
                self.base = bytes;
                self.growth = 0;
                self.unsynced = None;
            }
            Err(error) => {
                self.report(&error);
                self.failed = Some(Instant::now());
                self.file = None;
                // A file that is older than what the node does is worse than none.
                if let Err(error) = fs::remove_file(&self.path)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(path = %self.path.display(), %error, "cannot remove the outdated cache");
                }
            }
        }
    }

    fn report(&self, error: &WriteError) {
        if self.failed.is_none() {
            tracing::warn!(path = %self.path.display(), %error, "cannot keep the state on disk");
        }
    }

    fn write_anew(&self) -> Result<(File, u64), WriteError> {
        let mut bytes = format::header(&self.node_name);
        format::node_record(&mut bytes, &self.node);
        format::state_records(&mut bytes, &self.state, self.position)?;
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        if let Some(directory) = self.path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok((file, bytes.len() as u64))
    }

    fn sync(&mut self) {
        if self.unsynced.take().is_some()
            && let Some(file) = &self.file
            && let Err(error) = file.sync_data()
        {
            self.report(&error.into());
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
